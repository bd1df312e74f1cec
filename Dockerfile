# The image holds the interpreter, the parts of the standard library that dotproxy
# imports, the shared objects and CA certificates they need, and nothing else.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build

# By list, not by what one run imports: a handshake, an error or a page needs more.
ARG MODULES="__future__ _collections_abc _colorize _opcode_metadata _py_warnings \
  _strptime _weakrefset abc annotationlib argparse ast base64 bisect calendar codecs \
  collections contextlib copy copyreg dataclasses datetime dis email enum fnmatch \
  functools genericpath gettext glob hashlib heapq html http importlib inspect io \
  ipaddress json keyword linecache locale logging mimetypes ntpath opcode operator os \
  posixpath queue quopri random re reprlib selectors shlex shutil signal \
  socket socketserver sre_compile sre_constants sre_parse ssl stat string stringprep \
  struct subprocess textwrap threading token tokenize traceback types typing urllib uu \
  warnings weakref"
ARG CODECS="__init__ aliases ascii idna latin_1 punycode utf_8"
ARG EXTENSIONS="_bisect _blake2 _contextvars _datetime _hashlib _heapq _json _md5 \
  _opcode _posixsubprocess _queue _random _sha1 _sha2 _sha256 _sha3 _sha512 _socket \
  _ssl _struct array binascii grp math resource select unicodedata"

COPY dotproxy.py /build/
WORKDIR /build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN library="$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"; \
  mkdir -p "root$library/encodings" "root$library/lib-dynload" root/usr/local/bin; \
  copy() { for found in "$library/$1" "$library/$1.py" "$library/$1".*.so; do \
    [ ! -e "$found" ] || cp -R "$found" "root$library/$2"; done; }; \
  for name in $MODULES; do copy "$name" ""; done; \
  for name in $CODECS; do copy "encodings/$name" encodings; done; \
  for name in $EXTENSIONS; do copy "lib-dynload/$name" lib-dynload; done; \
  cp dotproxy.py root/; \
  find root -name __pycache__ -prune -exec rm -r '{}' +; \
  python3 -m compileall -qb --invalidation-mode unchecked-hash -s root root; \
  find root -name '*.py' -delete; \
  cp "$(python3 -c 'import os, sys; print(os.path.realpath(sys.executable))')" \
    root/usr/local/bin/python3
# glibc opens libgcc_s when a thread ends, and searches /usr/local/lib by the cache only.
RUN { find root -name '*.so' -exec ldd root/usr/local/bin/python3 '{}' +; \
      ldconfig -p | grep 'libgcc_s\.so\.1 '; } \
    | sed -nE 's/^\t(.* => )?(\/[^ ]+)( \(.*)?$/\2/p' | sort -u \
    | xargs cp -L --parents -t root; \
  mkdir root/etc; \
  cp /etc/ld.so.cache root/etc/
RUN bundle="$(python3 -c \
    'import ssl; print(ssl.get_default_verify_paths().openssl_cafile)')"; \
  mkdir -p "root$(dirname "$bundle")"; \
  cp -L /etc/ssl/certs/ca-certificates.crt "root$bundle"; \
  echo 'dotproxy:x:65532:65532::/:' > root/etc/passwd; \
  echo 'dotproxy:x:65532:' > root/etc/group
# What is missing fails here, not in the container.
RUN chroot root /usr/local/bin/python3 -IS -c 'import encodings.idna, http.server, json, \
  ssl, unicodedata; assert ssl.create_default_context().get_ca_certs()'; \
  chroot root /usr/local/bin/python3 -IS /dotproxy.pyc --version

FROM scratch
COPY --from=build /build/root /
LABEL org.opencontainers.image.title="dotproxy" \
  org.opencontainers.image.description="Plain DNS in, DNS over TLS out" \
  org.opencontainers.image.version="0.1.0"
ENV DOTPROXY_LISTEN="0.0.0.0:5353 [::]:5353"
USER 65532:65532
EXPOSE 5353/udp 5353/tcp
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=5s \
  CMD ["/usr/local/bin/python3", "-IS", "/dotproxy.pyc", "--healthcheck"]
ENTRYPOINT ["/usr/local/bin/python3", "-IS", "/dotproxy.pyc"]
