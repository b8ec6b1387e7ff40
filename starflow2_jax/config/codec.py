"""The keys of a run that trains a codec (`kind="fae"`), and the checks across them."""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from starflow2_jax.config.checks import require_evals, require_groups, require_order, require_sources
from starflow2_jax.config.schema import OptimizerConfig, RunConfig
from starflow2_jax.errors import ConfigError, UserError, require_one_of
from starflow2_jax.fields import Variant, build, check, joined, option
from starflow2_jax.models.fae import FaeConfig
from starflow2_jax.models.feature_encoders import ENCODERS
from starflow2_jax.stages import CODEC_STAGES

CRITICS = ("none", "patch", "features")


@dataclass(frozen=True)
class CriticConfig:
    """The discriminator of a stage that makes pictures, and its loss."""

    kind: str = option(
        "patch: a convolutional network on pixels; features: heads on layers of the frozen encoder",
        "none",
        choices=CRITICS,
    )
    weight: float = option("weight of the generator's loss", 0.75, least=0)
    adaptive: bool = option("scale it so that both losses move the last layer alike", True)
    train_from: int = option("step of the stage from which the discriminator is trained", 0, least=0)
    use_from: int = option("step of the stage from which the generator's loss counts", 0, least=0)
    lecam: float = option("weight of LeCam's regulariser; TiTok's is 0.001", 0.0, least=0)
    lecam_decay: float = option("decay of the moving averages of the mean logits", 0.999, least=0, below=1)
    augment: bool = option("colours and shifts are drawn for all pictures that it sees", True)
    channels: int = option("of patch: channels of the first stage", 128, least=1)
    stages: int = option("of patch: stages, each of which halves the sides", 3, least=1)
    layers: tuple[int, ...] = option("of features: layers of the encoder, counted from 1", (), least=1)
    optimizer: OptimizerConfig = option("the discriminator's optimizer", OptimizerConfig())

    def __post_init__(self):
        check(self)
        if self.train_from > self.use_from:
            raise UserError(
                f"use_from={self.use_from} comes before train_from={self.train_from}; train the discriminator before "
                f"its use"
            )


@dataclass(frozen=True)
class PictureLosses:
    """The weights of the losses of pictures, apart from the discriminator's."""

    l1: float = option("weight of the mean absolute error of pixels", 1.0, least=0)
    l2: float = option("weight of their mean squared error", 0.0, least=0)
    perceptual: float = option("weight of the distance in features of the frozen encoder", 0.0, least=0)
    perceptual_layers: tuple[int, ...] = option("the encoder's layers that it compares, counted from 1", (), least=1)
    lpips: float = option("weight of LPIPS, for which lpips_vgg and lpips_linear name files", 0.0, least=0)


@dataclass(frozen=True)
class CodecStageConfig:
    """How a stage of a codec's training is trained."""

    steps: int = option("training steps of the stage; 0: its parameters keep their first values", least=0)
    rows: int = option("pictures of a batch", 256, least=1)
    accumulate: int = option("micro-batches of a step", 1, least=1)
    ema: float = option("decay of the parameters' moving average", 0.9999, least=0, below=1)
    mix: dict[str, float] = option("weight of each source in the stage's pictures; {}: all sources alike", {}, least=0)
    masked: float = option("encoder: share of the patches that are masked", 0.5, above=0, below=1)
    beta: float = option("features, vae: weight of the KL in nats a token, beside the other losses", 1e-6, least=0)
    noise: float = option(
        "standard deviation of the decoder's noise: pixels, of the features' root mean square; pixels_tuned, of that "
        "of each latent channel",
        0.0,
        least=0,
    )
    noise_drawn: bool = option("draw it for each picture from 0 to `noise`", False)
    losses: PictureLosses = option("pixels, pixels_tuned, vae: the losses of pictures", PictureLosses())
    critic: CriticConfig = option("pixels, pixels_tuned, vae: the discriminator", CriticConfig())
    optimizer: OptimizerConfig = option("the optimizer, and its learning rate over the steps", OptimizerConfig())


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The keys of the frozen encoder that all kinds of encoders have."""

    kind: str = option(
        "dinov2, siglip, vit: a small one of DINOv2's form, vlm: a vision tower", "dinov2", choices=ENCODERS
    )
    path: str = option(
        "folder of DINOv2 or SigLIP as transformers saves it, or of a codec; empty: the stage encoder trains it", ""
    )


@cache
def encoder_class(kind: str | None) -> type:
    """The dataclass of the section `encoder`. Raises UserError for an unknown kind."""
    kind = "dinov2" if kind is None else kind
    require_one_of("encoder.kind", kind, ENCODERS)
    return joined(EncoderConfig, ENCODERS[kind].config)


def _all_encoders() -> list[type]:
    return [row.config for row in ENCODERS.values()]


@dataclass(frozen=True, kw_only=True)
class CodecExperiment(RunConfig):
    """Every key of an experiment that trains a codec."""

    networks: FaeConfig = option("the codec's networks", FaeConfig())
    encoder: EncoderConfig = option(
        "the frozen encoder of the features", variant=Variant("kind", encoder_class, _all_encoders)
    )
    start: str = option("a codec's folder, whose networks are the first parameters; empty: random ones", "")
    order: tuple[str, ...] = option(
        "the stages to run, one after the other", ("features", "pixels", "pixels_tuned"), choices=CODEC_STAGES
    )
    stages: dict[str, CodecStageConfig] = option("how each stage is trained", choices=CODEC_STAGES)
    measured: int = option("batches over which the latents' mean and deviation are measured", 200, least=1)
    lpips_vgg: str = option("torchvision's file of VGG-16, for LPIPS", "")
    lpips_linear: str = option("the lpips package's file vgg.pth, for LPIPS", "")


def encoder_config(config: Any) -> Any:
    """The sizes of the frozen encoder of a whole config."""
    kind = ENCODERS[config.encoder.kind].config
    return build(kind, {f.name: _plain(config.encoder[f.name]) for f in fields(kind)}, "encoder")


def networks_config(config: Any) -> FaeConfig:
    """The sizes of the codec's networks of a whole config."""
    return build(FaeConfig, config.networks.to_dict(), "networks")


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value


