"""The launch scripts, run with stand-ins of gcloud, xpk and so on that write down what they were called with."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from starflow2_jax.planning.compiling import GPU_OPTIONS, TPU_OPTIONS

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TOOLS = ("gcloud", "xpk", "kubectl", "sbatch", "srun", "scontrol", "scancel", "tail", "tar", "rm", "starflow2")
RECORDER = """#!/bin/bash
{ printf '%q ' "$(basename "$0")" "$@"; echo; } >>"$RECORD"
code="$(basename "$0")_EXIT"
exit "${!code:-${STAND_IN_EXIT:-0}}"
"""
TRAIN = ["starflow2", "train", "--config", "an experiment.py", "--out", "/bucket/run", "--distributed"]
RUN = {"CONFIG": "an experiment.py", "OUT": "/bucket/run"}

TPU = {"NAME": "pod", "ZONE": "us-east5-a", "PROJECT": "lab", **RUN}
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
AT = ["--zone", "us-east5-a", "--project", "lab"]
SSH = [*QUEUED, "ssh", "pod", *AT, "--node=all", "--worker=all"]
STOP = [*SSH, "--command=starflow2/launch/tpu_vm.sh stop"]
START = [*SSH, f"--command=starflow2/launch/tpu_vm.sh start 50 {shlex.join(TRAIN)}".replace("'an experiment.py'", "an\\ experiment.py")]  # fmt: skip
SLICE = {**TPU, "ACCELERATOR": "v5p-128", "RUNTIME": "v2-alpha-tpuv5"}
CREATE = ["--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"]
TPU_POD = [
    ("create", SLICE, [[*QUEUED, "create", "pod", *AT, "--node-id=pod", *CREATE]]),
    (
        "create", {**SLICE, "SLICES": "4", "SPOT": "1"},
        [[*QUEUED, "create", "pod", *AT, "--node-count=4", "--node-prefix=pod", *CREATE, "--spot"]],
    ),
    ("status", TPU, [[*QUEUED, "describe", "pod", *AT, "--format=value(state.state)"]]),
    (
        "install", {**TPU, "BUCKET": "data", "TMPDIR": "/scratch"},
        [
            ["tar", "--create", "--gzip", "--file=/scratch/starflow2_pod.tar.gz", f"--directory={ROOT}",
             "--exclude=./.git", "--exclude=./.venv", "--exclude=./runs", "--exclude=__pycache__", "."],
            [*QUEUED, "scp", "/scratch/starflow2_pod.tar.gz", "pod:starflow2.tar.gz", *AT, "--node=all", "--worker=all"],
            ["rm", "/scratch/starflow2_pod.tar.gz"],
            [*SSH, "--command=mkdir -p starflow2"],
            [*SSH, "--command=tar --extract --gzip --file=starflow2.tar.gz --directory=starflow2"],
            [*SSH, "--command=env PYTHON=python3.11 BUCKET=data starflow2/launch/tpu_vm.sh setup"],
        ],
    ),
    ("start", TPU, [START]),
    ("start --config.seed=1", TPU, [[*START[:-1], START[-1] + " --config.seed=1"]]),
    ("tail", TPU, [[*QUEUED, "ssh", "pod", *AT, "--node=0", "--worker=0", "--command=tail -n 50 -F starflow2.log"]]),
    ("stop", TPU, [STOP]),
    ("restart", TPU, [STOP, START]),
    ("delete", TPU, [[*QUEUED, "delete", "pod", *AT, "--force", "--quiet"]]),
]  # fmt: skip

FLAGS, TPU_FLAGS = (
    " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
    for options in (GPU_OPTIONS, TPU_OPTIONS)
)
TPU_JOIN = f"export LIBTPU_INIT_ARGS='{TPU_FLAGS}' && "
GKE = {"CLUSTER": "big", "ZONE": "us-east5-a", "PROJECT": "lab", "TPU": "v6e-256", "NAME": "joint", **RUN}
IN = ["--cluster", "big", *AT]
SLICES = ["--tpu-type=v6e-256", "--num-slices=2"]
WORKLOAD = ["xpk", "workload", "create", *IN, "--workload", "joint"]
RESTARTED = ["--max-restarts=50", "--restart-on-exit-codes=1,75", "--termination-grace-period-seconds=300"]
ESCAPED = shlex.join(TRAIN).replace("'an experiment.py'", "an\\ experiment.py")
FOR_YAML = shlex.join(TRAIN).replace("'an experiment.py'", "$'an experiment.py'")
SUBMIT = [
    *WORKLOAD, *SLICES, "--base-docker-image=python:3.11", f"--script-dir={ROOT}", *RESTARTED,
    f"--command=python3 -m pip install --quiet -c constraints.txt -e '.[tpu]' && {TPU_JOIN}{FOR_YAML}",
]  # fmt: skip
JOIN = (
    f"export XLA_FLAGS={FLAGS} && "
    "export JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT JAX_NUM_PROCESSES=$NNODES "
    "JAX_PROCESS_ID=$NODE_RANK && "
)
REMOVE = [
    ["xpk", "workload", "delete", *IN, "--workload", "joint", "--force"],
    ["kubectl", "wait", "--for=delete", "pod", "--selector=jobset.sigs.k8s.io/jobset-name=joint", "--timeout=600s"],
]
XPK = [
    ("cluster", GKE, [["xpk", "cluster", "create", *IN, "--tpu-type=v6e-256", "--num-slices=1", "--on-demand"]]),
    (
        "cluster", {**GKE, "GPU": "h200-141gb-8", "NODES": "4", "RESERVATION": "ours"},
        [["xpk", "cluster", "create", *IN, "--device-type=h200-141gb-8", "--num-nodes=4", "--reservation=ours"]],
    ),
    (
        "storage", {**GKE, "BUCKET": "data"},
        [["xpk", "storage", "attach", "data", *IN, "--type=gcsfuse", "--bucket=data", "--mount-point=/bucket",
          "--readonly=false", "--auto-mount=true", "--size=1"]],
    ),
    ("start", {**GKE, "SLICES": "2"}, [SUBMIT]),
    (
        "start", {**GKE, "GPU": "h200-141gb-8", "IMAGE": "ours:1"},
        [[*WORKLOAD, "--device-type=h200-141gb-8", "--num-nodes=1", "--docker-image=ours:1", *RESTARTED,
          f"--command={JOIN}{FOR_YAML}"]],
    ),
    ("list", GKE, [["xpk", "workload", "list", *IN]]),
    (
        "tail", GKE,
        [
            ["gcloud", "container", "clusters", "get-credentials", "big", "--location", "us-east5", "--project", "lab"],
            ["kubectl", "logs", "--follow", "--prefix", "--tail=50", "--max-log-requests=1000",
             "--selector=jobset.sigs.k8s.io/jobset-name=joint"],
        ],
    ),
    ("stop", GKE, REMOVE),
    ("restart", {**GKE, "SLICES": "2"}, [*REMOVE, SUBMIT]),
    ("delete", GKE, [["xpk", "cluster", "delete", *IN, "--force"]]),
]  # fmt: skip

SBATCH = [
    "--time=24:00:00", "--signal=TERM@300", "--requeue", "--open-mode=append", f"--output={Path.cwd()}/slurm-%j.log", f"--chdir={ROOT}",
]  # fmt: skip
CANCEL = [
    ["scontrol", "update", "JobId=7", "Requeue=0"], ["scancel", "--state=PENDING", "7"], ["scancel", "--quiet", "--signal=TERM", "7"],
]  # fmt: skip
WRAP = f"--wrap=exec {ROOT}/launch/slurm.sh job {ESCAPED}"
SLURM = [
    (
        "submit", RUN,
        [["sbatch", "--parsable", "--job-name=starflow2", "--nodes=1", "--gpus-per-node=8", "--ntasks-per-node=8",
          "--cpus-per-task=8", *SBATCH, "--export=ALL,PER=gpu,GPUS=8,RESTARTS=50", WRAP]],
    ),
    (
        "submit --config.seed=1", {**RUN, "NODES": "2", "GPUS": "4", "PER": "node", "PARTITION": "h200", "ACCOUNT": "lab"},
        [["sbatch", "--parsable", "--job-name=starflow2", "--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=1",
          "--cpus-per-task=32", *SBATCH, "--export=ALL,PER=node,GPUS=4,RESTARTS=50", "--partition=h200", "--account=lab",
          WRAP + " --config.seed=1"]],
    ),
    ("tail", {"JOB": "7"}, [["tail", "-n", "50", "-F", f"{Path.cwd()}/slurm-7.log"]]),
    ("tail", {"JOB": "7", "LOGS": "launch/.."}, [["tail", "-n", "50", "-F", f"{Path.cwd()}/slurm-7.log"]]),
    ("cancel", {"JOB": "7"}, CANCEL),
]  # fmt: skip
CASES = [(s, *c) for s, cases in (("tpu_pod", TPU_POD), ("gke", XPK), ("slurm", SLURM)) for c in cases]


@pytest.fixture
def call(tmp_path):
    """call(script, arguments, variables) -> (process, the commands that were run)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).write_text(RECORDER)
        (folder / tool).chmod(0o755)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to("/bin/true")

    def call(script: str, arguments: str, variables: dict):
        record = tmp_path / "record"
        record.write_text("")
        base = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(tmp_path), "RECORD": str(record)}
        base["VENV"] = str(tmp_path / "venv")
        command = ["bash", LAUNCH / f"{script}.sh", *shlex.split(arguments)]
        done = subprocess.run(command, env=base | variables, capture_output=True, text=True, check=False)
        return done, [shlex.split(line) for line in record.read_text().splitlines()]

    return call


