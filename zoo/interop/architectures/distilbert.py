"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT's encoder at half the depth, without token types and without a pooler.

A classifier is dense, ReLU and projection over the first token. `sinusoidal_pos_embds` says what the table of positions was before it
was written, and changes nothing here.
"""

from __future__ import annotations

from zoo.interop.architecture import Architecture, HeadMap
from zoo.interop.architectures.bert import (
    ACTIVATIONS,
    IGNORED,
    POSITIONS,
    QUESTION_ANSWERING,
    TEMPLATE,
    TIE,
    TOKEN_TAGGING,
    classes,
    classifier,
    masked_lm,
    masked_lm_settings,
)
from zoo.interop.key_map import Rule, dense, norm
from zoo.interop.settings import Setting

LAYER = "transformer.layer.{layer}."

DISTILBERT = Architecture(
    model_type="distilbert",
    prefix="distilbert.",
    template={
        **TEMPLATE,
        "model": {**TEMPLATE["model"], "token_types": 0},
        "norm": {**TEMPLATE["norm"], "epsilon": 1e-12},
    },
    settings=(
        Setting("vocab_size", "model.vocab_size", 30522),
        Setting("dim", "model.model_dim", 768),
        Setting("n_layers", "model.num_layers", 6),
        Setting("n_heads", "model.num_heads", 12),
        Setting("activation", "feed_forward", "gelu", ACTIVATIONS),
        Setting("hidden_dim", "feed_forward.width", 3072),
        Setting("dropout", "model.dropout", 0.1),
        Setting("attention_dropout", "model.attention_dropout", 0.1),
        Setting("max_position_embeddings", "model.max_length", 512),
        Setting("initializer_range", "model.stddev", 0.02),
    ),
    rules=lambda tree: (
        Rule("embeddings.word_embeddings.weight", "model/embeddings/token/embedding"),
        *norm("embeddings.LayerNorm", "model/embeddings/norm"),
        *POSITIONS,
        *dense(LAYER + "attention.q_lin", "{block}/mixer/query"),
        *dense(LAYER + "attention.k_lin", "{block}/mixer/key"),
        *dense(LAYER + "attention.v_lin", "{block}/mixer/value"),
        *dense(LAYER + "attention.out_lin", "{block}/mixer/output"),
        *norm(LAYER + "sa_layer_norm", "{block}/norm_mixer"),
        *dense(LAYER + "ffn.lin1", "{block}/feed_forward/up"),
        *dense(LAYER + "ffn.lin2", "{block}/feed_forward/down"),
        *norm(LAYER + "output_layer_norm", "{block}/norm_feed_forward"),
    ),
    classes=classes("DistilBert", pretraining=None),
    heads=(
        HeadMap(
            "masked_lm",
            masked_lm("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector.weight"),
            masked_lm_settings,
            fields=(TIE,),
        ),
        classifier("pre_classifier", "classifier", pooler_activation="relu"),
        TOKEN_TAGGING,
        QUESTION_ANSWERING,
    ),
    tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    ignored=IGNORED,
)
