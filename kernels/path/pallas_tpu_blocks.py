"""PaTH within blocks of keys, as a TPU kernel: the reflections of a block solved for, and its keys brought to its end.

A block of C tokens is cut into pieces of c. Within a piece (I + A)⁻¹ is solved by products; from piece to piece keys pass by one
product with I − Wᵀ U, which is as wide as a head.
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
from kernels.path.pallas_tpu_plan import Digits, Plan, below, identity, over_devices, product, rows, tokens

Arrays = dict[str, jax.Array]

_ROWS = 8  # of a register


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reflected(plan: Plan, given: Arrays) -> Arrays:
    """What queries need of keys and reflections, all float32.

    With A = tril(β W Wᵀ, −1) and C = (I + A)⁻¹ diag(β) of each piece:

        u = C W;  m = C tril(W kᵀ, −1), so that k − mᵀ W are the keys at the end of their piece, H_c … H_1 = I − Wᵀ u
        p: the product of those of a block;  end: the keys at the end of their block

    Args:
      given: "k" and "w" `[B, K, S, H]`, "beta" `[B, K, S, 1]`.

    Returns:
      "u" and "end" `[B, K, S, H]`, "m" `[B, K, S, c]`, "p" `[B, K, S / C · H, H]`.
    """
    return _solving(plan, given)[0]


def _solving(plan: Plan, given: Arrays) -> tuple[Arrays, Any]:
    def body(given, made):
        pieces = [{name: ref[rows(plan, n)] for name, ref in given.items()} for n in range(plan.pieces)]
        solved = inverses([_strictly_lower(plan, piece) for piece in pieces], plan.fine)
        pieces = [piece | _reflections(plan, piece, x) | {"solved": x} for piece, x in zip(pieces, solved, strict=True)]
        for number, piece in enumerate(pieces):
            for name in ("solved", "u", "m"):
                made[name][rows(plan, number)] = piece[name]
        made["end"][...], made["p"][...] = _join(plan, pieces)

    length, width = given["k"].shape[2:]
    shapes = {"u": (length, width), "m": (length, plan.piece), "solved": (length, plan.piece), "end": (length, width)}
    shapes["p"] = (length // plan.block * width, width)
    made = kept(_over_blocks(plan, body, "path_keys", (given,), shapes))
    solved = made.pop("solved")
    return made, (given, {"u": made["u"], "m": made["m"], "solved": solved})


def _backward(plan: Plan, saved: Any, d: Arrays):
    def body(given, found, d, gradients):
        every = [{name: ref[rows(plan, n)] for name, ref in {**given, **found}.items()} for n in range(plan.pieces)]
        kept = [{name: piece[name] for name in ("k", "w", "u", "m")} for piece in every]
        _, pull = jax.vjp(functools.partial(_join, plan), kept)
        (to_kept,) = pull((d["end"][...], d["p"][...]))
        for number, (piece, to) in enumerate(zip(every, to_kept, strict=True)):
            here = rows(plan, number)

            def solved_again(given, known=piece["solved"]):
                found = _reflections(plan, given, _as_inverse(_strictly_lower(plan, given), known, plan.fine))
                return found["u"], found["m"]

            _, pull = jax.vjp(solved_again, {name: piece[name] for name in given})
            (to_given,) = pull(tuple(to[name] + d[name][here] for name in ("u", "m")))
            for name, x in to_given.items():
                gradients[name][here] = x + to[name] if name in to else x

    given, found = saved
    shapes = {name: x.shape[2:] for name, x in given.items()}
    return (_over_blocks(plan, body, "path_keys_backward", (given, found, d), shapes),)


reflected.defvjp(_solving, _backward)


def _over_blocks(plan: Plan, body, name: str, given: tuple[Arrays, ...], shapes: dict[str, tuple[int, int]]) -> Arrays:
    """`body(*given, made)` for every batch row, key head and block; shapes: axes 2 and 3 of the results."""
    heads = given[0]["k"].shape[1]

    def run(*given):
        *outer, length, _ = given[0]["k"].shape
        blocks = length // plan.block

        def spec(x: Any) -> pl.BlockSpec:
            return tokens(x.shape[2] // blocks, x.shape[3], lambda b, k, i: (b, k, i))

        made = {name: jax.ShapeDtypeStruct((*outer, *inner), jnp.float32) for name, inner in shapes.items()}
        call = kernel(
            body,
            name=name,
            grid=(*outer, blocks),
            sequential=0,
            inputs=jax.tree.map(spec, list(given)),
            outputs=[jax.tree.map(spec, made)],
            shapes=[made],
            interpret=plan.interpret,
        )
        return call(*given)[0]

    return over_devices(run, heads, heads)(*given)


def _strictly_lower(plan: Plan, given: Arrays) -> jax.Array:
    """tril(β W Wᵀ, −1) of one piece."""
    return given["beta"] * below(product(given["w"], given["w"], "nt", plan.fine))


def _reflections(plan: Plan, given: Arrays, solved: jax.Array) -> Arrays:
    """ "u" and "m" of one piece, whose (I + A)⁻¹ is `solved`."""
    k, w, beta = (given[name] for name in ("k", "w", "beta"))
    u = product(solved, beta * w, "nn", plan.fine)
    m = product(solved, beta * below(product(w, k, "nt", plan.fine)), "nn", plan.fine)
    return {"u": u, "m": m}


def _join(plan: Plan, pieces: list[Arrays]) -> tuple[jax.Array, jax.Array]:
    """The keys of several pieces at the end of the last, and H of all their tokens."""
    passed, ends = identity(pieces[0]["w"].shape[1]), []
    for piece in reversed(pieces):
        end, p = at_end(plan, piece)
        ends.append(product(end, passed, "nt", plan.fine))
        passed = product(passed, p, "nn", plan.fine)
    return jnp.concatenate(ends[::-1]), passed


def at_end(plan: Plan, piece: Arrays) -> tuple[jax.Array, jax.Array]:
    """The keys of a piece at its end, and H_c … H_1."""
    k, w, u, m = (piece[name] for name in ("k", "w", "u", "m"))
    return k - product(m, w, "tn", plan.fine), identity(w.shape[1]) - product(w, u, "tn", plan.fine)


def inverses(strictly_lower: list[jax.Array], digits: Digits) -> list[jax.Array]:
    """(I + A)⁻¹ of strictly lower triangular A `[c, c]`, c a power of two; several at a time, since each is a chain of products.

    [[L, 0], [M, N]]⁻¹ = [[L⁻¹, 0], [−N⁻¹ M L⁻¹, N⁻¹]], for all pairs of blocks of one size at once: with D what stands on the
    diagonal, D − D M D. Exact steps of whole matrices; powers of A, which a Neumann series needs, overflow where the w are alike.
    """
    size = strictly_lower[0].shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    smallest = min(size, _ROWS)
    solved = [_diagonal_inverses(a, smallest) for a in strictly_lower]
    for level in range(smallest.bit_length() - 1, size.bit_length() - 1):
        # Two places first differ in this bit: one in the upper, one in the lower half of a pair.
        joins = jnp.right_shift(row ^ column, level) == 1
        right = [product(jnp.where(joins, a, 0), d, "nn", digits) for a, d in zip(strictly_lower, solved, strict=True)]
        solved = [d - product(d, x, "nn", digits) for d, x in zip(solved, right, strict=True)]
    return solved


def _diagonal_inverses(a: jax.Array, size: int) -> jax.Array:
    """The inverse of each block of `size` rows on the diagonal, zeros beside them: row by row, all blocks at once.

    Side by side the blocks are one row of registers; a look-up along its lanes spreads a column of each block over the block.
    """
    lane = lax.broadcasted_iota(jnp.int32, (size, a.shape[1]), 1)
    row = lax.broadcasted_iota(jnp.int32, lane.shape, 0)
    block, first = jnp.right_shift(lane, size.bit_length() - 1), lane & -size
    zero = jnp.zeros(lane.shape, a.dtype)
    count = a.shape[0] // size
    beside = sum((jnp.where(block == n, a[n * size : (n + 1) * size], zero) for n in range(count)), zero)
    solved = jnp.where(lane - first == row, 1.0, zero)
    for n in range(size - 1):
        column = jnp.take_along_axis(beside, first + n, axis=1)
        solved = solved - column * solved[n : n + 1]
    return jnp.concatenate([jnp.where(block == n, solved, zero) for n in range(count)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _as_inverse(strictly_lower: jax.Array, known: jax.Array, digits: Digits) -> jax.Array:
    """(I + A)⁻¹, which is `known`: for its gradient."""
    return known


def _as_inverse_backward(digits: Digits, solved: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    return -product(solved, product(d, solved, "nt", digits), "tn", digits), jnp.zeros_like(solved)


_as_inverse.defvjp(lambda a, known, digits: (known, known), _as_inverse_backward)
