"""Passkeys in a tokenizer's own tokens."""

import numpy as np
import pytest

from zoo.data.synthetic.passkey import Passkey
from zoo.data.tokenizers import train_wordpiece
from zoo.errors import UserError
from zoo.evaluation.passkeys import passkey_rows


@pytest.fixture(scope="module")
def tokenizer():
    words = " ".join(Passkey(length=200).record("train", 0).fields["words"])
    return train_wordpiece([words, "0 1 2 3 4 5 6 7 8 9", "the quick brown fox"] * 3, size=90)


@pytest.mark.parametrize("length", [500, 777])
def test_rows_are_as_long_as_fits_and_end_in_the_key(tokenizer, length):
    rows = {depth: passkey_rows(tokenizer, length, depth, keys=4) for depth in (0.0, 0.5, 1.0)}
    longest = {max(len(row.ids) for row in some) for some in rows.values()}
    assert longest <= set(range(length - 12, length + 1)), "a word more would not fit"
    keys = {depth: [tokenizer.decode(row.ids[row.answers]) for row in some] for depth, some in rows.items()}
    assert keys[0.0] == keys[0.5] == keys[1.0] and len(set(keys[0.0])) == 4
    for k, key in enumerate(keys[0.0]):
        assert len(key.split()) == 5
        places = []
        for depth in rows:
            ids, answer = rows[depth][k].ids, rows[depth][k].ids[rows[depth][k].answers]
            told = [t for t in range(len(ids) - 4) if np.array_equal(ids[t : t + 5], answer)]
            assert len(told) == 3 and told[2] == len(ids) - 5
            places.append(told[0])
        assert places == sorted(places) and len(set(places)) == 3


def test_refusals(tokenizer):
    with pytest.raises(UserError, match=r"without any filler has \d+ tokens, more than 60"):
        passkey_rows(tokenizer, 60, 0.5, keys=2)
    with pytest.raises(UserError, match="does not know the answer"):
        passkey_rows(train_wordpiece(["the pass key is"], size=60), 2000, 0.5, keys=2)
