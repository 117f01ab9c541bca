"""iRPE on a grid: its four maps against their definitions, shifts along both axes, and what it refuses."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions, attention
from tests.encodings.table import tiny_model
from zoo.encodings import Dims, Place, Project, Site, logits, registry
from zoo.errors import UserError

N, H = 2, 4
GRID = (3, 4)
CELLS = np.array([(row, column) for row in range(3) for column in range(4)])
MAPPINGS = ("product", "cross", "euclidean", "quantized")
Q, K, V = (jax.random.normal(jax.random.key(seed), (1, 12, N, H)) for seed in (0, 1, 2))


def g(x, b=3):
    """The piecewise index of one number at ratio 1.9, written out."""
    if abs(x) <= 1.9:
        return round(x)
    far = round(1.9 + math.log(abs(x) / 1.9) / math.log(8) * 1.9)
    return int(math.copysign(min(b, far), x))


def bucket(mapping, row, column):
    """The rows of the tables for an offset of query minus key, by the mapping's definition."""
    match mapping:
        case "product":
            return [(g(row) + 3) * 7 + g(column) + 3]
        case "cross":
            return [g(row) + 3, g(column) + 3]
        case "euclidean":
            return [g(round(math.sqrt(row**2 + column**2)))]
    return [g(row**2 + column**2)]


def test_golden_buckets():
    part = registry.build({"name": "irpe", "grid": (14, 14)})

    def at(part, row, column):
        return [rows.lookup()[rows.span - 28 * row - column] for rows in part.maps.values()]

    offsets = [(0, 0), (1, 0), (0, 1), (-3, 5), (13, -13)]
    assert [at(part, *offset) for offset in offsets] == [[24], [31], [25], [13], [42]]
    (rows,) = part.maps.values()
    assert rows.num_rows == 49
    assert at(registry.build({"name": "irpe", "grid": (14, 14), "mapping": "euclidean"}), 3, 4) == [3]
    for mapping in MAPPINGS:
        part = registry.build({"name": "irpe", "grid": (9, 14), "mapping": mapping})
        for row in range(-8, 9):
            for column in range(-13, 14):
                assert at(part, row, column) == bucket(mapping, row, column), (mapping, row, column)


def tables_of(part, seed=0):
    width = () if part.mode == "bias" else (H,)
    names = [(side + suffix, rows) for suffix, rows in part.maps.items() for side in part.on]
    shapes = {name: (rows.num_rows, 1, *width) for name, rows in names}
    return {name: jax.random.normal(jax.random.key(seed + i), shape) for i, (name, shape) in enumerate(shapes.items())}


def attended(part, **options):
    """(tables, positions) → the output of attention under one layer, compiled once."""

    @jax.jit
    def run(tables, positions):
        dims, place = Dims(N * H, N, N, H, 1, 128), Place(positions, span=127)
        site = Site(Q, Q, {}, Project(None, None, None), place, AttentionMask())
        e = part.layer(dims).apply({"params": tables}, None, Q, K, V, site)
        return attention(e.q, e.k, e.v, terms=e.terms, positions=place.attended, **options)

    return run


@pytest.mark.parametrize(("mapping", "implementation"), [("product", "xla"), ("cross", "reference")])
def test_contextual_tables_on_every_side(mapping, implementation):
    """On queries the index is that of the reversed offset."""
    part = registry.build({"name": "irpe", "mapping": mapping, "on": ("query", "key", "value"), "grid": GRID})
    tables = tables_of(part)
    rows = np.array([[bucket(mapping, *(i - j)) for j in CELLS] for i in CELLS])

    def looked_up(side, index):
        return sum(
            np.asarray(tables[side + suffix])[index[..., axis], 0] for axis, suffix in enumerate(part.maps.keys())
        )

    q, k, v = (np.asarray(x) for x in (Q, K, V))
    score = np.einsum("btnh,bsnh->bnts", q, k) + np.einsum("btnh,tsh->bnts", q, looked_up("key", rows))
    score = (score + np.einsum("bsnh,tsh->bnts", k, looked_up("query", rows.swapaxes(0, 1)))) / 2
    weights = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights, v) + np.einsum("bnts,tsh->btnh", weights, looked_up("value", rows))
    found = attended(part, implementation=implementation)(tables, Positions.on_grid(*GRID))
    chex.assert_trees_all_close(found, out, atol=2e-5)


