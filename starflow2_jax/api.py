"""A model in a few words: load a checkpoint; generate, stream, chat, edit, score, rank, invert.

Keyword arguments are fields of `SampleOptions`. Everything here raises UserError for what does not fit the model.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from starflow2_jax.data.documents import Document, Said, compose
from starflow2_jax.sampling import exact, scoring
from starflow2_jax.sampling.chat import Chat
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.events import Answer, Event

USUAL = dict(temperature=0.0, image_temperature=0.9, guidance=1.0)  # as on the command line


class Model:
    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    @classmethod
    def load(cls, folder: str | Path, mesh: jax.sharding.Mesh | None = None, dtype: str | None = None) -> "Model":
        """From a checkpoint directory alone; arguments as Sampler.restore's."""
        return cls(Sampler.restore(folder, mesh, dtype))

    def generate(self, prompt: Said, num: int = 1, seed: int = 0, **options) -> list[Document]:
        """`num` continuations; the prompt is read once for all."""
        return self.sampler.generate([compose(prompt)], SampleOptions(**USUAL | options), seed, num)

    def stream(self, prompt: Said, seed: int = 0, every: int = 4, **options) -> Iterator[Event]:
        """The continuation as it comes: words, how far an image is, its pixels, the end; news every so many positions."""
        options = SampleOptions(**USUAL | options)
        session = self.sampler.session(options, [seed])
        session.read([compose(prompt)], room=options.max_tokens)
        ids, N = self.sampler.ids, self.sampler.model.cfg.tokens
        answer = Answer(0, self.sampler.tokenizer, N, ids.end, options.stop)
        for [count] in session.stream(every=every):
            rows = session.rows
            yield from answer.read(
                np.asarray(rows.tokens[0, :count]),
                bool(rows.done[0]),
                lambda at, rows=rows: self.sampler.decode(rows.u[0, at : at + N][None])[0],
            )

    def chat(self, seed: int = 0, **options) -> Chat:
        """A conversation: `say` something, get its answer."""
        return Chat(self.sampler, SampleOptions(**USUAL | options), seed)

    def edit(self, image: np.ndarray, instruction: str, seed: int = 0, **options) -> np.ndarray:
        """The image as the instruction wants it: (height, width, C), not clipped.

        `guidance` weighs what the instruction changes; `image_guidance`, where given, what the image does.
        """
        whole = dict(max_tokens=self.sampler.model.cfg.tokens + 1, image_first=True)
        [[edited]] = self.generate([image, instruction], seed=seed, **whole | options)
        return edited.pixels

    def score(self, document: Document) -> list[scoring.Score]:
        """The exact log-likelihood of each part that counts: Image(generate=True), Text(predict=True)."""
        return scoring.score(self.sampler, [document])[0]

    def rank(self, image: np.ndarray, captions: list[str], by: str = "image") -> list[tuple[str, float]]:
        """Captions and nats, best first: by "image", log p(image | caption) - log p(image); by "text", log p(caption | image)."""
        template = {"image": scoring.illustrate, "text": scoring.describe}[by]
        return scoring.rank(self.sampler, image, captions, by == "image", template)

    def invert(self, image: np.ndarray, prompt: Said, as_prompt: Said) -> np.ndarray:
        """The image's noise under one prompt, as an image under another: (height, width, C), not clipped."""
        z = exact.encode(self.sampler, [compose(prompt)], [image])
        return exact.decode(self.sampler, [compose(as_prompt)], z)[0]
