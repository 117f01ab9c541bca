"""Attention resolution: its formula, and that the scores are those the model attends by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask
from tests.tasks.test_causal_lm import tiny
from zoo import encodings
from zoo.errors import UserError
from zoo.evaluation.resolution import attention_resolution, expected_scores
from zoo.models.attention_scores import attention_scores


def test_resolution_of_a_straight_line_and_of_no_order():
    n, slope = 50, 0.3
    r = np.exp(-slope)
    expected = (1 - r) * (1 - r ** (2 * n)) / (1 - r**2) / ((1 - r**n) / (1 - r)) ** 2
    line = -slope * np.arange(n + 1)
    assert attention_resolution(line) == pytest.approx(expected)
    assert attention_resolution(line + 1000) == pytest.approx(expected)
    assert attention_resolution(np.zeros(n)) == 0 > attention_resolution(-line)
    hidden = np.append(line[:11], np.full(5, -np.inf))
    powers = r ** np.arange(11)
    by_hand = (np.sum(powers[:-1] * (powers[:-1] - powers[1:])) + powers[-1] ** 2) / powers.sum() ** 2
    assert attention_resolution(np.stack([line[:16], hidden]))[1] == pytest.approx(by_hand)


def test_scores_are_those_of_each_layer_in_order():
    """From the layer's input, its own projections and the plain twin of the encoding."""
    model = tiny(num_layers=2, arrangement="pre_norm", embedding_norm=False, pooler=False, num_heads=2, unroll=1)
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 30)
    segments = jnp.asarray([[1] * 12, [1] * 5 + [2] * 7])
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    assert set(variables) == {"params"}, "nothing is kept when parameters are made"
    params = variables["params"]
    inputs = dict(segment_ids=segments, hidden_states=True)
    states = jax.jit(lambda params: model.apply({"params": params}, ids, **inputs).hidden_states)(params)
    found = jax.jit(lambda params: attention_scores(model, params, ids, segments))(params)
    assert found.shape == (2, 2, 2, 12, 12)
    mask = AttentionMask(causal=True, query_segments=segments, key_segments=segments)
    for layer in range(2):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["stage_0"]["block_0"])
        x = states[layer]
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + model.norm.epsilon)
        x = x * own["norm_mixer"]["scale"] + own["norm_mixer"]["bias"]
        q, k = (
            (x @ own["mixer"][n]["kernel"] + own["mixer"][n]["bias"]).reshape(2, 12, 2, 8) for n in ("query", "key")
        )
        expected = encodings.logits("rope", q, k, mask=mask)
        np.testing.assert_allclose(found[layer], expected, rtol=1e-4, atol=1e-5)
    rows = [{"input_ids": ids[b], "segment_ids": segments[b]} for b in range(2)]
    means = expected_scores(model, params, rows)
    assert means.shape == (2, 2, 7)
    for n in range(7):
        seen = np.stack([found[:, b, :, i, i - n] for b in range(2) for i in range(6, 12)], axis=-1)
        visible = np.isfinite(seen[0, 0])
        np.testing.assert_allclose(means[..., n], seen[:, :, visible].mean(-1), rtol=1e-4, atol=1e-5)
    assert visible.sum() == 7, "in the second row only the last query sees so far back within its document"
    with pytest.raises(UserError, match="of a causal model alone"):
        expected_scores(dataclasses.replace(model, causal=False), params, rows)
    with pytest.raises(UserError, match=r"needs all 40,000,000,000 scores of a row of 100000 tokens"):
        expected_scores(model, params, [{"input_ids": np.zeros(100_000, np.int32)}])
