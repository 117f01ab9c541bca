"""The Toeplitz product on TPUs by discrete Fourier transforms that are matrix products: O(T √T) for two factors, T^(4/3) for three.

A transform of size M · 128 of a sequence in rows of 128 is a product from the left, a twiddle and a product from the right (index
in j = 128 j₁ + j₂, out k = k₁ + M k₂):

    X[k₁, k₂] = Σ_{j₂} ω_{128}^{j₂ k₂} · ω_{128 M}^{k₁ j₂} · Σ_{j₁} ω_M^{k₁ j₁} x[j₁, j₂]                        ω_n = e^{−2πi/n}

The result stays in its permuted order, which a product of spectra does not see, and the inverse undoes it. Two sequences that
share a real table travel as one complex one, x + i x′. Complex numbers are rows of real parts over rows of imaginary parts, and a
complex matrix from the left is [[Re, −Im], [Im, Re]]; of the padded half of a sequence no row is computed. The backward pass
transforms x and dy once each, for dx and for the table's gradient Σ X̄ ∘ dY.
Beyond 16,384 points a third factor of `outer` rows is taken before and after by XLA, as one more product and twiddle, and the kernel
transforms each of its rows.
Sources: Cooley and Tukey 1965; as products of this kind, with real sequences paired, Fu et al. 2023 (arXiv:2311.05908). Here lengths
are any multiple of 1,024 instead of powers of two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels import mosaic_tpu
from kernels.toeplitz.lags import from_circle, on_circle

LONGEST = 2**20

_LANES = 128
_MOST = 128  # rows of a sequence in the kernel, and of the third factor
_PAIRS = 8  # of sequences in one program


@dataclass(frozen=True)
class Plan:
    """Sizes of a call, `rows` = B · C: a circle of outer · inner · 128 points, at least twice the tokens."""

    length: int
    rows: int
    dtype: jnp.dtype
    interpret: mosaic_tpu.Interpret = False

    @property
    def outer(self) -> int:
        blocks = -(-2 * self.length // (_MOST * _LANES))
        return 1 if blocks == 1 else _up(blocks, 2)

    @property
    def inner(self) -> int:
        return _up(-(-2 * self.length // (self.outer * _LANES)), 16)

    @property
    def size(self) -> int:
        return self.outer * self.inner * _LANES

    @property
    def filled(self) -> int:
        """Rows of a sequence that the kernel is given; without a third factor the others are known to be zero."""
        return self.inner // 2 if self.outer == 1 else self.inner

    @property
    def table_rows(self) -> int:
        """Of the table, which is real and fills the circle; the third factor makes it complex."""
        return self.inner if self.outer == 1 else 2 * self.inner

    @property
    def pairs(self) -> int:
        """Pairs of sequences in one program."""
        pairs = -(-self.rows // 2)
        return -(-pairs // -(-pairs // _PAIRS))

    @property
    def pair_blocks(self) -> int:
        return -(-self.rows // (2 * self.pairs))

    @property
    def exact(self) -> bool:
        """Products in float32; else of two pieces of bfloat16 each, which is 16 bits, without the product of the small ones."""
        return self.dtype != jnp.bfloat16


def convolve(plan: Plan, x: Float[Array, "N W T"], h: Float[Array, "N _"]) -> Float[Array, "N W T"]:
    """y_i = Σ_n h[n] x_{i−n}, with h from n = −(T − 1) on."""
    z, matrices = _to_pairs(plan, x), _matrices(plan)
    table, tokens = _blocks(plan)
    run = _kernel(
        plan,
        _convolve,
        name="toeplitz_dft",
        heads=x.shape[0],
        inputs=[table, tokens, *map(_whole, matrices)],
        outputs=[tokens],
        shapes=[jax.ShapeDtypeStruct(z.shape, z.dtype)],
        scratch=1,
    )
    (y,) = run(_to_table(plan, h), z, *matrices)
    return _from_pairs(plan, y)


def gradients(
    plan: Plan, x: Float[Array, "N W T"], h: Float[Array, "N _"], dy: Float[Array, "N W T"]
) -> tuple[Float[Array, "N W T"], Float[Array, "N _"]]:
    """(dx, dh) for dx_j = Σ_n h[n] dy_{j+n} and dh[n] = Σ_{w,i} dy_i x_{i−n}."""
    z, g, matrices = _to_pairs(plan, x), _to_table(plan, h), _matrices(plan)
    table, tokens = _blocks(plan)
    run = _kernel(
        plan,
        _gradients,
        name="toeplitz_dft_gradients",
        heads=x.shape[0],
        inputs=[table, tokens, tokens, *map(_whole, matrices)],
        outputs=[tokens, table],
        shapes=[jax.ShapeDtypeStruct(z.shape, z.dtype), jax.ShapeDtypeStruct(g.shape, jnp.float32)],
        scratch=2,
    )
    dx, dg = run(g, z, _to_pairs(plan, dy), *matrices)
    return _from_pairs(plan, dx), _from_table(plan, dg)


def _kernel(plan: Plan, body, *, name, heads, inputs, outputs, shapes, scratch):
    return mosaic_tpu.kernel(
        functools.partial(body, plan),
        name=name,
        grid=(heads, plan.outer, plan.pair_blocks),
        sequential=1,
        inputs=inputs,
        outputs=outputs,
        shapes=shapes,
        scratch=[pltpu.VMEM((2 * plan.inner, _LANES), jnp.float32)] * scratch,
        interpret=plan.interpret,
    )


def _blocks(plan: Plan) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Of the table and of the pairs, at a head, a row of the third factor and a block of pairs."""
    table = pl.BlockSpec((1, 1, plan.table_rows, _LANES), lambda n, k, w: (n, k, 0, 0))
    tokens = pl.BlockSpec((1, plan.pairs, 1, 2 * plan.filled, _LANES), lambda n, k, w: (n, w, k, 0, 0))
    return table, tokens


