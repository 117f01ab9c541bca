"""The prepared store: what is in it, that it is whole or not there, and that damage is seen."""

import json
import logging
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from zoo import data
from zoo.data import store as store_module
from zoo.data.huggingface_tokenizer import wordpiece
from zoo.data.store import open_store, prepare
from zoo.data.wordpiece_training import SPECIAL
from zoo.errors import UserError

WORDS = [*SPECIAL, "a", "##b", "c", "##d", "e"]
TEXTS = ["ab cd e", "e", "", "abb e cdd", "a" + "b" * 30]


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece(WORDS, lowercase=True, chinese_words=False, where="test")


def jsonl(tmp_path, texts=TEXTS):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return data.registry.build({"name": "jsonl", "train": (str(path),)})


@pytest.mark.parametrize("batch", [1, 10, 1 << 20])
def test_documents_come_back(tmp_path, tokenizer, batch, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", batch)
    store = prepare(jsonl(tmp_path), "train", tokenizer, tmp_path / "store")
    assert len(store) == len(TEXTS) and store.lengths.tolist() == [5, 1, 0, 7, 31]
    assert store.num_tokens == store.lengths.sum()
    for k, text in enumerate(TEXTS):
        expected = tokenizer.encode(text)
        for found, (start, stop) in [
            (store.document(k), (0, len(expected.ids))),
            (store.span(k, len(expected.ids) // 3, len(expected.ids)), (len(expected.ids) // 3, len(expected.ids))),
        ]:
            assert found.ids.dtype == np.int32 and found.word_starts.dtype == bool
            np.testing.assert_array_equal(found.ids, expected.ids[start:stop])
            np.testing.assert_array_equal(found.word_starts, expected.word_starts[start:stop])
    with pytest.raises(ValueError, match="pieces 0 to 6 of document 0 of 5 pieces"):
        store.span(0, 0, 6)


@pytest.mark.parametrize("batch", [1, 1 << 20])
def test_sentences_are_lines(tmp_path, tokenizer, batch, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", batch)
    texts = ["ab cd\ne", "", "\n \nabb\n \n\u3000\ne e\n", "e", "\x00\ne\n\x00\ncd"]
    store = prepare(jsonl(tmp_path, texts), "train", tokenizer, tmp_path / "store")
    # White space begins no sentence, and a line that leaves no token is none.
    lengths = [[4, 1], [], [3, 2], [1], [1, 2]]
    assert store.lengths.tolist() == [sum(document) for document in lengths]
    assert store.first_sentences().tolist() == [0, 2, 2, 4, 5, 7]
    assert np.diff(store.sentence_offsets).tolist() == [n for document in lengths for n in document]
    assert store.sentence_offsets[0] == 0 and store.sentence_offsets[-1] == store.num_tokens == 14
    for k, text in enumerate(texts):
        np.testing.assert_array_equal(store.document(k).ids, tokenizer.encode(text).ids)
    second = store.pieces(*store.sentence_offsets[2:4])
    assert second.ids.tolist() == [5, 6, 6] and second.word_starts.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="pieces 3 to 15 of 14"):
        store.pieces(3, 15)


def test_a_pair_is_two_sentences_and_tagged_words_are_one(tmp_path, tokenizer):
    (tmp_path / "a.tsv").write_text("ab\te\n")
    (tmp_path / "a.conll").write_text("ab O\ncd O\n")
    pair = data.registry.build({"name": "tsv", "train": (str(tmp_path / "a.tsv"),), "text_pair": 1})
    words = data.registry.build({"name": "conll", "train": (str(tmp_path / "a.conll"),)})
    assert prepare(pair, "train", tokenizer, tmp_path / "p").sentence_offsets.tolist() == [0, 2, 3]
    assert prepare(words, "train", tokenizer, tmp_path / "w").sentence_offsets.tolist() == [0, 4]


def test_a_wide_vocabulary_takes_four_bytes(tmp_path):
    tokens = [*SPECIAL, *(f"w{k}" for k in range(70_000))]
    wide = wordpiece(tokens, lowercase=True, chinese_words=False, where="test")
    store = prepare(jsonl(tmp_path, ["w69999 w0"]), "train", wide, tmp_path / "store")
    assert store.document(0).ids.tolist() == [70_004, 5]


def test_pairs_and_tagged_words(tmp_path, tokenizer):
    (tmp_path / "a.tsv").write_text("ab\te\n")
    (tmp_path / "a.conll").write_text("ab O\n\u3000 O\n")
    pair = data.registry.build({"name": "tsv", "train": (str(tmp_path / "a.tsv"),), "text_pair": 1})
    words = data.registry.build({"name": "conll", "train": (str(tmp_path / "a.conll"),)})
    assert prepare(pair, "train", tokenizer, tmp_path / "p").document(0).ids.tolist() == [5, 6, 9]
    assert prepare(words, "train", tokenizer, tmp_path / "w").document(0).ids.tolist() == [5, 6, 1]


def test_reused_until_source_or_tokenizer_change(tmp_path, tokenizer):
    source = jsonl(tmp_path)
    first = prepare(source, "train", tokenizer, tmp_path / "store")
    (folder,) = (tmp_path / "store").iterdir()
    written = (folder / "tokens.bin").stat().st_mtime_ns
    assert prepare(source, "train", tokenizer, tmp_path / "store").fingerprint == first.fingerprint
    assert (folder / "tokens.bin").stat().st_mtime_ns == written
    elsewhere = prepare(source, "train", tokenizer, tmp_path / "other")
    assert elsewhere.fingerprint == first.fingerprint
    cased = wordpiece(WORDS, lowercase=False, chinese_words=False, where="test")
    prepare(source, "train", cased, tmp_path / "store")
    changed = prepare(jsonl(tmp_path, [*TEXTS, "e"]), "train", tokenizer, tmp_path / "store")
    assert changed.fingerprint != first.fingerprint
    assert len(list((tmp_path / "store").iterdir())) == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens.bin", "word_starts.bin", "offsets.bin", "sentences.bin", "store.json"])
@pytest.mark.parametrize("damage", [truncate, flip, os.unlink])
def test_damage_is_named_and_mended(tmp_path, tokenizer, caplog, name, damage):
    source = jsonl(tmp_path)
    whole = prepare(source, "train", tokenizer, tmp_path / "store")
    (folder,) = (tmp_path / "store").iterdir()
    if name == "store.json" and damage is not os.unlink:
        # One bit of the summary may lie in white space: damage a value instead.
        text = (folder / name).read_text()
        (folder / name).write_text(text[:-4] if damage is truncate else text.replace('"bytes": ', '"bytes": 9', 1))
    else:
        damage(folder / name)
    with pytest.raises(UserError, match="tokens.bin" if damage is flip and name == "store.json" else name):
        open_store(folder)
    with caplog.at_level(logging.WARNING):
        again = prepare(source, "train", tokenizer, tmp_path / "store")
    assert "preparing it again" in caplog.text
    assert again.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 99}, "a store of format 99; this version reads 2"),
        ({"num_tokens": 1 << 60}, "do not hold"),
        ({"num_documents": 1 << 60}, "do not hold"),
        ({"num_sentences": 1 << 60}, "do not hold"),
        ({"files": {}}, "not a store's summary"),
        ({"files": None}, "not a store's summary"),
        ({"num_tokens": None}, "not a store's summary"),
    ],
)
def test_a_lying_summary_is_refused_before_anything_is_allocated(tmp_path, tokenizer, change, message):
    prepare(jsonl(tmp_path), "train", tokenizer, tmp_path / "store")
    (folder,) = (tmp_path / "store").iterdir()
    summary = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**summary, **change}))
    with pytest.raises(UserError, match=message):
        open_store(folder)


