"""WordPiece over words that jieba cuts first, and which directory is read so."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from zoo.data import jieba_wordpiece
from zoo.data.chinese_words import ChineseWords
from zoo.data.tokenizers import load_tokenizer
from zoo.errors import UserError
from zoo.interop.load import tokenizer_in

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENS = (*SPECIAL, "今", "天", "气", "非常", "好", "。", "我们", "play", "##ed", "天气", "mask", "[", "]", "们")
# jieba's words are 今天天气 / 非常 / 好 / 。 and the first is not in the vocabulary: so its characters, though 天气 is.
TEXT, PIECES = (
    "今天天气非常好。 我们 Played [MASK]龘",
    ["今", "天", "天", "气", "非常", "好", "。", "我们", "play", "##ed", "[", "mask", "]", "[UNK]"],
)


@pytest.fixture(scope="module", autouse=True)
def one_dictionary():
    """Reading jieba's takes a second, every time."""
    once = functools.cache(ChineseWords)
    once.version = ChineseWords.version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jieba_wordpiece, "ChineseWords", once)
        yield


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RoFormerTokenizer"}))
    return tmp_path


def names(tokenizer, text: str = TEXT) -> list[str]:
    return [TOKENS[i] for i in tokenizer.encode(text).ids]


def test_pieces_and_words(folder):
    tokenizer = load_tokenizer(folder)
    assert names(tokenizer) == PIECES
    starts = tokenizer.encode(TEXT).word_starts
    np.testing.assert_array_equal(starts, [piece != "##ed" for piece in PIECES])
    words = tokenizer.encode_words(["我们", " ", "played"])
    assert [TOKENS[i] for i in words.ids] == ["我们", "[UNK]", "play", "##ed"]
    assert names(load_tokenizer(folder / "vocab.txt")) != PIECES, "BERT's cuts every Chinese character"


def test_saved_it_is_the_same_tokenizer(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.fingerprint == tokenizer.fingerprint and names(again) == PIECES
    assert tokenizer.fingerprint != load_tokenizer(folder / "vocab.txt").fingerprint


def test_the_library_writes_it_without_its_words(folder):
    """transformers 5 saves tokenizer.json alone, with BERT's pre-tokenizer in the place of what it cannot write."""
    (folder / "vocab.txt").unlink()
    said = {
        "model": {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(TOKENS)}},
        "normalizer": {"type": "BertNormalizer", "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(said))
    assert names(load_tokenizer(folder)) == PIECES
    said["model"]["vocab"]["好"] = 99
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="ids of its 19 tokens are not 0 to 18"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": []}}))
    with pytest.raises(UserError, match="holds no WordPiece"):
        load_tokenizer(folder)


def test_a_directory_is_read_as_the_source_library_reads_it(folder):
    """A RoFormer names its tokenizer, or has the architecture's; its checkpoints of characters name BERT's."""
    (folder / "config.json").write_text(json.dumps({"model_type": "roformer"}))
    assert names(tokenizer_in(folder)) == PIECES
    (folder / "tokenizer_config.json").unlink()
    assert names(tokenizer_in(folder)) == PIECES
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert names(tokenizer_in(folder)) != PIECES
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert names(tokenizer_in(folder)) != PIECES
