"""Our pretraining model run on the inputs that the libraries of PyTorch take, and everything it computes on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models import build
from zoo.tasks.heads import LinearHead, MaskedLMHead
from zoo.tasks.masked_lm import MaskedLM
from zoo.tasks.masked_lm_with_sentences import MaskedLMWithSentences

IGNORED = -100


class Results(NamedTuple):
    """`hidden_states` [L + 1, B, T, D], `logits` [B, T, V], `pooled` [B, D], `sentence_logits` [B, 2], `loss` [], gradients by name."""

    hidden_states: jax.Array
    logits: jax.Array
    pooled: jax.Array | None
    sentence_logits: jax.Array | None
    loss: jax.Array
    gradients: dict


def batch_of(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our batch for their inputs: every position goes through the head, and those with a label count."""
    labels = inputs["labels"]
    rows, length = labels.shape
    batch = {
        "input_ids": inputs["input_ids"],
        "segment_ids": inputs["attention_mask"],
        "token_type_ids": inputs["token_type_ids"],
        "masked_positions": np.broadcast_to(np.arange(length, dtype=np.int32), labels.shape),
        "masked_labels": np.where(labels == IGNORED, 0, labels).astype(np.int32),
        "masked_weights": (labels != IGNORED).astype(np.float32),
        "example_weight": np.ones(rows, np.float32),
    }
    if "next_sentence_label" in inputs:
        batch["sentence_label"] = inputs["next_sentence_label"].astype(np.int32)
        batch["sentence_weight"] = np.ones(rows, np.float32)
    return batch


def run(config: Mapping[str, Any], inputs: Mapping[str, np.ndarray], params: dict) -> Results:
    """Forward and backward through the task that pretraining uses, in float32 products of full precision."""
    pairs = "next_sentence_label" in inputs
    batch = {name: jnp.asarray(array) for name, array in batch_of(inputs).items()}
    approximate = "gelu_tanh" if config["feed_forward"]["approximate"] else "gelu"
    task = (MaskedLMWithSentences if pairs else MaskedLM)(
        max_length=inputs["labels"].shape[1], activation=approximate, norm_epsilon=config["norm"]["epsilon"]
    )
    model = build(config)
    module = task.module(model)

    def loss(params: dict) -> tuple[jax.Array, dict]:
        output, seen = module.apply({"params": params}, batch, train=True, capture_intermediates=_is_head)
        total = sum(task.coefficients[name] * sum_ / weight for name, (sum_, weight) in output.losses.items())
        return total, seen["intermediates"]["heads"]

    @jax.jit
    def everything(params: dict) -> Results:
        (value, heads), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        encoded = model.apply(
            {"params": params["model"]},
            batch["input_ids"],
            token_type_ids=batch["token_type_ids"],
            segment_ids=batch["segment_ids"],
            hidden_states=True,
        )
        logits, sentence = heads["masked_lm"]["__call__"][0], heads["nsp"]["__call__"][0] if pairs else None
        return Results(encoded.hidden_states, logits, encoded.pooled, sentence, value, gradients)

    with jax.default_matmul_precision("highest"):
        return jax.device_get(everything(jax.tree.map(jnp.asarray, params)))


def _is_head(module: Any, method: str) -> bool:
    return isinstance(module, MaskedLMHead | LinearHead) and method == "__call__"
