"""Classification of single sentences and pairs: truncation, the head, the official metrics."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks.standins import CLS, PAD, SEP, LetterTokenizer, ListSource, TinyEncoder, stack
from zoo.errors import UserError
from zoo.tasks import registry
from zoo.tasks.classification import Classification

SINGLE = [{"text": "good good film", "label": "pos"}, {"text": "bad", "label": "neg"}]
PAIRS = [
    {"text": "how old are you", "text_pair": "your age", "label": "1"},
    {"text": "why", "text_pair": "what is the weather like today", "label": "0"},
]


def examples_of(task, fields):
    return task.examples(ListSource(train=fields), "train", LetterTokenizer(), None)


def batch_of(task, fields):
    return stack([task.features(e, None, LetterTokenizer.vocabulary) for e in examples_of(task, fields)])


def test_single_sentence_row():
    task = Classification(max_length=12).resolve(ListSource(train=SINGLE))
    assert task.labels == ("neg", "pos")
    batch = batch_of(task, SINGLE)
    ids = LetterTokenizer().encode_batch(["good good film"])[0].ids
    np.testing.assert_array_equal(batch["input_ids"][0], [CLS, *ids, SEP, *[PAD] * 4])
    np.testing.assert_array_equal(batch["segment_ids"][0], [1] * 8 + [0] * 4)
    np.testing.assert_array_equal(batch["label"], [1, 0])
    assert "token_type_ids" not in batch


def test_pair_row_and_its_truncation():
    task = Classification(max_length=12, labels=("0", "1"))
    first, second = examples_of(task, PAIRS)
    assert (len(first.first), len(first.second), first.truncated) == (5, 4, True)  # 7 and 4 pieces, room for 9
    assert (len(second.first), len(second.second), second.truncated) == (2, 7, True)
    row = task.features(first, None, LetterTokenizer.vocabulary)
    ids, pair = (pieces.ids for pieces in LetterTokenizer().encode_batch(["how old are you", "your age"]))
    np.testing.assert_array_equal(row["input_ids"], [CLS, *ids[:5], SEP, *pair, SEP])
    np.testing.assert_array_equal(row["token_type_ids"], [0] * 7 + [1] * 5)
    scores = task.score({"label": np.asarray([1, 0])}, [first, second])
    assert scores == {"accuracy": 1.0, "f1": 1.0, "mcc": 1.0, "truncated_rows": 2.0}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_loss_and_predictions_equal_a_recomputation(pooling):
    task = Classification(max_length=16, labels=("0", "1"), pooling=pooling)
    batch = batch_of(task, PAIRS)
    module = task.module(TinyEncoder())
    variables = jax.jit(module.init)(jax.random.key(1), batch)
    output = jax.jit(module.apply)(variables, batch)
    model, head = variables["params"]["model"], variables["params"]["heads"]["classification"]["output"]
    inputs = {name: batch[name] for name in ("segment_ids", "token_type_ids")}
    encoded = TinyEncoder().apply({"params": model}, batch["input_ids"], **inputs)
    mean = jnp.stack([encoded.hidden[b, : batch["segment_ids"][b].sum()].mean(0) for b in range(2)])
    log_p = jax.nn.log_softmax((encoded.pooled if pooling == "cls" else mean) @ head["kernel"] + head["bias"])
    expected = -log_p[jnp.arange(2), batch["label"]].sum()
    chex.assert_trees_all_close(output.losses["classification"], (expected, jnp.float32(2)), rtol=1e-5)
    chex.assert_trees_all_equal(output.predictions["label"], log_p.argmax(-1).astype(jnp.int32))


def test_a_row_of_weight_zero_adds_nothing_to_loss_or_gradient():
    task = Classification(max_length=16, labels=("0", "1"), pooling="mean")
    batch = batch_of(task, PAIRS)
    module = task.module(TinyEncoder())
    variables = jax.jit(module.init)(jax.random.key(1), batch)
    padded = {name: np.concatenate([value, value[:1]]) for name, value in batch.items()}
    padded["example_weight"][-1] = 0

    def loss(variables, batch):
        total, weight = module.apply(variables, batch).losses["classification"]
        return total / weight

    gradient = jax.jit(jax.grad(loss))
    chex.assert_trees_all_close(gradient(variables, padded), gradient(variables, batch), atol=1e-6)


def test_token_types_reach_the_model():
    task = Classification(max_length=16, labels=("0", "1"))
    batch = batch_of(task, PAIRS)
    module = task.module(TinyEncoder())
    variables = jax.jit(module.init)(jax.random.key(1), batch)
    swapped = {**batch, "token_type_ids": 1 - batch["token_type_ids"]}
    apply = jax.jit(module.apply)
    a, b = (apply(variables, x).losses["classification"][0] for x in (batch, swapped))
    assert abs(float(a - b)) > 1e-4


def test_pooling_by_cls_needs_a_pooler():
    task = Classification(max_length=16, labels=("0", "1"))
    with pytest.raises(UserError, match="pooling='mean'"):
        task.module(TinyEncoder(has_pooler=False)).init(jax.random.key(0), batch_of(task, PAIRS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"text": "a", "label": "positiv"},
            r"train\.txt:10: label 'positiv' is not in the set; did you mean 'positive'",
        ),
        ({"label": "positive"}, r"train\.txt:10: .*needs a field 'text'; this source gives label"),
        ({"text": "a"}, r"train\.txt:10: .*needs a field 'label'; this source gives text"),
    ],
)
def test_bad_records_name_file_line_and_what_would_be_right(fields, message):
    with pytest.raises(UserError, match=message):
        examples_of(Classification(labels=("positive", "negative")), [fields])


def test_a_pair_without_its_second_text_is_refused():
    with pytest.raises(UserError, match=r"train\.txt:20: .*needs a field 'text_pair'"):
        examples_of(Classification(labels=("0", "1")), [PAIRS[0], {"text": "a", "label": "0"}])


def test_more_examples_than_one_batch_of_the_tokenizer_keep_their_order():
    fields = [{"text": "ab" * (k % 7 + 1), "label": str(k % 2)} for k in range(1100)]
    examples = examples_of(Classification(labels=("0", "1")), fields)
    assert [(len(e.first), e.label) for e in examples] == [(k % 7 + 1, k % 2) for k in range(1100)]


def test_refusals_of_the_part_itself():
    with pytest.raises(UserError, match="1 different labels"):
        Classification().resolve(ListSource(train=SINGLE[:1]))
    with pytest.raises(UserError, match="no labels"):
        Classification().module(TinyEncoder())
    with pytest.raises(UserError, match="max_length must be at least 4"):
        registry.build({"name": "classification", "max_length": 3})
    with pytest.raises(UserError, match="'mean'"):
        registry.build({"name": "classification", "pooling": "max"})
