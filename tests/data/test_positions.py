"""Training positions: a short row of a long text's tokens, each where it stood."""

import numpy as np
import pytest

from zoo.data.pipeline import TRAINING, feature_rng
from zoo.data.positions import Segmented, registry
from zoo.errors import UserError


class Marks:
    """A generator that draws what it is told to."""

    def __init__(self, *marks):
        self.marks = np.asarray(marks)

    def choice(self, count, size, replace):
        assert size == len(self.marks) and not replace and self.marks.max() < count
        return self.marks


def row(length, used=None, documents=1):
    """A packed row of `documents` equal documents, whose tokens are numbered from 100 and whose words have three pieces."""
    used = length if used is None else used
    index = np.arange(length)
    segment_ids = np.where(index < used, 1 + index * documents // used, 0).astype(np.int32)
    positions = np.where(index < used, index % (used // documents), 0).astype(np.int32)
    return {
        "input_ids": (index + 100).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": positions,
        "word_starts": index % 3 == 0,
    }


def test_golden_positions():
    """A quarter of a row each, from 0, 5, 9 and 14 of a text of 16; 0 to 13 tokens stand before a run that no run holds."""
    chosen = Segmented(16, 4).choose(row(16), 8, Marks(11, 0, 7, 4))
    np.testing.assert_array_equal(chosen["positions"], [0, 1, 5, 6, 9, 10, 14, 15])
    np.testing.assert_array_equal(chosen["input_ids"], chosen["positions"] + 100)
    # Words begin at 0, 3, 6, … and wherever a run does.
    np.testing.assert_array_equal(chosen["word_starts"], [1, 0, 1, 1, 1, 0, 1, 1])


@pytest.mark.parametrize("pieces", [1, 3, 4, 10])
def test_runs_keep_their_order_and_stay_inside(pieces):
    part, seen = Segmented(40, pieces), set()
    for number in range(200):
        chosen = part.choose(row(40), 10, feature_rng(0, TRAINING, 0, number))
        token = chosen["positions"]
        assert token.shape == (10,) and token[0] >= 0 and token[-1] < 40
        steps = np.diff(token)
        assert (steps > 0).all() and (steps > 1).sum() < pieces
        seen |= set(token.tolist())
    assert seen == set(range(40)), "every position is trained"


def test_every_way_to_lay_the_runs_is_as_likely():
    """Two runs of one token among four: six ways."""
    drawn = [tuple(Segmented(4, 2).choose(row(4), 2, feature_rng(1, 0, 0, n))["positions"]) for n in range(1200)]
    ways, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(ways) == 6
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200 * 5 / 6)


def test_it_is_a_function_of_seed_epoch_and_row():
    def drawn(*key):
        return Segmented(64).choose(row(64), 16, feature_rng(key[0], TRAINING, *key[1:]))["positions"]

    np.testing.assert_array_equal(drawn(0, 1, 2), drawn(0, 1, 2))
    others = [drawn(*key) for key in ((1, 1, 2), (0, 0, 2), (0, 1, 3))]
    assert all((other != drawn(0, 1, 2)).any() for other in others)


def test_documents_keep_their_own_positions_and_padding_its_place():
    chosen = Segmented(24, 3).choose(row(24, used=20, documents=2), 12, np.random.default_rng(3))
    assert (chosen["segment_ids"] > 0).all()
    for document in (1, 2):
        its = chosen["segment_ids"] == document
        assert (np.diff(chosen["positions"][its]) > 0).all()
        np.testing.assert_array_equal(chosen["positions"][its], chosen["input_ids"][its] - 100 - 10 * (document - 1))
    short = Segmented(24, 3).choose(row(24, used=7), 12, np.random.default_rng(3))
    np.testing.assert_array_equal(short["input_ids"], np.arange(100, 112))
    np.testing.assert_array_equal(short["segment_ids"] > 0, np.arange(12) < 7)


@pytest.mark.parametrize("fields", [{"longest": 8, "pieces": 0}, {"longest": 3}])
def test_refusals(fields):
    with pytest.raises(UserError, match="pieces must be at least 1 and at most longest"):
        registry.build({"name": "segmented", **fields})
