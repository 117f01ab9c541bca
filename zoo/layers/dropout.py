"""Dropout of hidden states."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention.dropout import keep_mask, key_words


class Dropout(nn.Module):
    """x · keep / (1 − rate) with keep = 1 for a share 1 − rate of the entries; x has 2 to 4 axes
    (Srivastava et al. 2014).

    The bits are the counter hash of attention's dropout, of (key, place in x): the same on any number of devices, in a small
    part of the time of `jax.random.bernoulli`, whose threefry took a tenth of a training step on a CPU.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        if deterministic or self.rate == 0:
            return x
        words = key_words(self.make_rng("dropout"))
        *batch, rows, width = (1, 1, *x.shape)[-4:]
        axes = (*batch, jnp.arange(rows), jnp.arange(width))
        keep = keep_mask(words, self.rate, *axes).reshape(x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
