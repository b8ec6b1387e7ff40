"""Converts the reference library's folder of a VLM into our checkpoint of it, and back, with one tensor in memory at a
time.

Our checkpoint is a folder:

frozen/                 the parameters {"vlm": ...} (orbax) in the source's types; frozen.json: their content hash
vlm.json                the VLM's kind and config
reference_config.json   the source's config.json
tokenizer/              the source's tokenizer, chat template and processor files
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from starflow2_jax.checkpoints.atomic_folder import new_folder, require_new
from starflow2_jax.errors import require_one_of
from starflow2_jax.models.vlm import abstract_params
from starflow2_jax.text_files import read_json_file, reason
from starflow2_jax.weights.folder import TYPES, Entry, read_entries, read_tensor, same_bits, write_folder
from starflow2_jax.weights.other_formats import require_unquantised
from starflow2_jax.weights.store import CHUNK, ArrayStore
from starflow2_jax.weights.table import (
    Part,
    Rule,
    WeightError,
    cut,
    expected,
    join,
    name_faults,
    refuse,
    shape_fault,
    source_shape,
)
from starflow2_jax.weights.vlm import VLM_WEIGHTS, load_config, write_config

# Files of the tokenizer and the processor, which are copied.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"  # a folder beside them, with chat templates of other names than "default"
CONFIG = "vlm.json"

Wanted = dict[str, tuple[Rule, tuple[Part, ...]]]


def to_checkpoint(kind: str, source: str | Path, target: str | Path) -> None:
    """Convert the reference's folder `source`, of a VLM of this kind, into a new checkpoint `target`.

    Names, shapes and types are checked before anything is written, numbers while they are written. Raises UserError;
    then no folder `target` is left.
    """
    require_one_of("the kind of VLM", kind, VLM_WEIGHTS)
    weights = VLM_WEIGHTS[kind]
    source, target = Path(source).resolve(), Path(target).resolve()
    require_new(target)
    entries = read_entries(source)
    cfg = weights.read_config(source, _compute_type(entries))
    tree = abstract_params(cfg)
    wanted, faults = expected(weights.rules(cfg, entries), tree)
    twice = {name: path for name, path in weights.copies(cfg).items() if name in entries}
    copies = {name: entries.pop(name) for name in twice}
    faults += _faults(entries, wanted)
    require_unquantised(source, (), fits=not faults)
    refuse(faults)
    for name, path in twice.items():
        first = next(n for n, (_, parts) in wanted.items() if parts[0].path == path)
        if not same_bits(copies[name], entries[first]):
            raise WeightError(f"{name} differs from {first}, though config.json says that they are tied")
    with new_folder(target, sum(entry.nbytes for entry in entries.values())) as folder:
        store = ArrayStore(folder / "frozen", _typed(tree, entries, wanted), create=True)
        for name, entry in entries.items():
            _import(store, name, entry, *wanted[name])
        (folder / "frozen.json").write_text(json.dumps({"content_hash": store.content_hash()}), encoding="utf-8")
        write_config(folder / CONFIG, cfg)
        _copy(source, folder / "tokenizer")
        shutil.copyfile(source / "config.json", folder / "reference_config.json")


def to_reference(kind: str, checkpoint: str | Path, target: str | Path, shard_bytes: int = 4 * 10**9) -> None:
    """Convert a checkpoint that `to_checkpoint` made into a new folder `target`, bit for bit as the reference saves it.

    A weight file has at most `shard_bytes`, or a single larger tensor. Raises UserError; then no folder `target` is
    left.
    """
    require_one_of("the kind of VLM", kind, VLM_WEIGHTS)
    checkpoint, target = Path(checkpoint).resolve(), Path(target).resolve()
    require_new(target)
    if not checkpoint.is_dir():
        raise WeightError(f"there is no checkpoint folder {checkpoint}; name the folder of a converted VLM")
    cfg = load_config(checkpoint / CONFIG)
    if cfg.kind != kind:
        raise WeightError(f"{checkpoint} holds a VLM of the kind {cfg.kind}, not {kind}; give the kind {cfg.kind}")
    tree = abstract_params(cfg)
    wanted, faults = expected(VLM_WEIGHTS[kind].rules(cfg, ()), tree)
    refuse(faults)
    try:
        saved_hash = read_json_file(checkpoint / "frozen.json")["content_hash"]
        config = (checkpoint / "reference_config.json").read_bytes()
        store = ArrayStore(checkpoint / "frozen", tree, create=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{checkpoint} is incomplete or damaged ({reason(error)}); convert again") from None
    shapes = {name: source_shape(*wanted[name]) for name in sorted(wanted, key=_natural)}
    dtypes = {name: store.dtype(wanted[name][1][0].path) for name in shapes}
    with new_folder(target, sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())) as folder:
        write_folder(folder, shapes, dtypes, lambda name: _export(store, *wanted[name]), shard_bytes)
        if store.content_hash() != saved_hash:
            raise WeightError(f"the weights in {checkpoint} are damaged (content hash differs); convert again")
        _copy(checkpoint / "tokenizer", folder)
        (folder / "config.json").write_bytes(config)


def _compute_type(entries: dict[str, Entry]) -> str:
    """The type that most of the numbers have."""
    sizes: dict[str, int] = {}
    for entry in entries.values():
        sizes[entry.kind] = sizes.get(entry.kind, 0) + math.prod(entry.shape)
    most = max(sizes, key=lambda kind: sizes[kind], default=None)
    return TYPES[most].name if most is not None and most in TYPES else "float32"


def _faults(entries: dict[str, Entry], wanted: Wanted) -> list[str]:
    """One sentence for each fault of the tensors' names, shapes and types."""
    faults = name_faults((), wanted, entries, lambda name: entries[name].shape)
    kinds = {}
    for name, (rule, parts) in wanted.items():
        if (entry := entries.get(name)) is None:
            continue
        if fault := shape_fault(rule, parts, entry.shape):
            faults.append(f"tensor {name} {fault}")
        if entry.kind not in TYPES:
            faults.append(f"tensor {name} is of type {entry.kind}; supported are {', '.join(TYPES)}")
        for part in parts:
            other, kind = kinds.setdefault(part.path, (name, entry.kind))
            if kind != entry.kind:
                faults.append(f"tensor {name} is of type {entry.kind}, {other} of {kind}; they are layers of one array")
    return faults


