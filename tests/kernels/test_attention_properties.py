"""What must hold of attention whatever the numbers: dropout, packing, empty rows, memory, repetition, precision."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Clip, LogBuckets, Positions, Relative, Reverse, Table, Toeplitz, attention
from kernels.attention.dropout import keep_mask, key_words
from tests.kernels.attention_cases import (
    IMPLEMENTATIONS,
    KINDS,
    MASKS,
    Sizes,
    inputs,
    packed,
    restarting,
    truth,
    value_and_gradients,
)
from tests.memory import assert_linear, temporary_bytes

GOLDEN_BITS = ["1011111011001001", "0001010011111000", "0111100100110011", "0100000011001000"]

each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda i: f"{i.name}-{i.chunk}")


def test_dropout_is_the_same_everywhere_and_differentiated():
    sizes, dropout = Sizes(T=11, S=13, N=4), (0.3, jax.random.key(5))
    arguments, cotangent = inputs(sizes, "several")
    expected = truth(arguments, cotangent, dropout=dropout)
    for implementation in IMPLEMENTATIONS[1:]:
        found = value_and_gradients(implementation, arguments, cotangent, dropout=dropout)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=3e-5)


def test_dropout_bits():
    words, place = key_words(jax.random.key(0)), jnp.arange(256)
    keep = np.asarray(keep_mask(words, 0.25, 4, 4, place, place))
    deviation = np.sqrt(0.25 * 0.75 / keep.size)
    assert abs(keep.mean() - 0.75) < 4 * deviation
    # Every axis matters, in both directions: neighbours agree as often as independent bits do.
    for axis in range(4):
        agree = (keep == np.roll(keep, 1, axis)).mean()
        assert abs(agree - (0.75**2 + 0.25**2)) < 6 * deviation
    # So do the two queries that share a hash.
    upper, lower = np.moveaxis(keep.reshape(4, 4, 16, 2, 8, 256), 3, 0)
    for entries, share in ((upper, 0.75), (lower, 0.75), (upper == lower, 0.75**2 + 0.25**2)):
        assert abs(entries.mean() - share) < 4 * np.sqrt(share * (1 - share) / entries.size)
    other = np.asarray(keep_mask(key_words(jax.random.key(1)), 0.25, 4, 4, place, place))
    assert abs((keep == other).mean() - (0.75**2 + 0.25**2)) < 6 * deviation
    # A tile gets the bits of its place.
    part = keep_mask(words, 0.25, 4, 4, place[100:107], place[31:95])
    chex.assert_trees_all_equal(np.asarray(part), keep[:, :, 100:107, 31:95])
    # A resumed run must drop what the first one dropped: the bits are part of the contract.
    rows = jnp.asarray([0, 1, 8, 9])
    first = np.asarray(keep_mask(words, 0.5, 1, 1, rows, place[:16]))[0, 0].astype(int)
    assert ["".join(map(str, row)) for row in first] == GOLDEN_BITS


def test_dropout_scales_what_it_keeps():
    q = k = jnp.zeros((1, 8, 1, 4))
    v = jnp.eye(8)[None, :, None, :]
    out = np.asarray(attention(q, k, v, dropout=(0.5, jax.random.key(3))))[0, :, 0]
    assert set(np.unique(out)) == {0.0, 0.25}


@each
def test_packed_equals_separate(implementation):
    lengths = (3, 5, 4)
    ids = packed(*lengths)
    sizes = Sizes(B=1, T=12, S=12)
    (q, k, v, _), _ = inputs(sizes, "none")
    rng = np.random.default_rng(1)
    table = [rng.standard_normal((5, 1, width)).astype(np.float32) for width in (sizes.H, sizes.H, sizes.W)]
    terms = (
        Relative(*(Table(jnp.asarray(values), Clip(2)) for values in table)),
        Toeplitz(jnp.asarray(rng.standard_normal((2, 7)), jnp.float32)),
    )
    positions = Positions(jnp.asarray(restarting(ids))[None], contiguous=True)
    mask = AttentionMask(query_segments=jnp.asarray(ids)[None], key_segments=jnp.asarray(ids)[None])
    run = jax.jit(implementation)
    together = run(*(jnp.asarray(x) for x in (q, k, v)), terms=terms, mask=mask, positions=positions)
    for number in (1, 2, 3):
        part = ids == number
        alone = run(*(jnp.asarray(x[:, part]) for x in (q, k, v)), terms=terms)
        chex.assert_trees_all_close(np.asarray(together)[:, part], np.asarray(alone), atol=1e-6)


@each
def test_rows_without_keys_are_zero_with_zero_gradients(implementation):
    sizes = Sizes(T=6, S=6)
    (q, k, v, _), cotangent = inputs(sizes, "none")
    # Row 0 of the batch has no key at all; in row 1 the first two queries lose theirs to −inf beyond r = −1 and the mask.
    mask = AttentionMask(causal=True, key_valid=np.array([[False] * 6, [False] + [True] * 5]))
    forward = np.where(np.arange(-5, 6) == 0, -np.inf, 0.5).astype(np.float32)
    terms = (Toeplitz(np.stack([forward, forward])), Relative(value=Table(np.ones((3, 1, 6), np.float32), Clip(1))))
    out, gradients = value_and_gradients(implementation, (q, k, v, terms), cotangent, mask=mask)
    chex.assert_tree_all_finite((out, gradients))
    assert not out[0].any() and not out[1, :2].any() and out[1, 2:].all()
    d_q, d_k, d_v, _ = gradients
    assert not any(x[0].any() for x in (d_q, d_k, d_v)) and not d_q[1, :2].any() and d_v[1, 1:5].any()


@pytest.mark.parametrize("place", ["segments", "gaps"])
def test_runs_are_equal_to_the_bit(place):
    sizes = Sizes(T=13, S=13, N=4)
    mask, positions = MASKS[place](sizes)
    arguments, cotangent = inputs(sizes, "several")
    runs = [value_and_gradients(IMPLEMENTATIONS[2], arguments, cotangent, mask=mask, positions=positions) for _ in "12"]
    chex.assert_trees_all_equal(*runs)


@each
def test_bfloat16_is_as_close_as_its_rounding(implementation):
    sizes = Sizes(T=9, S=9, N=4)
    (q, k, v, terms), cotangent = inputs(sizes, "several")
    q, k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (q, k, v))
    expected, exact = truth((q, k, v, terms), cotangent)

    def loss(arguments):
        q, k, v, terms = arguments
        out = implementation(*(x.astype(jnp.bfloat16) for x in (q, k, v)), terms=terms)
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    arguments = jax.tree.map(jnp.asarray, (q, k, v, terms))
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)
    for found, wanted in zip(jax.tree.leaves((out, gradients)), jax.tree.leaves((expected, exact)), strict=True):
        # Eight bits, a few roundings in a row.
        assert np.abs(np.asarray(found, np.float32) - wanted).max() < 4 * 2**-8 * np.abs(wanted).max()


# `make test` compiles one program of every kind of term; `make test-all` each alone.
TOGETHER = ("toeplitz", "multiply_channels", "query_per_head", "key_per_kv_head", "value")
TOGETHER += ("row_column", "piecewise_linear", "pairwise")
ALONE = [pytest.param((kind,), marks=pytest.mark.slow, id=kind) for kind in KINDS if kind not in ("dense", "several")]


def peak_memory(kinds, contiguous):
    """length → bytes held for the gradients of two causal layers over packed documents, with the terms of these kinds.

    The layers are a scan, as in a model: JAX may move out of it what is alike in both, and keep it for the backward pass.
    """

    def peak(length):
        sizes = Sizes(B=1, T=length, S=length, N=4, K=2, H=2, W=2)
        q, k, v = (jax.ShapeDtypeStruct((1, length, heads, 2), jnp.float32) for heads in (4, 2, 2))
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        terms = jax.tree.map(jax.typeof, sum((inputs(sizes, kind)[0][3] for kind in kinds), ()))

        def loss(arrays, token, segments):
            q, k, v, terms = arrays
            call = {
                "terms": terms,
                "mask": AttentionMask(causal=True, query_segments=segments, key_segments=segments),
                "positions": Positions(token, contiguous=contiguous),
                "implementation": "xla",
            }
            return jax.lax.scan(lambda q, _: (attention(q, k, v, **call), None), q, None, length=2)[0].sum()

        return temporary_bytes(jax.grad(loss), (q, k, v, terms), ids, ids)

    return peak


@pytest.mark.cpu
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("kinds", [pytest.param(TOGETHER, id="together"), *ALONE])
def test_memory_is_linear_in_length(kinds, contiguous):
    assert_linear(peak_memory(kinds, contiguous), 2048)


@pytest.mark.cpu
def test_the_measure_sees_one_array_of_pairs():
    """`Dense` is the one term that may hold one: the same measure refuses it."""
    with pytest.raises(AssertionError, match="times as much"):
        assert_linear(peak_memory(("dense",), True), 2048)


def test_log_buckets_and_their_reverse():
    rows = LogBuckets(256, 512)
    x = np.array([127, 128, 129, 130, 135, 150, 200, 256, 300, 400, 500, 511])
    bucket = np.array([127, 128, 129, 130, 133, 143, 169, 192, 207, 233, 254, 255])
    lookup = rows.lookup()
    assert lookup.shape == (2 * rows.span + 1,) and rows.num_rows == 512
    np.testing.assert_array_equal(lookup[rows.span - x], bucket + 256)
    np.testing.assert_array_equal(lookup[rows.span + x], 256 - bucket)
    assert (lookup[0], lookup[-1]) == (511, 0), "512 and more away: the released code does not stop at 511"
    np.testing.assert_array_equal(Reverse(rows).lookup(), lookup[::-1])
