"""The fused GPU kernels against the float64 reference: compiled on a GPU, interpreted elsewhere, lowered everywhere.

Interpretation needs jax 0.11 (`make test-gpu-interpret`); with an older one only lowering and refusals are tested.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels.attention import (
    AttentionMask,
    Clip,
    Dense,
    LogBuckets,
    Multiply,
    Positions,
    Relative,
    RowColumn,
    Table,
    Toeplitz,
    api,
    attention,
    mosaic,
    pallas_gpu,
    pallas_gpu_dense,
    pallas_gpu_operands,
    pallas_gpu_plan,
)
from kernels.attention.positions import Placement
from tests.devices import first
from tests.kernels.attention_cases import MASKS, Sizes, inputs, truth
from tests.kernels.fused_cases import Fused, fire

ON_GPU = jax.default_backend() == "gpu"
runs = pytest.mark.skipif(
    not ON_GPU and not mosaic.interpretable(),
    reason=f"no GPU, and jax {jax.__version__} interprets no Mosaic GPU kernel",
)
FUSED = Fused(pallas_gpu.attention, interpret=not ON_GPU)
compare, with_gradients = FUSED.compare, FUSED.with_gradients


@runs
@pytest.mark.parametrize(
    "mask", [name for name in MASKS if name not in ("block", "causal_block", "gaps", "shifted_pair")]
)
def test_masks(mask):
    sizes = Sizes(T=150, S=150, H=16, W=16)
    mask, positions = MASKS[mask](sizes)
    compare(sizes, "toeplitz", mask=mask, positions=positions)


@runs
@pytest.mark.parametrize("kind", ["none", "toeplitz", "row_column"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 63), (130, 260), (260, 130)])
def test_terms_grouped_heads_unequal_lengths(kind, queries, keys):
    compare(Sizes(B=1, T=queries, S=keys, N=4, K=2, H=24, W=40), kind, mask=AttentionMask(causal=True))


@runs
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_widths(width):
    compare(Sizes(B=1, T=130, S=130, H=width, W=width), "toeplitz")


@runs
@pytest.mark.parametrize("width", [32, 128])
def test_a_program_sums_a_table_s_gradient_over_several_blocks(monkeypatch, width):
    monkeypatch.setattr(pallas_gpu_plan, "MULTIPROCESSORS", 4)  # two programs a head for three blocks
    sizes = Sizes(B=1, T=260, S=400, N=2, K=1, H=width, W=width)
    compare(sizes, "toeplitz", mask=AttentionMask(window=(150, 100)), dropout=(0.1, jax.random.key(5)))


@runs
@pytest.mark.parametrize("kind", ["query", "query_per_head", "value", "query_and_value"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 63), (130, 260)])
def test_relative_tables(kind, queries, keys):
    compare(Sizes(B=1, T=queries, S=keys, N=4, K=2, H=24, W=40), kind, mask=AttentionMask(causal=True))


@runs
@pytest.mark.parametrize("mask", ["segments_window", "key_valid", "prefix"])
def test_relative_tables_under_masks(mask):
    sizes = Sizes(T=150, S=150, H=16, W=16)
    mask, positions = MASKS[mask](sizes)
    compare(sizes, "query_and_value", mask=mask, positions=positions, dropout=(0.2, jax.random.key(5)))


@runs
@pytest.mark.parametrize("kind", ["key", "key_per_head", "query_and_key"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 63), (130, 260), (260, 130)])
def test_tables_of_any_map_of_rows(kind, queries, keys):
    # Not causal: of the keys left of all others' buckets dS would come to little, and its rounding to much.
    compare(Sizes(B=1, T=queries, S=keys, N=4, K=2, H=24, W=40), kind)


@runs
@pytest.mark.parametrize("mask", ["segments_window", "key_valid", "prefix"])
def test_tables_of_any_map_of_rows_beside_others_under_masks(mask):
    """With two rows of the batch, which the warpgroups of a table's gradient take."""
    sizes = Sizes(T=150, S=150, H=32, W=32)
    mask, positions = MASKS[mask](sizes)
    (*_, beside), _ = inputs(sizes, "toeplitz", seed=1)
    dropout = (0.2, jax.random.key(5))
    compare(sizes, "query_and_key", beside=beside, mask=mask, positions=positions, dropout=dropout)


