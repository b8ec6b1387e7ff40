"""Which saved steps stay."""

from dataclasses import dataclass

from orbax.checkpoint import checkpoint_managers

policies = checkpoint_managers.preservation_policy


@dataclass(frozen=True)
class Keep:
    """The newest steps, every so many, and those of the lowest loss; a step stays for any of the three reasons."""

    latest: int | None = None  # None: all
    every: int = 0  # steps; 0: none for that reason
    best: int = 0

    def policy(self) -> policies.PreservationPolicy:
        rules = [policies.LatestN(self.latest)]
        if self.every:
            rules.append(policies.EveryNSteps(self.every))
        if self.best:
            rules.append(policies.BestN(get_metric_fn=_goodness, n=self.best, keep_checkpoints_without_metrics=False))
        return policies.AnyPreservationPolicy(rules)


def _goodness(metrics: dict[str, float]) -> float:
    """Losses of different stages cannot be compared: the later stage is the better one, then the lower loss."""
    return 1e9 * metrics["stage"] - metrics["loss"]
