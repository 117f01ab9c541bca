"""FNet (Lee-Thorp et al. 2021, arXiv:2105.03824): BERT with a Fourier transform in the place of attention."""

from __future__ import annotations

from zoo.interop.architecture import Architecture
from zoo.interop.architectures.bert import (
    EMBEDDINGS,
    HEADS,
    IGNORED,
    LAYER,
    POOLER,
    POSITIONS,
    SETTINGS,
    classes,
    tied,
    with_defaults,
)
from zoo.interop.key_map import dense, norm

# What BERT's config.json has and FNet's has not, or with another default.
_DEFAULTS = {"vocab_size": 32000, "hidden_act": "gelu_new", "type_vocab_size": 4}
_NO_ATTENTION = ("num_attention_heads", "attention_probs_dropout_prob")

FNET = Architecture(
    model_type="fnet",
    prefix="fnet.",
    template={
        "model": {
            "arrangement": "post_norm",
            "pooler": False,
            "embedding_projection": True,
            "num_heads": 1,
            "attention_dropout": 0.0,
        },
        "encoding": {"name": "learned"},
        # As it was trained: what stands at padding is mixed into every token.
        "mixer": {"name": "fourier", "pads": "tokens"},
        "norm": {"name": "layernorm"},
    },
    settings=with_defaults(tuple(s for s in SETTINGS if s.theirs not in _NO_ATTENTION), **_DEFAULTS),
    rules=lambda tree: (
        *EMBEDDINGS,
        *POSITIONS,
        *dense("embeddings.projection", "model/embeddings/projection"),
        *norm(LAYER + "fourier.output.LayerNorm", "{block}/norm_mixer"),
        *dense(LAYER + "intermediate.dense", "{block}/feed_forward/up"),
        *dense(LAYER + "output.dense", "{block}/feed_forward/down"),
        *norm(LAYER + "output.LayerNorm", "{block}/norm_feed_forward"),
    ),
    pooler=POOLER,
    classes={**classes("FNet"), "FNetForNextSentencePrediction": ("nsp",)},
    heads=HEADS,
    tied=tied("fnet."),
    ignored=IGNORED,
)
