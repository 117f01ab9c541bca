"""A curve by the knots that a tile meets, against the sum over all knots."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention.curve import Curve, knots_met, knots_of, numbers_of, of_numbers
from kernels.attention.terms import PiecewiseLinear
from tests.kernels.fused_cases import fire

HEADS = 2


def drawn(knots: int = 5) -> PiecewiseLinear:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return PiecewiseLinear(normal(9), normal(1, 8), normal(knots), normal(HEADS, knots), normal(HEADS, 2))


def whole(term: PiecewiseLinear, head: int, u: jax.Array) -> jax.Array:
    bent = jnp.maximum(u[..., None], term.knots[None, None]) * term.slopes[head][None, None]
    return term.line[head, 0] + term.line[head, 1] * u + jnp.sum(bent, axis=-1)


def on(lowest: float, highest: float) -> jax.Array:
    return jnp.linspace(lowest, highest, 12, dtype=jnp.float32).reshape(3, 4)


def met(term: PiecewiseLinear, u: jax.Array) -> tuple[int, int]:
    knots = np.sort(term.knots)
    return int(np.searchsorted(knots, u.min())), int(np.searchsorted(knots, u.max(), side="right"))


@pytest.mark.parametrize("span", [(-4, 4), (-0.1, 0.3), (3.5, 4), (-4, -3.5)])
@pytest.mark.parametrize("head", range(HEADS))
def test_a_tile_s_values_and_gradients(span, head):
    term, u = drawn(), on(*span)
    df = jnp.cos(jnp.arange(u.size, dtype=jnp.float32)).reshape(u.shape)
    expected, pull = jax.vjp(lambda term, u: whole(term, head, u), term, u)
    of_term, du = pull(df)
    numbers, pull_numbers = jax.vjp(numbers_of, term)
    sums = jnp.zeros_like(numbers)

    def give(place, x):
        nonlocal sums
        sums = sums.at[head, place].add(jnp.sum(x))

    with jax.disable_jit():
        curve = Curve(numbers, head, *met(term, u))
        np.testing.assert_allclose(curve.at(u), expected, atol=2e-6)
        np.testing.assert_allclose(curve.gradients(u, df, give), du, atol=2e-6)
    (found,) = pull_numbers(of_numbers(numbers, sums))
    for name in ("line", "slopes", "knots"):
        np.testing.assert_allclose(getattr(found, name), getattr(of_term, name), atol=1e-5, err_msg=name)


def test_no_knots_are_a_straight_line():
    term, u = drawn(knots=0), on(-1, 1)
    curve = Curve(numbers_of(term), 1, 0, 0)
    np.testing.assert_allclose(curve.at(u), term.line[1, 0] + term.line[1, 1] * u, atol=1e-6)


@pytest.mark.parametrize("tile", [(64, 64), (64, 128), (128, 64)])
def test_the_knots_that_tiles_meet(tile):
    queries, keys = 256, 384
    rng = np.random.default_rng(1)
    knots = np.sort(rng.uniform(-2, 2, 7)).astype(np.float32)
    # Of both signs, and neither distance nor reach in any order.
    distance = np.cumsum(rng.standard_normal(queries + keys - 1)).astype(np.float32) / 8
    reach = rng.standard_normal((2, queries)).astype(np.float32)
    # A knot that a tile ends at is met.
    knots[3] = distance[queries - 1] * reach[0, 0]
    found = knots_met(*map(jnp.asarray, (knots, distance, reach)), tile, (queries, keys))
    r = np.arange(keys) - np.arange(queries)[:, None]
    u = distance[r + queries - 1] * reach[:, :, None]
    rows, columns = tile
    for b, i, j in itertools.product(range(2), range(queries // rows), range(keys // columns)):
        here = u[b, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        first, last = found[b, i, j]
        assert first <= np.sum(knots < here.min()) and last >= np.sum(knots <= here.max())


def test_far_tiles_of_fire_meet_few_of_its_knots():
    length = 1024
    term = fire(HEADS, batch=1, queries=length, keys=length)
    numbers = numbers_of(jax.tree.map(jnp.asarray, term))
    distance = jnp.concatenate([jnp.asarray(term.distance), jnp.zeros(length - 1, jnp.float32)])
    found = knots_met(knots_of(numbers), distance, jnp.asarray(term.row_scale), (64, 64), (length, length))
    count = (found[..., 1] - found[..., 0])[0]
    assert count[0, 0] > 5 and count[-1, 0] <= 2 and np.tril(count).mean() < 4
