"""Checks that a config's values fit together, as far as this is known without devices and files."""

import re
from collections.abc import Iterable

from starflow2_jax.codecs.table import CODECS
from starflow2_jax.config.schema import ExperimentConfig, StageConfig
from starflow2_jax.data.groups import rows_of_a_group
from starflow2_jax.data.sources import held_out
from starflow2_jax.errors import ConfigError
from starflow2_jax.stages import STAGES, Stage


def require_consistent(config: ExperimentConfig) -> None:
    """Raises ConfigError for the first two values that do not fit together, with the keys to change."""
    if not config.order or len(set(config.order)) < len(config.order):
        raise ConfigError(f"order must name at least one stage, and each stage once, of {', '.join(STAGES)}")
    if missing := [name for name in config.order if name not in config.stages]:
        raise ConfigError(
            f"order names the stage {missing[0]}, and the config has no stages.{missing[0]}; give its steps, or take it out"
        )
    _require_sources(config)
    _require_evals(config)
    _require_codec(config)
    for name, cfg in config.stages.items():
        _require_stage(config, STAGES[name], cfg)
    for name in config.order:
        _require_rows(config, name, config.stages[name])


def _require_sources(config: ExperimentConfig) -> None:
    """There are documents for every stage, and each stage's mix names sources that there are."""
    data = config.data
    if data.source is not None:
        return
    if not data.sources:
        raise ConfigError(
            "the config names no training data; set data.source=FILE, or data.sources.NAME.path=FILE for several"
        )
    _require_names("source", "data.sources", data.sources)
    if set(data.sources) <= (held := held_out(config)):
        raise ConfigError(
            f"every source is held out by an evaluation's mix ({', '.join(sorted(held))}); add one to train on to data.sources"
        )
    for stage, cfg in config.stages.items():
        if unknown := [name for name in cfg.mix if name not in data.sources]:
            raise ConfigError(
                f"stages.{stage}.mix names the source {unknown[0]!r}; data.sources has {', '.join(data.sources)}"
            )
        if cfg.mix and not any(cfg.mix.values()):
            raise ConfigError(f"every source of stages.{stage}.mix has a weight of 0; give one of them more")


def _require_evals(config: ExperimentConfig) -> None:
    """The mix of each evaluation names sources that there are, and pictures are drawn only if the codec makes some."""
    _require_names("evaluation", "evals", config.evals)
    for name, cfg in config.evals.items():
        mix = getattr(cfg, "mix", None)
        if mix is not None and not any(mix.values()):
            raise ConfigError(f"evals.{name}.mix gives no source a weight; name one of data.sources in it")
        if config.data.source is None and (unknown := [each for each in mix or () if each not in config.data.sources]):
            raise ConfigError(
                f"evals.{name}.mix names the source {unknown[0]!r}; data.sources has {', '.join(config.data.sources)}"
            )
        if cfg.kind == "sheet" and not CODECS[config.codec.kind].is_pixels:
            raise ConfigError(
                f"evals.{name} draws pictures, and the codec {config.codec.kind!r} makes none; take it out of the config"
            )


def _require_names(what: str, table: str, names: Iterable[str]) -> None:
    """Each name fits into the name of a file and of a metric."""
    if wrong := [name for name in names if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise ConfigError(
            f"the name of {'an' if what[0] == 'e' else 'a'} {what} has letters, digits, '_', '-' and '.', not {wrong[0]!r}; "
            f"rename it in {table}"
        )


def _require_codec(config: ExperimentConfig) -> None:
    """The codec and the model agree on channels and grid, as far as the codec's options give them."""
    codec, model = config.codec, config.model
    if codec.channels != model.channels:
        raise ConfigError(
            f"the codec {codec.kind!r} makes tokens of {codec.channels} channels, and model.channels is {model.channels}; "
            f"set model.channels={codec.channels}, or change the codec's options"
        )
    grid = getattr(codec, "grid", model.grid)  # the patch codec takes its grid from the images
    if grid != model.grid:
        raise ConfigError(f"codec.grid is {grid}, and model.grid is {model.grid}; set both to the same")


def _require_rows(config: ExperimentConfig, name: str, cfg: StageConfig) -> None:
    """A batch's rows can be cut into micro-batches, over the mesh (where its sizes are given), and into groups."""
    mesh = config.mesh
    spread = cfg.accumulate * abs(mesh.data * mesh.fsdp)  # -1: all remaining devices, at least one
    if cfg.rows % spread:
        raise ConfigError(
            f"stages.{name}.rows={cfg.rows} must be a multiple of {spread} (mesh.data, mesh.fsdp and accumulate)"
        )
    try:
        rows_of_a_group(cfg.rows, config.data.groups)
    except ConfigError as error:
        raise ConfigError(f"stage {name}: {error}") from None


def _require_stage(config: ExperimentConfig, stage: Stage, cfg: StageConfig) -> None:
    place, vision = f"stages.{stage.name}", config.model.vlm.vision
    if cfg.vlm_length > cfg.length:
        raise ConfigError(f"{place}.vlm_length={cfg.vlm_length} must not be above length={cfg.length}")
    if cfg.vlm_length and stage.vlm_on_images:
        raise ConfigError(f"{place}.vlm_length must be 0: the stage's loss needs the VLM at flow images")
    if cfg.patches and not vision:
        raise ConfigError(f"{place}.patches={cfg.patches} needs a vision tower, and model.vlm.vision is None")
    if cfg.patches and cfg.patches % vision.merge**2:
        raise ConfigError(
            f"{place}.patches={cfg.patches} must be a multiple of {vision.merge**2}, the patches that model.vlm.vision.merge "
            "joins into one token"
        )
