"""The optimizers a config can name, all with warm-up, cosine decay and clipping."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from starflow2_jax import sharding
from starflow2_jax.config import ConfigError

# Of a stack's kernels, whose axis 0 is the layer: which axes are summed over, and which are new.
MUON_AXES = {
    "query": MuonDimensionNumbers((1,), (2, 3)),
    "key": MuonDimensionNumbers((1,), (2, 3)),
    "value": MuonDimensionNumbers((1,), (2, 3)),
    "out": MuonDimensionNumbers((1, 2), (3,)),
    "up": MuonDimensionNumbers((1,), (2,)),
    "gate": MuonDimensionNumbers((1,), (2,)),
    "down": MuonDimensionNumbers((1,), (2,)),
}


def make_optimizer(cfg, steps: int) -> optax.GradientTransformation:
    """The optimizer `cfg.name` for `steps` steps. Matrices and embeddings decay, norms and biases do not.

    adamw: decoupled weight decay (arXiv 1711.05101). muon: orthogonalised momentum for the matrices of the Transformer
    stacks, scaled to AdamW's usual step so that both take the same learning rate (arXiv 2502.16982); AdamW for the rest.
    Raises ConfigError for another name.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, min(cfg.warmup, steps // 2), max(steps, 1), cfg.learning_rate * cfg.final_fraction
    )
    update = adamw = optax.adamw(schedule, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=_decays)
    if cfg.name == "muon":
        orthogonal = muon(
            schedule, weight_decay=cfg.weight_decay, consistent_rms=0.2, muon_weight_dimension_numbers=_muon_axes
        )
        update = optax.partition({"muon": orthogonal, "adamw": adamw}, _taker)
    elif cfg.name != "adamw":
        raise ConfigError(f"optimizer.name is 'adamw' or 'muon', not {cfg.name!r}")
    return optax.chain(optax.clip_by_global_norm(cfg.clip), update)


def _decays(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def _axes(path, _) -> MuonDimensionNumbers | None:
    """Those of a stack's kernel, None for all else."""
    *_, stack, _, name, kind = ("", "", "", *sharding.path_name(path).split("/"))
    return MUON_AXES[name] if stack == "layers" and kind == "kernel" else None


def _muon_axes(params):
    return jax.tree_util.tree_map_with_path(_axes, params)


def _taker(params):
    return jax.tree_util.tree_map_with_path(lambda path, x: "muon" if _axes(path, x) else "adamw", params)
