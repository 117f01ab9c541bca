"""Token tagging: first pieces carry the tags, truncated words count as O, entity F1."""

import chex
import jax
import numpy as np
import pytest

from tests.tasks.standins import CLS, PAD, SEP, LetterTokenizer, ListSource, TinyEncoder, stack
from zoo.errors import UserError
from zoo.tasks.token_tagging import TaggedWords, TokenTagging

TRAIN = [
    {"words": ("Ada", "Lovelace", "wrote", "to", "Babbage"), "tags": ("B-PER", "I-PER", "O", "O", "B-PER")},
    {"words": ("London", "!"), "tags": ("B-LOC", "O")},
]


@pytest.fixture
def source():
    return ListSource(train=TRAIN)


def test_labels_are_those_of_the_train_split_sorted(source):
    task = TokenTagging(max_length=16).resolve(source)
    assert task.labels == ("B-LOC", "B-PER", "I-PER", "O")
    assert task.resolve(ListSource(train=[])) == task


def test_first_pieces_carry_the_tags_and_other_pieces_none(source):
    task = TokenTagging(max_length=20).resolve(source)
    example = task.examples(source, "train", LetterTokenizer(), None)[0]
    # Pieces per word: Ad|a, Lo|ve|la|ce, wr|ot|e, to, Ba|bb|ag|e; index 0 of the row is [CLS].
    np.testing.assert_array_equal(example.first, [0, 2, 6, 9, 10])
    row = task.features(example, np.random.default_rng(0), LetterTokenizer.vocabulary)
    expected = np.zeros(20, np.float32)
    expected[[1, 3, 7, 10, 11]] = 1
    np.testing.assert_array_equal(row["label_weights"], expected)
    np.testing.assert_array_equal(row["labels"][[1, 3, 7, 10, 11]], [1, 2, 3, 3, 1])
    assert row["input_ids"][0] == CLS and row["input_ids"][15] == SEP and row["input_ids"][16] == PAD
    np.testing.assert_array_equal(row["segment_ids"], [1] * 16 + [0] * 4)
    assert {v.shape for v in row.values()} == {(20,)}


def test_words_lost_by_truncation_count_as_o_and_are_reported(source):
    task = TokenTagging(max_length=10).resolve(source)  # room for 8 pieces: the third word keeps only its first two
    examples = task.examples(source, "train", LetterTokenizer(), None)
    assert len(examples[0].first) == 3 and len(examples[0].tags) == 5
    row = task.features(examples[0], np.random.default_rng(0), LetterTokenizer.vocabulary)
    assert row["input_ids"][-1] == SEP and row["label_weights"].sum() == 3
    perfect = np.stack([task.features(e, None, LetterTokenizer.vocabulary)["labels"] for e in examples])
    scores = task.score({"labels": perfect}, examples)
    assert scores["truncated_words"] == 2
    assert scores["precision"] == 1.0 and scores["recall"] == pytest.approx(2 / 3)  # Babbage is lost
    whole = TokenTagging(max_length=20, labels=task.labels)
    perfect = np.stack(
        [whole.features(e, None, LetterTokenizer.vocabulary)["labels"] for e in _examples(whole, source)]
    )
    assert whole.score({"labels": perfect}, _examples(whole, source))["f1"] == 1.0


def _examples(task, source):
    return task.examples(source, "train", LetterTokenizer(), None)


