"""Dropout of hidden states."""

from __future__ import annotations

import functools

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
        return _dropped(self.rate, x, key_words(self.make_rng("dropout")))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropped(rate: float, x: jax.Array, words: jax.Array) -> jax.Array:
    *batch, rows, width = (1, 1, *x.shape)[-4:]
    axes = (*batch, jnp.arange(rows), jnp.arange(width))
    keep = keep_mask(words, rate, *axes).reshape(x.shape)
    # In float32: 1 / (1 − rate) rounded to bfloat16 is off by up to 0.2 %, which is no noise but in every entry. A product, since the
    # zeros of a `where` are taken out of a loop over layers as an array, which every layer then reads.
    return (x.astype(jnp.float32) * keep.astype(jnp.float32) * (1 / (1 - rate))).astype(x.dtype)


# The gradient is dropped as x was, by the same words: no mask need be kept.
_dropped.defvjp(
    lambda rate, x, words: (_dropped(rate, x, words), words),
    lambda rate, words, gradient: (_dropped(rate, gradient, words), None),
)
