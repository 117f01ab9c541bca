"""EuroBERT (Boizard et al. 2025, arXiv:2503.05500): the block of Llama over all tokens, with grouped heads in the larger sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.interop.architecture import Architecture, HeadMap
from zoo.interop.architectures.bert import TOKEN_TAGGING, classifier
from zoo.interop.architectures.rotary import GATED, IGNORED, with_rope
from zoo.interop.key_map import Rule, dense, norm
from zoo.interop.settings import Setting, must_be

DERIVE, RECOVER = with_rope(10_000.0)


def masked_lm_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The last layer meets the vocabulary as it is; the output has a bias where the feed-forwards have."""
    return {"transform": False, "output_bias": tree["model"]["use_bias"]}


MASKED_LM = HeadMap(
    "masked_lm",
    (Rule("lm_head.weight", "heads/masked_lm/table"), Rule("lm_head.bias", "heads/masked_lm/bias")),
    masked_lm_settings,
    fields=(Setting("tie_word_embeddings", "tied", False),),
)
CLASSIFICATION = classifier("dense", "classifier")

LAYER = "layers.{layer}."
EUROBERT = Architecture(
    model_type="eurobert",
    prefix="model.",
    template={
        "model": {
            "arrangement": "pre_norm",
            "embedding_norm": False,
            "token_types": 0,
            "dropout": 0.0,
            "pooler": False,
            "pooler_activation": "gelu",
            "pooler_bias": True,
        },
        "encoding": {"name": "rope"},
        "mixer": {"name": "softmax"},
        "norm": {"name": "rmsnorm"},
    },
    settings=(
        Setting("vocab_size", "model.vocab_size", 128256),
        Setting("hidden_size", "model.model_dim", 768),
        Setting("num_hidden_layers", "model.num_layers", 12),
        Setting("num_attention_heads", "model.num_heads", 12),
        Setting("num_key_value_heads", "model.num_kv_heads", None),
        Setting("head_dim", "model.head_dim", None),
        Setting("hidden_act", "feed_forward", "silu", GATED),
        Setting("intermediate_size", "feed_forward.width", 3072),
        Setting("attention_dropout", "model.attention_dropout", 0.0),
        Setting("max_position_embeddings", "model.max_length", 8192),
        Setting("initializer_range", "model.stddev", 0.02),
        Setting("rms_norm_eps", "norm.epsilon", 1e-5),
        Setting("mlp_bias", "model.use_bias", False),
        Setting("attention_bias", "mixer.biases", False, {False: (), True: ("query", "key", "value", "output")}),
        Setting("classifier_pooling", "model.pooling", "late", {"bos": "first", "mean": "mean", "late": "late"}),
        must_be("clip_qkv", None),
    ),
    derive=DERIVE,
    recover=RECOVER,
    rules=lambda tree: (
        Rule("embed_tokens.weight", "model/embeddings/token/embedding"),
        *norm(LAYER + "input_layernorm", "{block}/norm_mixer"),
        *dense(LAYER + "self_attn.q_proj", "{block}/mixer/query"),
        *dense(LAYER + "self_attn.k_proj", "{block}/mixer/key"),
        *dense(LAYER + "self_attn.v_proj", "{block}/mixer/value"),
        *dense(LAYER + "self_attn.o_proj", "{block}/mixer/output"),
        *norm(LAYER + "post_attention_layernorm", "{block}/norm_feed_forward"),
        *dense(LAYER + "mlp.gate_proj", "{block}/feed_forward/gate"),
        *dense(LAYER + "mlp.up_proj", "{block}/feed_forward/up"),
        *dense(LAYER + "mlp.down_proj", "{block}/feed_forward/down"),
        *norm("norm", "model/final_norm"),
    ),
    classes={
        "EuroBertModel": (),
        "EuroBertForMaskedLM": ("masked_lm",),
        "EuroBertForSequenceClassification": ("classification",),
        "EuroBertForTokenClassification": ("token_tagging",),
    },
    heads=(MASKED_LM, CLASSIFICATION, TOKEN_TAGGING),
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=IGNORED,
)
