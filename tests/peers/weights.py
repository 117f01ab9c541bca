"""Which parameter of PyTorch's BERT and NEZHA is which of ours, written out.

A converter must read any checkpoint and belongs in the library; this table reads exactly the modules that tests make.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flax.traverse_util import unflatten_dict

# (theirs, ours, how). torch keeps a kernel as [out, in] and we as [in, out]: "T" transposes. `{family}` is "bert" or "nezha",
# `{layer}` counts their layers; ours are stacked along a leading axis. A tied decoder is no parameter of its own.
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


def to_ours(theirs: Mapping[str, np.ndarray], family: str, layers: int) -> dict:
    """Their parameters, or gradients of them, by name → our parameter tree. Every given array must have a place."""
    left = dict(theirs)

    def take(name: str, how: str) -> np.ndarray:
        array = left.pop(name)
        return array.T if how == "T" else array

    ours = {}
    for their, our, how in OUTSIDE_LAYERS:
        name = their.format(family=family)
        if name in left:
            ours[our] = take(name, how)
    for their, our, how in IN_A_LAYER:
        names = [LAYER.format(family=family, layer=layer) + their for layer in range(layers)]
        ours[BLOCK + our] = np.stack([take(name, how) for name in names])
    assert not left, f"these have no place in our tree: {sorted(left)}"
    return unflatten_dict({tuple(name.split("/")): array for name, array in ours.items()})
