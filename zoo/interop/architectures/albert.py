"""ALBERT (Lan et al. 2020, arXiv:1909.11942): one layer's parameters used at every depth, and narrow embeddings with a projection.

The published checkpoints have one group of one layer; more of either is refused. The pretraining heads are masked LM and sentence order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.interop.architecture import Architecture, HeadMap, Tree
from zoo.interop.architectures.bert import (
    ABSOLUTE,
    CLASSIFICATION,
    EMBEDDING_SIZE,
    EMBEDDINGS,
    IGNORED,
    POSITIONS,
    QUESTION_ANSWERING,
    SETTINGS,
    TEMPLATE,
    TIE,
    TOKEN_TAGGING,
    classes,
    embedding_size,
    linear,
    masked_lm,
    masked_lm_settings,
    narrow_embeddings,
    with_defaults,
)
from zoo.interop.key_map import dense, norm
from zoo.interop.settings import must_be

LAYER = "encoder.albert_layer_groups.0.albert_layers.0."


def _shared_layers(tree: Tree, theirs: Mapping[str, Any], where: str) -> Tree:
    repeats = tree["model"]["num_layers"]
    tree["model"]["stages"] = ({"pattern": ({},), "repeats": repeats, "share": True},)
    return narrow_embeddings(tree, theirs, where)


ALBERT = Architecture(
    model_type="albert",
    prefix="albert.",
    template={**TEMPLATE, "model": {**TEMPLATE["model"], "embedding_projection": True}},
    settings=(
        *with_defaults(
            SETTINGS,
            vocab_size=30000,
            hidden_size=4096,
            num_attention_heads=64,
            intermediate_size=16384,
            hidden_act="gelu_new",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        EMBEDDING_SIZE,
        ABSOLUTE,
        must_be("num_hidden_groups", 1),
        must_be("inner_group_num", 1),
    ),
    rules=lambda tree: (
        *EMBEDDINGS,
        *POSITIONS,
        *dense("encoder.embedding_hidden_mapping_in", "model/embeddings/projection"),
        *dense(LAYER + "attention.query", "{block}/mixer/query"),
        *dense(LAYER + "attention.key", "{block}/mixer/key"),
        *dense(LAYER + "attention.value", "{block}/mixer/value"),
        *dense(LAYER + "attention.dense", "{block}/mixer/output"),
        *norm(LAYER + "attention.LayerNorm", "{block}/norm_mixer"),
        *dense(LAYER + "ffn", "{block}/feed_forward/up"),
        *dense(LAYER + "ffn_output", "{block}/feed_forward/down"),
        *norm(LAYER + "full_layer_layer_norm", "{block}/norm_feed_forward"),
    ),
    pooler=dense("pooler", "model/pooler"),
    classes=classes("Albert", pretraining=("masked_lm", "sop")),
    heads=(
        HeadMap(
            "masked_lm",
            masked_lm("predictions.dense", "predictions.LayerNorm", "predictions.bias", "predictions.decoder.weight"),
            masked_lm_settings,
            fields=(TIE,),
        ),
        HeadMap("sop", linear("sop_classifier.classifier", "sop")),
        CLASSIFICATION,
        TOKEN_TAGGING,
        QUESTION_ANSWERING,
    ),
    tied={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    ignored=IGNORED,
    derive=_shared_layers,
    recover=embedding_size,
)
