# docker build --target cpu -t quire:cpu .
#
# The build stages hold the compiler and end in one virtual environment; the image holds that environment and nothing
# else. torch comes last, so that a change of its build repeats nothing else; CUDA comes in torch's own wheels.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/quire
RUN python -m venv "$VIRTUAL_ENV" && pip install --no-cache-dir uv==0.13.8
WORKDIR /src
COPY requirements.lock .
RUN uv pip install --no-cache --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY service service
RUN python -m model.native.build \
 && uv pip install --no-cache --no-deps --no-build-isolation .

FROM build AS build-cpu
RUN uv pip install --no-cache --torch-backend cpu torch==2.13.0

FROM build AS build-gpu
RUN uv pip install --no-cache --torch-backend cu130 torch==2.13.0

FROM ${BASE} AS runtime
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin quire
# The root may be read-only: everything that is written (the private socket directory, caches) goes to /tmp.
ENV PATH=/opt/quire/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    QUIRE_HOST=0.0.0.0 \
    QUIRE_INSECURE=true \
    QUIRE_METRICS_HOST=0.0.0.0
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["quire", "health"]
ENTRYPOINT ["quire"]
CMD ["serve"]

# The same server with torch's CUDA build, and the C compiler with which triton builds what loads its kernels.
FROM runtime AS gpu
USER 0:0
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-gpu /opt/quire /opt/quire

# Last, so that a build without --target makes it.
FROM runtime AS cpu
COPY --from=build-cpu /opt/quire /opt/quire
