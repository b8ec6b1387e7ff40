"""The rule by which saved steps are kept or deleted."""

from dataclasses import dataclass

from orbax.checkpoint import checkpoint_managers

policies = checkpoint_managers.preservation_policy


@dataclass(frozen=True)
class Keep:
    """Keep the newest steps, a step at regular intervals, and the best steps. One of these reasons is enough."""

    latest: int | None = None  # number of newest steps; None: all
    every: int = 0  # steps between two that are kept; 0: none
    best: int = 0  # number of steps of the lowest loss, or of another metric that the run ranks by

    def policy(self) -> policies.PreservationPolicy:
        rules = [policies.LatestN(self.latest)]
        if self.every:
            rules.append(policies.EveryNSteps(self.every))
        if self.best:
            rules.append(policies.BestN(get_metric_fn=_goodness, n=self.best, keep_checkpoints_without_metrics=False))
        return policies.AnyPreservationPolicy(rules)


def _goodness(metrics: dict[str, float]) -> float:
    """Orders steps by stage, then by loss (or that metric). The values of different stages cannot be compared, so a later
    stage is better."""
    return 1e9 * metrics["stage"] - metrics["loss"]