@runs
def test_a_wide_clip_and_several_tables_of_wide_heads():
    rng = np.random.default_rng(4)
    wide, narrow = (Table(rng.standard_normal((2 * n + 1, 1, 64)).astype(np.float32) / 4, Clip(n)) for n in (90, 3))
    compare(Sizes(B=3, T=200, S=140, H=64, W=64), beside=(Relative(query=wide), Relative(query=narrow, key=narrow)))


# Documents of many lengths; one that comes twice, so that what lies between is visited for nothing; and an end that nobody may see.
LAYOUTS = {
    "in order": ((1, 130), (2, 5), (3, 265)),
    "twice": ((3, 70), (1, 200), (3, 130)),
    "unseen": ((1, 140), (0, 260)),
}


@runs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["toeplitz", "query_and_value", "query_and_key"])
def test_tiles_of_other_segments_are_left_out(kind, layout):
    ids = np.concatenate([np.full(length, number, np.int32) for number, length in LAYOUTS[layout]])[None]
    mask = AttentionMask(query_segments=jnp.asarray(ids), key_segments=jnp.asarray(ids))
    compare(Sizes(B=1, T=400, S=400, N=2, K=1, H=32, W=32), kind, mask=mask)


def test_the_reach_of_segments():
    queries = jnp.asarray([[1] * 100 + [2] * 92 + [3] * 64 + [-1] * 128])
    keys = jnp.asarray([[1] * 70 + [2] * 122 + [3] * 64 + [0] * 128])
    reach = pallas_gpu_operands.segment_reach(queries, 128, keys, 64)
    assert reach.tolist()[0][:2] == [[0, 2], [1, 3]]
    assert pallas_gpu_operands.segment_reach(keys, 128, queries, 64).tolist()[0][:2] == [[0, 2], [1, 3]]
    visited = functools.partial(pallas_gpu_operands.within_reach, (reach,), 0)
    assert [int(x) for x in visited(1, jnp.int32(0), jnp.int32(3))] == [1, 2]
    # Queries that see nothing visit one tile, which gives them nothing.
    assert int(visited(2, jnp.int32(2), jnp.int32(3))[1]) >= 1


@runs
@pytest.mark.parametrize("dropout", [None, 0.2])
def test_relative_tables_far_from_the_diagonal(dropout):
    """Programs with whole tiles on either side of the band, and with both."""
    drop = None if dropout is None else (dropout, jax.random.key(5))
    compare(Sizes(B=1, T=400, S=400, N=2, K=1, H=32, W=32), "query_and_value", dropout=drop)


def dense(*shape, seed=9):
    return Dense((np.random.default_rng(seed).standard_normal(shape) * 0.5).astype(np.float32))


@runs
@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (2, 4), (1, 1)], ids=["heads", "rows", "whole", "one"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 63), (130, 260)])
def test_a_dense_bias_grouped_heads_unequal_lengths(shape, queries, keys):
    sizes = Sizes(B=2, T=queries, S=keys, N=4, K=2, H=24, W=40)
    compare(sizes, beside=(dense(*shape, queries, keys),), mask=AttentionMask(causal=True))


@runs
@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
@pytest.mark.parametrize("mask", ["segments_window", "prefix_window", "key_valid"])
def test_a_dense_bias_beside_others_under_masks_and_dropout(shape, mask):
    sizes = Sizes(T=150, S=150, H=16, W=16)
    mask, positions = MASKS[mask](sizes)
    (*_, columns), _ = inputs(sizes, "row_column", seed=1)
    beside = (dense(*shape, 150, 150), *columns)
    compare(sizes, "toeplitz", beside=beside, mask=mask, positions=positions, dropout=(0.2, jax.random.key(5)))


@runs
@pytest.mark.parametrize("width", [96, 128])
def test_a_dense_bias_of_wide_heads(width):
    compare(Sizes(B=2, T=130, S=130, H=width, W=width), beside=(dense(1, 2, 130, 130),), dtype=jnp.float16)


