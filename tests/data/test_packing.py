"""Packing: every token once, nothing out of order, the same number of rows in every epoch."""

import itertools

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import data
from zoo.data.huggingface_tokenizer import wordpiece
from zoo.data.packing import PackedRows, pack_row, packing_plan
from zoo.data.store import prepare
from zoo.data.wordpiece_training import SPECIAL
from zoo.errors import UserError

ROW = 16
EVERY = list(itertools.product(("none", "row", "document"), (True, False)))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A store of 40 documents whose tokens are all different, but for the two pieces in the middle of words."""
    folder = tmp_path_factory.mktemp("packing")
    rng = np.random.default_rng(0)
    words = iter(f"w{k}" for k in range(10_000))
    texts = [" ".join(itertools.islice(words, int(n))) for n in rng.integers(0, 40, 40)]
    texts = [text.replace(" ", "xy ", 1) for text in texts]
    used = sorted({word.removesuffix("xy") for text in texts for word in text.split()})
    tokenizer = wordpiece([*SPECIAL, "##x", "##y", *used], lowercase=True, chinese_words=False, where="test")
    (folder / "a").write_text("\n\n".join(texts) + "\n")
    source = data.registry.build({"name": "text", "train": (str(folder / "a"),)})
    return prepare(source, "train", tokenizer, folder / "store"), tokenizer.vocabulary


def test_plan_golden():
    plan = packing_plan(np.array([3, 0, 5, 2]), 4, seed=0)
    order = [plan.document[0], *plan.document[1:][np.diff(plan.document) != 0]]
    assert sorted(order) == [0, 2, 3]
    # Laid end to end the 10 tokens fill two rows of 4 and half of a third.
    assert [sum(stop - start for _, start, stop in plan.spans(row)) for row in range(len(plan))] == [4, 4, 2]
    whole = packing_plan(np.array([3, 3, 9, 1, 1, 2]), 4, seed=0, split_documents=False)
    # 9 is cut into 4, 4, 1; best fit puts the single tokens beside the threes and leaves the 2 with the third of them.
    sizes = sorted(sorted(stop - start for _, start, stop in whole.spans(row)) for row in range(len(whole)))
    assert sizes == [[1, 2], [1, 3], [1, 3], [4], [4]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any),
    row_length=st.integers(3, 20),
    how=st.sampled_from(EVERY),
    seed=st.integers(0, 3),
)
def test_every_token_once_and_as_many_rows_in_every_epoch(lengths, row_length, how, seed):
    specials, split = how
    lengths = np.asarray(lengths)
    virtual = np.where(lengths > 0, lengths + 2 * (specials == "document"), 0)
    capacity = row_length - 2 * (specials == "row")
    rows = set()
    for epoch in range(3):
        plan = packing_plan(lengths, row_length, seed=seed, epoch=epoch, split_documents=split, specials=specials)
        rows.add(len(plan))
        seen = [np.zeros(n, int) for n in virtual]
        for row in range(len(plan)):
            spans = plan.spans(row)
            assert 0 < sum(stop - start for _, start, stop in spans) <= capacity
            for document, start, stop in spans:
                assert 0 <= start < stop
                seen[document][start:stop] += 1
                assert split or virtual[document] > capacity or (start, stop) == (0, virtual[document])
        assert all((n == 1).all() for n in seen)
    assert len(rows) == 1
    total = virtual.sum()
    assert not split or rows == {-(-total // capacity)}


def test_plans_are_pure_and_shuffled():
    lengths = np.random.default_rng(0).integers(1, 30, 200)

    def spans(**options):
        plan = packing_plan(lengths, 16, **{"seed": 1, "epoch": 2, **options})
        return [plan.spans(row) for row in range(len(plan))]

    assert spans() == spans()
    assert len({str(s) for s in (spans(), spans(epoch=3), spans(seed=2), spans(seed=2, epoch=1))}) == 4
    neighbours = set(spans()[5]) & set(spans(epoch=3)[5])
    assert not neighbours


def test_little_padding():
    lengths = np.random.default_rng(0).integers(1, 240, 2000)
    for specials, split in EVERY:
        plan = packing_plan(lengths, 128, seed=0, specials=specials, split_documents=split)
        text = lengths.sum() + {"none": 0, "row": 2 * len(plan), "document": 2 * len(lengths)}[specials]
        assert 1 - text / (128 * len(plan)) < (0.001 if split else 0.005)


@pytest.mark.parametrize("specials, split", EVERY)
def test_rows(packed, specials, split):
    store, vocabulary = packed
    plan = packing_plan(store.lengths, ROW, seed=0, specials=specials, split_documents=split)
    found, cls, sep = [], 0, 0
    for row in range(len(plan)):
        arrays = pack_row(store, plan, row, vocabulary)
        chex.assert_shape(list(arrays.values()), (ROW,))
        chex.assert_type([arrays[k] for k in ("input_ids", "segment_ids", "positions")], np.int32)
        assert arrays["word_starts"].dtype == bool
        ids, segments = arrays["input_ids"], arrays["segment_ids"]
        real = segments > 0
        np.testing.assert_array_equal(ids == vocabulary.pad, ~real)
        assert not arrays["word_starts"][~real].any() and not arrays["positions"][~real].any()
        np.testing.assert_array_equal(real, np.arange(ROW) < real.sum())
        assert set(segments[real]) == set(range(1, len(plan.spans(row)) + 1))
        for segment, (document, start, _) in enumerate(plan.spans(row), 1):
            here = segments == segment
            np.testing.assert_array_equal(arrays["positions"][here], np.arange(here.sum()))
            inside = ids[here][~np.isin(ids[here], vocabulary.special)]
            whole = store.document(document)
            first = start - (start > 0) * (specials == "document")
            np.testing.assert_array_equal(inside, whole.ids[first : first + len(inside)])
            starts = arrays["word_starts"][here]
            assert starts[0]
            kept = starts[~np.isin(ids[here], vocabulary.special)]
            np.testing.assert_array_equal(kept[1:], whole.word_starts[first + 1 : first + len(inside)])
            found += [(document, k) for k in range(first, first + len(inside))]
        cls += int((ids == vocabulary.cls).sum())
        sep += int((ids == vocabulary.sep).sum())
        if specials == "row":
            assert ids[0] == vocabulary.cls and ids[real][-1] == vocabulary.sep
    assert len(found) == len(set(found)) == store.num_tokens
    documents = int((store.lengths > 0).sum())
    assert cls == sep == {"none": 0, "row": len(plan), "document": documents}[specials]


def test_packed_rows_repack_every_epoch(packed):
    store, vocabulary = packed
    rows = PackedRows(store, vocabulary, row_length=ROW, seed=3)
    for row in (0, len(rows) - 1):
        chex.assert_trees_all_equal(rows[row], rows.at_epoch(0)[row])
        chex.assert_trees_all_equal(
            rows.at_epoch(5)[row],
            pack_row(store, packing_plan(store.lengths, ROW, seed=3, epoch=5), row, vocabulary),
        )
    epochs = [np.stack([rows.at_epoch(e)[r]["input_ids"] for r in range(len(rows))]) for e in (0, 1, 7, 0)]
    np.testing.assert_array_equal(epochs[0], epochs[3])
    assert (epochs[0] != epochs[1]).mean() > 0.5 and (epochs[1] != epochs[2]).mean() > 0.5
    for other in epochs[1:]:
        np.testing.assert_array_equal(np.sort(epochs[0], None), np.sort(other, None))
    assert len(rows.at_epoch(1)) == len(rows) == len(list(rows))


def test_what_cannot_be_packed():
    for options, message in [
        ({"row_length": 2, "specials": "row"}, "no room"),
        ({"row_length": 4, "specials": "some"}, "expected one of none, row, document"),
    ]:
        with pytest.raises(UserError, match=message):
            packing_plan(np.array([3]), seed=0, **options)
    with pytest.raises(UserError, match="no tokens"):
        packing_plan(np.array([0, 0]), 4, seed=0)
