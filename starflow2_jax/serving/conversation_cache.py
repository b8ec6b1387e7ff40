"""Caches of finished conversations. A request that continues one reads only its new turns."""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.documents import DocumentError, Text
from starflow2_jax.sampling import rows as row
from starflow2_jax.sampling.chat import Chat
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import Rows, SampleOptions, bucket
from starflow2_jax.serving.prompts import Turns, identity, prompt


@dataclass(frozen=True, eq=False)
class Kept:
    """A conversation that ends with a finished answer, and a batch of one row whose caches hold all of it."""

    turns: Turns
    rows: Rows


class Conversations:
    """Keeps at most `most` conversations.

    If there are more, it drops a conversation that another kept one continues, or else the one that was not used for
    the longest time.
    """

    def __init__(self, sampler: Sampler, options: SampleOptions, most: int):
        self.sampler, self.options, self.most = sampler, options, most
        self.kept: OrderedDict[tuple, Kept] = OrderedDict()  # by prompts.identity; the one used last is at the end

    def keep(self, turns: Turns, batch: Rows, index: int) -> None:
        """Keep a copy of row `index` of the batch, whose caches hold the conversation `turns`."""
        if not self.most:
            return
        rows = self._copy(batch, index)
        self.kept[key := identity(turns)] = Kept(turns, _cut(rows, bucket(int(rows.caches.length[0]))))
        self.kept.move_to_end(key)
        if len(self.kept) > self.most:
            earlier = (k for k in self.kept if any(len(k) < len(other) and other[: len(k)] == k for other in self.kept))
            del self.kept[next(earlier, next(iter(self.kept)))]

    def forget(self) -> None:
        """Drop all conversations."""
        self.kept.clear()

    def go_on(self, turns: Turns, asked: tuple) -> tuple[Turns, Rows, list[dict]] | None:
        """Continue the longest kept conversation with which `turns` begin. `asked`: the identity of `turns`.

        Returns None if there is no such conversation, or if the chat template writes its turns differently now. Else
        returns the turns, with the kept images in place of those that the client sent back; a copy of the kept row; and
        for each lane (see `sampling.steps`) the features that it must still read.
        """
        known = max((k for k in self.kept if asked[: len(k)] == k), key=len, default=None)
        if known is None:
            return None
        self.kept.move_to_end(known)
        kept = self.kept[known]
        turns = kept.turns + turns[len(known) :]
        talk = Chat(self.sampler, self.options, state=self._copy(kept.rows, 0), turns=kept.turns)
        try:
            if self.sampler.tokenizer.chat_template:
                added = talk.added(turns)
            else:
                ended = int(kept.rows.token[0]) == self.sampler.ids.end
                added = [] if ended else [Text("<|im_end|>")]
                added += prompt(self.sampler, turns[len(known) :])
        except DocumentError:  # the chat template writes earlier turns differently once another turn follows
            return None
        lanes = talk.session.encode(added)
        talk.session.settle()
        # Draws count from 0, as in a row that reads the whole prompt: a seed gives the same answer with and without
        # caches.
        rows = talk.session.rows.replace(drawn=jnp.zeros(1, jnp.int32))
        return (turns, rows, lanes) if len(lanes[0]["tokens"]) else None

    def _copy(self, rows: Rows, index: int) -> Rows:
        """A batch of one row: a copy of row `index`."""
        return self.sampler.run(row.take, rows, np.array([index]), np.zeros(1, np.uint32))


@partial(jax.jit, static_argnums=1)
def _cut(rows: Rows, capacity: int) -> Rows:
    """The rows with caches cut to `capacity` positions, and without the record of the tokens that they wrote."""
    caches = jax.tree.map(lambda x: x[:, :, :capacity] if x.ndim > 1 else x, rows.caches)
    record = {name: getattr(rows, name)[:, :0] for name in ("tokens", "u", "likely", "logprobs")}
    return rows.replace(caches=caches, **record)
