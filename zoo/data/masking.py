"""Masked language modelling's corruption of a row: which tokens are hidden, and by what (arXiv 1810.04805, 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from zoo.data.tokenizer import Vocabulary


class Masked(NamedTuple):
    """A corrupted row and its targets, in `count` slots of which the unused ones have weight 0.

    `ids` int32 [T]; `positions` int32 [count], ascending; `labels` int32 [count], the tokens that stood there;
    `weights` float32 [count], 1 or 0. Unused slots have position and label 0.
    """

    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def mask_tokens(
    ids: np.ndarray,
    word_starts: np.ndarray,
    *,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    rate: float,
    count: int,
    whole_word: bool,
    replace: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> Masked:
    """Chooses n = clip(round(rate · length), 1, count) tokens to predict, length counting all but padding.

    Special tokens, [UNK] among them, are never chosen. With `whole_word`, words are taken in random order, one that
    would exceed n is passed over (so that now and then there are fewer than n), and a word is chosen whole or not at
    all. Each chosen token by itself becomes [MASK], a random token, or stays, with the probabilities `replace`.

    Args:
      ids: int [T].
      word_starts: bool [T], whether a word begins here; words also end at special tokens.
      vocabulary: which ids are special.
      rng: the row's generator.
      rate: share of the row to choose.
      count: slots.
      whole_word: whether the unit of choice is a word or a token.
      replace: probabilities of [MASK], of a random token, of no change.

    Raises:
      ValueError: probabilities that do not add up to 1, a rate outside 0 … 1, no slots.

    How it differs from the sources: Google draws random tokens from the whole vocabulary, special and unused ones
    included; here special ones are left out. Google counts [UNK] among the candidates.
    """
    if not 0 < rate <= 1 or count < 1 or min(replace) < 0 or abs(sum(replace) - 1) > 1e-6:
        raise ValueError(f"rate {rate} (0 to 1), count {count} (1 or more), replace {replace} (probabilities)")
    ids = np.asarray(ids, np.int32)
    special = (ids[:, None] == np.asarray(vocabulary.special, np.int32)).any(1)
    budget = min(max(round(rate * int((ids != vocabulary.pad).sum())), 1), count)
    candidates = np.flatnonzero(~special)
    if whole_word:
        chosen = _whole_words(candidates, word_starts, special, budget, rng)
    else:
        chosen = rng.permutation(candidates)[:budget]
    chosen.sort()
    n = len(chosen)
    labels = ids[chosen]
    draw = rng.random(n)
    random = _random_tokens(n, vocabulary, rng)
    hidden = np.where(draw < replace[0], vocabulary.mask, np.where(draw < replace[0] + replace[1], random, labels))
    masked = ids.copy()
    masked[chosen] = hidden
    return Masked(
        masked,
        _slots(chosen, count, np.int32),
        _slots(labels, count, np.int32),
        _slots(np.ones(n), count, np.float32),
    )


def _whole_words(
    candidates: np.ndarray, word_starts: np.ndarray, special: np.ndarray, budget: int, rng: np.random.Generator
) -> np.ndarray:
    # What follows a special token would share its number, but special tokens are no candidates.
    begins = word_starts | special
    begins[:1] = True
    word = np.cumsum(begins)[candidates]
    first = np.flatnonzero(np.diff(word, prepend=-1))
    sizes = np.diff(first, append=len(word))
    order = rng.permutation(len(first))
    taken, left = [], budget
    for k, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= left:
            taken.append(k)
            left -= size
            if not left:
                break
    chosen = np.zeros(len(first), bool)
    chosen[taken] = True
    return candidates[np.repeat(chosen, sizes)]


def _random_tokens(n: int, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """Uniform over the ids that are not special: drawn from as many numbers, then stepped over each special one."""
    drawn = rng.integers(0, vocabulary.size - len(vocabulary.special), size=n)
    for special in sorted(vocabulary.special):
        drawn += drawn >= special
    return drawn


def _slots(values: np.ndarray, count: int, dtype: type) -> np.ndarray:
    slots = np.zeros(count, dtype)
    slots[: len(values)] = values
    return slots
