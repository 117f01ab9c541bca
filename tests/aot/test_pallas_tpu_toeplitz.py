"""The Toeplitz kernels compiled for TPUs that are not there: what they ask for exists, and their blocks fit the memory on the chip.

Needs libtpu of JAX's version, whose compiler says so where an operation or the memory is missing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from kernels.toeplitz import pallas_tpu, toeplitz_matmul
from tests.aot.chips import TPUS, mesh, shape

pytestmark = pytest.mark.aot


def compile_gradients(
    generation,
    length,
    dtype,
    *,
    causal=False,
    heads=2,
    batch=2,
    channels=64,
    divided=False,
    implementation="pallas_tpu",
    form=None,
):
    """The compiled product and its gradients to t and x; divided, on two by two devices."""
    on = mesh(generation, *((2, 2) if divided else (1, 1)))
    call = functools.partial(toeplitz_matmul, causal=causal, implementation=implementation)
    if form is not None:
        call = functools.partial(pallas_tpu.toeplitz_matmul, causal=causal, form=form)

    def both(t, x, dy):
        y, pull = jax.vjp(call, t, x)
        return y, *pull(dy)

    columns = length if causal else 2 * length - 1
    t = shape(on, heads, columns, dtype=jnp.float32, spec=PartitionSpec("tensor"))
    x = shape(on, batch, length, heads, channels, dtype=dtype, spec=PartitionSpec("data", None, "tensor"))
    return jax.jit(both).trace(t, x, x).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("length", [1, 300, 2048, 8192])
@pytest.mark.parametrize("generation", TPUS)
def test_compiles_and_fits(generation, length, dtype):
    """The compiler refuses what takes more than the chip has, at the most rows of a block and beyond."""
    text = compile_gradients(generation, length, dtype, batch=3).as_text()
    assert text.count("tpu_custom_call") >= 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("form", "length"), [("direct", 8192), ("dft", 1024), ("dft", 20_000)])
def test_fits_the_chip_of_the_least_memory(form, length, dtype):
    """Each form also where the other is taken, and transforms of three factors."""
    compile_gradients("v4", length, dtype, form=form)


@pytest.mark.parametrize("generation", TPUS)
def test_causal_and_one_channel_of_many_heads(generation):
    compile_gradients(generation, 2048, jnp.bfloat16, causal=True, heads=64, batch=8, channels=1)


def test_memory_is_linear_in_length():
    """A dense matrix of 8,192 tokens would be 2 GiB for 8 heads. The batch is too large for the memory on the chip."""
    few, many = (
        compile_gradients("v4", length, jnp.float32, heads=8, batch=32).memory_analysis().temp_size_in_bytes
        for length in (4096, 8192)
    )
    assert 0 < many < 2.2 * few


@pytest.mark.parametrize("implementation", ["pallas_tpu", "xla"])
def test_four_devices_gather_nothing(implementation):
    """dt is summed over the devices of the batch."""
    compiled = compile_gradients(
        "v5e", 40, jnp.float32, batch=4, heads=4, divided=True, implementation=implementation
    ).as_text()
    assert "all-gather" not in compiled and "all-reduce" in compiled