def test_loss_is_the_sum_over_labelled_words_and_rows_of_weight_zero_add_nothing(source):
    task = TokenTagging(max_length=20).resolve(source)
    rows = [task.features(e, None, LetterTokenizer.vocabulary) for e in _examples(task, source)]
    module = task.module(TinyEncoder())
    batch = stack(rows)
    variables = jax.jit(module.init)(jax.random.key(0), batch)
    assert set(variables["params"]) == {"model", "heads"}
    assert variables["params"]["heads"]["token_tagging"]["output"]["kernel"].shape == (8, 4)
    output = jax.jit(module.apply)(variables, batch)
    total, weight = output.losses["token_tagging"]
    assert weight == 7

    encoded = TinyEncoder().apply(
        {"params": variables["params"]["model"]}, batch["input_ids"], segment_ids=batch["segment_ids"]
    )
    head = variables["params"]["heads"]["token_tagging"]["output"]
    log_p = jax.nn.log_softmax(encoded.hidden @ head["kernel"] + head["bias"])
    expected = -sum(log_p[b, t, batch["labels"][b, t]] for b, t in np.argwhere(batch["label_weights"] > 0))
    chex.assert_trees_all_close(total, expected, rtol=1e-5)
    chex.assert_trees_all_equal(output.predictions["labels"], log_p.argmax(-1).astype(np.int32))

    padded = {name: np.concatenate([value, value[:1]]) for name, value in batch.items()}
    padded["example_weight"][-1] = 0
    again = jax.jit(module.apply)(variables, padded)
    chex.assert_trees_all_close(again.losses, output.losses, rtol=1e-6)


def test_dropout_acts_on_the_head_in_training_only(source):
    task = TokenTagging(max_length=20).resolve(source)
    batch = stack([task.features(e, None, LetterTokenizer.vocabulary) for e in _examples(task, source)])
    module = task.module(TinyEncoder(dropout=0.5))
    variables = jax.jit(module.init)(jax.random.key(0), batch)
    losses = [
        float(
            module.apply(variables, batch, train=train, rngs={"dropout": jax.random.key(k)}).losses["token_tagging"][0]
        )
        for train, k in [(False, 0), (False, 1), (True, 0), (True, 1)]
    ]
    assert losses[0] == losses[1] and losses[2] != losses[3] != losses[0]


def test_a_tag_outside_the_set_names_file_line_word_and_near_tags(source):
    task = TokenTagging(max_length=20, labels=("O", "B-PER", "I-PER", "B-LOC"))
    bad = ListSource(dev=[TRAIN[1], {"words": ("In", "Paris"), "tags": ("O", "B-LOK")}])
    with pytest.raises(
        UserError, match=r"dev\.txt:21: word 2 of the sentence \('Paris'\) has the tag 'B-LOK'.*'B-LOC'"
    ):
        task.examples(bad, "dev", LetterTokenizer(), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"words": ("a",), "tags": ("PER",)}, r"train\.txt:10: word 1 .*none of O, B-type, I-type"),
        ({"words": ("a",), "tags": ("O",)}, "two are needed"),
        ({"text": "a"}, r"train\.txt:10: .*needs a field 'tags'; this source gives text"),
    ],
)
def test_a_train_split_that_gives_no_tags_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        TokenTagging().resolve(ListSource(train=[fields]))


def test_words_and_tags_of_different_number_are_refused():
    task = TokenTagging(labels=("O", "B-X"))
    with pytest.raises(UserError, match=r"dev\.txt:10: 2 words but 1 tags"):
        task.examples(ListSource(dev=[{"words": ("a", "b"), "tags": ("O",)}]), "dev", LetterTokenizer(), None)


def test_stray_inside_tags_are_accepted_as_data():
    stray = ListSource(train=[{"words": ("a", "b"), "tags": ("O", "I-X")}])
    task = TokenTagging(max_length=8).resolve(stray)
    examples = _examples(task, stray)
    perfect = np.stack([task.features(e, None, LetterTokenizer.vocabulary)["labels"] for e in examples])
    scores = task.score({"labels": perfect}, examples)
    assert scores["f1"] == 0.0 and scores["f1_lenient"] == 1.0 and scores["token_f1"] == 1.0


def test_a_score_of_part_of_a_set_is_refused():
    task = TokenTagging(labels=("O", "B-X"))
    example = TaggedWords(np.asarray([5], np.int32), np.asarray([0], np.int32), np.asarray([0], np.int32))
    with pytest.raises(ValueError, match="1 rows for 2 examples"):
        task.score({"labels": np.zeros((1, 128), np.int32)}, [example, example])
    with pytest.raises(UserError, match="no examples"):
        task.score({"labels": np.zeros((0, 128), np.int32)}, [])


def test_a_module_without_labels_is_refused():
    with pytest.raises(UserError, match="no labels"):
        TokenTagging().module(TinyEncoder())
