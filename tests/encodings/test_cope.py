"""CoPE: counted positions against golden values, special cases and its tiles."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels.attention import AttentionMask, Toeplitz
from tests.encodings.test_golden import K as GOLDEN_K
from tests.encodings.test_golden import Q as GOLDEN_Q
from tests.encodings.test_golden import V as GOLDEN_V
from tests.encodings.test_golden import close
from zoo.encodings import logits
from zoo.encodings.cope import CountingCore
from zoo.errors import UserError

CAUSAL = AttentionMask(causal=True)
ROWS, CHANNELS = np.meshgrid(np.arange(3), np.arange(4), indexing="ij")
TABLE = jnp.asarray(0.1 * np.cos(ROWS + 2 * CHANNELS), jnp.float32)
GOLDEN = [jnp.asarray(x, jnp.float32)[None, :, None] for x in (GOLDEN_Q, GOLDEN_K, GOLDEN_V)]


def scores(q, k, table, **config):
    config = {"name": "cope", "max_count": table.shape[0], **config}
    return logits(config, q, k, params={"layer": {"table": table}}, mask=CAUSAL)


def test_golden_values():
    q, k, v = GOLDEN
    close(scores(q, k, TABLE)[0, 0, 3], [1.151258, 1.146805, 1.097249, 1.007624])
    close(CountingCore(TABLE, "code")(q, k, v, mask=CAUSAL)[0, 3, 0], [0.263310, 0.496373, 0.673533, 0.777537])


def test_gates_that_are_all_open_count_tokens():
    """p_ij = i − j + 1: a table looked up by the distance, clamped at its end; a table of zeros does nothing."""
    q = 1.0 + jnp.abs(jax.random.normal(jax.random.key(0), (1, 6, 2, 4)))
    k = jnp.full((1, 6, 2, 4), 50.0)
    table = jax.random.normal(jax.random.key(1), (4, 4))
    n = jnp.arange(6)[:, None] - jnp.arange(6)
    looked_up = table[jnp.clip(n + 1, 0, 3)]
    expected = (jnp.einsum("btnh,bsnh->bnts", q, k) + jnp.einsum("btnh,tsh->bnts", q, looked_up)) / 2
    lower = np.tril_indices(6)
    found = scores(q, k, table)[0][:, lower[0], lower[1]]
    chex.assert_trees_all_close(found, expected[0][:, lower[0], lower[1]], rtol=1e-6)
    nothing = scores(q, k, jnp.zeros((4, 4)))[0][:, lower[0], lower[1]]
    chex.assert_trees_all_close(nothing, logits("none", q, k)[0][:, lower[0], lower[1]], atol=1e-6)


def test_the_papers_gates_are_not_scaled():
    """form="paper" counts σ(⟨q, k⟩); written out for one row."""
    q, k, _ = GOLDEN
    row = np.asarray(scores(q, k, TABLE, form="paper"))[0, 0, 3]
    gates = 1 / (1 + np.exp(-np.asarray(GOLDEN_K) @ np.asarray(GOLDEN_Q)[3]))
    count = np.minimum(np.cumsum(gates[::-1])[::-1], 2)
    of_rows = np.asarray(TABLE) @ np.asarray(GOLDEN_Q)[3]
    close(row, 0.5 * (np.asarray(GOLDEN_K) @ np.asarray(GOLDEN_Q)[3] + np.interp(count, [0, 1, 2], of_rows)))


def test_tiles_equal_the_whole_with_segments_a_window_and_another_term(monkeypatch):
    """Outputs and the gradients of everything, in tiles of 4 queries and a rest."""
    q, k, v = (jax.random.normal(jax.random.key(s), (2, 10, n, 4)) for s, n in ((0, 2), (1, 1), (2, 1)))
    table, slope = jax.random.normal(jax.random.key(3), (3, 4)), jax.random.normal(jax.random.key(4), (2, 5))
    segments = jnp.array([[1] * 6 + [2] * 3 + [0]] * 2)
    mask = AttentionMask(causal=True, window=(3, 0), query_segments=segments, key_segments=segments)
    weights = jax.random.normal(jax.random.key(5), q.shape)

    def loss(q, k, v, table, slope):
        out = CountingCore(table, "code")(q, k, v, terms=(Toeplitz(slope),), mask=mask)
        return (out * weights).sum(), out

    def run():
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(q, k, v, table, slope)

    whole = run()
    monkeypatch.setattr("zoo.encodings.cope._CHUNK", 4)
    jax.clear_caches()
    chex.assert_trees_all_close(run(), whole, atol=1e-5)
    assert all(jnp.any(g != 0) for g in whole[1])


def test_what_it_cannot_do_is_refused():
    answer = zoo.compatible("cope", "softmax", mask=AttentionMask())
    assert "'cope' is defined for keys at or before the query only; use a causal mask" in answer.reason
    with pytest.raises(UserError, match="'cope' has its own attention, which has no implementation 'pallas_gpu'"):
        CountingCore(TABLE, "code")(*GOLDEN, mask=CAUSAL, implementation="pallas_gpu")