def _whole(matrix: Array) -> pl.BlockSpec:
    return pl.BlockSpec(matrix.shape, lambda n, k, w: (0,) * matrix.ndim)


def _convolve(plan: Plan, table, x, *refs) -> None:
    *matrices, y, spectrum = refs
    transform = _Transform(plan, *matrices)

    @pl.when(pl.program_id(2) == 0)
    def _():
        spectrum[...] = transform.of_table(table[0, 0])

    def one(pair, _):
        found = transform.back(_times(spectrum[...], transform.of_tokens(x[0, pair, 0])))
        y[0, pair, 0] = found.astype(y.dtype)

    jax.lax.fori_loop(0, plan.pairs, one, None)


def _gradients(plan: Plan, table, x, dy, *refs) -> None:
    *matrices, dx, d_table, spectrum, total = refs
    transform = _Transform(plan, *matrices)

    @pl.when(pl.program_id(2) == 0)
    def _():
        spectrum[...] = transform.of_table(table[0, 0])
        total[...] = jnp.zeros_like(total)

    def one(pair, _):
        of_dy = transform.of_tokens(dy[0, pair, 0])
        total[...] += _times(of_dy, transform.of_tokens(x[0, pair, 0]), conjugate=True)
        dx[0, pair, 0] = transform.back(_times(of_dy, spectrum[...], conjugate=True)).astype(dx.dtype)

    jax.lax.fori_loop(0, plan.pairs, one, None)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_table[0, 0] = transform.table_back(total[...])


