"""The attention scores of a whole model, to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import Positions
from zoo.errors import UserError
from zoo.mixers.mixer import SCORES
from zoo.models.transformer import Transformer


def attention_scores(
    model: Transformer,
    params: Mapping[str, Any],
    input_ids: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Scores before softmax of every layer, by the plain twin: `[L, B, N, T, T]`, −inf where a key is hidden.

    Args:
      params: the Transformer's.
      input_ids, segment_ids: `[B, T]`.
      positions: `[B, T]`, growing by one inside every segment.

    Raises:
      UserError: a layer has no such scores, layers differ in the number of their heads, or the model cannot take these rows.
    """
    heads = sorted({spec.mixer.attention_dims(model.dims).num_heads for spec in model.block_specs()})
    if len(heads) > 1:
        raise UserError(
            f"the scores of all layers are one array, and the layers have {' or '.join(map(str, heads))} heads"
        )
    optional: dict[str, Any] = {} if segment_ids is None else {"segment_ids": segment_ids}
    if positions is not None:
        optional["positions"] = Positions(positions, contiguous=True)
    _, kept = model.apply({"params": params}, input_ids, **optional, mutable=[SCORES])
    layers = []
    for index, stage in enumerate(model.stages):
        found = kept.get(SCORES, {}).get(f"stage_{index}", {})
        blocks = [found.get(f"block_{place}", {}).get("mixer") for place in range(len(stage.pattern))]
        for spec, block in zip(stage.pattern, blocks, strict=True):
            if block is None:
                raise UserError(f"mixer {spec.mixer.name!r} has no attention scores")
        ours = [block["scores"][0].reshape(stage.repeats, *block["scores"][0].shape[-4:]) for block in blocks]
        layers.append(jnp.stack(ours, axis=1).reshape(-1, *ours[0].shape[1:]))
    return jnp.concatenate(layers)