@pytest.mark.parametrize("script, action, variables, expected", CASES, ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(CASES)])  # fmt: skip
def test_runs_exactly_these_commands_and_a_dry_run_prints_them(call, script, action, variables, expected):
    done, commands = call(script, action, variables)
    assert done.returncode == 0, done.stderr
    assert commands == expected
    dry, commands = call(script, f"--dry-run {action}", variables)
    assert dry.returncode == 0 and commands == []
    assert [shlex.split(line) for line in dry.stdout.splitlines()] == expected


NEEDED = {
    ("tpu_pod", "create"): {k: SLICE[k] for k in ("NAME", "ZONE", "PROJECT", "ACCELERATOR", "RUNTIME")},
    ("tpu_pod", "start"): TPU, ("gke", "cluster"): {k: GKE[k] for k in ("CLUSTER", "ZONE", "PROJECT", "TPU")},
    ("gke", "start"): GKE, ("slurm", "submit"): RUN, ("slurm", "tail"): {"JOB": "7"},
}  # fmt: skip


@pytest.mark.parametrize("missing, script, action", [(m, *key) for key, needed in NEEDED.items() for m in needed])
def test_a_missing_variable_is_named_and_nothing_is_run(call, missing, script, action):
    variables = {k: v for k, v in NEEDED[script, action].items() if k != missing}
    done, commands = call(script, action, variables)
    assert done.returncode != 0 and f"{missing}: set {missing} to" in done.stderr and commands == []


