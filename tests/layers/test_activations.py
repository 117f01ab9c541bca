"""Activations against their formulas in NumPy."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from zoo.layers.activations import Activation, activate

X = np.linspace(-4, 4, 33)
ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(0, x),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", typing.get_args(Activation))
def test_activations(name):
    wide, narrow = (activate(name, jnp.asarray(X, dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    np.testing.assert_allclose(wide, ACTIVATIONS[name](X), atol=1e-6)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(narrow), ACTIVATIONS[name](X), rtol=2**-8, atol=2**-9)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_gradients_keep_the_narrow_input_alone(name):
    x = jnp.asarray(X, jnp.bfloat16)
    y, pull = jax.vjp(lambda x: activate(name, x), x)
    assert sum(a.nbytes for a in jax.tree.leaves(pull)) == x.nbytes
    step = 1e-6
    slope = (ACTIVATIONS[name](np.float64(x) + step) - ACTIVATIONS[name](np.float64(x) - step)) / (2 * step)
    np.testing.assert_allclose(np.float32(pull(jnp.ones_like(y))[0]), slope, rtol=2**-8, atol=2**-9)
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda x: activate(name, x)))(jnp.float32(x)), slope, atol=1e-6)


def test_gelu_of_narrow_inputs_is_as_near_as_their_digits():
    x = jnp.asarray(np.linspace(-12, 12, 4001), jnp.bfloat16)
    exact = ACTIVATIONS["gelu"](np.float64(x))
    np.testing.assert_allclose(np.float32(activate("gelu", x)), exact, rtol=2**-8, atol=2e-7 * 12)
