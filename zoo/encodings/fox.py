"""FoX: the forget gate of the forgetting transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import RowColumn
from kernels.attention.sums import restarting_sums
from zoo.encodings.documents import documents
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Site
from zoo.encodings.registration import registry
from zoo.errors import UserError


@registry.register("fox")
@dataclass(frozen=True)
class Fox(Encoding):
    """Every token forgets a part of what lies before it: logit = ⟨q_i, k_j⟩/√H + Σ_{j<u≤i} ln f_u, f_u = σ(w_n · x_u + b_n).

    A decay per head that depends on the content between query and key, for causal masks. The gate has a bias that starts at
    0; its logarithms are added up in float32 and begin anew in every packed document, so that a sum never grows beyond
    its document (one of 70,000, 100,000 tokens at f = 0.5, is exact to 0.008, a thousandth of that at 100 tokens). Padding
    forgets nothing. A window does not change the sums. It may be combined with RoPE (`fox+rope`).
    Source: Lin et al. 2025 (arXiv:2503.02130). The paper's "Pro" block (norms, output gate, shift) is not here.
    """

    stddev: float = 0.02

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"row_column"}), bidirectional=False)

    def layer(self, dims: Dims) -> EncodingLayer:
        return ForgetGate(dims.num_heads, self.stddev)

    def init_cache(self, dims: Dims, batch: int, max_length: int, dtype: Any) -> ForgetCache:
        return ForgetCache(
            sums=jnp.zeros((batch, dims.num_heads, max_length), jnp.float32),
            last=jnp.zeros((batch, dims.num_heads), jnp.float32),
            segment=jnp.zeros((batch,), jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )


class ForgetCache(NamedTuple):
    """While decoding: the sums Σ ln f up to each slot `[B, N, S]`, that of the last one `[B, N]`, its segment `[B]`, slots used."""

    sums: jax.Array
    last: jax.Array
    segment: jax.Array
    length: jax.Array


class ForgetGate(EncodingLayer):
    num_heads: int
    stddev: float

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        if site.place.sources is not None:
            raise UserError(
                "encoding 'fox' counts what was forgotten between a query and a key of one sequence; it cannot be used "
                "with attention to a context; use alibi, t5 or rope there"
            )
        gate = nn.Dense(
            self.num_heads,
            dtype=jnp.float32,
            precision="highest",
            kernel_init=nn.initializers.truncated_normal(self.stddev),
            name="gate",
        )
        log_forget = jax.nn.log_sigmoid(gate(site.x))
        segments = documents(site.mask, log_forget.shape[:2])
        log_forget = jnp.where((segments > 0)[..., None], log_forget, 0.0)
        if site.cache is None:
            sums = jnp.moveaxis(running_sums(log_forget, segments), 2, 1)
            return Encoded(q, k, v, terms=(RowColumn(sums, -sums),))
        sums = jnp.moveaxis(running_sums(log_forget, segments, site.cache), 2, 1)
        cache = site.cache
        cache = ForgetCache(
            sums=jax.lax.dynamic_update_slice(cache.sums, sums, (0, 0, cache.length)),
            last=sums[:, :, -1],
            segment=segments[:, -1],
            length=cache.length + sums.shape[2],
        )
        return Encoded(q, k, v, terms=(RowColumn(sums, -cache.sums),), cache=cache)


def running_sums(log_forget: jax.Array, segments: jax.Array, before: ForgetCache | None = None) -> jax.Array:
    """Σ_{u ≤ i, in the document of i} ln f_u: `[B, T, N]` from ln f `[B, T, N]` and segments `[B, T]`; goes on after `before`."""
    if before is None:
        carried, segment = jnp.zeros_like(log_forget[:, 0]), segments[:, 0]
    else:
        carried, segment = before.last, before.segment
    previous = jnp.concatenate([segment[:, None], segments[:, :-1]], axis=1)
    values = jnp.concatenate([carried[:, None], log_forget], axis=1)
    starts = jnp.pad(segments != previous, [(0, 0), (1, 0)], constant_values=True)
    return restarting_sums(values, starts)[:, 1:]
