"""Sweeps: one experiment, trained at many points of its config, here or by a launcher, and compared by a metric.

A sweep is a Python file with

    CONFIG    the experiment: a file, relative to the sweep's folder, or the name of one that ships with the package
    METRIC    the metric, "stage/name" of metrics.jsonl; lower is better (optional: else the experiment's `best_metric`
    in
              its last stage, which is a held-out loss if it has one)
    ALWAYS    overrides of every point, a dict of config key -> value (optional)
    points()  yields the points: dicts of config key -> value; `grid` and `random` make them

Each point is trained in a folder of its own, whose name is a hash of its overrides. So the same command resumes after
an interruption, and trains only the new points after some were added to the file.
"""

import hashlib
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from starflow2_jax.config import loading as configs
from starflow2_jax.config.evals import best_metric
from starflow2_jax.errors import ConfigError
from starflow2_jax.extensions import import_file
from starflow2_jax.stages import STAGES

AVERAGED = 3  # last logged values of a stage, whose mean is the result: single batches are noisy
SEED = "seed"  # the key whose values are averaged over
DONE, FAILED, WAITING, OPEN = "done", "failed", "handed on", "not run"  # states of a point
Draw = Callable[[np.random.Generator], object]  # draws the value of a key


def grid(axes: Mapping[str, Sequence]) -> Iterator[dict]:
    """Yields a point for every combination of the keys' values."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def random(draws: Mapping[str, Draw], count: int, seed: int) -> Iterator[dict]:
    """Yields `count` random points. `draws`: what draws each key's value, such as `log_uniform(1e-4, 1e-2)`.

    Point i depends on `seed` and i alone, so a larger `count` adds points to the same ones.
    """
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        yield {key: draw(rng) for key, draw in draws.items()}


def uniform(low: float, high: float) -> Draw:
    """Draws numbers between `low` and `high`, all equally likely."""
    return lambda rng: float(rng.uniform(low, high))


def log_uniform(low: float, high: float) -> Draw:
    """Draws numbers whose logarithm is uniform, rounded to three significant digits to be easy to read and type."""
    return lambda rng: float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}")


def choice(values: Sequence) -> Draw:
    """Draws one of the values, all equally likely."""
    return lambda rng: values[int(rng.integers(len(values)))]


@dataclass(frozen=True)
class Point:
    """A point of a sweep, and the folder that it is trained in."""

    overrides: dict  # config key -> value
    arguments: tuple[str, ...]  # the same as text: "key=value"
    folder: Path
    steps: int  # of all stages together

    @property
    def run(self) -> Path:
        """The checkpoint directory of its training."""
        return self.folder / "run"

    @property
    def state(self) -> str:
        """One of DONE, FAILED, WAITING and OPEN, by the files in its folder."""
        if (self.run / "steps" / str(self.steps)).is_dir():  # the folder gets this name when the checkpoint is complete
            return DONE
        if self.failure:
            return FAILED
        return WAITING if (self.folder / "submitted").exists() else OPEN

    @property
    def failure(self) -> str:
        """Why its last run failed; "" if it did not fail."""
        if code := self._file_text("ended"):
            return f"its job ended with exit code {code.strip()}"
        return self._file_text("failed")

    def _file_text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def begin(self) -> None:
        """Create its folder, and remove what an earlier run noted there about its end. Its checkpoints stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "point.json").write_text(json.dumps(self.overrides, indent=1), encoding="utf-8")
        for name in ("failed", "submitted", "ended"):
            (self.folder / name).unlink(missing_ok=True)

    def result(self, metric: str, averaged: int = AVERAGED) -> float | None:
        """The mean of the last `averaged` values of the metric "stage/name".

        None if the point is not done, if the metric was never logged, or if the mean is not finite.
        """
        stage, _, name = metric.partition("/")
        if self.state != DONE:
            return None
        text = (self.run / "metrics/metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        values = [line[name] for line in lines if line["stage"] == stage and name in line]
        mean = float(np.mean(values[-averaged:])) if values else math.nan
        return mean if math.isfinite(mean) else None


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep file."""

    config: Path  # the experiment's file
    metric: str  # "stage/name"
    points: tuple[Point, ...]
    chip: str | None = None  # TPU generation that the experiment is asked for
    averaged: int = AVERAGED  # last values of the metric; 1 for an evaluation, whose documents are always the same

    def result(self, point: Point) -> float | None:
        """The sweep's metric of a point. None in the same cases as `Point.result`."""
        return point.result(self.metric, self.averaged)

    @property
    def varied(self) -> dict[str, str]:
        """The keys whose values differ between points, each with its shortest unambiguous name."""
        keys = list(dict.fromkeys(key for p in self.points for key in p.overrides))
        keys = [k for k in keys if len({repr(p.overrides.get(k)) for p in self.points}) > 1]
        names = {}
        for key in keys:
            parts = key.split(".")
            others = [k for k in keys if k != key]
            tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
            names[key] = next((t for t in tails if not any(f".{k}".endswith(f".{t}") for k in others)), key)
        return names


def load(path: str | Path, folder: str | Path, runlocal: bool = False, chip: str | None = None) -> Sweep:
    """Read a sweep, and check the config of each point before anything is trained. Raises ConfigError.

    `path`: its file, or the name of a sweep that ships with the package ("digits_lr"). `folder`: for the points'
    folders. `runlocal`, `chip`: see config.loading.load.
    """
    path, folder = configs.shipped(path, configs.EXPERIMENTS / "sweeps"), Path(folder)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in (configs.EXPERIMENTS / "sweeps").glob("[!_]*.py")))
        raise ConfigError(f"there is no sweep file {path}; give another path, or one of the names {names}")
    module = import_file(path, "sweep", ConfigError)
    if missing := [name for name in ("CONFIG", "points") if not hasattr(module, name)]:
        raise ConfigError(f"{path} has no {missing[0]}; starflow2_jax/sweeps/points.py says what a sweep file holds")
    beside = path.parent / module.CONFIG
    config = beside.resolve() if beside.is_file() else configs.find(module.CONFIG)
    always = getattr(module, "ALWAYS", {})
    points = tuple(_point(config, {**always, **overrides}, folder, runlocal, chip) for overrides in module.points())
    if not points:
        raise ConfigError(f"{path} yields no point; let points() yield at least one dict of config key -> value")
    if len({p.folder for p in points}) < len(points):
        raise ConfigError(f"{path} yields a point twice; remove one of the two")
    first = configs.load(config, points[0].arguments, runlocal, chip)
    last = first.order[-1]
    metric = getattr(module, "METRIC", f"{last}/{best_metric(first, STAGES[last])}")
    stage, _, name = metric.partition("/")
    if stage not in first.order:
        raise ConfigError(f'{path}: METRIC={metric!r} must be "stage/name", with a stage that {config} runs')
    return Sweep(config, metric, points, chip, 1 if name.partition("/")[0] in first.evals else AVERAGED)


