"""An operation over several devices gives what it gives on one, gathers nothing, and sums over the batch where it must."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels.sharded import by_batch_and_heads
from tests.devices import first

SEEN = []


def by_row(q, k, ids):
    """By batch and head, of the group, and of the keys' heads."""
    SEEN.append((q.shape, k.shape))
    s = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2))
    return s.sum(-1) * ids[:, None, :], k * 2


def by_head(q, k, ids):
    """Summed over the batch."""
    return (by_row(q, k, ids)[0].sum((0, 2)),)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("operation", "results"), [(by_row, ("b n t", "b s m h")), (by_head, ("n",))])
def test_parts_of_batch_and_heads(operation, results, group):
    devices = first(8)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((8, 6, 4, 3), np.float32), rng.standard_normal((8, 5, 4 // group, 3), np.float32)
    arrays = (q, k, np.ones((8, 6), np.float32))
    axes = (("data", None, "tensor"), ("data", None, "tensor"), ("data",))
    put = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*a))) for x, a in zip(arrays, axes, strict=True)]
    divided = by_batch_and_heads(operation, ("b t n h", "b s m h", "b t"), results)
    SEEN.clear()
    compiled = jax.jit(divided).lower(*put).compile()
    assert ((2, 6, 2, 3), (2, 5, 2 // group, 3)) in SEEN, "each device has its part"
    assert "all-gather" not in compiled.as_text()
    assert ("all-reduce" in compiled.as_text()) == (operation is by_head)
    for got, want in zip(compiled(*put), operation(*arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_on_one_device_it_is_the_operation():
    q, k, ids = jnp.ones((2, 6, 4, 3)), jnp.ones((2, 5, 2, 3)), jnp.ones((2, 6))
    divided = by_batch_and_heads(by_row, ("b t n h", "b s m h", "b t"), ("b n t", "b s m h"))
    for got, want in zip(jax.jit(divided)(q, k, ids), by_row(q, k, ids), strict=True):
        np.testing.assert_array_equal(got, want)
