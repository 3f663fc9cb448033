# The API, the page and the checker in one container: docs/container.md says how to build, run and keep it.
# The CUDA of the base is that of torch's wheels, so that a driver too old for them is refused at the start. Only the tag is
# pinned; put @sha256:... behind it where the very same base matters.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

# cuda, or cpu: no compiler and no 4-bit weights, for the demo model.
ARG VARIANT=cuda
# One more index of packages, such as that of torch's wheels without CUDA.
ARG EXTRA_INDEX_URL=

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /app

# Triton compiles a small C file when it starts, for which it needs a compiler and Python's headers.
# Versions are those of the base's release: a pinned one is no longer to be had after its first security update.
# hadolint ignore=DL3008
RUN packages=(python3 python3-venv tini) \
    && case $VARIANT in \
        cuda) packages+=(gcc libc6-dev python3-dev) ;; \
        cpu) ;; \
        *) echo "VARIANT is cuda or cpu. Given: $VARIANT" >&2; exit 1 ;; \
    esac \
    && apt-get update \
    && apt-get install -y --no-install-recommends "${packages[@]}" \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin glm

COPY requirements.txt requirements-quantized.txt ./
COPY deploy/environment.sh deploy/packages.py deploy/
# Installed by the functions that start.sh installs with, from the same lists.
RUN --mount=type=cache,target=/root/.cache/pip \
    if [[ $EXTRA_INDEX_URL ]]; then export PIP_EXTRA_INDEX_URL=$EXTRA_INDEX_URL; fi; \
    source deploy/environment.sh \
    && choose_python requirements.txt \
    && if [[ $VARIANT == cuda ]]; then install_missing requirements-quantized.txt; fi

COPY . .
# Compiled here, because nothing can be written there later. The three folders are the only ones that the service writes to,
# besides /tmp, and belong in volumes; without VOLUME, which would hide a forgotten one behind an unnamed volume. Whoever
# builds may have a strict umask.
RUN find . -path ./.venv -prune -o ! -perm -a=r -exec chmod a+rX {} + \
    && .venv/bin/python -m compileall -q api deploy models monitor web ./*.py \
    && mkdir -p logs keys weights && chown 10001:10001 logs keys weights && chmod 700 keys

ENV GLM_ENV_FILE=/app/keys/.env \
    HF_HOME=/app/weights/huggingface \
    MODELSCOPE_CACHE=/app/weights/modelscope \
    TRITON_CACHE_DIR=/app/weights/triton \
    XDG_CACHE_HOME=/app/weights/cache \
    HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
# Reads the checker's last report and its age, and cures nothing: the checker that container.sh keeps running does. A first
# download takes hours, during which Docker says `starting`.
HEALTHCHECK --interval=60s --timeout=20s --start-period=12h --retries=3 CMD ["/app/.venv/bin/python", "/app/health_check.py", "status"]
ENTRYPOINT ["tini", "--", "/app/deploy/container.sh"]
CMD ["1800"]
