"""No encoding makes a model hold an array of queries × keys: its memory grows as the length, forward and backward."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.encodings.table import DIMS, ROWS, tiny_model
from tests.memory import assert_linear, temporary_bytes

# An attention core that is measured nowhere else. The terms of the others are held to it by `tests/kernels/test_attention_properties.py`,
# PaTH by `tests/kernels/test_path.py`.
CORES = {"cope"}


@pytest.mark.cpu
@pytest.mark.parametrize(
    "row", [pytest.param(r, marks=() if r.name in CORES else pytest.mark.slow, id=r.name) for r in ROWS]
)
def test_memory_is_linear_in_length(row):
    """Of the gradients of every parameter of a model of two scanned layers, over packed documents."""
    model = tiny_model(row.config).clone(dims=dataclasses.replace(DIMS, max_length=4096))

    def peak(length: int) -> int:
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), ids)

        def loss(params, ids, segments):
            return model.apply(params, ids, segment_ids=segments).hidden.sum()

        return temporary_bytes(jax.grad(loss), params, ids, ids)

    assert_linear(peak, 2048)
