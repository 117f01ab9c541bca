"""PaTH within blocks of keys, as a TPU kernel: the reflections of a block solved for, and its keys brought to its end.

A block of C tokens is cut into pieces of c. Within a piece (I + A)⁻¹ is solved by products; from piece to piece keys pass by one
product with I − Wᵀ U, which is as wide as a head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.mosaic_tpu import kernel
from kernels.path.pallas_tpu_plan import Plan, below, identity, product, rows, tokens, values

Arrays = dict[str, jax.Array]


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
    return _reflected(plan, given)


def _reflected(plan: Plan, given: Arrays) -> Arrays:
    def body(given, made):
        for name, x in _block_of_keys(plan, values(given)).items():
            made[name][...] = x

    return _over_blocks(plan, body, "path_keys", (given,), _made_of(plan, given["k"].shape))


def _reflected_forward(plan: Plan, given: Arrays):
    return reflected(plan, given), given


def _reflected_backward(plan: Plan, given: Arrays, d: Arrays):
    def body(given, d, gradients):
        _, pull = jax.vjp(functools.partial(_block_of_keys, plan), values(given))
        for name, x in pull(values(d))[0].items():
            gradients[name][...] = x

    shapes = {name: x.shape for name, x in given.items()}
    return (_over_blocks(plan, body, "path_keys_backward", (given, d), shapes),)


reflected.defvjp(_reflected_forward, _reflected_backward)


def _made_of(plan: Plan, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    *outer, length, width = shape
    each = {"u": (length, width), "m": (length, plan.piece), "end": (length, width)}
    each["p"] = (length // plan.block * width, width)
    return {name: (*outer, *inner) for name, inner in each.items()}


def _over_blocks(plan: Plan, body, name: str, given: tuple[Arrays, ...], shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """`body(*given, made)` for every batch row, key head and block."""
    batch, heads, length, _ = given[0]["k"].shape
    blocks = length // plan.block

    def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        return tokens(shape[2] // blocks, shape[3], lambda b, k, i: (b, k, i))

    call = kernel(
        body,
        name=name,
        grid=(batch, heads, blocks),
        sequential=0,
        inputs=jax.tree.map(lambda x: spec(x.shape), list(given)),
        outputs=[{name: spec(shape) for name, shape in shapes.items()}],
        shapes=[{name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}],
        interpret=plan.interpret,
    )
    return call(*given)[0]


def _block_of_keys(plan: Plan, given: Arrays) -> Arrays:
    """`reflected` for one block: "k" and "w" `[C, H]`, "beta" `[C, 1]`."""
    pieces = []
    for number in range(plan.pieces):
        k, w, beta = (given[name][rows(plan, number)] for name in ("k", "w", "beta"))
        solved = inverse(beta * below(product(w, w, "nt")))
        u = product(solved, beta * w, "nn")
        m = product(solved, beta * below(product(w, k, "nt")), "nn")
        pieces.append({"k": k, "w": w, "u": u, "m": m})
    passed, ends = identity(given["w"].shape[1]), []
    for piece in reversed(pieces):
        end, p = at_end(piece)
        ends.append(product(end, passed, "nt"))
        passed = product(passed, p, "nn")
    u, m = (jnp.concatenate([piece[name] for piece in pieces]) for name in ("u", "m"))
    return {"u": u, "m": m, "end": jnp.concatenate(ends[::-1]), "p": passed}


def at_end(piece: Arrays) -> tuple[jax.Array, jax.Array]:
    """The keys of a piece at its end, and H_c … H_1."""
    w = piece["w"]
    return piece["k"] - product(piece["m"], w, "tn"), identity(w.shape[1]) - product(w, piece["u"], "tn")


@jax.custom_vjp
def inverse(strictly_lower: jax.Array) -> jax.Array:
    """(I + A)⁻¹ of a strictly lower triangular A `[c, c]`, c a power of two.

    [[L, 0], [M, N]]⁻¹ = [[L⁻¹, 0], [−N⁻¹ M L⁻¹, N⁻¹]], for all pairs of blocks of one size at once: with D what stands on the
    diagonal, D − D M D. Exact steps of whole matrices; powers of A, which a Neumann series needs, overflow where the w are alike.
    """
    size = strictly_lower.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    solved = identity(size)
    for level in range(size.bit_length() - 1):
        # Two places first differ in this bit: one in the upper, one in the lower half of a pair.
        joins = jnp.where(jnp.right_shift(row ^ column, level) == 1, strictly_lower, 0)
        solved = solved - (joins if level == 0 else product(solved, product(joins, solved, "nn"), "nn"))
    return solved


def _inverse_backward(solved: jax.Array, d: jax.Array) -> tuple[jax.Array]:
    return (-product(solved, product(d, solved, "nt"), "tn"),)


inverse.defvjp(lambda strictly_lower: (inverse(strictly_lower),) * 2, _inverse_backward)