def require_consistent(config: CodecExperiment) -> None:
    """Raises ConfigError for the first values that contradict each other; the message names the keys to change."""
    require_order(config)
    require_sources(config)
    require_evals(config)
    row, encoder, networks = ENCODERS[config.encoder.kind], config.encoder, config.networks
    if (width := row.width(encoder)) != networks.features:
        raise ConfigError(
            f"networks.features is {networks.features}, but the encoder makes features of {width} channels; set "
            f"networks.features to {width}"
        )
    if not networks.channels:
        raise ConfigError("networks.channels is 0, so that there are no latents to train; give their channels")
    if "encoder" in config.order:
        if encoder.kind != "vit":
            raise ConfigError(
                f"the stage encoder trains an encoder of the kind 'vit', not {encoder.kind!r}; leave it out of order"
            )
        if config.order[0] != "encoder" or encoder.path:
            raise ConfigError(
                "the stage encoder comes first, and encoder.path names no folder then; or leave the stage out of order"
            )
    for name in config.order:
        _require_stage(config, name, config.stages[name])
        require_groups(config, name, config.stages[name])


def _require_stage(config: CodecExperiment, name: str, cfg: CodecStageConfig) -> None:
    place, losses, critic = f"stages.{name}", cfg.losses, cfg.critic
    for which, optimizer in (("optimizer", cfg.optimizer), ("critic.optimizer", critic.optimizer)):
        if optimizer.offload:
            raise ConfigError(f"{place}.{which}.offload is only for STARFlow2's stages; set it to False")
    if not CODEC_STAGES[name].pixels:
        if critic.kind != "none":
            raise ConfigError(f"the stage {name} makes no pictures; set {place}.critic.kind to none")
        return
    if not losses.l1 + losses.l2 + losses.perceptual + losses.lpips:
        raise ConfigError(f"all weights of {place}.losses are 0; give one of them, such as l1, a value")
    if losses.lpips and not (config.lpips_vgg and config.lpips_linear):
        raise ConfigError(
            f"{place}.losses.lpips needs VGG's weights; name their files in lpips_vgg and lpips_linear, or set it to 0"
        )
    used = (losses.perceptual > 0, "losses.perceptual_layers", losses.perceptual_layers)
    for needed, key, layers in (used, (critic.kind == "features", "critic.layers", critic.layers)):
        if needed:
            _require_layers(config, f"{place}.{key}", layers)


def _require_layers(config: CodecExperiment, key: str, layers: tuple[int, ...]) -> None:
    encoder: Any = config.encoder
    if ENCODERS[encoder.kind].layers is None:
        raise ConfigError(
            f"{key}: layers of an encoder of the kind {encoder.kind!r} cannot be compared; use another loss"
        )
    if not layers or list(layers) != sorted(set(layers)) or layers[-1] > encoder.layers:
        raise ConfigError(f"{key} must name layers of the encoder in ascending order, from 1 to {encoder.layers}")
