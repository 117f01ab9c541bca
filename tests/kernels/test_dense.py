"""x W against the plain product, gradients included, and the form of its backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.dense import logits, product


def arrays(leading, dtype=jnp.float32):
    rng = np.random.default_rng(len(leading))
    shapes = ((*leading, 6), (6, 10), (*leading, 10))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def gradients(multiply, x, w, dy):
    y, pull = jax.vjp(multiply, x, w)
    return (y, *pull(dy))


@pytest.mark.parametrize("leading", [(7,), (4, 5), (2, 3, 4), ()], ids=str)
def test_equals_the_plain_product(leading):
    x, w, dy = arrays(leading)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda *a: gradients(product, *a))(x, w, dy)
        expected = gradients(jnp.matmul, x, w, dy)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_bfloat16():
    x, w, dy = arrays((4, 5), jnp.bfloat16)
    found = gradients(product, x, w, dy)
    assert {a.dtype for a in found} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(found, gradients(jnp.matmul, x, w, dy), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-2, atol=2e-2)  # 8 bits of mantissa


@pytest.mark.cpu
def test_the_backward_pass_transposes_nothing_on_a_cpu():
    """That is all this op is for: XLA's own form transposes x and dy in memory."""
    x, w, dy = arrays((4, 5))
    compiled = jax.jit(lambda *a: gradients(product, *a)).lower(x, w, dy).compile().as_text()
    assert " transpose(" not in compiled
    assert " copy(" not in compiled


def test_lowers_for_other_platforms_with_rows_apart():
    """Merging two sharded axes would gather one: only a CPU's program may reshape."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays((4, 5))]
    traced = jax.jit(lambda *a: gradients(product, *a)[2]).trace(*shapes)
    assert "reshape" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "reshape" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_and_their_gradients_those_of_the_plain_product(dtype):
    x, w, dy = arrays((4, 5))
    x, table = x.astype(dtype), w.T.astype(dtype)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda *a: gradients(logits, *a))(x, table, dy)
        expected = gradients(
            lambda x, e: jnp.einsum("bte,ve->btv", x, e), *(a.astype(jnp.float32) for a in (x, table)), dy
        )
    assert [a.dtype for a in found] == [jnp.float32, dtype, dtype]
    for a, b in zip(found, expected, strict=True):
        atol = (
            1e-5 if a.dtype == jnp.float32 else 5e-2
        )  # dy, and what is given, are rounded to 8 bits; sums of 10 and of 20
        np.testing.assert_allclose(np.float32(a), b, rtol=1e-5 if a.dtype == jnp.float32 else 2e-2, atol=atol)
