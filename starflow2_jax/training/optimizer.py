"""The optimizers that a config can name, all with warm-up, cosine decay and gradient clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers, muon

from starflow2_jax.config.schema import OptimizerConfig
from starflow2_jax.errors import UserError
from starflow2_jax.parallel import sharding

# Kernels of a Transformer stack, whose axis 0 is the layer: axes of the map's input, and axes of its output.
MUON_AXES = {
    "query": MuonDimensionNumbers((1,), (2, 3)),
    "key": MuonDimensionNumbers((1,), (2, 3)),
    "value": MuonDimensionNumbers((1,), (2, 3)),
    "out": MuonDimensionNumbers((1, 2), (3,)),
    "up": MuonDimensionNumbers((1,), (2,)),
    "gate": MuonDimensionNumbers((1,), (2,)),
    "down": MuonDimensionNumbers((1,), (2,)),
}


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer `cfg.name` for `steps` steps. Weight decay applies to matrices and embeddings, not to norms and
    biases.

    adamw: decoupled weight decay (arXiv 1711.05101).
    muon: orthogonalised momentum for the matrices of the Transformer stacks, scaled like AdamW's updates so that both
    use
        the same learning rate (arXiv 2502.16982); AdamW for the rest.
    adafactor: factored second moments and no first ones (arXiv 1804.04235). Updates are not scaled by the parameters'
        size, so AdamW's learning rate fits.

    `cfg.factors` are for groups of parameters, of which `init` raises UserError for one that is not trained.
    If `cfg.moments` is "bfloat16", moments are stored in it and updated in fp32. `cfg.offload` is for `step.offloaded`.
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
    elif cfg.name == "adafactor":
        update = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(cfg.weight_decay, mask=_decays),
            optax.scale_by_learning_rate(schedule),
        )
    if cfg.moments != "float32":
        update = kept_in(update, jnp.dtype(cfg.moments))
    scaled = (factored(dict(cfg.factors)),) if cfg.factors else ()
    return optax.chain(optax.clip_by_global_norm(cfg.clip), update, *scaled)


def factored(factors: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies updates, weight decay included, of the groups of parameters that have a factor. `init` raises
    UserError for a factor of a group that the parameters lack."""

    def init(params: Any) -> optax.EmptyState:
        if missing := sorted(factors.keys() - params.keys()):
            raise UserError(
                f"optimizer.factors names {', '.join(missing)}, which this stage does not train; it trains "
                f"{', '.join(params)}"
            )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scaled = {group: optax.tree.scale(factors.get(group, 1.0), each) for group, each in updates.items()}
        return scaled, state

    return optax.GradientTransformation(init, update)


def kept_in(inner: optax.GradientTransformation, dtype: DTypeLike) -> optax.GradientTransformation:
    """`inner` with its fp32 moments stored in `dtype` between updates."""

    def cast(tree, source, target):
        def leaf(path, x):
            constant = "ns_coeffs" in sharding.path_name(path)  # of Muon's iteration: no moment
            return x.astype(target) if x.dtype == source and not constant else x

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, dtype, jnp.float32), params)
        return updates, cast(state, jnp.float32, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), jnp.float32, dtype), update)


def _decays(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def _axes(path, _) -> MuonDimensionNumbers | None:
    """The axes of a stack's kernel; None for other parameters."""
    *_, stack, _, name, kind = ("", "", "", *sharding.path_name(path).split("/"))
    return MUON_AXES[name] if stack == "layers" and kind == "kernel" else None


def _muon_axes(params):
    return jax.tree_util.tree_map_with_path(_axes, params)


def _taker(params):
    return jax.tree_util.tree_map_with_path(lambda path, x: "muon" if _axes(path, x) else "adamw", params)
