"""ConvBERT (Jiang et al. 2020, arXiv:2008.02496): BERT whose attention is half softmax heads, half span-based dynamic convolution."""

from __future__ import annotations

from zoo.interop.architecture import Architecture
from zoo.interop.architectures.bert import (
    AROUND_ATTENTION,
    ATTENTION,
    EMBEDDING_SIZE,
    EMBEDDINGS,
    EMBEDDINGS_PROJECTION,
    ENCODER_ONLY,
    IGNORED,
    LAYER,
    POSITIONS,
    QUESTION_ANSWERING,
    SETTINGS,
    TEMPLATE,
    TOKEN_TAGGING,
    activation,
    classes,
    classifier,
    embedding_size,
    narrow_embeddings,
    with_defaults,
)
from zoo.interop.architectures.electra import GENERATOR
from zoo.interop.key_map import Rule, Squeezed, dense
from zoo.interop.settings import Setting

_SELF = LAYER + "attention.self."
CONVOLUTION = (
    Rule(_SELF + "key_conv_attn_layer.depthwise.weight", "{block}/mixer/key_depthwise/kernel", Squeezed((1,))),
    Rule(_SELF + "key_conv_attn_layer.pointwise.weight", "{block}/mixer/key_pointwise/kernel", Squeezed((2,))),
    Rule(_SELF + "key_conv_attn_layer.bias", "{block}/mixer/key_pointwise/bias", Squeezed((1,))),
    *dense(_SELF + "conv_kernel_layer", "{block}/mixer/filter"),
    *dense(_SELF + "conv_out_layer", "{block}/mixer/convolution_value"),
)
# Where num_groups is more than one: a matrix for each group, of the axes of ours.
GROUPED = (
    Rule(LAYER + "intermediate.dense.weight", "{block}/feed_forward/up/group_kernels"),
    Rule(LAYER + "output.dense.weight", "{block}/feed_forward/down/group_kernels"),
)

CONVBERT = Architecture(
    model_type="convbert",
    prefix="convbert.",
    # As it was trained: the convolutions see what stands at padding.
    template={**TEMPLATE, "mixer": {"name": "mixed_attention", "pads": "tokens"}},
    settings=(
        *SETTINGS,
        *with_defaults((EMBEDDING_SIZE,), embedding_size=768),
        Setting("head_ratio", "mixer.head_ratio", 2),
        Setting("conv_kernel_size", "mixer.width", 9),
        Setting("num_groups", "feed_forward.groups", 1),
        *ENCODER_ONLY,
    ),
    rules=lambda tree: (
        EMBEDDINGS + EMBEDDINGS_PROJECTION + POSITIONS + ATTENTION + CONVOLUTION + AROUND_ATTENTION + GROUPED
    ),
    classes=classes("ConvBert", pretraining=None),
    heads=(
        GENERATOR,
        classifier("classifier.dense", "classifier.out_proj", pooler_activation=activation),
        TOKEN_TAGGING,
        QUESTION_ANSWERING,
    ),
    tied={"generator_lm_head.weight": "convbert.embeddings.word_embeddings.weight"},
    ignored=IGNORED,
    derive=narrow_embeddings,
    recover=embedding_size,
)
