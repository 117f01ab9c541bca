"""The fused TPU kernels against the float64 reference: interpreted on a CPU, compiled on a TPU, lowered everywhere."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import (
    AttentionMask,
    Clip,
    Dense,
    Multiply,
    Pairwise,
    PiecewiseLinear,
    Positions,
    Relative,
    Table,
    Toeplitz,
    api,
    attention,
    pallas_tpu,
)
from kernels.attention.positions import Placement
from tests.kernels.attention_cases import MASKS, Sizes, Waves, inputs, truth
from tests.kernels.fused_cases import Fused, fire

ON_TPU = jax.default_backend() == "tpu"
FUSED = Fused(pallas_tpu.attention, interpret=not ON_TPU)
compare, with_gradients = FUSED.compare, FUSED.with_gradients
KINDS = ("none", "toeplitz", "multiply", "row_column")


@pytest.mark.parametrize(
    "mask", [name for name in MASKS if name not in ("block", "causal_block", "gaps", "shifted_pair")]
)
def test_masks(mask):
    sizes = Sizes(T=260, S=260, N=1, K=1, H=128, W=128)  # three tiles of one square each way
    mask, positions = MASKS[mask](sizes)
    compare(sizes, "toeplitz", mask=mask, positions=positions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "keys"), [(7, 63), (100, 260)])
def test_terms_grouped_heads_unequal_lengths(kind, queries, keys):
    sizes = Sizes(B=1, T=queries, S=keys, N=4, K=2, H=40, W=60)
    compare(sizes, kind, jnp.float32, mask=AttentionMask(causal=True))


@pytest.mark.parametrize(("width", "heads", "kv_heads"), [(32, 3, 3), (96, 2, 1), (200, 2, 1)])
def test_widths(width, heads, kv_heads):
    compare(Sizes(B=1, T=100, S=100, N=heads, K=kv_heads, H=width, W=width), "toeplitz")


def test_several_terms_in_tiles_of_several_squares():
    sizes = Sizes(B=1, T=500, S=240, N=1, K=1, H=64, W=64)
    (q, k, v, _), cotangent = inputs(sizes, "none")
    terms = tuple(term for kind in KINDS for term in inputs(sizes, kind, seed=1)[0][3])
    mask = AttentionMask(window=(200, 100))
    found = with_gradients((q, k, v, terms), cotangent, jnp.float32, mask=mask)
    expected = truth((q, k, v, terms), cotangent, mask=mask)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(got - want) <= 4e-6 * np.linalg.norm(want) + 1e-5 * np.sqrt(want.size)


@pytest.mark.parametrize("kind", ["query_and_value", "key_per_head", "key_per_kv_head", "several", "piecewise_linear"])
def test_tables_and_curves_grouped_heads_unequal_lengths(kind):
    sizes = Sizes(B=2, T=100, S=390, N=4, K=2, H=40, W=60)
    compare(sizes, kind, jnp.float32, mask=AttentionMask(causal=True))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_curve_by_the_knots_of_each_tile(dtype):
    sizes = Sizes(B=2, T=300, S=400, N=2, K=1, H=64, W=64)
    term = fire(2, batch=2, queries=300, keys=400)
    compare(sizes, "toeplitz", dtype, beside=(term,), mask=AttentionMask(causal=True), dropout=(0.1, jax.random.key(5)))


def test_relative_tables_in_tiles_of_several_squares():
    """Of 16 squares those nearest to the diagonal have a product of their own, the others one number a row."""
    sizes = Sizes(B=1, T=500, S=500, N=1, K=1, H=128, W=128)
    rng = np.random.default_rng(0)
    (q, k, v, _), cotangent = inputs(sizes, "none")
    tables = (
        Table(rng.standard_normal((2 * span + 1, 1, 128)).astype(np.float32) / 8, Clip(span)) for span in (2, 40, 3)
    )
    terms = (Relative(*tables),)
    found = with_gradients((q, k, v, terms), cotangent, jnp.float32, dropout=(0.1, jax.random.key(1)))
    expected = truth((q, k, v, terms), cotangent, dropout=(0.1, jax.random.key(1)))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(got - want) <= 4e-6 * np.linalg.norm(want) + 1e-5 * np.sqrt(want.size)


@pytest.mark.parametrize("kind", ["query_and_value", "key_per_head"])
def test_relative_tables_in_bfloat16_within_a_window(kind):
    sizes = Sizes(T=260, S=260, N=2, K=2, H=64, W=64)
    compare(sizes, kind, mask=AttentionMask(window=(150, 140)))


@pytest.mark.parametrize(("kind", "dtype"), [("none", jnp.bfloat16), ("toeplitz", jnp.float32)])
def test_a_sinusoid_is_no_table(kind, dtype):
    sizes = Sizes(B=1, T=130, S=400, N=4, K=2, H=64, W=64)
    call = {"mask": AttentionMask(causal=True), "dropout": (0.1, jax.random.key(3))}
    FUSED.compare_sinusoid(sizes, dtype, *inputs(sizes, kind)[0][3], **call)


@pytest.mark.parametrize("side", ["query", "value"])
def test_a_series_of_two_parts(side):
    """A table clipped at 40 has a period of 80, more than the 64 that a head's width is padded to."""
    sizes = Sizes(B=1, T=260, S=140, N=2, K=2, H=48, W=48)
    (q, k, v, _), cotangent = inputs(sizes, "none")
    table = np.random.default_rng(0).standard_normal((81, 1, 48)).astype(np.float32) / 4
    arguments = q, k, v, (Relative(**{side: Table(table, Clip(40))}),)
    found, expected = with_gradients(arguments, cotangent, jnp.float32), truth(arguments, cotangent)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(got - want) <= 4e-6 * np.linalg.norm(want) + 1e-5 * np.sqrt(want.size)


