"""TPUs that are not there: their compiler, libtpu, needs none."""

from __future__ import annotations

import functools
import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.bundles import GENERATIONS

__all__ = ["GENERATIONS", "mesh", "shape", "topology"]

# Of libtpu: ask no cloud where this machine is, and let other processes use it at the same time.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@functools.cache
def topology(name: str) -> list[jax.Device]:
    """The devices of a topology, as "v5e:2x4"; skips the test where libtpu is not installed."""
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # whatever a missing libtpu raises
        pytest.skip(f"libtpu is not installed: {str(error)[:100]}")


def mesh(name: str, data: int = 1, tensor: int = 1) -> Mesh:
    """The first data · tensor devices of a generation's smallest slice, or of the named topology."""
    devices = topology(GENERATIONS.get(name, name))[: data * tensor]
    return Mesh(np.array(devices).reshape(data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def shape(on: Mesh, *axes: int, dtype, spec: PartitionSpec = PartitionSpec()) -> jax.ShapeDtypeStruct:  # noqa: B008
    return jax.ShapeDtypeStruct(axes, dtype, sharding=NamedSharding(on, spec))
