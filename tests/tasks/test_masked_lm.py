"""Masked LM: packing, fixed slots, the tied head, against a dense recomputation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import Positions
from tests.tasks.standins import CLS, MASK, PAD, SEP, LetterTokenizer, ListSource, TinyEncoder, stack
from zoo.data.pipeline import Pipeline
from zoo.errors import UserError
from zoo.tasks import registry
from zoo.tasks.masked_lm import MaskedLM

VOCABULARY = LetterTokenizer.vocabulary
# Two documents, [CLS] a b c d [SEP] and [CLS] e f g [SEP], and padding; some words have two pieces.
ROW = {
    "input_ids": np.asarray([CLS, 10, 11, 12, 13, SEP, CLS, 20, 21, 22, SEP, PAD], np.int32),
    "segment_ids": np.asarray([1] * 6 + [2] * 5 + [0], np.int32),
    "positions": np.asarray([*range(6), *range(5), 0], np.int32),
    "word_starts": np.asarray([1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1], bool),
}
TEXT = ListSource(train=[{"text": "ab cd efgh ij kl mnop qr"}, {"text": "st uv wx"}, {"text": "yz ab cdef"}] * 5)


def make(**fields):
    return MaskedLM(max_length=12, rate=0.4, **fields)


def features(task, seed):
    return task.features(ROW, np.random.default_rng(seed), VOCABULARY)


def test_features_hide_tokens_at_fixed_shapes_anew_each_time():
    task = make()
    rows = [features(task, seed) for seed in range(20)]
    chex.assert_trees_all_equal(features(task, 3), rows[3])
    assert len({tuple(row["masked_positions"]) for row in rows}) > 5
    for row in rows:
        assert row["masked_positions"].shape == (5,)  # ceil(0.4 · 12)
        used = row["masked_weights"] > 0
        at = row["masked_positions"][used]
        assert len(set(at)) == len(at) == 4  # round(0.4 · 11)
        np.testing.assert_array_equal(row["masked_labels"][used], ROW["input_ids"][at])
        assert not np.isin(ROW["input_ids"][at], VOCABULARY.special).any()
        changed = np.flatnonzero(row["input_ids"] != ROW["input_ids"])
        assert set(changed) <= set(at)
    assert any((row["input_ids"] == MASK).any() for row in rows)


def test_whole_words_are_hidden_together():
    for seed in range(20):
        row = features(make(whole_word=True, replace=(1.0, 0.0, 0.0)), seed)
        hidden = row["input_ids"] == MASK
        assert hidden[1] == hidden[2] and hidden[8] == hidden[9]


def test_documents_of_a_row_are_apart_or_together():
    apart, together = features(make(), 0), features(make(attend_across=True), 0)
    np.testing.assert_array_equal(apart["segment_ids"], ROW["segment_ids"])
    np.testing.assert_array_equal(apart["positions"], ROW["positions"])
    np.testing.assert_array_equal(together["segment_ids"], [1] * 11 + [0])
    assert "positions" not in together


def test_examples_are_rows_packed_from_the_prepared_store_anew_every_epoch(tmp_path):
    task = make()
    examples = task.examples(TEXT, "train", LetterTokenizer(), tmp_path)
    tokens = 5 * (9 + 3 + 4 + 3 * 2)  # pieces, [CLS] and [SEP] of three documents
    assert len(examples) == -(-tokens // 12)
    rows = [np.stack([r["input_ids"] for r in examples.at_epoch(epoch)]) for epoch in (0, 1)]
    assert (rows[0] != rows[1]).any()
    for row in rows:
        assert (row == CLS).sum() == (row == SEP).sum() == 15
    whole = make(split_documents=False, specials="none").examples(TEXT, "train", LetterTokenizer(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # the store does not depend on how it is packed
    assert len(whole) == 7  # documents of 9 and 3 pieces share a row, and so do three of 4
    again = make(seed=1).examples(TEXT, "train", LetterTokenizer(), tmp_path)
    assert (np.stack([r["input_ids"] for r in again]) != rows[0]).any()


def test_batches_through_the_pipeline_have_fixed_shapes(tmp_path):
    task = make(max_predictions=3)
    examples = task.examples(TEXT, "train", LetterTokenizer(), tmp_path)
    pipeline = Pipeline(examples, lambda e, rng: task.features(e, rng, VOCABULARY), seed=0, batch_size=4)
    for step in (0, 7):
        shapes = {name: value.shape for name, value in pipeline.batch(step).items()}
        assert shapes.pop("example_index") == shapes.pop("example_weight") == (4,)
        assert shapes == {
            **dict.fromkeys(("input_ids", "segment_ids", "positions"), (4, 12)),
            **dict.fromkeys(("masked_positions", "masked_labels", "masked_weights"), (4, 3)),
        }


@pytest.fixture(scope="module")
def trained():
    task = make(attend_across=False)
    batch = stack([features(task, seed) for seed in (0, 1)])
    module = task.module(TinyEncoder())
    return module, jax.jit(module.init)(jax.random.key(0), batch), batch, jax.jit(module.apply)


def test_loss_equals_a_dense_recomputation(trained):
    """The same head at every position, then a loss over those that are hidden."""
    _, variables, batch, apply = trained
    model, head = variables["params"]["model"], variables["params"]["heads"]["masked_lm"]
    assert jax.tree.map(jnp.shape, head) == {
        "dense": {"kernel": (8, 6), "bias": (6,)},
        "norm": {"scale": (6,), "bias": (6,)},
        "bias": (40,),
    }
    # At their initial values the norm and the output bias could be missing without a trace.
    head = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), head)
    variables = {"params": {"model": model, "heads": {"masked_lm": head}}}
    encoded = TinyEncoder().apply(
        {"params": model},
        batch["input_ids"],
        segment_ids=batch["segment_ids"],
        positions=Positions(batch["positions"], contiguous=True),
    )
    x = encoded.hidden @ head["dense"]["kernel"] + head["dense"]["bias"]
    x = 0.5 * x * (1 + jax.lax.erf(x / jnp.sqrt(2.0)))
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-12)
    logits = (x * head["norm"]["scale"] + head["norm"]["bias"]) @ model["table"].T + head["bias"]
    log_p = jax.nn.log_softmax(logits)
    losses = np.zeros((2, 5))
    for b, p in np.ndindex(2, 5):
        losses[b, p] = (
            -batch["masked_weights"][b, p] * log_p[b, batch["masked_positions"][b, p], batch["masked_labels"][b, p]]
        )

    output = apply(variables, batch)
    total, weight = output.losses["masked_lm"]
    chex.assert_trees_all_close(total, jnp.float32(losses.sum()), rtol=1e-5)
    assert weight == batch["masked_weights"].sum()
    chex.assert_trees_all_close(output.predictions["loss_sum"], losses.sum(1).astype(np.float32), rtol=1e-5)
    chex.assert_trees_all_equal(output.predictions["weight"], batch["masked_weights"].sum(1))


def test_a_row_of_weight_zero_adds_nothing(trained):
    _, variables, batch, apply = trained
    padded = {name: np.concatenate([value, value[:1]]) for name, value in batch.items()}
    padded["example_weight"][-1] = 0
    output, again = apply(variables, batch), apply(variables, padded)
    chex.assert_trees_all_close(again.losses, output.losses, rtol=1e-6)
    assert all(float(value[-1]) == 0 for value in again.predictions.values())


def test_an_unused_slot_adds_nothing(trained):
    _, variables, batch, apply = trained
    unused = np.argwhere(batch["masked_weights"] == 0)
    assert len(unused)
    other = {**batch, "masked_labels": batch["masked_labels"].copy()}
    other["masked_labels"][tuple(unused.T)] = 39
    chex.assert_trees_all_equal(apply(variables, other).losses, apply(variables, batch).losses)


def test_documents_do_not_see_each_other(trained):
    _, variables, batch, apply = trained
    other = {**batch, "input_ids": batch["input_ids"].copy(), "masked_weights": batch["masked_weights"].copy()}
    other["input_ids"][:, 7:10] = 33  # in the second document
    other["masked_weights"][batch["masked_positions"] > 5] = 0  # losses of the first only
    same = {**other, "input_ids": batch["input_ids"]}
    chex.assert_trees_all_close(apply(variables, other).losses, apply(variables, same).losses, rtol=1e-6)


def test_loss_is_float32_in_a_bfloat16_model(trained):
    _, variables, batch, _ = trained
    module = make().module(TinyEncoder(dtype=jnp.bfloat16))
    output = jax.eval_shape(module.apply, variables, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {np.dtype("float32")}


def test_score_adds_before_it_divides():
    predictions = {
        "loss_sum": np.asarray([3.0, 1.0], np.float32),
        "weight": np.asarray([3.0, 1.0], np.float32),
        "correct": np.asarray([0.0, 1.0], np.float32),
    }
    scores = make().score(predictions, [None, None])
    assert scores == {"loss": 1.0, "perplexity": pytest.approx(np.e), "accuracy": 0.25}
    with pytest.raises(UserError, match="no token"):
        make().score({name: 0 * value for name, value in predictions.items()}, [None, None])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0.0}, "rate must be between 0 and 1"),
        ({"replace": (0.8, 0.3, 0.1)}, "add up to 1"),
        ({"max_predictions": 0}, "max_predictions must be 1 to 128, not 0"),
        ({"max_predictions": 200}, "max_predictions must be 1 to 128, not 200"),
        ({"specials": "both"}, "'document'"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(UserError, match=message):
        registry.build({"name": "masked_lm", **fields})
