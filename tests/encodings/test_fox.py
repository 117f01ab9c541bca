"""FoX: its forget gate against sums written out, and its special cases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels.attention import AttentionMask, Positions, attention
from zoo.encodings import Dims, Place, Project, Site, logits, registry
from zoo.encodings.fox import running_sums
from zoo.errors import UserError

N, T, H = 2, 7, 4
Q, K, V, X, WEIGHTS = (
    jax.random.normal(jax.random.key(seed), shape)
    for seed, shape in enumerate([(1, T, N, H)] * 3 + [(1, T, N * H), (1, T, N, H)])
)
CAUSAL = AttentionMask(causal=True)
GATE = {"kernel": jax.random.normal(jax.random.key(8), (N * H, N)), "bias": jnp.array([0.5, -0.5])}
LOWER = np.tril_indices(T)


def scores(gate):
    return logits("fox", Q, K, params={"layer": {"gate": gate}}, x=X)[0][:, LOWER[0], LOWER[1]]


def constant_gate(log_forget):
    """A gate that says ln f = log_forget everywhere."""
    return {"kernel": jnp.zeros((N * H, N)), "bias": -jnp.log(jnp.expm1(-jnp.asarray(log_forget)))}


def test_a_gate_that_keeps_everything_does_nothing():
    kept = {"kernel": jnp.zeros((N * H, N)), "bias": jnp.full(N, 40.0)}
    chex.assert_trees_all_close(scores(kept), logits("none", Q, K)[0][:, LOWER[0], LOWER[1]], atol=1e-6)


def test_a_constant_gate_is_alibi():
    slope = 2.0 ** (-8.0 * np.array([1, 2]) / 2)
    alibi = logits({"name": "alibi", "form": "causal"}, Q, K)[0][:, LOWER[0], LOWER[1]]
    chex.assert_trees_all_close(scores(constant_gate(-slope)), alibi, atol=1e-5)


def test_gradients_equal_those_of_the_sums_written_out():
    """Through chunked attention, against a softmax over Σ_{j<u≤i} ln f_u as a masked sum."""
    layer = registry.build("fox").layer(Dims(N * H, N, N, H, 1, T))
    site = Site(X, X, {}, Project(None, None, None), Place(Positions.arange(T), span=T - 1), CAUSAL)

    def fused(gate):
        encoded = layer.apply({"params": {"gate": gate}}, None, Q, K, V, site)
        return (attention(Q, K, V, terms=encoded.terms, mask=CAUSAL) * WEIGHTS).sum()

    def dense(gate):
        log_forget = jax.nn.log_sigmoid(X @ gate["kernel"] + gate["bias"])
        u, i, j = (jnp.arange(T).reshape(shape) for shape in ((T, 1, 1), (1, T, 1), (1, 1, T)))
        between = ((j < u) & (u <= i)).astype(jnp.float32)
        decay = jnp.einsum("bun,uij->bnij", log_forget, between)
        s = jnp.einsum("btnh,bsnh->bnts", Q, K) / H**0.5 + decay
        p = jax.nn.softmax(jnp.where(jnp.tri(T, dtype=bool), s, -jnp.inf))
        return (jnp.einsum("bnts,bsnh->btnh", p, V) * WEIGHTS).sum()

    found, expected = jax.jit(jax.value_and_grad(fused))(GATE), jax.jit(jax.value_and_grad(dense))(GATE)
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-4)
    assert all(jnp.all(g != 0) for g in jax.tree.leaves(found[1]))


def test_a_gate_at_or_before_the_key_does_not_matter():
    moved = X.at[:, :3].add(5.0)
    one, two = (logits("fox", Q, K, params={"layer": {"gate": GATE}}, x=x) for x in (X, moved))
    chex.assert_trees_all_close(one[0, :, 5, 2:6], two[0, :, 5, 2:6], atol=1e-5)
    assert jnp.abs(one[0, :, 5, 1] - two[0, :, 5, 1]).max() > 0.1


def test_sums_begin_anew_in_every_document_and_padding_forgets_nothing():
    """Exactly, however long the row: the second document's sums are those it has alone, to the last bit."""
    log_forget = -jnp.abs(jax.random.normal(jax.random.key(0), (1, 4000, 2)))
    segments = jnp.where(jnp.arange(4000) < 3990, 1, 2)[None]
    packed = jax.jit(running_sums)(log_forget, segments)[:, 3990:]
    alone = np.cumsum(np.asarray(log_forget[:, 3990:], np.float64), axis=1)
    chex.assert_trees_all_close(packed, alone.astype(np.float32), rtol=5e-7)


def test_a_context_is_refused():
    layer = registry.build("fox").layer(Dims(N * H, N, N, H, 1, T))
    place = Place(Positions.arange(T), sources=Positions.arange(T), span=T - 1)
    site = Site(X, X, {}, Project(None, None, None), place, AttentionMask())
    with pytest.raises(UserError, match=r"'fox'.*cannot be used with attention to a context; use alibi"):
        layer.init(jax.random.key(0), None, Q, K, V, site)


def test_bidirectional_is_refused_with_the_reason():

    answer = zoo.compatible("fox", "softmax", mask=AttentionMask())
    assert "'fox' is defined for keys at or before the query only; use a causal mask" in answer.reason
    assert zoo.compatible(("fox", "rope"), "softmax", mask=CAUSAL)
