#!/usr/bin/env bash
# Train on NVIDIA GPUs of several machines without a scheduler: start this on each of them, as torchrun is started.
#
#   launch/gpu_node.sh NODES NODE HOST:PORT train --config FILE --out DIR [arguments of `starflow2 train`]
#
#   NODES       number of machines
#   NODE        number of this one, from 0
#   HOST:PORT   an address of machine 0 that all others reach, and a free port there
#
#   --dry-run   as the first argument: print the command, run nothing
#
# One process a machine sees all of its GPUs. It is started again after every end but 0 (done) and 2 (a mistake of the
# user's), at most RESTARTS=50 times. When one machine is lost, the processes of the others end, and wait for it at
# HOST:PORT when they start again. DIR must be one folder on a file system that all machines see. SIGTERM is passed on:
# the process saves and ends with 75. VENV as in setup_env.sh; it is made at the first call.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry=""
if [[ "${1:-}" == --dry-run ]]; then
  dry=1
  shift
fi
(($# >= 4)) || { usage && exit 2; }
[[ "$1" =~ ^[1-9][0-9]*$ ]] || fail "NODES is a number above 0, not $1"
[[ "$2" =~ ^[0-9]+$ ]] && (($2 < $1)) || fail "NODE is a number from 0 to $(($1 - 1)), not $2"
[[ "$3" == ?*:* ]] || fail "HOST:PORT names machine 0 and a port, such as node0:8476, not $3"
command=("${@:4}" --distributed --coordinator "$3" --processes "$1" --process "$2")

if [[ -n "$dry" ]]; then
  quoted starflow2 "${command[@]}"
  exit 0
fi
use_env cuda
export XLA_FLAGS="$GPU_FLAGS${XLA_FLAGS:+ $XLA_FLAGS}"
exec "$REPOSITORY/launch/tpu_vm.sh" keep "${RESTARTS:-50}" "$VENV/bin/starflow2" "${command[@]}"
