"""ALiBi: attention with linear biases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from kernels.attention import Toeplitz
from zoo.encodings.encoding import AddTerms, Dims, Encoding, EncodingLayer, Facts, Place
from zoo.encodings.registration import registry


@registry.register("alibi")
@dataclass(frozen=True)
class Alibi(Encoding):
    """A fixed linear penalty on distance, steeper in some heads than in others: logit = ⟨q_i, k_j⟩/√H − m_n · |r|.

    form="causal": −m_n (i − j), for causal masks only; "symmetric": −m_n |r|, as MosaicBERT; "nonsymmetric": the first
    half of the heads sees r ≤ 0 only, the second r ≥ 0 only, each half with the slopes of N/2 heads (authors'
    repository, issue 5). Slopes are a geometric series for N a power of two, the authors' rule for other N.
    Source: Press et al. 2021 (arXiv:2108.12409). No parameters; any length.
    """

    form: Literal["causal", "symmetric", "nonsymmetric"] = "symmetric"

    def facts(self) -> Facts:
        return Facts(
            kinds=frozenset({"toeplitz"}),
            causal=self.form != "nonsymmetric",
            bidirectional=self.form != "causal",
        )

    def shared(self, dims: Dims) -> nn.Module:
        if self.form == "nonsymmetric" and dims.num_heads % 2:
            raise ValueError(f"encoding 'alibi', form='nonsymmetric' halves the heads; {dims.num_heads} heads are odd")
        return LinearBias(self, dims.num_heads)

    def layer(self, dims: Dims) -> EncodingLayer:
        return AddTerms()


class LinearBias(nn.Module):
    encoding: Alibi
    num_heads: int

    @nn.compact
    def __call__(self, place: Place) -> tuple[Toeplitz]:
        return (Toeplitz(jnp.asarray(linear_bias(self.encoding.form, self.num_heads, place.span))),)


def slopes(num_heads: int) -> np.ndarray:
    """m_n, float64 `[N]`: 2^(−8(n+1)/N) for N a power of two; else those of the next lower power c, then every other of 2c."""

    def series(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    lower = 2 ** math.floor(math.log2(num_heads))
    return np.concatenate([series(lower), series(2 * lower)[::2]])[:num_heads]


def linear_bias(form: str, num_heads: int, span: int) -> np.ndarray:
    """The bias over r = −span … span, float32 `[N, 2·span + 1]`."""
    r = np.arange(-span, span + 1)
    if form == "causal":
        bias = slopes(num_heads)[:, None] * np.minimum(r, 0)
    elif form == "symmetric":
        bias = -slopes(num_heads)[:, None] * np.abs(r)
    else:
        half = -slopes(num_heads // 2)[:, None] * np.abs(r)
        bias = np.concatenate([np.where(r <= 0, half, -np.inf), np.where(r >= 0, half, -np.inf)])
    return bias.astype(np.float32)
