"""Which parameter of PyTorch's BERT, NEZHA and ConvBERT is which of ours, written out.

A converter must read any checkpoint and belongs in the library; this table reads exactly the modules that tests make.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flax.traverse_util import unflatten_dict

# (theirs, ours, how). torch keeps a kernel as [out, in] and we as [in, out]: "T" transposes, and "squeeze, T" leaves axes of one
# out before. `{family}` is "bert", "nezha" or "convbert", `{layer}` counts their layers; ours are stacked along a leading axis. A tied decoder is no parameter of its own.
OUTSIDE_LAYERS = (
    ("{family}.embeddings.word_embeddings.weight", "model/embeddings/token/embedding", "="),
    ("{family}.embeddings.position_embeddings.weight", "model/encodings/0/embedding/table", "="),
    ("{family}.embeddings.token_type_embeddings.weight", "model/embeddings/token_type/embedding", "="),
    ("{family}.embeddings.LayerNorm.weight", "model/embeddings/norm/scale", "="),
    ("{family}.embeddings.LayerNorm.bias", "model/embeddings/norm/bias", "="),
    ("{family}.pooler.dense.weight", "model/pooler/kernel", "T"),
    ("{family}.pooler.dense.bias", "model/pooler/bias", "="),
    ("cls.predictions.transform.dense.weight", "heads/masked_lm/dense/kernel", "T"),
    ("cls.predictions.transform.dense.bias", "heads/masked_lm/dense/bias", "="),
    ("cls.predictions.transform.LayerNorm.weight", "heads/masked_lm/norm/scale", "="),
    ("cls.predictions.transform.LayerNorm.bias", "heads/masked_lm/norm/bias", "="),
    ("cls.predictions.bias", "heads/masked_lm/bias", "="),
    ("cls.seq_relationship.weight", "heads/nsp/output/kernel", "T"),
    ("cls.seq_relationship.bias", "heads/nsp/output/bias", "="),
)
LAYER = "{family}.encoder.layer.{layer}."
BLOCK = "model/stage_0/block_0/"
IN_A_LAYER = (
    ("attention.self.query.weight", "mixer/query/kernel", "T"),
    ("attention.self.query.bias", "mixer/query/bias", "="),
    ("attention.self.key.weight", "mixer/key/kernel", "T"),
    ("attention.self.key.bias", "mixer/key/bias", "="),
    ("attention.self.value.weight", "mixer/value/kernel", "T"),
    ("attention.self.value.bias", "mixer/value/bias", "="),
    ("attention.output.dense.weight", "mixer/output/kernel", "T"),
    ("attention.output.dense.bias", "mixer/output/bias", "="),
    ("attention.output.LayerNorm.weight", "norm_mixer/scale", "="),
    ("attention.output.LayerNorm.bias", "norm_mixer/bias", "="),
    ("intermediate.dense.weight", "feed_forward/up/kernel", "T"),
    ("intermediate.dense.bias", "feed_forward/up/bias", "="),
    ("output.dense.weight", "feed_forward/down/kernel", "T"),
    ("output.dense.bias", "feed_forward/down/bias", "="),
    ("output.LayerNorm.weight", "norm_feed_forward/scale", "="),
    ("output.LayerNorm.bias", "norm_feed_forward/bias", "="),
)
# What ConvBERT has beside: a span-based dynamic convolution, and in groups the same layout as ours.
CONVOLUTION = (
    ("attention.self.key_conv_attn_layer.depthwise.weight", "mixer/key_depthwise/kernel", "squeeze, T"),
    ("attention.self.key_conv_attn_layer.pointwise.weight", "mixer/key_pointwise/kernel", "squeeze, T"),
    ("attention.self.key_conv_attn_layer.bias", "mixer/key_pointwise/bias", "squeeze, T"),
    ("attention.self.conv_kernel_layer.weight", "mixer/filter/kernel", "T"),
    ("attention.self.conv_kernel_layer.bias", "mixer/filter/bias", "="),
    ("attention.self.conv_out_layer.weight", "mixer/convolution_value/kernel", "T"),
    ("attention.self.conv_out_layer.bias", "mixer/convolution_value/bias", "="),
)
GROUPED = {
    "intermediate.dense.weight": ("feed_forward/up/group_kernels", "="),
    "output.dense.weight": ("feed_forward/down/group_kernels", "="),
}


def convbert_layer(groups: int) -> tuple[tuple[str, str, str], ...]:
    """The table of a layer of ConvBERT."""
    in_a_layer = IN_A_LAYER + CONVOLUTION
    return in_a_layer if groups == 1 else tuple((row[0], *GROUPED.get(row[0], row[1:])) for row in in_a_layer)


def to_ours(
    theirs: Mapping[str, np.ndarray],
    family: str,
    layers: int,
    in_a_layer: tuple[tuple[str, str, str], ...] = IN_A_LAYER,
) -> dict:
    """Their parameters, or gradients of them, by name → our parameter tree. Every given array must have a place."""
    left = dict(theirs)

    def take(name: str, how: str) -> np.ndarray:
        array = left.pop(name)
        array = array.squeeze() if how.startswith("squeeze") else array
        return array.T if how.endswith("T") else array

    ours = {}
    for their, our, how in OUTSIDE_LAYERS:
        name = their.format(family=family)
        if name in left:
            ours[our] = take(name, how)
    for their, our, how in in_a_layer:
        names = [LAYER.format(family=family, layer=layer) + their for layer in range(layers)]
        ours[BLOCK + our] = np.stack([take(name, how) for name in names])
    assert not left, f"these have no place in our tree: {sorted(left)}"
    return unflatten_dict({tuple(name.split("/")): array for name, array in ours.items()})
