"""Metrics go to a JSONL file and to TensorBoard, what concerns time to TensorBoard alone."""

import json
from pathlib import Path

from tensorboardX import SummaryWriter


class Metrics:
    """`done`: the step that the run goes on from; what a killed run wrote of later steps is dropped.

    `writes`: whether this process is the one that does; in the others nothing happens.
    """

    def __init__(self, folder: str | Path, done: int = 0, writes: bool = True):
        self.folder, self.writes = Path(folder), writes
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open(done)

    def _open(self, done: int) -> None:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if _step(line) <= done]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._lines = path.open("a", buffering=1, encoding="utf-8")
        self._board = SummaryWriter(str(self.folder), flush_secs=30, purge_step=done + 1)

    def write(self, step: int, stage: str, values: dict[str, float], timings: dict[str, float] | None = None) -> None:
        """`values` are the same whenever the run is repeated, `timings` are not and stay out of the JSONL file."""
        if not self.writes:
            return
        self._lines.write(json.dumps({"step": step, "stage": stage, **values}) + "\n")
        for name, value in {**values, **(timings or {})}.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)

    def rewind(self, step: int) -> None:
        """The run goes back to the end of `step`: what was written of later ones is dropped."""
        if self.writes:
            self.close()
            self._open(step)

    def write_summary(self, summary: dict) -> None:
        if self.writes:
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")

    def close(self) -> None:
        if self.writes:
            self._lines.close()
            self._board.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _step(line: str) -> float:
    """The step that a line tells of; of one that was cut off, none."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
