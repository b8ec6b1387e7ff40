"""The table of conversions: for each kind of vision-language model, how its weights are converted. Also vlm.json."""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starflow2_jax.fields import build
from starflow2_jax.models.vlm import VlmConfig, config_class
from starflow2_jax.text_files import read_json_file
from starflow2_jax.weights import qwen
from starflow2_jax.weights.table import Rule, WeightError


@dataclass(frozen=True)
class VlmWeights:
    """How the reference library's folder of a VLM is converted into ours, and back.

    read_config(folder, dtype): our config from the folder's; it computes in `dtype`. Raises WeightError.
    rules(cfg, names): the weight table of `abstract_params(cfg)`. `names` are those of the folder's tensors, because
        versions of the reference name them differently; if empty, the names for export.
    copies(cfg): name of a source tensor that a folder may hold as a copy -> the parameter that it must equal bit for
    bit. published: name of a published size -> its config.
    """

    read_config: Callable[[Path, str], Any]
    rules: Callable[[Any, Collection[str]], tuple[Rule, ...]]
    copies: Callable[[Any], Mapping[str, str]]
    published: Mapping[str, Any]


VLM_WEIGHTS: dict[str, VlmWeights] = {
    "qwen2_5_vl": VlmWeights(qwen.read_folder, qwen.table, qwen.copies, qwen.QWEN2_5_VL),
}


def write_config(path: Path, cfg: Any) -> None:
    """Write vlm.json: every field of our config, of which "kind" names the VLM."""
    path.write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n", encoding="utf-8")


def load_config(path: Path) -> VlmConfig:
    """The config that `write_config` wrote. Raises WeightError."""
    if not path.exists():
        raise WeightError(
            f"{path.parent} is no converted VLM, because it has no {path.name}; convert the VLM with `starflow2 "
            f"convert`"
        )
    try:
        values = read_json_file(path)
        if not isinstance(values, dict) or "kind" not in values:
            raise WeightError(f"{path} is damaged (it names no kind of VLM); convert the VLM again")
        return build(config_class(values.get("kind")), values)
    except WeightError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise WeightError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); convert again") from None
