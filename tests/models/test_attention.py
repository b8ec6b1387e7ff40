import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax.models import attention
from starflow2_jax.models.layers import Transformer, TransformerConfig


@pytest.mark.parametrize("B, S, H, J", [(1, 1, 4, 4), (3, 1, 4, 2), (2, 5, 4, 1)])
def test_attention_to_a_cache_is_attention(B, S, H, J):
    """Attention in a cache's layout equals `attend` over whole rows."""
    K, C = 8, 16
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((B, S, H, K), (B, C, J, K), (B, C, J, K)))
    mask = attention.cached_mask(jnp.arange(B) + 2, S, C)
    found = attention.attend_cached(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, 1.5)
    np.testing.assert_allclose(found, attention.attend(q, k, v, mask, 1.5), atol=1e-6)


@pytest.mark.parametrize("B", [1, 3])
def test_slots_of_each_row(B):
    J, C, K, S = 2, 8, 4, 3
    rng = np.random.default_rng(0)
    stored, new = rng.standard_normal((B, J, C, K)), rng.standard_normal((B, S, J, K))
    start = np.array([4, 0, 5])[:B]
    found = attention.write_cache(jnp.asarray(stored), jnp.asarray(new), jnp.asarray(start))
    for row, first in enumerate(start):
        stored[row, :, first : first + S] = new[row].swapaxes(0, 1)
    np.testing.assert_array_equal(found, stored.astype(np.float32))


@pytest.mark.parametrize("B", [1, 3])
def test_a_step_of_decoding_copies_no_cache(B):
    model = Transformer(TransformerConfig(layers=2, width=32, heads=2, mlp_hidden=48, scan=False))
    x, angles, cache = jnp.ones((B, 1, 32)), jnp.ones((B, 1, 8)), model.empty_cache(B, 64)
    params = model.init(jax.random.key(0), x, angles)

    def decode(cache):
        def step(carry):
            number, x, cache = carry
            return number + 1, *model.apply(params, x, angles, cache=cache)

        return jax.lax.while_loop(lambda carry: carry[0] < 9, step, (0, x, cache))

    text = jax.jit(decode, donate_argnums=0).lower(cache).compile().as_text()
    assert re.search(rf"f32\[{B},2,64,16\]", text)
    assert not re.findall(rf"f32\[{B},2,64,16\]\S* copy\(", text)
