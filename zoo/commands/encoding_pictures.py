"""A picture of what every position encoding adds to equal contents: docs/pictures/encodings.png."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import AttentionMask, Positions
from zoo.encodings import Dims, Encoding, Place, initial_parameters, logits, registry

HEADS, WIDTH, LENGTH, SENTENCE = 2, 32, 48, 8
DIMS = Dims(HEADS * WIDTH, HEADS, HEADS, WIDTH, num_layers=1, max_length=LENGTH)


def patterns() -> Iterator[tuple[str, np.ndarray]]:
    """(name, scores `[T, S]` of the first head) of every encoding, all tokens having one content; NaN where a key is not seen.

    What an encoding adds to the embeddings is added to the content, the projections are the identity, learned parameters are
    drawn at random, and a sentence ends after every eighth token.
    """
    token = jnp.arange(LENGTH)[None]
    positions = Positions(token, sentence=token // SENTENCE, within=token % SENTENCE, contiguous=True)
    for name in registry.names():
        part = registry.build(name)
        mask = AttentionMask(causal=not part.facts().bidirectional)
        x = _embedded(part, positions, mask)
        heads = x.reshape(1, LENGTH, HEADS, WIDTH)
        params = _drawn(initial_parameters(part, heads, heads, positions, x=x, mask=mask))
        scores = np.array(logits(part, heads, heads, positions, params, x=x, mask=mask)[0, 0])
        scores[~np.isfinite(scores)] = np.nan
        yield name, scores


def _embedded(part: Encoding, positions: Positions, mask: AttentionMask) -> jax.Array:
    """The one content at all positions, with what the encoding adds at the input."""
    x = jnp.tile(jax.random.normal(jax.random.key(1), (DIMS.model_dim,)), (1, LENGTH, 1))
    module = part.embedding(DIMS)
    if module is None:
        return x
    arguments = (x, Place(positions, span=LENGTH - 1), mask, None)
    params = module.init(jax.random.key(0), *arguments).get("params", {})
    return module.apply({"params": _drawn(params)}, *arguments)[0]


def _drawn(params: Any) -> Any:
    """The parameters moved from their initial values by normal numbers of a third, so that a table of zeros shows something."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), max(1, len(leaves)))
    return jax.tree.unflatten(
        tree,
        [leaf + jax.random.normal(key, leaf.shape) / 3 for leaf, key in zip(leaves, keys[: len(leaves)], strict=True)],
    )


def contact_sheet() -> bytes:
    """All patterns side by side, queries downwards and keys to the right, each in its own range of colours, as PNG."""
    from matplotlib.figure import Figure  # slow to import, and wanted only here

    found = list(patterns())
    columns = 8
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(1.35 * columns, 1.55 * rows), layout="constrained")
    for number, (name, scores) in enumerate(found, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.imshow(scores, cmap="viridis", interpolation="nearest")
        axes.set_title(name, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()
