"""Models of the source library with random weights, what they compute, and the directories they save: one table for all.

Used by the comparison (`test_checkpoints.py`) and by the script that writes the golden files (`make_checkpoint_goldens.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

VOCABULARY = 41
REAL_TOKENS = (13, 9, 6)
LENGTH = 13


@dataclass(frozen=True)
class Case:
    """A class of the source library and the sizes to make it in.

    Attributes:
      model: its name there.
      config: the name of its config's class.
      sizes: the fields of the config.
      types: token types to draw; 0 gives none to the model.
    """

    model: str
    config: str
    sizes: Mapping[str, Any] = field(hash=False)
    types: int = 2


SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
)
OTHER = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=17,
    layer_norm_eps=0.01,
    hidden_act="gelu_new",
)
# Two layers of three see a window of two tokens to either side; in eight layers the pattern ends with a part of it.
MODERN = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=8,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
    local_attention=4,
    pad_token_id=1,
)
MODERN_OTHER = MODERN | dict(
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
    norm_eps=0.01,
    hidden_activation="gelu_new",
    classifier_activation="silu",
    norm_bias=True,
    mlp_bias=True,
    attention_bias=True,
    classifier_bias=True,
)
GROUPED = SMALL | dict(
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 250.0},
    pad_token_id=1,
)
DEBERTA = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}
# Rows reach further than the buckets.
BUCKETS = {"position_buckets": 4, "max_relative_positions": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
DEBERTA_V2 = DEBERTA | BUCKETS


def _without(sizes: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if name not in names}


LABELS = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}

UNTIED = {"tie_word_embeddings": False}
ONE_TYPE = {"type_vocab_size": 1}
NARROW = {"embedding_size": 12}
DISTIL = dict(
    vocab_size=VOCABULARY,
    dim=16,
    n_layers=2,
    n_heads=2,
    hidden_dim=24,
    max_position_embeddings=20,
    sinusoidal_pos_embds=True,
)

CASES: dict[str, Case] = {
    "bert": Case("BertForPreTraining", "BertConfig", SMALL),
    "bert, other": Case("BertForMaskedLM", "BertConfig", OTHER | {"type_vocab_size": 3}, types=3),
    "bert, encoder": Case("BertModel", "BertConfig", SMALL),
    "bert, classes": Case("BertForSequenceClassification", "BertConfig", SMALL | LABELS),
    "bert, tags": Case("BertForTokenClassification", "BertConfig", SMALL | LABELS),
    "deberta": Case("DebertaForMaskedLM", "DebertaConfig", SMALL | DEBERTA, types=0),
    "deberta, classes": Case(
        "DebertaForSequenceClassification",
        "DebertaConfig",
        OTHER
        | LABELS
        | DEBERTA
        | {"type_vocab_size": 2, "pos_att_type": ["c2p"], "pooler_hidden_act": "tanh", "max_relative_positions": 6},
    ),
    "deberta-v2": Case("DebertaV2ForMaskedLM", "DebertaV2Config", SMALL | DEBERTA_V2, types=0),
    "deberta-v2, classes": Case(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        OTHER | LABELS | DEBERTA_V2 | {"conv_kernel_size": 5, "conv_groups": 3, "conv_act": "gelu_new"},
        types=0,
    ),
    "deberta-v2, own projections": Case(
        "DebertaV2ForTokenClassification",
        "DebertaV2Config",
        SMALL | LABELS | DEBERTA | {"norm_rel_ebd": "none", "max_relative_positions": 9, "type_vocab_size": 1},
        types=1,
    ),
    "deberta-v2, names of the hub": Case(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        SMALL | DEBERTA_V2 | {"legacy": False, "share_att_key": False, "pos_att_type": ["p2c"], "conv_kernel_size": 3},
        types=0,
    ),
    "bert, answers": Case("BertForQuestionAnswering", "BertConfig", SMALL),
    # torch leaves the row of pad_token_id without a gradient, though padding is convolved like any token: none is drawn.
    "convbert": Case(
        "ConvBertForMaskedLM",
        "ConvBertConfig",
        SMALL | {"embedding_size": 16, "conv_kernel_size": 5, "pad_token_id": 0},
    ),
    "convbert, groups": Case(
        "ConvBertForSequenceClassification",
        "ConvBertConfig",
        OTHER
        | LABELS
        | {"embedding_size": 10, "num_groups": 2, "num_attention_heads": 4, "hidden_act": "gelu", "pad_token_id": 0},
    ),
    "fnet": Case("FNetForPreTraining", "FNetConfig", _without(SMALL, "num_attention_heads"), types=4),
    "fnet, classes": Case(
        "FNetForSequenceClassification", "FNetConfig", _without(OTHER, "num_attention_heads") | LABELS, types=4
    ),
    "modernbert": Case("ModernBertForMaskedLM", "ModernBertConfig", MODERN, types=0),
    "modernbert, other": Case(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        MODERN_OTHER | {"tie_word_embeddings": False, "decoder_bias": False},
        types=0,
    ),
    "modernbert, tags": Case(
        "ModernBertForTokenClassification", "ModernBertConfig", MODERN | LABELS | {"num_hidden_layers": 2}, types=0
    ),
    "eurobert": Case("EuroBertForMaskedLM", "EuroBertConfig", GROUPED, types=0),
    "eurobert, other": Case(
        "EuroBertForMaskedLM",
        "EuroBertConfig",
        GROUPED
        | dict(
            head_dim=6,
            rms_norm_eps=0.01,
            hidden_act="gelu",
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
        types=0,
    ),
    "eurobert, classes": Case("EuroBertForSequenceClassification", "EuroBertConfig", GROUPED | LABELS, types=0),
    "nomic_bert": Case("NomicBertForMaskedLM", "NomicBertConfig", SMALL),
    "nomic_bert, classes": Case(
        "NomicBertForSequenceClassification", "NomicBertConfig", OTHER | LABELS | {"head_dim": 6}
    ),
    "modernbert, classes": Case(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        MODERN_OTHER | LABELS | {"mlp_bias": False, "classifier_pooling": "mean"},
        types=0,
    ),
    "bert, untied": Case("BertForMaskedLM", "BertConfig", SMALL | UNTIED),
    "roberta": Case("RobertaForMaskedLM", "RobertaConfig", SMALL | ONE_TYPE, types=1),
    "roberta, other": Case("RobertaForSequenceClassification", "RobertaConfig", OTHER | {"pad_token_id": 3} | LABELS),
    "xlm-roberta": Case("XLMRobertaForMaskedLM", "XLMRobertaConfig", OTHER | ONE_TYPE, types=1),
    "xlm-roberta, tags": Case("XLMRobertaForTokenClassification", "XLMRobertaConfig", SMALL | LABELS),
    "electra": Case("ElectraForPreTraining", "ElectraConfig", SMALL | NARROW),
    "electra, generator": Case("ElectraForMaskedLM", "ElectraConfig", OTHER | NARROW),
    "electra, classes": Case(
        "ElectraForSequenceClassification", "ElectraConfig", SMALL | LABELS | {"embedding_size": 16}
    ),
    "distilbert": Case("DistilBertForMaskedLM", "DistilBertConfig", DISTIL, types=0),
    "distilbert, classes": Case(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        DISTIL | {"activation": "relu", "n_layers": 3} | LABELS,
        types=0,
    ),
    "albert": Case("AlbertForPreTraining", "AlbertConfig", SMALL | NARROW),
    "albert, other": Case("AlbertForMaskedLM", "AlbertConfig", OTHER | {"embedding_size": 24, "hidden_act": "relu"}),
    "albert, classes": Case("AlbertForSequenceClassification", "AlbertConfig", SMALL | NARROW | LABELS),
    "roformer": Case("RoFormerForMaskedLM", "RoFormerConfig", SMALL),
    "roformer, other": Case("RoFormerForMaskedLM", "RoFormerConfig", OTHER | NARROW),
    "roformer, classes": Case(
        "RoFormerForSequenceClassification", "RoFormerConfig", SMALL | {"hidden_act": "relu"} | LABELS
    ),
}


class Made(NamedTuple):
    """A model, its inputs, and its outputs by our names: hidden, pooled, logits, sentence_logits, those it has."""

    model: Any
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def make(case: Case, seed: int = 0) -> Made:
    """The model of a case with random weights, run on padded rows."""
    rng = np.random.default_rng(seed)
    config = getattr(transformers, case.config)(attn_implementation="eager", **_without_dropout(case), **case.sizes)
    model = getattr(transformers, case.model)(config).eval()
    perturb(model, rng)
    inputs = draw_inputs(rng, case.types)
    return Made(model, inputs, {name: tensor.detach().numpy() for name, tensor in run(model, inputs).items()})


def _without_dropout(case: Case) -> dict[str, float]:
    known = vars(getattr(transformers, case.config)())
    return {name: 0.0 for name in known if "dropout" in name and isinstance(known[name], float | int)}


def perturb(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Weights at random, none at its usual start: norms' scales around 1, biases not zero, kernels that keep the size of their input."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parameter.requires_grad:
                continue  # a fixed table
            values = rng.standard_normal(tuple(parameter.shape))
            if parameter.ndim == 1:
                values = 1 + 0.2 * values if name.endswith("weight") else 0.2 * values
            else:
                values *= 1.2 / np.sqrt(np.prod(parameter.shape[1:]))
            parameter.copy_(torch.tensor(values, dtype=torch.float32))


def draw_inputs(rng: np.random.Generator, types: int) -> dict[str, np.ndarray]:
    """Rows of odd lengths, padded on the right, of segments of every type."""
    real = (np.arange(LENGTH) < np.array(REAL_TOKENS)[:, None]).astype(np.int64)
    ids = rng.integers(5, VOCABULARY, real.shape)
    inputs = {"input_ids": ids * real + (1 - real), "attention_mask": real}
    if types:
        inputs["token_type_ids"] = np.sort(rng.integers(0, types, real.shape), axis=1) * real
    return inputs


def run(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What the model computes, by our names."""
    # FNet's takes no mask: padding is mixed in like any token.
    taken = inspect.signature(model.forward).parameters
    given = {name: torch.tensor(array) for name, array in inputs.items() if name in taken}
    out = model(**given, output_hidden_states=True)
    found = {"hidden": out.hidden_states[-1] if "last_hidden_state" not in out else out.last_hidden_state}
    for ours, theirs in (
        ("pooled", "pooler_output"),
        ("logits", "logits"),
        ("logits", "prediction_logits"),
        ("sentence_logits", "seq_relationship_logits"),
        ("sentence_logits", "sop_logits"),
    ):
        if theirs in out and out[theirs] is not None:
            found[ours] = out[theirs]
    if "start_logits" in out:
        found["logits"] = torch.stack([out.start_logits, out.end_logits], dim=-1)
    return found
