#!/usr/bin/env bash
# What tpu_pod.sh runs on each host. The log and the process's number are in the home folder.
#
#   tpu_vm.sh setup                    make the Python environment, and mount BUCKET at /bucket where it is given
#   tpu_vm.sh start TIMES COMMAND...   run COMMAND in the background, again up to TIMES times; output in ~/starflow2.log
#   tpu_vm.sh stop                     end it: it saves first
#   tpu_vm.sh keep TIMES COMMAND...    the same as start in the foreground, without flags for TPUs
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"
log="$HOME/starflow2.log" pid="$HOME/starflow2.pid"

setup() {
  export PYTHON="${PYTHON:-python3.11}"
  if ! command -v "$PYTHON" >/dev/null; then
    sudo apt-get update -q
    sudo apt-get install -q -y "$PYTHON" "$PYTHON-venv"
  fi
  source "$here/setup_env.sh"
  make_env "$REPOSITORY/.venv" tpu
  [[ -z "${BUCKET:-}" ]] || mount_bucket
}

mount_bucket() {
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc
    curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -q
    sudo apt-get install -q -y gcsfuse
  fi
  sudo mkdir -p /bucket
  sudo chown "$(id -u)" /bucket
  # What one host writes, the others must find at once, even where they looked for it before.
  mountpoint -q /bucket || gcsfuse --implicit-dirs --metadata-cache-negative-ttl-secs=0 "$BUCKET" /bucket
}

running() {
  [[ -f "$pid" ]] && kill -0 "$(cat "$pid")" 2>/dev/null
}

start() {
  if running; then
    echo "tpu_vm.sh: training runs here already; stop it first" >&2
    exit 2
  fi
  export LIBTPU_INIT_ARGS="$TPU_FLAGS${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
  setsid nohup "$here/tpu_vm.sh" keep "$@" </dev/null >>"$log" 2>&1 &
  echo $! >"$pid"
}

stop() {
  running || return 0
  kill -TERM "$(cat "$pid")"
  while running; do sleep 0.2; done
}

# Exit 0 is the end, and so is 2, a mistake of the user's. All else is done again, 75 (saved after a signal) too: a host
# that only lost its peers must be there when they return.
keep() {
  local times="$1" code count=0 child stopped=""
  shift
  cd "$here/.."
  trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
  while true; do
    "$@" &
    child=$!
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal interrupts wait before the command has ended
      code=0
      wait "$child" || code=$?
    done
    [[ -z "$stopped" && $code != 0 && $code != 2 ]] || exit "$code"
    ((count < times)) || exit "$code"
    count=$((count + 1))
    echo "tpu_vm.sh: exit code $code; starting again ($count of $times)" >&2
  done
}

[[ ! -d "$here/../.venv" ]] || PATH="$here/../.venv/bin:$PATH"
action="${1:-}"
case "$action" in
  setup | start | stop | keep) "$@" ;;
  *)
    echo "tpu_vm.sh: there is no action '$action'; read its first lines" >&2
    exit 2
    ;;
esac