@dataclass(frozen=True)
class _Transform:
    """Within a kernel: sequences `[rows, 128]` to spectra `[2 M, 128]`, real parts over imaginary ones, and back by references
    to the matrices."""

    plan: Plan
    enter: Any
    leave: Any
    enter_table: Any
    leave_table: Any
    across: Any
    twiddle: Any

    def of_tokens(self, z: Array) -> Array:
        return self._across(self._product(_pieces(self.enter), self._split(z)))

    def of_table(self, g: Array) -> Array:
        return self._across(self._product(_pieces(self.enter_table), self._split(g)))

    def back(self, spectrum: Array) -> Array:
        return self._product(_pieces(self.leave), self._split(self._back_across(spectrum)))

    def table_back(self, spectrum: Array) -> Array:
        return self._product(_pieces(self.leave_table), self._split(self._back_across(spectrum)))

    def _across(self, rows: Array) -> Array:
        """From the right by Re + i Im, which stand side by side."""
        m = self.plan.inner
        by_parts = self._product(self._split(_times(rows, self.twiddle[...])), _pieces(self.across))
        (rr, ri), (ir, ii) = ((x[:, :_LANES], x[:, _LANES:]) for x in (by_parts[:m], by_parts[m:]))
        return jnp.concatenate([rr - ii, ri + ir])

    def _back_across(self, spectrum: Array) -> Array:
        """From the right by Re − i Im."""
        m = self.plan.inner
        by_parts = self._product(self._split(spectrum), _pieces(self.across))
        (rr, ri), (ir, ii) = ((x[:, :_LANES], x[:, _LANES:]) for x in (by_parts[:m], by_parts[m:]))
        return _times(jnp.concatenate([rr + ii, ir - ri]), self.twiddle[...], conjugate=True)

    def _split(self, x: Array) -> list[Array]:
        return _split(x, self.plan.exact)

    def _product(self, a: list[Array], b: list[Array]) -> Array:
        """Of two matrices in pieces, without that of their small ones."""
        precision = jax.lax.Precision.HIGHEST if self.plan.exact else None
        products = [
            jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)
            for i, x in enumerate(a)
            for y in b[: 2 - i]
        ]
        return functools.reduce(jnp.add, products)


def _pieces(matrix) -> list[Array]:
    return [matrix[i] for i in range(matrix.shape[0])]


def _times(a: Array, b: Array, conjugate: bool = False) -> Array:
    """a ∘ b, or a ∘ b̄, of complex numbers as real parts over imaginary ones."""
    m = a.shape[0] // 2
    (ar, ai), (br, bi) = (a[:m], a[m:]), (b[:m], -b[m:] if conjugate else b[m:])
    return jnp.concatenate([ar * br - ai * bi, ar * bi + ai * br])


def _split(x: Array, exact: bool) -> list[Array]:
    """x as a sum of what a product takes."""
    if exact or x.dtype == jnp.bfloat16:
        return [x]
    large = x.astype(jnp.bfloat16)
    return [large, (x - large.astype(jnp.float32)).astype(jnp.bfloat16)]


def _matrices(plan: Plan) -> list[Array]:
    """enter, leave, enter_table, leave_table and across, in pieces, and the twiddle; the inverse is scaled by its size."""
    m, filled = plan.inner, plan.filled
    fourier, scale = _fourier(m, np.arange(m)), 1 / (m * _LANES)
    whole, inverse = _real(fourier), _real(np.conj(fourier) * scale)
    columns = plan.table_rows
    across = _fourier(_LANES, np.arange(_LANES))
    twiddle = _fourier(m * _LANES, np.arange(_LANES))[:m]
    products = (
        _real(fourier[:, :filled]),
        _real(np.conj(fourier)[:filled] * scale),
        whole[:, :columns],
        inverse[:columns],
        np.concatenate([across.real, across.imag], axis=1),
    )
    pieces = [jnp.stack(_split(jnp.asarray(x, jnp.float32), plan.exact)) for x in products]
    return [*pieces, jnp.asarray(np.concatenate([twiddle.real, twiddle.imag]), jnp.float32)]


def _fourier(size: int, columns: np.ndarray) -> np.ndarray:
    """ω_size^{k j}, `[size, columns]`; the exponent is reduced while it is a whole number."""
    return np.exp(-2j * np.pi / size * (np.arange(size)[:, None] * columns[None] % size))


def _real(matrix: np.ndarray) -> np.ndarray:
    """What a complex matrix does to real parts over imaginary parts."""
    return np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]])


