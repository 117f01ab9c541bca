"""What a task gives to the model."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.tasks.task import encode


class Recorder:
    """A model that returns what it was given beside the ids."""

    def __init__(self, token_types: int):
        self.token_types = token_types

    def __call__(self, input_ids, **given):
        return set(given)


@pytest.mark.parametrize("token_types", [0, 1, 2])
def test_token_types_go_to_models_that_tell_them_apart(token_types):
    """RoBERTa has one type, DistilBERT none: a second text follows its separator and has the type of the first."""
    batch = {name: np.zeros((1, 4), np.int32) for name in ("input_ids", "segment_ids", "token_type_ids")}
    given = encode(Recorder(token_types), batch, train=False)
    assert given == {"segment_ids", "train"} | ({"token_type_ids"} if token_types == 2 else set())
