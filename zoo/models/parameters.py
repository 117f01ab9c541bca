"""The parameter tree by name: which leaves have a layer axis, shapes, counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict


def has_layer_axis(path: tuple[str, ...]) -> bool:
    """Whether the leaf at `path` has a leading layer axis: exactly those under a `stage_*` do.

    The one statement of this rule; LAMB's trust ratio, sharding and interop ask here.
    """
    return any(name.startswith("stage_") for name in path)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter of a Transformer, found without allocating any."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return {"/".join(path): leaf.shape for path, leaf in flatten_dict(tree).items()}


def count_parameters(shapes: Mapping[str, tuple[int, ...]] | Any) -> int:
    """The number of scalars in shapes by name."""
    return sum(math.prod(shape) for shape in shapes.values())
