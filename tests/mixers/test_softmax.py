"""Softmax attention as a layer, against a few lines of plain NumPy."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions
from zoo.encodings import Dims, Place, registry
from zoo.mixers import Style
from zoo.mixers.softmax import Softmax

DIMS = Dims(model_dim=12, num_heads=4, num_kv_heads=2, head_dim=6, num_layers=1, max_length=16)
STYLE = Style(stddev=0.5)


def layer(mixer=None, encodings=(), style=STYLE):
    return (mixer or Softmax()).module(DIMS, encodings, style)


def call(module, params, x, **kwargs):
    place = kwargs.pop("place", Place(Positions.arange(x.shape[1])))
    kwargs = {"mask": AttentionMask(), "shared": (), **kwargs}
    return module.apply(params, x, {}, place=place, **kwargs)


def initial(module, x):
    params = module.init(
        jax.random.key(0), x, {}, mask=AttentionMask(), shared=(), place=Place(Positions.arange(x.shape[1]))
    )
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), params)


def by_hand(params, x, source=None, allowed=None):
    p = jax.tree.map(np.asarray, params["params"])
    source = x if source is None else source
    q, k, v = (
        (np.asarray(s) @ p[name]["kernel"] + p[name]["bias"]).reshape(*s.shape[:2], -1, DIMS.head_dim)
        for name, s in (("query", x), ("key", source), ("value", source))
    )
    k, v = (np.repeat(a, DIMS.num_heads // DIMS.num_kv_heads, axis=2) for a in (k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(DIMS.head_dim)
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights, v).reshape(*x.shape[:2], -1)
    return out @ p["output"]["kernel"] + p["output"]["bias"]


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
def test_grouped_query_attention_by_hand(implementation):
    x = jax.random.normal(jax.random.key(2), (2, 5, 12))
    module = layer(Softmax(implementation=implementation))
    params = initial(module, x)
    y, side, cache = call(module, params, x)
    chex.assert_trees_all_close(np.asarray(y), by_hand(params, x), atol=1e-4)
    assert side == {} and cache is None


def test_the_window_and_the_callers_mask_both_count():
    x = jax.random.normal(jax.random.key(2), (1, 7, 12))
    module = layer(Softmax(window=(2, 1)))
    params = initial(module, x)
    r = np.arange(7)[None, :] - np.arange(7)[:, None]
    y, _, _ = call(module, params, x)
    chex.assert_trees_all_close(np.asarray(y), by_hand(params, x, allowed=(r >= -2) & (r <= 1)), atol=1e-4)
    y, _, _ = call(module, params, x, mask=AttentionMask(causal=True))
    chex.assert_trees_all_close(np.asarray(y), by_hand(params, x, allowed=(r >= -2) & (r <= 0)), atol=1e-4)


def test_a_window_at_least_as_long_as_the_input_is_full_attention():
    x = jax.random.normal(jax.random.key(2), (1, 6, 12))
    wide, full = layer(Softmax(window=(6, 6))), layer()
    params = initial(full, x)
    chex.assert_trees_all_close(call(wide, params, x)[0], call(full, params, x)[0], atol=1e-6)


def test_keys_and_values_may_come_from_a_context():
    x = jax.random.normal(jax.random.key(2), (2, 5, 12))
    source = jax.random.normal(jax.random.key(3), (2, 7, 12))
    module = layer()
    params = initial(module, x)
    y, _, _ = call(module, params, x, context=source, place=Place(Positions.arange(5), sources=Positions.arange(7)))
    chex.assert_trees_all_close(np.asarray(y), by_hand(params, x, source), atol=1e-4)


def test_two_encodings_that_set_different_scales_are_refused():
    encodings = (registry.build({"name": "t5", "scale": 1.0}), registry.build({"name": "t5", "scale": 0.5}))
    module = layer(encodings=encodings)
    x = jnp.zeros((1, 3, 12))
    with pytest.raises(ValueError, match="two encodings set the scale"):
        module.init(jax.random.key(0), x, {}, mask=AttentionMask(), shared=((), ()), place=Place(Positions.arange(3)))


def test_a_named_kernel_that_does_not_compute_this_raises():
    x = jnp.zeros((1, 3, 12))
    module = layer(Softmax(implementation="pallas_gpu"))
    with pytest.raises(ValueError, match="'pallas_gpu': it multiplies bfloat16 and float16, not float32"):
        initial(module, x)


def test_a_context_is_rotated_by_its_own_positions():
    rope = registry.build("rope")
    x = jax.random.normal(jax.random.key(2), (1, 4, 12))
    source = jax.random.normal(jax.random.key(3), (1, 6, 12))
    module = layer(encodings=(rope,))
    params = initial(layer(), x)

    def attended(start):
        place = Place(Positions.arange(4), sources=Positions.arange(6, start))
        shared = (rope.shared(DIMS).apply({}, place),)
        return call(module, params, x, context=source, place=place, shared=shared)[0]

    both = Place(Positions.arange(4, 3), sources=Positions.arange(6, 3))
    shifted = call(module, params, x, context=source, place=both, shared=(rope.shared(DIMS).apply({}, both),))[0]
    chex.assert_trees_all_close(attended(0), shifted, atol=1e-5)
    assert jnp.abs(attended(0) - attended(3)).max() > 1e-3


def test_a_context_without_its_positions_is_refused():
    x = jnp.zeros((1, 3, 12))
    module = layer()
    params = initial(module, x)
    with pytest.raises(ValueError, match=r"place\.sources"):
        call(module, params, x, context=x)


def test_the_mixers_window_and_the_masks_are_intersected():
    x = jax.random.normal(jax.random.key(2), (1, 7, 12))
    narrow, wide = layer(Softmax(window=(1, 2))), layer(Softmax(window=(3, 3)))
    params = initial(narrow, x)
    both = call(wide, params, x, mask=AttentionMask(window=(1, 2)))[0]
    chex.assert_trees_all_close(both, call(narrow, params, x)[0], atol=1e-6)
