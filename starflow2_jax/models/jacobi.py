"""Inverting an autoregressive affine map, h_i = mean(h_<i) + scale(h_<i) z_i, faster than token by token.

Gauss-Seidel-Jacobi (arXiv 2505.12849): chunks of tokens are solved one after another; within a chunk all tokens are
guessed and iterated at once, h <- mean(h_<) + scale(h_<) z, until they stand still. After k passes over a chunk its
first k tokens are exact, so c passes over c tokens are the sequential inverse, however slowly the rest comes to rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

# From a chunk's noise z (B, c, D) and the token before it (B, D): where the iteration begins.
GUESSES = {
    "noise": lambda z, previous: z,
    "zeros": lambda z, previous: jnp.zeros_like(z),
    "previous": lambda z, previous: jnp.broadcast_to(previous[:, None], z.shape),
}


@dataclass(frozen=True)
class Jacobi:
    """How the tokens of one block are solved. Raises ValueError for numbers that mean nothing."""

    chunk: int  # tokens c solved at once; 1: token by token
    tolerance: float = 1e-3  # a row stands still when mean((h_new - h)^2) <= tolerance mean(h_new^2) over the chunk
    guess: str = "noise"  # of GUESSES

    def __post_init__(self):
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(f"a chunk is at least one token, not {self.chunk!r}")
        if not self.tolerance >= 0:
            raise ValueError(f"a tolerance is at least 0, not {self.tolerance!r}")
        if self.guess not in GUESSES:
            raise ValueError(f"there is no guess {self.guess!r}; there are {', '.join(GUESSES)}")


SEQUENTIAL = Jacobi(chunk=1)
Schedule = tuple[Jacobi, ...]  # of a chain: one a block, the block nearest the data first

# (tokens before each of the chunk's (B, c, D), index of the chunk's first token, state) -> mean, scale (B, c, D), state
Predict = Callable[[jax.Array, jax.Array, object], tuple[jax.Array, jax.Array, object]]


def solve(predict: Predict, z: jax.Array, begin: jax.Array, state, method: Jacobi) -> tuple[jax.Array, jax.Array]:
    """z (B, S, D), the token before the first `begin` (B, D) -> h (B, S, D) and passes (B, chunks) int32.

    `state` is how `predict` sees the tokens before a chunk (a key/value cache). It is called again and again with the
    same first token, and must forget what earlier calls wrote there and beyond. The last chunk may be a shorter one.
    """
    B, S, D = z.shape
    c = min(method.chunk, max(S, 1))
    whole = S // c * c

    def next_chunk(carry, z):
        first, previous, state = carry
        h, state, passes = _settle(lambda seen, state: predict(seen, first, state), z, previous, state, method)
        return (first + z.shape[1], h[:, -1], state), (h, passes)

    carry = jnp.zeros((), jnp.int32), begin, state
    carry, (h, passes) = jax.lax.scan(next_chunk, carry, z[:, :whole].reshape(B, -1, c, D).swapaxes(0, 1))
    h, passes = h.swapaxes(0, 1).reshape(B, whole, D), passes.T
    if whole == S:
        return h, passes
    _, (rest, more) = next_chunk(carry, z[:, whole:])
    return jnp.concatenate([h, rest], axis=1), jnp.concatenate([passes, more[:, None]], axis=1)


def _settle(predict, z, previous, state, method: Jacobi):
    """One chunk: z (B, c, D) and the token before it (B, D) -> h (B, c, D), state, passes (B,).

    What a pass writes into `state` is of its guess, not of its result; h and the state that are returned are one pass's.
    A row at rest keeps the guess it came to rest with: the other rows' passes only repeat its last one, bit for bit. So
    no row depends on its batch. After c passes the guess's first c - 1 tokens, all that the state reads, are exact.
    """

    def run(guess, state):
        mean, scale, state = predict(jnp.concatenate([previous[:, None], guess[:, :-1]], axis=1), state)
        return mean + scale * z, state

    B, c, _ = z.shape
    if c == 1:  # nothing is guessed
        return *run(z, state), jnp.ones(B, jnp.int32)

    def unsettled(carry):
        *_, moving, passes = carry
        return jnp.any(moving & (passes < c))

    def body(carry):
        guess, _, state, moving, passes = carry
        h, state = run(guess, state)
        passes = passes + moving
        moving = ~(jnp.mean((h - guess) ** 2, (1, 2)) <= method.tolerance * jnp.mean(h**2, (1, 2)))
        return jnp.where(moving[:, None, None], h, guess), h, state, moving, passes

    guess = GUESSES[method.guess](z, previous)
    carry = guess, guess, state, jnp.ones(B, bool), jnp.zeros(B, jnp.int32)
    _, h, state, _, passes = jax.lax.while_loop(unsettled, body, carry)
    return h, state, passes
