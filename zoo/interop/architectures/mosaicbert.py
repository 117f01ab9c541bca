"""MosaicBERT (Portes et al. 2023, arXiv:2312.17482), as its authors' code computes it.

Its config.json calls it "bert"; here it is "mosaicbert".
"""

from __future__ import annotations

from zoo.interop.architecture import Architecture, HeadMap
from zoo.interop.architectures import bert
from zoo.interop.architectures.rotary import NAMES
from zoo.interop.key_map import Fused, Rule, dense, norm
from zoo.interop.settings import Setting

# The activation is of this head alone, and its norm has an epsilon of its own, 1e-12.
MASKED_LM = HeadMap(
    "masked_lm",
    bert.masked_lm(
        "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder.bias"
    ),
    fields=(Setting("hidden_act", "activation", "gelu", NAMES),),
)

MOSAICBERT = Architecture(
    model_type="mosaicbert",
    prefix="bert.",
    template={
        "model": {"arrangement": "post_norm", "pooler": False},
        "encoding": {"name": "alibi", "form": "symmetric"},
        "mixer": {"name": "softmax"},
        "feed_forward": {"name": "geglu", "approximate": False, "up_bias": False},
        "norm": {"name": "layernorm"},
    },
    settings=tuple(
        Setting(setting.theirs, setting.ours, 0.0) if setting.theirs == "attention_probs_dropout_prob" else setting
        for setting in bert.SETTINGS
        if setting.theirs != "hidden_act"
    ),
    rules=lambda tree: (
        *bert.EMBEDDINGS,
        *(
            Rule(
                bert.LAYER + f"attention.self.Wqkv.{theirs}",
                tuple(f"{{block}}/mixer/{part}/{ours}" for part in ("query", "key", "value")),
                Fused(3),
            )
            for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
        ),
        *dense(bert.LAYER + "attention.output.dense", "{block}/mixer/output"),
        *norm(bert.LAYER + "attention.output.LayerNorm", "{block}/norm_mixer"),
        Rule(
            bert.LAYER + "mlp.gated_layers.weight",
            tuple(f"{{block}}/feed_forward/{part}/kernel" for part in ("gate", "up")),
            Fused(2),
        ),
        *dense(bert.LAYER + "mlp.wo", "{block}/feed_forward/down"),
        *norm(bert.LAYER + "mlp.layernorm", "{block}/norm_feed_forward"),
    ),
    pooler=bert.POOLER,
    classes={
        "BertModel": (),
        "BertForMaskedLM": ("masked_lm",),
        "BertForSequenceClassification": ("classification",),
    },
    heads=(MASKED_LM, bert.CLASSIFICATION),
    tied={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
    ignored=bert.IGNORED,
)
