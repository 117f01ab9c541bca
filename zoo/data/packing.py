"""Packing documents into rows of one length: which part of which document stands where, and the rows themselves.

A plan is a pure function of the documents' lengths, the row length, the seed and the epoch. Packing anew every epoch
gives every document other neighbours and other cuts, which matters when a small corpus is read many times; it costs
one permutation. The number of rows is the same in every epoch, so that (epoch, row) ↔ step needs no table:

- `split_documents=True` lays the shuffled documents end to end and cuts the line every row length. Only the last row
  has padding.
- `split_documents=False` keeps documents whole (one longer than a row is cut into rows first) and fills rows by best
  fit, longest document first, ties in shuffled order. How many rows that takes depends on the lengths alone.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Generic, Literal, TypeVar, get_args

import numpy as np

from zoo.data.store import TokenStore
from zoo.data.tokenizer import Vocabulary
from zoo.errors import UserError

P = TypeVar("P")
Specials = Literal["none", "row", "document"]
PACKING = 2  # keeps the shuffle apart from the other streams of the same seed


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which spans make up each row.

    Attributes:
      row_length: tokens in a row, special ones included.
      specials: what a row holds besides documents. "none": nothing. "row": [CLS] first and [SEP] last. "document":
        every document is `[CLS] … [SEP]`, and `start`, `stop` count these two as well; a document that is cut has them
        at its two ends only.
      document, start, stop: int32 [spans], in the order of rows.
      row_starts: int64 [rows + 1], the first span of each row.
    """

    row_length: int
    specials: Specials
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    row_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """(document, start, stop) of each span of a row."""
        part = slice(int(self.row_starts[row]), int(self.row_starts[row + 1]))
        return list(zip(self.document[part].tolist(), self.start[part].tolist(), self.stop[part].tolist(), strict=True))


def packing_plan(
    lengths: np.ndarray,
    row_length: int,
    *,
    seed: int,
    epoch: int = 0,
    split_documents: bool = True,
    specials: Specials = "none",
) -> Plan:
    """The plan of one epoch, in which every token of every document stands exactly once.

    Args:
      lengths: [documents], tokens of each; documents without tokens are left out.
      row_length: tokens in a row.
      seed, epoch: of the shuffle.
      split_documents: whether a document may go on in the next row.
      specials: see `Plan`.

    Raises:
      UserError: the row length leaves no room, or there are no tokens.
    """
    if specials not in get_args(Specials):
        raise UserError(f"specials is {specials!r}; expected one of {', '.join(get_args(Specials))}")
    capacity = row_length - 2 * (specials == "row")
    if capacity < 1:
        raise UserError(f"rows of {row_length} tokens with specials={specials!r} have no room for text")
    lengths = np.asarray(lengths, np.int64)
    documents = np.flatnonzero(lengths)
    if not len(documents):
        raise UserError("there are no tokens to pack")
    if max(len(lengths), lengths.max()) >= 1 << 31:
        raise UserError("2³¹ documents or a document of 2³¹ tokens is more than a plan can hold; split the corpus")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, PACKING, epoch])))
    documents = rng.permutation(documents)
    lengths = lengths[documents] + 2 * (specials == "document")
    if split_documents:
        which, start, stop, row_starts = _end_to_end(lengths, capacity)
    else:
        which, start, stop, row_starts = _best_fit(lengths, capacity)
    as_int32 = (a.astype(np.int32) for a in (documents[which], start, stop))
    return Plan(row_length, specials, *as_int32, row_starts)


