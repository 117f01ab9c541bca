"""Mixed attention against its definition over all pairs of tokens in float64, gradients included; its tables, refusals and names."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions
from tests.devices import first
from tests.encodings.table import DIMS, parameters, tiny_model, tokens
from zoo.encodings import Dims, Place, registry
from zoo.errors import UserError
from zoo.layers.block import BlockSpec
from zoo.mixers import Style
from zoo.mixers import registry as mixers
from zoo.mixers.mixed_attention import MixedAttention, dynamic_convolution, neighbours
from zoo.mixers.softmax import Softmax
from zoo.models import Stage, Transformer
from zoo.models.attention_scores import attention_scores
from zoo.models.parameters import has_layer_axis, parameter_shapes
from zoo.training.optimizer import DECAY_RULES, decay_mask
from zoo.training.sharding import make_mesh, parameter_shardings

# Of 4 heads over 2 key/value heads 2 over 1 remain, of half the heads' width, which is not the model's: 8 of 16.
SMALL = Dims(model_dim=6, num_heads=4, num_kv_heads=2, head_dim=4, num_layers=1, max_length=8)
WIDTH = 5
# Two documents and padding; one document, whose positions jump.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
TOKEN = np.array([[0, 1, 2, 3, 0, 1, 0, 0], [0, 1, 2, 5, 6, 7, 8, 9]])


def by_hand(params, x, *, causal, pads):
    """The formulas of the docstring, every sum over all tokens j and every window a one-hot [B, T, T, w]."""
    batch, length = SEGMENTS.shape
    dims = MixedAttention().attention_dims(SMALL)

    def dense(name, h):
        return h @ params[name]["kernel"] + params[name]["bias"]

    def heads(h):
        return h.reshape(batch, length, -1, dims.head_dim)

    asking, distance = SEGMENTS, TOKEN[:, None, :] - TOKEN[:, :, None]
    r = np.broadcast_to(np.arange(length) - np.arange(length)[:, None], distance.shape)
    if pads == "tokens":
        asking, distance = np.where(SEGMENTS > 0, SEGMENTS, SEGMENTS.max(1, keepdims=True)), r
    near = (asking[:, None, :] == asking[:, :, None]) & (asking[:, :, None] > 0) & (distance == r)
    left = WIDTH - 1 if causal else WIDTH // 2
    windows = (near[..., None] & (r[..., None] + left == np.arange(WIDTH))).astype(x.dtype)

    q = dense("query", x)
    span = dense("key_pointwise", jnp.einsum("bijw,bjd,wd->bid", windows, x, params["key_depthwise"]["kernel"]))
    filters = jax.nn.softmax(dense("filter", span * q).reshape(batch, length, dims.num_heads, WIDTH), axis=-1)
    convolution = jnp.einsum("bijw,binw,bjnh->binh", windows, filters, heads(dense("convolution_value", x)))

    k, v = (jnp.repeat(heads(dense(name, x)), dims.num_heads // dims.num_kv_heads, axis=2) for name in ("key", "value"))
    logits = jnp.einsum("btnh,bsnh->bnts", heads(q), k) / dims.head_dim**0.5
    seen = (asking[:, :, None] == SEGMENTS[:, None, :]) & (asking[:, :, None] > 0)
    if causal:
        seen &= TOKEN[:, None, :] <= TOKEN[:, :, None]
    weights = jnp.where(seen[:, None], jnp.exp(logits), 0)
    weights /= jnp.where(seen.any(-1)[:, None, :, None], weights.sum(-1, keepdims=True), 1)
    attention = jnp.einsum("bnts,bsnh->btnh", weights, v)
    return dense("output", jnp.concatenate([attention, convolution], axis=2).reshape(batch, length, -1))


@pytest.mark.parametrize(("pads", "causal"), [(None, False), (None, True), ("tokens", False)])
def test_equals_the_definition_in_float64_with_its_gradients(pads, causal):
    module = MixedAttention(width=WIDTH, pads=pads).module(SMALL, (), Style())
    x, weights = (jax.random.normal(jax.random.key(i), (*SEGMENTS.shape, 6)) for i in range(2))
    mask = AttentionMask(causal=causal, query_segments=jnp.asarray(SEGMENTS), key_segments=jnp.asarray(SEGMENTS))
    given = dict(mask=mask, shared=(), place=Place(Positions(jnp.asarray(TOKEN)), span=9))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, {}, **given))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.5 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)

    def ours(params, x):
        y, side, cache = module.apply({"params": params}, x, {}, **given)
        assert side == {} and cache is None
        return (y * weights).sum(), y

    with jax.default_matmul_precision("highest"):
        (_, y), found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(params, x)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (params, x, weights))

        def truth(params, x):
            y = by_hand(params, x, causal=causal, pads=pads)
            return (y * wide[2]).sum(), y

        (_, expected), gradients = jax.value_and_grad(truth, argnums=(0, 1), has_aux=True)(*wide[:2])
        expected, gradients = jax.device_get((expected, gradients))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, gradients)


def test_a_value_worked_out_before():
    """mixers.md of the reference: three taps, a mean for the depthwise kernel, W_f = sin(0.5 (i + 1) + 0.2 (j + 1))."""
    i, j = np.arange(4)[:, None], np.arange(2)
    x, c = np.sin(0.7 * (i + 1) + 1.3 * (j + 1)), np.sin(0.4 * (i + 1) + 0.9 * (j + 1))
    around = np.pad(x, [(1, 1), (0, 0)])
    span = (around[:-2] + around[1:-1] + around[2:]) / 3 * x
    logits = span @ np.sin(0.5 * (np.arange(2)[:, None] + 1) + 0.2 * (np.arange(3) + 1))
    filters = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(filters[0], [0.315503, 0.334654, 0.349843], atol=1e-6)
    near = neighbours(jnp.ones((1, 4), jnp.int32), None, 3, 1)
    arrays = (jnp.asarray(a, jnp.float32) for a in (c[None, :, None], filters[None, :, None]))
    expected = [[0.669385, 0.450911], [0.938497, 0.480648], [0.813443, 0.124725], [0.472910, -0.041442]]
    np.testing.assert_allclose(dynamic_convolution(*arrays, near, 1)[0, :, 0], expected, atol=1e-6)


def test_no_windows_are_kept_for_the_backward_pass():
    x, filters = jax.ShapeDtypeStruct((2, 64, 2, 16), jnp.bfloat16), jax.ShapeDtypeStruct((2, 64, 2, 9), jnp.float32)
    near = jnp.ones((9, 2, 64), bool)
    kept = jax.eval_shape(lambda *a: jax.vjp(lambda x, f: dynamic_convolution(x, f, near, 4), *a)[1], x, filters)
    sizes = [a.size * a.dtype.itemsize for a in jax.tree.leaves((kept, x, filters))]
    assert sum(sizes) <= 2 * (x.size * 2 + filters.size * 4) + near.size


def test_packing_and_padding_change_nothing_in_a_model():
    """With T5's table at the mixer's two heads, under the scan."""
    model = tiny_model({"name": "t5"}, mixer=MixedAttention(width=3))
    params = parameters(model)
    assert params["params"]["encodings"]["0"]["shared"]["table"].shape == (32, 2)
    run = jax.jit(
        lambda ids, segments, positions: model.apply(params, ids, segment_ids=segments, positions=positions).hidden
    )
    one, two = tokens(1, 4, 1), tokens(1, 5, 2)
    alone = [jnp.pad(ids, [(0, 0), (0, 12 - ids.shape[1])], constant_values=7) for ids in (one, two)]
    ids = jnp.concatenate([jnp.concatenate([one, two, jnp.zeros((1, 3), jnp.int32)], axis=1), *alone])
    segments = jnp.array([[1] * 4 + [2] * 5 + [0] * 3, [1] * 4 + [0] * 8, [1] * 5 + [0] * 7])
    token = jnp.array([[*range(4), *range(5), 0, 0, 0], [*range(12)], [*range(12)]])
    hidden = run(ids, segments, Positions(token, contiguous=True))
    chex.assert_trees_all_close(hidden[0, :4], hidden[1, :4], atol=2e-5)
    chex.assert_trees_all_close(hidden[0, 4:9], hidden[2, :5], atol=2e-5)


def test_encodings_in_attention_of_two_sizes_have_tables_of_two_sizes():
    encodings = (registry.build("learned"), registry.build("t5"), registry.build("rope"))
    specs = [BlockSpec(mixer=mixer, encodings=encodings) for mixer in (Softmax(), MixedAttention(), Softmax())]
    model = Transformer(vocab_size=29, dims=DIMS, stages=(Stage(tuple(specs)),), has_pooler=False)
    shapes = {n: s for n, s in parameter_shapes(model).items() if n.startswith("encodings")}
    assert shapes == {
        "encodings/0/embedding/table": (32, 16),
        "encodings/1/shared/table": (32, 4),
        "encodings/4/shared/table": (32, 2),
    }
    with pytest.raises(UserError, match="the layers have 2 or 4 heads"):
        attention_scores(model, {}, tokens(1, 4))
    tape = tuple(BlockSpec(mixer=m, encodings=(registry.build("tape"),)) for m in (Softmax(), MixedAttention()))
    with pytest.raises(UserError, match="or one does in attention of two sizes: tape, tape"):
        Transformer(vocab_size=29, dims=DIMS, stages=(Stage(tape),)).check()


@pytest.mark.parametrize(
    ("config", "message"),
    [({"width": 4}, "width=4; it must be odd"), ({"head_ratio": 0}, "head_ratio=0; it must be at least 1")],
)
def test_wrong_arguments_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        mixers.build({"name": "mixed_attention", **config})


def test_what_it_refuses():
    odd = Dims(model_dim=15, num_heads=3, num_kv_heads=3, head_dim=5, num_layers=1, max_length=8)
    with pytest.raises(UserError, match="head_ratio=2 makes 1 heads over 1 key/value heads of half the width 15"):
        Transformer(vocab_size=9, dims=odd, stages=(Stage((BlockSpec(mixer=MixedAttention()),)),)).check()
    x, place = jnp.zeros((1, 3, 6)), Place(Positions.arange(3))
    module = MixedAttention().module(SMALL, (), Style())
    with pytest.raises(UserError, match="'mixed_attention' convolves one sequence"):
        jax.eval_shape(
            lambda: module.init(jax.random.key(0), x, {}, mask=AttentionMask(), shared=(), place=place, context=x)
        )
    with pytest.raises(ValueError, match="'mixed_attention' cannot decode"):
        MixedAttention().init_cache(SMALL, (), 1, 4, jnp.float32)


def test_rules_over_names_cover_its_parameters():
    model = tiny_model({"name": "none"}, mixer=MixedAttention())
    layers = {"stage_0": jax.eval_shape(model.init, jax.random.key(0), tokens(1, 4))["params"]["stage_0"]}
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=first(8))
    found = parameter_shardings(layers, mesh, has_layer_axis=has_layer_axis)["stage_0"]["block_0"]["mixer"]
    assert not found["key_pointwise"]["kernel"].is_fully_replicated
    assert not found["convolution_value"]["bias"].is_fully_replicated
    assert found["key_depthwise"]["kernel"].is_fully_replicated
    decayed = decay_mask(DECAY_RULES, has_layer_axis)(layers)["stage_0"]["block_0"]["mixer"]
    assert decayed.pop("key_depthwise") == {"kernel": True}
    assert all(part == {"kernel": True, "bias": False} for part in decayed.values())
