"""NeoBERT (Le Breton et al. 2025, arXiv:2502.19587), as its authors' code computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.interop.architecture import Architecture, HeadMap, Tree
from zoo.interop.architectures.bert import classifier
from zoo.interop.architectures.rotary import IGNORED
from zoo.interop.key_map import Fused, Rule, dense, norm
from zoo.interop.settings import Setting, must_be, read

_INNER = (Setting("intermediate_size", "intermediate_size", 3072),)


def derive(tree: Tree, theirs: Mapping[str, Any], where: str) -> Tree:
    """Enters the width of the gated feed-forward: two thirds of intermediate_size, rounded up to a multiple of 8."""
    inner = int(2 * read(_INNER, theirs, {}, where)["intermediate_size"] / 3)
    tree["feed_forward"]["width"] = 8 * -(-inner // 8)
    return tree


def recover(tree: Tree) -> dict[str, Any] | None:
    """The smallest intermediate_size that gives the width."""
    width = tree["feed_forward"].get("width")
    return None if not width or width % 8 else {"intermediate_size": -(-3 * width // 2)}


MASKED_LM = HeadMap(
    "masked_lm",
    (Rule("decoder.weight", "heads/masked_lm/table"), Rule("decoder.bias", "heads/masked_lm/bias")),
    lambda tree: {"transform": False, "tied": False},
)
CLASSIFICATION = classifier("dense", "classifier")

LAYER = "transformer_encoder.{layer}."
NEOBERT = Architecture(
    model_type="neobert",
    prefix="model.",
    template={
        "model": {
            "arrangement": "pre_norm",
            "embedding_norm": False,
            "token_types": 0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "pooler": False,
            "pooler_bias": True,
            "use_bias": False,
        },
        "encoding": {"name": "rope", "theta": 10_000.0, "layout": "interleaved"},
        "mixer": {"name": "softmax"},
        "feed_forward": {"name": "swiglu"},
        "norm": {"name": "rmsnorm"},
    },
    settings=(
        Setting("vocab_size", "model.vocab_size", 30522),
        Setting("hidden_size", "model.model_dim", 768),
        Setting("num_hidden_layers", "model.num_layers", 28),
        Setting("num_attention_heads", "model.num_heads", 12),
        Setting("max_length", "model.max_length", 1024),
        Setting("decoder_init_range", "model.stddev", 0.02),
        Setting("norm_eps", "norm.epsilon", 1e-6),
        # What the training code can also make.
        must_be("hidden_act", "SwiGLU"),
        must_be("rope", True),
        must_be("rms_norm", True),
        must_be("ngpt", False),
    ),
    derive=derive,
    recover=recover,
    rules=lambda tree: (
        Rule("encoder.weight", "model/embeddings/token/embedding"),
        *norm(LAYER + "attention_norm", "{block}/norm_mixer", bias=False),
        # Head by head, in each its query, key and value.
        Rule(
            LAYER + "qkv.weight",
            tuple(f"{{block}}/mixer/{part}/kernel" for part in ("query", "key", "value")),
            Fused(3, heads=tree["model"]["num_heads"]),
        ),
        *dense(LAYER + "wo", "{block}/mixer/output", bias=False),
        *norm(LAYER + "ffn_norm", "{block}/norm_feed_forward", bias=False),
        Rule(
            LAYER + "ffn.w12.weight",
            tuple(f"{{block}}/feed_forward/{part}/kernel" for part in ("gate", "up")),
            Fused(2),
        ),
        *dense(LAYER + "ffn.w3", "{block}/feed_forward/down", bias=False),
        *norm("layer_norm", "model/final_norm", bias=False),
    ),
    classes={
        "NeoBERT": (),
        "NeoBERTLMHead": ("masked_lm",),
        "NeoBERTForSequenceClassification": ("classification",),
    },
    heads=(MASKED_LM, CLASSIFICATION),
    ignored=IGNORED,
)
