"""KERPLE, Sandwich and ALiBi where they are each other or something known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import Positions
from zoo.encodings import Dims, Place, logits, registry
from zoo.encodings.alibi import slopes
from zoo.encodings.sinusoidal import Sinusoidal, sinusoids
from zoo.errors import UserError

Q, K = (jax.random.normal(jax.random.key(seed), (1, 6, 4, 8)) for seed in (0, 1))
DIMS = Dims(32, 4, 4, 8, 1, 16)
PLACE = Place(Positions.arange(6), span=5)


def bias(config, params):
    return registry.build(config).shared(DIMS).apply({"params": params}, PLACE)[0].values


def test_kerple_power_of_one_is_alibi():
    """In every head whose slope is not below the clamp."""
    params = {"r1": jnp.asarray(slopes(4), jnp.float32), "r2": jnp.ones(4)}
    found, expected = logits("kerple_power", Q, K, params={"shared": params}), logits("alibi", Q, K)
    chex.assert_trees_all_close(found[:, :3], expected[:, :3], atol=1e-5)


@pytest.mark.parametrize("name", ["kerple_log", "kerple_power"])
def test_kerple_decays_from_zero_with_finite_gradients(name):
    params = {"r1": jnp.array([0.3, 1.0, 2.0, 0.5]), "r2": jnp.array([0.2, 1.0, 2.0, 0.6])}
    values = bias(name, params)
    assert jnp.all(values[:, 5] == 0)
    assert jnp.all(jnp.diff(values[:, 5:]) < 0) and jnp.all(jnp.diff(values[:, :6]) > 0)
    weights = jax.random.normal(jax.random.key(2), values.shape)
    found = jax.grad(lambda p: (bias(name, p) * weights).sum())(params)
    n, p = np.abs(np.arange(-5, 6.0)), {k: np.asarray(v, np.float64)[:, None] for k, v in params.items()}
    if name == "kerple_log":
        slope = {"r1": -np.log1p(p["r2"] * n), "r2": -p["r1"] * n / (1 + p["r2"] * n)}
    else:
        log = np.log(np.where(n == 0, 1, n))
        slope = {"r1": -(n ** p["r2"]), "r2": -p["r1"] * n ** p["r2"] * log}
    expected = {k: (np.asarray(weights) * v).sum(1) for k, v in slope.items()}
    # A power of exactly 2 stands at the bound, where half of the gradient passes.
    expected["r2"][2] *= 0.5 if name == "kerple_power" else 1.0
    chex.assert_trees_all_close(found, jax.tree.map(jnp.float32, expected), rtol=1e-4, atol=1e-4)


def test_kerple_keeps_its_parameters_positive():
    low = {"r1": jnp.full(4, -3.0), "r2": jnp.full(4, -3.0)}
    clamped, soft = bias("kerple_log", low), bias({"name": "kerple_log", "parametrisation": "softplus"}, low)
    chex.assert_trees_all_close(clamped[0, 0], -0.01 * jnp.log1p(0.05), rtol=1e-5)
    assert jnp.all(soft[:, :5] < 0)
    drawn = registry.build({"name": "kerple_power", "parametrisation": "softplus"}).shared(Dims(32, 512, 4, 8, 1, 16))
    params = drawn.init(jax.random.key(0), PLACE)["params"]
    r2 = 0.01 + jax.nn.softplus(params["r2"])
    assert 0.01 <= r2.min() < 0.1 and 1.9 < r2.max() <= 2.02, "softplus begins where the clamp begins"


def test_sandwich_is_the_inner_product_of_sinusoids():
    values = registry.build({"name": "sandwich", "width": 8}).shared(DIMS).apply({}, PLACE)[0].values
    waves = sinusoids(Sinusoidal(), jnp.arange(6), 8)
    for head in range(4):
        expected = waves[0] @ waves.T / (2 * (head + 1))
        chex.assert_trees_all_close(values[head, 5:], expected, atol=1e-5)
        chex.assert_trees_all_close(values[head, 5::-1], expected, atol=1e-5)


def test_sandwich_in_a_plain_kernel():
    """[q; PE_i / (c s)] · [k; PE_j] is the biased product, with s = 1/sqrt(H)."""
    waves = sinusoids(Sinusoidal(), jnp.arange(6), 128)
    c = 2.0 * jnp.arange(1, 5)
    wide_q = jnp.concatenate([Q[0], (waves[:, None] / c[:, None]) * 8**0.5], axis=-1)
    wide_k = jnp.concatenate([K[0], jnp.broadcast_to(waves[:, None], (6, 4, 128))], axis=-1)
    expected = jnp.einsum("tnh,snh->nts", wide_q, wide_k, precision="highest") / 8**0.5
    chex.assert_trees_all_close(logits("sandwich", Q, K)[0], expected, atol=1e-4)


def test_sandwich_refuses_an_odd_width():
    with pytest.raises(UserError, match="width=7 counts sines and cosines"):
        registry.build({"name": "sandwich", "width": 7})
