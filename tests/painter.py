"""A sampler without a model: its pictures and words tell which prompt and which seed made them."""

from types import SimpleNamespace

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text

SHAPE = (4, 4, 3)


class Painter:
    """`asked`: the prompts of all calls. `say`: prompt -> the words of an answer; None: it draws."""

    model = SimpleNamespace(cfg=SimpleNamespace(tokens=4, vlm=SimpleNamespace(vision=True)))
    codec = SimpleNamespace(is_pixels=True, makes_pixels=True, image_channels=3, image_shape=SHAPE)
    encoder = SimpleNamespace(vision=None)  # pictures are left as they are
    tokenizer = SimpleNamespace(chat_template=None)

    def __init__(self, say=None):
        self.asked: list[Document] = []
        self.say = say

    def generate(self, prompts, options, seeds, num, rows) -> list[Document]:
        self.asked += prompts
        each = [prompt for prompt in prompts for _ in range(num)]
        if self.say:
            return [[Text(self.say(prompt))] for prompt in each]
        return [[Image(painted(seed))] for seed in seeds]


def painted(seed: int) -> np.ndarray:
    """The picture of a seed, in [-1, 1]."""
    return np.random.default_rng(seed).integers(0, 256, SHAPE) / np.float32(127.5) - 1


def levels(seed: int) -> np.ndarray:
    """The picture of a seed as a file has it, 0..255."""
    return np.round((painted(seed) + 1) * 127.5).astype(np.uint8)
