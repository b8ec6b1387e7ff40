"""Random streams keyed by names, such as ("stage", "joint"). A new stage or source changes no other stream."""

import hashlib
import json

import jax


def stream_seed(seed: int, *names: str) -> int:
    """The seed (32 bits) of the stream that `names` identify in a run with `seed`. Nothing else changes it."""
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def stream_key(seed: int, *names: str) -> jax.Array:
    """The same stream as a JAX key."""
    return jax.random.key(stream_seed(seed, *names))
