"""RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-RoBERTa (Conneau et al. 2020, arXiv:1911.02116): one graph, two vocabularies.

BERT's encoder. Positions begin at `pad_token_id` + 1 and count tokens, not padding; the rows before are of no token. The heads have
names of their own, and a classifier is dense, tanh and projection over the first token, without the encoder's pooler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import UserError
from zoo.interop.architecture import Architecture, HeadMap, Tree
from zoo.interop.architectures.bert import (
    ABSOLUTE,
    AROUND_ATTENTION,
    ATTENTION,
    EMBEDDINGS,
    ENCODER_ONLY,
    IGNORED,
    POOLER,
    POSITIONS,
    QUESTION_ANSWERING,
    SETTINGS,
    TEMPLATE,
    TIE,
    TOKEN_TAGGING,
    classes,
    classifier,
    masked_lm,
    with_defaults,
)
from zoo.interop.settings import Setting


def _positions(tree: Tree, theirs: Mapping[str, Any], where: str) -> Tree:
    """The rows before the first token's are no positions."""
    model, encoding = tree["model"], tree["encoding"]
    encoding["offset"] += 1
    model["max_length"] -= encoding["offset"]
    if encoding["offset"] < 1 or model["max_length"] < 1:
        raise UserError(
            f"{where}: positions begin at pad_token_id + 1 = {encoding['offset']}, which leaves no row of "
            f"max_position_embeddings={model['max_length'] + encoding['offset']}"
        )
    return tree


def _rows(tree: Tree) -> dict[str, Any] | None:
    if tree["encoding"]["name"] != "learned":
        return None
    offset = tree["encoding"]["offset"]
    return {"max_position_embeddings": tree["model"]["max_length"] + offset, "pad_token_id": offset - 1}


HEADS = (
    # The head has the exact GELU whatever the feed-forwards have.
    HeadMap(
        "masked_lm",
        masked_lm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight"),
        lambda tree: {"activation": "gelu", "norm_epsilon": tree["norm"]["epsilon"]},
        fields=(TIE,),
    ),
    classifier("classifier.dense", "classifier.out_proj", pooler_activation="tanh"),
    TOKEN_TAGGING,
    QUESTION_ANSWERING,
)


def _family(model_type: str, named: str, vocab_size: int) -> Architecture:
    return Architecture(
        model_type=model_type,
        prefix="roberta.",
        template=TEMPLATE,
        settings=(
            *with_defaults(SETTINGS, vocab_size=vocab_size),
            Setting("pad_token_id", "encoding.offset", 1),
            ABSOLUTE,
            *ENCODER_ONLY,
        ),
        rules=lambda tree: EMBEDDINGS + POSITIONS + ATTENTION + AROUND_ATTENTION,
        pooler=POOLER,
        classes=classes(named, pretraining=None),
        heads=HEADS,
        tied={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        ignored=IGNORED,
        derive=_positions,
        recover=_rows,
        own_positions=True,
    )


ROBERTA = _family("roberta", "Roberta", 50265)
XLM_ROBERTA = _family("xlm-roberta", "XLMRoberta", 30522)