def _typed(tree: dict, entries: dict[str, Entry], wanted: Wanted) -> dict:
    """The shapes of the tree, with the types of the tensors that fill them."""
    types = {part.path: entries[name].dtype for name, (_, parts) in wanted.items() for part in parts}
    leaves: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    typed = {path: jax.ShapeDtypeStruct(x.shape, types[path]) for path, x in leaves.items()}
    return traverse_util.unflatten_dict(typed, sep="/")


def _import(store: ArrayStore, name: str, entry: Entry, rule: Rule, parts: tuple[Part, ...]) -> None:
    """Read a tensor and write its pieces into the store. Raises WeightError for numbers that are not finite."""
    value = read_tensor(entry)
    flat, step = value.reshape(-1), CHUNK // value.itemsize
    if bad := sum(np.count_nonzero(~np.isfinite(flat[i : i + step])) for i in range(0, flat.size, step)):
        raise WeightError(f"tensor {name} in {entry.file} has {bad} numbers that are not finite")
    for part, piece in zip(parts, cut(rule, parts, value), strict=True):
        store.write(part.path, part.layer, piece)


def _export(store: ArrayStore, rule: Rule, parts: tuple[Part, ...]) -> np.ndarray:
    """A source tensor, made of its pieces in the store."""
    return join(rule, parts, [store.read(part.path, part.layer) for part in parts])


def _copy(source: Path, target: Path) -> None:
    """Copy those of COMPANIONS and TEMPLATES that `source` has."""
    for file in filter(Path.is_file, (*(source / name for name in COMPANIONS), *(source / TEMPLATES).glob("*.jinja"))):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _natural(name: str) -> list:
    """A sort key that puts layer 10 after layer 9."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]