@runs
def test_a_program_sums_a_dense_bias_over_several_readers(monkeypatch):
    monkeypatch.setattr(pallas_gpu_dense, "MULTIPROCESSORS", 4)  # two programs a tile for six readers
    compare(Sizes(B=3, T=200, S=200, H=32, W=32), beside=(dense(1, 1, 200, 200),), mask=AttentionMask(window=(20, 70)))


@runs
def test_several_dense_biases_are_one():
    compare(Sizes(T=20, S=20, H=32, W=32), "dense")


@runs
@pytest.mark.parametrize("shape", [(1, 2), (2, 2)])
def test_a_dense_bias_in_bfloat16(shape):
    sizes = Sizes(T=140, S=140, H=32, W=32)
    (q, k, v, _), cotangent = inputs(sizes, "none")
    q, k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (q, k, v))
    bias = jnp.asarray(dense(*shape, 140, 140).bias, jnp.bfloat16)
    found = with_gradients((q, k, v, (Dense(bias),)), cotangent, jnp.bfloat16)
    assert found[1][3][0].bias.dtype == jnp.bfloat16
    expected = truth((q, k, v, (Dense(np.asarray(bias, np.float32)),)), cotangent)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.asarray(got, np.float32) - want) < 8e-3 * np.linalg.norm(want)


@runs
def test_minus_infinity_in_a_dense_bias_masks():
    sizes = Sizes(T=140, S=140, H=32, W=32)
    (q, k, v, _), cotangent = inputs(sizes, "none")
    bias = np.where(np.tri(140, dtype=bool), 0, -np.inf).astype(np.float32)[None, None]
    found = with_gradients((q, k, v, (Dense(bias),)), cotangent, jnp.bfloat16)
    expected = with_gradients((q, k, v, ()), cotangent, jnp.bfloat16, mask=AttentionMask(causal=True))
    for got, want in zip(jax.tree.leaves((found[0], found[1][:3])), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=2e-2, atol=2e-2)
    assert not found[1][3][0].bias[np.isinf(bias)].any()


@runs
def test_a_curve_grouped_heads_unequal_lengths():
    """Tiles with and without knots, of two documents."""
    sizes = Sizes(B=1, T=130, S=200, N=2, K=1, H=24, W=40)
    ids = jnp.asarray([[1] * 90 + [2] * 110])
    mask = AttentionMask(causal=True, query_segments=ids[:, 70:], key_segments=ids)
    term = fire(2, batch=1, queries=130, keys=200, knots=6)
    compare(sizes, dtype=jnp.float16, beside=(term,), mask=mask, dropout=(0.1, jax.random.key(5)))


@runs
def test_a_curve_beside_others():
    sizes = Sizes(B=1, T=70, S=70, H=32, W=32)
    (*_, columns), _ = inputs(sizes, "row_column", seed=1)
    beside = fire(2, batch=1, queries=70, keys=70, knots=3), dense(1, 2, 70, 70), *columns
    compare(sizes, "toeplitz", beside=beside)


@runs
@pytest.mark.parametrize("width", [64, 128])
def test_a_sinusoid_is_no_table(width):
    FUSED.compare_sinusoid(Sizes(B=1, T=200, S=200, H=width, W=width), jnp.bfloat16)


@runs
def test_dropout_drops_what_the_reference_drops():
    compare(Sizes(T=140, S=140, H=32, W=32), "toeplitz", dropout=(0.2, jax.random.key(5)))


@runs
def test_float16():
    compare(Sizes(T=140, S=140, H=32, W=32), "toeplitz", dtype=jnp.float16)


@runs
def test_rows_that_see_nothing_are_zero_with_zero_gradients():
    sizes = Sizes(T=40, S=30, H=32, W=32)
    (q, k, v, terms), cotangent = inputs(sizes, "toeplitz")
    mask = AttentionMask(causal=True)  # the first ten queries stand before every key
    out, gradients = with_gradients((q, k, v, terms), cotangent, jnp.bfloat16, mask=mask)
    assert not out[:, :10].any() and out[:, 10:].any(axis=(0, 2, 3)).all()
    assert not gradients[0][:, :10].any()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(gradients))


