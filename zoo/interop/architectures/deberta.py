"""DeBERTa (He et al. 2020, arXiv:2006.03654), v2 and v3 (He et al. 2021, arXiv:2111.09543)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zoo.errors import UserError
from zoo.interop.architecture import Architecture, HeadMap, Tree
from zoo.interop.architectures import bert
from zoo.interop.key_map import CONVOLUTION, KERNEL, Fused, Rule, dense, norm
from zoo.interop.settings import Setting, must_be

# Their name of an activation → ours, the first that fits being written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
TERMS = ("c2p", "p2c")
# Fields of the convolution → their key and what the source library takes without it.
CONVOLUTION_KEYS = {"kernel": ("conv_kernel_size", 0), "groups": ("conv_groups", 1), "activation": ("conv_act", "tanh")}

ATTENTION = "encoder.layer.{layer}.attention.self."
OWN = "{block}/mixer/encoding_0/"
SHARED = "model/encodings/0/shared/"
FIRST = "model/stage_0/block_0/"


def _settings(**defaults: Any) -> tuple[Setting, ...]:
    """What both versions have, with the `defaults` of one in the place of BERT's."""
    defaults = {"type_vocab_size": 0, "layer_norm_eps": 1e-7, **defaults}
    return (
        # The table of token types may be missing.
        *(dataclasses.replace(s, least=None) for s in bert.with_defaults(bert.SETTINGS, **defaults)),
        Setting("pooler_hidden_act", "model.pooler_activation", "gelu", ACTIVATIONS),
        # Where these are not said, the source library takes the model that we do not have.
        Setting("relative_attention", None, False, {True: True}),
        Setting("position_biased_input", None, True, {False: False}),
    )


