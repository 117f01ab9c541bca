"""The TPU kernels of attention compiled for TPUs that are not there: what Mosaic refuses and what does not fit on the chip is an error."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from kernels.attention import (
    AttentionMask,
    Clip,
    LogBuckets,
    Multiply,
    PiecewiseLinear,
    Relative,
    Reverse,
    RowColumn,
    Table,
    Toeplitz,
    attention,
)
from tests.aot.chips import TPUS, mesh, shape

pytestmark = pytest.mark.aot


def compile_gradients(
    on,
    *,
    width=64,
    length=512,
    batch=1,
    heads=2,
    kv_heads=2,
    terms="none",
    mask="none",
    dropout=0.0,
    dtype=jnp.bfloat16,
    divided=None,
):
    """The compiled gradients to q, k, v and the arrays of the terms."""
    array = functools.partial(shape, on, dtype=jnp.float32)
    q = array(batch, length, heads, width, dtype=dtype, spec=divided or PartitionSpec())
    k = array(batch, length, kv_heads, width, dtype=dtype, spec=divided or PartitionSpec())
    made = {
        "none": (),
        "toeplitz": (Toeplitz(array(heads, 2 * length - 1)),),
        "multiply": (Multiply(array(heads, 2 * length - 1)),),
        "row_column": (RowColumn(array(batch, heads, length), array(batch, heads, length)),),
    }
    made["all"] = sum(made.values(), ())
    made["nezha"] = (Relative(*(Table(array(129, 1, width), Clip(64)) if side else None for side in (1, 0, 1))),)
    clipped = Table(array(65, 1, width), Clip(32))
    made["key_clipped"] = (Relative(query=clipped, key=clipped, value=clipped),)
    buckets = LogBuckets(256, 512)
    rows = array(512, heads, width)
    made["deberta"] = (Relative(query=Table(rows, buckets), key=Table(rows, Reverse(buckets))),)
    made["fire"] = (
        PiecewiseLinear(array(2 * length - 1), array(batch, length), array(32), array(heads, 32), array(heads, 2)),
    )
    made["transformer_xl"] = (Relative(query=Table(array(2 * length - 1, heads, width), Clip(length - 1))),)
    ids = array(batch, length, dtype=jnp.int32)
    masks = {
        "none": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "causal_segments": AttentionMask(causal=True, query_segments=ids, key_segments=ids),
        "prefix": AttentionMask(causal=True, prefix_length=array(batch, dtype=jnp.int32)),
    }

    def loss(q, k, v, terms, mask, words):
        drop = (dropout, words) if dropout else None
        out = attention(q, k, v, terms=terms, mask=mask, dropout=drop, implementation="pallas_tpu")
        return jnp.sum(out.astype(jnp.float32))

    arguments = (q, k, k, made[terms], masks[mask], array(2, dtype=jnp.uint32))
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    return gradients.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("terms", ["none", "all"])
@pytest.mark.parametrize("length", [8192, 32768])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("generation", TPUS)
def test_long_rows_fit_on_the_chip(generation, width, length, terms):
    """With a table of every distance, whose sums stay on the chip; the smallest, v4, has 16 MiB."""
    compile_gradients(mesh(generation), width=width, length=length, terms=terms, mask="causal")


@pytest.mark.parametrize("generation", TPUS)
@pytest.mark.parametrize(
    ("terms", "width", "length"),
    [
        ("nezha", 64, 32768),
        ("nezha", 128, 8192),
        ("key_clipped", 64, 8192),
        ("deberta", 64, 8192),
        ("transformer_xl", 64, 2048),
        ("fire", 64, 32768),
    ],
)
def test_relative_tables_fit_on_the_chip(generation, terms, width, length):
    compile_gradients(mesh(generation), width=width, length=length, terms=terms, mask="causal")


@pytest.mark.parametrize("generation", TPUS)
@pytest.mark.parametrize(
    "call",
    [
        {"terms": "all", "mask": "causal_segments", "dropout": 0.1},
        {"terms": "all", "mask": "prefix", "heads": 6, "length": 600},
        {"terms": "toeplitz", "width": 32, "heads": 4, "kv_heads": 4, "dtype": jnp.float32},
        {"terms": "toeplitz", "width": 256, "dtype": jnp.float32},
    ],
    ids=("dropout", "grouped", "narrow", "wide"),
)
def test_masks_dropout_groups_and_widths(generation, call):
    compile_gradients(mesh(generation), **call)


def test_memory_grows_with_the_length():
    """At 8,192 tokens one array of all queries by all keys would be 256 MiB a head."""
    few, many = (
        compile_gradients(mesh("v5e"), terms="all", length=length).memory_analysis() for length in (8192, 16384)
    )
    few, many = (x.temp_size_in_bytes + x.output_size_in_bytes for x in (few, many))
    assert many < 2.2 * few and many < 2**28


@pytest.mark.parametrize("terms", ["none", "toeplitz", "row_column", "nezha"])
def test_eight_devices_gather_nothing(terms):
    on = mesh("v5e:2x4", data=4, tensor=2)
    divided = PartitionSpec("data", None, "tensor")
    sizes = {"batch": 4, "heads": 8, "kv_heads": 4}
    text = compile_gradients(on, terms=terms, mask="causal_segments", dropout=0.1, divided=divided, **sizes).as_text()
    assert "all-gather" not in text and "bf16[1,512,4,64]" in text, "a device has 1 of 4 rows and 4 of 8 heads"
    assert ("all-reduce" in text) == (terms in ("toeplitz", "nezha")), (
        "the gradient of a table that all rows share is summed over them"
    )
