"""Activations against their formulas in NumPy."""

from __future__ import annotations

import typing

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from zoo.layers.activations import Activation, activate

X = np.linspace(-4, 4, 33)
FORMULAS = {
    "gelu": 0.5 * X * (1 + erf(X / np.sqrt(2))),
    "gelu_tanh": 0.5 * X * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3))),
    "relu": np.maximum(0, X),
    "silu": X / (1 + np.exp(-X)),
    "tanh": np.tanh(X),
}


@pytest.mark.parametrize("name", typing.get_args(Activation))
def test_activations(name):
    wide, narrow = (activate(name, jnp.asarray(X, dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    np.testing.assert_allclose(wide, FORMULAS[name], atol=1e-6)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(narrow), FORMULAS[name], rtol=2**-8, atol=2**-9)
