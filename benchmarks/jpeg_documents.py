"""Captioned JPEG files -> packed rows, one process, beside a plain PyTorch DataLoader that does the same work.

    python benchmarks/jpeg_documents.py [--documents 400] [--side 768] [--repeats 5]

Both read the same files, turn and convert the picture, bring it to 256 x 256 pixels, cut it into patches of 16 and
tokenize the caption with the same tokenizer. Ours also packs several documents into a row; the DataLoader pads each to
the row's length. Prints documents per second of both, in turns, and the median ratio.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageOps

from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.data import digits, tokenizer
from starflow2_jax.data.groups import GroupedBatches
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.pipeline import Encoder, RowEncoder
from starflow2_jax.data.preparation import Preparation, SourceConfig
from starflow2_jax.sequence import Shape

SIDE, PATCH, LENGTH, ROWS = 256, 16, 1024, 8


def write(folder: Path, documents: int, side: int) -> Path:
    """Photo-like pictures: smooth colours with some noise. Returns the JSONL file."""
    rng, lines = np.random.default_rng(0), []
    for i in range(documents):
        coarse = Pillow.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((side * 4 // 3, side), 3)
        noisy = np.asarray(coarse, np.int16) + rng.normal(0, 6, (side, side * 4 // 3, 3)).astype(np.int16)
        Pillow.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        caption = " ".join(rng.choice(digits.WORDS, 20))
        lines.append(json.dumps([{"text": caption}, {"image": f"{i}.jpg", "generate": True}]))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder / "documents.jsonl"


def ours(path: Path, words, count: int) -> float:
    """Documents per second through the whole path."""
    codec = PatchCodec((SIDE, SIDE), 3, PATCH, (0.0,) * 768, (1.0,) * 768)
    prepare = Preparation(SourceConfig(path=str(path)), ImageReader(3, (SIDE, SIDE)))
    stream = Stream("jpegs", 1.0, JsonlDocuments(str(path)), prepare, seed=0)
    batches = GroupedBatches([stream], RowEncoder(Encoder(words, codec), Shape(ROWS, LENGTH, 4)))
    begin = time.perf_counter()
    while batches.check().get("jpegs", 0) < count:
        next(batches)
    return batches.check()["jpegs"] / (time.perf_counter() - begin)


class Captions(torch.utils.data.Dataset):
    def __init__(self, path: Path, words):
        self.folder, self.words = path.parent, words
        self.lines = [json.loads(line) for line in path.read_text().splitlines()]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        text, image = self.lines[i]
        with Pillow.open(self.folder / image["image"]) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        picture = ImageOps.fit(picture, (SIDE, SIDE), Pillow.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(picture, np.float32)) / 127.5 - 1
        patches = pixels.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).permute(0, 1, 3, 4, 2).reshape(-1, 768)
        tokens = torch.zeros(LENGTH, dtype=torch.int32)
        ids = self.words.encode(text["text"], add_special_tokens=False)
        tokens[: len(ids)] = torch.tensor(ids)
        return tokens, patches


def theirs(path: Path, words, count: int) -> float:
    loader = torch.utils.data.DataLoader(Captions(path, words), batch_size=ROWS, shuffle=True)
    begin, seen = time.perf_counter(), 0
    while seen < count:
        for tokens, _ in loader:
            seen += len(tokens)
    return seen / (time.perf_counter() - begin)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--documents", type=int, default=400, help="files, and documents that each turn reads")
    p.add_argument("--side", type=int, default=768, help="height of the pictures; their width is 4 / 3 of it")
    p.add_argument("--repeats", type=int, default=5, help="turns of each side")
    a = p.parse_args()
    torch.set_num_threads(1)
    words = tokenizer.train(digits.texts(), 416)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), a.documents, a.side)
        turns = [(ours(path, words, a.documents), theirs(path, words, a.documents)) for _ in range(a.repeats)]
    for name, rates in zip(("ours", "PyTorch DataLoader"), zip(*turns, strict=True), strict=True):
        print(f"{name}: {statistics.median(rates):.1f} documents per second ({min(rates):.1f} to {max(rates):.1f})")
    print(f"ours / PyTorch: {statistics.median(one / other for one, other in turns):.2f}")


if __name__ == "__main__":
    main()
