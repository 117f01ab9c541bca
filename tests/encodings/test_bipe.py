"""BiPE: how sentences are counted, and what it is without them or with nothing else."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import Positions
from tests.encodings.table import DIMS, parameters, tiny_model, tokens
from zoo.encodings import logits, registry
from zoo.errors import UserError
from zoo.layers.block import BlockSpec
from zoo.models import Stage, Transformer
from zoo.models.sentences import count

S = 9


@pytest.mark.parametrize(
    ("ids", "sentence", "within"),
    [
        ([5, 6, S, 7, 8, S, 4, 3], [0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2, 0, 1]),
        ([S, 1, 2, 3, S, S, 4, 5], [0, 1, 1, 1, 1, 2, 3, 3], [0, 0, 1, 2, 3, 0, 0, 1]),
    ],
)
def test_sentences_of_the_reference(ids, sentence, within):
    found = count(jnp.array([ids]), (S,), None)
    np.testing.assert_array_equal(found.sentence[0], sentence)
    np.testing.assert_array_equal(found.within[0], within)


def plainly(ids, segments, separators):
    """Token by token."""
    sentence, within, state, previous = [], [], (0, 0), None
    for token, segment in zip(ids, segments, strict=True):
        if segment != previous:
            state = (0, 0)
        sentence.append(state[0])
        within.append(state[1])
        state = (state[0] + 1, 0) if token in separators and segment else (state[0], state[1] + 1)
        previous = segment
    return sentence, within


def test_counting_restarts_in_documents_and_goes_on_step_by_step():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, (3, 40))
    segments = np.stack([np.repeat([1, 2, 3, 0], [11, 3, 20, 6]), np.repeat([0, 1], [7, 33]), np.ones(40, int)])
    whole = count(jnp.array(ids), (1, 3), jnp.array(segments))
    expected = [plainly(*row, (1, 3)) for row in zip(ids, segments, strict=True)]
    np.testing.assert_array_equal(whole.sentence, [s for s, _ in expected])
    np.testing.assert_array_equal(whole.within, [w for _, w in expected])
    before, pieces = None, []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 30), (30, 40)):
        part = count(jnp.array(ids[:, start:stop]), (1, 3), jnp.array(segments[:, start:stop]), before)
        before = part.last()
        pieces.append(part)
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *pieces)
    chex.assert_trees_all_equal(joined, whole)


def random(seed):
    return jax.random.normal(jax.random.key(seed), (1, 5, 2, 8))


def at(sentence, within):
    return Positions(jnp.arange(5)[None], sentence=jnp.array([sentence]), within=jnp.array([within]))


def test_without_an_end_the_level_between_sentences_does_nothing():
    q, k = random(0), random(1)
    for name in ("bipe_rope", "bipe_alibi"):
        found = logits(name, q, k, at([0] * 5, range(5)))
        chex.assert_trees_all_close(found, logits("none", q, k), atol=1e-6)


def test_with_one_token_a_sentence_it_is_the_encoding_between():
    q, k = random(0), random(1)
    each = at(range(5), [0] * 5)
    chex.assert_trees_all_close(logits("bipe_rope", q, k, each), logits("rope", q, k), atol=1e-6)
    lower = np.tril_indices(5)
    linear = logits({"name": "bipe_alibi", "slope_factor": 1.0}, q, k, each)
    chex.assert_trees_all_close(linear[..., *lower], logits("alibi", q, k)[..., *lower], atol=1e-6)


def test_given_sentences_equal_counted_ones():
    model, ids = tiny_model({"name": "bipe_rope", "separators": (2, 9)}), tokens(2, 8)
    params = parameters(model)
    found = count(ids, (2, 9), None)
    given = Positions(jnp.arange(8)[None], sentence=found.sentence, within=found.within, contiguous=True)
    chex.assert_trees_all_close(
        model.apply(params, ids).hidden, model.apply(params, ids, positions=given).hidden, atol=1e-6
    )


@pytest.mark.parametrize("name", ["bipe_rope", "bipe_alibi"])
def test_a_model_without_sentences_is_an_error_when_it_is_made(name):
    model = tiny_model({"name": name})
    with pytest.raises(
        UserError, match=rf"encoding '{name}' needs sentence indices: give it separators=.*rope and alibi"
    ):
        model.init(jax.random.key(0), tokens(1, 4))
    with pytest.raises(UserError, match="needs sentence indices"):
        logits(name, random(0), random(1))


def test_different_separators_in_one_model_are_refused():
    parts = [registry.build({"name": "bipe_rope", "separators": (i,)}) for i in (2, 3)]
    stages = tuple(Stage((BlockSpec(encodings=(part,)),)) for part in parts)
    with pytest.raises(UserError, match=r"different separators, \(2,\) and \(3,\)"):
        Transformer(vocab_size=9, dims=DIMS, stages=stages).check()


def test_a_cache_that_counts_refuses_given_sentences():
    model = tiny_model({"name": "bipe_alibi", "separators": (2,)}, causal=True)
    params = parameters(model)
    given = Positions(jnp.zeros((1, 1), int), sentence=jnp.zeros((1, 1), int), within=jnp.zeros((1, 1), int))
    with pytest.raises(UserError, match="counts sentences from the input ids"):
        jax.eval_shape(lambda: model.apply(params, tokens(1, 1), positions=given, cache=model.init_cache(1, 4)))
