"""Sums along a sequence that begin anew where a document does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def restarting_sums(values: Float[Array, "B S N"], starts: Bool[Array, "B S"]) -> Float[Array, "B S N"]:
    """Σ of the values from the last start up to each place.

    An associative scan that restarts, instead of differences of one long sum, which would lose the digits that matter in a late
    document.
    """

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    return jax.lax.associative_scan(join, (starts[..., None], values), axis=1)[1]