def _derived(tree: Tree, theirs: Mapping[str, Any], where: str) -> Tree:
    """The encoding, and the widths that the source library lets differ from ours."""
    model, encoding = tree["model"], tree["encoding"]
    for key in ("embedding_size", "pooler_hidden_size"):
        _equal(theirs, key, model["model_dim"], "hidden_size", where)
    _equal(theirs, "attention_head_size", model["model_dim"] // model["num_heads"], "hidden_size / heads", where)
    terms = theirs.get("pos_att_type")
    terms = [term.strip() for term in terms.lower().split("|")] if isinstance(terms, str) else terms
    if not terms or not isinstance(terms, list) or sorted(set(terms) & set(TERMS)) != sorted(terms):
        raise UserError(
            f"{where}: pos_att_type={theirs.get('pos_att_type')!r} is not among what this zoo computes: "
            "'c2p', 'p2c' or both, each once"
        )
    furthest = _integer(theirs, "max_relative_positions", where)
    encoding.update(
        c2p="c2p" in terms,
        p2c="code" if "p2c" in terms else "none",
        max_distance=model["max_length"] if furthest < 1 else furthest,
        norm_epsilon=tree["norm"]["epsilon"],
        stddev=model["stddev"],
    )
    return tree


def _recovered(tree: Tree) -> dict[str, Any] | None:
    encoding = tree["encoding"]
    if not isinstance(encoding, Mapping) or encoding["name"] != "deberta":
        return None
    furthest = encoding["max_distance"]
    return {
        "pos_att_type": ["c2p"] * encoding["c2p"] + ["p2c"] * (encoding["p2c"] != "none"),
        "max_relative_positions": -1 if furthest == tree["model"]["max_length"] else furthest,
    }


def _derived_v2(tree: Tree, theirs: Mapping[str, Any], where: str) -> Tree:
    """Buckets, the bias of an own projection of keys, and the convolution beside the first block."""
    encoding, model = _derived(tree, theirs, where)["encoding"], tree["model"]
    buckets = _integer(theirs, "position_buckets", where)
    encoding["buckets"] = buckets if buckets > 0 else None
    encoding["key_bias"] = encoding["c2p"] and not encoding["share_projections"]
    fields = {ours: theirs.get(key, default) for ours, (key, default) in CONVOLUTION_KEYS.items()}
    if _integer(theirs, "conv_kernel_size", where, 0) > 0:
        if fields["activation"] not in ACTIVATIONS:
            raise UserError(f"{where}: conv_act={fields['activation']!r} is none of {', '.join(ACTIVATIONS)}")
        fields = {"name": "convolution", **fields, "activation": ACTIVATIONS[fields["activation"]]}
        rest = model["num_layers"] - 1
        stages = ({"pattern": ({"convolution": fields},)}, {"pattern": ({},), "repeats": rest})
        model["stages"] = stages[: 1 + (rest > 0)]
    return tree


def _recovered_v2(tree: Tree) -> dict[str, Any] | None:
    recovered = _recovered(tree)
    if recovered is None:
        return None
    recovered["position_buckets"] = tree["encoding"]["buckets"] or -1
    beside = _convolution(tree)
    if beside is not None:
        for ours, (key, _) in CONVOLUTION_KEYS.items():
            recovered[key] = beside[ours]
        recovered["conv_act"] = next(name for name, ours in ACTIVATIONS.items() if ours == beside["activation"])
    return recovered


def _convolution(tree: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The convolution beside the first block; whatever else the stages have shows when the settings are read again."""
    stages = tree["model"].get("stages") or ()
    beside = stages[0]["pattern"][0].get("convolution") if stages else None
    return None if beside is None else {"kernel": 3, "groups": 1, "activation": "tanh", **beside}


def _equal(theirs: Mapping[str, Any], key: str, wanted: int, name: str, where: str) -> None:
    if theirs.get(key, wanted) != wanted:
        raise UserError(f"{where}: {key}={theirs[key]!r} is not {name}={wanted}, the only width that this zoo has here")


def _integer(theirs: Mapping[str, Any], key: str, where: str, default: int = -1) -> int:
    value = theirs.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: {key} must be an integer, but is {value!r}")
    return value


def _rules(attention: Callable[[Mapping[str, Any]], Sequence[Rule]]) -> Callable[[Mapping[str, Any]], Sequence[Rule]]:
    return lambda tree: (
        *bert.EMBEDDINGS,
        Rule("encoder.rel_embeddings.weight", SHARED + "table"),
        *attention(tree),
        *bert.AROUND_ATTENTION,
    )


def _v1(tree: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Query, key and value head by head in one tensor, the biases of queries and values beside it."""
    three = tuple(f"{{block}}/mixer/{name}/kernel" for name in ("query", "key", "value"))
    return (
        Rule(ATTENTION + "in_proj.weight", three, Fused(3, tree["model"]["num_heads"])),
        Rule(ATTENTION + "q_bias", "{block}/mixer/query/bias"),
        Rule(ATTENTION + "v_bias", "{block}/mixer/value/bias"),
        Rule(ATTENTION + "pos_proj.weight", OWN + "key/kernel", KERNEL),
        *dense(ATTENTION + "pos_q_proj", OWN + "query"),
    )


def _v2(tree: Mapping[str, Any]) -> tuple[Rule, ...]:
    return (
        *(
            rule
            for name in ("query", "key", "value")
            for rule in dense(ATTENTION + f"{name}_proj", f"{{block}}/mixer/{name}")
        ),
        *dense(ATTENTION + "pos_key_proj", OWN + "key"),
        *dense(ATTENTION + "pos_query_proj", OWN + "query"),
        *norm("encoder.LayerNorm", SHARED + "norm"),
        Rule("encoder.conv.conv.weight", "{block}/convolution/kernel", CONVOLUTION),
        Rule("encoder.conv.conv.bias", "{block}/convolution/bias"),
        *norm("encoder.conv.LayerNorm", "{block}/norm_convolution"),
    )


HUB = "lm_predictions.lm_head."
HEADS = (
    dataclasses.replace(bert.MASKED_LM, other=bert.masked_lm(HUB + "dense", HUB + "LayerNorm", HUB + "bias")),
    bert.classifier("pooler.dense", "classifier"),
    bert.TOKEN_TAGGING,
    bert.QUESTION_ANSWERING,
)
DISCRIMINATOR = HeadMap(
    "discriminator",
    (
        *dense("mask_predictions.dense", "heads/discriminator/dense"),
        *norm("mask_predictions.LayerNorm", "heads/discriminator/norm"),
        *bert.linear("mask_predictions.classifier", "discriminator"),
    ),
    bert.masked_lm_settings,
)
# The enhanced mask decoder of pretraining has positions, which no model of the source library reads.
IGNORED = (*bert.IGNORED, r".*embeddings\.position_embeddings\..*")

DEBERTA = Architecture(
    model_type="deberta",
    prefix="deberta.",
    template={
        **bert.TEMPLATE,
        "encoding": {"name": "deberta", "buckets": None, "norm": False, "share_projections": False},
        "mixer": {"name": "softmax", "biases": ("query", "value", "output")},
    },
    settings=(*_settings(vocab_size=50265), must_be("talking_head", False), must_be("position_buckets", -1)),
    rules=_rules(_v1),
    classes=bert.classes("Deberta", pretraining=None),
    heads=HEADS,
    tied=bert.tied("deberta."),
    ignored=IGNORED,
    derive=_derived,
    recover=_recovered,
)

V2 = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
}
DEBERTA_V2 = Architecture(
    model_type="deberta-v2",
    prefix="deberta.",
    template={**bert.TEMPLATE, "encoding": {"name": "deberta"}},
    settings=(
        *_settings(**V2),
        Setting("share_att_key", "encoding.share_projections", False),
        Setting("norm_rel_ebd", "encoding.norm", "none", {"none": False, "layer_norm": True}),
    ),
    rules=_rules(_v2),
    classes=bert.classes("DebertaV2", pretraining=None),
    heads=(*HEADS, DISCRIMINATOR),
    beside=("discriminator",),
    tied=bert.tied("deberta."),
    ignored=IGNORED,
    derive=_derived_v2,
    recover=_recovered_v2,
)
