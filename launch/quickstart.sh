#!/usr/bin/env bash
# Train a small model of handwritten digits through all stages, evaluate it and write a report.
#
#   launch/quickstart.sh [--out DIR] [--smoke]
#
#   --out DIR   where everything goes; relative to where you are
#   --smoke     a few steps a stage: the same path in about a minute, the numbers mean nothing
#
# Runs on the accelerator that JAX finds, else on the CPU. Makes .venv at the first call; see setup_env.sh for VENV and
# PYTHON.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
use_env ""
exec starflow2 quickstart "$@"
