"""TPUs that are not there: their compiler, libtpu, needs none."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.chips import TPUS, tpus
from zoo.errors import UserError

__all__ = ["TPUS", "mesh", "shape", "topology"]


@functools.cache
def topology(name: str) -> list[jax.Device]:
    """The devices of a generation's smallest slice or of a topology, as "v5e:2x4"; skips the test where libtpu is not installed."""
    try:
        return tpus(name)
    except UserError as error:
        pytest.skip(str(error))


def mesh(name: str, data: int = 1, tensor: int = 1) -> Mesh:
    """The first data · tensor devices of a generation's smallest slice, or of the named topology."""
    devices = topology(name)[: data * tensor]
    return Mesh(np.array(devices).reshape(data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def shape(on: Mesh, *axes: int, dtype, spec: PartitionSpec = PartitionSpec()) -> jax.ShapeDtypeStruct:  # noqa: B008
    return jax.ShapeDtypeStruct(axes, dtype, sharding=NamedSharding(on, spec))
