"""RoPE's scalings, xPos and GTA: what they leave alone, what they refuse, and how exact they are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions, attention
from zoo.encodings import Dims, Place, Project, Site, logits, registry
from zoo.encodings.rope import angles
from zoo.encodings.rope_scaling import plain_frequencies
from zoo.errors import UserError

Q, K, V = (jax.random.normal(jax.random.key(seed), (1, 8, 2, 8)) for seed in range(3))
LONG = {"factor": 4.0, "original_length": 4}


@pytest.mark.parametrize("position", [100_000, 1_000_003])
def test_angles_are_exact_far_out(position):
    frequencies = plain_frequencies(1e4, 128)
    found = np.asarray(angles(jnp.array([position]), frequencies), np.float64)[0]
    for wave in (np.sin, np.cos):
        np.testing.assert_allclose(wave(found), wave(position * frequencies), atol=2e-4 if position < 200_000 else 2e-3)
    chex.assert_trees_all_close(
        angles(jnp.array([-3]), frequencies)[0] % (2 * jnp.pi), -3 * frequencies % (2 * np.pi), atol=1e-3
    )


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(
    "scaling",
    [
        {"name": "linear", "factor": 1.0},
        {"name": "ntk", "factor": 1.0},
        {"name": "yarn", "factor": 1.0, "original_length": 4},
        {"name": "llama3", "factor": 1.0, "original_length": 4},
        {"name": "dynamic_ntk", "factor": 4.0, "original_length": 8},
    ],
    ids=lambda s: s["name"],
)
def test_a_factor_of_one_is_plain_rope(scaling, fraction, layout):
    rope = {"name": "rope", "layout": layout, "fraction": fraction}
    chex.assert_trees_all_close(logits({**rope, "scaling": scaling}, Q, K), logits(rope, Q, K), atol=1e-5)


def test_linear_scaling_is_that_of_positions():
    scaled = logits({"name": "rope", "scaling": {"name": "linear", "factor": 2.0}}, Q, K, 2 * jnp.arange(8))
    chex.assert_trees_all_close(scaled, logits("rope", Q, K), atol=1e-5)


def test_dynamic_ntk_changes_beyond_the_original_length():
    scaled = {"name": "rope", "scaling": {"name": "dynamic_ntk", **LONG}}
    assert jnp.abs(logits(scaled, Q, K) - logits("rope", Q, K)).max() > 0.1
    short = Q[:, :4], K[:, :4]
    chex.assert_trees_all_close(logits(scaled, *short), logits("rope", *short), atol=1e-6)


def test_yarn_scales_logits_by_the_square_of_its_temperature():
    plain = logits({"name": "rope", "scaling": {"name": "yarn", **LONG, "attention_factor": 1.0}}, Q, K)
    warm = logits({"name": "rope", "scaling": {"name": "yarn", **LONG}}, Q, K)
    chex.assert_trees_all_close(warm, plain * (0.1 * np.log(4.0) + 1) ** 2, atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ({"name": "linear", "factor": 0.5}, "factor=0.5 stretches positions; it must be at least 1"),
        ({"name": "yarn", "factor": 2.0}, "rope scaling 'yarn' needs original_length"),
        ({"name": "yarn", **LONG, "fast": 0.5}, "0 < slow < fast"),
        ({"name": "llama3", "low": 4.0}, "0 < low < high"),
        ({"name": "yran", **LONG}, "unknown rope scaling 'yran'; did you mean 'yarn'"),
    ],
    ids=lambda s: str(s.get("name")) if isinstance(s, dict) else "",
)
def test_scaling_refusals(scaling, reason):
    with pytest.raises(UserError, match=reason):
        registry.build({"name": "rope", "scaling": scaling})


def test_ntk_refuses_a_single_pair():
    with pytest.raises(ValueError, match="at least 4 rotary channels, not 2; use linear or yarn"):
        logits({"name": "rope", "fraction": 0.25, "scaling": {"name": "ntk", "factor": 2.0}}, Q, K)


@pytest.mark.parametrize("name", ["rope", "xpos", "gta", "bipe_rope"])
def test_a_head_width_that_cannot_turn_is_refused_by_name(name):
    with pytest.raises(
        ValueError, match=f"encoding '{name}'.* head width 7.*must be even.*use another head_dim, or alibi"
    ):
        registry.build(name).shared(Dims(14, 2, 2, 7, 1, 8))


# --- xPos


def test_xpos_decays_by_pair_whatever_the_centre():
    """Of one pair alone: RoPE's product times ζ^((i − j)/scale_base); a longer span moves the centre and nothing else."""
    config = {"name": "xpos", "scale_base": 16.0}
    for pair in range(4):
        only = jnp.zeros(8).at[2 * pair : 2 * pair + 2].set(1.0)
        found = logits(config, Q * only, K)
        zeta = (2 * pair / 8 + 0.4) / 1.4
        factor = zeta ** (np.subtract.outer(np.arange(8), np.arange(8)) / 16.0)
        expected = logits({"name": "rope", "layout": "interleaved"}, Q * only, K) * factor
        chex.assert_trees_all_close(found, expected, atol=1e-5)
    far = logits(config, Q, K, 500 + jnp.arange(8))
    lower = np.tril_indices(8)
    chex.assert_trees_all_close(far[..., *lower], logits(config, Q, K)[..., *lower], atol=1e-4)


