"""Published models as plain data: what a config starts from."""

from __future__ import annotations

import copy
from typing import Any

from zoo.errors import UserError, near


def _bert(layers: int, width: int, *, vocab_size: int, encoding: str, max_length: int = 512) -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": vocab_size,
            "model_dim": width,
            "num_heads": width // 64,
            "num_layers": layers,
            "max_length": max_length,
            "token_types": 2,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "arrangement": "post_norm",
        },
        "encoding": {"name": encoding},
        "mixer": {"name": "softmax"},
        "feed_forward": {"name": "gelu", "width": 4 * width},
        "norm": {"name": "layernorm", "epsilon": 1e-12},
    }


def _modernbert(layers: int, width: int, inner: int) -> dict[str, Any]:
    """Every third layer sees all tokens, those between them 64 to either side; the first has no norm before its mixer."""
    local = {"mixer": {"name": "softmax", "biases": (), "window": (64, 64)}, "encoding": {"name": "rope", "theta": 1e4}}
    return {
        "model": {
            "vocab_size": 50368,
            "model_dim": width,
            "num_heads": width // 64,
            "num_layers": layers,
            "max_length": 8192,
            "token_types": 0,
            "pooler": False,
            "pooler_activation": "gelu",
            "pooler_norm": True,
            "pooler_bias": False,
            "use_bias": False,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "arrangement": "pre_norm",
            "stages": (
                {"pattern": ({"arrangement": {"name": "pre_norm", "mixer_norm": False}},), "repeats": 1},
                {"pattern": (local, local, {}), "repeats": (layers - 1) // 3},
            ),
        },
        "encoding": {"name": "rope", "theta": 1.6e5},
        "mixer": {"name": "softmax", "biases": ()},
        "feed_forward": {"name": "geglu", "width": inner},
        "norm": {"name": "layernorm", "epsilon": 1e-5, "use_bias": False},
    }


def _deberta(layers: int, width: int, heads: int, *, version: int) -> dict[str, Any]:
    """v2 has a convolution beside its first block; `pooler` is the head of the classifiers."""
    published = _bert(layers, width, vocab_size=50265 if version == 1 else 128100, encoding="deberta")
    published["model"].update(num_heads=heads, token_types=0, pooler=False, pooler_activation="gelu")
    published["norm"]["epsilon"] = 1e-7
    if version == 1:
        published["mixer"]["biases"] = ("query", "value", "output")
        published["encoding"].update(buckets=None, share_projections=False, norm=False)
    if version == 2:
        beside = {"convolution": {"name": "convolution", "kernel": 3, "activation": "gelu"}}
        published["model"]["stages"] = ({"pattern": (beside,)}, {"pattern": ({},), "repeats": layers - 1})
    return published


def _fnet(layers: int, width: int) -> dict[str, Any]:
    parts = _bert(layers, width, vocab_size=32000, encoding="learned")
    parts["model"] |= {"num_heads": 1, "token_types": 4, "attention_dropout": 0.0, "embedding_projection": True}
    parts["mixer"] = {"name": "fourier", "pads": "tokens"}
    parts["feed_forward"]["approximate"] = True
    return parts


def _eurobert(layers: int, width: int, inner: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": 128256,
            "model_dim": width,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "num_layers": layers,
            "max_length": 8192,
            "token_types": 0,
            "embedding_norm": False,
            "pooler": False,
            "pooling": "late",
            "pooler_activation": "gelu",
            "pooler_bias": True,
            "use_bias": False,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "arrangement": "pre_norm",
        },
        "encoding": {"name": "rope", "theta": 2.5e5},
        "mixer": {"name": "softmax", "biases": ()},
        "feed_forward": {"name": "swiglu", "width": inner},
        "norm": {"name": "rmsnorm", "epsilon": 1e-5},
    }


def _neobert() -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": 30522,
            "model_dim": 768,
            "num_heads": 12,
            "num_layers": 28,
            "max_length": 4096,
            "token_types": 0,
            "embedding_norm": False,
            "pooler": False,
            "pooler_bias": True,
            "use_bias": False,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "arrangement": "pre_norm",
        },
        "encoding": {"name": "rope", "layout": "interleaved"},
        "mixer": {"name": "softmax"},
        "feed_forward": {"name": "swiglu", "width": 2048},
        "norm": {"name": "rmsnorm", "epsilon": 1e-5},
    }


