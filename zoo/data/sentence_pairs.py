"""Pairs of segments cut from documents, for predicting whether the second follows the first.

The rules are those of BERT's data builder, which NEZHA's pretraining uses (Devlin et al. 2018, arXiv:1810.04805,
appendix A.2; Wei et al. 2019, arXiv:1909.00204), and ALBERT's (Lan et al. 2019, arXiv:1909.11942, section 3.1):

- A walk through each document takes chunks: sentences until a target length is reached or the document ends. The target
  is what a row holds, and now and then a random shorter one.
- A chunk of two sentences or more is split behind a random one of them. "nsp": for half of the chunks the second segment
  comes from another document instead (label 1), from a random sentence on, as far as the target asks, and the walk
  returns to the sentences it replaced; a chunk of one sentence always takes its second segment from elsewhere. "sop": in
  half of the chunks the two segments change places (label 1).
- A pair that is too long loses tokens of the longer segment, at random ends of it.

How it differs: everything is drawn anew for every epoch and row, nothing is written to disk. The walks of different
epochs give a few instances more or less, while an epoch must have the same number of them each time: an epoch has as
many as epoch 0; a longer walk leaves the surplus out at random, a shorter one takes random places twice. The kept part
of a segment begins anywhere that it can with equal chance, so that every part of a sentence longer than a row is seen;
taking tokens off either end one by one would leave the middle of it nearly every time. A chunk of one sentence has no
order: for "sop" it stands alone with weight 0 in the sentence loss (ALBERT's builder pairs it with another document's and
calls that swapped). Another document is never the same one; BERT's builder gives up after ten draws.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np

from zoo.data.packing import EpochPlans
from zoo.data.store import TokenStore
from zoo.data.tokenizer import Vocabulary
from zoo.data.truncation import longest_first
from zoo.errors import UserError

Objective = Literal["nsp", "sop"]
# Keep these streams apart from the others of the same seed, and each from each: a seed sequence does not tell
# [seed, n, epoch] from [seed, n, epoch, 0].
WALK, SIZE, ROW = 3, 4, 5
SPECIALS = 3  # [CLS] and two [SEP]


@dataclasses.dataclass(frozen=True, eq=False)
class PairPlan:
    """The chunks of one epoch, in reading order.

    Attributes:
      start: int64 [rows], the first sentence of each chunk, counted through all documents.
      first, second: int32 [rows], how many sentences its two segments have.
      target: int32 [rows], the tokens it was to reach.
      changed: bool [rows], whether the second segment comes from elsewhere ("nsp") or the two are swapped ("sop").
    """

    start: np.ndarray
    first: np.ndarray
    second: np.ndarray
    target: np.ndarray
    changed: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def resized(self, rows: int, rng: np.random.Generator) -> PairPlan:
        """`rows` of the chunks in reading order: without a random surplus, or with random ones twice."""
        size = len(self)
        kept = (
            rng.choice(size, rows, replace=False)
            if size > rows
            else np.append(np.arange(size), rng.choice(size, rows - size))
        )
        kept.sort()
        return PairPlan(*(getattr(self, field.name)[kept] for field in dataclasses.fields(self)))


def pair_plan(
    offsets: np.ndarray,
    documents: np.ndarray,
    capacity: int,
    *,
    objective: Objective,
    short_rate: float,
    seed: int,
    epoch: int,
) -> PairPlan:
    """One walk through all documents; a pure function, taking a step in every document at once.

    Args:
      offsets: int64 [sentences + 1], where each sentence begins in tokens; none is empty.
      documents: int64 [documents + 1], the first sentence of each document; none is empty.
      capacity: tokens of a row without special ones.
      objective, short_rate: see `SentencePairs`.
      seed, epoch: of all that is drawn.
    """
    rng = _generator(seed, WALK, epoch)
    at, end = documents[:-1], documents[1:]
    steps = []
    while len(at):
        size = len(at)
        target = np.where(rng.random(size) < short_rate, rng.integers(2, capacity + 1, size), capacity)
        stop = np.minimum(np.searchsorted(offsets, offsets[at] + target), end)
        single = stop - at == 1
        middle = np.where(single, stop, at + rng.integers(1, np.maximum(stop - at, 2)))
        changed = rng.random(size) < 0.5
        changed = changed | single if objective == "nsp" else changed & ~single
        steps.append((at, middle - at, stop - middle, target, changed))
        at = np.where(changed, middle, stop) if objective == "nsp" else stop
        at, end = at[at < end], end[at < end]
    start, first, second, target, changed = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.argsort(start)
    as_int32 = (column[order].astype(np.int32) for column in (first, second, target))
    return PairPlan(start[order], *as_int32, changed[order])


class SentencePairs:
    """A store as pairs of segments: a sequence of rows, and, for the pipeline, another such sequence at every epoch.

    A row is a pure function of (seed, epoch, index). See `EpochPairs` for what it holds.

    Args:
      store: documents with sentences.
      vocabulary: of the store.
      row_length: T, tokens in a row, special ones included.
      objective: "nsp": next sentence or one of another document; "sop": in order or swapped.
      short_rate: the share of chunks whose target is random, 2 … T − 3, instead of T − 3.
      seed: of all that is drawn.

    Raises:
      UserError: rows without room, only one document to take sentences from ("nsp"), or nothing to learn: no two
        sentences of a document fit one row.
    """

    def __init__(
        self,
        store: TokenStore,
        vocabulary: Vocabulary,
        *,
        row_length: int,
        objective: Objective,
        short_rate: float = 0.1,
        seed: int = 0,
    ):
        if objective not in get_args(Objective):
            raise UserError(f"objective is {objective!r}; expected one of {', '.join(get_args(Objective))}")
        if row_length < SPECIALS + 2:
            raise UserError(f"rows of {row_length} tokens have no room for a pair; {SPECIALS + 2} is the least")
        self._store = store
        self._vocabulary = vocabulary
        self._row_length = row_length
        self._objective = objective
        self._seed = seed
        self._documents = np.unique(store.first_sentences())  # those without sentences drop out
        if objective == "nsp" and len(self._documents) < 3:
            raise UserError(
                "next-sentence prediction takes sentences from other documents, and this corpus is one document; mark "
                "where documents end (an empty line, with documents='blank_line'), or choose objective='sop'"
            )
        self._short_rate = short_rate
        self._plans = EpochPlans(self._plan)
        self._rows = len(self._plans.at(0))
        if not self._plans.at(0).second.any():
            raise UserError(
                f"no two sentences of a document stand together in a row of {row_length} tokens: a sentence is a line "
                "of a document; with the text source, documents='blank_line' reads a sentence per line"
            )

    def __len__(self) -> int:
        """The number of rows in any epoch: what the walk of epoch 0 gives."""
        return self._rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """A row of epoch 0, which is what evaluation reads."""
        return self.at_epoch(0)[index]

    def at_epoch(self, epoch: int) -> EpochPairs:
        """The rows of one epoch."""
        return EpochPairs(self, self._plans.at(epoch), epoch)

    def _plan(self, epoch: int) -> PairPlan:
        plan = pair_plan(
            self._store.sentence_offsets,
            self._documents,
            self._row_length - SPECIALS,
            objective=self._objective,
            short_rate=self._short_rate,
            seed=self._seed,
            epoch=epoch,
        )
        return plan.resized(self._rows, _generator(self._seed, SIZE, epoch)) if epoch else plan

    def row(self, plan: PairPlan, epoch: int, index: int) -> dict[str, np.ndarray]:
        """One row of a plan; see `EpochPairs`."""
        rng = _generator(self._seed, ROW, epoch, index)
        segments = self._segments(plan, index, rng)
        ids = np.full(self._row_length, self._vocabulary.pad, np.int32)
        token_types = np.zeros(self._row_length, np.int32)
        word_starts = np.zeros(self._row_length, bool)
        ids[0], word_starts[0] = self._vocabulary.cls, True
        at = 1
        for k, (first, last) in enumerate(segments):
            pieces = self._store.pieces(first, last)
            end = at + last - first
            ids[at:end], ids[end] = pieces.ids, self._vocabulary.sep
            word_starts[at:end] = pieces.word_starts
            word_starts[[at, end]] = True  # the rest of a word that was cut is a word here
            token_types[at : end + 1] = k
            at = end + 1
        return {
            "input_ids": ids,
            "segment_ids": (np.arange(self._row_length) < at).astype(np.int32),
            "token_type_ids": token_types,
            "word_starts": word_starts,
            "sentence_label": np.int32(plan.changed[index]),
            "sentence_weight": np.float32(len(segments) == 2),
        }

    def _segments(self, plan: PairPlan, index: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """The tokens of the row's segments, from and to, counted through all documents."""
        offsets = self._store.sentence_offsets
        start, changed = int(plan.start[index]), bool(plan.changed[index])
        middle = start + int(plan.first[index])
        segments = [(start, middle), (middle, middle + int(plan.second[index]))]
        if changed and self._objective == "nsp":
            wanted = int(plan.target[index] - (offsets[middle] - offsets[start]))
            segments[1] = self._elsewhere(start, wanted, rng)
        elif changed:
            segments.reverse()
        tokens = [(int(offsets[first]), int(offsets[last])) for first, last in segments if last > first]
        lengths = [last - first for first, last in tokens]
        capacity = self._row_length - SPECIALS
        kept = longest_first(*lengths, capacity) if len(tokens) == 2 else [min(lengths[0], capacity)]
        fronts = [int(rng.integers(length - left + 1)) for length, left in zip(lengths, kept, strict=True)]
        return [
            (first + front, first + front + left) for (first, _), front, left in zip(tokens, fronts, kept, strict=True)
        ]

    def _elsewhere(self, sentence: int, wanted: int, rng: np.random.Generator) -> tuple[int, int]:
        """Sentences, from and to, of a random document other than this sentence's, `wanted` tokens of them or one."""
        documents, offsets = self._documents, self._store.sentence_offsets
        own = int(np.searchsorted(documents, sentence, side="right")) - 1
        other = int(rng.integers(len(documents) - 2))
        other += other >= own
        start = int(rng.integers(documents[other], documents[other + 1]))
        stop = int(np.searchsorted(offsets, offsets[start] + wanted))
        return start, min(max(stop, start + 1), int(documents[other + 1]))


@dataclasses.dataclass(frozen=True, eq=False)
class EpochPairs:
    """The rows of one epoch, `[CLS] A [SEP] B [SEP]`, of a single segment `[CLS] A [SEP]`.

    A row has `input_ids` int32 [T]; `segment_ids` int32 [T], 1, and 0 for padding; `token_type_ids` int32 [T], 1 for B
    and its [SEP]; `word_starts` bool [T]; `sentence_label` int32 [], 0 where B follows A, 1 where it is from another
    document or the two are swapped; `sentence_weight` float32 [], 0 for a single segment, else 1.
    """

    pairs: SentencePairs
    plan: PairPlan
    epoch: int

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.pairs.row(self.plan, self.epoch, index)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
