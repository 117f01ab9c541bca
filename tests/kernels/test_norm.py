"""Normalisation against its formula, differentiated by JAX in float64, and what its backward pass keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.norm import normalize

FORMS = [(True, True, True), (True, True, False), (False, True, False), (False, False, False)]


def by_formula(x, scale, bias, *, epsilon, centered, dtype):
    away = x - x.mean(-1, keepdims=True) if centered else x
    y = away / jnp.sqrt((away**2).mean(-1, keepdims=True) + epsilon)
    y = y if scale is None else y * jnp.broadcast_to(scale, x.shape)
    return (y if bias is None else y + jnp.broadcast_to(bias, x.shape)).astype(dtype)


def gradients(function, *arguments, **options):
    """y, and the cotangents of the arguments for a cotangent of y that is no constant."""
    y, pull = jax.vjp(lambda *a: function(*a, **options), *arguments)
    return y, *pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))


@pytest.mark.parametrize("leading", [(5,), (2, 3), ()], ids=str)
@pytest.mark.parametrize(("centered", "scaled", "biased"), FORMS)
def test_equals_its_formula(centered, scaled, biased, leading):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*leading, 16)) * 3 + 2
    scale, bias = (rng.standard_normal(16) if has else None for has in (scaled, biased))
    options = dict(epsilon=1e-3, centered=centered)
    narrow = (None if a is None else jnp.asarray(a, jnp.float32) for a in (x, scale, bias))
    found = jax.jit(lambda *a: gradients(normalize, *a, **options, dtype=jnp.float32))(*narrow)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = (None if a is None else jnp.asarray(a) for a in (x, scale, bias))
        expected = gradients(by_formula, *wide, **options, dtype=jnp.float64)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_a_mean_far_above_the_deviation_costs_no_digits():
    x = jnp.asarray(4096 + np.arange(16) / 16, jnp.float32)
    y = normalize(x, None, None, epsilon=0.0, centered=True, dtype=jnp.float32)
    expected = (np.arange(16) - 7.5) / np.sqrt(np.mean((np.arange(16) - 7.5) ** 2))
    np.testing.assert_allclose(y, expected, rtol=1e-5)


@pytest.mark.parametrize("centered", [True, False])
def test_the_backward_pass_keeps_the_narrow_input_and_numbers_of_rows(centered):
    x = jnp.ones((8, 4, 256), jnp.bfloat16)
    scale = jnp.ones(256)
    _, pull = jax.vjp(lambda x: normalize(x, scale, scale, epsilon=1e-6, centered=centered, dtype=x.dtype), x)
    of_rows = 4 * x.size // 256  # bytes
    assert sum(a.nbytes for a in jax.tree.leaves(pull)) <= x.nbytes + (1 + centered) * of_rows + 2 * scale.nbytes
