"""What the weights of a vision-language model need: one row a kind, beside its row in models/vlm.py; and vlm.json."""

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
    """How the reference library's folder of a VLM becomes ours, and back.

    read_config(folder, dtype): the folder's options as our config that computes in `dtype`. Raises WeightError.
    rules(cfg, names): the weight table of `abstract_params(cfg)`. `names` are the tensors that the folder holds, if
        generations of the reference name them differently; empty: the names to export.
    copies(cfg): source tensors that a folder may hold twice, each with the parameter that it must equal bit for bit.
    published: the published sizes by name.
    """

    read_config: Callable[[Path, str], Any]
    rules: Callable[[Any, Collection[str]], tuple[Rule, ...]]
    copies: Callable[[Any], Mapping[str, str]]
    published: Mapping[str, Any]


VLM_WEIGHTS: dict[str, VlmWeights] = {
    "qwen2_5_vl": VlmWeights(qwen.read_folder, qwen.table, qwen.copies, qwen.QWEN2_5_VL),
}


def write_config(path: Path, cfg: Any) -> None:
    """Our config as JSON, with every field; "kind" says which VLM it is."""
    path.write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n", encoding="utf-8")


def load_config(path: Path) -> VlmConfig:
    """The config that `write_config` wrote. Raises WeightError."""
    if not path.exists():
        raise WeightError(f"{path.parent} is no converted VLM: it has no {path.name}")
    try:
        values = read_json_file(path)
        if not isinstance(values, dict) or "kind" not in values:
            raise WeightError(f"{path} is damaged (it names no kind of VLM); convert again")
        return build(config_class(values.get("kind")), values)
    except WeightError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise WeightError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); convert again") from None
