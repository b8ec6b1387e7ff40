"""What one row writes, told piece by piece while it is written."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text


@dataclass(frozen=True)
class Words:
    """More text."""

    choice: int
    text: str


@dataclass(frozen=True)
class Progress:
    """How much of image number `image` is written."""

    choice: int
    image: int
    fraction: float


@dataclass(frozen=True, eq=False)
class Picture:
    choice: int
    image: int
    pixels: np.ndarray  # (height, width, C) in [-1, 1]


@dataclass(frozen=True)
class End:
    choice: int
    reason: str  # "stop": it ended itself or met a stop string; "length": max_tokens
    tokens: int  # positions written, those of images included


Event = Words | Progress | Picture | End


def as_document(events: Iterable[Event]) -> Document:
    """What the events of one choice say."""
    parts: Document = []
    for event in events:
        if isinstance(event, Picture):
            parts.append(Image(event.pixels, generate=True))
        elif isinstance(event, Words):
            before = parts.pop().text if parts and isinstance(parts[-1], Text) else ""
            parts.append(Text(before + event.text, predict=True))
    return parts


def text_runs(tokens: np.ndarray) -> list[list[int]]:
    """tokens (T,): a row's record -> the text tokens between its images, one list a run."""
    pieces = np.split(tokens, np.flatnonzero(tokens == -1))
    return [run for piece in pieces if (run := piece[piece >= 0].tolist())]


class Answer:
    """Reads a row's positions as they come. Text is held back as long as it may be cut: half a character, or what may
    become a stop string."""

    def __init__(self, choice: int, tokenizer, tokens_of_image: int, end: int, stop: tuple[str, ...]):
        self.choice, self.tokenizer, self.N, self.end, self.stop = choice, tokenizer, tokens_of_image, end, stop
        self.at = self.images = 0
        self.run: list[int] = []  # tokens of the text since the last image
        self.told = 0  # characters of it
        self.ended: End | None = None
        self.cut = False  # whether a stop string ended it

    def whole(self, tokens: np.ndarray) -> list[int]:
        """Where the images begin that `read` will tell of."""
        places = self.at + np.flatnonzero(tokens[self.at :] == -1)
        return places[: len(places) // self.N * self.N : self.N].tolist() if self.ended is None else []

    def read(self, tokens: np.ndarray, done: bool, pictures: Mapping[int, np.ndarray]) -> Iterator[Event]:
        """tokens (count,): all that the row has written so far, -1 an image token. `pictures`: pixels, by `whole`."""
        while self.at < len(tokens) and self.ended is None:
            if tokens[self.at] >= 0:
                self.run.append(int(tokens[self.at]))
                self.at += 1
                if self.stop:
                    yield from self._text(False)
                continue
            yield from self._text(True)
            if self.ended:
                return
            inside = int((tokens[self.at : self.at + self.N] == -1).sum())
            if inside < self.N:
                if not done:
                    yield Progress(self.choice, self.images, inside / self.N)
                    return
                break
            yield Picture(self.choice, self.images, pictures[self.at])
            self.at, self.images, self.run, self.told = self.at + self.N, self.images + 1, [], 0
        if self.ended is None:
            yield from self._text(done)
        if done and self.ended is None:
            self.ended = End(self.choice, "stop" if len(tokens) and tokens[-1] == self.end else "length", len(tokens))
            yield self.ended

    def _text(self, whole: bool) -> Iterator[Event]:
        text = self.tokenizer.decode(self.run, skip_special_tokens=True)
        cuts = [text.index(s) for s in self.stop if s in text]
        if cuts:
            text, whole = text[: min(cuts)], True
        safe = len(text) if whole else self._safe(text)
        if safe > self.told:
            yield Words(self.choice, text[self.told : safe])
            self.told = safe
        if cuts:
            self.cut, self.ended = True, End(self.choice, "stop", self.at)
            yield self.ended

    def _safe(self, text: str) -> int:
        body = text.rstrip("\ufffd")
        return len(body) - max((k for s in self.stop for k in range(1, len(s)) if body.endswith(s[:k])), default=0)