def _point(config: Path, overrides: dict, folder: Path, runlocal: bool, chip: str | None) -> Point:
    texts = tuple(f"{key}={value if isinstance(value, str) else repr(value)}" for key, value in overrides.items())
    loaded = configs.load(config, texts, runlocal, chip)
    name = hashlib.sha256(
        json.dumps([str(config.name), sorted(texts), runlocal, *([chip] if chip else [])]).encode()
    ).hexdigest()[:10]
    steps = sum(loaded.stages[stage].steps for stage in loaded.order)
    return Point(overrides, texts, folder.resolve() / name, steps)


def train_command(sweep: Sweep, point: Point, runlocal: bool = False) -> list[str]:
    """The command that trains a point on this machine. `runlocal`: the small version of its experiment."""
    command = [sys.executable, "-m", "starflow2_jax.cli", "train", "--config", str(sweep.config)]
    return [*command, "--out", str(point.run), *(["--runlocal"] if runlocal else []), *_flags(sweep, point)]


def launch_command(sweep: Sweep, point: Point, template: str) -> list[str]:
    """The command of a launcher for a point: `template` with {config}, {out}, {name} and {overrides} filled in.

    {name} is made from the name of the point's folder. {overrides} as a word of its own becomes one argument for each
    override. As a part of a longer word it becomes all overrides, quoted for a shell.
    """
    filled = []
    for word in shlex.split(template):
        if word == "{overrides}":
            filled += _flags(sweep, point)
        else:
            values = {
                "config": sweep.config,
                "out": point.run,
                "name": f"p{point.folder.name}",
                "overrides": shlex.join(_flags(sweep, point)),
            }
            for name, value in values.items():
                word = word.replace(f"{{{name}}}", str(value))
            filled.append(word)
    return filled


