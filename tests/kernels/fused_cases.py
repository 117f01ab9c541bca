"""What is tested alike of every fused kernel: values and gradients against the float64 reference, within what its dtype rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import AttentionMask
from kernels.attention.dropout import key_words
from kernels.attention.positions import Placement
from kernels.attention.terms import Clip, PiecewiseLinear, Relative, Table, Wave
from tests.kernels.attention_cases import inputs, truth

# Operands, probabilities and results are each rounded, bfloat16 by up to 2^-9 and float16 by 2^-12, relative; sums are float32.
BOUND = {jnp.bfloat16: 4e-3, jnp.float16: 6e-4, jnp.float32: 2e-6}
NOISE = 1e-5  # of an entry, of sums that come to little
CURVE = tuple(jax.tree_util.GetAttrKey(name) for name in ("knots", "slopes", "line"))


def fire(heads: int, *, batch: int, queries: int, keys: int, knots: int = 32) -> PiecewiseLinear:
    """As the encoding makes it, with a threshold of 100 and some knots beyond what is ever met."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    place = np.maximum(np.arange(queries) + keys - queries, 100)
    reach = np.broadcast_to(1 / np.log(0.1 * place + 1), (batch, queries)).astype(np.float32)
    distance = np.log(0.1 * np.arange(keys)[::-1] + 1).astype(np.float32)
    at = rng.uniform(-0.2, 1.2, knots).astype(np.float32)
    return PiecewiseLinear(distance, reach, at, normal(heads, knots) / 2, normal(heads, 2), zero=keys - 1)


@dataclass(frozen=True)
class Fused:
    """A fused implementation: its `attention`, and how it is interpreted where its device is not."""

    attention: Callable[..., Any]
    interpret: Any

    def __call__(self, q, k, v, *, terms=(), mask=AttentionMask(), scale=None, positions=None, dropout=None):  # noqa: B008
        return self.attention(
            q,
            k,
            v,
            terms=terms,
            mask=mask,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            placement=Placement.of(positions, q.shape[1], k.shape[1]),
            dropout=None if dropout is None else (dropout[0], key_words(dropout[1])),
            interpret=self.interpret,
        )

    def with_gradients(self, arguments, cotangent, dtype, **call):
        """(out, gradients), q, k and v in `dtype`, terms in float32."""
        q, k, v, terms = arguments
        call = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, call)

        def loss(arguments):
            out = self(*arguments[:3], terms=arguments[3], **call)
            return jnp.sum(out.astype(jnp.float32) * cotangent), out

        given = (*(jnp.asarray(x, dtype) for x in (q, k, v)), jax.tree.map(jnp.asarray, terms))
        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
        return jax.device_get((out, gradients))

    def compare(self, sizes, kind="none", dtype=jnp.bfloat16, *, beside=(), **call):
        """The terms are those of the kind and those `beside` them."""
        (q, k, v, terms), cotangent = inputs(sizes, kind)
        terms = (*terms, *beside)
        rounded = tuple(np.asarray(jnp.asarray(x, dtype), np.float32) for x in (q, k, v))
        cotangent = np.asarray(jnp.asarray(cotangent, dtype), np.float32)
        expected = truth((*rounded, terms), cotangent, **call)
        found = self.with_gradients((*rounded, terms), cotangent, dtype, **call)
        for (path, want), got in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
            size = np.linalg.norm(want)
            error = np.linalg.norm(np.asarray(got, np.float32) - want)
            # dQ is a sum of two, each rounded, where there is a query table. An entry of a term's gradient sums dS of both signs;
            # in exact arithmetic those of a row add up to nothing.
            part = tuple(step.idx for step in path[:2])
            wider = {(1, 0): 2 if kind.startswith("query") else 1, (1, 3): 4}.get(part, 1)
            if path[-1] in CURVE:
                wider = 16  # each sums over all queries what dS inherits from the rounding of O
            # Gradients that are zero in exact arithmetic (of `a`, which softmax does not see) are noise in the reference.
            assert error <= wider * BOUND[dtype] * size + NOISE * np.sqrt(want.size), (
                jax.tree_util.keystr(path),
                error,
                size,
            )

    def compare_sinusoid(self, sizes, dtype, *beside, **call):
        """Tables that are a sinusoid, NEZHA's, are nobody's parameters: they have no gradients."""
        (q, k, v, _), cotangent = inputs(sizes, "none")
        wave = Wave(10000.0, 0.0)
        table = Table(wave.table(129, sizes.H)[:, None], Clip(64), wave)
        rounded = tuple(np.asarray(jnp.asarray(x, dtype), np.float32) for x in (q, k, v))
        arguments = (*rounded, (Relative(query=table, value=table), *beside))
        out, (*found, of_terms) = self.with_gradients(arguments, cotangent, dtype, **call)
        expected, (*wanted, of_expected) = truth(arguments, cotangent, **call)
        exact, summed = ((out, found), (expected, wanted), 2, 0.0), (of_terms[1:], of_expected[1:], 4, NOISE)
        for got, want, wider, noise in (exact, summed):
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                size, error = np.linalg.norm(b), np.linalg.norm(np.asarray(a, np.float32) - b)
                assert error <= wider * BOUND[dtype] * size + noise * np.sqrt(b.size), (b.shape, error, size)
        assert not any(np.any(x) for x in jax.tree.leaves(of_terms[0]))
