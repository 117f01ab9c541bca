"""DPE: the layers that refine positions at the input, and the loss that orders them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.encodings.table import tiny_model
from zoo.config import load_config
from zoo.encodings import registry
from zoo.encodings.dpe import WAVES, order_loss
from zoo.encodings.sinusoidal import sinusoids
from zoo.errors import UserError
from zoo.models import build
from zoo.models.parameters import has_layer_axis, parameter_shapes

IDS = jnp.array([[3, 1, 4, 1, 5, 9]])
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 0]])


def test_golden_order_loss():
    """By hand: PE(3) in four channels is sin 3, cos 3, sin 0.03, cos 0.03; PE(0) is 0, 1, 0, 1. Padding counts for nothing."""
    refined = jnp.array([[[0.0, -1.0, 0.0, 1.0], [0.5, 1.0, 0.0, 1.0], [9.0, 9.0, 9.0, 9.0]]])
    total, weight = order_loss(refined, jnp.array([[3, 0, 1]]), jnp.array([[1, 1, 0]]))
    expected = 0.141120**2 + 0.010008**2 + 0.029996**2 + 0.000450**2 + 0.25
    np.testing.assert_allclose(total, expected, atol=1e-6)
    assert weight == 2
    order = jnp.array([[2, 0, 3, 1]])
    assert order_loss(sinusoids(WAVES, order, 8), order, jnp.ones((1, 4)))[0] == 0


def test_no_layers_are_sinusoids():
    model, sinusoid = tiny_model({"name": "dpe", "layers": 0}), {"name": "sinusoidal", "scale_embeddings": False}
    plain = tiny_model(sinusoid)
    params = jax.jit(plain.init)(jax.random.key(0), IDS)
    chex.assert_trees_all_equal(*(jax.jit(m.apply)(params, IDS).hidden for m in (model, plain)))


def test_positions_are_refined_by_the_tokens_of_the_document():
    """What is added at the input is the stack's output, by hand; a token of another document, or padding, does not move it."""
    model = tiny_model({"name": "dpe"})
    params = jax.jit(model.init)(jax.random.key(0), IDS)
    run = jax.jit(lambda p, ids: model.apply(p, ids, segment_ids=SEGMENTS, hidden_states=True))
    out = run(params, IDS)
    assert out.refined.shape == (1, 6, 16)
    embeddings = params["params"]["embeddings"]
    x = embeddings["token"]["embedding"][IDS] + embeddings["token_type"]["embedding"][0] + out.refined
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    chex.assert_trees_all_close(out.hidden_states[0], normed, atol=1e-4)
    moved = [run(params, IDS.at[0, at].set(7)).refined - out.refined for at in (1, 4, 5)]
    assert all((jnp.abs(moved[0][0, token]) > 1e-4).any() for token in range(4))
    assert (jnp.abs(moved[1][0, :4]) < 1e-6).all() and (jnp.abs(moved[2][0, :5]) < 1e-6).all()

    def loss(p):
        return order_loss(model.apply(p, IDS).refined, jnp.array([[1, 0, 2, 3, 5, 4]]), jnp.ones((1, 6)))[0]

    gradients = jax.jit(jax.grad(loss))(params)["params"]["encodings"]["0"]["refinement"]
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradients["stage_0"]["block_0"]["mixer"]["value"]))
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(gradients["stage_0"]))


def test_a_config_makes_it_at_the_width_of_the_embeddings():
    overrides = [("encoding", "dpe:layers=3"), ("model.vocab_size", "50"), ("model.embedding_dim", "12")]
    model = build(load_config("configs/demo.py:pretrain", overrides).to_dict())
    shapes = parameter_shapes(model)
    name = "encodings/0/refinement/stage_0/block_0/mixer/query/kernel"
    assert shapes[name] == (3, 12, 128) and has_layer_axis(tuple(name.split("/")))


def test_refusals():
    with pytest.raises(UserError, match="'dpe' is not defined for a causal mask"):
        tiny_model({"name": "dpe"}, causal=True).check()
    with pytest.raises(UserError, match="layers=-1; it must be 0 or more"):
        registry.build({"name": "dpe", "layers": -1})
