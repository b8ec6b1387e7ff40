"""One conversation, turn by turn: what was read or written stays in the caches, generated images included."""

import jax

from starflow2_jax.data import tokenizer as tokenizers
from starflow2_jax.data.documents import Document, DocumentError, Image, Said, Text, compose
from starflow2_jax.sampling.engine import AS_TRAINED, SampleOptions, Sampler


class Chat:
    """A session of one row. With a chat template of the tokenizer's, what is said is dressed by it; else it is read as it is.

    A turn reads only what the template adds to the conversation. Raises ValueError for options with stop strings: what
    they cut off would stay in the caches.
    """

    def __init__(self, sampler: Sampler, options: SampleOptions = AS_TRAINED, seed: int = 0):
        if options.stop:
            raise ValueError("a conversation takes no stop strings; what they cut off would still be remembered")
        self.sampler, self.options = sampler, options
        self.session = sampler.session(options, [seed])
        self.turns: list[tuple[str, Document]] = []

    def say(self, said: Said, options: SampleOptions | None = None) -> Document:
        """Read on, and write an answer. `options`: of this turn, with the same guidance branches as the first ones.

        Raises DocumentError for what does not fit the model; then the conversation stands as before.
        """
        if options is not None and (options.branches, options.stop) != (self.options.branches, ()):
            raise ValueError("a conversation keeps its kinds of guidance, and takes no stop strings")
        options, document = options or self.options, compose(said)
        turns = [*self.turns, ("user", document)]
        more = self._added(turns) if self.sampler.tokenizer.chat_template else document
        if not more and not self.turns and not options.image_first:
            raise DocumentError("nothing was said; give some text or an image")
        ending = self._unfinished()
        self._drop_part_of_image()
        self.session.read([ending + more], room=options.max_tokens)
        [answer] = self.session.write(options)
        self.turns = [*turns, ("assistant", answer)]
        return answer

    def _added(self, turns: list[tuple[str, Document]]) -> Document:
        """What the template's text of the conversation has behind what is in the caches."""
        new = tokenizers.chat(self.sampler.tokenizer, turns)
        if not self.turns:
            return new
        *before, (_, answer) = self.turns
        text, images = flat(new)
        told, known = flat(tokenizers.chat(self.sampler.tokenizer, before) + answer)
        if not text.startswith(told) or any(a is not b for a, b in zip(known, images, strict=False)):
            raise DocumentError(
                "this tokenizer's chat template changes earlier turns when another one comes, so they cannot be kept; "
                "give the whole conversation to `starflow2 sample --chat`"
            )
        text = text.removeprefix(told)
        if self._last == self.sampler.ids.end:  # the model has closed its answer itself
            text = text.removeprefix("<|im_end|>")
        return unflat(text, images[len(known) :])

    @property
    def _last(self) -> int:
        return int(self.session.rows.token[0])

    def _unfinished(self) -> Document:
        """What closes an image that is whole but for its end."""
        whole = int(self.session.rows.in_image[0]) == self.sampler.model.cfg.tokens - 1
        return [Text("<|vision_end|>")] if whole else []

    def _drop_part_of_image(self) -> None:
        """Take back an image that `max_tokens` cut off: nobody has seen it."""
        rows = self.session.rows
        inside = int(rows.in_image[0])
        if inside == self.sampler.model.cfg.tokens - 1 or (inside < 0 and self._last != self.sampler.ids.vision_start):
            return
        back = inside + 2  # its tokens and <|vision_start|>
        caches = jax.tree.map(lambda x: x if x.ndim > 1 else x - back, rows.caches)
        self.session.rows = rows.replace(caches=caches, offset=rows.offset - 1, in_image=rows.in_image * 0 - 1)


def flat(document: Document) -> tuple[str, list[Image]]:
    """A document as text with a mark for each image, and the images."""
    images = [part for part in document if isinstance(part, Image)]
    return "".join(p.text if isinstance(p, Text) else tokenizers.IMAGE_MARK for p in document), images


def unflat(text: str, images: list[Image]) -> Document:
    """The inverse of `flat`."""
    parts: Document = []
    first, *texts = text.split(tokenizers.IMAGE_MARK)
    for image, after in zip(images, texts, strict=True):
        parts += [image, Text(after)]
    return [part for part in [Text(first), *parts] if isinstance(part, Image) or part.text]
