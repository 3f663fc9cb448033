# docker build -t glm-web . && docker run --gpus all -p 8080:8080 -p 8081:8081 --env-file .env glm-web
# The same requirements.txt, the same start.sh and stop.sh as outside of a container.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt ./
COPY deploy/environment.sh deploy/packages.py deploy/
RUN bash -c 'source deploy/environment.sh && choose_python requirements.txt && "$PYTHON" -m pip cache purge'

COPY . .

EXPOSE 8080 8081
HEALTHCHECK --interval=60s --timeout=30s --start-period=15m CMD ["/app/.venv/bin/python", "/app/health_check.py"]
ENTRYPOINT ["tini", "--", "deploy/container.sh"]
