"""Events: the text, images and end of a row's answer, piece by piece while it is written."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text


@dataclass(frozen=True)
class Words:
    """A piece of text that follows the text before it. In every event `choice` is the row that wrote it."""

    choice: int
    text: str
    places: tuple[int, ...] = ()  # positions of the answer whose text tokens were read since the last such event


@dataclass(frozen=True)
class Progress:
    """The fraction of an image's tokens that are written."""

    choice: int
    image: int  # number of the image in the answer, from 0
    fraction: float  # in 0..1


@dataclass(frozen=True, eq=False)
class Picture:
    """A finished image."""

    choice: int
    image: int  # number of the image in the answer, from 0
    pixels: np.ndarray  # (height, width, C) in [-1, 1]


@dataclass(frozen=True)
class End:
    """The answer is complete."""

    choice: int
    reason: str  # "stop": the model ended it or a stop string came; "length": max_tokens were written
    tokens: int  # positions written, image tokens included


Event = Words | Progress | Picture | End


def as_document(events: Iterable[Event]) -> Document:
    """The document that the events of one choice make up."""
    parts: Document = []
    for event in events:
        if isinstance(event, Picture):
            parts.append(Image(event.pixels, generate=True))
        elif isinstance(event, Words):
            if parts and isinstance(last := parts[-1], Text):
                parts[-1] = Text(last.text + event.text, predict=True)
            else:
                parts.append(Text(event.text, predict=True))
    return parts


def text_runs(tokens: np.ndarray) -> list[list[int]]:
    """A row's record, tokens (T,) -> its text tokens, a list for each run of text between images."""
    pieces = np.split(tokens, np.flatnonzero(tokens == -1))
    return [run for piece in pieces if (run := piece[piece >= 0].tolist())]


class Answer:
    """Turns a row's positions into events while they are written.

    It holds text back that later tokens may change: a half-written character, or the beginning of a stop string.
    `tokens_of_image`: N. `end`: id of the token that ends an answer.
    """

    def __init__(self, choice: int, tokenizer: Any, tokens_of_image: int, end: int, stop: tuple[str, ...]):
        self.choice, self.tokenizer, self.N, self.end, self.stop = choice, tokenizer, tokens_of_image, end, stop
        self.at = self.images = 0  # positions and images read so far
        self.run: list[int] = []  # text tokens since the last image
        self.places: list[int] = []  # their positions, as far as no event has carried them
        self.sent = 0  # characters of their text that events have carried
        self.ended: End | None = None
        self.cut = False  # whether a stop string ended the answer

    def whole(self, tokens: np.ndarray) -> list[int]:
        """The positions at which images begin that were completed since the last `read`, which needs their pixels."""
        places = self.at + np.flatnonzero(tokens[self.at :] == -1)
        return places[: len(places) // self.N * self.N : self.N].tolist() if self.ended is None else []

    def read(self, tokens: np.ndarray, done: bool, pictures: Mapping[int, np.ndarray]) -> Iterator[Event]:
        """Yield the events that are new since the last call.

        tokens (count,): all positions that the row has written so far, -1 for an image token. `done`: whether the row
        has ended. `pictures`: pixels of the images that begin at the positions of `whole`.
        """
        while self.at < len(tokens) and self.ended is None:
            if tokens[self.at] >= 0:
                self.run.append(int(tokens[self.at]))
                self.places.append(self.at)
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
            self.at, self.images, self.run, self.sent = self.at + self.N, self.images + 1, [], 0
        if self.ended is None:
            yield from self._text(done)
        if done and self.ended is None:
            self.ended = End(self.choice, "stop" if len(tokens) and tokens[-1] == self.end else "length", len(tokens))
            yield self.ended

    def _text(self, whole: bool) -> Iterator[Event]:
        """Events of the new text that no later token can change. `whole`: the run has ended, so this is all of it."""
        text = self.tokenizer.decode(self.run, skip_special_tokens=True)
        cuts = [text.index(s) for s in self.stop if s in text]
        if cuts:
            text, whole = text[: min(cuts)], True
        safe = len(text) if whole else self._safe(text)
        if safe > self.sent:
            yield Words(self.choice, text[self.sent : safe], tuple(self.places))
            self.sent, self.places = safe, []
        if cuts:
            self.cut, self.ended = True, End(self.choice, "stop", self.at)
            yield self.ended

    def _safe(self, text: str) -> int:
        """Length of the text without a half-written character and without the beginning of a stop string at its end."""
        body = text.rstrip("\ufffd")
        return len(body) - max((k for s in self.stop for k in range(1, len(s)) if body.endswith(s[:k])), default=0)
