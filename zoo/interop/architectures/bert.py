"""BERT (Devlin et al. 2018, arXiv:1810.04805) and what is computed like it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.interop.architecture import Architecture, HeadMap, Tree
from zoo.interop.key_map import KERNEL, Rule, dense, norm
from zoo.interop.settings import Setting, must_be

# Their name of an activation → our feed-forward, the first that fits being written.
ACTIVATIONS = {
    "gelu": {"name": "gelu", "approximate": False},
    "gelu_new": {"name": "gelu", "approximate": True},
    "gelu_pytorch_tanh": {"name": "gelu", "approximate": True},
    "gelu_fast": {"name": "gelu", "approximate": True},
    "relu": {"name": "relu"},
    "silu": {"name": "silu"},
    "swish": {"name": "silu"},
}
TEMPLATE = {
    "model": {"arrangement": "post_norm", "pooler": False},
    "encoding": {"name": "learned"},
    "mixer": {"name": "softmax"},
    "norm": {"name": "layernorm"},
}
SETTINGS = (
    Setting("vocab_size", "model.vocab_size", 30522),
    Setting("hidden_size", "model.model_dim", 768),
    Setting("num_hidden_layers", "model.num_layers", 12),
    Setting("num_attention_heads", "model.num_heads", 12),
    Setting("hidden_act", "feed_forward", "gelu", ACTIVATIONS),
    Setting("intermediate_size", "feed_forward.width", 3072),
    Setting("hidden_dropout_prob", "model.dropout", 0.1),
    Setting("attention_probs_dropout_prob", "model.attention_dropout", 0.1),
    Setting("max_position_embeddings", "model.max_length", 512),
    Setting("type_vocab_size", "model.token_types", 2, least=1),
    Setting("initializer_range", "model.stddev", 0.02),
    Setting("layer_norm_eps", "norm.epsilon", 1e-12),
)
# A width of the embeddings of its own, and the projection behind it, as `narrow_embeddings` and `embedding_size` have it.
EMBEDDING_SIZE = Setting("embedding_size", "model.embedding_dim", 128)
ENCODER_ONLY = (must_be("is_decoder", False), must_be("add_cross_attention", False))
ABSOLUTE = must_be("position_embedding_type", "absolute")

EMBEDDINGS = (
    Rule("embeddings.word_embeddings.weight", "model/embeddings/token/embedding"),
    Rule("embeddings.token_type_embeddings.weight", "model/embeddings/token_type/embedding"),
    *norm("embeddings.LayerNorm", "model/embeddings/norm"),
)
EMBEDDINGS_PROJECTION = dense("embeddings_project", "model/embeddings/projection")
POSITIONS = (Rule("embeddings.position_embeddings.weight", "model/encodings/0/embedding/table"),)
LAYER = "encoder.layer.{layer}."
ATTENTION = (
    *dense(LAYER + "attention.self.query", "{block}/mixer/query"),
    *dense(LAYER + "attention.self.key", "{block}/mixer/key"),
    *dense(LAYER + "attention.self.value", "{block}/mixer/value"),
)
AROUND_ATTENTION = (
    *dense(LAYER + "attention.output.dense", "{block}/mixer/output"),
    *norm(LAYER + "attention.output.LayerNorm", "{block}/norm_mixer"),
    *dense(LAYER + "intermediate.dense", "{block}/feed_forward/up"),
    *dense(LAYER + "output.dense", "{block}/feed_forward/down"),
    *norm(LAYER + "output.LayerNorm", "{block}/norm_feed_forward"),
)
POOLER = dense("pooler.dense", "model/pooler")


def with_defaults(settings: Sequence[Setting], **defaults: Any) -> tuple[Setting, ...]:
    """The settings with other defaults for some keys."""
    return tuple(dataclasses.replace(s, default=defaults.get(s.theirs, s.default)) for s in settings)


def narrow_embeddings(tree: Tree, theirs: Mapping[str, Any], where: str) -> Tree:
    """Embeddings of the model's width are said as such, however the file says it."""
    if tree["model"]["embedding_dim"] == tree["model"]["model_dim"]:
        tree["model"]["embedding_dim"] = None
    return tree


def embedding_size(tree: Tree) -> dict[str, Any]:
    """The key that `narrow_embeddings` had."""
    return {"embedding_size": tree["model"]["embedding_dim"] or tree["model"]["model_dim"]}


