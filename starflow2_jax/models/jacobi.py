"""Inverts an autoregressive affine map, h_i = mean(h_<i) + scale(h_<i) z_i, faster than token by token.

Gauss-Seidel-Jacobi iteration (arXiv 2505.12849) solves chunks of tokens one after another. Within a chunk it guesses
all tokens and iterates h <- mean(h_<) + scale(h_<) z over all of them at once until they converge. After k passes the
first k tokens of a chunk are exact, so c passes over c tokens give the sequential inverse, however slow convergence
is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# The first guess of a chunk (B, c, D), from its noise z (B, c, D) and the token before it (B, D).
GUESSES = {
    "noise": lambda z, previous: z,
    "zeros": lambda z, previous: jnp.zeros_like(z),
    "previous": lambda z, previous: jnp.broadcast_to(previous[:, None], z.shape),
}


@dataclass(frozen=True)
class Jacobi:
    """How the tokens of one block are solved. Raises ValueError for values that are out of range or unknown."""

    chunk: int  # tokens c that are solved at once; 1: token by token
    tolerance: float = 1e-3  # a row has converged when mean((h_new - h)^2) <= tolerance mean(h_new^2) over the chunk
    guess: str = "noise"  # a key of GUESSES

    def __post_init__(self):
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(f"a chunk must be at least one token, not {self.chunk!r}")
        if not self.tolerance >= 0:
            raise ValueError(f"a tolerance must be at least 0, not {self.tolerance!r}")
        if self.guess not in GUESSES:
            raise ValueError(f"there is no guess {self.guess!r}; there are {', '.join(GUESSES)}")


SEQUENTIAL = Jacobi(chunk=1)
Schedule = tuple[Jacobi, ...]  # one for each block of a chain, the block nearest the data first

# (tokens before each of the chunk's (B, c, D), index of the chunk's first token, state) -> mean, scale (B, c, D), state
Predict = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array, Any]]


def solve(predict: Predict, z: jax.Array, begin: jax.Array, state: Any, method: Jacobi) -> tuple[jax.Array, jax.Array]:
    """Solve for h (B, S, D), given z (B, S, D) and `begin` (B, D), the token before the first.

    Returns h and the number of passes over each chunk, (B, chunks) int32; the last chunk may be shorter. `state` is
    what `predict` knows of the tokens before a chunk (a key/value cache). `predict` is called several times with the
    same first token, and must ignore what earlier calls wrote to the state from that token on.
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
    """Solve one chunk: z (B, c, D) and the token before it (B, D) -> h (B, c, D), state, passes (B,).

    A pass writes its guess into `state`, not its result; the returned h and state come from one pass. A row that has
    converged keeps its last guess. Further passes, which other rows still need, then compute the same result for it bit
    for bit, so no row depends on the others in its batch. After c passes the first c - 1 tokens of the
    guess are exact, and the state depends on these alone.
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
