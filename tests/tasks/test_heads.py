"""Heads against a few lines of NumPy, and the parameters that their fields leave out or add."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tests.tasks.standins import TinyEncoder
from zoo.errors import UserError
from zoo.tasks.heads import DiscriminatorHead, LinearHead, MaskedLMHead
from zoo.tasks.masked_lm import MaskedLM
from zoo.tasks.masked_lm_with_sentences import MaskedLMWithSentences
from zoo.tasks.token_tagging import TokenTagging

H = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
E = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)


def moved(params):
    """At their initial values biases and scales could be missing without a trace."""
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)


def shapes(params):
    return jax.tree.map(jnp.shape, params)


def normalised(x, epsilon):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


def masked_lm(**fields):
    head = MaskedLMHead(4, "gelu", 1e-3, jnp.float32, jax.nn.initializers.normal(0.5), **fields)
    params = moved(head.init(jax.random.key(0), H, E)["params"])
    return params, head.apply({"params": params}, H, E)


def test_the_transform_may_have_no_bias():
    """ModernBERT."""
    params, logits = masked_lm(transform_bias=False)
    assert shapes(params) == {"dense": {"kernel": (4, 4)}, "norm": {"scale": (4,)}, "bias": (7,)}
    x = H @ params["dense"]["kernel"]
    x = normalised(0.5 * x * (1 + erf(x / np.sqrt(2))), 1e-3) * params["norm"]["scale"]
    np.testing.assert_allclose(logits, x @ E.T + params["bias"], atol=1e-5)


def test_there_may_be_no_transform_and_a_table_of_its_own():
    """NeoBERT; tied and without any bias, EuroBERT."""
    params, logits = masked_lm(transform=False, tied=False)
    assert shapes(params) == {"table": (7, 4), "bias": (7,)}
    np.testing.assert_allclose(logits, H @ params["table"].T + params["bias"], atol=1e-5)
    bare = MaskedLMHead(4, "gelu", 1e-3, jnp.float32, None, transform=False, output_bias=False)
    np.testing.assert_allclose(bare.apply({}, H, E), H @ E.T, atol=1e-5)


def test_a_transform_before_the_tags():
    """ModernBERT."""
    task = TokenTagging(labels=("B-x", "O"), transform=True, activation="relu", norm_epsilon=1e-3, transform_bias=False)
    head = task.head(TinyEncoder(), 2, dropout=0.0)()
    params = moved(head.init(jax.random.key(0), H, False)["params"])
    assert shapes(params) == {
        "dense": {"kernel": (4, 4)},
        "norm": {"scale": (4,)},
        "output": {"kernel": (4, 2), "bias": (2,)},
    }
    x = normalised(np.maximum(0, H @ params["dense"]["kernel"]), 1e-3) * params["norm"]["scale"]
    expected = x @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(head.apply({"params": params}, H, False), expected, atol=1e-5)
    head = TokenTagging(labels=("B-x", "O")).head(TinyEncoder(), 2, dropout=0.0)()
    assert shapes(head.init(jax.random.key(0), H, False)["params"]) == {"output": {"kernel": (4, 2), "bias": (2,)}}


def test_the_discriminator_tells_every_token():
    """ELECTRA; with a norm DeBERTa v3."""

    def made(**fields):
        head = DiscriminatorHead("relu", jnp.float32, jax.nn.initializers.normal(0.5), **fields)
        params = moved(head.init(jax.random.key(0), H)["params"])
        return params, head.apply({"params": params}, H)

    def by_hand(p, x):
        return (
            np.maximum(0, x @ p["dense"]["kernel"] + p["dense"]["bias"]) @ p["output"]["kernel"] + p["output"]["bias"]
        )

    params, logits = made()
    layers = {"dense": {"kernel": (4, 4), "bias": (4,)}, "output": {"kernel": (4, 1), "bias": (1,)}}
    assert shapes(params) == layers and logits.shape == (2, 3)
    np.testing.assert_allclose(logits, by_hand(params, H)[..., 0], atol=1e-5)
    params, logits = made(norm_epsilon=1e-3)
    assert shapes(params) == {**layers, "norm": {"scale": (4,), "bias": (4,)}}
    x = normalised(H[:, :1] + H, 1e-3) * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(logits, by_hand(params, x)[..., 0], atol=1e-5)


def test_a_linear_head_answers_where_a_span_begins_and_ends():
    head = LinearHead(2, 0.0, jax.nn.initializers.normal(0.5))
    params = moved(head.init(jax.random.key(0), H, False)["params"])
    assert shapes(params) == {"output": {"kernel": (4, 2), "bias": (2,)}}
    expected = H @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(head.apply({"params": params}, H, False), expected, atol=1e-5)


@pytest.mark.parametrize("task", [MaskedLM, MaskedLMWithSentences])
def test_the_tasks_hand_their_fields_to_the_head(task):
    batch = {
        **{name: jnp.zeros((1, 16), jnp.int32) for name in ("input_ids", "segment_ids", "token_type_ids")},
        **{name: jnp.zeros((1, 2), jnp.int32) for name in ("masked_positions", "masked_labels", "masked_weights")},
        **{name: jnp.zeros((1,), jnp.int32) for name in ("sentence_label", "sentence_weight", "example_weight")},
    }

    def head(**fields):
        module = task(max_length=16, **fields).module(TinyEncoder(embedding_dim=8))
        return shapes(jax.eval_shape(module.init, jax.random.key(0), batch)["params"]["heads"]["masked_lm"])

    assert head(transform=False, tied=False) == {"table": (40, 8), "bias": (40,)}
    assert head(transform_bias=False, output_bias=False) == {"dense": {"kernel": (8, 8)}, "norm": {"scale": (8,)}}
    with pytest.raises(UserError, match=r"transform=False .*embedding_dim=6 is not model\.model_dim=8"):
        task(max_length=16, transform=False).module(TinyEncoder())
