"""FNet's mixing in a model: what it computes under the scan, what padding does to it, and what it refuses."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask
from tests.encodings.table import parameters, tiny_model, tokens
from zoo.encodings import Place
from zoo.errors import UserError
from zoo.mixers.fourier import Fourier

LEARNED = {"name": "learned"}


def test_the_layers_of_a_model_by_hand():
    """x ← x + Re(F x̂ F), x ← x + f(x̂), with x̂ the normalised x, twice; then the norm. The gradient is tested with all pairs."""
    model = tiny_model(LEARNED, mixer=Fourier())
    params = parameters(model)
    out = jax.jit(lambda i: model.apply(params, i, hidden_states=True))(tokens(2, 7))
    block = jax.tree.map(np.asarray, params["params"]["stage_0"]["block_0"])
    assert set(block) == {"norm_mixer", "norm_feed_forward", "feed_forward"}, "no parameters of its own"

    def norm(x, name, layer):
        x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        return x * block[name]["scale"][layer] + block[name]["bias"][layer]

    x = np.asarray(out.hidden_states[0], np.float64)
    for layer in range(2):
        x = x + np.fft.fft2(norm(x, "norm_mixer", layer)).real
        up, down = (jax.tree.map(lambda a, at=layer: a[at], block["feed_forward"][n]) for n in ("up", "down"))
        h = norm(x, "norm_feed_forward", layer) @ up["kernel"] + up["bias"]
        x = x + np.asarray(jax.nn.gelu(h, approximate=False)) @ down["kernel"] + down["bias"]
        np.testing.assert_allclose(out.hidden_states[layer + 1], x, rtol=2e-5, atol=2e-4)


def test_padding_is_a_token_only_where_that_is_said():
    ids, real = jnp.pad(tokens(2, 5), [(0, 0), (0, 2)]), jnp.array([[1] * 5 + [0] * 2] * 2)
    refusing, mixing = (tiny_model(LEARNED, mixer=Fourier(pads=pads)) for pads in (None, "tokens"))
    params = parameters(mixing)
    with pytest.raises(
        UserError, match=r"'fourier' does not honour the mask's key_segments, query_segments: .*pads='tokens'"
    ):
        refusing.apply(params, ids, segment_ids=real)

    run = jax.jit(lambda i, s: mixing.apply(params, i, segment_ids=s).hidden)
    padded = run(ids, real)
    chex.assert_trees_all_close(padded, run(ids, jnp.ones_like(ids)), atol=1e-6)
    other = run(ids.at[:, -1].set(11), real)
    assert jnp.abs(other - padded)[:, :5].max() > 1e-2, "padding is seen"

    several = run(ids, real.at[1, 3:5].set(2))
    chex.assert_trees_all_close(several[0], padded[0])
    assert jnp.all(jnp.isnan(several[1])), "two documents in one row cannot be kept apart"


def test_what_it_refuses():
    with pytest.raises(UserError, match="'fourier' is not defined for a causal mask"):
        tiny_model(LEARNED, mixer=Fourier(), causal=True).check()
    with pytest.raises(UserError, match="'rope' brings 'transform', but the mixer has no product of queries and keys"):
        tiny_model({"name": "rope"}, mixer=Fourier()).check()
    x = jnp.zeros((1, 3, 4))
    with pytest.raises(UserError, match="cannot take keys and values from a context"):
        Fourier().module(None, (), None).apply({}, x, {}, mask=AttentionMask(), shared=(), place=Place(None), context=x)
    with pytest.raises(ValueError, match="'fourier' cannot decode"):
        Fourier().init_cache(None, (), 1, 4, jnp.float32)
