"""The art: sprites with names, from one sheet of Noto Emoji (see NOTICE.md)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

FOLDER = Path(__file__).parent
CELL, COLUMNS = 64, 32  # of the sheet: pixels of a sprite's side, sprites in a row
COLOURS: Sequence[str] = "red orange yellow green blue purple brown black white grey pink".split() + ["light blue"]
TONES: Sequence[str] = "yellow light medium-light medium medium-dark dark".split()
FEWEST = 16  # nouns of a vocabulary that has every kind of sprite


@dataclass(frozen=True)
class Sprite:
    """A thing that a scene can show. A noun in several colours or skin tones has a sprite for each of them."""

    index: int  # in the sheet
    noun: str
    kind: str  # "object", "coloured" or "person"
    colour: str = ""
    tone: str = ""


@cache
def sprites() -> tuple[Sprite, ...]:
    """All 497 sprites, in the order of the sheet."""
    rows = json.loads((FOLDER / "sprites.json").read_text(encoding="utf-8"))
    return tuple(
        Sprite(i, row["noun"], row["kind"], row.get("colour", ""), row.get("tone", "")) for i, row in enumerate(rows)
    )


@cache
def nouns() -> dict[str, int]:
    """All 269 nouns, each with its number. The sheet of sprites is ordered so that the nouns that are easiest to
    recognise come first."""
    return {noun: i for i, noun in enumerate(dict.fromkeys(sprite.noun for sprite in sprites()))}


@cache
def vocabulary(objects: int) -> tuple[Sprite, ...]:
    """The sprites of the first `objects` nouns; 0: of all nouns."""
    return tuple(sprite for sprite in sprites() if not objects or nouns()[sprite.noun] < objects)


@cache
def _sheet() -> Pillow.Image:
    with Pillow.open(FOLDER / "sprites.webp") as sheet:
        return sheet.convert("RGBA")


@cache
def drawn(sprite: Sprite, side: int) -> np.ndarray:
    """The sprite at `side` pixels: (side, side, 4) fp32 in [0, 1], red, green and blue multiplied by alpha, and
    alpha.
    """
    row, column = divmod(sprite.index, COLUMNS)
    cell = _sheet().crop((CELL * column, CELL * row, CELL * (column + 1), CELL * (row + 1)))
    small = cell.convert("RGBa").resize((side, side), Pillow.Resampling.LANCZOS)
    return np.asarray(small, np.float32) / 255
