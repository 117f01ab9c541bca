"""GTA: geometric transform attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import Positions
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Site
from zoo.encodings.registration import registry
from zoo.encodings.rope import Layout, Rotation, rotary_dim, rotate, rotation
from zoo.encodings.rope_scaling import plain_frequencies
from zoo.errors import UserError


@registry.register("gta")
@dataclass(frozen=True)
class Gta(Encoding):
    """The relative rotation acts on keys and values alike: out_i = Σ_j p_ij ρ(g_i)⁻¹ ρ(g_j) v_j, logit = ⟨ρ(g_i) q_i, ρ(g_j) k_j⟩/√H.

    In one dimension ρ(p) is RoPE's rotation R_p, and this is RoPE with values rotated there and back. With
    `grid` = (rows, columns) the first half of the pairs turns by the row and the second by the column of
    `Positions.grid`, by 2π · max_frequency · (row/rows) · 2^(m − M), m = 1 … M (the authors' code). Angles have the sign of
    that code; the paper's are their negatives, the same family.
    Source: Miyato et al. 2023 (arXiv:2310.10375). No parameters; `transform_values=False` is RoPE.
    """

    theta: float = 10000.0
    layout: Layout = "interleaved"
    transform_values: bool = True
    grid: tuple[int, int] | None = None
    max_frequency: float = 1.0

    def __post_init__(self):
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError(f"grid={self.grid} is (rows, columns), each at least 1")

    def facts(self) -> Facts:
        kinds = {"transform", "values"} if self.transform_values else {"transform"}
        # The cache keeps token positions, not those on a grid, and a grid has no order to decode in.
        return Facts(kinds=frozenset(kinds), decodes=self.grid is None)

    def shared(self, dims: Dims) -> nn.Module:
        rotary = rotary_dim("gta", 1.0, dims.head_dim)
        if self.grid is not None and rotary % 4:
            raise ValueError(
                f"encoding 'gta' with a grid turns half of the channels by the row and half by the column, in pairs: the head "
                f"width must be a multiple of 4, not {rotary}; use gta without a grid, or another head_dim"
            )
        return GroupTables(self, rotary)

    def layer(self, dims: Dims) -> EncodingLayer:
        return GroupLayer(self)


class GroupTables(nn.Module):
    encoding: Gta
    rotary_dim: int

    @nn.compact
    def __call__(self, place: Place) -> tuple[Rotation, Rotation]:
        queries = self._rotation(place.queries)
        return queries, queries if place.sources is None else self._rotation(place.sources)

    def _rotation(self, positions: Positions) -> Rotation:
        e = self.encoding
        if e.grid is None:
            return rotation(positions.token, plain_frequencies(e.theta, self.rotary_dim))
        if positions.grid is None:
            raise UserError(
                "encoding 'gta' with a grid needs rows and columns: give Positions.on_grid(rows, columns), or Positions(token, grid=…), "
                "or use it without a grid"
            )
        pairs = self.rotary_dim // 4
        octaves = 2 * np.pi * e.max_frequency * 2.0 ** (np.arange(1, pairs + 1) - pairs)
        row, column = (rotation(positions.grid[..., axis], octaves / size) for axis, size in enumerate(e.grid))
        return Rotation(
            jnp.concatenate([row.cos, column.cos], axis=-1), jnp.concatenate([row.sin, column.sin], axis=-1)
        )


class GroupLayer(EncodingLayer):
    encoding: Gta

    @nn.compact
    def __call__(
        self, shared: tuple[Rotation, Rotation], q: jax.Array, k: jax.Array, v: jax.Array, site: Site
    ) -> Encoded:
        layout = self.encoding.layout
        v = rotate(v, shared[1], layout) if self.encoding.transform_values else v
        return Encoded(rotate(q, shared[0], layout), rotate(k, shared[1], layout), v)

    def back(self, out: jax.Array, shared: Any, side: dict[str, Any], site: Site) -> tuple[jax.Array, dict[str, Any]]:
        if not self.encoding.transform_values:
            return out, side
        inverse = Rotation(shared[0].cos, -shared[0].sin)
        return rotate(out, inverse, self.encoding.layout), side
