"""The keys of a run's evaluations: what each kind of them takes, in which stages they run, and the metric that ranks
steps.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from starflow2_jax.errors import require_one_of
from starflow2_jax.fields import Variant, joined, option
from starflow2_jax.stages import CODEC_STAGES, STAGES, CodecStage, Stage


class EvalOptions:
    """What only one kind of evaluation takes: a frozen dataclass that inherits from this class."""

    ranks: ClassVar[str] = ""  # the number by which steps and runs are ranked, lower is better; "": none

    @classmethod
    def applies(cls, stage: Stage | CodecStage) -> bool:
        """Whether the evaluation can run in a stage."""
        return True


@dataclass(frozen=True, kw_only=True)
class LossOptions(EvalOptions):
    """Losses of held-out documents."""

    mix: dict[str, float] = option("weight of each held-out source in the batches", least=0)
    batches: int = option("batches; a source with fewer documents is read once", 50, least=1)

    ranks = "ema_loss"

    @classmethod
    def applies(cls, stage: Stage | CodecStage) -> bool:
        """See EvalOptions."""
        return stage.image_loss or stage.text_loss


@dataclass(frozen=True, kw_only=True)
class SheetOptions(EvalOptions):
    """Images of fixed prompts and seeds."""

    prompts: tuple[str, ...] = option("texts, or .jsonl files of documents; each is a row of the sheet")
    samples: int = option("images for each prompt, with the seeds seed, seed + 1, ...", 4, least=1, most=64)
    seed: int = option("seed of the first image of each prompt", 0, least=0)
    guidance: float = option("guidance against the unconditional branch; 0: none", 1.0, least=0)
    image_temperature: float = option("temperature of the images' noise", 0.9, least=0)

    @classmethod
    def applies(cls, stage: Stage | CodecStage) -> bool:
        """See EvalOptions."""
        return stage.image_loss


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions(EvalOptions):
    """What a codec keeps of held-out pictures."""

    mix: dict[str, float] = option("weight of each held-out source in the pictures", least=0)
    batches: int = option("batches of pictures; a source with fewer is read once", 20, least=1)
    shown: int = option("pictures on the sheet of originals and reconstructions", 8, least=0, most=64)
    files: bool = option("write all of them and their reconstructions as PNG files, for `starflow2 eval fid`", False)

    @classmethod
    def applies(cls, stage: Stage | CodecStage) -> bool:
        """See EvalOptions."""
        return isinstance(stage, CodecStage) and stage.latents


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(EvalOptions):
    """What a linear map reads off the features that a codec makes again, beside the encoder's own features."""

    mix: dict[str, float] = option("weight of each held-out source in the pictures", least=0)
    label: str = option(
        "regular expression with one group, which is the picture's class in the first text that matches", "(.+)"
    )
    batches: int = option("batches of pictures, of which every second picture is for the test", 40, least=1)

    @classmethod
    def applies(cls, stage: Stage | CodecStage) -> bool:
        """See EvalOptions."""
        return isinstance(stage, CodecStage) and stage.latents


# A new kind has a row here and a row in training/evals/table.py.
EVAL_OPTIONS: dict[str, type[EvalOptions]] = {
    "loss": LossOptions,
    "sheet": SheetOptions,
    "reconstruction": ReconstructionOptions,
    "probe": ProbeOptions,
}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The keys that every evaluation has."""

    kind: str = option(
        "the kind of evaluation; left out, it is the entry's name if there is such a kind", "loss", choices=EVAL_OPTIONS
    )
    every: int = option(
        "steps of the whole run between two evaluations; a stage also ends with one; 0: only at its end",
        1000,
        least=0,
    )
    stages: tuple[str, ...] = option(
        "stages in which it runs; (): every stage that it applies to", (), choices={**STAGES, **CODEC_STAGES}
    )


@cache
def eval_class(kind: str | None) -> type:
    """The keys of `evals.NAME`: those of all evaluations and those of this kind. Raises UserError for an unknown
    kind.
    """
    kind = "loss" if kind is None else kind
    require_one_of("the kind of an evaluation", kind, EVAL_OPTIONS)
    return joined(EvalConfig, EVAL_OPTIONS[kind])


VARIANT = Variant("kind", eval_class, lambda: list(EVAL_OPTIONS.values()))


def with_kinds(evals: dict[str, Any]) -> dict[str, Any]:
    """The table `evals` of a config, in which an entry without a kind is of the kind that has the entry's name, if
    there is one."""
    return {
        name: {"kind": name} | each if name in EVAL_OPTIONS and isinstance(each, dict) else each
        for name, each in evals.items()
    }


def left_out(config: Any, stage: Stage | CodecStage) -> dict[str, str]:
    """The evaluations that do not apply to a stage, each with the reason."""
    reasons = {}
    for name, each in _of(config, stage).items():
        if not EVAL_OPTIONS[each.kind].applies(stage):
            reasons[name] = "it is about losses, samples or latents that the stage does not have"
        elif "mix" in each and config.data.source is not None:
            reasons[name] = "data.source stands for all sources, so that none is held out"
    return reasons


def applied(config: Any, stage: Stage | CodecStage) -> dict[str, Any]:
    """The evaluations that run in a stage, by name."""
    without = left_out(config, stage)
    return {name: each for name, each in _of(config, stage).items() if name not in without}


def _of(config: Any, stage: Stage | CodecStage) -> dict[str, Any]:
    return {name: each for name, each in sorted(config.evals.items()) if not each.stages or stage.name in each.stages}


def best_metric(config: Any, stage: Stage | CodecStage) -> str:
    """The metric by which the steps of a stage are ranked: `best_metric`, else the first held-out loss, else the
    training loss."""
    if config.best_metric:
        return config.best_metric
    ranked = (f"{name}/{EVAL_OPTIONS[each.kind].ranks}" for name, each in applied(config, stage).items())
    return next((metric for metric in ranked if not metric.endswith("/")), "loss")
