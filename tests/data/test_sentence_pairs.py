"""Pairs of segments: the walk through each document, what a row holds, and that it is a function of seed, epoch and index."""

import json
from pathlib import Path

import chex
import numpy as np
import pytest

from zoo import data
from zoo.data.huggingface_tokenizer import wordpiece
from zoo.data.pipeline import Pipeline
from zoo.data.sentence_pairs import SentencePairs, pair_plan
from zoo.data.store import prepare
from zoo.data.tokenizers import load_tokenizer
from zoo.data.truncation import longest_first
from zoo.data.wordpiece_training import SPECIAL
from zoo.errors import UserError

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ROW = 32
BOTH = pytest.mark.parametrize("objective", ["nsp", "sop"])


def tokenizer_of(words):
    return wordpiece([*SPECIAL, "##x", "##y", *words], lowercase=True, chinese_words=False, where="test")


def store_of(folder, documents):
    """A store of documents, each a list of the lengths of its sentences, in which every word is another.

    The second word of a sentence has three pieces.
    """
    folder.mkdir(exist_ok=True)
    words, texts = 0, []
    for document in documents:
        sentences = []
        for length in document:
            sentences.append(" ".join(f"w{words + k}" + "xy" * (k == 1) for k in range(length)))
            words += length
        texts.append("\n".join(sentences))
    tokenizer = tokenizer_of([f"w{k}" for k in range(words)])
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = data.registry.build({"name": "jsonl", "train": (str(folder / "a.jsonl"),)})
    return prepare(source, "train", tokenizer, folder / "store"), tokenizer.vocabulary


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """90 documents of 1 to 15 sentences, the first, the last and another without any; one sentence is very long."""
    rng = np.random.default_rng(0)
    documents = [[], *(rng.integers(1, 12, rng.integers(1, 16)).tolist() for _ in range(88)), [], [3, 200, 4], []]
    return store_of(tmp_path_factory.mktemp("pairs"), documents)


def pairs_of(corpus, **options):
    store, vocabulary = corpus
    return SentencePairs(store, vocabulary, **{"row_length": ROW, "objective": "nsp", "seed": 3, **options})


def segments_of(row, vocabulary):
    """The ids of each segment of a row, which is checked on the way."""
    ids, real = row["input_ids"], row["segment_ids"] > 0
    length = real.sum()
    np.testing.assert_array_equal(real, np.arange(ROW) < length)
    assert (ids[~real] == vocabulary.pad).all() and not row["word_starts"][~real].any()
    ends = np.flatnonzero(ids == vocabulary.sep)
    assert ids[0] == vocabulary.cls and ends[-1] == length - 1 and (ids == vocabulary.cls).sum() == 1
    assert len(ends) == 1 + (row["sentence_weight"] > 0)
    np.testing.assert_array_equal(row["token_type_ids"], real & (np.arange(ROW) > ends[0]))
    begins = [1, ends[0] + 1]
    assert row["word_starts"][[0, *ends, *begins[: len(ends)]]].all()
    chex.assert_type([row["input_ids"], row["segment_ids"], row["token_type_ids"], row["sentence_label"]], np.int32)
    chex.assert_type(row["sentence_weight"], np.float32)
    return [ids[begin:end] for begin, end in zip(begins, ends, strict=False)]


def places(store, vocabulary):
    """[ids], the document of each word's first piece."""
    document = np.full(vocabulary.size, -1)
    for k in range(len(store)):
        document[store.document(k).ids] = k
    document[[len(SPECIAL), len(SPECIAL) + 1]] = -1
    return document