def test_xpos_blocks_let_a_query_see_two():
    config = {"name": "xpos", "block": 2}
    found = logits(config, Q, K, mask=AttentionMask(causal=True))[0, 0]
    visible = [np.flatnonzero(np.isfinite(row)).tolist() for row in found]
    assert visible[4] == [2, 3, 4] and visible[5] == [2, 3, 4, 5] and visible[1] == [0, 1]
    assert max(i - min(keys) for i, keys in enumerate(visible)) == 3, "never further than the training length allows"
    causal = AttentionMask(causal=True)
    wide = logits({"name": "xpos", "block": 4}, Q, K, mask=causal)
    chex.assert_trees_all_equal(wide, logits("xpos", Q, K, mask=causal))


def test_xpos_blocks_are_for_inference():
    layer = registry.build({"name": "xpos", "block": 2}).layer(Dims(16, 2, 2, 8, 1, 8))
    for train in (True, False):
        place = Place(Positions.arange(8), span=7, train=train)
        tables = registry.build("xpos").shared(Dims(16, 2, 2, 8, 1, 8)).apply({}, place)
        site = Site(Q, Q, {}, Project(None, None, None), place, AttentionMask(causal=True))
        mask = layer.apply({}, tables, Q, K, V, site).mask
        assert mask is None if train else mask == AttentionMask(causal=True, block=2)


def test_xpos_refuses_what_its_powers_cannot_hold():
    with pytest.raises(UserError, match=r"reaches over 32768 positions, here 40000 lie.*use alibi"):
        logits("xpos", Q, K, jnp.array([0, 1, 2, 3, 4, 5, 6, 40_000]))
    half = (x.astype(jnp.float16) for x in (Q, K))
    with pytest.raises(UserError, match="reaches over 4086 positions in float16"):
        logits("xpos", *half, jnp.array([0, 1, 2, 3, 4, 5, 6, 5000]))
    outside = logits("xpos", Q, K, Positions(50_000 + jnp.arange(8)[None], contiguous=True))
    assert jnp.all(jnp.isnan(outside)), "a position beyond the span is neither clamped nor left to overflow"


# --- GTA


def attended(config, positions):
    """The output of one layer at `positions`."""
    part, dims = registry.build(config), Dims(16, 2, 2, 8, 1, 8)
    place = Place(positions, span=20)
    shared = part.shared(dims).apply({}, place)
    site = Site(Q, Q, {}, Project(None, None, None), place, AttentionMask())
    layer = part.layer(dims)
    e = layer.apply({}, shared, Q, K, V, site)
    out = attention(e.q, e.k, e.v)
    return layer.apply({}, out, shared, {}, site, method="back")[0]


def test_gta_outputs_depend_on_differences_alone():
    one = attended("gta", Positions(jnp.arange(8)[None]))
    chex.assert_trees_all_close(one, attended("gta", Positions(jnp.arange(8)[None] + 9)), atol=1e-5)
    plain = attended({"name": "gta", "transform_values": False}, Positions(jnp.arange(8)[None]))
    assert jnp.abs(one - plain).max() > 0.1
    same = attended("gta", Positions(jnp.full((1, 8), 5)))
    chex.assert_trees_all_close(same, attention(Q, K, V), atol=1e-5)


def test_gta_on_a_grid():
    """Rows turn the first half of the pairs and columns the second; a shift of the grid changes nothing, a swap does."""
    config = {"name": "gta", "grid": (4, 8)}
    grid = jnp.stack(jnp.divmod(jnp.arange(8), 4), axis=-1)[None]

    def out(grid):
        return attended(config, Positions(jnp.arange(8)[None], grid=grid))

    one = out(grid)
    chex.assert_trees_all_close(one, out(grid + jnp.array([2, 3])), atol=1e-5)
    assert jnp.abs(one - out(grid[..., ::-1])).max() > 0.1
    # A column more turns pair m by 2π/8 · 2^(m − M): with two pairs per axis the slow one by an eighth of a half turn.
    part = registry.build(config).shared(Dims(16, 2, 2, 8, 1, 8))
    turn = part.apply({}, Place(Positions(jnp.arange(2)[None], grid=jnp.array([[[0, 0], [0, 1]]])), span=1))[0]
    chex.assert_trees_all_close(jnp.arccos(turn.cos[0, 1]), jnp.array([0, 0, np.pi / 8, np.pi / 4]), atol=1e-3)
    with pytest.raises(UserError, match=r"'gta' with a grid needs rows and columns"):
        attended(config, Positions(jnp.arange(8)[None]))
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        registry.build(config).shared(Dims(12, 2, 2, 6, 1, 8))
