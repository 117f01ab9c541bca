"""PaTH within blocks of queries, as a TPU kernel: attention to the keys of a query's own block, and the query at its start.

Both are one function of the values of a piece of queries and of what stands before it in the block; the backward kernel computes
it again, piece by piece, and lets JAX transpose it, so that nothing of it is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.kept import kept
from kernels.mosaic_tpu import kernel
from kernels.path.pallas_tpu_blocks import at_end
from kernels.path.pallas_tpu_plan import EMPTY, FLOOR, Plan, below, line, masked, over_devices, product, rows, tokens

Arrays = dict[str, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def near(plan: Plan, of_heads: Arrays, of_keys: Arrays, fixed: dict[str, Arrays]) -> tuple[jax.Array, ...]:
    """Attention to the keys of a query's own block, and the query at the start of that block.

    Args:
      of_heads: "q" `[B, N, T, H]`, with the scale; "bias" of the keys `[B, N, T]`, where there is one.
      of_keys: "v" `[B, K, T, W]`, "k" and "w" `[B, K, T, H]`, and of `reflected` "u" and "m", all of the queries' blocks.
      fixed: "queries" and "keys", whatever else `masked` takes, `[B, N or 1, T]`.

    Returns:
      (q at the start of the block `[B, N, T, H]` in the dtype of the call; output `[B, N, T, W]` and log Σ exp `[B, N, T]`
      of these keys alone, float32).
    """
    return _divided(plan, _near, of_heads, of_keys, fixed)


def _near(plan: Plan, of_heads: Arrays, of_keys: Arrays, fixed: dict[str, Arrays]) -> tuple[jax.Array, ...]:
    def body(of_heads, of_keys, fixed, *made):
        ends = [at_end(plan, _own(plan, of_keys, number)) for number in range(plan.pieces - 1)]
        for number in range(plan.pieces):
            found = _attend(plan, number, fixed, _given(plan, number, of_heads, of_keys, ends))
            for ref, x in zip(made, found, strict=True):
                ref[rows(plan, number)] = x.astype(ref.dtype)

    q, v = of_heads["q"], of_keys["v"]
    made = ((q.shape[3], plan.dtype), (v.shape[3], jnp.float32), (1, jnp.float32))
    shapes = [jax.ShapeDtypeStruct((*q.shape[:3], width), dtype) for width, dtype in made]
    start, out, lse = _over_heads(plan, body, "path_near", _laid_out(of_heads, of_keys, fixed), shapes)
    return start, out, lse[..., 0]


def _near_forward(plan: Plan, of_heads: Arrays, of_keys: Arrays, fixed: dict[str, Arrays]):
    return kept(_divided(plan, _near, of_heads, of_keys, fixed)), (of_heads, of_keys, fixed)


def _near_backward(plan: Plan, saved: Any, d: tuple[jax.Array, ...]):
    return *_divided(plan, _gradients, *saved, d), None


def _gradients(plan: Plan, of_heads: Arrays, of_keys: Arrays, fixed: dict[str, Arrays], d: tuple) -> tuple:
    def body(of_heads, of_keys, fixed, d, d_heads, d_keys):
        # The query heads that share keys come one after the other.
        @pl.when(pl.program_id(3) == 0)
        def _():
            for ref in d_keys.values():
                ref[...] = jnp.zeros_like(ref)

        if "bias" in d_heads:
            d_heads["bias"][...] = jnp.zeros_like(d_heads["bias"])
        before = [_own(plan, of_keys, number) for number in range(plan.pieces - 1)]
        ends, pull_ends = jax.vjp(lambda pieces: [at_end(plan, piece) for piece in pieces], before)
        d_ends = jax.tree.map(jnp.zeros_like, ends)
        for number in range(plan.pieces):
            here, seen = rows(plan, number), slice((number + 1) * plan.piece)
            given = _given(plan, number, of_heads, of_keys, ends)
            _, pull = jax.vjp(functools.partial(_attend, plan, number, fixed), given)
            (to,) = pull(tuple(x[here].astype(jnp.float32) for x in d))
            d_heads["q"][here] = to["q"]
            if "bias" in d_heads:
                d_heads["bias"][:, seen] += to["bias"]
            d_keys["v"][seen] += to["v"]
            for name, x in to["own"].items():
                d_keys[name][here] += x
            d_ends = jax.tree.map(jnp.add, d_ends[:number], to["before"]) + d_ends[number:]
        for number, piece in enumerate(pull_ends(d_ends)[0]):
            for name, x in piece.items():
                d_keys[name][rows(plan, number)] += x

    given = _laid_out(of_heads, of_keys, fixed)
    d_start, d_out, d_lse = d
    shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), x) for x in given[:2]]
    given = [*given, [d_start, d_out, d_lse[..., None]]]
    d_heads, d_keys = _over_heads(plan, body, "path_near_backward", given, shapes)
    d_heads = {name: x.reshape(of_heads[name].shape) for name, x in d_heads.items()}
    return d_heads, {name: x.astype(of_keys[name].dtype) for name, x in d_keys.items()}


near.defvjp(_near_forward, _near_backward)


def _divided(plan: Plan, function, of_heads: Arrays, of_keys: Arrays, *others: Any) -> Any:
    """function(plan, of_heads, of_keys, *others), over devices."""
    here = functools.partial(function, plan)
    return over_devices(here, of_heads["q"].shape[1], of_keys["k"].shape[1])(of_heads, of_keys, *others)


def _own(plan: Plan, of_keys: dict, number: int) -> Arrays:
    """What one piece of keys is to itself."""
    return {name: of_keys[name][rows(plan, number)] for name in ("k", "w", "u", "m")}


def _given(plan: Plan, number: int, of_heads: dict, of_keys: dict, ends: list) -> dict:
    """What a piece of queries meets: its own piece, the ends of those before it, and the values of both."""
    seen = slice((number + 1) * plan.piece)
    given = {"q": of_heads["q"][rows(plan, number)], "v": of_keys["v"][seen].astype(jnp.float32)}
    given |= {"own": _own(plan, of_keys, number), "before": ends[:number]}
    return given | ({"bias": of_heads["bias"][:, seen]} if "bias" in of_heads else {})


def _attend(plan: Plan, number: int, fixed: dict, given: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q at the start of the block, output, log Σ exp) of one piece of queries, float32."""
    x, own = given["q"], given["own"]
    along = below(product(x, own["w"], "nt", plan.fine), 0)
    scores = [product(x, own["k"], "nt", plan.fine) - product(along, own["m"], "nn", plan.fine)]
    x = x - product(along, own["u"], "nn", plan.fine)
    for k, p in reversed(given["before"]):
        scores.append(product(x, k, "nt", plan.fine))
        x = product(x, p, "nn", plan.fine)
    seen = slice((number + 1) * plan.piece)
    queries = {name: ref[rows(plan, number)] for name, ref in fixed["queries"].items()}
    keys = {name: ref[:, seen] for name, ref in fixed["keys"].items()}
    keys |= {"bias": given["bias"]} if "bias" in given else {}
    scores = jnp.concatenate(scores[::-1], axis=1)
    scores = masked(plan, scores, queries, keys, number * plan.piece, causal=True)
    top = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=1, keepdims=True), FLOOR))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=1, keepdims=True)
    some = jnp.where(total == 0, 1, total)
    out = product(weights, given["v"], "nn", plan.digits) / some
    return x, out, jnp.where(total == 0, EMPTY, top + jnp.log(some))


