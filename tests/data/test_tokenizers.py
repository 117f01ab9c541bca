"""Tokenizers: what they give, that they are their files, and that training is a function of the text."""

import io
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import data
from zoo.data import tokenizer as tokenizer_module
from zoo.data import tokenizers, wordpiece_training
from zoo.data.huggingface_tokenizer import wordpiece
from zoo.data.wordpiece_training import SPECIAL
from zoo.errors import UserError

WORDS = [*SPECIAL, "un", "##aff", "##able", "a", "##b", "the", "!", "数", "学", "is", "[", "]", "mask", "x", "##x", "#"]


# As tokenizer_config.json describes a token.
MASK = {"content": "[MASK]", "special": True}


@pytest.fixture(scope="module")
def small():
    return wordpiece(WORDS, lowercase=True, chinese_words=False, where="test")


@pytest.fixture(scope="module")
def topics():
    return list(pydoc_data.topics.topics.values())


def pieces(tokenizer, encoded):
    return [WORDS[i] for i in encoded.ids]


def test_wordpiece_golden(small):
    encoded = small.encode("The  UNAFFABLE! 数学 áb zzz")
    assert pieces(small, encoded) == ["the", "un", "##aff", "##able", "!", "数", "学", "a", "##b", "[UNK]"]
    assert encoded.word_starts.tolist() == [True, True, False, False, True, True, True, True, False, True]
    assert encoded.ids.dtype == np.int32 and encoded.word_starts.dtype == bool
    assert small.decode(encoded.ids[:5]) == "the unaffable!"


def test_special_tokens_in_text_are_text(small):
    assert pieces(small, small.encode("[MASK]")) == ["[", "mask", "]"]
    as_json = library.Tokenizer(library.models.WordPiece({t: i for i, t in enumerate(WORDS)}, unk_token="[UNK]"))
    as_json.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    as_json.normalizer = library.normalizers.BertNormalizer()
    as_json.add_special_tokens(list(SPECIAL))
    as_json.enable_padding(length=128)
    as_json.enable_truncation(2)
    loaded = tokenizers.from_json(as_json.to_str().encode(), chinese_words=False, where="test")
    assert pieces(loaded, loaded.encode("[MASK] the")) == ["[", "mask", "]", "the"]


def test_vocabulary(small):
    found = small.vocabulary
    assert (found.pad, found.unk, found.cls, found.sep, found.mask) == (0, 1, 2, 3, 4)
    assert found.size == len(WORDS) and found.special == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([*SPECIAL, "a", "b", "a"], "v:8: the token 'a' stands on line 6 already"),
        ([*SPECIAL, "", "b"], "v:6: an empty line"),
        (SPECIAL[:-1], r"v: no mask token; expected one of \[MASK\], <mask>"),
    ],
)
def test_bad_vocabularies(tokens, message):
    with pytest.raises(UserError, match=message):
        wordpiece(tokens, lowercase=True, chinese_words=False, where="v")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["un", "unaffable", "a b", "数学", " ", "", "\u3000", "zz", "ab!", "\x00", "[SEP]"])))
def test_words_are_never_lost(small, words):
    encoded = small.encode_words(words)
    assert encoded.word_starts.sum() == len(words)
    expected = [small.encode(word).ids.tolist() or [small.vocabulary.unk] for word in words]
    assert encoded.ids.tolist() == [i for ids in expected for i in ids]
    first = np.cumsum([0] + [len(ids) for ids in expected])[:-1]
    assert np.flatnonzero(encoded.word_starts).tolist() == first.tolist()


def test_batch_equals_one_by_one_and_long_texts_are_cut_unseen(small, monkeypatch):
    texts = ["the unaffable is a!", "", "ab unaffable the " * 9, "数学" * 20]
    whole = [small.encode(text) for text in texts]
    monkeypatch.setattr(tokenizer_module, "LONGEST_CALL", 12)
    for one, other in zip(whole, small.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.word_starts, other.word_starts)