@runs
def test_a_value_of_minus_infinity_masks():
    sizes = Sizes(T=140, S=140, H=32, W=32)
    (q, k, v, _), cotangent = inputs(sizes, "none")
    banned = np.where(np.abs(np.arange(-139, 140)) % 3 == 1, -np.inf, 0).astype(np.float32)
    terms = (Toeplitz(np.stack([banned, 0 * np.maximum(banned, 0)])),)
    out, gradients = with_gradients((q, k, v, terms), cotangent, jnp.bfloat16)
    rounded = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (q, k, v))
    expected, _ = truth((*rounded, terms), cotangent)
    assert np.linalg.norm(np.asarray(out, np.float32) - expected) < 4e-3 * np.linalg.norm(expected)
    assert not gradients[3][0].values[0][np.isinf(banned)].any()


@runs
def test_the_same_bits_twice():
    (q, k, v, terms), cotangent = inputs(Sizes(T=260, S=260, H=64, W=64), "toeplitz")
    call = {"mask": AttentionMask(causal=True), "dropout": (0.1, jax.random.key(0))}
    first, second = (with_gradients((q, k, v, terms), cotangent, jnp.bfloat16, **call) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@runs
def test_the_same_bits_of_tables_gradients_twice():
    (q, k, v, terms), cotangent = inputs(Sizes(B=4, T=260, S=260, H=64, W=64), "query_and_key")
    first, second = (with_gradients((q, k, v, terms), cotangent, jnp.bfloat16) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@runs
def test_the_same_bits_of_a_dense_gradient_twice():
    (q, k, v, _), cotangent = inputs(Sizes(B=3, T=260, S=260, H=64, W=64), "none")
    arguments = q, k, v, (dense(1, 2, 260, 260),)
    first, second = (with_gradients(arguments, cotangent, jnp.bfloat16) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.skipif(not ON_GPU, reason="on GPUs alone; tests/aot compiles it for eight")
@pytest.mark.parametrize("kind", ["toeplitz", "query_and_value", "query_and_key", "dense"])
def test_over_devices_it_is_what_it_is_on_one(kind):
    """Batch over two, heads over two; a table's gradient is the sum over both halves of the batch."""
    mesh = Mesh(np.array(first(4)).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sizes = Sizes(T=20, S=20, N=4, K=2, H=32, W=32)
    (q, k, v, terms), cotangent = inputs(sizes, "none" if kind == "dense" else kind)
    terms = (dense(1, 1, 20, 20),) if kind == "dense" else terms
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
    one = with_gradients((q, k, v, terms), cotangent, jnp.bfloat16)
    several = with_gradients((put(q), put(k), put(v), terms), cotangent, jnp.bfloat16)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), several, one)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (4, 4)], ids=["one", "heads", "rows", "whole"])
