ARG BASE=python:3.13-slim
FROM ${BASE}
COPY dotproxy.py /dotproxy.py
USER 65532:65532
EXPOSE 5353/udp 5353/tcp
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "/dotproxy.py"]
CMD ["--listen", "0.0.0.0:5353"]