@BOTH
@pytest.mark.parametrize("short_rate", [0.0, 0.1, 1.0])
def test_walk(corpus, objective, short_rate):
    """Each chunk begins where the one before let go, has no sentence more than its target asks, and all are visited."""
    store, _ = corpus
    offsets, documents = store.sentence_offsets, np.unique(store.first_sentences())
    plan = pair_plan(offsets, documents, ROW - 3, objective=objective, short_rate=short_rate, seed=0, epoch=0)
    begins = set(documents.tolist())
    expected = 0
    for start, first, second, target, changed in zip(
        *(column.tolist() for column in (plan.start, plan.first, plan.second, plan.target, plan.changed)), strict=True
    ):
        assert start == expected
        middle, stop = start + first, start + first + second
        end = min(d for d in begins if d > start)
        assert first >= 1 and stop <= end
        tokens = offsets[stop] - offsets[start]
        assert tokens >= target or stop == end
        assert stop - start == 1 or offsets[stop - 1] - offsets[start] < target
        assert 2 <= target <= ROW - 3
        if second == 0:
            assert first == 1 and changed == (objective == "nsp")
        expected = middle if changed and objective == "nsp" else stop
    assert expected == documents[-1]
    shorter = (plan.target < ROW - 3).mean()
    assert abs(shorter - short_rate * (1 - 1 / (ROW - 4))) < 0.06


def test_draws_are_fair(tmp_path):
    """Many documents of 30 sentences of one length: every split behind a sentence, every target, half of the labels."""
    offsets = np.arange(0, 4000 * 30 * 5 + 1, 5)
    documents = np.arange(0, 4000 * 30 + 1, 30)
    plan = pair_plan(offsets, documents, 29, objective="nsp", short_rate=0.5, seed=0, epoch=0)
    whole = (plan.target == 29) & (plan.first + plan.second == 6)
    splits = np.bincount(plan.first[whole], minlength=6)[1:] / whole.sum()
    np.testing.assert_allclose(splits, 0.2, atol=0.02)
    targets = np.bincount(plan.target[plan.target < 29], minlength=29)[2:]
    np.testing.assert_allclose(targets / targets.mean(), 1, atol=0.15)
    assert abs(plan.changed[plan.second > 0].mean() - 0.5) < 0.01


def test_plan_golden():
    offsets = np.array([0, 3, 7, 8, 14, 16, 20, 29, 30])
    plan = pair_plan(offsets, np.array([0, 5, 8]), 9, objective="nsp", short_rate=0.1, seed=0, epoch=0)
    # Two documents of 5 and 3 sentences. Sentences 0 to 3 are the first chunk, split in the middle; its second half was
    # replaced, so the walk goes on at 2; of the second document 5 and 6 are a chunk, then 6 alone and 7 alone.
    assert plan.start.tolist() == [0, 2, 5, 6, 7]
    assert plan.first.tolist() == [2, 1, 1, 1, 1]
    assert plan.second.tolist() == [2, 2, 1, 0, 0]
    assert plan.target.tolist() == [9, 9, 9, 6, 9]
    assert plan.changed.tolist() == [True, False, True, True, True]


def test_rows_of_next_sentences(corpus):
    store, vocabulary = corpus
    document = places(store, vocabulary)
    labels, others, cut = [], [], 0
    pairs = pairs_of(corpus)
    for epoch in range(4):
        rows = pairs.at_epoch(epoch)
        for index in range(len(rows)):
            row = rows[index]
            a, b = segments_of(row, vocabulary)
            of_a, of_b = (set(document[x][document[x] >= 0]) for x in (a, b))
            assert len(of_a) <= 1 and len(of_b) <= 1
            for segment in (a, b):
                words = segment[segment > len(SPECIAL) + 1]
                assert (np.diff(words) == 1).all()  # in order, with nothing left out in between
            if of_a and of_b:
                assert (of_a != of_b) == row["sentence_label"]
                if not row["sentence_label"]:
                    assert a[a > len(SPECIAL) + 1][-1] < b[b > len(SPECIAL) + 1][0]
                else:
                    others += of_b
            labels.append(row["sentence_label"])
            cut += len(a) + len(b) == ROW - 3
    assert 0.45 <= np.mean(labels) <= 0.60
    assert cut > 0.5 * len(labels)  # most rows are full
    assert len(set(others)) > 80  # of 89 documents