def test_chinese_words():
    vocabulary = [*SPECIAL, *"我来到北京清华大学恤，", "t", "learn", "##ing"]
    tokenizer = wordpiece(vocabulary, lowercase=True, chinese_words=True, where="test")
    encoded = tokenizer.encode("我来到北京清华大学，learning T恤")
    words = []
    for i, start in zip(encoded.ids, encoded.word_starts, strict=True):
        if start:
            words.append("")
        words[-1] += vocabulary[i].removeprefix("##")
    assert words == ["我", "来到", "北京", "清华大学", "，", "learning", "t恤"]
    plain = wordpiece(vocabulary, lowercase=True, chinese_words=False, where="test")
    np.testing.assert_array_equal(plain.encode("清华大学").word_starts, [True] * 4)
    assert plain.fingerprint != tokenizer.fingerprint
    assert tokenizer.encode("").ids.size == 0


@pytest.mark.parametrize("lowercase, chinese_words", [(True, False), (False, True)])
def test_saved_and_loaded_is_the_same(tmp_path, lowercase, chinese_words):
    one = wordpiece([*WORDS, "a\u2028b"], lowercase=lowercase, chinese_words=chinese_words, where="test")
    one.save(tmp_path / "deep" / "tokenizer")
    again = tokenizers.load_tokenizer(tmp_path / "deep" / "tokenizer")
    assert again.fingerprint == one.fingerprint and again.vocabulary == one.vocabulary
    assert again.encode("The ab").ids.tolist() == one.encode("The ab").ids.tolist()
    with pytest.raises(UserError, match="do_lower_case"):
        tokenizers.load_tokenizer(tmp_path / "deep" / "tokenizer", lowercase=not lowercase)
    one.save(tmp_path / "deep" / "tokenizer")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["tokenizer"]  # nothing half-written is left


def test_loading_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no vocab\.txt, no tokenizer\.json"):
        tokenizers.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        tokenizers.load_tokenizer(tmp_path / "vocab.txt")
    for name, message in (("a.json", "not a tokenizer.json"), ("a.model", "not a SentencePiece"), ("a.bin", "not a")):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(UserError, match=message):
            tokenizers.load_tokenizer(tmp_path / name)


def test_training_golden():
    # Counts: a##b 5+3, then ab##c 3; "##b ##c" 3 at first, gone after the first merge.
    text = "ab ab ab ab ab abc abc abc d"
    assert wordpiece_training.learn([text], size=20, lowercase=True, limit_alphabet=9) == [
        *SPECIAL, "a", "b", "c", "d", "##b", "##c", "ab", "abc",
    ]  # fmt: skip
    assert wordpiece_training.learn([text], size=20, lowercase=True, limit_alphabet=2) == [
        *SPECIAL, "a", "b", "##b", "ab",
    ]  # fmt: skip
    with pytest.raises(UserError, match="cannot hold"):
        wordpiece_training.learn([text], size=8, lowercase=True, limit_alphabet=9)
    with pytest.raises(UserError, match="no words"):
        wordpiece_training.learn([" "], size=8, lowercase=True, limit_alphabet=9)


def test_five_trainings_give_one_vocabulary(topics):
    found = set()
    for k in range(5):
        random.Random(k).shuffle(topics)
        found.add(tokenizers.train_wordpiece(topics, size=1500).fingerprint)
    assert len(found) == 1


