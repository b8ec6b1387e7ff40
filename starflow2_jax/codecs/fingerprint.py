"""A hash of everything that decides a codec's latents, and the codec as a folder of files."""

import hashlib
import json
from typing import Any

import jax
import numpy as np
import safetensors.flax
from flax.traverse_util import flatten_dict, unflatten_dict

from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.codecs.table import CODECS
from starflow2_jax.errors import UserError
from starflow2_jax.fields import COMPUTED
from starflow2_jax.text_files import with_tuples


def fingerprint(codec: Codec) -> str:
    """SHA-256 of the codec's kind, description and weights. How it computes, such as its `dtype`, does not count."""
    digest = hashlib.sha256(json.dumps({"kind": codec.kind, **_essence(codec.description())}, sort_keys=True).encode())
    for name, array in sorted(flatten_dict(dict(codec.weights), sep="/").items()):
        array = np.asarray(array)
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def packed(codec: Codec) -> tuple[dict[str, Any], bytes]:
    """A codec's JSON values, its kind among them, and its weights as a safetensors file (empty: it has none)."""
    flat = {name: jax.numpy.asarray(x) for name, x in flatten_dict(dict(codec.weights), sep="/").items()}
    return {"kind": codec.kind, **codec.description()}, safetensors.flax.save(flat) if flat else b""


def unpacked(values: dict[str, Any], weights: bytes) -> Codec:
    """The inverse of `packed`. Raises UserError for a kind of codec that is not in the table."""
    kind = values.get("kind")
    if kind not in CODECS:
        raise UserError(
            f"the codec has the unknown kind {kind!r} (known: {', '.join(CODECS)}); if a Python file of yours adds it, "
            f"name that file with --import"
        )
    flat = safetensors.flax.load(weights) if weights else {}
    description = {key: with_tuples(value) for key, value in values.items() if key != "kind"}
    return CODECS[kind].restored(description, unflatten_dict(jax.tree.map(np.asarray, flat), sep="/"))


def _essence(value: Any) -> Any:
    """A description without the fields of COMPUTED, at any depth."""
    if not isinstance(value, dict):
        return value
    return {key: _essence(part) for key, part in value.items() if key not in COMPUTED}
