"""The two compiled functions of generation: `read` reads documents, `write` draws positions until all rows are done.

Both streams run every position exactly once: a position is drawn and then read at once. To continue, a row needs only
its caches and the outputs of its last position. A lane is the set of cache rows with the same place among the G cache
rows of each row: lane 0 holds the rows themselves, the other lanes their guidance branches. A slot is the place of an
image token in its image, from 0 to N - 1.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from starflow2_jax import sequence
from starflow2_jax.data.tokenizer import TokenIds
from starflow2_jax.models.pretzel import Caches, Output, Pretzel, apply
from starflow2_jax.sampling.guidance import Gaussian, extrapolate, mix_gaussians
from starflow2_jax.sampling.rows import Rows
from starflow2_jax.sequence import Sequence, Step


@dataclass(frozen=True)
class Program:
    """The static arguments of `read` and `write`: each different Program is compiled anew."""

    model: Pretzel
    ids: TokenIds
    skips: bool
    branches: tuple[str, ...] = ()  # see SampleOptions.branches
    jacobi: int = 1  # image tokens that are solved for at once
    tolerance: float = 1e-3  # see SampleOptions.tolerance

    @property
    def lanes(self) -> int:
        """Number of lanes, G."""
        return 1 + len(self.branches)

    def apply(self, params: dict, inputs: Sequence | Step, caches: Caches) -> Output:
        """Run the model on the positions after those in the caches."""
        return apply(self.model, params, inputs, caches, skips=self.skips)

    def first(self, x: jax.Array) -> jax.Array:
        """Lane 0 of an array: (B G, ...) -> (B, ...)."""
        return x[:: self.lanes]

    def spread(self, x: jax.Array) -> jax.Array:
        """The same values in every lane: (B, ...) -> (B G, ...)."""
        return jnp.repeat(x, self.lanes, axis=0)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def read(
    program: Program, params: dict, rows: Rows, batch: Sequence, lane: int, lengths: jax.Array, ends: jax.Array
) -> Rows:
    """Read a batch (B, S) into one lane in a single pass.

    Row b reads its first lengths[b] positions; the rest is padding.

    `ends` (B,): how far the batch advances each row's rotary offset. A row of length 0 does not change.
    """
    G = program.lanes
    caches = jax.tree.map(lambda x: x[lane::G], rows.caches)
    begin, offset = caches.length, rows.offset[lane::G]
    output = program.apply(params, batch.replace(positions=batch.positions + offset[:, None, None]), caches)
    grown = output.caches.rewind(begin + lengths)
    last = jnp.arange(len(lengths)), jnp.maximum(lengths - 1, 0)
    some = lengths > 0

    def keep(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[lane::G].set(jnp.where(some.reshape(-1, *[1] * (new.ndim - 1)), new, old[lane::G]))

    rows = rows.replace(
        caches=jax.tree.map(lambda old, new: old.at[lane::G].set(new), rows.caches, grown),
        mean=keep(rows.mean, output.mean[last]),
        scale=keep(rows.scale, output.scale[last]),
        offset=keep(rows.offset, offset + ends),
        computed=rows.computed.at[lane::G].add(lengths),
    )
    if lane:
        return rows
    return rows.replace(
        text=jnp.where(some[:, None], output.text[last], rows.text),
        seen=_with_seen(rows.seen, batch, lengths),
        token=jnp.where(some, batch.tokens[last], rows.token),
        in_image=jnp.where(some, -1, rows.in_image),
        passes=rows.passes + some,
    )


def _with_seen(seen: jax.Array, batch: Sequence, lengths: jax.Array) -> jax.Array:
    """`seen` (B, V) with the text tokens of the first `lengths` (B,) positions of a batch (B, S)."""
    B, S = batch.tokens.shape
    text = (jnp.arange(S) < lengths[:, None]) & (batch.modality == sequence.TEXT)
    return seen.at[jnp.arange(B)[:, None], jnp.where(text, batch.tokens, seen.shape[1])].set(True, mode="drop")


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def write(program: Program, params: dict, rows: Rows, steps: jax.Array) -> Rows:
    """Write until every row is done, for at most `steps` steps.

    A step adds one position to each row; with Jacobi it adds a chunk to rows within an image and one position to rows
    that write text, in two separate runs of the model.
    """

    def unfinished(carry: tuple[jax.Array, Rows]) -> jax.Array:
        step, rows = carry
        return (step < steps) & ~jnp.all(rows.done)

    def step(carry: tuple[jax.Array, Rows]) -> tuple[jax.Array, Rows]:
        step, rows = carry
        if program.jacobi == 1:
            return step + 1, _one_position(program, params, rows, ~rows.done)
        slot = _next_image_token(program, rows)
        drawing = (slot >= 0) & ~rows.done
        text = ~drawing & ~rows.done
        for active, go_on in ((text, _one_position), (drawing, _image_chunk)):
            rows = jax.lax.cond(
                jnp.any(active), partial(go_on, program, params, active=active), lambda rows: rows, rows
            )
        return step + 1, rows

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), rows))[1]


def _next_image_token(program: Program, rows: Rows) -> jax.Array:
    """(B,): the slot of the image token that comes next; -1 if none does."""
    opened = (rows.in_image < 0) & (rows.token == program.ids.vision_start)
    inside = (rows.in_image >= 0) & (rows.in_image < program.model.cfg.tokens - 1)
    return jnp.where(opened, 0, jnp.where(inside, rows.in_image + 1, -1))


def _one_position(program: Program, params: dict, rows: Rows, active: jax.Array) -> Rows:
    """Draw the next position of the active rows and read it."""
    ids, slot = program.ids, _next_image_token(program, rows)
    token, scores = _draw_token(program, params, rows, active & (slot < 0))
    token = jnp.where(slot >= 0, ids.image, token)
    u = _draw_u(program, rows, (rows.mean, rows.scale), slot, _noise(rows, 1)[:, 0])[:, None]
    if program.branches:  # the last lane, "bare", starts again empty at each image
        fresh = program.spread(active & (token == ids.vision_start)) & (_lane(program, rows) == program.lanes - 1)
        caches = rows.caches.rewind(jnp.where(fresh, 0, rows.caches.length))
        rows = rows.replace(caches=caches, offset=jnp.where(fresh, 0, rows.offset))
    output = _run(program, params, rows, token[:, None], slot[:, None], u)
    at = jnp.arange(len(active)), jnp.where(active & (slot < 0), rows.begun + rows.count, rows.tokens.shape[1])
    rows = rows.replace(
        likely=rows.likely.at[at].set(scores[0], mode="drop"),
        logprobs=rows.logprobs.at[at].set(scores[1], mode="drop"),
        seen=rows.seen.at[at[0], jnp.where(active & (slot < 0), token, rows.seen.shape[1])].set(True, mode="drop"),
    )
    return _accept(program, rows, output, token, slot[:, None], u, active.astype(jnp.int32))


def _image_chunk(program: Program, params: dict, rows: Rows, active: jax.Array) -> Rows:
    """Solve for the next `jacobi` image tokens of the active rows at once, by fixed-point passes.

    u_i = mu_i(u_<i) + tau sigma_i(u_<i) z_i (Gauss-Seidel-Jacobi, arXiv 2505.12849). Token i is exact from pass i on,
    so as many passes as tokens give the exact result. A row stops changing when a pass would change it by less than the
    tolerance, or after as many passes as it has tokens in the chunk. Its result therefore does not depend on other
    rows.
    """
    c, N = program.jacobi, program.model.cfg.tokens
    begin = _next_image_token(program, rows)
    left = jnp.minimum(N - begin, rows.controls.max_tokens - rows.count)
    count = jnp.where(active, jnp.minimum(left, c), 0)
    slots = jnp.clip(begin[:, None] + jnp.arange(c), 0, N - 1)
    tokens, noise = jnp.full(slots.shape, program.ids.image), _noise(rows, c)
    valid = (jnp.arange(c) < count[:, None])[..., None]
    length = rows.caches.length

    def draw(gaussian: Gaussian, i: int) -> jax.Array:
        return _draw_u(program, rows, gaussian, slots[:, i], noise[:, i])

    guess = jnp.stack([draw((rows.mean, rows.scale), i) for i in range(c)], axis=1)  # its first token is exact

    def one_pass(carry: tuple) -> tuple:
        number, u, settled, passes, output = carry
        output = _run(program, params, rows.replace(caches=output.caches), tokens, slots, u)
        output = output.replace(caches=output.caches.rewind(length))
        later = [draw((output.mean[:, i], output.scale[:, i]), i + 1) for i in range(c - 1)]
        new = jnp.stack([guess[:, 0], *later], axis=1)
        change, size = (jnp.sum(jnp.where(valid, x**2, 0), (1, 2)) for x in (new - u, new))
        passes = passes + ~settled
        settled = settled | (change <= program.tolerance * size) | (number + 1 >= count)
        return number + 1, jnp.where(settled[:, None, None], u, new), settled, passes, output

    B, G, D = len(begin), program.lanes, program.model.cfg.channels
    text = jnp.zeros((B * G, c, rows.text.shape[-1]), rows.text.dtype)
    nothing = Output(text, jnp.zeros((B * G, c, D)), jnp.ones((B * G, c, D)), rows.caches)
    carry = jnp.zeros((), jnp.int32), guess, ~active, rows.passes, nothing
    _, u, _, passes, output = jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), one_pass, carry)
    rows = rows.replace(caches=output.caches, passes=passes - (count > 0))  # `_accept` counts one pass itself
    return _accept(program, rows, output, tokens[:, 0], slots, u, count)


def _lane(program: Program, rows: Rows) -> jax.Array:
    """(B G,): the lane of each cache row."""
    return jnp.arange(len(rows.offset)) % program.lanes


def _run(program: Program, params: dict, rows: Rows, tokens: jax.Array, slots: jax.Array, u: jax.Array) -> Output:
    """Run the next positions (B, c) in every lane: image tokens u (B, c, D) where `slots` (B, c) >= 0, else text."""
    w = program.model.cfg.grid[1]
    image, slot = slots >= 0, jnp.maximum(slots, 0)
    place = jnp.stack([0 * slot, slot // w, slot % w], -1)
    step = Step(
        tokens=program.spread(tokens),
        modality=program.spread(jnp.where(image, sequence.FLOW, sequence.TEXT)),
        positions=rows.offset[:, None, None] + program.spread(place),
        u=program.spread(u),
    )
    return program.apply(params, step, rows.caches)


def _accept(
    program: Program,
    rows: Rows,
    output: Output,
    token: jax.Array,
    slots: jax.Array,
    u: jax.Array,
    count: jax.Array,
) -> Rows:
    """Keep the first `count` (B,) of the positions that were run, and update every field of the rows.

    They are the image tokens u (B, c, D) of `slots` (B, c), or one text token `token` (B,) where its slot is -1.
    """
    ids, (h, w), c = program.ids, program.model.cfg.grid, slots.shape[1]
    some, last = count > 0, jnp.maximum(count - 1, 0)
    image, slot = slots[:, 0] >= 0, jnp.take_along_axis(slots, last[:, None], 1)[:, 0]
    of_image = image | (token == ids.vision_start) | (token == ids.vision_end)
    # The positions that each lane keeps. Branches do not read the text that the row writes.
    lanes = jnp.where((_lane(program, rows) == 0) | program.spread(of_image), program.spread(count), 0)
    ahead = jnp.where(image, jnp.where(slot == h * w - 1, max(h, w), 0), 1)  # how far the rotary offset advances

    def pick(old: jax.Array, new: jax.Array, kept: jax.Array, at: jax.Array) -> jax.Array:
        new = jnp.take_along_axis(new, at[:, None, None], axis=1)[:, 0]
        return jnp.where((kept > 0)[:, None], new, old)

    at = (
        jnp.arange(len(count))[:, None],
        jnp.where(jnp.arange(c) < count[:, None], (rows.begun + rows.count)[:, None] + jnp.arange(c), -1),
    )
    room = rows.tokens.shape[1]
    at = at[0], jnp.where(at[1] < 0, room, at[1])  # out of bounds is dropped
    written = jnp.broadcast_to(jnp.where(image, -1, token)[:, None], slots.shape)
    controls, total = rows.controls, rows.count + count
    opens = some & (token == ids.vision_start)
    ends = some & ~image & (token == ids.end)
    return rows.replace(
        caches=output.caches.rewind(rows.caches.length + lanes),
        text=pick(rows.text, program.first(output.text), count, last),
        mean=pick(rows.mean, output.mean, lanes, program.spread(last)),
        scale=pick(rows.scale, output.scale, lanes, program.spread(last)),
        offset=rows.offset + jnp.where(lanes > 0, program.spread(ahead), 0),
        token=jnp.where(some, token, rows.token),
        in_image=jnp.where(some, jnp.where(image, slot, -1), rows.in_image),
        drawn=rows.drawn + count,
        computed=rows.computed + lanes,
        passes=rows.passes + some,
        done=rows.done | ends | (total >= controls.max_tokens),
        controls=controls.replace(
            images_left=controls.images_left - (opens & (controls.images_left > 0)),
            image_next=controls.image_next & ~opens,
        ),
        tokens=rows.tokens.at[at].set(written, mode="drop"),
        u=rows.u.at[at].set(u, mode="drop"),
        count=total,
    )


def _noise(rows: Rows, count: int) -> jax.Array:
    """(B, count, D): standard normals for each row's next draws; draw i of a row depends on its key and i alone."""
    D = rows.u.shape[-1]

    def one(key: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, index), (D,))

    return jax.vmap(jax.vmap(one, (None, 0)))(rows.key, rows.drawn[:, None] + jnp.arange(count))


