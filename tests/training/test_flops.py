"""What is counted as arithmetic, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from zoo.models import build, preset
from zoo.training.flops import forward_flops, peak_flops


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_batched_product_is_twice_its_multiplications():
    def product(a, b):
        return jnp.einsum("bij,bkj->bik", a, b)

    assert forward_flops(product, shape(3, 4, 5), shape(3, 6, 5)) == 2 * 3 * 4 * 5 * 6


def test_a_scan_counts_as_often_as_it_runs():
    def chain(x, matrices):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, matrices)[0]

    assert forward_flops(chain, shape(2, 8), shape(7, 8, 8)) == 7 * 2 * 2 * 8 * 8


def test_of_two_branches_the_dearer_counts():
    def either(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert forward_flops(either, shape(8, 8), shape(8, 8)) == 2 * 2 * 8**3


def test_what_is_wrapped_is_counted_once():
    inner = jax.custom_vjp(lambda x: x @ x)
    inner.defvjp(lambda x: (inner(x), x), lambda x, g: (g @ x.T + x.T @ g,))
    assert forward_flops(lambda x: jax.jit(jax.checkpoint(inner))(x), shape(8, 8)) == 2 * 8**3


@pytest.mark.parametrize("remat", ["none", "full"])
def test_bert_base_counts_as_the_formula_says(remat):
    """12 layers of 4 D² + 8 D² products, scores and mixture 2·T·D each, and the pooler; the embedding is a look-up."""
    batch, length, width, layers = 2, 128, 768, 12
    config = preset("bert-base")
    config["model"]["remat"] = remat
    model = build(config)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    tokens = batch * length
    expected = 2 * tokens * layers * (12 * width**2 + 2 * length * width) + 2 * batch * width**2
    assert forward_flops(model.apply, variables, ids) == expected


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("cpu", None),
    ],
)
def test_peaks_by_the_name_a_device_gives(kind, peak):
    assert peak_flops(kind) == peak