def test_dropout_drops_what_the_reference_drops():
    compare(Sizes(T=120, S=120, H=64, W=64), "toeplitz", dropout=(0.2, jax.random.key(5)))


def test_rows_that_see_nothing_are_zero_with_zero_gradients():
    sizes = Sizes(T=40, S=30, H=64, W=64)
    (q, k, v, terms), cotangent = inputs(sizes, "toeplitz")
    mask = AttentionMask(causal=True)  # the first ten queries stand before every key
    out, gradients = with_gradients((q, k, v, terms), cotangent, jnp.bfloat16, mask=mask)
    assert not out[:, :10].any() and out[:, 10:].any(axis=(0, 2, 3)).all()
    assert not gradients[0][:, :10].any()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(gradients))


def test_a_value_of_minus_infinity_masks():
    sizes = Sizes(T=120, S=120, H=64, W=64)
    (q, k, v, _), cotangent = inputs(sizes, "none")
    banned = np.where(np.abs(np.arange(-119, 120)) % 3 == 1, -np.inf, 0).astype(np.float32)
    terms = (Toeplitz(np.stack([banned, 0 * np.maximum(banned, 0)])),)
    out, gradients = with_gradients((q, k, v, terms), cotangent, jnp.float32)
    expected, _ = truth((q, k, v, terms), cotangent)
    assert np.linalg.norm(out - expected) < 2e-6 * np.linalg.norm(expected)
    assert not gradients[3][0].values[0][np.isinf(banned)].any()


@pytest.mark.skipif(ON_TPU, reason="is about interpretation")
@pytest.mark.parametrize(
    "kinds",
    # A curve stands alone: beside others XLA joins other products and sums to one instruction in the two programs, which round apart.
    [("toeplitz", "multiply", "row_column", "several"), ("piecewise_linear",), ("query_and_value",)],
    ids=["several", "curve", "query_and_value"],
)
def test_no_output_is_left_and_visited_again(kinds):
    """Which a TPU computes wrongly without a word, and plain interpretation rightly: only these parameters raise."""
    sizes = Sizes(B=1, T=260, S=260, N=2, K=1, H=128, W=128)
    (q, k, v, _), cotangent = inputs(sizes, "none")
    terms = tuple(term for kind in kinds for term in inputs(sizes, kind)[0][3])
    call = {"mask": AttentionMask(causal=True), "dropout": (0.1, jax.random.key(0))}
    found = with_gradients((q, k, v, terms), cotangent, jnp.float32, **call)
    strict = Fused(pallas_tpu.attention, pltpu.InterpretParams()).with_gradients(
        (q, k, v, terms), cotangent, jnp.float32, **call
    )
    jax.tree.map(np.testing.assert_array_equal, strict, found)


