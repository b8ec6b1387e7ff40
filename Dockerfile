# NVIDIA GPUs: starflow2 with CUDA 12, whose libraries come with JAX's wheels. The host needs the driver and NVIDIA's
# container toolkit.
#
#   docker build --tag starflow2 .
#   docker run --gpus all --ipc host --volume /data:/data starflow2 train --config starflow2_7b_gpu --out /data/runs/7b
#
# Docker was never run on this file. .ci/run installs the extra `cuda` with the same constraints, and compiles with it.
FROM python:3.11-slim
WORKDIR /starflow2
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY starflow2_jax starflow2_jax
RUN python -m pip install --no-cache-dir --constraint constraints.txt ".[cuda,serve]"
ENV HF_HUB_OFFLINE=1 XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true
ENTRYPOINT ["starflow2"]
