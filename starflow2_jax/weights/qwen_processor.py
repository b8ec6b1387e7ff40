"""Reads the image sizes and normalisation of Qwen2.5-VL's processor, as `transformers` 4 and 5 save them."""

import dataclasses
import sys
from pathlib import Path

from starflow2_jax.errors import UserError
from starflow2_jax.models.qwen_vision import VisionConfig
from starflow2_jax.text_files import read_json_file, reason, shorten
from starflow2_jax.weights.table import WeightError

# Files with the settings; the first one that has some is used. `transformers` 5 writes them to processor_config.json,
# under the key image_processor; `transformers` 4 writes preprocessor_config.json.
FILES = ("processor_config.json", "preprocessor_config.json")
NESTED = "image_processor"
BICUBIC = 3


def read_processor(folder: Path, vision: VisionConfig) -> VisionConfig:
    """`vision` with the settings of the folder's image processor.

    Warns on stderr if the folder lacks settings, for which the values in `vision` are used. Raises WeightError for
    files that cannot be read, contradict `vision`, or have settings that we do not support.
    """
    path, values = _find(folder)
    try:
        _refuse_unsupported(path, values, vision)
        found = _settings(values, vision.channels)
        cfg = dataclasses.replace(vision, **found)
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, WeightError):
            raise
        raise WeightError(f"{path} cannot be read as a processor's options: {reason(error)}") from None
    if missing := [name for name in ("min_pixels", "max_pixels", "mean", "std") if name not in found]:
        used = ", ".join(f"{name} {getattr(cfg, name)}" for name in missing)
        where = f"{path} lacks them" if values else f"there is neither {' nor '.join(FILES)} in {folder}"
        print(
            f"WARNING: defaults are used for settings of the image processor, because {where}: {used}", file=sys.stderr
        )
    return cfg


def _find(folder: Path) -> tuple[Path, dict]:
    """The file with the settings of the image processor, and the settings; these are empty if no file has any."""
    for path in (folder / name for name in FILES):
        if not path.is_file():
            continue
        try:
            values = read_json_file(path)
        except UserError as error:
            raise WeightError(f"{error}; fetch it again") from None
        if not isinstance(values, dict) or not isinstance(values.get(NESTED, {}), dict):
            raise WeightError(f"{path} cannot be read as a processor's options: they must be a JSON object")
        if NESTED in values or path.name != FILES[0]:
            return path, values.get(NESTED, values)
    return folder / FILES[0], {}


def _refuse_unsupported(path: Path, values: dict, vision: VisionConfig) -> None:
    """Raises WeightError for settings that contradict config.json, and for those that we do not support."""
    sizes = {"patch_size": vision.patch, "merge_size": vision.merge, "temporal_patch_size": vision.temporal_patch}
    for name, have in sizes.items():
        if (given := values.get(name)) not in (None, have):
            raise WeightError(
                f"{path} has {name} {shorten(repr(given))}, but config.json has {have}; fetch both files again from "
                f"the same model"
            )
    faults = [
        f"{name} = {values[name]}" for name in ("do_resize", "do_rescale", "do_normalize") if values.get(name) is False
    ]
    if values.get("resample") not in (None, BICUBIC):
        faults.append(f"resample = {shorten(values['resample'])} (only {BICUBIC}, bicubic)")
    if (factor := values.get("rescale_factor")) is not None and abs(factor * 255 - 1) > 1e-3:
        faults.append(f"rescale_factor = {factor} (only 1/255)")
    if faults:
        raise WeightError(f"{path} has settings that are not supported: {', '.join(faults)}")


def _settings(values: dict, channels: int) -> dict:
    """The fields of VisionConfig that the settings have, with their values. Raises TypeError or ValueError."""
    size = values.get("size") or {}
    if not isinstance(size, dict):
        raise ValueError(f"its size is {size!r}; it must have shortest_edge and longest_edge")
    pixels = {
        "min_pixels": (values.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")),
        "max_pixels": (values.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")),
    }
    found: dict = {name: next((int(v) for v in given if v is not None), None) for name, given in pixels.items()}
    for name in ("mean", "std"):
        given = values.get(f"image_{name}")
        if isinstance(given, int | float):
            given = [given] * channels
        found[name] = None if given is None else tuple(map(float, given))
    return {name: value for name, value in found.items() if value is not None}
