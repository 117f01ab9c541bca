"""Attention against the tables of numbers of the sources: mixers.md sections 1 and 2.1, encodings.md sections 8, 9, 12, 18 and 19."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import (
    AttentionMask,
    Clip,
    Multiply,
    Relative,
    Reverse,
    Table,
    Toeplitz,
    Wave,
    attention,
    logits,
)

NAMES = ("reference", "xla")
CAUSAL = AttentionMask(causal=True)


def one_head(x):
    return jnp.asarray(x, jnp.float32)[None, :, None, :]


def lin(n, d, a, b):
    return one_head(np.sin(a * np.arange(1, n + 1)[:, None] + b * np.arange(1, d + 1)))


def tab(rows, scale=0.1):
    return jnp.asarray(scale * np.cos(np.arange(rows)[:, None] + 2 * np.arange(4)), jnp.float32)[:, None]


ROW, CHANNEL = np.arange(4)[:, None], np.arange(4)
Q = one_head(np.sin(0.3 * ROW + 0.7 * CHANNEL + 0.1))
K = one_head(np.cos(0.2 * ROW - 0.5 * CHANNEL + 0.4))
V = one_head(np.sin(0.11 * (ROW + 1) * (CHANNEL + 1)))


def near(found, expected):
    chex.assert_trees_all_close(np.asarray(found), np.asarray(expected, np.float32), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_softmax_attention_and_its_gradients(name):
    q, k, v, gradient = lin(4, 2, 0.7, 1.3), lin(4, 2, 1.1, 0.5), lin(4, 2, 0.4, 0.9), lin(4, 2, 0.3, 0.2)
    out, pull = jax.vjp(lambda *a: attention(*a, implementation=name), q, k, v)
    near(out[0, :, 0], [[0.906614, 0.465112], [0.849639, 0.265937], [0.796143, 0.113633], [0.770578, 0.055165]])
    d_q, d_k, d_v = (x[0, :, 0] for x in pull(gradient))
    near(d_q, [[0.149194, 0.128552], [0.216116, 0.161690], [0.197407, 0.121878], [0.180107, 0.099307]])
    near(d_k, [[0.051034, -0.141233], [-0.029647, -0.162324], [-0.078657, -0.040170], [0.057271, 0.343727]])
    near(d_v, [[0.452318, 0.547422], [0.613161, 0.709616], [1.010245, 1.108603], [0.997715, 1.083180]])
    causal = attention(q, k, v, mask=CAUSAL, implementation=name)
    near(causal[0, :, 0], [[0.963558, 0.808496], [0.979843, 0.638739], [0.910895, 0.327945], [0.770578, 0.055165]])
    near(jax.nn.logsumexp(logits((), q, k), axis=-1)[0, 0], [1.476777, 1.505648, 1.725496, 1.824525])


@pytest.mark.parametrize("name", NAMES)
def test_shaw(name):
    relative = Relative(query=Table(tab(5), Clip(2)), value=Table(tab(5, 0.2), Clip(2)))
    near(logits((relative,), Q, K)[0, 0, 1], [1.163102, 1.243742, 1.270252, 1.243650])
    out = attention(Q, K, V, terms=(relative,), implementation=name)
    near(out[0, 1, 0], [0.192585, 0.497406, 0.787297, 0.733184])
    causal = attention(Q, K, V, terms=(relative,), mask=CAUSAL, implementation=name)
    near(causal[0, 3, 0], [0.375984, 0.372035, 0.658850, 0.907826])


@pytest.mark.parametrize("name", NAMES)
def test_nezha(name):
    wave = Wave(base=10000.0, phase=0.0)
    values = wave.table(129, 4)
    near(values[64:66], [[0.920026, 0.391857, 0.597195, 0.802096], [0.826829, -0.562454, 0.605186, 0.796084]])
    table = Table(jnp.asarray(values)[:, None], Clip(64), wave=wave)
    relative = Relative(query=table, value=table)
    near(logits((relative,), Q, K)[0, 0, 1], [2.160889, 2.123128, 1.710699, 1.330103])
    out = attention(Q, K, V, terms=(relative,), implementation=name)
    near(out[0, 1, 0], [0.751251, 0.633755, 1.214248, 1.530133])
    paper = Table(jnp.asarray(Wave(10000.0, phase=64.0).table(129, 4))[:, None], Clip(64))
    near(logits((Relative(query=paper),), Q, K)[0, 0, 1], [1.531595, 1.983412, 1.976136, 1.546310])


def test_t5_and_alibi():
    bucket = np.array([2, 2, 2, 1, 0, 5, 6, 6, 6])
    t5 = Toeplitz(jnp.asarray(0.1 * np.cos(bucket), jnp.float32)[None])
    near(logits((t5,), Q, K)[0, 0, 1], [1.214355, 1.338573, 1.295809, 1.341801])
    alibi = Toeplitz(jnp.asarray(-0.5 * np.abs(np.arange(-3, 4)), jnp.float32)[None])
    near(logits((alibi,), Q, K)[0, 0, 1], [0.660324, 1.238573, 0.767443, 0.245784])
    near(logits((alibi,), Q, K)[0, 0, 3], [-0.330949, 0.164598, 0.613717, 1.018435])
    for name in NAMES:
        out = attention(Q, K, V, terms=(alibi,), mask=CAUSAL, implementation=name)
        near(out[0, 3, 0], [0.324580, 0.602698, 0.795628, 0.878741])


def test_deberta():
    # δ = clip(i − j + 2, 0, 3): rows over −r, of which the fourth repeats, as Clip(2) has five.
    last = np.array([0, 1, 2, 3, 3])
    code = Reverse(Clip(2))
    content = Table(tab(4)[last], code)
    scale = 1 / np.sqrt(12)
    both = Relative(query=content, key=Table(tab(4, 0.2)[last], code))
    near(logits((both,), Q, K, scale=scale)[0, 0, 1], [0.647249, 0.706533, 0.749833, 0.739022])
    paper = Relative(query=content, key=Table(tab(4, 0.2)[last], Clip(2)))
    near(logits((paper,), Q, K, scale=scale)[0, 0, 1], [0.676656, 0.706533, 0.711611, 0.698854])


def test_huang():
    steps = jnp.asarray(1 + 0.1 * np.arange(5), jnp.float32)[None]
    near(logits((Multiply(steps[:, [2, 1, 0, 1, 2]]),), Q, K)[0, 0, 1], [1.276357, 1.238573, 1.394187, 1.494941])
    near(logits((Multiply(steps),), Q, K)[0, 0, 1], [1.276357, 1.486287, 1.647676, 1.744098])
    channels = Multiply(1 + tab(5)[:, 0][None])
    near(logits((channels,), Q, K)[0, 0, 1], [1.147753, 1.243260, 1.281213, 1.247336])
    both = Relative(query=Table(tab(5), Clip(2)), key=Table(tab(5), Clip(2)))
    near(logits((both,), Q, K)[0, 0, 1], [1.167536, 1.233747, 1.251415, 1.224030])
