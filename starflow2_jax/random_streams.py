"""Random streams keyed by names, such as ("stage", "joint"). A new stage or source changes no other stream."""

import hashlib
import json

import jax


def stream_seed(seed: int, *names: str) -> int:
    """The seed (32 bits) of the stream `names` in a run with the seed `seed`. It depends on nothing else."""
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def stream_key(seed: int, *names: str) -> jax.Array:
    """The JAX key of the stream `names`, from `stream_seed`."""
    return jax.random.key(stream_seed(seed, *names))
