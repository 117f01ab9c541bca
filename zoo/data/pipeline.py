"""Batches as a pure function of (seed, step), for any number of hosts.

Training runs through the examples epoch after epoch, each a fresh permutation (Grain's index shuffle, which needs no
memory and no pass over the data). Step s takes the s-th run of `batch_size` places of this endless order, so a batch
may hold the end of one epoch and the beginning of the next, nothing is dropped, and the position of a run is the one
integer s. Where a run changes its batches on the way, they go on at the place that the ones before have reached. Host p
of n takes the p-th of n equal, contiguous parts of the batch: laid end to end they are the same global batch whatever n is.
The random generator of an example is made from (seed, epoch, index) alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from zoo.errors import UserError

Batch = dict[str, np.ndarray]
Features = Callable[[Any, np.random.Generator], Mapping[str, np.ndarray]]

TRAINING, EVALUATION = 0, 1
PREFETCH = 8


@runtime_checkable
class Repacked(Protocol):
    """Examples that are put together anew for each epoch, as many of them every time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def at_epoch(self, epoch: int) -> Sequence[Any]:
        """The examples of one epoch; a pure function of `epoch`."""
        ...


class Pipeline:
    """Training batches.

    Args:
      examples: a sequence, or `Repacked`.
      features: (example, rng) → arrays of fixed shape; pure.
      seed: of the order and of the features.
      batch_size: global, over all hosts.
      first_step, first_example: the first step that is asked for, and the place in the endless order where its batch begins.
      process_index, process_count: which part of each batch is this host's.
      threads: that prepare batches ahead in `iterate`.

    Raises:
      UserError: no examples, or a batch that does not divide over the hosts.
    """

    def __init__(
        self,
        examples: Sequence[Any] | Repacked,
        features: Features,
        *,
        seed: int,
        batch_size: int,
        first_step: int = 0,
        first_example: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 2,
    ):
        if not len(examples):
            raise UserError("there are no examples to train on")
        self._slice = _host_slice(batch_size, process_index, process_count)
        self._examples = examples
        self._at_epoch = examples.at_epoch if isinstance(examples, Repacked) else lambda epoch: examples
        self._features = features
        self._seed = seed
        self.batch_size = batch_size
        self.first_step = first_step
        self._first_example = first_example
        self._threads = threads
        # Grain adds the epoch to its seed; unrelated seeds must not meet in each other's later epochs.
        order_seed = int(np.random.SeedSequence([seed, TRAINING]).generate_state(1)[0])
        self._order = grain.MapDataset.range(len(examples)).shuffle(seed=order_seed)

    def locate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, index into the examples) of each row of batch `step`, those of other hosts too: int64 [B]."""
        return self._locate(step, slice(0, self.batch_size))

    def _locate(self, step: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
        if step < self.first_step:
            raise ValueError(f"batch {step} of a pipeline that begins at {self.first_step}")
        first = self._first_example + (step - self.first_step) * self.batch_size
        places = range(first + part.start, first + part.stop)
        epochs = np.asarray([place // len(self._examples) for place in places], np.int64)
        return epochs, np.asarray([self._order[place] for place in places], np.int64)

    def batch(self, step: int) -> Batch:
        """This host's rows of batch `step` ≥ `first_step`, in time that does not depend on `step`.

        The features, and `example_index` int32 [B], `example_weight` float32 [B] of ones.
        """
        return self._rows(step, self._slice)

    def _rows(self, step: int, part: slice) -> Batch:
        rows = []
        for epoch, index in zip(*self._locate(step, part), strict=True):
            epoch, index = int(epoch), int(index)
            example = self._at_epoch(epoch)[index]
            rows.append((index, 1.0, self._features(example, feature_rng(self._seed, TRAINING, epoch, index))))
        return _stack(rows)

    @functools.cached_property
    def one_row(self) -> Batch:
        """A batch of one row, which says what every batch is made of: names, dtypes and all sizes but the first."""
        return self._rows(self.first_step, slice(0, 1))

    def iterate(self, start_step: int) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from `start_step` on without end, prepared ahead by threads; close it to stop them."""
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=PREFETCH if self._threads else 0)
        batches = iter(grain.MapDataset.source(_Batches(self)).to_iter_dataset(options))
        batches.set_state({"next_index": start_step})
        with contextlib.closing(batches):
            yield from enumerate(batches, start_step)


class _Batches:
    """The batches as the random-access source that Grain reads."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, step: int) -> Batch:
        return self._pipeline.batch(step)


def evaluation_batches(
    examples: Sequence[Any],
    features: Features,
    *,
    batch_size: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This host's part of every batch, each example once and in order.

    The last batch is filled up by its first row with `example_weight` 0, so that all have one shape. The generator of
    an example is made from (seed, index), so that every evaluation masks the same positions.

    Raises:
      UserError: no examples, or a batch that does not divide over the hosts.
    """
    if not len(examples):
        raise UserError("there are no examples to evaluate on")
    part = _host_slice(batch_size, process_index, process_count)
    for first in range(0, len(examples), batch_size):
        rows = []
        for place in range(first + part.start, first + part.stop):
            real = place < len(examples)
            index = place if real else first
            rng = feature_rng(seed, EVALUATION, 0, index)
            rows.append((index, float(real), features(examples[index], rng)))
        yield _stack(rows)


def feature_rng(seed: int, purpose: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one example: Philox keyed by all four, so that different keys give unrelated streams."""
    key = np.random.SeedSequence([seed, purpose, epoch, index]).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _host_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"a batch of {batch_size} rows does not divide over {process_count} processes")
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def _stack(rows: list[tuple[int, float, Mapping[str, np.ndarray]]]) -> Batch:
    first = rows[0][2]
    batch = {name: np.stack([row[name] for _, _, row in rows]) for name in first}
    batch["example_index"] = np.asarray([index for index, _, _ in rows], np.int32)
    batch["example_weight"] = np.asarray([weight for _, weight, _ in rows], np.float32)
    return batch
