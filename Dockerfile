# titan in a container. For GPUs:  docker build -t titan .
# Without:                         docker build -t titan:cpu --build-arg DEVICE=cpu .
#
#   docker run --rm --init --gpus all --ipc=host --user "$(id -u)" -v "$PWD:/work" titan train /opt/titan/train_configs/debug.toml
#
# torch's own wheels bring CUDA; the host needs the driver and NVIDIA's container toolkit, nothing else.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/titan

# The largest layers first, made anew only where a pin changes: torch, then the other packages, then titan.
COPY constraints.txt ./
ARG DEVICE=gpu
RUN torch=$(grep '^torch==' constraints.txt) \
    && case "$DEVICE" in \
        gpu) pip install -c constraints.txt "$torch" ;; \
        cpu) pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu "$torch+cpu" ;; \
        *) echo "DEVICE=$DEVICE: gpu or cpu" >&2 && exit 1 ;; \
    esac

COPY pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

COPY README.md LICENSE ./
COPY kernels kernels
COPY models models
COPY titan titan
COPY train_configs train_configs
# In place: titan/models and titan/kernels are links to the folders beside it.
RUN pip install -c constraints.txt --no-deps -e .

# Outputs and relative paths lie in /work. Another user may run it: --user.
ENV HOME=/tmp USER=titan
RUN useradd --uid 1000 --no-create-home titan && install -d -o titan /work
USER 1000
WORKDIR /work
ENTRYPOINT ["titan"]
CMD ["--help"]