def test_a_failed_preparation_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text":\n')
    source = data.registry.build({"name": "jsonl", "train": (str(tmp_path / "a.jsonl"),)})
    with pytest.raises(UserError, match=r"a\.jsonl:2: malformed JSON"):
        prepare(source, "train", tokenizer, tmp_path / "store")
    assert not list((tmp_path / "store").iterdir())
    with pytest.raises(UserError, match="no tokens in 1 documents"):
        prepare(jsonl(tmp_path, [""]), "train", tokenizer, tmp_path / "store")
    assert not list((tmp_path / "store").iterdir())


KILLED = """
import sys, time
from zoo import data
from zoo.data import store
from zoo.data.huggingface_tokenizer import wordpiece
store.BATCH_CHARACTERS = 1
whole = store._documents
def slowly(records, tokenizer):
    for k, document in enumerate(whole(records, tokenizer)):
        yield document
        if k == 2:
            print("half way", flush=True)
            time.sleep(60)
store._documents = slowly
source = data.registry.build({"name": "jsonl", "train": (sys.argv[1],)})
store.prepare(source, "train", wordpiece(sys.argv[3].split(), lowercase=True, chinese_words=False, where=""), sys.argv[2])
"""


def test_killed_half_way_it_starts_anew(tmp_path, tokenizer):
    source = jsonl(tmp_path)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.jsonl"), str(tmp_path / "store"), " ".join(WORDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
    (left,) = (tmp_path / "store").iterdir()
    assert left.name.startswith(".")
    with pytest.raises(UserError, match="no whole store"):
        open_store(left)
    store = prepare(source, "train", tokenizer, tmp_path / "store")
    assert store.num_tokens == 44
    assert [p.name[0] for p in (tmp_path / "store").iterdir()] == ["t"]  # what the killed one left is gone


def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 1000)

    def peak(documents):
        folder = tmp_path / str(documents)
        folder.mkdir()
        source = jsonl(folder, ["ab cd e " * 10] * documents)
        tracemalloc.start()
        prepare(source, "train", tokenizer, folder / "store")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small = peak(100)
    assert peak(3000) < small + 700_000  # a chunk of the file and the mapped offsets, not 30 times as much
