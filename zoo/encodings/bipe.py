"""BiPE: bilevel positions, one code within a sentence and another between sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask, Positions, RowColumn
from zoo.encodings.alibi import slopes
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Site
from zoo.encodings.registration import registry
from zoo.encodings.rope import Layout, RotaryLayer, Rotation, rotary_dim, rotation
from zoo.encodings.rope_scaling import Scaling, plain_frequencies
from zoo.errors import UserError


@dataclass(frozen=True)
class Bilevel(Encoding):
    """What both forms share: x_i ← x_i + A[min(o_i, max_within − 1)], A learned, o_i the token's index within its sentence.

    A sentence ends with a token of `separators` (ids of the vocabulary: full stop, line feed), which belongs to it. The
    model counts sentences from its input ids by them, or is given `Positions(token, sentence=…, within=…)`.
    """

    separators: tuple[int, ...] = ()
    max_within: int = 1024
    stddev: float = 0.02

    def __post_init__(self):
        if self.max_within < 1:
            raise ValueError(f"max_within={self.max_within} is a number of rows; it must be at least 1")

    def embedding(self, dims: Dims) -> nn.Module:
        return WithinSentence(self.max_within, dims.model_dim, self.stddev)


@registry.register("bipe_rope")
@dataclass(frozen=True)
class BipeRope(Bilevel):
    """Learned positions within a sentence, RoPE on the index of the sentence between them.

        x_i ← x_i + A[o_i] at the input,   q'_i = R_{s_i} q_i, k'_j = R_{s_j} k_j in every layer

    s_i counts the sentences that ended before token i, o_i its index within its own; o_i beyond the table takes the last
    row, as in the released code. Sentences end with a token of `separators`, ids of the vocabulary; without them the model
    must be given sentence indices. Numbers of sentences grow slowly with length, and `scaling` is that of `rope`.
    Source: He et al. 2024 (arXiv:2401.16421) and its released code. The paper trains causal models; nothing here needs one.
    """

    theta: float = 10000.0
    layout: Layout = "half"
    scaling: Scaling | None = None

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"embedding", "transform"}), sentences=True, separators=self.separators)

    def shared(self, dims: Dims) -> nn.Module:
        return SentenceRotation(self, rotary_dim("bipe_rope", 1.0, dims.head_dim))

    def layer(self, dims: Dims) -> EncodingLayer:
        return RotaryLayer(self.layout)


@registry.register("bipe_alibi")
@dataclass(frozen=True)
class BipeAlibi(Bilevel):
    """Learned positions within a sentence, a linear penalty on the number of sentences between: − m'_n (s_i − s_j).

    m'_n = slope_factor · m_n with ALiBi's slopes, 96 in the released code. For causal masks. `separators` and the table
    within a sentence are those of `bipe_rope`.
    Source: He et al. 2024 (arXiv:2401.16421) and its released code.
    """

    slope_factor: float = 96.0

    def facts(self) -> Facts:
        return Facts(
            kinds=frozenset({"embedding", "row_column"}),
            bidirectional=False,
            sentences=True,
            separators=self.separators,
        )

    def layer(self, dims: Dims) -> EncodingLayer:
        return SentencePenalty(self.slope_factor, dims.num_heads)


class WithinSentence(nn.Module):
    rows: int
    width: int
    stddev: float

    @nn.compact
    def __call__(self, x: jax.Array, place: Place, mask: AttentionMask, cache: Any) -> tuple[jax.Array, Any]:
        table = self.param("table", nn.initializers.normal(self.stddev), (self.rows, self.width), jnp.float32)
        within = place.queries.within
        if within is None:
            raise UserError("a bipe encoding needs Positions.within, the index of each token within its sentence")
        return x + table[jnp.clip(within, 0, self.rows - 1)].astype(x.dtype), cache


class SentenceRotation(nn.Module):
    encoding: BipeRope
    rotary_dim: int

    @nn.compact
    def __call__(self, place: Place) -> tuple[Rotation, Rotation]:
        e = self.encoding
        frequencies, temperature = plain_frequencies(e.theta, self.rotary_dim), 1.0
        if e.scaling is not None:
            frequencies = e.scaling.frequencies(e.theta, self.rotary_dim, place.span + 1)
            temperature = e.scaling.temperature
        queries = rotation(sentences(place.queries, "bipe_rope"), frequencies, temperature)
        if place.sources is None:
            return queries, queries
        return queries, rotation(sentences(place.sources, "bipe_rope"), frequencies, temperature)


class SentencePenalty(EncodingLayer):
    slope_factor: float
    num_heads: int

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        attended = site.place.attended
        of_queries, of_keys = attended if isinstance(attended, tuple) else (attended, attended)
        slope = jnp.asarray(self.slope_factor * slopes(self.num_heads), jnp.float32)[None, :, None]

        def penalty(positions: Positions) -> jax.Array:
            s = sentences(positions, "bipe_alibi")[:, None, :].astype(jnp.float32)
            return jnp.broadcast_to(slope * s, (q.shape[0], self.num_heads, s.shape[2]))

        return Encoded(q, k, v, terms=(RowColumn(-penalty(of_queries), penalty(of_keys)),))


def sentences(positions: Positions, name: str) -> jax.Array:
    """Sentence indices `[B or 1, T]`.

    Raises:
      UserError: there are none; says how to give them.
    """
    if positions.sentence is None:
        raise UserError(
            f"encoding {name!r} needs sentence indices: give it separators=(…), the ids of the tokens that end a sentence, or "
            "positions as Positions(token, sentence=…, within=…); rope and alibi need neither"
        )
    return positions.sentence