def test_rows_of_sentence_order(corpus):
    store, vocabulary = corpus
    document = places(store, vocabulary)
    pairs = pairs_of(corpus, objective="sop")
    labels, single = [], 0
    for index in range(len(pairs)):
        row = pairs[index]
        segments = segments_of(row, vocabulary)
        if len(segments) == 1:
            assert row["sentence_label"] == 0
            single += 1
            continue
        a, b = (x[x > len(SPECIAL) + 1] for x in segments)
        if len(a) and len(b):
            assert document[a[0]] == document[b[0]]
            assert (a[-1] > b[0]) == row["sentence_label"]
        labels.append(row["sentence_label"])
    assert 0.4 < np.mean(labels) < 0.6
    assert single == (pairs.at_epoch(0).plan.second == 0).sum() > 0


def test_pairs_are_cut_from_the_longer_at_either_end(tmp_path):
    """Sentences of 22 and 30 pieces, of which a row holds 29."""
    corpus = store_of(tmp_path, [[20, 28]])
    pairs = pairs_of(corpus, objective="sop", short_rate=0.0)
    assert len(pairs) == 1
    begins = set()
    for epoch in range(60):
        row = pairs.at_epoch(epoch)[0]
        segments = segments_of(row, corpus[1])
        assert tuple(map(len, segments)) == longest_first(*((30, 22) if row["sentence_label"] else (22, 30)), 29)
        # Ids are dense: the first one says where the cut was.
        begins.add((int(row["sentence_label"]), *(int(s[0]) for s in segments)))
    assert {label for label, *_ in begins} == {0, 1}
    assert len({first for label, first, _ in begins if label == 0}) > 4
    assert len({second for label, _, second in begins if label == 0}) > 7


def test_every_part_of_a_long_sentence_is_seen(corpus):
    store, _ = corpus
    (long,) = np.flatnonzero(np.diff(store.sentence_offsets) > 100)
    wanted = set(store.pieces(*store.sentence_offsets[long : long + 2]).ids.tolist())
    seen = set()
    pairs = pairs_of(corpus)
    for epoch in range(150):
        rows = pairs.at_epoch(epoch)
        plan = rows.plan
        for index in np.flatnonzero((plan.start <= long) & (plan.start + plan.first + plan.second > long)):
            seen |= set(rows[int(index)]["input_ids"].tolist())
    assert len(wanted & seen) > 0.95 * len(wanted)


@BOTH
def test_as_many_rows_in_every_epoch(corpus, objective):
    pairs = pairs_of(corpus, objective=objective)
    surplus = []
    for epoch in range(8):
        rows = pairs.at_epoch(epoch)
        assert len(rows) == len(pairs) == len(rows.plan)
        walk = pair_plan(
            corpus[0].sentence_offsets,
            np.unique(corpus[0].first_sentences()),
            ROW - 3,
            objective=objective,
            short_rate=0.1,
            seed=3,
            epoch=epoch,
        )
        surplus.append(len(walk) - len(rows))
        # A longer walk loses as many as it has too many, a shorter one has each at least once.
        assert len(set(walk.start) - set(rows.plan.start)) == max(surplus[-1], 0)
        assert set(rows.plan.start) <= set(walk.start)
        assert (np.diff(rows.plan.start) >= 0).all()
    assert surplus[0] == 0 and min(surplus) < 0 < max(surplus)
    assert max(map(abs, surplus)) < 0.1 * len(pairs)


def ids_of(rows):
    return np.stack([rows[index]["input_ids"] for index in range(len(rows))])


