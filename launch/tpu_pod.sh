#!/usr/bin/env bash
# Train on Cloud TPU VMs, one slice or several (multislice), by gcloud.
#
#   launch/tpu_pod.sh [--dry-run] ACTION [arguments]
#
#   create     ask for the machines: a queued resource; `status` says when they are there (ACTIVE)
#   status     what has become of that
#   install    copy this folder to every host and make its Python environment; mounts BUCKET, where it is given
#   start      begin or go on: arguments are those of `starflow2 train`, such as --chip v5p
#   tail       follow the log of the first host
#   stop       save and end
#   restart    stop, then start
#   delete     give the machines back
#
#   --dry-run  print every command, run none
#
# Always: NAME, of the resource; ZONE; PROJECT.
# create: ACCELERATOR, such as v5p-128 or v6e-256; RUNTIME, such as v2-alpha-tpuv5 or v2-alpha-tpuv6e;
#         SLICES=1; SPOT=1: machines that may be taken away; RESERVED=1: from a reservation.
# install: PYTHON=python3.11, installed from the system's packages where it is missing;
#         BUCKET: a Cloud Storage bucket, mounted at /bucket of each host by gcsfuse. Give it a hierarchical namespace:
#         a checkpoint is complete when its folder gets its name.
# start, restart: CONFIG, such as starflow2_7b_t2i, with --chip v5p among the arguments; OUT, a folder that all hosts
#         see, such as /bucket/runs/7b; RESTARTS=50: how often a host starts again after a fault.
#
# Machines that were taken away: delete, create, install, start; training goes on from OUT.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
RESOURCE=(--zone "${ZONE:-}" --project "${PROJECT:-}")
HOSTS=(--node=all --worker=all)

require() {
  : "${NAME:?set NAME to the name of the queued resource}"
  : "${ZONE:?set ZONE to the zone of the machines, such as us-east5-a}"
  : "${PROJECT:?set PROJECT to the Google Cloud project}"
}

on_hosts() {
  run gcloud compute tpus queued-resources ssh "$NAME" "${RESOURCE[@]}" "${HOSTS[@]}" --command="$(quoted "$@")"
}

create() {
  : "${ACCELERATOR:?set ACCELERATOR to the type of a slice, such as v5p-128}"
  : "${RUNTIME:?set RUNTIME to the TPU software version, such as v2-alpha-tpuv5}"
  local nodes=(--node-id="$NAME") options=()
  if ((${SLICES:-1} > 1)); then
    nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  [[ -z "${SPOT:-}" ]] || options+=(--spot)
  [[ -z "${RESERVED:-}" ]] || options+=(--reserved)
  run gcloud compute tpus queued-resources create "$NAME" "${RESOURCE[@]}" "${nodes[@]}" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${options[@]}"
}

install() {
  local archive="${TMPDIR:-/tmp}/starflow2_$NAME.tar.gz"
  run tar --create --gzip --file="$archive" --directory="$REPOSITORY" \
    --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=__pycache__ .
  run gcloud compute tpus queued-resources scp "$archive" "$NAME:starflow2.tar.gz" "${RESOURCE[@]}" "${HOSTS[@]}"
  run rm "$archive"
  on_hosts mkdir -p starflow2
  on_hosts tar --extract --gzip --file=starflow2.tar.gz --directory=starflow2
  on_hosts env "PYTHON=${PYTHON:-python3.11}" "BUCKET=${BUCKET:-}" starflow2/launch/tpu_vm.sh setup
}

start() {
  on_hosts starflow2/launch/tpu_vm.sh start "${RESTARTS:-50}" "${TRAIN[@]}"
}

case "$ACTION" in
  help) usage ;;
  create) require && create ;;
  status)
    require
    run gcloud compute tpus queued-resources describe "$NAME" "${RESOURCE[@]}" --format="value(state.state)"
    ;;
  install) require && install ;;
  start)
    require
    train_command "${ARGUMENTS[@]}"
    start
    ;;
  tail)
    require
    HOSTS=(--node=0 --worker=0)
    on_hosts tail -n 50 -F starflow2.log
    ;;
  stop) require && on_hosts starflow2/launch/tpu_vm.sh stop ;;
  restart)
    require
    train_command "${ARGUMENTS[@]}"
    on_hosts starflow2/launch/tpu_vm.sh stop
    start
    ;;
  delete) require && run gcloud compute tpus queued-resources delete "$NAME" "${RESOURCE[@]}" --force --quiet ;;
  *) fail "there is no action $ACTION; without one, the help is shown" ;;
esac
