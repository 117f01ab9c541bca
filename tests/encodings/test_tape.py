"""TAPE: one layer of its state against golden values, and its special cases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions, attention, logits
from tests.encodings.table import parameters, tiny_model, tokens
from tests.encodings.test_golden import K, Q, close
from zoo.encodings import Dims, Place, Project, Site, registry
from zoo.errors import UserError

DIMS = Dims(model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, num_layers=1, max_length=16)
CAUSAL = AttentionMask(causal=True)
QUERIES, KEYS = (jnp.asarray(np.stack([a, a[:, ::-1]], axis=1), jnp.float32)[None] for a in (Q, K))
X = jnp.zeros((1, 4, 8))


def site(z, **place):
    return Site(X, X, {"tape": z}, Project(None, None, None), Place(Positions.arange(4), span=3, **place), CAUSAL)


def one_layer(gain, token=None, **config):
    """The state after attention, and that before it."""
    part = registry.build({"name": "tape", **config})
    place = Place(Positions(jnp.arange(4)[None] if token is None else token), span=3)
    z = part.init_side(DIMS).apply({}, X, place)
    layer, at = part.layer(DIMS), site(z)
    params = {"params": {"gain": jnp.asarray(gain, jnp.float32)}}
    made = layer.apply(params, None, QUERIES, KEYS, KEYS, at)
    out = attention(made.q, made.k, made.v, mask=CAUSAL)
    out, side = layer.apply(params, out, None, at.side, at, method="back")
    return out, side["tape"], z


def after(z):
    n = jnp.arange(4.0)
    gate_inputs = jnp.stack([jnp.sin(n), jnp.cos(n), jnp.sin(2 * n)], axis=1)[None]
    params = {
        "content": jnp.eye(3),
        "up": jnp.array([[0.1, 0.3, -0.1], [-0.2, 0.1, 0.2]]),
        "down": jnp.array([[0.2, 0.1], [0.1, -0.1], [-0.3, 0.2]]),
    }
    module = registry.build({"name": "tape", "gates": 3}).after_feed_forward(DIMS)
    return module.apply({"params": params}, z, gate_inputs, Place(Positions.arange(4)))


def test_golden_values():
    z = after(one_layer([0.3, 0.2])[1])
    close(z.real[0, 3], [[-1.067494, 1.288113], [-1.047172, 1.209698]])
    close(z.imaginary[0, 3], [[0.294002, 0.035542], [0.231369, 0.034063]])
    close(logits((), z.turn(QUERIES), z.turn(KEYS))[0, 0, 3], [-0.061107, 0.654484, 1.457043, 1.445583])


def test_the_full_matrix_acts_by_its_columns_and_a_diagonal_one_is_the_gain():
    gain = one_layer([0.3, 0.2])[1]
    full = one_layer([[0.3, 0.0], [0.0, 0.2]], mixing="full")[1]
    chex.assert_trees_all_close(gain, full, atol=1e-6)


def test_a_moved_start_turns_the_state_and_leaves_the_logits():
    one, two = (after(one_layer([0.3, 0.2], jnp.arange(4)[None] + shift)[1]) for shift in (0, 7))
    scores = [logits((), z.turn(QUERIES), z.turn(KEYS)) for z in (one, two)]
    chex.assert_trees_all_close(*scores, atol=2e-6)
    assert jnp.abs(one.real - two.real).max() > 0.1


def test_at_the_start_it_is_rope():
    tape, rope = tiny_model({"name": "tape"}), tiny_model({"name": "rope"})
    params, ids = parameters(rope), tokens(1, 6)
    own = jax.jit(tape.init)(jax.random.key(0), ids)["params"]

    def filled(mine, theirs):
        return {
            k: filled(v, theirs[k]) if isinstance(v, dict) and k in theirs else theirs.get(k, v)
            for k, v in mine.items()
        }

    chex.assert_trees_all_close(
        tape.apply({"params": filled(own, params["params"])}, ids).hidden, rope.apply(params, ids).hidden, atol=1e-5
    )


def test_a_context_is_refused():
    z = one_layer([0.0, 0.0])[2]
    layer = registry.build("tape").layer(DIMS)
    with pytest.raises(UserError, match=r"'tape'.*cannot be used with attention to a context"):
        layer.init(jax.random.key(0), None, QUERIES, KEYS, KEYS, site(z, sources=Positions.arange(4)))
