#!/usr/bin/env bash
# Run a training as several processes of this machine, and start them again when one dies.
#
#   launch/local.sh [OPTIONS] -- train --config FILE --out DIR [arguments of `starflow2 train`]
#
#   --processes N   processes to start (default 2); each sees all devices of the machine, so on GPUs one is enough
#   --restarts N    how often they are started again when one dies, or exits with 75 (default 10)
#   --grace N       seconds that they get to save when they are told to end (default 300)
#   --port N        of process 0, where the processes meet (default: a free one)
#   --dry-run       print the commands, run nothing
#
# When a process dies, the others are killed (they would wait for it forever) and all start again from the last
# checkpoint. An error of the user's (exit code 2) is not tried again. SIGTERM and SIGINT are passed on as SIGTERM: the
# processes save, and this script exits with 75, as they do, so that whatever started it can start it again.
# Exit codes: 0 all done, 2 wrong use, 75 told to end, else that of the process that died last.
#
# Makes .venv at the first call; see setup_env.sh for VENV and PYTHON.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

RESTART=75 # starflow2's exit code: all is saved, start me again
processes=2 restarts=10 grace=300 port="" dry=""

wrong() {
  echo "local.sh: $*" >&2
  exit 2
}

while (($#)); do
  case "$1" in
  --processes | --restarts | --grace | --port)
    [[ "${2:-}" =~ ^[0-9]+$ ]] || wrong "$1 takes a number"
    printf -v "${1#--}" %s "$2"
    shift 2
    ;;
  --dry-run) dry=1 && shift ;;
  --help)
    awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
    exit
    ;;
  --) shift && break ;;
  *) wrong "unknown argument $1; what starflow2 is to do stands after --" ;;
  esac
done
((processes > 0)) || wrong "--processes must be above 0"
(($#)) || wrong "say after -- what starflow2 is to do: -- train --config FILE --out DIR"

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'; }

command_of() { # of process $1 at port $2; the rest: arguments
  local process="$1" at="$2"
  shift 2
  local words
  printf -v words '%q ' starflow2 "$@" --distributed --coordinator "localhost:$at" --processes "$processes" --process "$process"
  echo "${words% }" # quoted, so that it can be pasted into a shell
}

if [[ -n "$dry" ]]; then
  for ((i = 0; i < processes; i++)); do command_of "$i" "${port:-PORT}" "$@"; done
  exit 0
fi
use_env ""

pids=() told="" timer=""

# From now on `watch` waits for $grace seconds at most.
limit() {
  [[ -z "$timer" ]] || return 0
  sleep "$grace" &
  timer=$!
}

tell() {
  told=1
  ((${#pids[@]})) || exit "$RESTART"
  kill -TERM "${pids[@]}" 2>/dev/null || true
  limit
}
trap tell TERM INT

start() {
  local at="${port:-$(free_port)}" i
  pids=()
  for ((i = 0; i < processes; i++)); do
    starflow2 "$@" --distributed --coordinator "localhost:$at" --processes "$processes" --process "$i" &
    pids+=($!)
    echo "local.sh: process $i of $processes: pid $!" >&2
  done
}

# Wait until all have ended, or one that died or complains, or the time is up. Sets `code`.
watch() {
  local -A left=()
  local pid ended got
  code=0
  for pid in "${pids[@]}"; do left[$pid]=1; done
  while ((${#left[@]})); do
    ended="" got=0
    wait -n -p ended "${!left[@]}" $timer || got=$?
    [[ -n "${ended:-}" ]] || continue # a signal came
    [[ "$ended" != "$timer" ]] || return 0
    unset "left[$ended]"
    ((got == 0)) || code=$got
    ((got == 0 || got == RESTART)) || return 0
    ((got != RESTART)) || limit
  done
}

end_all() {
  kill -KILL "${pids[@]}" 2>/dev/null || true
  [[ -z "$timer" ]] || kill "$timer" 2>/dev/null || true
  wait 2>/dev/null || true
  timer=""
}

for ((attempt = 0; ; attempt++)); do
  start "$@"
  watch
  end_all
  if [[ -n "$told" ]]; then exit "$RESTART"; fi
  if ((code == 0 || code == 2)); then exit "$code"; fi
  if ((attempt >= restarts)); then
    echo "local.sh: a process ended with $code, and they were started again $restarts times already" >&2
    exit "$code"
  fi
  echo "local.sh: a process ended with $code; starting all again ($((attempt + 1)) of $restarts)" >&2
done
