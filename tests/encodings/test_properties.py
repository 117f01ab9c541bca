"""What must hold for every encoding, from the shared table."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from kernels.attention import Positions
from tests.encodings.table import ROWS, parameters, tiny_model, tokens
from zoo.encodings import registry
from zoo.mixers.softmax import Softmax

every = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
# What compiles several programs a row is run by `make test` for rows that between them have every way to fail, and by
# `make test-all` for the others, too: every kind of cache, all that could look ahead, every way to share between layers.
CACHES = {"learned", "rope", "xpos", "gta", "fox", "bipe_alibi", "cpe", "cope", "path_fox"}
AHEAD = {"rope", "fox", "cpe", "cope", "path_fox"}
SHARING = {"learned", "t5", "nezha", "deberta", "fire", "tupe", "gta", "huang_m1", "path_fox"}


def costly(rows, covering):
    marks = ((row, () if row.name in covering else pytest.mark.slow) for row in rows)
    return pytest.mark.parametrize("row", [pytest.param(row, marks=mark, id=row.name) for row, mark in marks])


CAUSAL = [row for row in ROWS if row.causal]


def test_every_encoding_has_a_row():
    assert {row.config["name"] for row in ROWS} == set(registry.names())
    assert {row.name for row in ROWS} >= CACHES | AHEAD | SHARING


LENGTH = 14


@functools.cache  # One compilation per kind of positions serves the next three properties.
def forward(model):
    """The model as a function of ids, segments and positions, each `[1, LENGTH]`; shorter ids are padded with segment 0."""
    params = parameters(model)
    run = jax.jit(lambda ids, segments, positions: model.apply(params, ids, segment_ids=segments, positions=positions))

    def padded(ids, segments=None, positions=None):
        more = [(0, 0), (0, LENGTH - ids.shape[1])]
        segments = jnp.ones_like(ids) if segments is None else segments
        # As the model counts them where none are given (tests/models); said, so that this is no program of its own.
        positions = Positions(jnp.arange(LENGTH)[None], contiguous=True) if positions is None else positions
        return run(jnp.pad(ids, more), jnp.pad(segments, more), positions).hidden[:, : ids.shape[1]]

    return padded


@every
def test_packed_documents_and_explicit_positions(row):
    """Packed equals padded; explicit positions equal counted ones; sliced tables equal gathered ones."""
    run = forward(tiny_model(row.config))
    one, two = tokens(1, 5, 1), tokens(1, 7, 2)
    ids = jnp.concatenate([one, two], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 7])
    token = jnp.array([[*range(5), *range(7), 0, 0]])
    packed = run(ids, segments, Positions(token, contiguous=True))
    chex.assert_trees_all_close(packed[:, :5], run(one), atol=2e-5)
    chex.assert_trees_all_close(packed[:, 5:], run(two), atol=2e-5)
    chex.assert_trees_all_close(run(ids, segments, Positions(token)), packed, atol=2e-5)


@every
def test_shift(row):
    """Moving all positions changes nothing exactly where only r matters."""
    run, ids, token = forward(tiny_model(row.config)), tokens(1, 9), jnp.arange(LENGTH)[None]
    difference = float(jnp.abs(run(ids, None, Positions(token)) - run(ids, None, Positions(token + 6))).max())
    assert (difference < 2e-5) == row.shift_invariant, difference


@every
def test_order_matters(row):
    """Swapping two tokens is seen by a later one, except without positions."""
    run = forward(tiny_model(row.config))
    ids, swapped = jnp.array([[1, 2, 3, 4, 5, 6]]), jnp.array([[1, 2, 4, 3, 5, 6]])
    difference = float(jnp.abs(run(ids) - run(swapped))[:, -1].max())
    assert (difference < 1e-5) == (row.name == "none"), difference


@costly(CAUSAL, CACHES)
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


@costly(CAUSAL, AHEAD)
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


@costly(ROWS, SHARING)
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