def _end_to_end(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    begins = np.concatenate([[0], np.cumsum(lengths)])
    total = begins[-1]
    rows = np.arange(0, total, capacity)
    cuts = np.union1d(begins, rows)  # sorted; every span lies between two neighbours; the last is `total`
    which = np.searchsorted(begins, cuts[:-1], side="right") - 1
    start = cuts[:-1] - begins[which]
    stop = cuts[1:] - begins[which]
    return which, start, stop, np.append(np.searchsorted(cuts, rows), len(which))


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    parts = -(-lengths // capacity)
    which = np.repeat(np.arange(len(lengths)), parts)
    start = (np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)) * capacity
    stop = np.minimum(start + capacity, lengths[which])
    order = np.argsort(start - stop, kind="stable")  # longest first, otherwise as shuffled
    # Rows by the room that is left in them, and a bit for each room of which there is a row: the best fit is the
    # lowest bit from the span's length on.
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, count = 0, 0
    row_of = np.empty(len(order), np.int64)
    for k, length in enumerate((stop - start)[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, count
            count += 1
        row_of[k] = row
        rows_with[room - length].append(row)
        if room > length:
            rooms |= 1 << (room - length)
    by_row = np.argsort(row_of, kind="stable")
    order = order[by_row]
    return which[order], start[order], stop[order], np.searchsorted(row_of[by_row], np.arange(count + 1))


def pack_row(store: TokenStore, plan: Plan, row: int, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """One row of a plan.

    Returns:
      `input_ids` int32 [T]; `segment_ids` int32 [T], 1 for the first span, 2 for the second, …, 0 for padding;
      `positions` int32 [T], from 0 in every span; `word_starts` bool [T]. The [CLS] and [SEP] of a row belong to its
      first and its last span; every special token is a word of its own.
    """
    ids = np.full(plan.row_length, vocabulary.pad, np.int32)
    segment_ids = np.zeros(plan.row_length, np.int32)
    positions = np.zeros(plan.row_length, np.int32)
    word_starts = np.zeros(plan.row_length, bool)
    spans = plan.spans(row)
    at = 0
    for k, (document, start, stop) in enumerate(spans):
        found, starts = _span(store, plan, document, start, stop, vocabulary)
        if plan.specials == "row" and k == 0:
            found, starts = [[vocabulary.cls], *found], [[True], *starts]
        if plan.specials == "row" and k == len(spans) - 1:
            found, starts = [*found, [vocabulary.sep]], [*starts, [True]]
        length = sum(map(len, found))
        here = slice(at, at + length)
        ids[here] = np.concatenate(found)
        word_starts[here] = np.concatenate(starts)
        segment_ids[here] = k + 1
        positions[here] = np.arange(length)
        at += length
    return {"input_ids": ids, "segment_ids": segment_ids, "positions": positions, "word_starts": word_starts}


def _span(
    store: TokenStore, plan: Plan, document: int, start: int, stop: int, vocabulary: Vocabulary
) -> tuple[list[Sequence[int] | np.ndarray], list[Sequence[bool] | np.ndarray]]:
    """The ids and the word starts of a span, each as parts to be joined."""
    ids: list[Sequence[int] | np.ndarray] = []
    starts: list[Sequence[bool] | np.ndarray] = []
    last = False
    if plan.specials == "document":
        if start == 0:
            ids.append([vocabulary.cls])
            starts.append([True])
        length = store.length(document)
        last = stop == length + 2
        start, stop = max(start - 1, 0), min(stop - 1, length)
    if start < stop:
        pieces = store.span(document, start, stop)
        pieces.word_starts[0] = True  # the rest of a word that the row before began is a word here
        ids.append(pieces.ids)
        starts.append(pieces.word_starts)
    if last:
        ids.append([vocabulary.sep])
        starts.append([True])
    return ids, starts


class EpochPlans(Generic[P]):
    """The plan of any epoch, of which the last two made are held, for any number of threads."""

    def __init__(self, make: Callable[[int], P]):
        self._make = make
        self._lock = threading.Lock()
        self._held: dict[int, P] = {}

    def at(self, epoch: int) -> P:
        # Two, because a batch may lie across the end of an epoch, and threads run ahead into the next.
        with self._lock:
            if epoch not in self._held:
                while len(self._held) > 1:
                    del self._held[next(iter(self._held))]
                self._held[epoch] = self._make(epoch)
            return self._held[epoch]


class PackedRows:
    """A store as rows: a sequence of `pack_row`'s, and, for the pipeline, another such sequence at every epoch.

    Raises:
      UserError: as `packing_plan`.
    """

    def __init__(
        self,
        store: TokenStore,
        vocabulary: Vocabulary,
        *,
        row_length: int,
        seed: int,
        split_documents: bool = True,
        specials: Specials = "none",
    ):
        self._store = store
        self._vocabulary = vocabulary
        self._plans = EpochPlans(
            lambda epoch: packing_plan(
                store.lengths, row_length, seed=seed, epoch=epoch, split_documents=split_documents, specials=specials
            )
        )
        self._rows = len(self._plans.at(0))

    def __len__(self) -> int:
        """The number of rows in any epoch."""
        return self._rows

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """A row of epoch 0, which is what evaluation reads."""
        return self.at_epoch(0)[row]

    def at_epoch(self, epoch: int) -> EpochRows:
        """The rows of one epoch."""
        return EpochRows(self._store, self._plans.at(epoch), self._vocabulary)


@dataclasses.dataclass(frozen=True, eq=False)
class EpochRows:
    """The rows of one plan."""

    store: TokenStore
    plan: Plan
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return pack_row(self.store, self.plan, row, self.vocabulary)
