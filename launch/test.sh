#!/usr/bin/env bash
# Run the tests, without those that pyproject.toml's markers leave out (.ci/run runs the slow ones, too).
#
#   launch/test.sh [pytest arguments]          paths are relative to the repository; default: all of tests/
#   launch/test.sh --numprocesses 0 --pdb      in one process; else one a core, four at most
#   JAX_PLATFORMS=cuda,cpu launch/test.sh      on something else than the CPU
#   launch/test.sh -m gpu_compile              tests that compile for NVIDIA GPUs, on any machine: the CUDA compiler
#                                              (6 GB) is installed into an environment of its own, .venv-cuda
#   launch/test.sh -m harness                  lmms-eval and VLMEvalKit against the server: each (7 GB, most of it PyTorch for
#                                              CUDA) is installed into an environment of its own, .venv-lmms-eval and
#                                              .venv-vlmevalkit, unless $LMMS_EVAL and $VLMEVALKIT name such environments
#
# Makes .venv at the first call; see setup_env.sh for VENV and PYTHON.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
if [[ " $* " == *" -m gpu_compile "* ]]; then
  use_env test,cuda .venv-cuda
else
  use_env test
fi
if [[ " $* " == *" -m harness "* ]]; then
  # lmms-eval 0.7.3 imports a module that filelock 4 no longer has.
  LMMS_EVAL="${LMMS_EVAL:-$(make_other .venv-lmms-eval lmms-eval==0.7.3 'filelock<4')}"
  VLMEVALKIT="${VLMEVALKIT:-$(make_other .venv-vlmevalkit ms-vlmeval==0.0.20)}"
  export LMMS_EVAL VLMEVALKIT
fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
if [[ "${STARFLOW2_GOLDEN:-/}" != /* ]]; then # more golden files (tests/weights/test_golden.py), relative to where you are
  export STARFLOW2_GOLDEN="$PWD/$STARFLOW2_GOLDEN"
fi
cd "$REPOSITORY"
exec python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
