"""Masking: the rates, the shares, whole words, and that nothing special is ever a target."""

import itertools

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.masking import mask_tokens
from zoo.data.tokenizer import Vocabulary

# Special ids that are neither first nor neighbours, as in the Chinese vocabulary of BERT.
VOCABULARY = Vocabulary(size=500, pad=0, unk=100, cls=101, sep=102, mask=103, special=(0, 100, 101, 102, 103))
ORDINARY = np.setdiff1d(np.arange(VOCABULARY.size), VOCABULARY.special)
T = 64


def make_row(rng, *, padding=0, unknown=False):
    """[CLS] words [SEP] words [SEP] padding; words of 1 to 4 pieces."""
    ids = rng.choice(ORDINARY, T).astype(np.int32)
    starts = rng.random(T) < 0.6
    if unknown:
        ids[rng.integers(1, T, 3)] = VOCABULARY.unk
    end = T - padding
    ids[0], ids[20], ids[end - 1], ids[end:] = VOCABULARY.cls, VOCABULARY.sep, VOCABULARY.sep, VOCABULARY.pad
    starts[end:] = False
    return ids, starts


def units(ids, starts):
    """Lists of the positions of each word, special tokens left out: the definition, by a loop."""
    words, inside = [], False
    for k, (token, start) in enumerate(zip(ids, starts, strict=True)):
        if token in VOCABULARY.special:
            inside = False
        elif start or not inside:
            words.append([k])
            inside = True
        else:
            words[-1].append(k)
    return words


def mask(ids, starts, rng, **options):
    options = {"rate": 0.15, "count": 12, "whole_word": True, **options}
    return mask_tokens(ids, starts, vocabulary=VOCABULARY, rng=rng, **options)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    padding=st.sampled_from([0, 1, 30, 43]),
    whole_word=st.booleans(),
    rate=st.sampled_from([0.01, 0.15, 0.4, 1.0]),
    count=st.sampled_from([1, 7, 64]),
)
def test_one_row(seed, padding, whole_word, rate, count):
    rng = np.random.default_rng(seed)
    ids, starts = make_row(rng, padding=padding, unknown=True)
    before = ids.copy(), starts.copy()
    masked = mask(ids, starts, rng, whole_word=whole_word, rate=rate, count=count)
    chex.assert_trees_all_equal((ids, starts), before)
    chex.assert_shape([masked.positions, masked.labels, masked.weights], (count,))
    chex.assert_type([masked.ids, masked.positions, masked.labels], np.int32)
    chex.assert_type(masked.weights, np.float32)
    n = int(masked.weights.sum())
    np.testing.assert_array_equal(masked.weights, np.arange(count) < n)
    assert not masked.positions[n:].any() and not masked.labels[n:].any()
    chosen = masked.positions[:n]
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(masked.labels[:n], ids[chosen])
    assert not np.isin(ids[chosen], VOCABULARY.special).any()
    others = np.setdiff1d(np.arange(T), chosen)
    np.testing.assert_array_equal(masked.ids[others], ids[others])
    assert np.isin(masked.ids[chosen], [VOCABULARY.mask, *ORDINARY]).all()

    words = units(ids, starts)
    available = sum(map(len, words))
    budget = min(max(round(rate * (T - padding)), 1), count)
    if not whole_word:
        assert n == min(budget, available)
    else:
        assert n <= budget
        taken = set(chosen.tolist())
        left = [word for word in words if not taken & set(word)]
        assert all(taken >= set(word) for word in words if taken & set(word))
        assert all(len(word) > budget - n for word in left)  # passed over only because it would not fit


def test_whole_words_of_one_piece_equal_the_definition():
    ids, starts = np.full(20, 7, np.int32), np.ones(20, bool)
    ids[0], ids[-1] = VOCABULARY.cls, VOCABULARY.sep
    masked = mask(ids, starts, np.random.default_rng(0), rate=0.15, count=20)
    assert masked.weights.sum() == 3  # round(0.15 · 20)


@pytest.mark.parametrize("whole_word", [True, False])
@pytest.mark.parametrize("rate", [0.15, 0.25])
def test_rate_over_ten_thousand_rows(whole_word, rate):
    rng = np.random.default_rng(0)
    rows = [make_row(rng) for _ in range(50)]
    chosen = sum(
        int(mask(*row, rng, whole_word=whole_word, rate=rate, count=32).weights.sum())
        for row in itertools.islice(itertools.cycle(rows), 10_000)
    )
    assert abs(chosen / (10_000 * T) - rate) < 0.02 * rate + 0.5 / T * (rate * T % 1 != 0)


def test_shares_and_uniform_replacement():
    rng = np.random.default_rng(0)
    rows = [make_row(rng) for _ in range(50)]
    hidden, labels = [], []
    for row in itertools.islice(itertools.cycle(rows), 4000):
        masked = mask(*row, rng, rate=0.4, count=32)
        n = int(masked.weights.sum())
        hidden.append(masked.ids[masked.positions[:n]])
        labels.append(masked.labels[:n])
    hidden, labels = np.concatenate(hidden), np.concatenate(labels)
    is_mask, kept = hidden == VOCABULARY.mask, hidden == labels
    drawn = hidden[~is_mask & ~kept]
    assert abs(is_mask.mean() - 0.8) < 0.01
    assert abs(kept.mean() - 0.1) < 0.01
    assert abs(len(drawn) / len(hidden) - 0.1) < 0.01
    counts = np.bincount(drawn, minlength=VOCABULARY.size)
    assert not counts[list(VOCABULARY.special)].any()
    expected = len(drawn) / len(ORDINARY)
    statistic = ((counts[ORDINARY] - expected) ** 2 / expected).sum()
    freedom = len(ORDINARY) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)  # χ² within five deviations


@pytest.mark.parametrize("replace, expected", [((1, 0, 0), "mask"), ((0, 0, 1), "kept"), ((0, 1, 0), "random")])
def test_other_shares(replace, expected):
    ids, starts = make_row(np.random.default_rng(0))
    masked = mask(ids, starts, np.random.default_rng(1), replace=replace)
    n = int(masked.weights.sum())
    hidden = masked.ids[masked.positions[:n]]
    if expected == "mask":
        assert (hidden == VOCABULARY.mask).all()
    elif expected == "kept":
        np.testing.assert_array_equal(masked.ids, ids)
    else:
        assert not (hidden == VOCABULARY.mask).any() and (hidden != masked.labels[:n]).any()


def test_same_generator_same_masks():
    ids, starts = make_row(np.random.default_rng(0))
    one, two, other = (mask(ids, starts, np.random.default_rng(seed)) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(one, two)
    assert (one.positions != other.positions).any()


def test_rows_of_nothing_but_specials_have_no_targets():
    ids = np.asarray([VOCABULARY.cls, VOCABULARY.sep, VOCABULARY.pad], np.int32)
    for whole_word in (True, False):
        masked = mask(ids, np.zeros(3, bool), np.random.default_rng(0), whole_word=whole_word)
        assert not masked.weights.any()
        np.testing.assert_array_equal(masked.ids, ids)


@pytest.mark.parametrize(
    "options",
    [{"rate": 0.0}, {"rate": 1.5}, {"count": 0}, {"replace": (0.5, 0.1, 0.1)}, {"replace": (1.2, -0.1, -0.1)}],
)
def test_wrong_arguments(options):
    ids, starts = make_row(np.random.default_rng(0))
    with pytest.raises(ValueError, match="rate"):
        mask(ids, starts, np.random.default_rng(0), **options)
