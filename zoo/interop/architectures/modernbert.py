"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): pre-norm, rotary, gated, with windows in two layers of three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.errors import UserError, near
from zoo.interop.architecture import Architecture, HeadMap, Tree
from zoo.interop.architectures.bert import linear
from zoo.interop.architectures.rotary import GATED, IGNORED, NAMES, parameters, theta_in
from zoo.interop.key_map import Fused, Rule, dense, norm
from zoo.interop.settings import Setting, read

FULL, SLIDING = "full_attention", "sliding_attention"
EVERY, THETA = 3, {FULL: 160_000.0, SLIDING: 10_000.0}
_DEPTH = (
    Setting("local_attention", "local_attention", 128),
    Setting("global_attn_every_n_layers", "every", EVERY),
    Setting("global_rope_theta", FULL, THETA[FULL]),
    Setting("local_rope_theta", SLIDING, THETA[SLIDING]),
)


def derive(tree: Tree, theirs: Mapping[str, Any], where: str) -> Tree:
    """Enters the depth: which layers see all tokens and which a window, each kind with its own rotary base."""
    depth = read(_DEPTH, theirs, {}, where)
    types = theirs.get("layer_types")
    layers = tree["model"]["num_layers"]
    if types is None:
        types = [SLIDING if layer % depth["every"] else FULL for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not set(types) <= set(THETA):
        raise UserError(
            f"{where}: layer_types must name {FULL} or {SLIDING} for each of {layers} layers, not {types!r}"
        )
    nested = theirs.get("rope_parameters") or {}
    unknown = [name for name in nested if name not in THETA]
    if unknown or theirs.get("rope_scaling"):
        name = unknown[0] if unknown else "rope_scaling"
        raise UserError(f"{where}: rope_parameters are by kind of layer, {near(name, THETA)}; {name!r} is not read")
    base = {kind: theta_in(nested.get(kind) or {}, depth[kind], f"{where}: rope_parameters.{kind}") for kind in THETA}
    half = depth["local_attention"] // 2
    blocks = {
        FULL: {},
        SLIDING: {
            "mixer": {**tree["mixer"], "window": (half, half)},
            "encoding": {"name": "rope", "theta": base[SLIDING]},
        },
    }
    first = {**blocks[types[0]], "arrangement": {"name": "pre_norm", "mixer_norm": False}}
    stages = [{"pattern": (first,), "repeats": 1}]
    for pattern, repeats in repeated(types[1:]):
        stages.append({"pattern": tuple(blocks[kind] for kind in pattern), "repeats": repeats})
    tree["model"]["stages"] = tuple(stages)
    tree["encoding"] = {"name": "rope", "theta": base[FULL]}
    return tree


def repeated(types: Sequence[str]) -> list[tuple[tuple[str, ...], int]]:
    """The shortest pattern that gives the types when repeated, how often it is whole, and then the part that is left."""
    if not types:
        return []
    size = next(n for n in range(1, len(types) + 1) if all(types[i] == types[i % n] for i in range(len(types))))
    rest = tuple(types[len(types) - len(types) % size :])
    return [(tuple(types[:size]), len(types) // size)] + ([(rest, 1)] if rest else [])


def recover(tree: Tree) -> dict[str, Any] | None:
    """The keys of the depth, in the words of transformers 5 and of those before it; None for a model of one pattern."""
    blocks = [
        block for stage in tree["model"]["stages"] for _ in range(stage.get("repeats", 1)) for block in stage["pattern"]
    ]
    if not blocks or tree["encoding"].get("name") != "rope":
        return None
    types, local, half = [], THETA[SLIDING], 64
    for block in blocks:
        window = block.get("mixer", tree["mixer"]).get("window")
        types.append(FULL if window is None else SLIDING)
        if window is not None:
            half, local = window[0], block.get("encoding", tree["encoding"]).get("theta")
    every = next(
        (n for n in range(1, len(types) + 1) if types == [SLIDING if i % n else FULL for i in range(len(types))]), None
    )
    return {
        "layer_types": types,
        "local_attention": 2 * half,
        "rope_parameters": {FULL: parameters(tree["encoding"]["theta"]), SLIDING: parameters(local)},
        "global_rope_theta": tree["encoding"]["theta"],
        "local_rope_theta": local,
        **({} if every is None else {"global_attn_every_n_layers": every}),
    }


def transform(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The dense layer of the heads over tokens has the bias of the classifiers, their norm that of all norms; ours both or none."""
    bias = tree["model"]["pooler_bias"]
    if bias != tree["norm"]["use_bias"]:
        raise UserError(
            f"a head over tokens with classifier_bias={bias} and norm_bias={tree['norm']['use_bias']} is not among what this zoo "
            "computes: both or none have a bias"
        )
    return {
        "transform": True,
        "activation": tree["model"]["pooler_activation"],
        "norm_epsilon": tree["norm"]["epsilon"],
        "transform_bias": bias,
    }


MASKED_LM = HeadMap(
    "masked_lm",
    (
        *dense("head.dense", "heads/masked_lm/dense"),
        *norm("head.norm", "heads/masked_lm/norm"),
        Rule("decoder.bias", "heads/masked_lm/bias"),
        Rule("decoder.weight", "heads/masked_lm/table"),
    ),
    transform,
    fields=(Setting("decoder_bias", "output_bias", True), Setting("tie_word_embeddings", "tied", True)),
)
CLASSIFICATION = HeadMap(
    "classification",
    (
        *dense("head.dense", "model/pooler"),
        *norm("head.norm", "model/pooler_norm"),
        *linear("classifier", "classification"),
    ),
    model=lambda tree: {"pooler": True},
)
OVER_TOKENS = tuple(
    HeadMap(
        name,
        (
            *dense("head.dense", f"heads/{name}/dense"),
            *norm("head.norm", f"heads/{name}/norm"),
            *linear("classifier", name),
        ),
        transform,
    )
    for name in ("token_tagging", "question_answering")
)

LAYER = "layers.{layer}."
MODERNBERT = Architecture(
    model_type="modernbert",
    prefix="model.",
    # The rates of dropout behind the embeddings and inside the feed-forwards (embedding_dropout, mlp_dropout) change training
    # alone, and are 0 in every published file: they are not read.
    template={
        "model": {"arrangement": "pre_norm", "pooler": False, "pooler_norm": True, "token_types": 0, "dropout": 0.0},
        "encoding": {"name": "rope"},
        "mixer": {"name": "softmax"},
        "norm": {"name": "layernorm"},
    },
    settings=(
        Setting("vocab_size", "model.vocab_size", 50368),
        Setting("hidden_size", "model.model_dim", 768),
        Setting("num_hidden_layers", "model.num_layers", 22),
        Setting("num_attention_heads", "model.num_heads", 12),
        Setting("hidden_activation", "feed_forward", "gelu", GATED),
        Setting("intermediate_size", "feed_forward.width", 1152),
        Setting("attention_dropout", "model.attention_dropout", 0.0),
        Setting("max_position_embeddings", "model.max_length", 8192),
        Setting("initializer_range", "model.stddev", 0.02),
        Setting("norm_eps", "norm.epsilon", 1e-5),
        Setting("norm_bias", "norm.use_bias", False),
        Setting("mlp_bias", "model.use_bias", False),
        Setting("attention_bias", "mixer.biases", False, {False: (), True: ("query", "key", "value", "output")}),
        Setting("classifier_bias", "model.pooler_bias", False),
        Setting("classifier_activation", "model.pooler_activation", "gelu", NAMES),
        Setting("classifier_pooling", "model.pooling", "cls", {"cls": "first", "mean": "mean"}),
    ),
    derive=derive,
    recover=recover,
    rules=lambda tree: (
        Rule("embeddings.tok_embeddings.weight", "model/embeddings/token/embedding"),
        *norm("embeddings.norm", "model/embeddings/norm"),
        *norm(LAYER + "attn_norm", "{block}/norm_mixer"),
        *(
            Rule(
                LAYER + f"attn.Wqkv.{theirs}",
                tuple(f"{{block}}/mixer/{part}/{ours}" for part in ("query", "key", "value")),
                Fused(3),
            )
            for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
        ),
        *dense(LAYER + "attn.Wo", "{block}/mixer/output"),
        *norm(LAYER + "mlp_norm", "{block}/norm_feed_forward"),
        *(
            Rule(
                LAYER + f"mlp.Wi.{theirs}",
                tuple(f"{{block}}/feed_forward/{part}/{ours}" for part in ("gate", "up")),
                Fused(2),
            )
            for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
        ),
        *dense(LAYER + "mlp.Wo", "{block}/feed_forward/down"),
        *norm("final_norm", "model/final_norm"),
    ),
    classes={
        "ModernBertModel": (),
        "ModernBertForMaskedLM": ("masked_lm",),
        "ModernBertForSequenceClassification": ("classification",),
        "ModernBertForTokenClassification": ("token_tagging",),
        "ModernBertForQuestionAnswering": ("question_answering",),
    },
    heads=(MASKED_LM, CLASSIFICATION, *OVER_TOKENS),
    tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    ignored=IGNORED,
)
