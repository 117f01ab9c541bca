"""The Toeplitz kernels compiled for TPUs that are not there: what they ask for exists, and their blocks fit the memory on the chip.

Needs libtpu of JAX's version, whose compiler says so where an operation or the memory is missing.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels.toeplitz import pallas_tpu, toeplitz_matmul

# Of libtpu: ask no cloud where this machine is, and let others use it at the same time.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

pytestmark = pytest.mark.aot


@functools.cache
def chips(generation):
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=SMALLEST[generation]).devices
    except Exception as error:  # whatever a missing libtpu raises
        pytest.skip(f"libtpu is not installed: {str(error)[:100]}")


def compile_gradients(
    generation,
    length,
    dtype,
    *,
    causal=False,
    heads=2,
    batch=2,
    channels=64,
    by=None,
    implementation="pallas_tpu",
    form=None,
):
    """The compiled product and its gradients to t and x, on as many devices as the specs `by` of t and x divide them among."""
    size, (of_t, of_x) = (1, (PartitionSpec(),) * 2) if by is None else (2, by)
    devices = np.array(chips(generation)[: size * size]).reshape(size, size)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def shape(*axes, dtype, spec):
        return jax.ShapeDtypeStruct(axes, dtype, sharding=NamedSharding(mesh, spec))

    call = functools.partial(toeplitz_matmul, causal=causal, implementation=implementation)
    if form is not None:
        call = functools.partial(pallas_tpu.toeplitz_matmul, causal=causal, form=form)

    def both(t, x, dy):
        y, pull = jax.vjp(call, t, x)
        return y, *pull(dy)

    t = shape(heads, length if causal else 2 * length - 1, dtype=jnp.float32, spec=of_t)
    x = shape(batch, length, heads, channels, dtype=dtype, spec=of_x)
    return jax.jit(both).trace(t, x, x).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("length", [1, 300, 2048, 8192])
@pytest.mark.parametrize("generation", SMALLEST)
def test_compiles_and_fits(generation, length, dtype):
    """The compiler refuses what takes more than the chip has, at the most rows of a block and beyond."""
    text = compile_gradients(generation, length, dtype, batch=3).as_text()
    assert text.count("tpu_custom_call") >= 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("form", "length"), [("direct", 8192), ("dft", 1024), ("dft", 20_000)])
def test_fits_the_chip_of_the_least_memory(form, length, dtype):
    """Each form also where the other is taken, and transforms of three factors."""
    compile_gradients("v4", length, dtype, form=form)


@pytest.mark.parametrize("generation", SMALLEST)
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
    by = PartitionSpec("tensor"), PartitionSpec("data", None, "tensor")
    compiled = compile_gradients("v5e", 40, jnp.float32, batch=4, heads=4, by=by, implementation=implementation)
    assert "all-gather" not in compiled.as_text() and "all-reduce" in compiled.as_text()
