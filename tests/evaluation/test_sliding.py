"""Windows over a text: every token is scored once, with enough before it."""

import numpy as np
import pytest

from zoo.errors import UserError
from zoo.evaluation.sliding import Windows


def text(tokens, padding=3, documents=(7, 30)):
    """Ids that say where they stand, in documents of their own positions, and some padding."""
    index = np.arange(tokens)
    segments = 1 + np.searchsorted(documents, index, side="right")
    positions = index - np.asarray([0, *documents])[segments - 1]
    row = {"input_ids": index + 100, "segment_ids": segments, "positions": positions, "word_starts": index % 2 == 0}
    return {name: np.append(values, np.zeros(padding, values.dtype)) for name, values in row.items()}


@pytest.mark.parametrize(("tokens", "stride"), [(40, 4), (41, 4), (43, 1), (8, 5), (40, 7)])
def test_every_token_is_scored_once_with_enough_before_it(tokens, stride):
    windows = Windows(text(tokens), 8, stride, pad=5)
    scored, found = windows.scored(), []
    for k in range(len(windows)):
        row = windows[k]
        real = row["segment_ids"] > 0
        assert (row["input_ids"][~real] == 5).all() and len(row["input_ids"]) == 8
        labelled = np.append(real[1:], False)
        for t in np.flatnonzero(scored[k] & labelled):
            found.append(row["input_ids"][t + 1] - 100)
            assert k == 0 or t + 1 >= 8 - stride
    assert found == list(range(1, tokens))
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_positions_begin_anew_in_the_window_and_in_every_document():
    row = Windows(text(40), 8, 4, pad=5)[1]
    assert row["input_ids"].tolist() == list(range(104, 112))
    assert row["segment_ids"].tolist() == [1] * 3 + [2] * 5
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert text(40)["positions"][4] == 4, "the text itself is left as it was"


@pytest.mark.parametrize(
    ("stride", "length", "message"), [(0, 8, "expected 1 to 7"), (8, 8, "expected 1 to 7"), (4, 41, "40 tokens")]
)
def test_refusals(stride, length, message):
    with pytest.raises(UserError, match=message):
        Windows(text(40), length, stride, pad=0)
