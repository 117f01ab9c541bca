"""The Transformer: padding, heads, dropout, remat, dtypes, decoding's edge, hidden states."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import Positions
from tests.encodings.table import DIMS, parameters, tiny_model, tokens
from zoo.errors import UserError
from zoo.layers.block import BlockSpec
from zoo.mixers import Style
from zoo.models import Stage, Transformer
from zoo.models.parameters import has_layer_axis, parameter_shapes


def test_padding_changes_nothing_and_rubbish_in_it_neither():
    model = tiny_model({"name": "nezha", "limit": 3})
    params = parameters(model)
    ids = tokens(2, 5)
    alone = model.apply(params, ids).hidden
    forward = jax.jit(lambda ids, segments: model.apply(params, ids, segment_ids=segments).hidden)
    segments = jnp.array([[1] * 5 + [0] * 3] * 2)
    for rubbish in (0, 7):
        padded = jnp.concatenate([ids, jnp.full((2, 3), rubbish)], axis=1)
        chex.assert_trees_all_close(forward(padded, segments)[:, :5], alone, atol=1e-5)


def test_rows_do_not_see_each_other():
    model = tiny_model({"name": "rope"})
    params = parameters(model)
    ids = tokens(3, 6)
    both, one = model.apply(params, ids).hidden, model.apply(params, ids[1:2]).hidden
    chex.assert_trees_all_close(both[1:2], one, atol=1e-5)


def test_grouped_heads_equal_multi_head_with_repeated_keys_and_values():
    grouped = tiny_model({"name": "alibi"})
    full_dims = dataclasses.replace(DIMS, num_kv_heads=DIMS.num_heads)
    full = grouped.clone(dims=full_dims)
    params = parameters(grouped)
    repeated = jax.tree.map(lambda a: a, params)
    mixer = repeated["params"]["stage_0"]["block_0"]["mixer"]
    groups = DIMS.num_heads // DIMS.num_kv_heads

    def repeat(a):
        return jnp.repeat(a.reshape(*a.shape[:-1], DIMS.num_kv_heads, DIMS.head_dim), groups, -2).reshape(
            *a.shape[:-1], -1
        )

    for name in ("key", "value"):
        mixer[name] = jax.tree.map(repeat, mixer[name])
    ids = tokens(1, 6)
    chex.assert_trees_all_close(grouped.apply(params, ids).hidden, full.apply(repeated, ids).hidden, atol=1e-5)


def test_hidden_states_end_in_the_output():
    post = Transformer(29, DIMS, (Stage((BlockSpec(),), 2),), style=Style(stddev=0.3))
    params = parameters(post)
    out = post.apply(params, tokens(2, 4), hidden_states=True)
    assert out.hidden_states.shape == (3, 2, 4, 16)
    np.testing.assert_array_equal(out.hidden_states[-1], out.hidden)
    pooled = params["params"]["pooler"]
    chex.assert_trees_all_close(out.pooled, jnp.tanh(out.hidden[:, 0] @ pooled["kernel"] + pooled["bias"]), atol=1e-5)


def test_dropout_is_on_in_training_only_and_repeats_with_its_key():
    model = tiny_model({"name": "nezha", "limit": 3}).clone(style=Style(stddev=0.3, dropout=0.2, attention_dropout=0.2))
    params, ids = parameters(model), tokens(2, 6)
    train = jax.jit(lambda key: model.apply(params, ids, train=True, rngs={"dropout": key}).hidden)
    still = model.apply(params, ids).hidden
    a, b, c = train(jax.random.key(1)), train(jax.random.key(1)), train(jax.random.key(2))
    np.testing.assert_array_equal(a, b)
    assert jnp.abs(a - c).max() > 1e-3 and jnp.abs(a - still).max() > 1e-3


@pytest.mark.parametrize("policy", ["full", "dots", "dots_no_batch"])
def test_remat_changes_no_gradient(policy):
    model = tiny_model({"name": "t5"}).clone(style=Style(stddev=0.3, dropout=0.2))
    params, ids = parameters(model), tokens(1, 5)

    def grads(m):
        def loss(p):
            return (m.apply(p, ids, train=True, rngs={"dropout": jax.random.key(3)}).hidden ** 2).sum()

        return jax.jit(jax.grad(loss))(params)

    chex.assert_trees_all_close(grads(model), grads(model.clone(remat_policy=policy)), rtol=1e-4, atol=1e-4)


@pytest.mark.cpu  # by what a fused program's text says
def test_only_full_remat_multiplies_again():
    """The policies that keep products keep all of them, and attention's results."""
    model = tiny_model({"name": "t5"}).clone(style=Style(stddev=0.3, dropout=0.2))
    params, ids = parameters(model), tokens(1, 5)

    def products(policy):
        def loss(p):
            m = model.clone(remat_policy=policy)
            return (m.apply(p, ids, train=True, rngs={"dropout": jax.random.key(3)}).hidden ** 2).sum()

        return jax.jit(jax.grad(loss)).lower(params).compile().as_text().count(" dot(")

    assert products("dots") == products("dots_no_batch") == products("none") < products("full")


