"""The pipeline: order and features are a function of (seed, step) and of nothing else."""

import itertools
import threading

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.pipeline import EVALUATION, TRAINING, Pipeline, evaluation_batches, feature_rng
from zoo.errors import UserError


def features(example, rng):
    return {"example": np.asarray(example, np.int32), "draw": rng.integers(1 << 30, size=2).astype(np.int32)}


def pipeline(n=10, **options):
    return Pipeline(range(n), features, **{"seed": 1, "batch_size": 4, **options})


def test_order_golden():
    # Written down so that an upgrade of Grain or NumPy that changes everybody's order is seen.
    order = [pipeline(seed=0).batch(step)["example"].tolist() for step in range(5)]
    assert order == ORDER
    assert feature_rng(1, TRAINING, 2, 3).bit_generator.random_raw(2).tolist() == RAW


ORDER = [[5, 8, 9, 7], [4, 2, 1, 0], [3, 6, 6, 9], [4, 8, 0, 7], [3, 2, 1, 5]]
RAW = [14985604870765247672, 7803656794876774948]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), batch_size=st.integers(1, 12), seed=st.integers(0, 2**32), epochs=st.integers(1, 4))
def test_epochs_are_permutations_that_flow_into_each_other(n, batch_size, seed, epochs):
    endless = pipeline(n, batch_size=batch_size, seed=seed)
    batches = [endless.batch(step) for step in range(-(-epochs * n // batch_size))]
    order = np.concatenate([b["example"] for b in batches])
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    for batch in batches:
        np.testing.assert_array_equal(batch["example"], batch["example_index"])
        np.testing.assert_array_equal(batch["example_weight"], np.ones(batch_size, np.float32))


def test_epochs_and_seeds_differ():
    orders = {
        (seed, epoch): tuple(pipeline(50, seed=seed, batch_size=50).batch(epoch)["example"].tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(set(orders.values())) == 25  # seed 1's first epoch is not seed 0's second
    draws = np.stack([pipeline(50, batch_size=50).batch(epoch)["draw"][:, 0] for epoch in range(3)])
    assert len(np.unique(draws)) > 148


def test_features_depend_on_seed_epoch_and_index_alone():
    whole = {}
    for step in range(15):
        for epoch, index, draw in zip(
            *pipeline(batch_size=4).locate(step), pipeline(batch_size=4).batch(step)["draw"].tolist(), strict=True
        ):
            whole[int(epoch), int(index)] = draw
    assert len(whole) == 60
    for step in range(10):
        other = pipeline(batch_size=6)
        for epoch, index, draw in zip(*other.locate(step), other.batch(step)["draw"].tolist(), strict=True):
            assert whole[int(epoch), int(index)] == draw


@pytest.mark.parametrize("step", [0, 2, 7, 10**7])
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_lay_end_to_end_to_the_same_batch(step, count):
    whole = pipeline(batch_size=8).batch(step)
    parts = [pipeline(batch_size=8, process_index=p, process_count=count).batch(step) for p in range(count)]
    chex.assert_trees_all_equal({k: np.concatenate([part[k] for part in parts]) for k in whole}, whole)


def test_seeking_looks_at_no_other_example():
    looked_at = []

    class Watched:
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            looked_at.append(index)
            return index

    far = Pipeline(Watched(), features, seed=0, batch_size=4)
    assert far.batch(10**7)["example"].tolist() == looked_at and len(looked_at) == 4
    assert far.batch(10**15)["example"].shape == (4,)
    with_start = far.iterate(10**7)
    assert next(with_start)[0] == 10**7
    with_start.close()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_iterating_equals_asking(threads):
    endless = pipeline(threads=threads)
    running = endless.iterate(5)
    for step, batch in itertools.islice(running, 20):
        chex.assert_trees_all_equal(batch, endless.batch(step))
    running.close()
    assert step == 24
    ahead = [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]
    for thread in ahead:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in ahead)


def test_an_error_in_the_features_reaches_the_caller():
    def broken(example, rng):
        raise UserError("a.tsv:3: wrong")

    running = Pipeline(range(4), broken, seed=0, batch_size=2).iterate(0)
    with pytest.raises(UserError, match=r"a\.tsv:3: wrong"):
        next(running)


def test_repacked_examples_are_asked_for_their_epoch():
    class Anew:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            raise AssertionError("training asks for an epoch")

        def at_epoch(self, epoch):
            return [100 * epoch + index for index in range(6)]

    endless = Pipeline(Anew(), features, seed=0, batch_size=4)
    for step in range(6):
        epochs, indices = endless.locate(step)
        np.testing.assert_array_equal(endless.batch(step)["example"], 100 * epochs + indices)
        np.testing.assert_array_equal(endless.batch(step)["example_index"], indices)
    np.testing.assert_array_equal(endless.locate(1)[0], [0, 0, 1, 1])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_in_order_and_padded(count):
    parts = [
        list(evaluation_batches(range(9), features, batch_size=4, seed=3, process_index=p, process_count=count))
        for p in range(count)
    ]
    assert {len(part) for part in parts} == {3}
    batches = [{k: np.concatenate([b[k] for b in at_once]) for k in at_once[0]} for at_once in zip(*parts, strict=True)]
    assert [b["example"].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 8, 8, 8]]
    assert [b["example_weight"].tolist() for b in batches] == [[1] * 4, [1] * 4, [1, 0, 0, 0]]
    assert (batches[2]["draw"] == batches[2]["draw"][0]).all()
    draws = {int(i): d.tolist() for b in batches for i, d in zip(b["example_index"], b["draw"], strict=True)}
    again = evaluation_batches(range(9), features, batch_size=3, seed=3)
    assert draws == {int(i): d.tolist() for b in again for i, d in zip(b["example_index"], b["draw"], strict=True)}


def test_training_and_evaluation_draw_differently():
    streams = {
        tuple(feature_rng(*key).bit_generator.random_raw(2).tolist())
        for key in itertools.product((0, 1), (TRAINING, EVALUATION), (0, 1), (0, 1))
    }
    assert len(streams) == 16


def test_what_cannot_be_batched():
    with pytest.raises(UserError, match="no examples to train on"):
        pipeline(0)
    with pytest.raises(UserError, match="no examples to evaluate on"):
        next(evaluation_batches([], features, batch_size=2))
    with pytest.raises(UserError, match="a batch of 4 rows does not divide over 3 processes"):
        pipeline(process_count=3)
    with pytest.raises(ValueError, match="process 2 of 2"):
        pipeline(process_index=2, process_count=2)
