"""What must hold for every encoding, from the shared table."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import pytest

from kernels.attention import Positions
from tests.encodings.table import ROWS, parameters, tiny_model, tokens
from zoo.encodings import registry
from zoo.mixers.softmax import Softmax

every = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
causal_rows = pytest.mark.parametrize("row", [r for r in ROWS if r.causal], ids=lambda r: r.name)


def test_every_encoding_has_a_row():
    assert {row.config["name"] for row in ROWS} == set(registry.names())


@every
def test_packed_documents_and_explicit_positions(row):
    """Packed equals padded; explicit positions equal counted ones; sliced tables equal gathered ones."""
    model = tiny_model(row.config)
    params = parameters(model)
    one, two = tokens(1, 5, 1), tokens(1, 7, 2)
    forward = jax.jit(
        lambda ids, segments, positions: model.apply(params, ids, segment_ids=segments, positions=positions).hidden
    )

    packed_ids = jnp.concatenate([one, two, jnp.zeros((1, 2), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 7 + [0] * 2])
    token = jnp.array([[*range(5), *range(7), 0, 0]])
    packed = forward(packed_ids, segments, Positions(token, contiguous=True))
    gathered = forward(packed_ids, segments, Positions(token))
    alone_one = forward(one, jnp.ones_like(one), None)
    alone_two = forward(two, jnp.ones_like(two), None)

    chex.assert_trees_all_close(packed[:, :5], alone_one, atol=2e-5)
    chex.assert_trees_all_close(packed[:, 5:12], alone_two, atol=2e-5)
    chex.assert_trees_all_close(gathered[:, :12], packed[:, :12], atol=2e-5)


@every
def test_shift(row):
    """Moving all positions changes nothing exactly where only r matters."""
    model = tiny_model(row.config)
    params = parameters(model)
    ids = tokens(1, 9)
    forward = jax.jit(lambda token: model.apply(params, ids, positions=Positions(token)).hidden)
    here, there = forward(jnp.arange(9)[None]), forward(jnp.arange(9)[None] + 6)
    difference = float(jnp.abs(here - there).max())
    assert (difference < 2e-5) == row.shift_invariant, difference


@every
def test_order_matters(row):
    """Swapping two tokens is seen by a later one, except without positions."""
    model = tiny_model(row.config)
    params = parameters(model)
    ids = jnp.array([[1, 2, 3, 4, 5, 6]])
    swapped = jnp.array([[1, 2, 4, 3, 5, 6]])
    forward = jax.jit(lambda x: model.apply(params, x).hidden[:, -1])
    difference = float(jnp.abs(forward(ids) - forward(swapped)).max())
    assert (difference < 1e-5) == (row.name == "none"), difference


@causal_rows
def test_decoding_step_by_step_equals_the_full_pass(row):
    """Also with a first row that is padded on the left."""
    model = tiny_model(row.causal, causal=True)
    params = parameters(model)
    ids = tokens(2, 7)
    pad = jnp.array([2, 0])
    segments = (jnp.arange(7)[None] >= pad[:, None]).astype(jnp.int32)
    token = jnp.maximum(jnp.arange(7)[None] - pad[:, None], 0)
    full = jax.jit(lambda i, s, p: model.apply(params, i, segment_ids=s, positions=Positions(p)).hidden)(
        ids, segments, token
    )

    step = jax.jit(lambda i, s, p, c: model.apply(params, i, segment_ids=s, positions=p, cache=c))
    cache, outputs = model.init_cache(2, 9), []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 7)):
        out = step(ids[:, start:stop], segments[:, start:stop], token[:, start:stop], cache)
        cache = out.cache
        outputs.append(out.hidden)
    decoded = jnp.concatenate(outputs, axis=1)
    chex.assert_trees_all_close(decoded[0, 2:], full[0, 2:], atol=2e-5)
    chex.assert_trees_all_close(decoded[1], full[1], atol=2e-5)


@causal_rows
def test_causal_by_gradient(row):
    """No output depends on a later input: the gradient is exactly zero, not small."""
    model = tiny_model(row.causal, causal=True)
    params = parameters(model)
    ids = tokens(1, 6)

    def third(table):
        moved = {
            "params": {
                **params["params"],
                "embeddings": {**params["params"]["embeddings"], "token": {"embedding": table}},
            }
        }
        return model.apply(moved, ids).hidden[0, 2].sum()

    distinct = jnp.arange(6)[None]
    ids = distinct
    grad = jax.jit(jax.grad(third))(params["params"]["embeddings"]["token"]["embedding"])
    assert jnp.all(grad[3:6] == 0)
    assert jnp.any(grad[:3] != 0)


@every
def test_scanned_equals_unrolled_by_the_plain_twin(row):
    """One table that layers share stays one: parameter shapes, values and gradients, scanned against unrolled.

    The unrolled layers attend by the reference, so the gradient of every parameter is also that of the plain twin.
    """
    plain = Softmax(implementation="reference")
    scanned, unrolled = tiny_model(row.config), tiny_model(row.config, stages=2, mixer=plain)
    params = parameters(scanned)["params"]
    split = {k: v for k, v in params.items() if k != "stage_0"}
    for layer in range(2):
        split[f"stage_{layer}"] = jax.tree.map(lambda a, layer=layer: a[layer : layer + 1], params["stage_0"])
    own = jax.eval_shape(unrolled.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    chex.assert_trees_all_equal_shapes(own, split)

    ids = tokens(2, 6)
    weights = jax.random.normal(jax.random.key(9), (2, 6, 16))

    def loss(model):
        return jax.jit(jax.value_and_grad(lambda p: (model.apply({"params": p}, ids).hidden * weights).sum()))

    one, one_grad = loss(scanned)(params)
    two, two_grad = loss(unrolled)(split)
    joined = {k: v for k, v in two_grad.items() if not k.startswith("stage_")}
    joined["stage_0"] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), two_grad["stage_0"], two_grad["stage_1"])
    chex.assert_trees_all_close(one, two, rtol=1e-5)
    chex.assert_trees_all_close(one_grad, joined, atol=2e-4, rtol=1e-4)