def _draw_u(program: Program, rows: Rows, gaussians: Gaussian, slot: jax.Array, noise: jax.Array) -> jax.Array:
    """Draw the image token `slot` (B,): the lanes' means and scales (B G, D), guided, and noise (B, D) -> u (B, D)."""
    controls, lanes = rows.controls, program.lanes
    mean, scale = program.first(gaussians[0]), program.first(gaussians[1])
    grown = (slot + 1) / max(program.model.cfg.tokens - 1, 1)
    for lane in range(1, lanes):
        weight = controls.weights[:, lane - 1] * jnp.where(controls.annealed, grown, 1)
        other = gaussians[0][lane::lanes], gaussians[1][lane::lanes]
        mixed, straight = (rule((mean, scale), other, weight[:, None]) for rule in (mix_gaussians, extrapolate))
        mean, scale = (jnp.where(controls.linear[:, None], b, a) for a, b in zip(mixed, straight, strict=True))
    return mean + controls.image_temperature[:, None] * scale * noise


Scores = tuple[jax.Array, jax.Array]  # ids and log-probabilities (B, W), see Rows.likely


def _draw_token(program: Program, params: dict, rows: Rows, needed: jax.Array) -> tuple[jax.Array, Scores]:
    """The next token (B,) of the rows where `needed` (B,) is True, with its scores.

    The text head does not run if no row needs it.
    """
    ids, controls = program.ids, rows.controls
    vocabulary, W = program.model.cfg.vlm.vocabulary, rows.likely.shape[-1]

    def scores(logits: jax.Array, token: jax.Array) -> Scores:
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
        best, which = jax.lax.top_k(logprobs, W - 1)
        own = jnp.take_along_axis(logprobs, token[:, None], axis=1)
        return jnp.concatenate([token[:, None], which], axis=1), jnp.concatenate([own, best], axis=1)

    def drawn() -> tuple[jax.Array, Scores]:
        model_logits = logits = apply(program.model, params, rows.text, method=Pretzel.text_logits)
        penalised = (
            (controls.repetition_penalty != 1) | (controls.presence_penalty != 0) | (controls.frequency_penalty != 0)
        )
        logits = jax.lax.cond(jnp.any(free & penalised), lambda: penalise(logits, rows), lambda: logits)
        logits = logits.at[:, jnp.array([ids.image, ids.vision_end, ids.pad])].set(-jnp.inf)  # never drawn as text
        no_more = jnp.where(controls.images_left == 0, -jnp.inf, logits[:, ids.vision_start])
        logits = logits.at[:, ids.vision_start].set(no_more)
        warm = logits / jnp.where(controls.temperature > 0, controls.temperature, 1)[:, None]
        some = free & (controls.temperature > 0) & ((controls.top_k > 0) | (controls.top_p < 1))
        cut = partial(keep_likely, warm, controls.top_k, controls.top_p)  # sorts the vocabulary
        warm = jax.lax.cond(jnp.any(some), lambda: jnp.where(some[:, None], cut(), warm), lambda: warm)
        keys = jax.vmap(jax.random.fold_in)(rows.key, rows.drawn)
        random = jax.vmap(jax.random.categorical)(keys, warm)
        token = jnp.where(controls.temperature > 0, random, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        if not W:
            return token, nothing
        return token, jax.lax.cond(
            jnp.any(free & controls.scored), lambda: scores(model_logits, token), lambda: nothing
        )

    B = len(needed)
    nothing = jnp.zeros((B, W), jnp.int32), jnp.zeros((B, W))
    free = needed & ~controls.image_next & (rows.in_image < 0)
    none = jnp.full((B,), vocabulary - 1, jnp.int32), nothing
    token, scored = jax.lax.cond(jnp.any(free), drawn, lambda: none)
    token = jnp.where(controls.image_next, ids.vision_start, token)
    return jnp.where(rows.in_image == program.model.cfg.tokens - 1, ids.vision_end, token), scored


def penalise(logits: jax.Array, rows: Rows) -> jax.Array:
    """Logits (B, V), lower at tokens that the rows hold already, by the penalties of `rows.controls`.

    The repetition penalty (arXiv 1909.05858) counts prompt and answer, and comes first. The presence and frequency
    penalties are OpenAI's and count the answer alone.
    """
    c, B = rows.controls, len(logits)
    repetition = c.repetition_penalty[:, None]
    logits = jnp.where(rows.seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    text = jnp.where(rows.tokens >= 0, rows.tokens, logits.shape[1])  # a record has negative ids where no text is
    count = jnp.zeros(logits.shape).at[jnp.arange(B)[:, None], text].add(1, mode="drop")
    return logits - c.presence_penalty[:, None] * (count > 0) - c.frequency_penalty[:, None] * count


def keep_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits (B, V) with -inf for all but the likely tokens.

    Keeps the `top_k` (B,) likeliest tokens (0: all), and of these the fewest whose probabilities sum to `top_p` (B,)
    (nucleus sampling, arXiv 1904.09751).
    """
    V = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    ordered = jnp.where(jnp.arange(V) < jnp.where(top_k > 0, top_k, V)[:, None], ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    within = (before < top_p[:, None]) & (probability > 0) | (jnp.arange(V) == 0)
    least = jnp.min(jnp.where(within, ordered, jnp.inf), axis=-1)
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)
