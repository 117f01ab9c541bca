"""PaTH from block to block, as TPU kernels: attention of queries at the start of their block to keys at the end of theirs.

All tokens of a block turn what passes by one matrix P, as wide as a head. Between query block i and key block j stand

    R = P_{i−1} … P_{j+1},     scores = q (k Rᵀ)ᵀ

so that the pair is plain attention with keys that were carried to the start of the queries' block. R gains a factor at each step
of a kernel; keys are carried in float32, rounded once where they meet queries, and meet as many queries as a block has.

Backward, `to_queries` walks as `forward` does and `to_keys` from each block of keys to the right. The gradient of R is that of the
carried keys by the keys, Γ_ij. With Z_i the sum over the key blocks before j of Γ, carried on by Pᵀ, P_j gains Rᵀ Z_i from every
query block: key blocks are taken in order, and Z stays on the chip. Nothing is shared between programs, no sum depends on chance.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.kept import kept
from kernels.mosaic_tpu import kernel
from kernels.path.pallas_tpu_plan import (
    EMPTY,
    FLOOR,
    Plan,
    identity,
    line,
    masked,
    over_devices,
    product,
    tokens,
    values,
)

Arrays = dict[str, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def far(plan: Plan, given: Arrays, fixed: dict[str, Arrays]) -> tuple[jax.Array, jax.Array]:
    """Attention to the keys of all blocks before a query's own.

    Args:
      given: "q" `[B, N, T, H]` at the start of its block, with the scale, and "v" `[B, K, S, W]`, in the dtype of the call; "k"
        `[B, K, S, H]` at the end of its block and "p" `[B, K, S / C · H, H]`, float32; "bias" of the keys `[B, N, S]`, where
        there is one.
      fixed: "queries" and "keys", whatever else `masked` takes, `[B, N or 1, T]` and `[B, N or 1, S]`.

    Returns:
      (output `[B, N, T, W]`, log Σ exp `[B, N, T]`) of these keys alone, float32.
    """
    return _divided(plan, _forward, given, fixed)


def _saving(plan: Plan, given: Arrays, fixed: dict[str, Arrays]):
    out, lse = kept(_divided(plan, _forward, given, fixed))
    return (out, lse), (given, fixed, out, lse)


def _backward(plan: Plan, saved: Any, d: tuple[jax.Array, jax.Array]):
    given, fixed, out, lse = saved
    d_out, d_lse = d
    # A row without keys has no probabilities.
    lse = jnp.where(lse == EMPTY, -EMPTY, lse)
    rows = {"lse": lse, "delta": jnp.sum(d_out * out, axis=-1) - d_lse}
    given = given | {"d_out": d_out.astype(plan.dtype)}
    d_q = _divided(plan, _to_queries, given, fixed, rows)
    return {"q": d_q.astype(plan.dtype), **_divided(plan, _to_keys, given, fixed, rows)}, None


far.defvjp(_saving, _backward)


def _divided(plan: Plan, function, given: Arrays, *others: Any) -> Any:
    """function(plan, given, *others), over devices."""
    here = functools.partial(function, plan)
    return over_devices(here, given["q"].shape[1], given["k"].shape[1])(given, *others)


def _forward(plan: Plan, given: Arrays, fixed: dict[str, Arrays]) -> tuple[jax.Array, jax.Array]:
    def body(given, queries, keys, out_ref, lse_ref, carried, top, total, sums):
        step = pl.program_id(3)

        @pl.when(step == 0)
        def _():
            carried[...] = identity(carried.shape[0])
            top[...] = jnp.full_like(top, FLOOR)
            total[...], sums[...] = jnp.zeros_like(total), jnp.zeros_like(sums)

        @pl.when(_met(plan, pl.program_id(2), step))
        def _():
            k = product(carried[...], given["k"][...], "nt", plan.fine).astype(plan.dtype)
            # In two halves, so that the products of one can run beside the softmax of the other.
            for start in (0, plan.block // 2):
                here = slice(start, start + plan.block // 2)
                scores = product(given["q"][here], k, "nn", plan.digits)
                own = {name: ref[here] for name, ref in queries.items()}
                scores = _masked(plan, scores, own, values(keys), step, start)
                new = jnp.maximum(top[here], jnp.max(scores, axis=1, keepdims=True))
                weights, less = jnp.exp(scores - new), jnp.exp(top[here] - new)
                total[here] = total[here] * less + jnp.sum(weights, axis=1, keepdims=True)
                sums[here] = sums[here] * less + product(weights, given["v"][...], "nn", plan.digits)
                top[here] = new
            carried[...] = product(carried[...], given["p"][...], "nn", 24)

        @pl.when(step == plan.reach - 1)
        def _():
            some = jnp.where(total[...] == 0, 1, total[...])
            out_ref[...] = sums[...] / some
            lse_ref[...] = jnp.where(total[...] == 0, EMPTY, top[...] + jnp.log(some))

    q, v = given["q"], given["v"]
    column, made = (plan.block, 1), (*q.shape[:3], v.shape[3])
    out, lse = _right_to_left(
        plan,
        body,
        "path_far",
        given,
        fixed,
        {},
        [jax.ShapeDtypeStruct(made, jnp.float32), jax.ShapeDtypeStruct((*made[:3], 1), jnp.float32)],
        [column, column, (plan.block, v.shape[3])],
    )
    return out, lse[..., 0]


def _to_queries(plan: Plan, given: Arrays, fixed: dict[str, Arrays], rows: Arrays) -> jax.Array:
    def body(given, queries, keys, rows, d_q, carried):
        step = pl.program_id(3)

        @pl.when(step == 0)
        def _():
            carried[...] = identity(carried.shape[0])
            d_q[...] = jnp.zeros_like(d_q)

        @pl.when(_met(plan, pl.program_id(2), step))
        def _():
            k = product(carried[...], given["k"][...], "nt", plan.fine)
            scores = product(given["q"][...], k, "nn", plan.digits)
            scores = _masked(plan, scores, values(queries), values(keys), step)
            d_weights = product(given["d_out"][...], given["v"][...], "nt", plan.digits)
            d_scores = jnp.exp(scores - rows["lse"][...]) * (d_weights - rows["delta"][...])
            d_q[...] += product(d_scores, k, "nt", plan.digits)
            carried[...] = product(carried[...], given["p"][...], "nn", 24)

    shape = jax.ShapeDtypeStruct(given["q"].shape, jnp.float32)
    return _right_to_left(plan, body, "path_far_to_queries", given, fixed, rows, [shape], [])[0]


def _met(plan: Plan, tile: jax.Array, step: jax.Array) -> jax.Array:
    return step < plan.first + tile


def _masked(
    plan: Plan, scores: jax.Array, queries: Arrays, keys: Arrays, step: jax.Array, start: int = 0, axis: int = 0
) -> jax.Array:
    """Of a block of queries, from its `start` on, by the keys `step` + 1 blocks before it."""
    ahead = (step + 1) * plan.block + start
    return masked(plan, scores, queries, keys, ahead, causal=False, query_axis=axis)


def _right_to_left(plan: Plan, body, name: str, given: Arrays, fixed, rows: Arrays, shapes: list, scratch: list) -> Any:
    """`body` for every batch row, head, block of queries, and, in order, key block before it."""
    batch, heads, length, width = given["q"].shape
    group = heads // given["k"].shape[1]

    def key_block(i, step):
        return jnp.maximum(plan.first + i - 1 - step, 0)

    def of_queries(b, n, i, step):
        return b, n, i

    def of_shared(b, n, i, step):
        return b, 0, i

    def of_keys(b, n, i, step):
        return b, lax.div(n, jnp.int32(group)), key_block(i, step)

    def of_biases(b, n, i, step):
        return b, n, key_block(i, step)

    def of_shared_keys(b, n, i, step):
        return b, 0, key_block(i, step)

    def rows_spec(x):
        return tokens(plan.block, 1, of_queries if x.shape[1] == heads else of_shared)

    def keys_spec(x):
        return line(plan.block, of_biases if x.shape[1] == heads else of_shared_keys)

    def spec(name):
        x = given[name]
        size = width if name == "p" else plan.block
        return tokens(size, x.shape[3], of_queries if name in ("q", "d_out") else of_keys)

    arrays = {name: x for name, x in given.items() if name != "bias"}
    keys = fixed["keys"] | ({"bias": given["bias"]} if "bias" in given else {})
    call = kernel(
        body,
        name=name,
        grid=(batch, heads, length // plan.block, plan.reach),
        sequential=1,
        inputs=[
            {name: spec(name) for name in arrays},
            {name: rows_spec(x) for name, x in fixed["queries"].items()},
            {name: keys_spec(x) for name, x in keys.items()},
            *([{name: rows_spec(x) for name, x in rows.items()}] if rows else []),
        ],
        outputs=[tokens(plan.block, x.shape[3], of_queries) for x in shapes],
        shapes=shapes,
        scratch=[pltpu.VMEM(shape, jnp.float32) for shape in [(width, width), *scratch]],
        interpret=plan.interpret,
    )
    columns = [
        jax.tree.map(lambda x: x[..., None], part)
        for part in ([fixed["queries"], rows] if rows else [fixed["queries"]])
    ]
    as_lines = jax.tree.map(lambda x: x[:, :, None], keys)
    return call(arrays, columns[0], as_lines, *columns[1:])


def _to_keys(plan: Plan, given: Arrays, fixed: dict[str, Arrays], rows: Arrays) -> Arrays:
    """The gradients of "k", "v", "p" and "bias"."""
    biased = "bias" in given

    def body(given, queries, keys, rows, made, carried, sums):
        j, g, step = (pl.program_id(axis) for axis in (2, 3, 4))
        block = j + 1 + step
        tile = block - plan.first

        @pl.when(step == 0)
        def _():
            carried[...] = identity(carried.shape[0])
            if biased:
                made["bias"][...] = jnp.zeros_like(made["bias"])

        @pl.when((step == 0) & (g == 0))
        def _():
            for name in ("k", "v", "p"):
                made[name][...] = jnp.zeros_like(made[name])

        @pl.when((tile >= 0) & (block < pl.num_programs(2)))
        def _():
            k = product(given["k"][...], carried[...], "nt", plan.fine)
            scores = product(k, given["q"][...], "nt", plan.digits)
            scores = _masked(plan, scores, values(queries), values(keys), step, axis=1)
            weights = jnp.exp(scores - rows["lse"][...])
            made["v"][...] += product(weights, given["d_out"][...], "nn", plan.digits)
            d_weights = product(given["v"][...], given["d_out"][...], "nt", plan.digits)
            d_scores = weights * (d_weights - rows["delta"][...])
            if biased:
                made["bias"][...] += jnp.sum(d_scores, axis=1, keepdims=True)
            d_k = product(d_scores, given["q"][...], "nn", plan.digits)
            made["k"][...] += product(d_k, carried[...], "nn", plan.fine)
            d_carried = product(d_k, given["k"][...], "tn", plan.fine)

            @pl.when(g == 0)
            def _():
                # Nothing before the farthest key block that this tile sees.
                nothing = (j == 0) | (step == plan.reach - 1)
                before = jnp.where(nothing, 0, sums[tile])
                made["p"][...] += product(carried[...], before, "tn", plan.fine)
                sums[tile] = product(before, given["p"][...], "nt", 24) + d_carried

            @pl.when(g > 0)
            def _():
                sums[tile] += d_carried

        carried[...] = product(given["next_p"][...], carried[...], "nn", 24)

    return _left_to_right(plan, body, given, fixed, rows)


def _left_to_right(plan: Plan, body, given: Arrays, fixed: dict[str, Arrays], rows: Arrays) -> Arrays:
    """`body` for every batch row and key head and, in order, key block, query head that shares the keys, and block behind."""
    (batch, kv_heads, keys, width), (_, heads, queries, _) = given["k"].shape, given["q"].shape
    group, blocks, tiles = heads // kv_heads, keys // plan.block, queries // plan.block

    def head(x, k, g):
        return {heads: k * group + g, kv_heads: k, 1: 0}[x.shape[1]]

    def behind(j, step):
        return jnp.minimum(j + 1 + step, blocks - 1)

    def tile(j, step):
        return jnp.clip(j + 1 + step - plan.first, 0, tiles - 1)

    def of_queries(x):
        return lambda b, k, j, g, step: (b, head(x, k, g), tile(j, step))

    def of_keys(x):
        return lambda b, k, j, g, step: (b, head(x, k, g), j)

    specs = {name: tokens(plan.block, given[name].shape[3], of_queries(given[name])) for name in ("q", "d_out")}
    specs |= {name: tokens(plan.block, given[name].shape[3], of_keys(given[name])) for name in ("k", "v")}
    specs["p"] = tokens(width, width, of_keys(given["p"]))
    specs["next_p"] = tokens(width, width, lambda b, k, j, g, step: (b, k, behind(j, step)))
    arrays = {name: given[name] for name in specs if name != "next_p"} | {"next_p": given["p"]}
    as_lines = jax.tree.map(lambda x: x[:, :, None], [fixed["queries"], rows])
    as_columns = jax.tree.map(
        lambda x: x[..., None], fixed["keys"] | ({"bias": given["bias"]} if "bias" in given else {})
    )
    made = {name: jax.ShapeDtypeStruct(given[name].shape, jnp.float32) for name in ("k", "v", "p")}
    outputs = {name: specs[name] for name in made}
    if "bias" in given:
        made["bias"] = jax.ShapeDtypeStruct((*given["bias"].shape, 1), jnp.float32)
        outputs["bias"] = tokens(plan.block, 1, of_keys(given["bias"]))
    call = kernel(
        body,
        name="path_far_to_keys",
        grid=(batch, kv_heads, blocks, group, plan.reach),
        sequential=3,
        inputs=[
            specs,
            {name: line(plan.block, of_queries(x)) for name, x in fixed["queries"].items()},
            {name: tokens(plan.block, 1, of_keys(x)) for name, x in as_columns.items()},
            {name: line(plan.block, of_queries(x)) for name, x in rows.items()},
        ],
        outputs=[outputs],
        shapes=[made],
        scratch=[pltpu.VMEM((width, width), jnp.float32), pltpu.VMEM((tiles, width, width), jnp.float32)],
        interpret=plan.interpret,
    )
    (made,) = call(arrays, as_lines[0], as_columns, as_lines[1])
    made["v"] = made["v"].astype(given["v"].dtype)
    if "bias" in made:
        made["bias"] = made["bias"][..., 0]
    return made
