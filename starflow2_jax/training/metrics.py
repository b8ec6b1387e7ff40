"""Metrics go to a JSONL file and to TensorBoard."""

import json
from pathlib import Path

from tensorboardX import SummaryWriter


class Metrics:
    def __init__(self, folder: str | Path):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._lines = open(Path(folder) / "metrics.jsonl", "a", buffering=1)
        self._board = SummaryWriter(str(folder), flush_secs=30)

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
