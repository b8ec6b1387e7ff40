"""Metrics of a run: a JSONL file, and TensorBoard event files, which also have timings."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] - protobuf makes them
from tensorboardX.summary import image, scalar

from starflow2_jax.checkpoints.atomic_folder import write_whole


class Metrics:
    """Writes the metrics of a run into `folder`: metrics.jsonl, event files, and at the end summary.json.

    `done`: the step that the run resumes from; lines about later steps, which a killed run wrote, are removed.
    `writes`: False in all processes but one, where the methods do nothing. The calling thread writes, so OSError is
    raised there.
    """

    def __init__(self, folder: str | Path, done: int = 0, writes: bool = True):
        self.folder, self.writes = Path(folder), writes
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open(done)

    def _open(self, done: int) -> None:
        path = self.folder / "metrics.jsonl"
        old = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
        if (kept := [line for line in old if _step(line) <= done]) != old:
            write_whole(path, "".join(kept))
        self._lines = path.open("a", buffering=1, encoding="utf-8")
        self._board = EventsWriter(str(self.folder / "events"), f".{os.getpid()}.{done}")
        # TensorBoard hides what older files say about this step and later ones.
        self._board.write_event(Event(step=done + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, stage: str, values: dict[str, float], timings: dict[str, float] | None = None) -> None:
        """Log a step. `values` go into both files; `timings`, which differ when a run is repeated, to TensorBoard
        alone.
        """
        if not self.writes:
            return
        self._lines.write(json.dumps({"step": step, "stage": stage, **values}) + "\n")
        for name, value in {**values, **(timings or {})}.items():
            self._board.write_event(Event(step=step, summary=scalar(f"{stage}/{name}", value), wall_time=time.time()))
        self._board.flush()

    def show(self, step: int, stage: str, pictures: Mapping[str, np.ndarray]) -> None:
        """Show pictures (height, width, 3) uint8 in TensorBoard."""
        if not self.writes:
            return
        for name, picture in pictures.items():
            summary = image(f"{stage}/{name}", picture, dataformats="HWC")
            self._board.write_event(Event(step=step, summary=summary, wall_time=time.time()))
        self._board.flush()

    def rewind(self, step: int) -> None:
        """Remove what was written about steps after `step`, to which the run goes back."""
        if self.writes:
            self.close()
            self._open(step)

    def write_summary(self, summary: dict) -> None:
        """Write summary.json, whole or not at all."""
        if self.writes:
            write_whole(self.folder / "summary.json", json.dumps(summary, indent=1))

    def close(self) -> None:
        """Close the files. `rewind` opens them again."""
        if self.writes:
            self._lines.close()
            self._board.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _step(line: str) -> float:
    """The step that a line is about; infinity if the line is damaged or was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")