def test_biases_are_outside_the_scale():
    mapping = "cross"
    part = registry.build({"name": "irpe", "mapping": mapping, "mode": "bias", "on": ("key", "query"), "grid": GRID})
    tables = tables_of(part)
    found = np.asarray(logits(part, Q, K, Positions.on_grid(*GRID), {"layer": tables}))
    found = found - np.einsum("btnh,bsnh->bnts", Q, K) / 2
    for i in (0, 5, 11):
        for j in (0, 3, 10):
            expected = sum(
                np.asarray(tables[side + suffix])[bucket(mapping, *offset)[axis], 0]
                for side, offset in (("key", CELLS[i] - CELLS[j]), ("query", CELLS[j] - CELLS[i]))
                for axis, suffix in enumerate(part.maps)
            )
            np.testing.assert_allclose(found[0, :, i, j], expected, atol=1e-5)


def test_shifts_along_both_axes_change_nothing():
    """A part of a larger grid, moved within it; exchanging rows and columns does change it."""
    part = registry.build({"name": "irpe", "on": ("query", "key", "value"), "grid": (6, 9)})
    tables, run = tables_of(part), attended(part)

    def out(cells):
        return run(tables, Positions(jnp.asarray(cells @ [18, 1])[None], grid=jnp.asarray(cells)[None]))

    one = out(CELLS)
    for by in ([2, 0], [0, 4], [3, 5]):
        chex.assert_trees_all_close(out(CELLS + by), one, atol=1e-5)
    assert jnp.abs(out(CELLS[:, ::-1]) - one).max() > 0.1


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_an_image_of_one_row_is_a_sequence(mapping):
    """Row for row of the tables; what belongs to the row offset 0 is the middle of `product`, and a constant of `cross`."""
    flat = registry.build({"name": "irpe", "mapping": mapping}).maps[""]
    image = registry.build({"name": "irpe", "mapping": mapping, "grid": (1, 40)}).maps
    at = np.arange(-39, 40)
    expected = flat.lookup()[np.clip(at, -flat.span, flat.span) + flat.span]
    if mapping == "cross":
        assert set(image["_rows"].lookup()) == {3}
        np.testing.assert_array_equal(image["_columns"].lookup(), expected)
    else:
        np.testing.assert_array_equal(image[""].lookup(), expected + (21 if mapping == "product" else 0))


def test_a_model_on_a_grid():
    """Positions that are not those of the grid give NaN, never the answer of another place."""
    model = tiny_model({"name": "irpe", "grid": (2, 3)})
    positions = Positions.on_grid(2, 3)
    ids = jnp.array([[3, 1, 4, 1, 5, 9]])
    params = jax.jit(model.init)(jax.random.key(0), ids, positions=positions)
    run = jax.jit(lambda token, grid: model.apply(params, ids, positions=Positions(token, grid=grid)).hidden)
    assert jnp.isfinite(run(positions.token, positions.grid)).all()
    assert jnp.isnan(run(jnp.arange(6)[None], positions.grid)).all(), "counted as a sequence"
    beside = positions.grid + jnp.array([1, 0])
    assert jnp.isnan(run(positions.token + 6, beside)).all(), "below the grid"


def test_refusals():
    part = registry.build({"name": "irpe", "grid": GRID})
    with pytest.raises(UserError, match=r"'irpe' with a grid needs rows and columns: give Positions.on_grid"):
        logits(part, Q, K, jnp.arange(0, 36, 3))
    with pytest.raises(UserError, match=r"grid of 3 × 4 has tokens at positions up to 19.*model.max_length=20 or more"):
        part.layer(Dims(N * H, N, N, H, 1, 19))
    with pytest.raises(UserError, match=r"grid=\(0, 4\) is \(rows, columns\)"):
        registry.build({"name": "irpe", "grid": (0, 4)})
    with pytest.raises(ValueError, match=r"pallas_gpu.*distances need contiguous positions"):
        attended(part, implementation="pallas_gpu")(tables_of(part), Positions.on_grid(*GRID))
    with pytest.raises(UserError, match="'irpe' cannot be evaluated step by step"):
        tiny_model({"name": "irpe", "grid": (2, 3)}, causal=True).init_cache(1, 8)
