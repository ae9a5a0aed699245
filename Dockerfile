# A worker, without a session builder. For one with yours: FROM this image, install your package, set WORKER_SESSION_BUILDER.
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