@BOTH
def test_rows_are_a_function_of_seed_epoch_and_index(corpus, objective):
    pairs, again = pairs_of(corpus, objective=objective), pairs_of(corpus, objective=objective)
    first = ids_of(pairs.at_epoch(0))
    later = ids_of(pairs.at_epoch(5))
    for epoch in (9, 1):  # other plans are made in between
        again.at_epoch(epoch)
    np.testing.assert_array_equal(ids_of(again.at_epoch(5)), later)
    np.testing.assert_array_equal(ids_of(again.at_epoch(0)), first)
    chex.assert_trees_all_equal(again[7], pairs.at_epoch(0)[7])
    other = ids_of(pairs_of(corpus, objective=objective, seed=4))
    for different in (later, other):
        both = min(len(first), len(different))
        assert (first[:both] != different[:both]).any(1).mean() > 0.8  # a short document may be the same row again
    with pytest.raises(IndexError, match="row -1"):
        pairs[-1]


def test_hosts_hold_parts_of_the_same_batch(corpus):
    def features(row, rng):
        return row

    whole = Pipeline(pairs_of(corpus), features, seed=1, batch_size=8)
    far = 10 * len(pairs_of(corpus))
    for step in (0, far):
        parts = [
            Pipeline(pairs_of(corpus), features, seed=1, batch_size=8, process_index=p, process_count=2).batch(step)
            for p in (0, 1)
        ]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        chex.assert_trees_all_equal(joined, whole.batch(step))


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[3, 4, 5]], {}, "this corpus is one document"),
        ([[3, 4, 5], []], {}, "this corpus is one document"),
        ([[3], [40], [5]], {}, "no two sentences of a document stand together in a row of 32 tokens"),
        ([[3], [40]], {"objective": "sop"}, "no two sentences"),
        ([[3, 4], [5]], {"row_length": 4}, "rows of 4 tokens have no room for a pair; 5 is the least"),
        ([[3, 4], [5]], {"objective": "next"}, "objective is 'next'; expected one of nsp, sop"),
    ],
)
def test_refusals(tmp_path, documents, options, message):
    corpus = store_of(tmp_path, documents)
    with pytest.raises(UserError, match=message):
        pairs_of(corpus, **options)


def test_one_document_has_an_order(tmp_path):
    corpus = store_of(tmp_path, [[], [3, 4, 5]])
    pairs = pairs_of(corpus, objective="sop", short_rate=0.0)
    assert len(pairs) == 1
    assert {int(pairs.at_epoch(epoch)[0]["sentence_label"]) for epoch in range(10)} == {0, 1}


def test_the_smallest_rows(corpus):
    _, vocabulary = corpus
    pairs = pairs_of(corpus, row_length=5)
    assert all((pairs[k]["input_ids"] == vocabulary.sep).sum() == 2 for k in range(len(pairs)))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the data sets in ../shared/data")
@pytest.mark.parametrize(
    ("files", "documents", "sentences"),
    [(("news_sample", "wiki_sample"), 69, 8_527), (("cluecorpussmall_sample.bert-format",), 2500, 18_141)],
)
def test_chinese_text(tmp_path, files, documents, sentences):
    tokenizer = load_tokenizer(REAL / "vocab" / "zh_21128.txt.xz")
    train = tuple(str(REAL / "zh_text" / f"{name}.txt.xz") for name in files)
    source = data.registry.build({"name": "text", "train": train, "documents": "blank_line"})
    store = prepare(source, "train", tokenizer, tmp_path)
    assert len(store) == documents and len(store.sentence_offsets) == sentences + 1
    pairs = SentencePairs(store, tokenizer.vocabulary, row_length=128, objective="nsp")
    rows = [pairs[k] for k in range(len(pairs))]
    labels = np.asarray([row["sentence_label"] for row in rows])
    plan = pairs.at_epoch(0).plan
    assert 0.45 <= labels[plan.second > 0].mean() <= 0.55
    alone = (plan.second == 0).mean()
    assert abs(labels.mean() - (alone + (1 - alone) / 2)) < 0.02
    # A third of the documents of the last file are one sentence, which no other can follow.
    assert 0.45 <= labels.mean() <= (0.60 if documents < 100 else 0.65)
    assert np.mean([row["segment_ids"].mean() for row in rows]) > 0.8