def _flags(sweep: Sweep, point: Point) -> list[str]:
    """The arguments of `starflow2 train` that make a point of its experiment."""
    return [*(["--chip", sweep.chip] if sweep.chip else []), *(f"--config.{text}" for text in point.arguments)]


def run(sweep: Sweep, command: Callable[[Point], list[str]], report: Callable[[str], None] = print) -> None:
    """Train the points that are not done, one after another; after one that fails, go on with the next.

    `command`: makes the command that trains a point. `report`: called with lines about the progress. An exception such
    as KeyboardInterrupt ends the running point with SIGTERM, and is raised when that point has saved its state.
    """
    for number, point in enumerate(sweep.points, 1):
        title = f"point {number} of {len(sweep.points)} ({_described(sweep, point)})"
        if point.state == DONE:
            report(f"{title}: done already")
            continue
        report(f"{title}: {'goes on' if (point.run / 'config.json').exists() else 'begins'}")
        point.begin()
        begin = time.monotonic()
        code = _wait(command(point), point.folder / "log.txt")
        seconds = round(time.monotonic() - begin, 1)
        if point.state == DONE:
            report(f"{title}: done in {seconds} s, {sweep.metric} {sweep.result(point)}")
        else:
            reason = f"exit code {code}: {_last_line(point.folder / 'log.txt')}"
            (point.folder / "failed").write_text(reason, encoding="utf-8")
            report(f"{title}: failed, {reason}")


def _wait(command: list[str], log: Path) -> int:
    """Run a command, with its output appended to `log`; returns its exit code.

    It runs in a session of its own, so that Ctrl-C reaches this process only, which then ends it by SIGTERM.
    """
    with log.open("a", encoding="utf-8") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


def submit(sweep: Sweep, template: str, again: str | None = None, report: Callable[[str], None] = print) -> None:
    """Submit each point to a launcher as a job, unless it is done or was submitted before.

    `template`: the launcher's command, see `launch_command`. `again`: "ended" also submits points again whose jobs
    ended without finishing; "all" submits every point that is not done. At its end, a job writes its exit code to the
    file that the environment variable ENDED names. `report`: called with a line about each point.
    """
    for number, point in enumerate(sweep.points, 1):
        title = f"point {number} of {len(sweep.points)} ({_described(sweep, point)})"
        state, handed_on = point.state, (point.folder / "submitted").exists()
        wanted = not handed_on or again == "all" or (again == "ended" and state == FAILED)
        if state == DONE or not wanted:
            report(f"{title}: {point.failure if state == FAILED else f'{state} already'}")
            continue
        point.begin()
        command = launch_command(sweep, point, template)
        try:
            variables = {**os.environ, "ENDED": str(point.folder / "ended")}
            done = subprocess.run(
                command, env=variables, capture_output=True, encoding="utf-8", errors="replace", check=False
            )
            code, said = done.returncode, (done.stdout + done.stderr).strip()
        except OSError as error:
            code, said = 127, str(error)
        if code:
            (point.folder / "failed").write_text(
                f"the launcher failed, exit code {code}: {said[-300:]}", encoding="utf-8"
            )
            report(f"{title}: the launcher failed: {said[-300:]}")
        else:
            (point.folder / "submitted").write_text(said, encoding="utf-8")
            report(f"{title}: handed on {said}")


def _described(sweep: Sweep, point: Point) -> str:
    """The values of a point, for messages."""
    return ", ".join(f"{name}={point.overrides.get(key)}" for key, name in sweep.varied.items())


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"
