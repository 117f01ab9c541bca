"""Chips that are not there, or a test skipped where their compiler is not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.chips import TPUS, tpus
from zoo.errors import UserError

__all__ = ["TPUS", "mesh", "or_skipped", "shape", "topology"]


def or_skipped(find: Callable[[Any], Any], given: Any) -> Any:
    """find(given), a function of `benchmarks.chips`."""
    try:
        return find(given)
    except UserError as error:
        pytest.skip(str(error))


@functools.cache
def topology(name: str) -> list[jax.Device]:
    """The TPUs of a generation's smallest slice or of a topology, as "v5e:2x4"."""
    return or_skipped(tpus, name)


def mesh(name: str, data: int = 1, tensor: int = 1) -> Mesh:
    """The first data · tensor TPUs of a generation's smallest slice, or of the named topology."""
    devices = topology(name)[: data * tensor]
    return Mesh(np.array(devices).reshape(data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def shape(on: Mesh, *axes: int, dtype, spec: PartitionSpec = PartitionSpec()) -> jax.ShapeDtypeStruct:  # noqa: B008
    return jax.ShapeDtypeStruct(axes, dtype, sharding=NamedSharding(on, spec))
