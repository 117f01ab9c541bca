"""Dynamic loss scaling, which float16 needs: its smallest number is 6e-8, and most gradients of a Transformer are smaller.

The loss is multiplied by S before the backward pass and the gradient divided by S, in float32, before anything else sees it. A
gradient that is not finite where the loss is says that S is too large: the update is left out and S halved. After
`interval` updates in a row S is doubled.
Source: Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2; the numbers are those of NVIDIA's Apex and of PyTorch. Differs: S
has a smallest value, where a gradient that is not finite is nobody's overflow any more; and a loss that is not finite never
is one, since S comes after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

SMALLEST, LARGEST = 1.0, 2.0**24

Extra = dict[str, jax.Array]


@dataclass(frozen=True)
class LossScale:
    """How S moves: from `initial`, a power of two (so that scaling is exact), doubled after `interval` updates in a row."""

    initial: float = 2.0**16
    interval: int = 2000

    def __post_init__(self):
        if not SMALLEST <= self.initial <= LARGEST or math.frexp(self.initial)[0] != 0.5:
            raise ValueError(f"loss_scale is a power of two from 1 to 2**24, not {self.initial}")
        if self.interval < 1:
            raise ValueError(f"loss_scale_interval is a positive number of updates, not {self.interval}")


def fresh(scaling: LossScale | None) -> Extra:
    """What a training state carries before the first update: S, the updates since it last changed, the overflows in all.

    Nothing without scaling.
    """
    if scaling is None:
        return {}
    # Arrays of their own: the training step is given its state for good, each buffer once.
    counters = {name: jnp.zeros((), jnp.int32) for name in ("clean_steps", "overflows")}
    return {"loss_scale": jnp.float32(scaling.initial), **counters}


def scale_of(extra: Extra) -> jax.Array | float:
    """S, or 1 without scaling."""
    return extra.get("loss_scale", 1.0)


def is_overflow(extra: Extra, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Whether a smaller S can mend this step: the loss is finite, its gradient is not, and S is not the smallest."""
    return jnp.isfinite(loss) & ~jnp.isfinite(grad_norm) & (scale_of(extra) > SMALLEST)


def moved(extra: Extra, updated: jax.Array, overflow: jax.Array, scaling: LossScale | None) -> Extra:
    """What the state carries after a step that made an update, overflowed, or neither (then nothing moves)."""
    if scaling is None:
        return extra
    scale, clean = extra["loss_scale"], extra["clean_steps"] + jnp.where(updated, 1, 0)
    grown = clean >= scaling.interval
    scale = jnp.where(grown, jnp.minimum(2 * scale, LARGEST), scale)
    return {
        **extra,
        "loss_scale": jnp.where(overflow, jnp.maximum(scale / 2, SMALLEST), scale),
        "clean_steps": jnp.where(overflow | grown, 0, clean),
        "overflows": extra["overflows"] + jnp.where(overflow, 1, 0),
    }


def metrics(extra: Extra) -> dict[str, Any]:
    """What a record says of it."""
    return {name: extra[name] for name in ("loss_scale", "overflows") if name in extra}
