"""The table of evaluators. Its keys are the kinds of a config's `evals`; their options are in config/evals.py."""

from pathlib import Path
from typing import Any

from starflow2_jax.config.evals import applied
from starflow2_jax.training.codec.probe import Probe
from starflow2_jax.training.codec.reconstruction import Reconstruction
from starflow2_jax.training.evals.held_out import HeldOutLosses
from starflow2_jax.training.evals.protocol import Evaluation, Evaluator
from starflow2_jax.training.evals.sheet import Sheet

EVALS: dict[str, type[Evaluator]] = {
    "loss": HeldOutLosses,
    "sheet": Sheet,
    "reconstruction": Reconstruction,
    "probe": Probe,
}


def evaluations(task: Any, folder: Path) -> list[Evaluation]:
    """The evaluations that run in a stage. folder: of the run. Raises UserError."""
    return [
        Evaluation(name, cfg.every, EVALS[cfg.kind](name, cfg, task, folder))
        for name, cfg in applied(task.config, task.stage).items()
    ]
