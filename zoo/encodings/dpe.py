"""DPE: positions that encoder layers refine by the tokens before they are added."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.encodings.encoding import Dims, Encoding, Facts
from zoo.encodings.registration import registry
from zoo.encodings.sinusoidal import Sinusoidal, SinusoidalPositions, sinusoids
from zoo.errors import UserError

WAVES = Sinusoidal(scale_embeddings=False)


@registry.register("dpe")
@dataclass(frozen=True)
class Dpe(Encoding):
    """Sinusoids that a few layers of the model's kind refine by the tokens: x_i ← x_i + p̃_i, p̃ = layers(x + PE).

    The layers see no other positions, and stand at the input, of width E; with `layers=0` p̃ is PE itself. In translation
    the refined positions are drawn to the order of the target's words by `order_loss`, of `EncoderOutput.refined`; nothing
    here needs it. For encoders: a token's position depends on all of the text.
    Source: Zheng, Rezagholizadeh, Passban 2022 (arXiv:2204.08142). No code is public; how p̃ and x are joined, and that the layers
    are those of the model, is our reading.
    """

    layers: int = 2

    def __post_init__(self):
        if self.layers < 0:
            raise UserError(f"encoding 'dpe' has layers={self.layers}; it must be 0 or more")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"embedding"}), causal=False, decodes=False)

    @property
    def refinement_layers(self) -> int:
        return self.layers

    def embedding(self, dims: Dims) -> nn.Module:
        return SinusoidalPositions(WAVES)


def order_loss(refined: jax.Array, target: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Σ_i w_i ‖p̃_i − PE(t_i)‖², Σ_i w_i), float32: the order loss as a sum and a weight, as `zoo.tasks.Output.losses` holds them.

    Args:
      refined: p̃ `[B, T, E]`, `EncoderOutput.refined`.
      target: int `[B, T]`, t_i: where the word that token i is translated to stands in the target; i itself for one that is aligned to none.
      weight: `[B, T]`, 0 for padding.

    The whole loss is (1 − λ) of the task's and λ of this one; λ = 1/2 in our reading of the paper, which this library's
    tasks have no alignments for.
    """
    distance = refined.astype(jnp.float32) - sinusoids(WAVES, target, refined.shape[-1])
    weight = weight.astype(jnp.float32)
    return jnp.sum(weight * jnp.sum(distance**2, axis=-1)), jnp.sum(weight)