def _mosaicbert() -> dict[str, Any]:
    made = _bert(12, 768, vocab_size=30528, encoding="alibi")
    made["model"]["attention_dropout"] = 0.0
    made["feed_forward"] = {"name": "geglu", "width": 3072, "up_bias": False}
    return made


def _nomic_bert() -> dict[str, Any]:
    made = _bert(12, 768, vocab_size=30528, encoding="rope", max_length=2048)
    made["model"] |= {"pooler": False, "pooler_bias": True, "use_bias": False, "dropout": 0.0, "attention_dropout": 0.0}
    made["encoding"]["theta"] = 1000.0
    made["feed_forward"] = {"name": "swiglu", "width": 3072}
    return made


def _convbert(layers: int, width: int) -> dict[str, Any]:
    parts = _bert(layers, width, vocab_size=30522, encoding="learned")
    parts["model"]["pooler"] = False
    parts["mixer"] = {"name": "mixed_attention", "pads": "tokens"}
    return parts


def _roberta(layers: int, width: int, *, vocab_size: int = 50265) -> dict[str, Any]:
    made = _bert(layers, width, vocab_size=vocab_size, encoding="learned")
    made["model"] |= {"token_types": 1, "pooler": False}
    made["encoding"]["offset"] = 2
    made["norm"]["epsilon"] = 1e-5
    return made


def _electra(layers: int, width: int, heads: int, *, embedding_dim: int | None = None) -> dict[str, Any]:
    made = _bert(layers, width, vocab_size=30522, encoding="learned")
    made["model"] |= {"num_heads": heads, "embedding_dim": embedding_dim, "pooler": False, "pooler_activation": "gelu"}
    return made


def _distilbert() -> dict[str, Any]:
    made = _bert(6, 768, vocab_size=30522, encoding="learned")
    made["model"] |= {"token_types": 0, "pooler": False, "pooler_activation": "relu"}
    return made


def _albert(layers: int, width: int, heads: int) -> dict[str, Any]:
    made = _bert(layers, width, vocab_size=30000, encoding="learned")
    made["model"] |= {"num_heads": heads, "embedding_dim": 128, "embedding_projection": True}
    made["model"] |= {"dropout": 0.0, "attention_dropout": 0.0}
    made["model"]["stages"] = ({"pattern": ({},), "repeats": layers, "share": True},)
    made["feed_forward"]["approximate"] = True
    return made


def _roformer(vocab_size: int, max_length: int) -> dict[str, Any]:
    made = _bert(12, 768, vocab_size=vocab_size, encoding="rope", max_length=max_length)
    made["model"] |= {"pooler": False, "pooler_activation": "gelu"}
    made["encoding"]["layout"] = "interleaved"
    return made


def _roformer_v2() -> dict[str, Any]:
    made = _roformer(12000, 512)
    made["model"] |= {"use_bias": False, "pooler_bias": True, "pooler_activation": "relu"}
    made["feed_forward"] = {"name": "relu", "width": 3072}
    made["norm"] = {"name": "rmsnorm", "epsilon": 1e-12, "use_scale": False}
    return made


