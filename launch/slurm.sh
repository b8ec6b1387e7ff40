#!/usr/bin/env bash
# Train on a GPU cluster with Slurm.
#
#   launch/slurm.sh [--dry-run] ACTION [arguments]
#
#   submit     queue the job: arguments are those of `starflow2 train`, such as --config.seed=1
#   tail       follow the log of the job JOB
#   cancel     end the job JOB: it saves first
#   job        what the job itself runs, on its first node
#
#   --dry-run  print every command, run none
#
# submit: CONFIG; OUT, a folder that all nodes see; NODES=1; GPUS=8, of a node; PER=gpu: one process a GPU, or PER=node;
#         CPUS=8, of a GPU; TIME=24:00:00; PARTITION and ACCOUNT, where the cluster wants them; NAME=starflow2; LOGS, a
#         folder that exists, else where you are; GRACE=300: seconds before the end of TIME at which training is told to
#         save (SIGTERM); RESTARTS=50: how often the job is queued again, after that or a fault; ENDED, a file that
#         gets the job's exit code when it is over and not queued again (a sweep names one). VENV as in setup_env.sh.
#         XLA_FLAGS, NCCL_... and all other variables reach the processes; docs/guides/clusters.md explains some.
# tail, cancel: JOB, the number that submit printed; tail: LOGS as in submit.
#
# submit makes the Python environment, so that jobs that begin together find it made and none installs beneath another.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
PER="${PER:-gpu}" GPUS="${GPUS:-8}" CPUS="${CPUS:-8}" RESTARTS="${RESTARTS:-50}"

# LOGS, so that it is the same folder everywhere.
logs() {
  cd "${LOGS:-.}" 2>/dev/null && pwd || fail "there is no folder ${LOGS:-.}; set LOGS to one that exists"
}

processes() {
  case "$PER" in
    gpu) echo "$GPUS" ;;
    node) echo 1 ;;
    *) fail "PER is gpu or node, not $PER" ;;
  esac
}

submit() {
  local tasks folder options=()
  tasks="$(processes)"
  folder="$(logs)"
  [[ -z "${PARTITION:-}" ]] || options+=(--partition="$PARTITION")
  [[ -z "${ACCOUNT:-}" ]] || options+=(--account="$ACCOUNT")
  train_command "$@"
  [[ -n "$DRY_RUN" ]] || use_env cuda # exports VENV, which the job then takes as it is
  run sbatch --parsable --job-name="${NAME:-starflow2}" --nodes="${NODES:-1}" --gpus-per-node="$GPUS" \
    --ntasks-per-node="$tasks" --cpus-per-task=$((GPUS * CPUS / tasks)) --time="${TIME:-24:00:00}" \
    --signal="TERM@${GRACE:-300}" --requeue --open-mode=append --output="$folder/slurm-%j.log" --chdir="$REPOSITORY" \
    --export="ALL,PER=$PER,GPUS=$GPUS,RESTARTS=$RESTARTS" "${options[@]}" \
    --wrap="exec $(quoted "$REPOSITORY/launch/slurm.sh" job "${TRAIN[@]}")"
}

# Queues itself again after every end but 0, the work is done, and 2, a mistake of the user's.
job() {
  local code=0 options=()
  if [[ "$PER" == node ]]; then # under Slurm, JAX gives a process one GPU unless it is told otherwise
    JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((GPUS - 1)))"
    export JAX_LOCAL_DEVICE_IDS
  fi
  [[ -n "$DRY_RUN" ]] || use_env cuda
  export XLA_FLAGS="$GPU_FLAGS${XLA_FLAGS:+ $XLA_FLAGS}"
  # When one process ends, the others have a while to end too, saving included; what then hangs on a lost peer is killed.
  options=(--kill-on-bad-exit=0 --wait=120)
  [[ -z "${ENDED:-}" ]] || run rm -f "$ENDED"
  # srun takes the processors of a task from its own option alone.
  run srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${options[@]}" "$@" || code=$?
  [[ -z "$DRY_RUN" ]] || exit 0
  ((code != 0 && code != 2)) || over "$code"
  if ((${SLURM_RESTART_COUNT:-0} >= RESTARTS)); then
    echo "slurm.sh: exit code $code after $RESTARTS restarts; not queued again" >&2
    over "$code"
  fi
  echo "slurm.sh: exit code $code ($RESTART_CODE: saved in time); queued again" >&2
  run scontrol requeue "$SLURM_JOB_ID" || over "$code" # refused, as after `cancel`
}

over() {
  [[ -z "${ENDED:-}" ]] || echo "$1" >"$ENDED"
  exit "$1"
}

case "$ACTION" in
  help) usage ;;
  submit) submit "${ARGUMENTS[@]}" ;;
  job) job "${ARGUMENTS[@]}" ;;
  tail)
    : "${JOB:?set JOB to the number of the job}"
    folder="$(logs)"
    run tail -n 50 -F "$folder/slurm-$JOB.log"
    ;;
  cancel)
    : "${JOB:?set JOB to the number of the job}"
    run scontrol update "JobId=$JOB" Requeue=0 # else the job would queue itself again
    # A job that waits cannot be signalled, it is cancelled; after that the signal finds nothing, which is no fault.
    run scancel --state=PENDING "$JOB"
    run scancel --quiet --signal=TERM "$JOB" || true
    ;;
  *) fail "there is no action $ACTION; without one, the help is shown" ;;
esac