@pytest.mark.skipif(
    not ON_TPU, reason="interpreted, a kernel is one program of XLA's; on a TPU its passes are what counts"
)
def test_the_same_bits_twice():
    (q, k, v, terms), cotangent = inputs(Sizes(T=260, S=260, H=64, W=64), "toeplitz")
    call = {"mask": AttentionMask(causal=True), "dropout": (0.1, jax.random.key(0))}
    first, second = (with_gradients((q, k, v, terms), cotangent, jnp.bfloat16, **call) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("kind", [*KINDS, "several", "query_and_value", "piecewise_linear"])
def test_lowers_for_tpu_without_a_tpu(kind):
    sizes = Sizes(T=300, S=300, H=64, W=64)
    (q, k, v, terms), _ = inputs(sizes, kind)
    q, k, v = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (q, k, v))
    mask, positions = MASKS["segments_window"](sizes)
    mask, positions = jax.tree.map(jnp.asarray, (mask, positions))
    call = functools.partial(attention, mask=mask, positions=positions, implementation="pallas_tpu")

    def loss(q, k, v, terms):
        return jnp.sum(call(q, k, v, terms=terms, dropout=(0.1, jax.random.key(0))).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(q, k, v, terms).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    for name in ("attention_forward", "attention_dq", "attention_dkv"):
        assert name in text
    assert "300x300x" not in text and "384x384x" not in text, "an array of all queries by all keys"


@pytest.mark.skipif(ON_TPU, reason="this is a TPU")
def test_on_another_platform_it_fails_at_lowering():
    q = jnp.ones((1, 8, 2, 32), jnp.bfloat16)
    with pytest.raises(ValueError, match="interpret"):
        jax.jit(lambda q: attention(q, q, q, implementation="pallas_tpu")).lower(q)


@pytest.mark.parametrize(
    ("chosen", "platform", "length", "dtype"),
    [
        ("pallas_tpu", "tpu", 64, jnp.bfloat16),
        ("pallas_tpu", "tpu", 64, jnp.float32),
        ("xla", "tpu", 63, jnp.bfloat16),
        ("xla", "tpu", 64, jnp.float16),
        ("xla", "cpu", 64, jnp.bfloat16),
    ],
)
def test_what_is_chosen_where_nothing_is_named(monkeypatch, chosen, platform, length, dtype):
    q = jnp.ones((1, length, 2, 32), dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace()])
    assert api._best(q, q, (), AttentionMask(), Placement.of(None, length, length)) == chosen


CURVE = PiecewiseLinear(jnp.ones(9), jnp.ones((1, 8)), jnp.ones(3), jnp.ones((2, 3)), jnp.ones((2, 2)))


def _call(dtype=jnp.bfloat16, width=32, length=8, **more):
    q = jnp.ones((1, length, 2, width), dtype)
    return attention(q, q, q, implementation="pallas_tpu", **more)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("bfloat16 and float32, not float16. implementation='xla' does it", {"dtype": jnp.float16}),
        ("at most 256 wide, not 288", {"width": 288}),
        (
            "1 tables of 17152 distances do not fit on the chip, of which 5461 do",
            {"length": 9000, "terms": (Relative(query=Table(jnp.ones((16001, 1, 32)), Clip(8000))),)},
        ),
        ("one PiecewiseLinear at most", {"terms": (CURVE, CURVE)}),
        ("no Dense", {"terms": (Dense(jnp.ones((1, 1, 8, 8))),)}),
        ("no Pairwise", {"terms": (Pairwise({"height": jnp.ones(2)}, Waves(0.3)),)}),
        ("not channels", {"terms": (Multiply(jnp.ones((2, 9, 32))),)}),
        ("no block mask", {"mask": AttentionMask(block=4)}),
        (
            "contiguous positions",
            {"mask": AttentionMask(causal=True), "positions": Positions(jnp.arange(0, 16, 2, dtype=jnp.int32)[None])},
        ),
        (
            "contiguous positions",
            {"terms": (Toeplitz(jnp.ones((2, 9))),), "positions": (Positions.arange(8, 3), Positions.arange(8))},
        ),
    ],
)
def test_refused(message, call):
    with pytest.raises(ValueError, match=message):
        _call(**call)
