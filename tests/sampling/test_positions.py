"""The positions that each stream really runs, counted inside the model, against Rows.computed and prompt + answer."""

from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
import tiny

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.models.layers import Transformer
from starflow2_jax.models.qwen import Qwen
from starflow2_jax.sampling.chat import Chat
from starflow2_jax.sampling.engine import SampleOptions, Sampler

N = tiny.CONFIG.tokens
STREAMS = ("vlm", "deep")


@dataclass
class Watched:
    """For each stream, the filled lengths of all cache rows at the beginning of each call."""

    starts: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in STREAMS})

    def see(self, stream: str, length: np.ndarray) -> None:
        self.starts[stream].append(np.array(length))

    def own(self, stream: str, lanes: int) -> list[int]:
        """The position in the row's own cache at which each call begins: a step runs all lanes at once, `read` one lane
        per call.
        """
        jax.effects_barrier()
        lengths = [0, *map(len, self.starts[stream])]
        return [s[0] for s, before in zip(self.starts[stream], lengths, strict=False) if len(s) == lanes or before != 1]


@pytest.fixture
def watched(monkeypatch) -> Watched:
    found = Watched()

    def watch(module, method: str, stream: str, here) -> None:
        original = getattr(module, method)

        def call(self, x, second, mask=None, cache=None, *rest, **named):
            if here(self) and cache is not None:
                jax.debug.callback(lambda length: found.see(stream, length), cache.length, ordered=True)
            return original(self, x, second, mask, cache, *rest, **named)

        monkeypatch.setattr(module, method, call)

    watch(Qwen, "run", "vlm", lambda module: True)
    watch(Transformer, "__call__", "deep", lambda module: module.name == "deep")
    jax.clear_caches()
    yield found
    jax.clear_caches()


PICTURE = Image(tiny.pixels(1))
USES = {
    "text": ([[Text("draw an eight")]], SampleOptions(max_tokens=9, max_images=0)),
    "image": ([[Text("draw an eight")]], SampleOptions(max_tokens=N + 4, image_first=True)),
    "image, Jacobi": ([[Text("draw an eight")]], SampleOptions(max_tokens=N + 4, image_first=True, jacobi=4)),
    "edit": (
        [[PICTURE, Text("mirror it")]],
        SampleOptions(max_tokens=N + 2, image_first=True, guidance=1.0, image_guidance=0.5),
    ),
    "turns": (
        [[Text("draw an eight")], [Text("which digit is this?")], [PICTURE, Text(" and now?")]],
        SampleOptions(max_tokens=N + 3, image_first=True, max_images=1, guidance=1.0),
    ),
}


@pytest.mark.parametrize("use", USES)
def test_each_stream_runs_each_position_once(watched, use):
    """Prompt + generated positions in the own caches of both streams.

    Padding, and passes that were tried again, are rewound before the next call begins: what it begins behind the
    beginning of the one before was kept, and what is run twice counts twice. `passes` says how many calls there are:
    none is hidden.
    """
    said, options = USES[use]
    model = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)
    chat = Chat(model, options, seed=3)
    expected = 0
    for document in said:
        chat.say(document)
        rows = chat.session.rows
        expected += len(model.encoder(document, closed=False)["tokens"]) + int(rows.count[0])
    for stream, cache in (("vlm", rows.caches.vlm), ("deep", rows.caches.deep)):
        begins = watched.own(stream, 1 + len(options.branches))
        assert np.maximum(np.diff([*begins, int(cache.length[0])]), 0).sum() == expected
        assert len(begins) == rows.passes[0]
    assert chat.session.computed == [expected]
