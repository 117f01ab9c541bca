"""The TPU kernels of PaTH compiled for chips that are not there: their memory is real. Needs libtpu (`make test-aot` fetches it)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from kernels.attention import AttentionMask
from kernels.path import path_attention
from tests.aot.chips import TPUS, mesh, shape

pytestmark = pytest.mark.aot


def compile_gradients(on, *, length, width, dtype=jnp.bfloat16, batch=1, heads=2, kv_heads=1, spec=None):
    """The compiled gradients to everything, with documents and a forget gate."""
    spec = spec or PartitionSpec()

    def array(*axes, dtype=jnp.float32):
        return shape(on, *axes, dtype=dtype, spec=spec)

    q, k = (array(batch, length, n, width, dtype=dtype) for n in (heads, kv_heads))
    w, beta, forget = array(*k.shape), array(*k.shape[:3]), array(*q.shape[:3])
    ids = shape(on, batch, length, dtype=jnp.int32, spec=PartitionSpec(*spec[:1]))

    def loss(q, k, v, w, beta, forget, ids):
        mask = AttentionMask(causal=True, query_segments=ids, key_segments=ids)
        out = path_attention(q, k, v, w, beta, log_forget=forget, mask=mask, implementation="pallas_tpu")
        return jnp.sum(out.astype(jnp.float32))

    gradients = jax.jit(jax.grad(loss, argnums=range(6)))
    return gradients.trace(q, k, k, w, beta, forget, ids).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("length", [8192, 32768])
@pytest.mark.parametrize("generation", TPUS)
def test_it_fits_the_memory_on_the_chip(generation, length, width):
    """float32 too where most is kept there, on the chip that has least."""
    compiled = compile_gradients(mesh(generation), length=length, width=width)
    assert f"{length},{length}" not in compiled.as_text(), "an array of all queries by all keys"
    # Sixteen float32 arrays as q, whose rows take all 128 lanes; one of all queries by all keys would be twice as much or more.
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 4 * length * 2 * 128
    if (generation, length, width) == ("v4", 32768, 128):
        compile_gradients(mesh(generation), length=length, width=width, dtype=jnp.float32)


def test_four_devices_gather_nothing():
    on = mesh("v5e", data=2, tensor=2)
    spec = PartitionSpec("data", None, "tensor")
    text = compile_gradients(on, length=1024, width=64, batch=4, heads=4, kv_heads=2, spec=spec).as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    assert "bf16[2,1024,2,64]" in text, "a device has 2 of 4 rows and 2 of 4 heads"
