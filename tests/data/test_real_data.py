"""The sources, vocabularies and Chinese words on real data sets; skipped where they are not at hand."""

from pathlib import Path

import numpy as np
import pytest

from zoo import data
from zoo.data.tokenizers import load_tokenizer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data sets in ../shared/data")


def records(name, file, **options):
    source = data.registry.build({"name": name, "test": (str(DATA / file),), **options})
    return list(source.records("test"))


@pytest.fixture(scope="module")
def chinese():
    return load_tokenizer(DATA / "vocab" / "zh_21128.txt.xz", chinese_words=True)


def test_peoples_daily():
    found = records("conll", "peoples_daily_ner/example.dev.xz")
    assert len(found) == 2318
    assert sum(len(r.fields["words"]) for r in found) == 109_870
    tags = [tag for r in found for tag in r.fields["tags"]]
    assert {kind: tags.count(f"B-{kind}") for kind in ("PER", "LOC", "ORG")} == {"PER": 884, "LOC": 1951, "ORG": 984}


def test_lcqmc_and_chnsenticorp_and_afqmc():
    pairs = records("tsv", "lcqmc/dev.txt.xz", text=0, text_pair=1, label=2)
    assert len(pairs) == 8802 and {r.fields["label"] for r in pairs} == {"0", "1"}
    reviews = records("tsv", "chnsenticorp/test.tsv.xz", header=True, text="text_a", label="label")
    assert len(reviews) == 1200 and reviews[0].line == 2
    assert len(records("tsv", "afqmc/test.txt.xz", text=0, text_pair=1)) == 3861


def test_glue_with_quotes_and_headers():
    cola = records("tsv", "glue/CoLA/dev.tsv.xz", text=3, label=1)
    assert len(cola) == 1043
    sst2 = records("tsv", "glue/SST-2/dev.tsv.xz", header=True, text="sentence", label="label")
    assert len(sst2) == 872
    xnli = records("tsv", "xnli/en.test.tsv.xz", header=True, text="sentence1", text_pair="sentence2", label="label")
    assert len(xnli) == 5010 and len({r.fields["label"] for r in xnli}) == 3


def test_documents():
    assert len(records("text", "zh_text/cluecorpussmall_sample.bert-format.txt.xz", documents="blank_line")) == 2500
    assert len(records("jsonl", "lra_like/movie_reviews.jsonl.xz", label="label")) == 2000


@pytest.mark.parametrize(
    "name, size, lowercase",
    [("zh_21128", 21_128, True), ("en_uncased_30522", 30_522, True), ("en_cased_28996", 28_996, False)],
)
def test_vocabularies_have_every_line_at_its_number(name, size, lowercase):
    tokenizer = load_tokenizer(DATA / "vocab" / f"{name}.txt.xz", lowercase=lowercase)
    assert tokenizer.vocabulary.size == size
    assert (tokenizer.vocabulary.unk, tokenizer.vocabulary.mask) == (100, 103)


def test_chinese_words_group_characters(chinese):
    texts = [r.fields["text"] for r in records("tsv", "chnsenticorp/dev.tsv.xz", header=True, text="text_a")][:100]
    plain = load_tokenizer(DATA / "vocab" / "zh_21128.txt.xz")
    longer = 0
    for ours, single in zip(chinese.encode_batch(texts), plain.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ours.ids, single.ids)
        assert not (ours.word_starts & ~single.word_starts).any()  # words only join pieces, they never cut one
        longer += (single.word_starts & ~ours.word_starts).sum() / len(ours.ids)
    assert 0.25 < longer / len(texts) < 0.5  # a Chinese word has about 1.6 characters


def test_tagged_characters_keep_their_tags(chinese):
    for record in records("conll", "peoples_daily_ner/example.dev.xz")[:300]:
        words = record.fields["words"]
        assert chinese.encode_words(words).word_starts.sum() == len(words)
