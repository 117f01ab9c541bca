"""A projection in groups: a block-diagonal matrix."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.mixers import Style


class GroupedDense(nn.Module):
    """y_g = x_g W_g + b_g: channels in G = `groups` equal runs, each multiplied with a matrix of its own.

    `[..., I]` → `[..., O]`, O = `features`; the parameters are `group_kernels` `[G, I/G, O/G]`, a leaf of another name than a Dense's
    since rules for `kernel` are of two axes, and `bias` `[O]` where the style has biases. G times fewer parameters and products than
    a Dense. G must divide I and O. Source: Jiang et al. 2020 (arXiv:2008.02496), section 3.3 (grouped linear).
    """

    features: int
    groups: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, groups = self.style.dtype, self.groups
        shape = (groups, x.shape[-1] // groups, self.features // groups)
        kernels = self.param("group_kernels", nn.initializers.truncated_normal(self.style.stddev), shape, jnp.float32)
        apart = x.astype(dtype).reshape(*x.shape[:-1], groups, -1)
        y = jnp.einsum("...gi,gio->...go", apart, kernels.astype(dtype)).reshape(*x.shape[:-1], -1)
        if not self.style.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + bias.astype(dtype)