def test_training_does_not_depend_on_the_process():
    program = (
        "import pydoc_data.topics as t; from zoo.data.tokenizers import train_wordpiece; "
        "print(train_wordpiece(list(t.topics.values())[:20], size=600).fingerprint)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop()) == 65


def test_training_is_as_good_as_the_librarys(topics):
    ours = wordpiece_training.learn(topics, size=2000, lowercase=True, limit_alphabet=200)
    other = library.Tokenizer(library.models.WordPiece(unk_token="[UNK]"))
    other.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    other.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    other.train_from_iterator(
        topics,
        library.trainers.WordPieceTrainer(
            vocab_size=2000, limit_alphabet=200, special_tokens=list(SPECIAL), show_progress=False
        ),
    )
    assert len(ours) == len(set(ours)) == 2000
    assert len(set(ours) & set(other.get_vocab())) >= 1980  # ties decide about the rest


def test_part_trains_once_and_again_when_anything_changes(tmp_path, topics):
    text = tmp_path / "a.txt"
    text.write_text(topics[0])
    source = data.registry.build({"name": "text", "train": (str(text),)})
    part = tokenizers.registry.build({"name": "wordpiece", "size": 200})
    first = part.tokenizer(source, tmp_path / "tokenizer")
    written = (tmp_path / "tokenizer" / "vocab.txt").stat().st_mtime_ns
    assert part.tokenizer(source, tmp_path / "tokenizer").fingerprint == first.fingerprint
    assert (tmp_path / "tokenizer" / "vocab.txt").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "tokenizer" / "training.json").read_text())["tokenizer"]["size"] == 200
    text.write_text(topics[1])
    source = data.registry.build({"name": "text", "train": (str(text),)})
    assert part.tokenizer(source, tmp_path / "tokenizer").fingerprint != first.fingerprint
    given_path = tokenizers.registry.build({"name": "wordpiece", "path": str(tmp_path / "tokenizer")})
    assert given_path.tokenizer(source, tmp_path / "unused").vocabulary.size <= 200
    assert not (tmp_path / "unused").exists()


