# shellcheck shell=bash disable=SC2034
# Sourced by tpu_pod.sh, gke.sh, slurm.sh and gpu_node.sh: usage, dry runs, and the command that trains. They are run as
# SCRIPT [--dry-run] ACTION [arguments of `starflow2 train`]. tpu_vm.sh sources it, too, for the flags.

set -euo pipefail
REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
RESTART_CODE=75 # training saved its state and wants to be started again
# A user's mistake ends in 2: starting again does not help. Any other end is a fault, and training goes on from its last
# checkpoint when it is started again.

# XLA's flags for TPUs (in LIBTPU_INIT_ARGS) and for NVIDIA GPUs (in XLA_FLAGS): collectives run beside computation.
# `starflow2 plan` compiles with the same flags.
TPU_FLAGS="--xla_enable_async_all_gather=true --xla_tpu_enable_async_collective_fusion=true"
TPU_FLAGS+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
TPU_FLAGS+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true"
GPU_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# The comment at the top of the script is its help.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
}

# Sets ACTION, ARGUMENTS and DRY_RUN from the command line.
parse() {
  DRY_RUN=""
  if [[ "${1:-}" == --dry-run ]]; then
    DRY_RUN=1
    shift
  fi
  ACTION="${1:-help}"
  ARGUMENTS=("${@:2}")
}

# Runs a command; in a dry run prints it instead, quoted so that it can be pasted into a shell.
run() {
  if [[ -n "$DRY_RUN" ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

quoted() {
  local words
  printf -v words '%q ' "$@"
  echo "${words% }"
}

# Sets TRAIN: what every process of a run executes, in the folder of the repository.
train_command() {
  : "${CONFIG:?set CONFIG to the experiment file, such as starflow2_7b_t2i}"
  : "${OUT:?set OUT to the checkpoint directory, on a file system that all hosts share}"
  TRAIN=(starflow2 train --config "$CONFIG" --out "$OUT" --distributed "$@")
}