def _laid_out(of_heads: Arrays, of_keys: Arrays, fixed: dict[str, Arrays]) -> list:
    """What queries have one number of as columns, what keys have as lines."""
    of_heads = {name: x[:, :, None] if name == "bias" else x for name, x in of_heads.items()}
    queries = jax.tree.map(lambda x: x[..., None], fixed["queries"])
    return [of_heads, of_keys, {"queries": queries, "keys": jax.tree.map(lambda x: x[:, :, None], fixed["keys"])}]


def _over_heads(plan: Plan, body, name: str, given: list, shapes: list) -> Any:
    """`body(*given, *made)` for every batch row, key head, block, and query head that shares the key head."""
    batch, heads, length, _ = given[0]["q"].shape
    kv_heads, blocks = given[1]["v"].shape[1], length // plan.block
    group = heads // kv_heads

    def spec(x: Any) -> pl.BlockSpec:
        def index(b, k, i, g):
            return b, {heads: k * group + g, kv_heads: k, 1: 0}[x.shape[1]], i

        return line(plan.block, index) if x.shape[2] == 1 else tokens(x.shape[2] // blocks, x.shape[3], index)

    call = kernel(
        body,
        name=name,
        grid=(batch, kv_heads, blocks, group),
        sequential=1,
        inputs=jax.tree.map(spec, given),
        outputs=jax.tree.map(spec, shapes),
        shapes=shapes,
        interpret=plan.interpret,
    )
    return call(*given)