_PRESETS = {
    # Devlin et al. 2018 (arXiv:1810.04805), section 3; English, uncased.
    "bert-base": _bert(12, 768, vocab_size=30522, encoding="learned"),
    "bert-large": _bert(24, 1024, vocab_size=30522, encoding="learned"),
    # The same architecture over the Chinese vocabulary.
    "bert-base-zh": _bert(12, 768, vocab_size=21128, encoding="learned"),
    # Turc et al. 2019 (arXiv:1908.08962), table 1.
    "bert-tiny": _bert(2, 128, vocab_size=30522, encoding="learned"),
    "bert-mini": _bert(4, 256, vocab_size=30522, encoding="learned"),
    "bert-small": _bert(4, 512, vocab_size=30522, encoding="learned"),
    "bert-medium": _bert(8, 512, vocab_size=30522, encoding="learned"),
    # Wei et al. 2019 (arXiv:1909.00204), section 3; Chinese.
    "nezha-base": _bert(12, 768, vocab_size=21128, encoding="nezha"),
    "nezha-large": _bert(24, 1024, vocab_size=21128, encoding="nezha"),
    # Liu et al. 2019 (arXiv:1907.11692), table 9; Conneau et al. 2020 (arXiv:1911.02116), table 6.
    "roberta-base": _roberta(12, 768),
    "roberta-large": _roberta(24, 1024),
    "xlm-roberta-base": _roberta(12, 768, vocab_size=250002),
    # Clark et al. 2020 (arXiv:2003.10555), table 6.
    "electra-small": _electra(12, 256, 4, embedding_dim=128),
    "electra-base": _electra(12, 768, 12),
    "electra-large": _electra(24, 1024, 16),
    # Sanh et al. 2019 (arXiv:1910.01108), section 3.
    "distilbert": _distilbert(),
    # Lan et al. 2020 (arXiv:1909.11942), table 1, as released without dropout (version 2).
    "albert-base": _albert(12, 768, 12),
    "albert-large": _albert(24, 1024, 16),
    "albert-xlarge": _albert(24, 2048, 16),
    "albert-xxlarge": _albert(12, 4096, 64),
    # Su et al. 2021 (arXiv:2104.09864), section 4.5: Chinese words; the released variants over characters, and version 2.
    "roformer-base-zh": _roformer(50000, 1536),
    "roformer-char-base-zh": _roformer(12000, 512),
    "roformer-v2-char-base-zh": _roformer_v2(),
    # He et al. 2020 (arXiv:2006.03654), table 8 and, for v2, the released configurations (xlarge, xxlarge).
    "deberta-base": _deberta(12, 768, 12, version=1),
    "deberta-large": _deberta(24, 1024, 16, version=1),
    "deberta-v2-xlarge": _deberta(24, 1536, 24, version=2),
    "deberta-v2-xxlarge": _deberta(48, 1536, 24, version=2),
    # He et al. 2021 (arXiv:2111.09543), section 5.1 and the released configurations.
    "deberta-v3-xsmall": _deberta(12, 384, 6, version=3),
    "deberta-v3-small": _deberta(6, 768, 12, version=3),
    "deberta-v3-base": _deberta(12, 768, 12, version=3),
    "deberta-v3-large": _deberta(24, 1024, 16, version=3),
    # Warner et al. 2024 (arXiv:2412.13663), section 2.1 and table 4; `pooler` is the head of its classifiers.
    "modernbert-base": _modernbert(22, 768, 1152),
    "modernbert-large": _modernbert(28, 1024, 2624),
    # Lee-Thorp et al. 2021 (arXiv:2105.03824), section 4.1 and its released checkpoints.
    "fnet-base": _fnet(12, 768),
    "fnet-large": _fnet(24, 1024),
    # Boizard et al. 2025 (arXiv:2503.05500), table 1; `pooler` is the head of its classifiers.
    "eurobert-210m": _eurobert(12, 768, 3072, 12, 12),
    "eurobert-610m": _eurobert(26, 1152, 4096, 18, 6),
    "eurobert-2.1b": _eurobert(32, 2304, 6144, 18, 6),
    # Le Breton et al. 2025 (arXiv:2502.19587), table 2; `pooler` is the head of its classifiers.
    "neobert": _neobert(),
    # Portes et al. 2023 (arXiv:2312.17482), section 3; the vocabulary of BERT rounded up.
    "mosaicbert-base": _mosaicbert(),
    # Nussbaum et al. 2024 (arXiv:2402.01613), section 4, in the sizes that the source library has of it.
    "nomic-bert-base": _nomic_bert(),
    # Jiang et al. 2020 (arXiv:2008.02496), table 3 and the released checkpoint, whose convolutions see padding.
    "convbert-base": _convbert(12, 768),
}


def names() -> tuple[str, ...]:
    return tuple(_PRESETS)


def preset(name: str) -> dict[str, Any]:
    """The config entries of a published model: model, encoding, mixer, feed_forward and norm.

    Raises:
      UserError: no such preset.
    """
    if name not in _PRESETS:
        raise UserError(f"unknown preset {name!r}; {near(name, _PRESETS)}")
    return copy.deepcopy(_PRESETS[name])
