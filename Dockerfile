# mrgen for processors and for GPUs:  make docker  builds both targets, mrgen:cpu and mrgen:gpu.
#
#   docker run --rm mrgen:cpu                                           # the default command: what there is
#   docker run --rm -v "$PWD:/work" mrgen:cpu mrgen-prepare             # cohorts, stores and runs lie in /work
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" mrgen:gpu mrgen-train experiment=rsnet/rsnet
#
# Any image with Python 3.11 to 3.13, its venv module and apt-get will do for BASE.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS wheel
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY conf conf
COPY hydra_plugins hydra_plugins
COPY mrgen mrgen
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir -c constraints.txt build \
    && /opt/build/bin/python -m build --wheel --outdir /wheels

FROM ${BASE} AS installed
# Wheels of torch for processors alone are a tenth as large, and lie on an index of PyTorch's own: give its address to
# have them, of the target cpu alone. Without it both targets hold the wheels that also run on GPUs.
ARG TORCH_INDEX=""
COPY constraints.txt /tmp/constraints.txt
RUN python3 -m venv /opt/mrgen \
    && /opt/mrgen/bin/pip install --no-cache-dir -c /tmp/constraints.txt ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch
COPY --from=wheel /wheels /tmp/wheels
RUN wheel="$(find /tmp/wheels -name '*.whl')" \
    && /opt/mrgen/bin/pip install --no-cache-dir -c /tmp/constraints.txt "${wheel}[optuna,tensorboard]"

FROM ${BASE} AS cpu
COPY --from=installed /opt/mrgen /opt/mrgen
# Not root; a mounted folder must be writable for this number, or give --user "$(id -u):$(id -g)".
RUN useradd --uid 1000 --create-home mrgen && mkdir /work && chown mrgen /work
# HOME stays writable for any --user; matplotlib and W&B keep their files below it.
ENV PATH=/opt/mrgen/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
USER 1000
WORKDIR /work
CMD ["mrgen-train", "--help"]

FROM cpu AS gpu
USER 0
# torch.compile builds kernels with a C compiler (Python's headers come with BASE).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
