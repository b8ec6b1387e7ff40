"""Bad steps: the loss or gradient is not finite, or the loss jumps far above the last ones. A policy decides what to
do.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.config.schema import FaultsConfig
from starflow2_jax.errors import UserError


class NonFiniteLoss(UserError):
    """The loss or the gradient is not finite. The last good checkpoint stays."""


class LossSpike(UserError):
    """The loss is far above the last ones, or too many steps were bad. The last good checkpoint stays."""


class Watch:
    """Judges the losses of a task's steps, in order, by a policy (`config.faults`):

    nonfinite, spike   the action: "abort" ends the run; "skip" does not apply the update; "rollback" restores the last
                       checkpoint and continues with the data after the bad batch; "ignore" (spike only) does nothing
    deviations         a loss is a spike if it exceeds the median of the last `window` good losses by more than this
                       number of standard deviations, which are estimated from the median distance to the median
    most               if more steps than this are bad between two checkpoints, the run ends whatever the action

    `counts` has the numbers of steps that were not finite, spikes, skipped updates, rollbacks, and steps without
    targets.
    """

    def __init__(self, cfg: FaultsConfig, state: dict | None = None):
        """`state`: the value of `state()` in the checkpoint that the run resumes from; None for a new run."""
        self.cfg, state = cfg, state or {}
        self.losses: list[tuple[int, float]] = [tuple(pair) for pair in state.get("losses", ())]
        self.counts = dict.fromkeys(("nonfinite", "spikes", "skipped", "rollbacks", "without_targets"), 0) | state.get(
            "counts", {}
        )
        self.since_save = 0

    def saved(self) -> None:
        """A checkpoint was saved: count bad steps for `most` from here."""
        self.since_save = 0

    def state(self) -> dict:
        """JSON values for the checkpoint that is saved now: the last good losses with their steps, and the counts."""
        return {"losses": self.losses, "counts": self.counts}

    def limit(self, step: int) -> float:
        """The loss above which `step` is a spike, from the losses up to two steps before, which are known when it
        begins.
        """
        window = [loss for number, loss in self.losses if number < step - 1][-self.cfg.window :]
        if self.cfg.spike == "ignore" or len(window) < min(20, self.cfg.window):
            return math.inf
        median = float(np.median(window))
        deviation = 1.4826 * float(np.median(np.abs(np.array(window) - median)))  # of a normal distribution
        limit = median + self.cfg.deviations * max(deviation, 1e-3 * (1 + abs(median)))
        return float(np.float32(limit))  # rounded as in the compiled step

    def judge(self, step: int, values: dict[str, float], standing: str) -> str | None:
        """The action for a step: "skip" (`guarded` has done so already), "rollback", or None if the step is good.

        `values`: its metrics. `standing`: the step and the last checkpoint, for messages. Raises NonFiniteLoss or
        LossSpike if the run must end.
        """
        loss, limit = values["loss"], self.limit(step)
        self.counts["without_targets"] += values.get("targets") == 0
        bad = not (math.isfinite(loss) and math.isfinite(values["grad_norm"]))
        if not bad and loss <= limit:
            self._accept(step, loss)
            return None
        action = self.cfg.nonfinite if bad else self.cfg.spike
        self.counts["nonfinite" if bad else "spikes"] += 1
        self.since_save += 1
        seen = f"the loss is {loss} and the gradient norm {values['grad_norm']}"
        seen += "" if bad else f", above the limit of {limit:.4g},"
        if action == "abort":
            kind = NonFiniteLoss if bad else LossSpike
            raise kind(f"{seen} at {standing}: lower the learning rate and start again")
        if self.since_save > self.cfg.most:
            raise LossSpike(
                f"{seen} at {standing}; more than faults.most={self.cfg.most} steps since then were bad, so lower the "
                f"learning rate and start again"
            )
        self.counts["skipped" if action == "skip" else "rollbacks"] += 1
        return action

    def _accept(self, step: int, loss: float) -> None:
        self.losses = [*self.losses, (step, loss)][-(self.cfg.window + 2) :]

    def rewind(self, step: int) -> None:
        """The run goes back to the end of `step`: forget the losses of later steps."""
        self.losses = [pair for pair in self.losses if pair[0] <= step]


def guarded(step: Callable, cfg: FaultsConfig) -> Callable:
    """A training step (state, frozen, batch) -> (state, metrics) with one more argument, `limit`, a loss.

    If the loss or gradient is not finite, or the loss is above `limit`, and `cfg` says "skip", it does not apply the
    update: only `state.step` changes.
    """

    def run(state, frozen, batch, limit=math.inf):
        new, metrics = step(state, frozen, batch)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        bad = False
        if cfg.nonfinite == "skip":
            bad = ~finite
        if cfg.spike == "skip":
            bad = bad | (finite & (metrics["loss"] > limit))
        if bad is not False:
            before = state.replace(step=new.step)
            new = jax.tree.map(lambda old, updated: jnp.where(bad, old, updated), before, new)
        return new, metrics

    return run
