"""The files of a codec: codec.json, and codec.safetensors if it has weights. Reading them needs no table of codecs."""

from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from starflow2_jax.errors import UserError
from starflow2_jax.parallel.content_hash import content_hash
from starflow2_jax.text_files import read_json_file, with_tuples

DESCRIPTION, WEIGHTS = "codec.json", "codec.safetensors"


def read_codec(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The kind of the codec in a folder, its description (tuples in place of lists) and its weights, as nested dicts.

    Raises UserError for a folder without a codec, and for files that are damaged or do not belong together.
    """
    if not (folder / DESCRIPTION).is_file():
        raise UserError(
            f"{folder} holds no codec, because it has no {DESCRIPTION}; name the folder of a codec or of a run"
        )
    values = read_json_file(folder / DESCRIPTION)
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise UserError(f"{folder / DESCRIPTION} is not a codec of this program; restore it from a copy")
    description = {key: with_tuples(value) for key, value in values.items()}
    return description.pop("kind"), description, read_weights(folder, description.pop("content_hash", None))


def read_weights(folder: Path, wanted: str | None) -> dict[str, Any]:
    """The weights whose content hash is `wanted`; None: the codec has none. Raises UserError."""
    if wanted is None:
        return {}
    try:
        flat = safetensors.numpy.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}); restore it from a copy") from None
    if content_hash(flat) != wanted:
        raise UserError(
            f"{folder / WEIGHTS} does not hold the weights that {DESCRIPTION} describes (content hash differs); "
            f"restore both from a copy"
        )
    return unflatten_dict(flat, sep="/")