def test_a_folder_of_logs_that_is_not_there_is_named(call):
    done, commands = call("slurm", "submit", {**RUN, "LOGS": "/nowhere"})
    assert done.returncode == 2 and "there is no folder /nowhere; set LOGS" in done.stderr and commands == []


@pytest.mark.parametrize("more", [[], ["--config.order=('joint',)"], ["a \"b\" \\c 'd'\n$e `f`", "", "*"]])
def test_the_command_of_gpu_nodes_is_read_by_bash_and_by_yaml(call, more):
    """XPK puts it into a double-quoted string of YAML, as it is, and bash runs it."""
    done, commands = call("gke", f"start {shlex.join(more)}", {**GKE, "GPU": "h200-141gb-8", "IMAGE": "ours:1"})
    command = commands[0][-1].removeprefix("--command=")
    assert re.fullmatch(r'([^"\\\n]|\\x[0-9a-f]{2})+', command), done.stderr
    printed = ["bash", "-c", command.replace(JOIN, r"printf '%s\0' ")]
    assert subprocess.run(printed, capture_output=True, text=True, check=True).stdout.split("\0")[:-1] == [
        *TRAIN,
        *more,
    ]


@pytest.mark.parametrize("script", ["tpu_pod", "gke", "slurm"])
def test_help_and_unknown_actions(call, script):
    done, _ = call(script, "", {})
    assert done.returncode == 0 and f"launch/{script}.sh [--dry-run] ACTION" in done.stdout
    done, commands = call(script, "begin", {})
    assert done.returncode == 2 and "there is no action begin" in done.stderr and commands == []


