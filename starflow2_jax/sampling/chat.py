"""One conversation, turn by turn. The caches keep everything that was read or written, generated images included."""

from collections.abc import Iterator, Sequence

from starflow2_jax.data import tokenizer as tokenizers
from starflow2_jax.data.documents import Document, DocumentError, Said
from starflow2_jax.errors import UserError
from starflow2_jax.sampling.engine import AS_TRAINED, Sampler
from starflow2_jax.sampling.events import End, Event, as_document
from starflow2_jax.sampling.prompts import is_empty, spoken
from starflow2_jax.sampling.rows import Rows, SampleOptions
from starflow2_jax.sampling.session import Session


class Chat:
    """A session of one row. If the tokenizer has a chat template, it formats the turns; else they are read as they are.

    A turn reads only the text that the template adds to the conversation. An image that max_tokens cut off in the turn
    before is not part of the conversation. `state` and `turns`: a row that holds a conversation, and the turns that it
    has read; None: a new one. Raises UserError for options with stop strings, whose cut-off text would stay in the
    caches.
    """

    def __init__(
        self,
        sampler: Sampler,
        options: SampleOptions = AS_TRAINED,
        seed: int = 0,
        state: Rows | None = None,
        turns: Sequence[tuple[str, Document]] = (),
    ):
        if options.stop:
            raise UserError("a conversation takes no stop strings: the text that they cut off would stay in its memory")
        self.sampler, self.options = sampler, options
        self.session = Session(sampler, options, [seed], state=state)
        self.turns: list[tuple[str, Document]] = list(turns)
        self.intact = True  # whether the caches hold the turns and nothing else

    def say(self, said: Said, options: SampleOptions | None = None) -> Document:
        """Read a user's turn and write an answer.

        `options`: of this turn, with the guidance branches of the first ones.

        Raises UserError for a turn that does not fit the model, which leaves the conversation unchanged, and after an
        answer that was interrupted or whose stream was not read to its end: such a conversation cannot continue.
        """
        for _ in self.stream(said, options, every=None):
            pass
        return self.turns[-1][1]

    def stream(self, said: Said, options: SampleOptions | None = None, every: int | None = 4) -> Iterator[Event]:
        """Like `say`, but yields events while the answer is written, every `every` positions (None: at the end)."""
        if not self.intact:
            raise UserError("the last answer was broken off, so this conversation cannot go on; begin a new one")
        if options is not None and (options.branches, options.stop) != (self.options.branches, ()):
            raise UserError(
                "a conversation cannot switch guidance or image guidance on or off, and takes no stop strings; begin a "
                "new one"
            )
        options, document = options or self.options, spoken(self.sampler.tokenizer, said)
        if is_empty(document) and (self.turns or not options.image_first):
            raise DocumentError("nothing was said; give some text or an image")
        turns = [*self.turns, ("user", document)]
        more = self.added(turns) if self.sampler.tokenizer.chat_template else document
        self.session.choose(options)
        self.session.read([more], room=self.session.to_write)
        self.intact = False
        return self._answer(turns, every)

    def _answer(self, turns: list[tuple[str, Document]], every: int | None) -> Iterator[Event]:
        heard = []
        for event in self.session.stream(every=every):
            heard.append(event)
            if isinstance(event, End):
                self.turns, self.intact = [*turns, ("assistant", as_document(heard))], True
            yield event

    def added(self, turns: list[tuple[str, Document]]) -> Document:
        """The part of the conversation `turns`, formatted by the template, that the caches do not hold yet.

        Raises DocumentError for a template that changes earlier turns.
        """
        new = tokenizers.chat(self.sampler.tokenizer, turns)
        if not self.turns:
            return new
        *before, (_, answer) = self.turns
        text, images = tokenizers.flat(new)
        read, known = tokenizers.flat(tokenizers.chat(self.sampler.tokenizer, before) + answer)
        if not text.startswith(read) or any(a is not b for a, b in zip(known, images, strict=False)):
            raise DocumentError(
                "this tokenizer's chat template changes earlier turns when a turn is added, so their caches cannot be "
                "used; begin a new conversation"
            )
        text = text.removeprefix(read)
        if int(self.session.rows.token[0]) == self.sampler.ids.end:  # the model has ended its answer itself
            text = text.removeprefix("<|im_end|>")
        return tokenizers.unflat(text, images[len(known) :])
