"""The named doors of the design, each proven by a part that exists only here."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from kernels.attention import Toeplitz, attention
from tests.devices import first
from tests.encodings.table import DIMS, parameters, tokens
from zoo.encodings import AddTerms, Dims, Encoded, Encoding, EncodingLayer, Facts, registry
from zoo.errors import UserError
from zoo.layers.arrangements import Parallel, PreNorm
from zoo.layers.block import BlockSpec
from zoo.layers.feed_forward import Gelu, SwiGLU
from zoo.mixers import Mixer, MixerFacts, Style
from zoo.mixers.softmax import Softmax
from zoo.models import Stage, Transformer
from zoo.models.parameters import has_layer_axis, parameter_shapes
from zoo.training.sharding import make_mesh, parameter_shardings


def model_of(*stages: Stage, **kwargs: Any) -> Transformer:
    kwargs = {"style": Style(stddev=0.3), "has_pooler": False, **kwargs}
    return Transformer(vocab_size=29, dims=DIMS, stages=stages, **kwargs)


def spec(*encodings: Encoding, **kwargs: Any) -> BlockSpec:
    return BlockSpec(encodings=encodings, arrangement=PreNorm(), feed_forward=Gelu(width=16), **kwargs)


def names(model: Transformer) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(model)


# --- an encoding with its own core


@dataclasses.dataclass(frozen=True)
class Temperature(Encoding):
    """Attention with q multiplied by a learned temperature, as a core that binds this layer's parameter."""

    name = "temperature"

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"core"}))

    def layer(self, dims: Dims) -> EncodingLayer:
        return TemperatureLayer(dims.num_heads)


class TemperatureLayer(EncodingLayer):
    num_heads: int

    @nn.compact
    def __call__(self, shared, q, k, v, site) -> Encoded:
        warm = self.param("warm", nn.initializers.ones, (self.num_heads,))

        def core(q, k, v, **kwargs):
            return attention(q * warm[:, None], k, v, **kwargs)

        return Encoded(q, k, v, core=core)


def test_an_encoding_brings_its_own_core_with_parameters_per_layer():
    model = model_of(Stage((spec(Temperature()),), 2))
    params = jax.jit(model.init)(jax.random.key(0), tokens(1, 5))
    warm = params["params"]["stage_0"]["block_0"]["mixer"]["encoding_0"]["warm"]
    assert warm.shape == (2, DIMS.num_heads), "one temperature per layer"

    plain = model_of(Stage((spec(),), 2))
    without = jax.tree.map(lambda a: a, params)
    del without["params"]["stage_0"]["block_0"]["mixer"]["encoding_0"]
    ids = tokens(1, 5)
    chex.assert_trees_all_close(model.apply(params, ids).hidden, plain.apply(without, ids).hidden, atol=1e-6)
    # A cube, for the sum of what a layer norm gives is zero.
    grads = jax.grad(lambda p: (model.apply(p, ids).hidden[0, 0] ** 3).sum())(params)
    assert jnp.all(jnp.abs(grads["params"]["stage_0"]["block_0"]["mixer"]["encoding_0"]["warm"]) > 1e-6)


# --- side, carried through the scan


@dataclasses.dataclass(frozen=True)
class Counter(Encoding):
    """Counts the layers it has passed in `side`, and adds the count to the values on their way back."""

    name = "counter"

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"side", "values"}))

    def layer(self, dims: Dims) -> EncodingLayer:
        return CounterLayer()

    def init_side(self, dims: Dims) -> nn.Module:
        return Zeros()

    def after_feed_forward(self, dims: Dims) -> nn.Module:
        return AddOne()


class Zeros(nn.Module):
    def __call__(self, x, place):
        return jnp.zeros(x.shape[:2])


class AddOne(nn.Module):
    def __call__(self, side, y, place):
        return side + 1.0


class CounterLayer(EncodingLayer):
    def __call__(self, shared, q, k, v, site) -> Encoded:
        return Encoded(q, k, v)

    def back(self, out, shared, side, site):
        return out + 100.0 * side["counter"][:, :, None, None], side