SAYS_ITS_FLAGS = """#!/bin/bash
{ echo "$XLA_FLAGS"; printf '%q ' "$(basename "$0")" "$@"; echo; } >>"$RECORD"
"""


def test_processes_on_gpus_get_the_flags_that_plans_are_made_with(call, tmp_path):
    """And a user's own flags after them."""
    for tool in ("bin/srun", "venv/bin/starflow2"):
        (tmp_path / tool).write_text(SAYS_ITS_FLAGS)
        (tmp_path / tool).chmod(0o755)
    flags = [*FLAGS.split(), "--mine"]
    done, (found, command) = call(
        "gpu_node", "2 1 node0:8476 train --config 'an experiment.py'", {"XLA_FLAGS": "--mine"}
    )
    join = ["--distributed", "--coordinator", "node0:8476", "--processes", "2", "--process", "1"]
    assert done.returncode == 0, done.stderr
    assert found == flags and command == ["starflow2", "train", "--config", "an experiment.py", *join]
    done, (found, command) = call("slurm", "job starflow2 train", {"XLA_FLAGS": "--mine"})
    assert found == flags and command[0] == "srun", done.stderr


def test_processes_on_tpus_get_the_flags_that_plans_are_made_with(call, tmp_path):
    """And a user's own flags after them."""
    os.mkfifo(tmp_path / "starflow2.log")
    log = os.open(tmp_path / "starflow2.log", os.O_RDONLY | os.O_NONBLOCK)
    done, _ = call("tpu_vm", "start 0 printenv LIBTPU_INIT_ARGS", {"LIBTPU_INIT_ARGS": "--mine"})
    os.set_blocking(log, True)
    with os.fdopen(log) as lines:
        assert done.returncode == 0 and lines.read() == f"{TPU_FLAGS} --mine\n", done.stderr


def test_the_container_recipe():
    """Its sources are there, its extras exist, and its processes get the flags that plans are made with."""
    text = (ROOT / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    [extras] = re.findall(r'"\.\[(.*)\]"', text)
    assert all(f'"{extra}": ' in (ROOT / "setup.py").read_text() for extra in extras.split(","))
    assert f"XLA_FLAGS={FLAGS}\n" in text


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("2 2 node0:8476 train", "NODE is a number from 0 to 1, not 2"),
        ("0 0 node0:8476 train", "NODES is a number above 0, not 0"),
        ("2 1 node0 train", "HOST:PORT names machine 0 and a port"),
        ("2 1 node0:8476", "launch/gpu_node.sh NODES NODE HOST:PORT train"),
    ],
)
def test_a_gpu_node_names_what_is_wrong(call, arguments, reason):
    done, commands = call("gpu_node", arguments, {})
    assert done.returncode == 2 and reason in done.stdout + done.stderr and commands == []


def test_a_failed_command_ends_the_script(call):
    done, commands = call("tpu_pod", "install", {**TPU, "STAND_IN_EXIT": "1"})
    assert done.returncode == 1 and [c[0] for c in commands] == ["tar"]


@pytest.mark.parametrize("code, restarts, queued", [("0", "0", False), ("2", "0", False), ("75", "0", True), ("1", "49", True), ("75", "50", False)])  # fmt: skip
@pytest.mark.parametrize("refused", [False, True])
def test_a_job_is_queued_again_by_its_exit_code(call, tmp_path, code, restarts, queued, refused):
    """`srun` ends with `code`; `scontrol` must then be asked to queue the job again, or not. If not, the job says it is
    over.
    """
    ended = tmp_path / "ended"
    variables = {"srun_EXIT": code, "scontrol_EXIT": str(int(refused)), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts,
                 "PER": "node", "GPUS": "4", "SLURM_CPUS_PER_TASK": "32", "ENDED": str(ended)}  # fmt: skip
    done, commands = call("slurm", f"job {shlex.join(TRAIN)}", variables)
    assert commands[0] == ["rm", "-f", str(ended)]
    assert commands[1] == ["srun", "--cpus-per-task=32", "--kill-on-bad-exit=0", "--wait=120", *TRAIN]
    assert commands[2:] == ([["scontrol", "requeue", "7"]] if queued else [])
    goes_on = queued and not refused
    assert done.returncode == (0 if goes_on else int(code))
    assert (ended.read_text() if ended.exists() else "") == ("" if goes_on else f"{code}\n")


