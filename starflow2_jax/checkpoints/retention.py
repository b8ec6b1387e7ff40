"""Which saved steps are kept, and which are deleted."""

from dataclasses import dataclass

from orbax.checkpoint import checkpoint_managers

policies = checkpoint_managers.preservation_policy


@dataclass(frozen=True)
class Keep:
    """A saved step is kept if it is one of the newest, or at a multiple of `every`, or one of the best."""

    latest: int | None = None  # number of newest steps that are kept; None: all
    every: int = 0  # steps; 0: this rule keeps none
    best: int = 0  # number of steps of the lowest loss, or of another metric that the run ranks by, that are kept

    def policy(self) -> policies.PreservationPolicy:
        """This rule as orbax's preservation policy."""
        rules: list[policies.PreservationPolicy] = [policies.LatestN(self.latest)]
        if self.every:
            rules.append(policies.EveryNSteps(self.every))
        if self.best:
            rules.append(policies.BestN(get_metric_fn=_goodness, n=self.best, keep_checkpoints_without_metrics=False))
        return policies.AnyPreservationPolicy(rules)


def _goodness(metrics: dict[str, float]) -> float:
    """A number by which steps are compared: by stage, then by loss (or that metric). Losses of different stages are not
    comparable, so every step of a later stage is better."""
    return 1e9 * metrics["stage"] - metrics["loss"]
