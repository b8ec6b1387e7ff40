#!/usr/bin/env bash
# Train on Google Kubernetes Engine, TPUs or GPUs, by XPK (pip install xpk).
#
#   launch/gke.sh [--dry-run] ACTION [arguments]
#
#   cluster         create the cluster, or grow it to SLICES
#   storage         attach the bucket BUCKET to it, mounted at /bucket in every workload from then on
#   start           submit the workload NAME: arguments are those of `starflow2 train`
#   list            the cluster's workloads
#   tail            follow the workload's log
#   stop            delete the workload, and wait until it has saved and ended
#   restart         stop, then start
#   delete          delete the cluster
#
#   --dry-run       print every command, run none
#
# Always: CLUSTER; ZONE; PROJECT. All but cluster, storage, list, delete: NAME, of the workload.
# cluster, start, restart: TPU, the type of a slice, such as v5p-128, and SLICES=1;
#                 or GPU, the type of a node, such as h200-141gb-8, and NODES=1.
# cluster:        SPOT=1 or RESERVATION; without either, machines on demand.
# storage:        BUCKET, a Cloud Storage bucket with a hierarchical namespace: a checkpoint is complete when its folder
#                 gets its name.
# start, restart: CONFIG; OUT, a folder that all hosts see, such as /bucket/runs/7b; BASE_IMAGE=python:3.11: this folder is
#                 put on top of it, and the package is installed when a host starts. Or IMAGE: an image that has `starflow2`
#                 and the experiments, used as it is. RESTARTS=50: how often, after a fault.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
WHERE=(--cluster "${CLUSTER:-}" --zone "${ZONE:-}" --project "${PROJECT:-}")

require() {
  : "${CLUSTER:?set CLUSTER to the name of the cluster}"
  : "${ZONE:?set ZONE to the zone of the machines, such as us-east5-a}"
  : "${PROJECT:?set PROJECT to the Google Cloud project}"
}

require_workload() {
  require
  : "${NAME:?set NAME to the name of the workload}"
}

machines() {
  if [[ -n "${GPU:-}" ]]; then
    MACHINES=(--device-type="$GPU" --num-nodes="${NODES:-1}")
  else
    : "${TPU:?set TPU to the type of a slice, such as v5p-128, or GPU to the type of a node, such as h200-141gb-8}"
    MACHINES=(--tpu-type="$TPU" --num-slices="${SLICES:-1}")
  fi
}

cluster() {
  local capacity=(--on-demand)
  [[ -z "${SPOT:-}" ]] || capacity=(--spot)
  [[ -z "${RESERVATION:-}" ]] || capacity=(--reservation="$RESERVATION")
  run xpk cluster create "${WHERE[@]}" "${MACHINES[@]}" "${capacity[@]}"
}

storage() {
  : "${BUCKET:?set BUCKET to the name of the bucket}"
  run xpk storage attach "$BUCKET" "${WHERE[@]}" --type=gcsfuse --bucket="$BUCKET" --mount-point=/bucket \
    --readonly=false --auto-mount=true --size=1
}

# As `quoted`, for bash, in a form that YAML reads as well: XPK also puts the command of GPU nodes into a double-quoted
# string of YAML, where %q's backslashes are errors, but not \x27.
quoted_for_yaml() {
  local word words=()
  for word; do
    if [[ ! "$word" =~ ^[[:alnum:]_@%+=:,./-]+$ ]]; then
      word="${word//\\/\\x5c}"
      word="${word//\'/\\x27}"
      word="${word//\"/\\x22}"
      word="\$'${word//$'\n'/\\x0a}'"
    fi
    words+=("$word")
  done
  echo "${words[*]}"
}

start() {
  local image=(--base-docker-image="${BASE_IMAGE:-python:3.11}" --script-dir="$REPOSITORY")
  local extra=tpu before="" join="export LIBTPU_INIT_ARGS='$TPU_FLAGS' && "
  if [[ -n "${GPU:-}" ]]; then
    extra=cuda
    # XPK names the processes of GPU nodes to the workload by variables of its own.
    # shellcheck disable=SC2016
    join='export JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT JAX_NUM_PROCESSES=$NNODES JAX_PROCESS_ID=$NODE_RANK && '
    join="export XLA_FLAGS=$GPU_FLAGS && $join"
  fi
  if [[ -n "${IMAGE:-}" ]]; then
    image=(--docker-image="$IMAGE")
  else
    before="python3 -m pip install --quiet -c constraints.txt -e '.[$extra]' && "
  fi
  # 1: a fault in Python, such as a lost peer; XPK itself starts again after 127 and above, that is after signals.
  run xpk workload create "${WHERE[@]}" --workload "$NAME" "${MACHINES[@]}" "${image[@]}" \
    --max-restarts="${RESTARTS:-50}" --restart-on-exit-codes="1,$RESTART_CODE" --termination-grace-period-seconds=300 \
    --command="$before$join$(quoted_for_yaml "${TRAIN[@]}")"
}

stop() {
  run xpk workload delete "${WHERE[@]}" --workload "$NAME" --force
  # Deleted is not ended: a workload that is started now would train beside the one that saves.
  run kubectl wait --for=delete pod --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --timeout=600s
}

tail_log() {
  run gcloud container clusters get-credentials "$CLUSTER" --location "${ZONE%-*}" --project "$PROJECT"
  run kubectl logs --follow --prefix --tail=50 --max-log-requests=1000 \
    --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
}

case "$ACTION" in
  help) usage ;;
  cluster) require && machines && cluster ;;
  storage) require && storage ;;
  start)
    require_workload
    machines
    train_command "${ARGUMENTS[@]}"
    start
    ;;
  list) require && run xpk workload list "${WHERE[@]}" ;;
  tail) require_workload && tail_log ;;
  stop) require_workload && stop ;;
  restart)
    require_workload
    machines
    train_command "${ARGUMENTS[@]}"
    stop
    start
    ;;
  delete) require && run xpk cluster delete "${WHERE[@]}" --force ;;
  *) fail "there is no action $ACTION; without one, the help is shown" ;;
esac