def test_each_device_gives_its_part_of_a_dense_gradient(monkeypatch, shape):
    """With kernels that sum what they are given, so that every part is counted once."""
    mesh = Mesh(np.array(first(4)).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data", None, "tensor")))

    def of_bias(plan, q, k, v, gradient, given):
        summed = jnp.einsum("btnh,bsnh->bnts", gradient.astype(jnp.float32), k.astype(jnp.float32))
        shared = tuple(axis for axis in (0, 1) if given.dense["bias"].shape[axis] == 1)
        return (jnp.sum(summed, axis=shared, keepdims=True),)

    monkeypatch.setattr(pallas_gpu, "backward_queries", lambda plan, q, *_: (q,))
    monkeypatch.setattr(pallas_gpu, "backward_keys", lambda plan, q, k, v, *_: (k, v, k[..., 0].swapaxes(1, 2)))
    monkeypatch.setattr(pallas_gpu, "backward_bias", of_bias)
    monkeypatch.setattr(pallas_gpu, "forward", lambda plan, q, *_: (q, q[..., 0].swapaxes(1, 2)))
    x = np.asarray(jax.random.normal(jax.random.key(0), (4, 128, 4, 32), jnp.bfloat16))
    terms = (Dense(np.zeros((*shape, 128, 128), np.float32)),)

    def run(q, k, v):
        return with_gradients((q, k, v, terms), np.ones(x.shape, np.float32), jnp.bfloat16)[1][3][0].bias

    np.testing.assert_allclose(run(put(x), put(x), put(x)), run(x, x, x), rtol=1e-5, atol=1e-4)


@runs
@pytest.mark.skipif(not ON_GPU, reason="long: on a GPU alone")
@pytest.mark.parametrize("width", [64, 128])
def test_length_1000(width):
    compare(Sizes(B=2, T=1000, S=1000, N=4, K=2, H=width, W=width), "toeplitz", mask=AttentionMask(window=(300, 200)))


@pytest.mark.parametrize("kind", ["none", "toeplitz", "row_column", "query_and_value", "query_and_key", "dense"])
def test_lowers_for_cuda_without_a_gpu(kind):
    sizes = Sizes(T=300, S=300, H=64, W=64)
    (q, k, v, terms), _ = inputs(sizes, kind)
    q, k, v = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (q, k, v))
    mask, positions = MASKS["segments_window"](sizes)
    mask, positions = jax.tree.map(jnp.asarray, (mask, positions))
    call = functools.partial(attention, mask=mask, positions=positions, implementation="pallas_gpu")

    def loss(q, k, v, terms):
        return jnp.sum(call(q, k, v, terms=terms, dropout=(0.1, jax.random.key(0))).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(q, k, v, terms).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("mosaic_gpu") >= 3
    quadratic = "300x300x" in text or "384x384x" in text
    assert quadratic == (kind == "dense"), "an array of all queries by all keys"


@pytest.mark.skipif(ON_GPU, reason="this is a GPU")
def test_on_another_platform_it_fails_at_lowering():
    q = jnp.ones((1, 8, 2, 32), jnp.bfloat16)
    with pytest.raises(ValueError, match="CPU"):
        jax.jit(lambda q: attention(q, q, q, implementation="pallas_gpu")).lower(q)


@pytest.mark.parametrize(
    ("chosen", "capability", "length", "dtype"),
    [
        ("pallas_gpu", "9.0", 64, jnp.bfloat16),
        ("xla", "10.0", 64, jnp.bfloat16),
        ("xla", "9.0", 63, jnp.bfloat16),
        ("xla", "9.0", 64, jnp.float32),
    ],
)
def test_what_is_chosen_where_nothing_is_named(monkeypatch, chosen, capability, length, dtype):
    q = jnp.ones((1, length, 2, 32), dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert api._best(q, q, (), AttentionMask(), Placement.of(None, length, length)) == chosen


def table(rows, width=32):
    return Table(jnp.ones((rows.num_rows, 1, width)), rows)


def _call(dtype=jnp.bfloat16, width=32, **more):
    q = jnp.ones((1, 8, 2, width), dtype)
    return attention(q, q, q, implementation="pallas_gpu", **more)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("bfloat16 and float16, not float32. implementation='xla' does it", {"dtype": jnp.float32}),
        ("at most 128 wide, not 160", {"width": 160}),
        ("no key table", {"terms": (Relative(key=table(Clip(3)), value=table(Clip(3))),)}),
        ("are one Clip", {"terms": (Relative(value=table(LogBuckets(8, 16))),)}),
        ("are one Clip", {"terms": (Relative(query=table(Clip(3)), value=table(Clip(4))),)}),
        ("at most at 64", {"terms": (Relative(value=table(Clip(65))),)}),
        ("no other term", {"terms": (Relative(value=table(Clip(3))), Toeplitz(jnp.ones((2, 9))))}),
        ("at most 64 wide, not 96", {"width": 96, "terms": (Relative(query=table(LogBuckets(8, 16), 96)),)}),
        ("beside Dense", {"terms": (Relative(query=table(Clip(3))), Dense(jnp.ones((1, 2, 8, 8))))}),
        ("one PiecewiseLinear at most", {"terms": (fire(2, batch=1, queries=8, keys=8),) * 2}),
        ("no Multiply", {"terms": (Multiply(jnp.ones((2, 9))),)}),
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


def test_what_does_not_depend_on_distance_takes_any_positions():
    positions = Positions(jnp.arange(0, 16, 2, dtype=jnp.int32)[None])
    terms = (RowColumn(jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8))),)
    shape = jax.eval_shape(lambda: _call(terms=terms, positions=positions)).shape
    assert shape == (1, 8, 2, 32)
