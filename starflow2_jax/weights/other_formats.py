"""Recognises folders that hold no plain safetensors model, and says what the user can do."""

from collections.abc import Iterable
from pathlib import Path

from starflow2_jax.errors import UserError
from starflow2_jax.text_files import read_json_file
from starflow2_jax.weights.table import WeightError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LONGEST_POINTER = 1024  # bytes
NO_WEIGHTS = "holds neither model.safetensors nor model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PLAIN_TYPES = {"F64", "F32", "F16", "BF16", "I64", "BOOL"}  # types in safetensors that no quantiser stores weights in
QUANTISER_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def require_folder(folder: Path) -> None:
    """Raises WeightError unless `folder` is a folder whose files are not Git LFS pointers."""
    if folder.is_file():
        raise WeightError(
            f"{folder} {_GGUF if folder.suffix == '.gguf' else 'is a file; give the folder that holds it'}"
        )
    if not folder.is_dir():
        raise WeightError(f"there is no folder {folder}")
    if pointers := [file.name for file in sorted(folder.iterdir()) if _is_pointer(file)]:
        raise WeightError(
            f"{_some(pointers)} in {folder} hold Git LFS pointers instead of their contents; run `git lfs pull` there"
        )


def require_unquantised(folder: Path, types: Iterable[str], fits: bool = True) -> None:
    """Raises WeightError if a folder's weights are quantised.

    types: of its tensors, as safetensors names them. fits: whether names and shapes are right; if not, a quantiser's
    settings in the folder are enough evidence.
    """
    strange, method = sorted(set(types) - PLAIN_TYPES), _quantiser(folder)
    if strange or (method and not fits):
        raise WeightError(
            f"{folder} holds weights that are quantised ({method or 'types ' + ', '.join(strange)}), which cannot be "
            f"converted; give the folder of the unquantised model"
        )


def what_it_is(folder: Path) -> str:
    """What a folder without a safetensors model holds, and what to do: a sentence whose subject, the folder, is left
    out.
    """
    files = sorted(path.name for path in folder.iterdir())
    snapshots = sorted(path.parent for path in folder.glob("**/snapshots/*/config.json"))
    if "vlm.json" in files:
        return "is a checkpoint that `starflow2 convert` made; use it as it is, or export it with --to-hf"
    if any(name.startswith("adapter_") for name in files):
        base = _values(folder / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"is a LoRA adapter of {base or 'another model'}, not a whole model; merge it into that model first "
            "(merge_and_unload() of PEFT, then save_pretrained()) and give the folder of the merged model"
        )
    if method := _quantiser(folder):
        return f"holds weights that are quantised ({method}); give the folder of the unquantised model"
    if any(name.endswith(".gguf") for name in files):
        return _GGUF
    if snapshots:
        which = (
            f"the snapshot {snapshots[0]}"
            if len(snapshots) == 1
            else f"one of its {len(snapshots)} snapshots, such as {snapshots[0]}"
        )
        return f"is a cache of the Hugging Face hub; give {which}"
    if pickles := [name for name in files if name.endswith(PICKLES)]:
        return f"holds weights as pickles of PyTorch ({_some(pickles)}), which are never unpickled here; {_RESAVE}"
    if any(name.endswith(".safetensors") for name in files):
        return f"{NO_WEIGHTS}; fetch the index of its safetensors files too"
    holds = f"it holds {_some(files)}" if files else "it is empty"
    return f"{NO_WEIGHTS} ({holds}); give the folder that holds the weights"


def advice(file: Path) -> str:
    """What to do about a .safetensors file that cannot be read as one."""
    try:
        with file.open("rb") as opened:
            begin = opened.read(4)
    except OSError:
        begin = b""
    if begin == b"GGUF":
        return "it is a GGUF file, whose weights are quantised; give the folder of the unquantised safetensors model"
    if begin.startswith((b"PK", b"\x80")):
        return f"it is a pickle of PyTorch, which is never unpickled here; {_RESAVE}"
    if begin.startswith(b"<"):
        return "it is a web page; fetch the file itself"
    return "fetch it again"


_RESAVE = "load it with transformers, write it with save_pretrained(..., safe_serialization=True) and give that folder"
_GGUF = "holds weights in the GGUF format, which are quantised; give the folder of the unquantised safetensors model"


def _is_pointer(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > LONGEST_POINTER:
        return False
    return file.read_bytes().startswith(LFS_POINTER)


def _quantiser(folder: Path) -> str | None:
    """The evidence in a folder's files that its weights are quantised, as part of a message; None if there is none."""
    config = _values(folder / "config.json")
    for values in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(values, dict) and values.get(key):
                method = values[key].get("quant_method") if isinstance(values[key], dict) else None
                return f"{key} of config.json names {method}" if isinstance(method, str) else f"config.json has a {key}"
    return next((f"there is a {name}" for name in QUANTISER_FILES if (folder / name).is_file()), None)


def _values(file: Path) -> dict:
    """The JSON object in a file; empty if the file has none or cannot be read."""
    try:
        values = read_json_file(file)
    except UserError:
        return {}
    return values if isinstance(values, dict) else {}


def _some(names: list[str]) -> str:
    """The first three names of a list, and the number of the others."""
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more"
