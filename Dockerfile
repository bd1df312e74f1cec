ARG BASE=python:3.13-slim
FROM ${BASE}
COPY dotproxy.py /dotproxy.py
USER 65532:65532
EXPOSE 5353/udp 5353/tcp
STOPSIGNAL SIGTERM
ENV DOTPROXY_LISTEN=0.0.0.0:5353
HEALTHCHECK CMD ["python3", "/dotproxy.py", "--healthcheck"]
ENTRYPOINT ["python3", "/dotproxy.py"]