def test_side_is_carried_from_layer_to_layer():
    counted, plain = model_of(Stage((spec(Counter()),), 2)), model_of(Stage((spec(),), 2))
    params, ids = parameters(plain), tokens(1, 5)
    one, two = (m.apply(params, ids, hidden_states=True).hidden_states for m in (counted, plain))
    chex.assert_trees_all_close(one[1], two[1], atol=1e-5)
    assert jnp.abs(one[2] - two[2]).max() > 1, "the second layer sees a count of one"


# --- a mixer that replaces the block


@dataclasses.dataclass(frozen=True)
class Average(Mixer):
    """Adds a learned projection of the mean over the sequence to the raw residual stream."""

    name = "average"
    replaces_block = True

    def facts(self) -> MixerFacts:
        return MixerFacts(accepts=frozenset({"embedding"}), causal=False, grouped_heads=True)

    def module(self, dims, encodings, style) -> nn.Module:
        return AverageModule(dims, style)


class AverageModule(nn.Module):
    dims: Dims
    style: Style

    @nn.compact
    def __call__(self, x, side, *, mask, shared, place, context=None, cache=None):
        return x + self.style.dense(self.dims.model_dim, name="output")(x.mean(1, keepdims=True)), side, cache


def test_a_mixer_replaces_the_block():
    model = model_of(Stage((BlockSpec(mixer=Average(), encodings=()),), 2))
    block = {n for n in names(model) if n.startswith("stage_0/")}
    assert block == {"stage_0/block_0/mixer/output/kernel", "stage_0/block_0/mixer/output/bias"}
    assert not any(n.startswith("final_norm") for n in names(model))
    params, ids = parameters(model), tokens(1, 5)
    states = model.apply(params, ids, hidden_states=True).hidden_states
    weights = params["params"]["stage_0"]["block_0"]["mixer"]["output"]
    expected = states[1] + states[1].mean(1, keepdims=True) @ weights["kernel"][1] + weights["bias"][1]
    chex.assert_trees_all_close(states[2], expected, atol=1e-5)


def test_a_mixer_that_cannot_honour_segments_refuses_a_batch_with_them():
    model = model_of(Stage((BlockSpec(mixer=Average(), encodings=()),)))
    params, ids = parameters(model), tokens(1, 4)
    with pytest.raises(UserError, match="'average' does not honour the mask's key_segments, query_segments"):
        model.apply(params, ids, segment_ids=jnp.array([[1, 1, 2, 2]]))


def test_a_named_kernel_reaches_an_encodings_own_core():
    model = model_of(Stage((spec(Temperature(), mixer=Softmax(implementation="pallas_gpu")),)))
    with pytest.raises(ValueError, match="'pallas_gpu'"):
        model.init(jax.random.key(0), tokens(1, 4))


def test_two_variants_that_carry_state_under_one_name_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Again(Counter):
        step: float = 2.0

    with pytest.raises(UserError, match="two variants of one encoding carry state"):
        model_of(Stage((spec(Counter()), spec(Again())))).check()


def test_a_layers_own_encoding_parameters_are_sharded_by_rule():
    model = model_of(Stage((spec(PerLayerBias()),), 2))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens(1, 4))["params"]
    mesh = make_mesh(data=4, fsdp=2, devices=first(8))
    found = parameter_shardings({"model": shapes}, mesh, has_layer_axis=has_layer_axis)
    values = found["model"]["stage_0"]["block_0"]["mixer"]["encoding_0"]["values"]
    assert values.is_fully_replicated


@dataclasses.dataclass(frozen=True)
class BySentence(Encoding):
    """Needs to be told which sentence a token is in."""

    name = "by_sentence"

    def facts(self) -> Facts:
        return Facts(kinds=frozenset(), sentences=True)


def test_an_encoding_that_needs_sentences_says_so():
    model = model_of(Stage((spec(BySentence()),)))
    with pytest.raises(UserError, match="needs sentence indices"):
        model.init(jax.random.key(0), tokens(1, 4))


def test_a_mixer_that_cannot_honour_an_encoding_or_a_mask_refuses_at_construction():
    with pytest.raises(UserError, match=r"'nezha' brings 'relative'.*no pairwise logits"):
        model_of(Stage((BlockSpec(mixer=Average(), encodings=(registry.build("nezha"),)),))).check()
    with pytest.raises(UserError, match="'average' is not defined for a causal mask"):
        model_of(Stage((BlockSpec(mixer=Average(), encodings=()),)), causal=True).check()
    with pytest.raises(ValueError, match="cannot decode"):
        Average().init_cache(DIMS, (), 1, 4, jnp.float32)


