# A worker, without a session builder. For one with yours:
#     FROM this image
#     USER root
#     RUN pip install your-package
#     USER worker
#     ENV WORKER_SESSION_BUILDER=your_package:build_state
# It listens for other machines, so it wants TLS and a check of who asks (docs/security.md), or WORKER_INSECURE=true; and
# plans read no files but those of folders that WORKER_ALLOW_PATH names.
# Set the port and certificates by WORKER_PORT, WORKER_TLS_CERT and WORKER_TLS_KEY: the health check reads them too, and with
# WORKER_TLS_CLIENT_CA shows that certificate, which an authority in there must have signed as well.
FROM python:3.13-slim AS build
COPY . /source
RUN python -m venv /worker && /worker/bin/pip install --no-cache-dir '/source[uvloop]'

FROM python:3.13-slim
COPY --from=build /worker /worker
RUN useradd --create-home worker
USER worker
WORKDIR /home/worker
ENV PATH=/worker/bin:$PATH WORKER_HOST=0.0.0.0 WORKER_PORT=8000
EXPOSE 8000
HEALTHCHECK --start-period=5s --interval=10s --timeout=6s CMD ["python", "-m", "worker.probe"]
ENTRYPOINT ["python", "-m", "worker"]