def test_sentencepiece(tmp_path, topics):
    texts = topics[:12]
    one, two = (tokenizers.train_sentencepiece(texts, size=400) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    found = one.vocabulary
    assert (found.pad, found.unk, found.cls, found.sep, found.mask) == (0, 1, 2, 3, 4) and found.size == 400
    encoded = one.encode("the assert statement")
    assert one.decode(encoded.ids) == "the assert statement"
    assert encoded.word_starts.sum() == 3 and encoded.word_starts[0]
    assert not set(one.encode("[MASK] <pad>").ids.tolist()) & {0, 2, 3, 4}
    words = one.encode_words(["assert", " ", "statement"])
    assert words.word_starts.sum() == 3 and words.ids[np.flatnonzero(words.word_starts)[1]] == found.unk
    one.save(tmp_path / "t")
    assert tokenizers.load_tokenizer(tmp_path / "t").fingerprint == one.fingerprint
    with pytest.raises(UserError, match="pieces can be learnt"):
        tokenizers.train_sentencepiece(["a b"], size=4000, model="bpe")


@pytest.fixture(scope="module")
def without_mask(topics):
    """A model laid out as those of DeBERTa v2, whose [MASK] stands beyond its pieces."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(topics[0].split("\n")), model_writer=written, vocab_size=120, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"vocab_type": "spm", "do_lower_case": False}},
        {"added_tokens.json": {"[MASK]": 120}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"0": MASK | {"content": "[PAD]"}, "120": MASK}}},
    ],
)
def test_tokens_beyond_the_pieces_of_sentencepiece(tmp_path, without_mask, files):
    (tmp_path / "spm.model").write_bytes(without_mask)
    with pytest.raises(UserError, match="no mask token"):
        tokenizers.load_tokenizer(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    one = tokenizers.load_tokenizer(tmp_path)
    found = one.vocabulary
    assert (found.pad, found.cls, found.sep, found.unk, found.mask, found.size) == (0, 1, 2, 3, 120, 121)
    assert found.special == (0, 1, 2, 3, 120) and one.decode([1, 120, 2]) == "[CLS][MASK][SEP]"
    assert max(one.encode("assert [MASK]").ids) < 120
    one.save(tmp_path / "saved")
    again = tokenizers.load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == one.fingerprint and again.vocabulary == found


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config.json": {"vocab_type": "spm", "do_lower_case": True}},
            "do_lower_case=true changes the text",
        ),
        ({"tokenizer_config.json": {"vocab_type": "spm", "split_by_punct": True}}, "split_by_punct=true"),
        ({"added_tokens.json": {"[MASK]": 120, "[PAD]": 1}}, r"'\[PAD\]' has the id 1, which .* gives '\[CLS\]'"),
        ({"added_tokens.json": {"[MASK]": 120, "word": 121}}, "'word' stands for text"),
        ({"added_tokens.json": {"[MASK]": "last"}}, "not token and id"),
        ({"added_tokens.json": ["[MASK]"]}, "not a JSON object"),
    ],
)
def test_files_beside_sentencepiece_that_say_something_else(tmp_path, without_mask, files, message):
    (tmp_path / "spm.model").write_bytes(without_mask)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        tokenizers.load_tokenizer(tmp_path)


@pytest.fixture
def byte_level(tmp_path, topics):
    """A folder as GPT-2 files its tokenizer, with the special tokens of DeBERTa v1."""
    made = library.ByteLevelBPETokenizer()
    made.train_from_iterator(topics[:2], vocab_size=300, special_tokens=[*SPECIAL], show_progress=False)
    made.save_model(str(tmp_path))
    return tmp_path, made


def test_byte_level_bpe(byte_level):
    folder, made = byte_level
    one, text = tokenizers.load_tokenizer(folder), "An assert statement,\nisn't  it?  Zürich 数学"
    assert one.encode(text).ids.tolist() == made.encode(text).ids and one.decode(one.encode(text).ids) == text
    assert one.encode("an assert, it").word_starts.sum() == 4
    assert one.vocabulary.special == (0, 1, 2, 3, 4) and not set(one.encode("[MASK]").ids.tolist()) & {*range(5)}
    one.save(folder / "saved")
    assert tokenizers.load_tokenizer(folder / "saved").fingerprint == one.fingerprint
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert tokenizers.load_tokenizer(folder).encode(text).ids.tolist() == made.encode(" " + text).ids
    (folder / "added_tokens.json").write_text('{"<mask>": 300}')
    beyond = tokenizers.load_tokenizer(folder).vocabulary
    assert (beyond.size, beyond.special) == (301, (0, 1, 2, 3, 4, 300))
    (folder / "added_tokens.json").write_text('{"<mask>": 301}')
    with pytest.raises(UserError, match="'<mask>' has the id 301, which is not the next"):
        tokenizers.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", "a b c", "not a pair of pieces a line"),
        ("merges.txt", "数 学", "not a pair of pieces a line"),
        ("vocab.json", '{"a": 0, "b": 2}', "ids from 0 on, each once"),
        ("vocab.json", '{"a": 0', "not JSON"),
        ("vocab.json", '{"a": 0}', "not a pair of pieces a line"),
    ],
)
def test_a_byte_level_bpe_that_is_none(byte_level, name, content, message):
    folder, _ = byte_level
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        tokenizers.load_tokenizer(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(UserError, match="no such file; a byte-level BPE is"):
        tokenizers.load_tokenizer(folder)


def test_whole_words(tmp_path):
    part = tokenizers.registry.build("words")
    learnt = part.train(["the cat , The  dog", "[MASK] cat x12"])
    ids = {word: learnt.encode(word).ids.tolist() for word in ("[UNK]", ",", "The", "cat", "dog", "the", "x12")}
    assert ids == {word: [k] for k, word in enumerate(ids)}, "in sorted order"
    assert learnt.vocabulary.special == (0, 7, 8, 9, 10) and learnt.vocabulary.size == 11
    encoded = learnt.encode_words(("x12", "the", "x1", "[MASK]", "[PAD]"))
    assert encoded.ids.tolist() == [6, 5, 0, 0, 0] and encoded.word_starts.all()
    encoded = learnt.encode("the  cat,\nx12")
    assert encoded.ids.tolist() == [5, 0, 6] and encoded.word_starts.all()
    learnt.save(tmp_path / "kept")
    assert tokenizers.load_tokenizer(tmp_path / "kept").fingerprint == learnt.fingerprint
    assert part.train(["x12 , dog cat", "the The cat"]).fingerprint == learnt.fingerprint
    with pytest.raises(UserError, match="more than 2 different words"):
        tokenizers.Words(size=7).train(["a b", "c"])
    with pytest.raises(UserError, match="no words"):
        part.train([" "])
