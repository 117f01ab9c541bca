"""Sentence encoders: one vector of a text's tokens, and what modules.json says of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import zoo
from tests.interop import small_checkpoints
from zoo.errors import UserError
from zoo.interop.sentence_embedding import SentenceEmbedding, sentence_embedding


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_counts_for_nothing(pooling):
    hidden = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    made = SentenceEmbedding(pooling, normalize=True)(hidden, mask)
    vector = hidden[0, :3].mean(0) if pooling == "mean" else hidden[0, 0]
    np.testing.assert_allclose(made[0], vector / np.linalg.norm(vector), rtol=1e-6)
    np.testing.assert_allclose(SentenceEmbedding(pooling)(hidden, mask)[0], vector, rtol=1e-6)


def test_what_is_saved_is_read_again(tmp_path):
    for number, made in enumerate([SentenceEmbedding("cls", False, 64), SentenceEmbedding("mean", True, 256)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        made.save(folder, width=16)
        assert sentence_embedding(folder) == made
    assert sentence_embedding(tmp_path) is None


def test_a_text_alone_and_beside_a_longer_one(tmp_path):
    directory = small_checkpoints.write(tmp_path / "bert")
    SentenceEmbedding("mean", True, 8).save(directory, width=16)
    encoder = zoo.load_pretrained(directory)
    both = encoder.embed(["a fine film", "the plot was not very good the acting was bad"])
    np.testing.assert_allclose(both[0], encoder.embed(["a fine film"])[0], atol=1e-6)
    assert both.shape == (2, 16) and not np.allclose(both[0], both[1], atol=1e-3)
    again = zoo.load_pretrained(zoo.export(encoder, tmp_path / "again"))
    np.testing.assert_array_equal(both, again.embed(["a fine film", "the plot was not very good the acting was bad"]))


def test_what_is_not_ours_to_compute(tmp_path):
    directory = small_checkpoints.write(tmp_path / "bert")
    with pytest.raises(UserError, match=r"no sentence encoder: it has not modules\.json"):
        zoo.load_pretrained(directory).embed(["a"])
    SentenceEmbedding().save(directory, width=16)
    modules = json.loads((directory / "modules.json").read_text())
    for change, words in [
        (
            [*modules, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}],
            "Transformer, Pooling, Dense are not those",
        ),
        ([modules[0], {**modules[1], "path": "../elsewhere"}], "'../elsewhere' is no name of a folder beside it"),
    ]:
        (directory / "modules.json").write_text(json.dumps(change))
        with pytest.raises(UserError, match=words):
            zoo.load_pretrained(directory)
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UserError, match="pooling by pooling_mode_max_tokens; one of"):
        zoo.load_pretrained(directory)
