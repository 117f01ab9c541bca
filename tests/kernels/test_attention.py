"""Every implementation against the float64 reference: values and all gradients."""

import chex
import pytest

from tests.kernels.attention_cases import (
    IMPLEMENTATIONS,
    KINDS,
    MASKS,
    Sizes,
    inputs,
    truth,
    value_and_gradients,
)

REFERENCE, ONE_TILE, TILES = IMPLEMENTATIONS


def compare(implementation, sizes, kind, **call):
    assert kind in implementation.kinds
    arguments, cotangent = inputs(sizes, kind)
    expected = truth(arguments, cotangent, **call)
    found = value_and_gradients(implementation, arguments, cotangent, **call)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_terms_one_tile(kind):
    compare(ONE_TILE, Sizes(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_terms_tiles_grouped_unequal_lengths(kind):
    mask, positions = MASKS["causal"](Sizes())
    compare(TILES, Sizes(T=12, S=15, N=4), kind, mask=mask, positions=positions)


# Without the kinds that read positions, not tables: the masks below gather with them too.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("none", "row_column", "dense", "several")])
def test_terms_gathered(kind):
    sizes = Sizes(T=9, S=9, N=4)
    mask, positions = MASKS["gaps"](sizes)
    compare(TILES, sizes, kind, mask=mask, positions=positions)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_in_tiles(mask):
    sizes = Sizes(T=13, S=13)
    mask, positions = MASKS[mask](sizes)
    compare(TILES, sizes, "several", mask=mask, positions=positions)


@pytest.mark.parametrize(
    "kind", ["query", "key_per_head", "value", "toeplitz", "row_column", "piecewise_linear", "dense"]
)
def test_terms_in_bands(kind):
    mask, positions = MASKS["segments_window"](Sizes(T=17, S=17, N=4))
    compare(TILES, Sizes(T=17, S=17, N=4), kind, mask=mask, positions=positions)


@pytest.mark.parametrize("lengths", [(63, 63), (63, 40), (40, 63), (1, 63), (7, 1)])
def test_lengths(lengths):
    queries, keys = lengths
    compare(ONE_TILE, Sizes(B=1, T=queries, S=keys, N=2, K=1), "several")


def test_length_1000_in_a_window():
    mask, _ = MASKS["window"](Sizes())
    compare(ONE_TILE, Sizes(B=1, T=1000, S=1000, N=1, K=1), "several", mask=mask)


def test_reference_in_float32():
    compare(REFERENCE, Sizes(T=7, S=9, N=4), "several", **{"scale": 0.3})
