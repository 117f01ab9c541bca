"""ELECTRA (Clark et al. 2020, arXiv:2003.10555): a discriminator of replaced tokens, and the generator that replaces them.

BERT's encoder without a pooler; where the embeddings are narrower than the model, a projection follows their norm. The heads have the
exact GELU but for the discriminator's, which has the activation of the feed-forwards.
"""

from __future__ import annotations

from zoo.interop.architecture import Architecture, HeadMap
from zoo.interop.architectures.bert import (
    ABSOLUTE,
    AROUND_ATTENTION,
    ATTENTION,
    EMBEDDING_SIZE,
    EMBEDDINGS,
    EMBEDDINGS_PROJECTION,
    ENCODER_ONLY,
    IGNORED,
    POSITIONS,
    QUESTION_ANSWERING,
    SETTINGS,
    TEMPLATE,
    TIE,
    TOKEN_TAGGING,
    activation,
    classes,
    classifier,
    embedding_size,
    linear,
    masked_lm,
    narrow_embeddings,
    with_defaults,
)
from zoo.interop.key_map import dense
from zoo.interop.settings import must_be

GENERATOR = HeadMap(
    "masked_lm",
    masked_lm(
        "generator_predictions.dense",
        "generator_predictions.LayerNorm",
        "generator_lm_head.bias",
        "generator_lm_head.weight",
    ),
    lambda tree: {"activation": "gelu", "norm_epsilon": tree["norm"]["epsilon"]},
    fields=(TIE,),
)

ELECTRA = Architecture(
    model_type="electra",
    prefix="electra.",
    template=TEMPLATE,
    settings=(
        *with_defaults(SETTINGS, hidden_size=256, num_attention_heads=4, intermediate_size=1024),
        EMBEDDING_SIZE,
        ABSOLUTE,
        *ENCODER_ONLY,
        must_be("summary_type", "first"),
        must_be("summary_use_proj", True),
        must_be("summary_activation", "gelu"),
    ),
    rules=lambda tree: EMBEDDINGS + EMBEDDINGS_PROJECTION + POSITIONS + ATTENTION + AROUND_ATTENTION,
    classes=classes("Electra", pretraining=("discriminator",)),
    heads=(
        HeadMap(
            "discriminator",
            (
                *dense("discriminator_predictions.dense", "heads/discriminator/dense"),
                *linear("discriminator_predictions.dense_prediction", "discriminator"),
            ),
            lambda tree: {"activation": activation(tree)},
        ),
        GENERATOR,
        classifier("classifier.dense", "classifier.out_proj", pooler_activation="gelu"),
        TOKEN_TAGGING,
        QUESTION_ANSWERING,
    ),
    tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    ignored=IGNORED,
    derive=narrow_embeddings,
    recover=embedding_size,
)
