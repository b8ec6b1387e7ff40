"""LPIPS's weights: VGG-16 in the names of torchvision's file, and the linear layers in the names of the `lpips`
package.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from starflow2_jax.models.lpips import GROUPS, Lpips
from starflow2_jax.weights.table import Ignore, Rule, Table, import_tensors, read_tensors


def _table() -> Table:
    rules: list[Rule | Ignore] = [Ignore(r"classifier\..*")]
    place = 0  # in torchvision's list of convolutions, ReLUs and poolings
    for i, (count, _) in enumerate(GROUPS):
        for k in range(count):
            rules.append(Rule(f"features.{place}.weight", f"conv_{i}_{k}/kernel", "o i p q -> p q i o"))
            rules.append(Rule(f"features.{place}.bias", f"conv_{i}_{k}/bias"))
            place += 2
        place += 1
        rules.append(Rule(f"lin{i}.model.1.weight", f"linear_{i}", "1 c 1 1 -> c"))
    return rules


TABLE = _table()


def abstract_params() -> dict:
    """Shapes and types of the parameters of Lpips."""
    picture = jnp.zeros((1, 16, 16, 3))
    return jax.eval_shape(Lpips().init, jax.random.key(0), picture, picture)["params"]


def load_lpips(vgg: str | Path, linear: str | Path) -> dict:
    """Parameters of Lpips as NumPy arrays, from torchvision's vgg16 file and the `lpips` package's vgg file.

    Both are .pth (which are never unpickled) or .safetensors files. Raises WeightError with every fault.
    """
    return import_tensors(TABLE, {**read_tensors(vgg), **read_tensors(linear)}, abstract_params())