def masked_lm(dense_: str, norm_: str, bias: str, table: str | None = None) -> tuple[Rule, ...]:
    """The rules of a masked-LM head with these names; a `table` of its own is there where it is not the token table."""
    return (
        *dense(dense_, "heads/masked_lm/dense"),
        *norm(norm_, "heads/masked_lm/norm"),
        Rule(bias, "heads/masked_lm/bias"),
        *(() if table is None else (Rule(table, "heads/masked_lm/table"),)),
    )


def linear(theirs: str, head: str) -> tuple[Rule, ...]:
    """The rules of a head that is one projection."""
    return (
        Rule(f"{theirs}.weight", f"heads/{head}/output/kernel", KERNEL),
        Rule(f"{theirs}.bias", f"heads/{head}/output/bias"),
    )


def activation(tree: Mapping[str, Any]) -> str:
    """The name of the activation of a model's feed-forwards."""
    return "gelu_tanh" if tree["feed_forward"].get("approximate") else tree["feed_forward"]["name"]


def masked_lm_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The masked-LM head of BERT has the activation of its feed-forwards and the epsilon of its norms."""
    return {"activation": activation(tree), "norm_epsilon": tree["norm"]["epsilon"]}


# Whether the output table of a masked-LM head is the token table.
TIE = Setting("tie_word_embeddings", "tied", True)


MASKED_LM = HeadMap(
    "masked_lm",
    masked_lm(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
    ),
    masked_lm_settings,
    fields=(TIE,),
)
CLASSIFICATION = HeadMap("classification", linear("classifier", "classification"))


def classifier(dense_: str, output: str, **pooler: Any) -> HeadMap:
    """A classifier of two projections, of which the first with its activation is our pooler.

    `pooler` are further entries of `model`, each a value or a function of our config.
    """

    def model(tree: Mapping[str, Any]) -> dict[str, Any]:
        return {"pooler": True} | {name: its(tree) if callable(its) else its for name, its in pooler.items()}

    return HeadMap("classification", (*dense(dense_, "model/pooler"), *linear(output, "classification")), model=model)


TOKEN_TAGGING = HeadMap("token_tagging", linear("classifier", "token_tagging"))
QUESTION_ANSWERING = HeadMap("question_answering", linear("qa_outputs", "question_answering"))
HEADS = (
    MASKED_LM,
    HeadMap("nsp", linear("cls.seq_relationship", "nsp")),
    CLASSIFICATION,
    TOKEN_TAGGING,
    QUESTION_ANSWERING,
)


def tied(prefix: str) -> dict[str, str]:
    """The output table of the masked-LM head is the token table, and its bias has two names."""
    return {
        "cls.predictions.decoder.weight": f"{prefix}embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


IGNORED = (r".*embeddings\.position_ids", r".*embeddings\.token_type_ids")


def classes(family: str, *, pretraining: tuple[str, ...] | None = ("masked_lm", "nsp")) -> dict[str, tuple[str, ...]]:
    """The classes of the source library and the heads of each, named after `family`."""
    return {
        f"{family}Model": (),
        **({} if pretraining is None else {f"{family}ForPreTraining": pretraining}),
        f"{family}ForMaskedLM": ("masked_lm",),
        f"{family}ForSequenceClassification": ("classification",),
        f"{family}ForTokenClassification": ("token_tagging",),
        f"{family}ForQuestionAnswering": ("question_answering",),
    }


BERT = Architecture(
    model_type="bert",
    prefix="bert.",
    template=TEMPLATE,
    settings=(*SETTINGS, ABSOLUTE, *ENCODER_ONLY),
    rules=lambda tree: EMBEDDINGS + POSITIONS + ATTENTION + AROUND_ATTENTION,
    pooler=POOLER,
    classes={**classes("Bert"), "BertForNextSentencePrediction": ("nsp",)},
    heads=HEADS,
    tied=tied("bert."),
    ignored=IGNORED,
)

NEZHA = Architecture(
    model_type="nezha",
    prefix="nezha.",
    template={**TEMPLATE, "encoding": {"name": "nezha"}},
    settings=(*SETTINGS, Setting("max_relative_position", "encoding.limit", 64), *ENCODER_ONLY),
    rules=lambda tree: EMBEDDINGS + ATTENTION + AROUND_ATTENTION,
    pooler=POOLER,
    classes={**classes("Nezha"), "NezhaForNextSentencePrediction": ("nsp",)},
    heads=HEADS,
    tied=tied("nezha."),
    ignored=(*IGNORED, r".*relative_positions_encoding\.positions_encoding"),
)
