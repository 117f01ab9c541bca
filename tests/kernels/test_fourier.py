"""Re(F_T x F_D) against the matrices of the transform in float64, its gradient, and how it is divided over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels.fourier import fourier_mixing
from tests.devices import first


def by_matrices(x):
    def angles(n):
        return 2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n

    t, d = map(angles, x.shape[1:])
    x = np.asarray(x, np.float64)
    return np.cos(t) @ x @ np.cos(d) - np.sin(t) @ x @ np.sin(d)


# Odd and even lengths on both axes, and those at which one half of the spectrum is empty.
@pytest.mark.parametrize("shape", [(2, 7, 6), (1, 8, 5), (1, 1, 4), (1, 4, 1), (1, 3, 2)], ids=str)
def test_equals_the_matrices_in_float64_with_its_gradient(shape):
    x, dy = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    y, pull = jax.vjp(fourier_mixing, x)
    np.testing.assert_allclose(y, by_matrices(x), atol=5e-6)

    # The gradient of Σ dy y by the definition: a linear map's transpose, from its columns.
    columns = by_matrices(np.eye(shape[1] * shape[2]).reshape(-1, *shape[1:])).reshape(-1, shape[1] * shape[2])
    expected = np.asarray(dy, np.float64).reshape(shape[0], -1) @ columns.T
    np.testing.assert_allclose(pull(dy)[0].reshape(shape[0], -1), expected, atol=5e-6)


def test_a_value_worked_out_before():
    i, j = np.arange(4)[:, None], np.arange(2)
    x = np.sin(0.7 * (i + 1) + 1.3 * (j + 1)).astype(np.float32)
    expected = [[-2.424377, 2.950095], [2.007016, 0.322661], [1.416552, 0.672756], [2.007016, 0.322661]]
    np.testing.assert_allclose(fourier_mixing(jnp.asarray(x)[None])[0], expected, atol=2e-6)


def test_bfloat16_is_rounded_once():
    x = jax.random.normal(jax.random.key(0), (1, 6, 8), jnp.bfloat16)
    y = fourier_mixing(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.asarray(by_matrices(np.float32(x)), jnp.float32).astype(jnp.bfloat16))


def test_each_device_transforms_its_own_rows():
    """XLA by itself gathers the batch for a transform."""
    mesh = jax.sharding.Mesh(np.array(first(4)), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (8, 6, 4)), rows)
    compiled = jax.jit(jax.grad(lambda x: (fourier_mixing(x) ** 2).sum()), out_shardings=rows).lower(x).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(x), 2 * by_matrices(by_matrices(x)), atol=1e-4)