# --- depth


@dataclasses.dataclass(frozen=True)
class PerLayerBias(Encoding):
    """A learned Toeplitz bias with parameters of its own in every layer, beside a shared one."""

    name = "per_layer_bias"

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"toeplitz"}))

    def layer(self, dims: Dims) -> EncodingLayer:
        return PerLayerBiasLayer(dims.num_heads)


class PerLayerBiasLayer(EncodingLayer):
    num_heads: int

    @nn.compact
    def __call__(self, shared, q, k, v, site) -> Encoded:
        values = self.param("values", nn.initializers.normal(0.3), (self.num_heads, 5))
        return Encoded(q, k, v, terms=(Toeplitz(values),))


def test_shared_and_per_layer_parameters_in_one_stage():
    t5 = registry.build({"name": "t5", "scale": None})
    model = model_of(Stage((spec(t5, PerLayerBias()),), 2))
    shapes = names(model)
    assert shapes["encodings/0/shared/table"] == (32, DIMS.num_heads)
    assert shapes["stage_0/block_0/mixer/encoding_1/values"] == (2, DIMS.num_heads, 5)
    params, ids = parameters(model), tokens(1, 6)
    grads = jax.jit(jax.grad(lambda p: model.apply(p, ids).hidden[0, 0].sum()))(params)["params"]
    assert jnp.any(grads["encodings"]["0"]["shared"]["table"] != 0)
    per_layer = grads["stage_0"]["block_0"]["mixer"]["encoding_1"]["values"]
    assert jnp.any(per_layer[0] != 0) and jnp.any(per_layer[1] != 0)


def test_a_pattern_of_different_blocks():
    near = Softmax(window=(1, 1))
    rope, far = registry.build("rope"), registry.build({"name": "rope", "theta": 500.0})
    pattern = (
        spec(rope, mixer=near),
        BlockSpec(encodings=(far,), arrangement=Parallel(), feed_forward=SwiGLU(width=8)),
    )
    model = model_of(Stage(pattern, 2), Stage((spec(rope),)))
    shapes = names(model)
    assert shapes["stage_0/block_0/feed_forward/up/kernel"] == (2, 16, 16)
    assert shapes["stage_0/block_1/feed_forward/gate/kernel"] == (2, 16, 8)
    assert "stage_0/block_1/norm_feed_forward/scale" not in shapes, "a parallel block has one norm"
    assert shapes["stage_1/block_0/mixer/query/kernel"][0] == 1
    assert model.apply(parameters(model), tokens(1, 6), hidden_states=True).hidden_states.shape == (6, 1, 6, 16)


def test_sharing_layers_equals_repeating_one():
    shared, repeated = model_of(Stage((spec(),), 3, share=True)), model_of(Stage((spec(),), 3))
    params, ids = parameters(shared), tokens(2, 5)
    assert names(shared)["stage_0/block_0/mixer/query/kernel"][0] == 1
    tiled = {
        "params": {
            **params["params"],
            "stage_0": jax.tree.map(lambda a: jnp.repeat(a, 3, 0), params["params"]["stage_0"]),
        }
    }
    chex.assert_trees_all_close(shared.apply(params, ids).hidden, repeated.apply(tiled, ids).hidden, atol=1e-5)
    one, many = (
        jax.jit(jax.grad(lambda p, m=m: (m.apply(p, ids).hidden ** 3).sum()))(p)
        for m, p in ((shared, params), (repeated, tiled))
    )
    summed = jax.tree.map(lambda a: a.sum(0, keepdims=True), many["params"]["stage_0"])
    chex.assert_trees_all_close(one["params"]["stage_0"], summed, atol=1e-3, rtol=1e-4)


def test_terms_are_handed_over_untouched():
    layer = AddTerms(scale=0.25)
    q = jnp.ones((1, 2, 1, 4))
    encoded = layer.apply({}, ("term",), q, q, q, None)
    assert encoded.terms == ("term",) and encoded.scale == 0.25 and encoded.q is q
