# syntax=docker/dockerfile:1
# One image for every pod: pipeline steps, MLflow, Ray nodes, the model server. Each of them sets its own command.
#
#   docker build -t face-mllm:0.1.0 --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
#   docker build -t registry.example.com/face-mllm:0.1.0-cuda .
#
# The first takes torch's build without CUDA (about 3 GB less); the second takes what PyPI has, which carries CUDA.
FROM python:3.11-slim

# git and openssh-client: data versions and decisions are git repositories. wget: KubeRay's probes call it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git openssh-client wget \
    && rm -rf /var/lib/apt/lists/*

# A numbered user, so that `runAsNonRoot` can be verified; the manifests name the same number. /workspace is where the
# shared volume goes.
RUN groupadd --gid 10001 facemllm \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin facemllm \
    && install -d -o 10001 -g 10001 /workspace

# `root()` in facemllm/settings looks for params.yaml from the working directory upward, and Ray's jobs inherit this one.
WORKDIR /app

# What the package needs is a layer of its own: another commit of ours is a few MB for the nodes, and seconds to build.
# Into the system's Python, not a virtual environment: KubeRay may start Ray through a login shell, which resets
# PATH.
# psycopg (SQLAlchemy 2.1's own choice for postgresql://), Flask-WTF (mlflow[auth]) and boto3 are for MLflow on Postgres and
# S3 with a login.
# What nothing here runs goes in the same layer: tests, headers (there is no compiler, so no torch.compile), Ray's Java,
# Arrow's Flight.
# Bytecode is made for what stays, since no pod could keep it (the root is read-only); transformers' 400 models, of
# which a step loads a few, do without (and torch has a file in 3.12's syntax). Licences lie in *.dist-info and stay.
ARG PIP_EXTRA_INDEX_URL
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = p["optional-dependencies"]; print(*p["dependencies"], *extras["s3"], *extras["traces"], *extras["gpu"], sep="\n")' \
        > /tmp/requirements.txt \
    && pip install --no-compile -c constraints.txt -r /tmp/requirements.txt "psycopg[binary]" "mlflow[auth]" boto3 \
    && rm /tmp/requirements.txt \
    && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && rm -rf torch/include torch/test torch/bin/test_* torch/bin/*Test torch/bin/*.ptl torch/bin/upgrader_models \
        ray/jars pyarrow/include pyarrow/*flight* \
    && find matplotlib networkx numba numpy pandas pyarrow scipy sklearn sympy -type d -name tests -prune -exec rm -r {} + \
    && find ray/dashboard -name '*.map' -delete \
    && python -m compileall -q -j 0 -x 'transformers/models/|/py312_' .

COPY README.md LICENSE pipeline.py commands.py params.yaml ./
COPY profiles profiles
COPY cluster cluster
COPY components components
COPY studies studies
COPY facemllm facemllm
# The commit that the image was built from, for MLflow's runs, cards and `docker inspect`:
#   docker build --build-arg COMMIT=$(git rev-parse HEAD)$(git diff --quiet HEAD || echo +changes) ...
# It stands before RUN: podman would take ENV and LABEL of another commit from its cache.
ARG COMMIT=""
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps . && rm -r build *.egg-info && python -m compileall -q -j 0 /app

# The root file system is read-only in the pods: whatever writes beside /workspace writes to /tmp.
ENV HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=true \
    RAY_USAGE_STATS_ENABLED=0 \
    DVC_NO_ANALYTICS=1 \
    GX_ANALYTICS_ENABLED=false

ENV FACEMLLM_COMMIT=$COMMIT
LABEL org.opencontainers.image.revision=$COMMIT

USER 10001:10001
CMD ["facemllm", "--help"]
