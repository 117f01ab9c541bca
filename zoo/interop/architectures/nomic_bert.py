"""Nomic BERT (Nussbaum et al. 2024, arXiv:2402.01613): post-norm, rotary, gated, with biases in norms and heads alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import UserError
from zoo.interop.architecture import Architecture, HeadMap, Tree
from zoo.interop.architectures import bert
from zoo.interop.architectures.rotary import GATED, IGNORED, gate_activation, with_rope
from zoo.interop.key_map import Fused, Rule, dense, norm
from zoo.interop.settings import Setting

_DERIVE, RECOVER = with_rope(1000.0)


def derive(tree: Tree, theirs: Mapping[str, Any], where: str) -> Tree:
    """Refuses the config.json of nomic's own code, whose weights have the same names; every key of it would be passed over."""
    if "n_embd" in theirs:
        raise UserError(
            f"{where} has the keys of nomic's own code (n_embd, n_layer, n_head, n_inner, rotary_emb_base, …); this zoo reads "
            "those of transformers 5: hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, rope_parameters, …"
        )
    return _DERIVE(tree, theirs, where)


MASKED_LM = HeadMap(
    "masked_lm",
    bert.masked_lm("cls.predictions.transform.dense", "cls.predictions.transform.layer_norm", "cls.predictions.bias"),
    lambda tree: {"activation": gate_activation(tree), "norm_epsilon": tree["norm"]["epsilon"]},
    fields=(Setting("tie_word_embeddings", "tied", True, {True: True}),),
)

LAYER = "encoder.layers.{layer}."
NOMIC_BERT = Architecture(
    model_type="nomic_bert",
    prefix="nomic_bert.",
    template={
        "model": {"arrangement": "post_norm", "pooler": False, "pooler_bias": True, "use_bias": False},
        "encoding": {"name": "rope"},
        "mixer": {"name": "softmax"},
        "norm": {"name": "layernorm"},
    },
    settings=(
        Setting("vocab_size", "model.vocab_size", 30528),
        Setting("hidden_size", "model.model_dim", 768),
        Setting("num_hidden_layers", "model.num_layers", 12),
        Setting("num_attention_heads", "model.num_heads", 12),
        Setting("head_dim", "model.head_dim", None),
        Setting("hidden_act", "feed_forward", "silu", GATED),
        Setting("intermediate_size", "feed_forward.width", 3072),
        Setting("hidden_dropout_prob", "model.dropout", 0.0),
        Setting("attention_probs_dropout_prob", "model.attention_dropout", 0.0),
        Setting("max_position_embeddings", "model.max_length", 2048),
        Setting("type_vocab_size", "model.token_types", 2),
        Setting("initializer_range", "model.stddev", 0.02),
        Setting("layer_norm_eps", "norm.epsilon", 1e-12),
    ),
    derive=derive,
    recover=RECOVER,
    rules=lambda tree: (
        Rule("embeddings.word_embeddings.weight", "model/embeddings/token/embedding"),
        Rule("embeddings.token_type_embeddings.weight", "model/embeddings/token_type/embedding"),
        *norm("emb_ln", "model/embeddings/norm"),
        Rule(
            LAYER + "attn.Wqkv.weight",
            tuple(f"{{block}}/mixer/{part}/kernel" for part in ("query", "key", "value")),
            Fused(3),
        ),
        *dense(LAYER + "attn.out_proj", "{block}/mixer/output", bias=False),
        *norm(LAYER + "norm1", "{block}/norm_mixer"),
        *dense(LAYER + "mlp.fc11", "{block}/feed_forward/up", bias=False),
        *dense(LAYER + "mlp.fc12", "{block}/feed_forward/gate", bias=False),
        *dense(LAYER + "mlp.fc2", "{block}/feed_forward/down", bias=False),
        *norm(LAYER + "norm2", "{block}/norm_feed_forward"),
    ),
    pooler=bert.POOLER,
    classes={
        "NomicBertModel": (),
        "NomicBertForMaskedLM": ("masked_lm",),
        "NomicBertForSequenceClassification": ("classification",),
        "NomicBertForTokenClassification": ("token_tagging",),
    },
    heads=(MASKED_LM, bert.CLASSIFICATION, bert.TOKEN_TAGGING),
    tied=bert.tied("nomic_bert."),
    ignored=(*bert.IGNORED, *IGNORED),
)
