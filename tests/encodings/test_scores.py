"""`zoo.encodings.logits`: any encoding's scores, from its name."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions
from tests.encodings.table import ROWS
from zoo.encodings import logits, registry
from zoo.errors import UserError

# Whatever an encoding may ask of positions, so that one call serves all.
EVERY_INDEX = Positions(
    jnp.arange(6)[None], sentence=jnp.arange(6)[None] // 2, within=jnp.arange(6)[None] % 2, contiguous=True
)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_without_an_encoding_they_are_scaled_products():
    q, k = normal(2, 3, 4, 8), normal(2, 5, 2, 8, seed=1)
    expected = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=2)) / np.sqrt(8)
    chex.assert_trees_all_close(logits("none", q, k), expected, atol=1e-5)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_last_queries_have_the_last_rows(row):
    """As in decoding: the scores of the last two queries are those rows of the full matrix."""
    q, k, x = normal(1, 6, 4, 8), normal(1, 6, 4, 8, seed=1), normal(1, 6, 32, seed=2)
    causal = AttentionMask(causal=not registry.build(row.config).facts().bidirectional)
    full = logits(row.config, q, k, EVERY_INDEX, x=x, mask=causal)
    last = logits(row.config, q[:, 4:], k, EVERY_INDEX, x=x, mask=causal)
    chex.assert_trees_all_close(last, full[:, :, 4:], atol=1e-5)


def test_positions_may_be_any_integers():
    q, k = normal(1, 4, 2, 8), normal(1, 4, 2, 8, seed=1)
    token = jnp.array([0, 3, 4, 9])
    found = logits({"name": "alibi"}, q, k, token)
    slopes = 2.0 ** (-8.0 * np.array([1, 2]) / 2)
    distance = np.abs(np.subtract.outer(token, token))
    expected = logits("none", q, k) - slopes[:, None, None] * distance
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    chex.assert_trees_all_close(found, logits("alibi", q, k, Positions(token[None])), atol=0)


def test_parameters_are_given_by_module():
    q, k = normal(1, 3, 2, 8), normal(1, 3, 2, 8, seed=1)
    table = normal(32, 2, seed=2)
    found = logits("t5", q, k, params={"shared": {"table": table}})
    chex.assert_trees_all_close(
        found - logits("t5", q, k, params={"shared": {"table": 0 * table}}) != 0, jnp.ones((1, 2, 3, 3), bool)
    )
    with pytest.raises(ValueError, match="'t5' has no parameters under embedding"):
        logits("t5", q, k, params={"embedding": {}})


def test_a_mask_hides():
    q, k = normal(1, 3, 2, 8), normal(1, 3, 2, 8, seed=1)
    found = logits("rope", q, k, mask=AttentionMask(causal=True))
    assert (jnp.isneginf(found[0, 0]) == ~jnp.tri(3, dtype=bool)).all()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bfloat16_at_position_100_000(row):
    """Angles, biases and sums are float32 wherever the tokens stand: only the operands of the product are narrow.

    Each of q and k is rounded once more after its transform, by 2^-9 of its size: two roundings of |q||k|/sqrt(H).
    """
    q, k, x = (
        a.astype(jnp.bfloat16) for a in (normal(1, 6, 4, 8), normal(1, 6, 4, 8, seed=1), normal(1, 6, 32, seed=2))
    )
    start = 100_000 if row.max_span is None else row.max_span - 6
    token = start + jnp.arange(6)[None]
    positions = Positions(token, sentence=token // 2, within=token % 2)
    causal = AttentionMask(causal=not registry.build(row.config).facts().bidirectional)
    q32, k32, x32 = (a.astype(jnp.float32) for a in (q, k, x))
    wide = logits(row.config, q32, k32, positions, x=x32, mask=causal)
    narrow = logits(row.config, q, k, positions, x=x, mask=causal)
    assert narrow.dtype == jnp.float32
    length = jnp.linalg.norm(q32, axis=-1).max() + (4 if row.name == "pia" else 0)
    scale = registry.build(row.config).facts().scale or 8**-0.5
    chex.assert_trees_all_close(narrow, wide, atol=float(2.0**-7 * scale * length**2))
    if row.max_span is not None:
        with pytest.raises(UserError, match=f"reaches over {row.max_span} positions"):
            logits(row.config, q, k, Positions(token + 20))
