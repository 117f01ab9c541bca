"""Causal LM: labels, the tied output, slices of long rows, against a dense recomputation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import Positions
from tests.tasks.standins import CLS, PAD, SEP, LetterTokenizer, stack
from zoo.config import load_config
from zoo.errors import UserError
from zoo.models import build
from zoo.tasks import registry
from zoo.tasks.causal_lm import CausalLM, next_token_losses

ROW = {
    "input_ids": np.asarray([CLS, 10, 11, 12, SEP, CLS, 20, 21, SEP, PAD], np.int32),
    "segment_ids": np.asarray([1] * 5 + [2] * 4 + [0], np.int32),
    "positions": np.asarray([*range(5), *range(4), 0], np.int32),
    "word_starts": np.ones(10, bool),
}


def features(**fields):
    task = CausalLM(max_length=10, **fields)
    return task.features(ROW, np.random.default_rng(0), LetterTokenizer.vocabulary)


def tiny(**model):
    config = load_config("configs/demo.py:pretrain", []).to_dict()
    sizes = dict(vocab_size=30, model_dim=16, num_layers=1, max_length=16, causal=True, stddev=0.5)
    config["model"].update(sizes | model)
    return build(config | {"encoding": {"name": "rope"}})


def test_labels_are_the_next_tokens_of_the_same_document():
    apart, together = features(attend_across=False), features()
    np.testing.assert_array_equal(apart["labels"][:8], ROW["input_ids"][1:9])
    np.testing.assert_array_equal(apart["label_weights"], [1, 1, 1, 1, 0, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(together["label_weights"], [1] * 8 + [0, 0])
    np.testing.assert_array_equal(apart["positions"], ROW["positions"])
    np.testing.assert_array_equal(together["segment_ids"], [1] * 9 + [0])
    assert "positions" not in together


@pytest.mark.parametrize("width", [16, 8])
def test_loss_equals_a_dense_recomputation(width):
    """With embeddings as wide as the model and narrower, where a projection comes between."""
    task, model = CausalLM(max_length=10, attend_across=False), tiny(embedding_dim=width)
    batch = stack([features(attend_across=False)] * 2)
    batch["example_weight"][1] = 0.5
    module = task.module(model)
    params = jax.jit(module.init)(jax.random.key(0), batch)["params"]
    output = jax.device_get(jax.jit(module.apply)({"params": params}, batch))
    ids, segments, token = (jnp.asarray(batch[name]) for name in ("input_ids", "segment_ids", "positions"))
    positions = Positions(token, contiguous=True)
    hidden = model.apply({"params": params["model"]}, ids, segment_ids=segments, positions=positions).hidden
    if width == 16:
        assert set(params) == {"model"}
    else:
        head = params["heads"]["causal_lm"]
        hidden = hidden @ head["kernel"] + head["bias"]
    log_p = jax.nn.log_softmax(hidden @ params["model"]["embeddings"]["token"]["embedding"].T)
    expected = np.zeros((2, 10), np.float32)
    for b, t in np.ndindex(2, 9):
        if ROW["segment_ids"][t] == ROW["segment_ids"][t + 1] != 0:
            expected[b, t] = -log_p[b, t, ROW["input_ids"][t + 1]] * (1, 0.5)[b]
    chex.assert_trees_all_close(output.predictions["loss"], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(output.losses["causal_lm"][0], expected.sum(), rtol=1e-5)
    assert output.losses["causal_lm"][1] == 7 * 1.5
    scores = task.score(output.predictions, [None, None])
    assert scores["loss"] == pytest.approx(expected.sum() / 10.5, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]))


@pytest.mark.parametrize("length", [256, 300])
def test_slices_of_a_long_row_are_the_whole_row(length):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (2, length, 4)), jax.random.normal(keys[1], (7, 4))
    labels = jax.random.randint(keys[2], (2, length), 0, 7)
    weights = jnp.cos(jnp.arange(2.0 * length)).reshape(2, length)

    def plain(hidden, table):
        log_p = jax.nn.log_softmax(jnp.einsum("bte,ve->btv", hidden, table))
        return -jnp.take_along_axis(log_p, labels[..., None], axis=2)[..., 0]

    def sliced(hidden, table):
        return next_token_losses(hidden, table, labels)[0]

    both = [jax.jit(jax.vjp, static_argnums=0)(f, hidden, table) for f in (plain, sliced)]
    chex.assert_trees_all_close(both[1][0], both[0][0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(both[1][1](weights), both[0][1](weights), rtol=1e-4, atol=1e-4)


def test_refusals():
    task = registry.build({"name": "causal_lm"})
    with pytest.raises(UserError, match=r"set model\.causal=True"):
        task.module(tiny(causal=False))
    nothing = {name: np.zeros((1, 4), np.float32) for name in ("loss", "weight", "correct")}
    with pytest.raises(UserError, match="no token that follows"):
        task.score(nothing, [None])