# A Python that makes environments which hold only itself, and records what its pip is called for. While the first one
# installs it calls another script that wants the same environment, and goes on when that waits for its turn or
# installs.
PYTHON = """#!/bin/bash
case "$*" in
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip install "*)
    echo "$TURN installs ${*: -1}" >>"$RECORD"
    if [[ "$TURN" == second ]]; then echo >"$PIPE"; fi
    if [[ "$TURN" == first ]]; then
      TURN=second bash -c "$SCRIPT" 9>&- &
      read -r <"$PIPE"
    fi
    ;;
esac
"""
FLOCK = """#!/bin/bash
if [[ "$TURN" == second ]]; then echo >"$PIPE"; fi
exec %s "$@"
"""
SBATCH_STAND_IN = '#!/bin/bash\necho "sbatch with $VENV" >>"$RECORD"\n'


@pytest.fixture
def checkout(tmp_path):
    """checkout(script, variables) -> (process, recorded lines): run in a copy of the repository that has no
    environment.
    """
    tools = {"a_python": PYTHON, "flock": FLOCK % shutil.which("flock"), "sbatch": SBATCH_STAND_IN}
    shutil.copytree(LAUNCH, tmp_path / "repository/launch")
    for name in ("setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / "repository")
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    os.mkfifo(tmp_path / "pipe")

    def checkout(script: str, **variables):
        base = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PYTHON": "a_python", "RECORD": str(tmp_path / "record"),
                "PIPE": str(tmp_path / "pipe"), "SCRIPT": script}  # fmt: skip
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path / "repository", env=base | variables, capture_output=True,
                              text=True, check=False, timeout=30)  # fmt: skip
        return done, (tmp_path / "record").read_text().splitlines()

    return checkout


def test_scripts_that_begin_together_make_one_environment(checkout, tmp_path):
    script = 'set -euo pipefail; source launch/setup_env.sh; use_env cuda; echo "$TURN has $VENV" >>"$RECORD"'
    done, record = checkout(script, TURN="first")
    made = tmp_path / "repository/.venv"
    assert sorted(record) == [f"first has {made}", "first installs .[cuda]", f"second has {made}"], done.stderr


def test_submit_makes_the_environment_of_the_job(checkout, tmp_path):
    made = tmp_path / "repository/.venv"
    done, record = checkout("launch/slurm.sh submit; launch/slurm.sh submit", TURN="submit", **RUN)
    assert record == ["submit installs .[cuda]", f"sbatch with {made}", f"sbatch with {made}"], done.stderr


COUNTING = """
import pathlib, sys
count = pathlib.Path(sys.argv[1])
count.write_text(count.read_text() + "x")
sys.exit(int(sys.argv[1 + len(count.read_text())]))
"""


@pytest.mark.parametrize("codes, runs", [(["0"], 1), (["75", "1", "0"], 3), (["2"], 1), (["75", "75", "75", "75"], 4)])
def test_a_host_starts_training_again_unless_it_is_done_or_mistaken(tmp_path, codes, runs):
    (tmp_path / "count").write_text("")
    command = ["bash", LAUNCH / "tpu_vm.sh", "keep", "3", shutil.which("python3"), "-c", COUNTING, tmp_path / "count", *codes]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (tmp_path / "count").read_text() == "x" * runs
    assert done.returncode == int(codes[-1])


SAVING = """
import pathlib, signal, sys
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).write_text("ready")  # a pipe: the test waits for this
signal.pause()
"""


def test_a_host_is_stopped_once_and_saves(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    environment = {**os.environ, "HOME": str(tmp_path)}

    def host(*arguments):
        command = ["bash", LAUNCH / "tpu_vm.sh", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)

    training = ["start", "3", shutil.which("python3"), "-c", SAVING, str(tmp_path / "pipe")]
    assert host(*training).returncode == 0
    assert (tmp_path / "pipe").read_text() == "ready"
    again = host(*training)
    assert again.returncode == 2 and "training runs here already" in again.stderr
    assert host("stop").returncode == 0
    assert (tmp_path / "starflow2.log").read_text() == "saved\n"  # and not started again
    assert host("stop").returncode == 0
