# Sourced by the scripts of this folder and by .ci/run: Python environments with this package in them.
#
#   use_env EXTRAS [NAME]  put an environment with these extras (such as "test", or "") first on PATH: the one in $VENV
#                          as it is, where VENV is given, else NAME (.venv) in the repository, made or brought up to date
#   make_env DIR EXTRAS    make the environment DIR, or bring it up to date after setup.py, pyproject.toml or constraints.txt changed
#   make_other NAME PACKAGES...  make the environment NAME in the repository with these packages alone, and print its path
#
# PYTHON names the Python to build with (default python3; 3.11 or newer). pip takes its own settings from its own
# files and variables.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "$*" >&2
  exit 1
}

make_env() {
  local dir="$1" extras="$2" wanted stamp
  stamp="$dir/.installed-${extras:-core}"
  wanted="$(cd "$REPOSITORY" && { pwd && cat setup.py pyproject.toml constraints.txt; } | cksum)"
  ! up_to_date || return 0
  # One at a time: who waited finds it made. Where there is no flock, or a file system without locks, it says so and goes on.
  (
    flock 9 || true
    if ! up_to_date; then build; fi
  ) 9>"$dir.lock"
}

# This and the next are make_env's, and read its variables.
up_to_date() {
  "$dir/bin/python" -c "" 2>/dev/null && [[ "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]
}

build() {
  local python="${PYTHON:-python3}"
  if ! "$dir/bin/python" -c "" 2>/dev/null; then
    command -v "$python" >/dev/null || fail "There is no $python; install Python 3.11 or newer, or name one with PYTHON=..."
    "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" ||
      fail "Python 3.11 or newer is needed, but $python is $("$python" -V 2>&1); name another with PYTHON=..."
    echo "Making the Python environment $dir" >&2
    "$python" -m venv --clear "$dir" >&2
  fi
  echo "Installing into $dir (minutes, the first time)" >&2
  (cd "$REPOSITORY" && "$dir/bin/python" -m pip install --quiet -c constraints.txt -e ".${extras:+[$extras]}") >&2
  echo "$wanted" >"$stamp"
}

make_other() {
  local dir="$REPOSITORY/$1"
  if [[ "$(cat "$dir/.installed-other" 2>/dev/null)" != "${*:2}" ]]; then
    echo "Installing ${*:2} into $dir (minutes)" >&2
    "${PYTHON:-python3}" -m venv --clear "$dir" >&2
    "$dir/bin/python" -m pip install --quiet "${@:2}" >&2
    echo "${*:2}" >"$dir/.installed-other"
  fi
  echo "$dir"
}

use_env() {
  if [[ -n "${VENV:-}" ]]; then
    [[ -x "$VENV/bin/python" ]] || fail "VENV=$VENV is not a Python environment: it has no bin/python"
    VENV="$(cd "$VENV" && pwd)"
  else
    VENV="$REPOSITORY/${2:-.venv}"
    make_env "$VENV" "$1"
  fi
  export VENV PATH="$VENV/bin:$PATH"
  export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}" # errors only
  export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"             # nothing here is downloaded while it runs
}
