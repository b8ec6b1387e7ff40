"""Checks across the keys of a config, as far as they need neither devices nor files."""

import re
from collections.abc import Iterable
from typing import Any

from starflow2_jax.codecs.table import CODECS
from starflow2_jax.config.schema import ExperimentConfig, RunConfig, StageConfig
from starflow2_jax.data.groups import rows_of_a_group
from starflow2_jax.data.sources import held_out
from starflow2_jax.errors import ConfigError
from starflow2_jax.fields import LARGEST_INT
from starflow2_jax.stages import STAGES, Stage


def require_consistent(config: ExperimentConfig) -> None:
    """Raises ConfigError for the first values that contradict each other; the message names the keys to change."""
    require_order(config)
    require_sources(config)
    codec = config.codec
    require_evals(config, "" if CODECS[codec.kind].is_pixels or getattr(codec, "decoder", "") else codec.kind)
    _require_codec(config)
    for name, cfg in config.stages.items():
        _require_stage(config, STAGES[name], cfg)
    for name in config.order:
        _require_rows(config, name, config.stages[name])


def require_order(config: Any) -> None:
    """The order names stages that there are, and none twice."""
    if not config.order or len(set(config.order)) < len(config.order):
        known = type(config).__dataclass_fields__["order"].metadata["choices"]
        raise ConfigError(f"order must name at least one stage, and each stage once, of {', '.join(known)}")
    if missing := [name for name in config.order if name not in config.stages]:
        raise ConfigError(
            f"order names the stage {missing[0]}, but the config has no stages.{missing[0]}; set "
            f"stages.{missing[0]}.steps, or remove the stage from order"
        )


def require_sources(config: Any) -> None:
    """There are documents for every stage, and each stage's mix names sources that there are."""
    data = config.data
    if data.source is not None:
        return
    if not data.sources:
        raise ConfigError(
            "the config names no training data; set data.source=FILE, or data.sources.NAME.path=FILE for several"
        )
    _require_names("a source's", "data.sources", data.sources)
    if set(data.sources) <= (held := held_out(config)):
        raise ConfigError(
            f"every source is held out by an evaluation's mix ({', '.join(sorted(held))}); add a training source to "
            f"data.sources"
        )
    for stage, cfg in config.stages.items():
        if unknown := [name for name in cfg.mix if name not in data.sources]:
            raise ConfigError(
                f"stages.{stage}.mix names the source {unknown[0]!r}; data.sources has {', '.join(data.sources)}"
            )
        if cfg.mix and not any(cfg.mix.values()):
            raise ConfigError(f"every source of stages.{stage}.mix has a weight of 0; give one of them more")


def require_evals(config: RunConfig, unable: str = "") -> None:
    """Require that the mix of each evaluation names sources of the config, and that no sheet is drawn with a codec that
    makes no pictures.

    unable: the kind of the codec if it makes no pictures; "": it makes pictures.
    """
    _require_names("an evaluation's", "evals", config.evals)
    for name, cfg in config.evals.items():
        mix = getattr(cfg, "mix", None)
        if mix is not None and not any(mix.values()):
            raise ConfigError(f"evals.{name}.mix gives no source a weight; name one of data.sources in it")
        if config.data.source is None and (unknown := [each for each in mix or () if each not in config.data.sources]):
            raise ConfigError(
                f"evals.{name}.mix names the source {unknown[0]!r}; data.sources has {', '.join(config.data.sources)}"
            )
        if cfg.kind == "sheet" and unable:
            raise ConfigError(
                f"evals.{name} draws pictures, but the codec {unable!r} makes none; remove evals.{name} from the config"
            )


def _require_names(whose: str, table: str, names: Iterable[str]) -> None:
    """Require names that can be part of a file name and of a metric's name."""
    if wrong := [name for name in names if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise ConfigError(f"{whose} name has letters, digits, '_', '-' and '.', not {wrong[0]!r}; rename it in {table}")


def _require_codec(config: ExperimentConfig) -> None:
    """Require the same channels of the codec and the model, and the same grid if the codec's options set one."""
    codec: Any = config.codec  # of the codec's own dataclass, which has `channels`
    model = config.model
    if codec.channels != model.channels:
        raise ConfigError(
            f"the codec {codec.kind!r} makes tokens of {codec.channels} channels, but model.channels is "
            f"{model.channels}; set model.channels={codec.channels}, or change the codec's options"
        )
    grid = getattr(codec, "grid", model.grid)  # the patch codec has no such option: images determine its grid
    if grid != model.grid:
        raise ConfigError(f"codec.grid is {grid}, but model.grid is {model.grid}; set both to the same value")


def _require_rows(config: ExperimentConfig, name: str, cfg: StageConfig) -> None:
    """A batch's positions fit into 32 bits, and its rows divide as `require_groups` says."""
    if cfg.rows * cfg.length > LARGEST_INT:
        raise ConfigError(
            f"stages.{name}: rows={cfg.rows} of length={cfg.length} are {cfg.rows * cfg.length} positions, but a batch "
            f"may have at most {LARGEST_INT}; lower rows or length"
        )
    require_groups(config, name, cfg)


def require_groups(config: RunConfig, name: str, cfg: Any) -> None:
    """A stage's rows divide into micro-batches, over the mesh, and into groups."""
    mesh = config.mesh
    spread = cfg.accumulate * abs(mesh.data * mesh.fsdp)  # an axis of -1 has an unknown size and counts as 1
    if cfg.rows % spread:
        raise ConfigError(
            f"stages.{name}.rows={cfg.rows} must be a multiple of {spread} (mesh.data, mesh.fsdp and accumulate)"
        )
    try:
        rows_of_a_group(cfg.rows, config.data.groups)
    except ConfigError as error:
        raise ConfigError(f"stage {name}: {error}") from None


def _require_stage(config: ExperimentConfig, stage: Stage, cfg: StageConfig) -> None:
    """Require lengths of a stage that fit each other and the vision-language model."""
    place, vision = f"stages.{stage.name}", config.model.vlm.vision
    if cfg.vlm_length > cfg.length:
        raise ConfigError(f"{place}.vlm_length={cfg.vlm_length} must be at most {place}.length={cfg.length}")
    if cfg.vlm_length and stage.vlm_on_images:
        raise ConfigError(f"{place}.vlm_length must be 0, because this stage's loss needs the VLM at flow images")
    if not cfg.patches:
        return
    if vision is None:
        raise ConfigError(
            f"{place}.patches={cfg.patches} needs a vision tower, but model.vlm.vision is None; set {place}.patches=0, "
            f"or give the model a vision tower"
        )
    if cfg.patches % vision.merge**2:
        raise ConfigError(
            f"{place}.patches={cfg.patches} must be a multiple of {vision.merge**2}, the square of "
            "model.vlm.vision.merge, because the vision tower joins that many patches into one token"
        )