def _to_pairs(plan: Plan, x: Array) -> Array:
    """`[N, W, T]` → `[N, pairs, outer, 2 · filled, 128]`; neighbours in W are a pair."""
    heads, rows, length = x.shape
    more = 2 * plan.pairs * plan.pair_blocks - rows, plan.size // 2 - length
    x = jnp.pad(x, ((0, 0), (0, more[0]), (0, more[1])))
    if plan.outer > 1:
        x = _to_outer(plan, x.reshape(heads, -1, 2, plan.outer // 2, plan.inner, _LANES))
    return x.reshape(heads, -1, plan.outer, 2 * plan.filled, _LANES)


def _from_pairs(plan: Plan, y: Array) -> Array:
    if plan.outer > 1:
        y = y.reshape(*y.shape[:3], 2, plan.inner, _LANES)
        y = _from_outer(plan, y, plan.outer // 2, 2)
    return y.reshape(y.shape[0], -1, plan.size // 2)[:, : plan.rows, : plan.length].astype(plan.dtype)


def _to_table(plan: Plan, h: Array) -> Array:
    """`[N, 2T − 1]` → `[N, outer, table_rows, 128]`."""
    g = on_circle(h, plan.size).astype(jnp.float32)
    if plan.outer > 1:
        g = _to_outer(plan, g.reshape(-1, 1, 1, plan.outer, plan.inner, _LANES))
    return g.reshape(-1, plan.outer, plan.table_rows, _LANES)


def _from_table(plan: Plan, dg: Array) -> Array:
    if plan.outer > 1:
        dg = _from_outer(plan, dg.reshape(-1, 1, plan.outer, 2, plan.inner, _LANES), plan.outer, 1)
    return from_circle(dg.reshape(-1, plan.size), plan.length)


def _to_outer(plan: Plan, x: Array) -> Array:
    """The third factor: `[N, P, parts, rows, M, 128]` → `[N, P, outer, 2, M, 128]`, with its twiddle."""
    parts, rows = x.shape[2:4]
    fourier = _fourier(plan.outer, np.arange(rows))
    matrix = _real(fourier).reshape(2, plan.outer, 2, rows)[:, :, :parts]
    x = _einsum(plan, "dkcj,npcjml->npkdml", matrix, x.astype(jnp.float32))
    return _twiddled(plan, x, conjugate=False)


def _from_outer(plan: Plan, y: Array, rows: int, parts: int) -> Array:
    """Back: `[N, P, outer, 2, M, 128]` → `[N, P, parts, rows, M, 128]`, real parts alone or both."""
    fourier = np.conj(_fourier(plan.outer, np.arange(rows)).T) / plan.outer
    matrix = _real(fourier).reshape(2, rows, 2, plan.outer)[:parts]
    return _einsum(plan, "cjdk,npkdml->npcjml", matrix, _twiddled(plan, y, conjugate=True))


def _twiddled(plan: Plan, x: Array, conjugate: bool) -> Array:
    """x ∘ ω_size^{k m} over k < outer and m < 128 M, as ω^{128 k a} ω^{k b} for m = 128 a + b, from two small tables in float64."""
    k = np.arange(plan.outer)[:, None]
    large, small = (
        np.exp((2j if conjugate else -2j) * np.pi / plan.size * k * places)
        for places in (_LANES * np.arange(plan.inner), np.arange(_LANES))
    )
    lr, li, sr, si = (jnp.asarray(part, jnp.float32) for x in (large, small) for part in (x.real, x.imag))
    lr, li, sr, si = (
        lr[None, None, :, :, None],
        li[None, None, :, :, None],
        sr[None, None, :, None],
        si[None, None, :, None],
    )
    tr, ti = lr * sr - li * si, lr * si + li * sr
    real, imaginary = x[:, :, :, 0], x[:, :, :, 1]
    return jnp.stack([real * tr - imaginary * ti, real * ti + imaginary * tr], axis=3)


def _einsum(plan: Plan, spec: str, matrix: np.ndarray, x: Array) -> Array:
    return jnp.einsum(spec, jnp.asarray(matrix, jnp.float32), x, precision="highest" if plan.exact else "high")


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
