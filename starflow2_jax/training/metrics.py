"""Metrics go to a JSONL file and to TensorBoard."""

import json
from pathlib import Path

from tensorboardX import SummaryWriter


class Metrics:
    """`done`: the step that the run goes on from; what a killed run wrote of later steps is dropped."""

    def __init__(self, folder: str | Path, done: int = 0):
        path = Path(folder) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in path.read_text().splitlines() if _step(line) <= done] if path.is_file() else []
        path.write_text("".join(line + "\n" for line in kept))
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder), flush_secs=30, purge_step=done + 1)

    def write(self, step: int, stage: str, values: dict[str, float]) -> None:
        self._lines.write(json.dumps({"step": step, "stage": stage, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
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
