"""A trained model in a few calls: load a checkpoint; generate, stream, chat, edit, denoise, score, rank, invert.

Keyword arguments `options` are fields of `SampleOptions`. All methods raise UserError for input that does not fit the
model.
"""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starflow2_jax.data.documents import Document, Image, Said, compose
from starflow2_jax.errors import UserError
from starflow2_jax.sampling import noise_space, scoring
from starflow2_jax.sampling.chat import Chat
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.events import Event
from starflow2_jax.sampling.prompts import spoken

USUAL: dict[str, Any] = dict(temperature=0.0, image_temperature=0.9, guidance=1.0)  # as on the command line


class Model:
    """A trained model. `sampler` does the work; use it directly for whatever has no method here."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    @classmethod
    def load(cls, folder: str | Path, mesh: jax.sharding.Mesh | None = None, dtype: str | None = None) -> "Model":
        """Load a checkpoint directory. The arguments are those of `Sampler.restore`."""
        return cls(Sampler.restore(folder, mesh, dtype))

    def generate(self, prompt: Said, num: int = 1, seed: int = 0, **options: Any) -> list[Document]:
        """`num` answers to the prompt, which is read only once. Answer i depends on `seed` + i."""
        if num < 1:
            raise UserError(f"num must be at least 1, not {num}")
        return self.sampler.generate([self._prompt(prompt)], self._options(options), seed, num)

    def stream(self, prompt: Said, seed: int = 0, every: int = 4, **options: Any) -> Iterator[Event]:
        """Yields the answer to the prompt while the model writes it: words, the progress of an image, its pixels, the
        end.

        `every`: positions that the model writes between two looks for new events.
        """
        session = self.sampler.session(self._options(options), [seed])
        session.read([self._prompt(prompt)], room=session.to_write)
        return session.stream(every=every)

    def chat(self, seed: int = 0, **options: Any) -> Chat:
        """A new conversation. Its method `say` returns an answer, and `stream` yields one while it is written."""
        return Chat(self.sampler, self._options(options), seed)

    def edit(self, image: np.ndarray, instruction: str, seed: int = 0, **options: Any) -> np.ndarray:
        """The image after an instruction such as "mirror it": (height, width, C), not clipped to [-1, 1].

        The option `guidance` strengthens the effect of the instruction, `image_guidance` that of the image.
        """
        whole = dict(max_tokens=self.sampler.model.cfg.tokens + 1, image_first=True)
        [answer] = self.sampler.generate([self._prompt([image, instruction])], self._options(whole | options), seed)
        edited = next((part for part in answer if isinstance(part, Image)), None)
        if edited is None:
            raise UserError(
                f"the model wrote no image; set image_first=True, and max_tokens to at least {whole['max_tokens']}"
            )
        return edited.pixels

    def denoise(self, prompt: Said, answer: Said, sigma: float | None = None) -> Document:
        """An answer of `generate`, with the training noise removed from its images by one step along the score.

        `sigma`: standard deviation of the noise, in the images' units; None: as in training.
        """
        sigma = self.sampler.noise if sigma is None else sigma
        return noise_space.denoise(self.sampler, [self._prompt(prompt)], [compose(answer)], sigma)[0]

    def score(self, document: Said) -> list[scoring.Score]:
        """The exact log-likelihood of each marked part of a document: Image(generate=True) or Text(predict=True)."""
        return scoring.score(self.sampler, [compose(document)])[0]

    def rank(self, image: np.ndarray, captions: list[str], by: str = "image") -> list[tuple[str, float]]:
        """The captions with their scores in nats, the best first.

        `by`: "image" scores by log p(image | caption) - log p(image), "text" by log p(caption | image).
        """
        if by not in ("image", "text"):
            raise UserError(f'by must be "image" or "text", not {by!r}')
        template = scoring.illustrate if by == "image" else scoring.describe
        return scoring.rank(self.sampler, image, captions, by == "image", template)

    def invert(self, image: np.ndarray, prompt: Said, as_prompt: Said) -> np.ndarray:
        """Turn an image into its noise under `prompt`, and that noise into an image under `as_prompt`.

        Returns (height, width, C), not clipped to [-1, 1].
        """
        z = noise_space.encode(self.sampler, [self._prompt(prompt)], [image])
        return noise_space.decode(self.sampler, [self._prompt(as_prompt)], z)[0]

    def _prompt(self, said: Said) -> Document:
        return spoken(self.sampler.tokenizer, said)

    def _options(self, given: dict) -> SampleOptions:
        known = [field.name for field in fields(SampleOptions)]
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"there is no option {unknown[0]!r}; give one of {', '.join(known)}")
        return SampleOptions(**USUAL | given)
