"""Every key of an experiment's config: its default, a line of help, and the allowed values. See `starflow2 config`."""

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from starflow2_jax.codecs.table import CODECS
from starflow2_jax.config import evals
from starflow2_jax.config.evals import EvalConfig
from starflow2_jax.data import sources
from starflow2_jax.data.faults import DataFaultsConfig
from starflow2_jax.data.preparation import SourceConfig
from starflow2_jax.errors import UserError, require_one_of
from starflow2_jax.fields import Variant, check, joined, option
from starflow2_jax.models.pretzel import PretzelConfig
from starflow2_jax.stages import STAGES


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes. Raises UserError for a size that is neither positive nor -1."""

    data: int = option(
        "copies of the model; between slices of TPUs this axis comes first; -1: all remaining devices", -1
    )
    fsdp: int = option(
        "devices over which rows, parameters and optimizer are cut; -1: all remaining devices, or with data=-1, too, "
        "up to 64",
        1,
    )
    sequence: int = option("devices over which the positions of a row are cut; -1: all remaining devices", 1)
    tensor: int = option("devices over which heads, hidden channels and words are cut; -1: all remaining devices", 1)

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"{axis} must be at least 1, or -1 for all remaining devices, not {size}")
        left = {axis for axis, size in sizes.items() if size == -1}
        if len(left) > 1 and left != {"data", "fsdp"}:
            raise UserError(
                "only one axis can be -1, which stands for all devices that the other axes leave, or data and fsdp "
                "together, which then share them"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The sources of documents, and how they are read ahead."""

    source: str | None = option(
        "one source for every stage, in place of `sources` and of each stage's `mix`; None: those", None
    )
    sources: dict[str, SourceConfig] = option("the sources of documents by name", {}, variant=sources.VARIANT)
    workers: int = option(
        "processes that read and encode documents ahead, at most one per group; 0: the run's own process",
        0,
        least=0,
        most=4096,
    )
    threads: int = option("threads of each such process that read ahead; 0: none", 0, least=0, most=4096)
    groups: int = option("groups of a batch's rows; as many hosts can share the reading", 1, least=1)
    faults: DataFaultsConfig = option("documents that cannot be read or do not fit", DataFaultsConfig())


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """The key of the section `codec` that all codecs have."""

    kind: str = option(
        "latents: read from files; patch: the pixels of squares; fae: compressed features", "latents", choices=CODECS
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of a stage. Raises UserError for options that do not fit together."""

    name: str = option("the optimizer", "adamw", choices=("adamw", "muon", "adafactor"))
    learning_rate: float = option("learning rate at the end of the warm-up", 1e-4, least=0)
    final_fraction: float = option("share of the learning rate at the end of the cosine decay", 0.1, least=0, most=1)
    warmup: int = option("steps of linear warm-up; at most half of the stage's steps", 2000, least=0)
    b1: float = option("decay of the first moment", 0.9, least=0, below=1)
    b2: float = option("decay of the second moment", 0.95, least=0, below=1)
    weight_decay: float = option("decoupled weight decay, of matrices and embeddings", 1e-4, least=0)
    clip: float = option("largest norm of the whole gradient", 1.0, above=0)
    moments: str = option("data type of the stored moments", "float32", choices=("float32", "bfloat16"))
    offload: bool = option("keep the optimizer's state in the host's memory", False)
    factors: dict[str, float] = option("factor of the learning rate of parameter groups; 1 of others", {}, least=0)

    def __post_init__(self):
        check(self)
        if self.moments == "float32":
            return
        if self.name == "adafactor":  # its decay approaches 1; and its factored moments are small anyway
            raise UserError("moments='bfloat16' would make adafactor's average stand still; set it to 'float32'")
        if max(self.b1, self.b2) > 0.99:  # an average takes steps of 1 - b2 of itself, and bfloat16 resolves 1/256
            raise UserError("moments='bfloat16' needs b1 and b2 of at most 0.99; a slower average would stand still")


@dataclass(frozen=True)
class StageConfig:
    """How a stage is trained: steps, sizes of a batch, losses and optimizer."""

    steps: int = option("training steps of the stage; 0: its parameters keep their first values", least=0)
    rows: int = option("rows of a batch", 256, least=1)
    length: int = option("positions of a row", 2048, least=1)
    images: int = option("flow images of a row", 7, least=0)
    patches: int = option("patches of a row for the vision tower; 0: it sees no image", 0, least=0)
    vlm_length: int = option("positions of a row that the frozen VLM reads, flow images left out; 0: all", 0, least=0)
    accumulate: int = option("micro-batches of a step", 1, least=1)
    text_weight: float = option("weight lambda of the text loss: L_NF + lambda L_NTP", 1.0, least=0)
    latent_penalty: float = option(
        "weight of the mean squared output of each shallow block; STARFlow's is 1e-4", 0.0, least=0
    )
    ema: float = option("decay of the parameters' moving average", 0.9999, least=0, below=1)
    mix: dict[str, float] = option("weight of each source in the stage's documents; {}: all sources alike", {}, least=0)
    optimizer: OptimizerConfig = option("the optimizer, and its learning rate over the steps", OptimizerConfig())


@dataclass(frozen=True)
class FaultsConfig:
    """What happens after a step whose loss or gradient is not finite, or whose loss jumps. Raises UserError."""

    nonfinite: str = option(
        "action for a loss or gradient that is not finite", "abort", choices=("abort", "skip", "rollback")
    )
    spike: str = option(
        "action for a loss far above the last ones", "ignore", choices=("ignore", "abort", "skip", "rollback")
    )
    deviations: float = option("standard deviations above the median that make a spike", 8.0, above=0)
    window: int = option("number of last good losses whose median is taken", 100, least=1)
    most: int = option("bad steps between two checkpoints, above which the run ends", 10, least=0)

    def __post_init__(self):
        check(self)


@cache
def codec_class(kind: str | None) -> type:
    """The dataclass of the section `codec` for a codec of this `kind`. Raises UserError for an unknown kind."""
    kind = "latents" if kind is None else kind
    require_one_of("codec.kind", kind, CODECS)
    return joined(CodecConfig, CODECS[kind].Options)


def _codec_options() -> list[type]:
    return [codec.Options for codec in CODECS.values()]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The keys of every run, whatever it trains."""

    kind: str = option("what is trained: starflow2, or fae, a codec", "starflow2", choices=("starflow2", "fae"))
    seed: int = option("seed of parameters, data order, noise and dropout", 0, least=0)
    cpu_devices: int = option("CPU devices to create if there is no accelerator: one per core", 1, least=1, most=1024)
    mesh: MeshConfig = option("how devices share the work", MeshConfig())
    data: DataConfig = option("the training data and its readers", DataConfig())
    log_every: int = option("steps between two lines of metrics; 0: none", 50, least=0)
    save_every: int = option("steps between two checkpoints; 0: only at the end of a stage", 2000, least=0)
    keep: int | None = option("newest checkpoints that are kept; None: all", 3, least=1)
    keep_every: int = option("steps between checkpoints that are kept for good; 0: none", 0, least=0)
    keep_best: int = option("checkpoints of the lowest `best_metric` that are kept; 0: none", 0, least=0)
    best_metric: str = option(
        'metric that ranks steps and runs, lower is better: "val/loss", "loss", ...; "": a held-out loss, if there is '
        "one",
        "",
    )
    evals: dict[str, EvalConfig] = option("evaluations while training, by name", {}, variant=evals.VARIANT)
    faults: FaultsConfig = option("actions for steps that go wrong", FaultsConfig())
    peak_flops: float = option(
        "peak FLOP/s of one device, for the utilisation; 0: the known value of this kind of device", 0.0, least=0
    )


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(RunConfig):
    """Every key of an experiment that trains STARFlow2."""

    noise: float = option("standard deviation of the noise added to images, before the codec's scaling", 0.0, least=0)
    max_positions: int = option("positions of a prompt and its answer, when sampling", 8192, least=1)
    codec: CodecConfig = option(
        "how images become the tokens of the flow", variant=Variant("kind", codec_class, _codec_options)
    )
    model: PretzelConfig = option("the networks")
    order: tuple[str, ...] = option("the stages to run, one after the other", tuple(STAGES), choices=STAGES)
    stages: dict[str, StageConfig] = option("how each stage is trained", choices=STAGES)


if TYPE_CHECKING:

    class Config(ExperimentConfig):
        """A whole config. It is a locked ConfigDict; type checkers read its keys and their types from the schema."""

        def to_dict(self) -> dict[str, Any]: ...

else:
    Config = ConfigDict