@pytest.mark.cpu  # by what a fused program's text says
def test_layers_laid_out_compute_what_their_loop_does():
    looped = tiny_model({"name": "t5"}).clone(style=Style(stddev=0.3, dropout=0.2))
    laid_out, remat = looped.clone(unroll=2), looped.clone(unroll=2, remat_policy="full")
    params, ids = parameters(looped), tokens(1, 5)
    chex.assert_trees_all_equal(params, parameters(laid_out))

    def compiled(m):
        def loss(p):
            return (m.apply(p, ids, train=True, rngs={"dropout": jax.random.key(3)}).hidden ** 2).sum()

        return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

    programs = [compiled(m) for m in (looped, laid_out, remat)]
    # Products, exponentials and square roots of one size are what the layers hold: in a loop they stand once.
    counts = [program.as_text().count(" exponential(") for program in programs]
    assert counts[1] > counts[0]
    assert counts[2] > counts[1], "what the backward pass should compute again was merged with the forward pass"
    results = [program(params) for program in programs]
    chex.assert_trees_all_close(results[1:], [results[0]] * 2, rtol=1e-4, atol=1e-4)


@pytest.mark.cpu  # whose loop is what to do without
def test_where_there_is_a_gpu_layers_are_laid_out_but_not_to_be_initialised(monkeypatch):
    model, ids = tiny_model({"name": "t5"}), tokens(1, 5)
    params = parameters(model)

    def loops(function, *arguments):
        return jax.jit(function).lower(*arguments).as_text().count("stablehlo.while")

    assert loops(model.apply, params, ids) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loops(model.apply, params, ids) == 0
    assert loops(model.clone(unroll=1).apply, params, ids) == 1
    assert loops(model.init, jax.random.key(0), ids) > 0


def test_bfloat16_stays_near_float32_with_float32_parameters():
    model = tiny_model({"name": "nezha", "limit": 3})
    half = model.clone(style=Style(stddev=0.3, dtype=jnp.bfloat16))
    params, ids = parameters(model), tokens(2, 6)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half.init(jax.random.key(0), ids)))
    low, high = half.apply(params, ids).hidden, model.apply(params, ids).hidden
    assert low.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: 2^-8 per rounding, over two layers of a normalised stream of size about 1 to 3.
    chex.assert_trees_all_close(low.astype(jnp.float32), high, atol=0.15)


def test_decoding_past_the_end_of_the_cache_is_nan_not_a_guess():
    model = tiny_model({"name": "rope"}, causal=True)
    params = parameters(model)
    cache = model.init_cache(1, 4)
    out = model.apply(params, tokens(1, 4), cache=cache)
    assert jnp.all(jnp.isfinite(out.hidden))
    assert jnp.all(jnp.isnan(model.apply(params, tokens(1, 1), cache=out.cache).hidden))


def test_positions_are_counted_where_none_are_given():
    model = tiny_model({"name": "learned"})
    params, ids = parameters(model), tokens(2, 5)
    given = Positions(jnp.arange(5)[None], contiguous=True)
    chex.assert_trees_all_close(model.apply(params, ids), model.apply(params, ids, positions=given), atol=1e-6)


def test_positions_apart_are_told_apart_and_those_out_of_reach_are_nan():
    """ALiBi's table reaches over max_length for given positions: nothing is clipped to its end."""
    model = tiny_model({"name": "alibi"})
    params, ids = parameters(model), tokens(1, 3)
    forward = jax.jit(lambda token: model.apply(params, ids, positions=token).hidden)
    near, far = forward(jnp.array([[0, 10, 20]])), forward(jnp.array([[0, 15, 31]]))
    assert jnp.abs(near - far).max() > 1e-3
    assert jnp.all(jnp.isnan(forward(jnp.array([[0, 10, 32]])))), "max_length is 32"


def test_decoding_at_positions_of_ones_own_equals_the_full_pass():
    model = tiny_model({"name": "alibi", "form": "causal"}, causal=True)
    params, ids, token = parameters(model), tokens(1, 4), jnp.array([[0, 10, 20, 30]])
    full = model.apply(params, ids, positions=token).hidden
    cached = model.apply(params, ids, positions=token, cache=model.init_cache(1, 4)).hidden
    chex.assert_trees_all_close(cached, full, atol=2e-5)


def test_decoding_refusals():
    with pytest.raises(UserError, match=r"causal model: set model\.causal=True"):
        tiny_model({"name": "rope"}).init_cache(1, 4)
    with pytest.raises(UserError, match="max_length=32 positions, the sequence has 33"):
        tiny_model({"name": "learned"}, causal=True).init_cache(1, 33)


def test_token_types_are_refused_where_the_model_has_none():
    model = tiny_model({"name": "rope"}).clone(token_types=0)
    with pytest.raises(ValueError, match="no token types"):
        model.init(jax.random.key(0), tokens(1, 3), token_type_ids=jnp.zeros((1, 3), jnp.int32))


def test_narrow_embeddings_are_projected():
    model = tiny_model({"name": "learned"}).clone(embedding_dim=6)
    shapes = parameter_shapes(model)
    assert shapes["embeddings/token/embedding"] == (29, 6)
    assert shapes["encodings/0/embedding/table"] == (32, 6)
    assert shapes["embeddings/projection/kernel"] == (6, 16)
    assert model.embedding_dim == 6 and tiny_model({"name": "none"}).embedding_dim == 16


def test_the_layer_axis_is_exactly_below_the_stages():
    for name, shape in parameter_shapes(tiny_model({"name": "t5"})).items():
        assert has_layer_axis(tuple(name.split("/"))) == (name.startswith("stage_0/") and shape[0] == DIMS.num_layers)


def test_compile_time_does_not_grow_with_the_depth_of_a_loop():
    def size(layers):
        stages = (Stage((BlockSpec(),), layers),)
        model = Transformer(29, dataclasses.replace(DIMS, num_layers=layers), stages, unroll=1)
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens(1, 4))
        return len(jax.jit(model.apply).lower(shapes, tokens(1, 4)).as_text().splitlines())

    assert size(2) == size(24)
