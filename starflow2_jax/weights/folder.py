"""A folder of safetensors files (one, or several with an index), read and written one tensor at a time."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from starflow2_jax.text_files import read_json_file, reason
from starflow2_jax.weights.other_formats import advice, require_folder, require_unquantised, what_it_is
from starflow2_jax.weights.table import WeightError, refuse

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DIFFUSERS = "diffusion_pytorch_model"  # `diffusers` writes this in place of "model"
TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Entry:
    """The place of a tensor in a file."""

    file: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    kind: str  # its type as safetensors names it: a key of TYPES, if we know it

    @property
    def dtype(self) -> np.dtype:
        """The tensor's type. Raises KeyError if `kind` is not in TYPES."""
        return TYPES[self.kind]

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes. Raises KeyError as `dtype` does."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_entries(folder: Path, name: str = "model") -> dict[str, Entry]:
    """Every tensor of a folder by name, in the order in which the files hold them. Reads only headers. Raises
    WeightError.

    `name`: what the names of the safetensors file and of the index begin with.
    """
    require_folder(folder)
    single, index = (folder / file.replace("model", name, 1) for file in (SINGLE, INDEX))
    if single.is_file() and index.is_file():
        raise WeightError(f"{folder} holds both {single.name} and {index.name}; remove one of them")
    if not single.is_file() and not index.is_file():
        raise WeightError(f"{folder} {what_it_is(folder)}")
    entries = _read_header(single) if single.is_file() else _read_shards(folder, index)
    require_unquantised(folder, {entry.kind for entry in entries.values()})
    return entries


def _read_shards(folder: Path, index: Path) -> dict[str, Entry]:
    """The tensors of the files that an index names. Raises WeightError."""
    where = _read_index(index)
    entries, faults = {}, []
    for file in sorted(set(where.values())):
        named = {name for name, f in where.items() if f == file}
        if not (folder / file).is_file():
            faults.append(f"{folder / file} is missing; {index.name} names it for {len(named)} tensors")
            continue
        try:
            present = _read_header(folder / file)
        except WeightError as error:
            faults.append(str(error))
            continue
        faults += [
            f"{index.name} says that {file} holds {name}, but it does not" for name in sorted(named - set(present))
        ]
        faults += [f"{file} holds {name}, but {index.name} does not say so" for name in sorted(set(present) - named)]
        entries |= {name: entry for name, entry in present.items() if name in named}
    refuse(faults)
    return entries


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name. Raises WeightError."""
    try:
        where = read_json_file(index, WeightError)["weight_map"]
        strange = [f for f in where.values() if not isinstance(f, str) or Path(f).name != f or f in ("", ".", "..")]
    except WeightError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightError(
            f"{index} cannot be read as an index of tensors ({type(error).__name__}: {reason(error)})"
        ) from None
    if strange:
        raise WeightError(f"{index} names {strange[0]!r}, which is no file name within its folder")
    if outside := [f for f in sorted(set(where.values())) if not f.endswith(".safetensors")]:
        raise WeightError(f"{index} names {outside[0]!r}, which is no .safetensors file")
    return where


def _read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file; the safetensors library checks its header and size. Raises WeightError."""
    try:
        with safetensors.safe_open(file, "np"):
            pass
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightError(f"{file} cannot be read: {reason(error)}; {advice(file)}") from None
    header.pop("__metadata__", None)
    header = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    return {n: Entry(file, 8 + size + h["data_offsets"][0], tuple(h["shape"]), h["dtype"]) for n, h in header.items()}


def read_tensor(entry: Entry) -> np.ndarray:
    """A tensor, read into new memory. (A memory-mapped file would count as used memory until it is closed.)

    Raises WeightError if the file ends too early.
    """
    value = next(_read(entry, math.prod(entry.shape)), np.empty(0, entry.dtype))
    return value.reshape(entry.shape)


class FolderTensors(Mapping):
    """The tensors of a folder by name, each read on access. Raises WeightError as `read_entries` does."""

    def __init__(self, folder: Path, name: str = "model"):
        self.entries = read_entries(folder, name)

    def __getitem__(self, name: str) -> np.ndarray:
        return read_tensor(self.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in a folder's config.json. Raises WeightError if there is none."""
    path = folder / "config.json"
    config = read_json_file(path, WeightError)
    if not isinstance(config, dict):
        raise WeightError(f"{path} does not hold a JSON object")
    return config


def same_bits(a: Entry, b: Entry, numbers: int = 2**22) -> bool:
    """Whether two tensors are equal bit for bit. Reads `numbers` numbers of each at a time."""
    if (a.shape, a.kind) != (b.shape, b.kind):
        return False
    return all(x.tobytes() == y.tobytes() for x, y in zip(_read(a, numbers), _read(b, numbers), strict=True))


def _read(entry: Entry, numbers: int) -> Iterator[np.ndarray]:
    """The tensor's numbers in flat arrays of at most `numbers` numbers. Raises WeightError if the file ends too
    early.
    """
    total = math.prod(entry.shape)
    for start in range(0, total, max(numbers, 1)):
        count = min(numbers, total - start)
        offset = entry.offset + start * entry.dtype.itemsize
        piece = np.fromfile(entry.file, entry.dtype, count, offset=offset)
        if piece.size != count:
            raise WeightError(f"{entry.file} ends too early; fetch it again")
        yield piece


def write_folder(
    folder: Path,
    shapes: Mapping[str, tuple],
    dtypes: Mapping[str, np.dtype],
    get: Callable[[str], np.ndarray],
    limit: int,
) -> None:
    """Write the tensors `get(name)` in the order of `shapes`, one in memory at a time.

    A file has at most `limit` bytes, or a single larger tensor. Several files get an index; one file gets none, as with
    the reference library.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards, room = [], -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    where = {}
    for i, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, {n: shapes[n] for n in names}, dtypes, get)
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        numbers = sum(math.prod(shape) for shape in shapes.values())
        metadata = {"total_parameters": numbers, "total_size": sum(sizes.values())}
        (folder / INDEX).write_text(
            json.dumps({"metadata": metadata, "weight_map": where}, indent=2) + "\n", encoding="utf-8"
        )


def _write_file(file: Path, shapes: Mapping[str, tuple], dtypes: Mapping[str, np.dtype], get: Callable) -> None:
    kinds = {dtype: kind for kind, dtype in TYPES.items()}
    header: dict[str, Any]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": kinds[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            value = np.ascontiguousarray(get(name))
            if (value.shape, value.dtype) != (tuple(shape), dtypes[name]):
                raise ValueError(f"{name} is {value.dtype} {value.shape}, not {dtypes[name]} {tuple(shape)}")
            f.write(value.reshape(-1).view(np.uint8).data)
            del value
