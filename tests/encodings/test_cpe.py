"""CPE: its convolution against sums written out, at the ends of documents and with the cache of decoding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions
from tests.encodings.test_golden import DIMS, V, close
from zoo.encodings import Place, registry
from zoo.errors import UserError

X = jnp.asarray(V, jnp.float32)[None]
GOLDEN = {"kernel": jnp.array([[0.1], [0.2], [-0.3]]) * jnp.ones(4), "bias": 0.01 * jnp.arange(4.0)}
CAUSAL = AttentionMask(causal=True)


def apply(x, mask, token=None, params=GOLDEN, cache=None, **config):
    token = jnp.arange(x.shape[1])[None] if token is None else token
    module = registry.build({"name": "cpe", **config}).embedding(DIMS)
    return module.apply({"params": params}, x, Place(Positions(token)), mask, cache)


def test_golden_values():
    close(apply(X, AttentionMask())[0][0, 0], [0.066265, 0.144094, 0.224917, 0.309906])
    close(apply(X, CAUSAL)[0][0, 3], [0.384789, 0.714735, 0.926617, 0.988325])


def test_zero_start_changes_nothing():
    module = registry.build({"name": "cpe", "start": "zero"}).embedding(DIMS)
    (out, _), _ = module.init_with_output(jax.random.key(0), X, Place(Positions.arange(4)), CAUSAL, None)
    chex.assert_trees_all_equal(out, X)


def test_only_the_neighbours_within_a_document_count():
    """Another document, padding, and a position further away, though next to it in the array, are zeros."""
    x = jax.random.normal(jax.random.key(0), (1, 8, 4))
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    token = jnp.array([[0, 1, 2, 0, 1, 5, 6, 0]])
    mask = AttentionMask(query_segments=segments, key_segments=segments)
    found = np.asarray(apply(x, mask, token)[0])[0]
    kernel, bias, given = np.asarray(GOLDEN["kernel"]), np.asarray(GOLDEN["bias"]), np.asarray(x[0])
    for run in ([0, 1, 2], [3, 4], [5, 6]):
        for at, i in enumerate(run):
            expected = given[i] + bias
            for d in (-1, 0, 1):
                if 0 <= at + d < len(run):
                    expected = expected + kernel[d + 1] * given[run[at + d]]
            np.testing.assert_allclose(found[i], expected, atol=1e-6)


def test_moved_inputs_move_the_output_away_from_the_ends():
    x = jax.random.normal(jax.random.key(1), (1, 9, 4))
    one, two = (apply(a, AttentionMask())[0] for a in (x, jnp.roll(x, 2, axis=1)))
    chex.assert_trees_all_close(one[:, 1:6], two[:, 3:8], atol=1e-6)
    assert jnp.abs(one[:, 0] - two[:, 2]).max() > 1e-2, "the end of the text is seen by its zeros"


def test_steps_shorter_than_the_filter_equal_one_pass():
    x = jax.random.normal(jax.random.key(2), (2, 6, 4))
    cache, found = registry.build("cpe").init_embedding_cache(DIMS, 2, 6, jnp.float32), []
    for i in range(6):
        out, cache = apply(x[:, i : i + 1], CAUSAL, jnp.array([[i]]), cache=cache)
        found.append(out)
    chex.assert_trees_all_close(jnp.concatenate(found, axis=1), apply(x, CAUSAL)[0], atol=1e-6)


def test_a_filter_without_a_middle_is_refused_where_it_needs_one():
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}
    assert apply(X, CAUSAL, params=params, width=4)[0].shape == X.shape
    with pytest.raises(UserError, match="width=4, which has no middle; make it odd"):
        apply(X, AttentionMask(), params=params, width=4)
    with pytest.raises(ValueError, match="at least 2"):
        registry.build({"name": "cpe", "width": 1})
