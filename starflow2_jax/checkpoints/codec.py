"""A checkpoint's codec: codec.json, and codec.safetensors if it has weights.

These files are not written by orbax, because process 0 alone writes them when it makes the directory.
"""

import json
from pathlib import Path
from typing import Any

import jax
import safetensors.flax
from flax.traverse_util import flatten_dict

from starflow2_jax.checkpoints.atomic_folder import write_whole
from starflow2_jax.codecs.folder import DESCRIPTION, WEIGHTS, read_weights
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.codecs.table import CODECS
from starflow2_jax.errors import UserError, shown
from starflow2_jax.parallel.content_hash import content_hash


def write_codec(folder: Path, codec: Codec) -> None:
    """Write the codec's description with the content hash of its weights, and its weights. Raises OSError."""
    values = {"kind": codec.kind, **codec.description()}
    if codec.weights:
        flat = {name: jax.numpy.asarray(x) for name, x in flatten_dict(dict(codec.weights), sep="/").items()}
        safetensors.flax.save_file(flat, folder / WEIGHTS)
        values["content_hash"] = content_hash(flat)
    write_whole(folder / DESCRIPTION, json.dumps(values, indent=1))


def restore_codec(folder: Path, description: dict[str, Any]) -> Codec:
    """The codec of a checkpoint directory. `description`: the values of codec.json, with tuples in place of lists.

    Raises UserError for an unknown kind of codec, and for files that are damaged or do not belong together.
    """
    kind, wanted = description.pop("kind", None), description.pop("content_hash", None)
    path = folder / DESCRIPTION
    if not isinstance(kind, str) or kind not in CODECS:
        raise UserError(
            f"{path} describes a codec of the kind {shown(kind)}, but the known kinds are {', '.join(CODECS)}; if a "
            f"Python file of yours adds this kind, name that file with --import"
        )
    weights = read_weights(folder, wanted)
    try:
        return CODECS[kind].restored(description, weights)
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy") from None
