"""Recall: which words count, and the loss and scores against a dense recomputation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks.standins import PAD, UNK, LetterTokenizer, ListSource, stack
from tests.tasks.test_causal_lm import tiny
from zoo.errors import UserError
from zoo.tasks import registry
from zoo.tasks.causal_lm import CausalLM
from zoo.tasks.recall import Recall

WORDS = ("ab", "abcdef", "cd", "efgh", "ab")  # 1, 3, 1, 2 and 1 pieces of two letters


def rows(task, *records):
    source = ListSource(dev=[{"words": words, "answers": answers} for words, answers in records])
    return task.examples(source, "dev", LetterTokenizer(), None)


def test_the_pieces_of_the_marked_words_count():
    task = registry.build({"name": "recall", "max_length": 10})
    (example,) = rows(task, (WORDS, (1, 3)))
    assert example.answers.tolist() == [False, True, True, True, False, True, True, False]
    made = task.features(example, np.random.default_rng(0), LetterTokenizer.vocabulary)
    assert made["label_weights"].tolist() == [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(made["input_ids"], [*example.ids, PAD, PAD])
    np.testing.assert_array_equal(made["labels"], [*example.ids[1:], PAD, PAD, PAD])
    np.testing.assert_array_equal(made["segment_ids"], [1] * 8 + [0, 0])
    full = dataclasses.replace(task, max_length=8).features(
        example, np.random.default_rng(0), LetterTokenizer.vocabulary
    )
    np.testing.assert_array_equal(full["labels"], [*example.ids[1:], PAD])


def test_loss_and_scores_equal_a_dense_recomputation():
    """The parameters are those of causal_lm, and one wrong piece makes a row wrong."""
    task, model = Recall(max_length=10), tiny(vocab_size=40)
    examples = rows(task, (WORDS, (1, 3)), (WORDS[::-1], (4,)))
    features = [task.features(e, np.random.default_rng(0), LetterTokenizer.vocabulary) for e in examples]
    batch = stack(features)
    module = task.module(model)
    shapes = jax.eval_shape(CausalLM(max_length=10).module(model).init, jax.random.key(0), batch)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes)
    output = jax.device_get(jax.jit(module.apply)({"params": params}, batch))
    ids, segments = (jnp.asarray(batch[name]) for name in ("input_ids", "segment_ids"))
    encode = jax.jit(lambda params: model.apply({"params": params}, ids, segment_ids=segments).hidden)
    hidden = encode(params["model"])
    log_p = np.asarray(jax.nn.log_softmax(hidden @ params["model"]["embeddings"]["token"]["embedding"].T))
    losses, right = [], []
    for row, example in enumerate(examples):
        at = np.flatnonzero(example.answers)
        losses.append([-log_p[row, t - 1, example.ids[t]] for t in at])
        right.append([log_p[row, t - 1].argmax() == example.ids[t] for t in at])
    chex.assert_trees_all_close(
        output.losses["causal_lm"], (np.float32(sum(map(sum, losses))), np.float32(6)), rtol=1e-5
    )
    assert task.coefficients == {"causal_lm": 1.0}
    scores = task.score(output.predictions, examples)
    assert scores["loss"] == pytest.approx(np.mean(np.concatenate(losses)), rel=1e-5)
    assert scores["accuracy"] == np.mean(np.concatenate(right)) and scores["exact"] == np.mean([all(r) for r in right])
    hits = np.zeros((2, 10), np.float32)
    hits[0, :5], hits[1] = batch["label_weights"][0, :5], batch["label_weights"][1]  # all but the last of the first row
    told = {**output.predictions, "correct": hits}
    assert task.score(told, examples) == {"loss": scores["loss"], "accuracy": 5 / 6, "exact": 0.5}


@pytest.mark.parametrize(
    ("words", "answers", "message"),
    [
        (WORDS, (0,), r"dev\.txt:10: answer 0 is not among words 1 to 4"),
        (WORDS, (2, 5), "answer 5 is not among words 1 to 4"),
        (WORDS, (), "there is no answer among words 1 to 4"),
        (("ab", "?!", "cd"), (2, 1), "does not know the answer '\\?!'"),
        (WORDS * 2, (1,), r"dev\.txt:10: the row has 16 pieces, task.max_length is 10; raise it, or shorten"),
    ],
)
def test_bad_rows(words, answers, message):
    assert LetterTokenizer().encode_words(("?!",)).ids.tolist() == [UNK]
    with pytest.raises(UserError, match=message):
        rows(Recall(max_length=10), (words, answers))


def test_other_refusals():
    with pytest.raises(UserError, match=r"set model\.causal=True"):
        Recall().module(tiny(causal=False))
    with pytest.raises(UserError, match="needs a field 'words'; this source gives text"):
        Recall().examples(ListSource(dev=[{"text": "a b"}]), "dev", LetterTokenizer(), None)
