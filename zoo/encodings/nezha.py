"""NEZHA's functional relative position encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from kernels.attention import Clip, Relative, Table, Wave
from zoo.encodings.encoding import AddTerms, Dims, Encoding, EncodingLayer, Facts, Place
from zoo.encodings.registration import registry


@registry.register("nezha")
@dataclass(frozen=True)
class Nezha(Encoding):
    """A fixed sinusoid of the clipped relative position, on the key and on the value side:

        logit = ⟨q_i, k_j + A[ρ(r)]⟩ / √H,   out_i = Σ_j p_ij (v_j + A[ρ(r)]),   ρ(r) = clip(r, −limit, limit) + limit
        A[ρ, 2m] = sin((ρ − phase) ω_m),  A[ρ, 2m + 1] = cos((ρ − phase) ω_m),  ω_m = base^(−2m/H)

    One table for all heads, layers and both sides; no parameters. phase="code" is 0: the released code tabulates the
    shifted row, and released weights need it. phase="paper" is `limit`: the sinusoid of r itself.
    Source: Wei et al. 2019 (arXiv:1909.00204), eq. 4 to 6.
    """

    limit: int = 64
    base: float = 10000.0
    phase: Literal["code", "paper"] = "code"

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"relative"}))

    def shared(self, dims: Dims) -> nn.Module:
        if dims.head_dim % 2:
            raise ValueError(f"encoding 'nezha' pairs channels: the head width must be even, not {dims.head_dim}")
        return FunctionalTable(self, dims.head_dim)

    def layer(self, dims: Dims) -> EncodingLayer:
        return AddTerms()


class FunctionalTable(nn.Module):
    encoding: Nezha
    head_dim: int

    @nn.compact
    def __call__(self, place: Place) -> tuple[Relative]:
        rows = Clip(self.encoding.limit)
        phase = {"code": 0.0, "paper": float(self.encoding.limit)}[self.encoding.phase]
        wave = Wave(self.encoding.base, phase)
        table = Table(jnp.asarray(wave.table(rows.num_rows, self.head_dim))[:, None, :], rows, wave)
        return (Relative(query=table, value=table),)
