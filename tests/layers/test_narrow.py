"""Layers in float16 and bfloat16: sums, squares and cubes are taken in float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.encodings import Dims
from zoo.layers.embeddings import Embeddings
from zoo.layers.feed_forward import GeGLU, Gelu, SwiGLU
from zoo.layers.norms import LayerNorm, RMSNorm
from zoo.mixers import Style

DIMS = Dims(model_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, num_layers=1, max_length=8)
NARROW = [jnp.float16, jnp.bfloat16]


@pytest.mark.parametrize("part", [Gelu(True), Gelu(), GeGLU(True), SwiGLU()], ids=lambda part: repr(part))
def test_activations_have_a_gradient_where_their_powers_leave_float16(part):
    """Pre-activations of ±400: the square is above 65504. The function is one or zero times x there, as in float32."""
    part = dataclasses.replace(part, width=4)
    x = jnp.asarray([[[400.0, -400.0, 1.0, -1.0]]])
    params = {name: {"kernel": jnp.eye(4), "bias": jnp.zeros(4)} for name in ("up", "down")}
    if not isinstance(part, Gelu):
        params["gate"] = params["up"]
        params["up"] = {"kernel": jnp.zeros((4, 4)), "bias": jnp.ones(4)}

    def run(dtype):
        module = part.module(DIMS, Style(dtype=dtype))
        # Compiled apart, as scanned layers are: what the backward pass is given has been through memory.
        y, pull = jax.vjp(lambda x: module.apply({"params": params}, x), x.astype(dtype))
        return np.float32(y), np.float32(pull(jnp.ones_like(y))[0])

    for narrow, wide in zip(run(jnp.float16), run(jnp.float32), strict=True):
        np.testing.assert_allclose(narrow, wide, rtol=2**-9, atol=2**-9)  # 11 significant bits, a few operations


@pytest.mark.parametrize("dtype", NARROW)
def test_the_gradient_of_an_embedding_is_added_up_in_float32(dtype):
    """Added one by one, ones stop at 2048 in float16 and at 256 in bfloat16."""
    module = Embeddings(3, 4, 4, 2, None, Style(dtype=dtype))
    ids = jnp.zeros((8, 1024), jnp.int32).at[:, 0].set(1)
    params = module.init(jax.random.key(0), ids, None, lambda x: x, False)["params"]

    def total(params):
        return jnp.sum(module.apply({"params": params}, ids, None, lambda x: x, False).astype(jnp.float32))

    grads = jax.jit(jax.grad(total))(params)
    np.testing.assert_array_equal(grads["token"]["embedding"][:, 0], [8 * 1023, 8, 0])
    np.testing.assert_array_equal(grads["token_type"]["embedding"][:, 0], [8 * 1024, 0])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("part", [LayerNorm(), RMSNorm()], ids=lambda part: part.name)
def test_norms_of_what_has_no_square_in_float16(part, dtype):
    x = jnp.asarray([[1024.0, -3072.0, 2048.0, 5120.0]])  # whole in 8 bits

    def run(dtype):
        module = part.module(dtype)
        params = module.init(jax.random.key(0), x)
        y, pull = jax.vjp(lambda x: module.apply(params, x), x.astype(dtype))
        return np.float32(y), np.float32(pull(jnp.ones_like(y).at[0, 1:].set(0))[0])

    smallest = 2.0**-24  # of float16: the gradient is of the size of one thousandth
    for narrow, wide in zip(run(dtype), run(jnp.float32), strict=True):
        np.testing.assert_allclose(narrow, wide, rtol=float(jnp.finfo(dtype).eps), atol=smallest)
