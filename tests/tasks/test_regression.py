"""Regression: float labels, squared errors over the batch's weights, correlations."""

import jax
import numpy as np
import pytest

from tests.tasks.standins import LetterTokenizer, ListSource, TinyEncoder, stack
from zoo.errors import UserError
from zoo.tasks.classification import Classification
from zoo.tasks.regression import Regression
from zoo.tasks.sentence_level import LabelledText

PAIRS = [
    {"text": "how old are you", "text_pair": "your age", "label": "4.75"},
    {"text": "why", "text_pair": "what is the weather like today", "label": "0"},
    {"text": "a man sings", "text_pair": "a man is singing", "label": " 3.8e0"},
]


def examples_of(task, fields):
    return task.examples(ListSource(train=fields), "train", LetterTokenizer(), None)


def batch_of(task, fields):
    return stack([task.features(e, None, LetterTokenizer.vocabulary) for e in examples_of(task, fields)])


@pytest.mark.parametrize("fields", [PAIRS, [{"text": row["text"] * 3, "label": row["label"]} for row in PAIRS]])
def test_rows_are_those_of_classification_with_a_number_as_label(fields):
    """Pairs and single texts, cut at the same places and counted."""
    tasks = Regression(max_length=12), Classification(max_length=12, labels=("x",))
    labelled = fields, [{**row, "label": "x"} for row in fields]
    ours, theirs = (examples_of(task, rows) for task, rows in zip(tasks, labelled, strict=True))
    assert [e.label for e in ours] == [4.75, 0.0, 3.8]
    assert [e.truncated for e in ours] == [e.truncated for e in theirs] and any(e.truncated for e in ours)
    own, other = (batch_of(task, rows) for task, rows in zip(tasks, labelled, strict=True))
    label, _ = own.pop("label"), other.pop("label")
    assert label.dtype == np.float32 and label.shape == (3,)
    jax.tree.map(np.testing.assert_array_equal, own, other)


def test_loss_and_gradient_equal_a_recomputation_in_numpy():
    """Squared errors weighted by row; a row of weight 0 counts in neither sum nor weight."""
    task = Regression(max_length=16, pooling="mean")
    batch = batch_of(task, PAIRS)
    batch["example_weight"] = np.asarray([1, 1, 0], np.float32)
    module = task.module(TinyEncoder())
    variables = jax.jit(module.init)(jax.random.key(1), batch)

    def loss(variables):
        output = module.apply(variables, batch)
        total, weight = output.losses["regression"]
        return total / weight, output

    (_, output), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    head = variables["params"]["heads"]["regression"]["output"]
    inputs = {name: batch[name] for name in ("segment_ids", "token_type_ids")}
    encoded = TinyEncoder().apply({"params": variables["params"]["model"]}, batch["input_ids"], **inputs)
    hidden = np.asarray(encoded.hidden, np.float64)
    x = np.stack([row[ids > 0].mean(0) for row, ids in zip(hidden, batch["segment_ids"], strict=True)])
    value = (x @ np.asarray(head["kernel"], np.float64))[:, 0] + float(head["bias"][0])
    error = (value - [4.75, 0, 3.8]) * [1, 1, 0]
    total, weight = output.losses["regression"]
    np.testing.assert_allclose(output.predictions["value"], value, rtol=1e-5)
    np.testing.assert_allclose((total, weight), ((error**2).sum(), 2), rtol=1e-5)
    found = gradient["params"]["heads"]["regression"]["output"]
    np.testing.assert_allclose(found["bias"], [error.sum()], rtol=1e-5)  # 2 · Σ error / 2
    np.testing.assert_allclose(found["kernel"][:, 0], error @ x, rtol=1e-4, atol=1e-6)
    assert total.dtype == weight.dtype == output.predictions["value"].dtype == np.float32


def test_scores_of_a_set_are_in_its_order_and_count_cut_rows():
    examples = [LabelledText(np.zeros(1), None, label, cut) for label, cut in ((1.0, False), (2.0, True), (4.0, False))]
    scores = Regression().score({"value": np.asarray([0.0, 1.0, 3.0], np.float32)}, examples)
    expected = {"pearson": 1.0, "spearman": 1.0, "pearson_spearman": 1.0, "mse": 1.0, "truncated_rows": 1.0}
    assert scores == pytest.approx(expected)
    assert Regression().main_metric in scores
    with pytest.raises(ValueError, match="2 rows for 3 examples"):
        Regression().score({"value": np.zeros(2)}, examples)


@pytest.mark.parametrize("label", ["nan", "inf", "-inf", "1e39", "", "score", "4,75"])
def test_a_label_that_is_no_finite_number_names_file_and_line(label):
    with pytest.raises(UserError, match=rf"train\.txt:20: label '{label}' is no finite number"):
        examples_of(Regression(), [PAIRS[0], {**PAIRS[1], "label": label}])


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match=r"train\.txt:10: .*needs a field 'label'; this source gives text"):
        examples_of(Regression(), [{"text": "a"}])
    task = Regression(max_length=16)
    with pytest.raises(UserError, match="regression with pooling='cls' needs a model with a pooler"):
        jax.eval_shape(task.module(TinyEncoder(has_pooler=False)).init, jax.random.key(0), batch_of(task, PAIRS))
