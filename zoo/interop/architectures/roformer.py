"""RoFormer (Su et al. 2021, arXiv:2104.09864), and RoFormer v2 (Su et al. 2022), which only its authors' package computes.

v1 is BERT's encoder with rotary positions on interleaved pairs of channels, and without a pooler. Its file may hold the sinusoids, sines
before cosines, which say nothing that config.json does not.

v2 is told by `norm_type="rms_norm"` and `use_bias=false`, which the source library does not read: no projection of a block has a bias, every
norm is x / √(mean(x²) + ε) without a scale, and the masked-LM head is the token table alone. Its exported directory is for that package,
too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from zoo.errors import UserError
from zoo.interop.architecture import Architecture, HeadMap, Tree
from zoo.interop.architectures.bert import (
    AROUND_ATTENTION,
    ATTENTION,
    EMBEDDINGS,
    EMBEDDINGS_PROJECTION,
    ENCODER_ONLY,
    IGNORED,
    MASKED_LM,
    QUESTION_ANSWERING,
    SETTINGS,
    TEMPLATE,
    TOKEN_TAGGING,
    activation,
    classes,
    classifier,
    embedding_size,
    masked_lm_settings,
    narrow_embeddings,
    tied,
    with_defaults,
)
from zoo.interop.settings import Setting, must_be

NORMS = {"layer_norm": {"name": "layernorm"}, "rms_norm": {"name": "rmsnorm", "use_scale": False}}


def _checked(tree: Tree, theirs: Mapping[str, Any], where: str) -> Tree:
    tree = narrow_embeddings(tree, theirs, where)
    if tree["model"]["embedding_dim"] is not None and not tree["model"]["use_bias"]:
        raise UserError(
            f"{where}: embedding_size={tree['model']['embedding_dim']} with use_bias=false has a projection with a bias among those "
            "without, which this zoo has not"
        )
    return tree


def sinusoids(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The table of positions, `[max_position_embeddings, H]`: sin(p ω_m), then cos(p ω_m), ω_m = 10000^(−2m/H)."""
    model = tree["model"]
    width = model["model_dim"] // model["num_heads"]
    angles = np.arange(model["max_length"])[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return {"encoder.embed_positions.weight": table.astype(np.float32)}


def _caution(tree: Mapping[str, Any]) -> str:
    if tree["norm"]["name"] == "layernorm" and tree["model"]["use_bias"]:
        return ""
    return (
        "this is a RoFormer v2, which the authors' package `roformer` computes; transformers would load it as version 1"
    )


def _masked_lm_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    if tree["norm"]["name"] == "rmsnorm":
        return {"transform": False, "output_bias": False}
    return masked_lm_settings(tree)


ROFORMER = Architecture(
    model_type="roformer",
    prefix="roformer.",
    template={**TEMPLATE, "encoding": {"name": "rope", "layout": "interleaved"}},
    settings=(
        # First: it says which norm has the epsilon.
        Setting("norm_type", "norm", "layer_norm", NORMS),
        *with_defaults(SETTINGS, vocab_size=50000, max_position_embeddings=1536),
        Setting("embedding_size", "model.embedding_dim", None),
        Setting("use_bias", "model.use_bias", True),
        must_be("rotary_value", False),
        *ENCODER_ONLY,
    ),
    rules=lambda tree: EMBEDDINGS + EMBEDDINGS_PROJECTION + ATTENTION + AROUND_ATTENTION,
    classes=classes("RoFormer", pretraining=None),
    heads=(
        HeadMap("masked_lm", MASKED_LM.rules, _masked_lm_settings, fields=MASKED_LM.fields),
        classifier("classifier.dense", "classifier.out_proj", pooler_activation=activation, pooler_bias=True),
        TOKEN_TAGGING,
        QUESTION_ANSWERING,
    ),
    tied=tied("roformer."),
    ignored=IGNORED,
    derive=_checked,
    recover=embedding_size,
    caution=_caution,
    constants=sinusoids,
)
