"""TUPE: the concatenated product against the sum of two, and [CLS]."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels.attention import Positions
from zoo.encodings import Dims, Place, logits, registry
from zoo.errors import UserError

T, N, H = 6, 2, 4
Q, K = (jax.random.normal(jax.random.key(seed), (1, T, N, H)) for seed in (0, 1))
CONTENT = jnp.einsum("btnh,bsnh->bnts", Q, K) / (2 * H) ** 0.5
PAPER = {"name": "tupe", "form": "paper"}


def drawn(config):
    module = registry.build(config).shared(Dims(N * H, N, N, H, 1, T))
    params = module.init(jax.random.key(0), Place(Positions.arange(T), span=T - 1))["params"]
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def normalised(p, norm):
    centred = p - p.mean(-1, keepdims=True)
    return centred / jnp.sqrt(p.var(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]


def test_the_released_form_is_a_bias_with_two_scalars_for_cls():
    params = drawn("tupe")
    p = normalised(params["table"], params["norm"])
    u = {name: (p @ params[name]["kernel"] + params[name]["bias"]).reshape(T + 1, N, H) for name in ("query", "key")}
    products = jnp.einsum("tnh,snh->nts", u["query"], u["key"]) / (2 * H) ** 0.5
    bias = products[:, 1:, 1:].at[:, :, 0].set(products[:, 1, 1][:, None])
    bias = bias.at[:, 0, :].set(products[:, 0, 0][:, None])
    chex.assert_trees_all_close(logits("tupe", Q, K, params={"shared": params}), CONTENT + bias, atol=1e-4, rtol=1e-4)


def test_the_papers_scalars_are_free():
    params = drawn(PAPER)
    params["cls"] = jnp.array([[0.3, 0.5], [-0.2, 0.7]])
    part = logits(PAPER, Q, K, params={"shared": params}) - CONTENT
    chex.assert_trees_all_close(part[0, :, 0], jnp.broadcast_to(params["cls"][0][:, None], (N, T)), atol=1e-5)
    chex.assert_trees_all_close(part[0, :, 1:, 0], jnp.broadcast_to(params["cls"][1][:, None], (N, T - 1)), atol=1e-5)


def test_without_positions_it_is_content_at_half_the_scale():
    params = jax.tree.map(jnp.zeros_like, drawn(PAPER))
    chex.assert_trees_all_close(logits(PAPER, Q, K, params={"shared": params}), CONTENT, atol=1e-6)


def test_beyond_the_table_is_an_error():
    part = registry.build("tupe")
    with pytest.raises(UserError, match=r"'tupe' has max_length=4 positions, the sequence has 9.*relative encoding"):
        part.init_cache(Dims(N * H, N, N, H, 1, 4), 1, 9, jnp.float32)
    params = drawn("tupe")
    assert params["table"].shape == (T + 1, N * H)


def test_tupe_r_is_the_sum_with_t5():
    assert zoo.compatible(("tupe", {"name": "t5", "scale": None}), "softmax")
    assert not zoo.compatible(("tupe", "rope"), "softmax")
    assert np.isclose(registry.build("tupe").layer(Dims(8, 2, 2, 4, 1, 6)).scale, 8**-0.5)
