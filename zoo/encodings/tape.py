"""TAPE: rotations that the content changes from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Site
from zoo.encodings.registration import registry
from zoo.encodings.rope import rotary_dim, rotation
from zoo.encodings.rope_scaling import plain_frequencies
from zoo.errors import UserError


@registry.register("tape")
@dataclass(frozen=True)
class Tape(Encoding):
    """Every token carries one complex number per head and pair of channels, z, from layer to layer; it starts as RoPE's rotation.

        logit = Re ⟨q_i z_i, k_j z_j⟩ / √H,   a = softmax(logit),
        z_i ← z_i + gain_n Σ_j a_ij z_j        after attention
        z_i ← z_i + Down ( silu(X y_i) ⊙ Up z_i )        after the feed-forward, whose output is y_i

    Pairs are those of the halves; X `[D, gates]`, Up `[K, gates]` and Down `[gates, K]` mix heads and leave each frequency
    alone, so that only differences of positions matter in every layer. gain and Up start at zero, where TAPE is `rope`.
    mixing="gain" is what acts of the released code's matrix, its row sums; "full" takes a matrix over heads.
    z is float32 and its magnitude may drift; the mix over tokens is computed in the dtype of the values, which are handed over
    as [v; Re z; Im z] and so cached twice as wide. With grouped heads there is one z per key/value head, and the mix is
    the mean over its queries' heads. The paper's random offset of the first phases would change nothing and is not here.
    Source: Zhu et al. 2025 (arXiv:2501.00712) and its released code.
    """

    theta: float = 10000.0
    gates: int = 48
    mixing: Literal["gain", "full"] = "gain"
    stddev: float = 0.02

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"transform", "values", "side"}))

    def init_side(self, dims: Dims) -> nn.Module:
        return FirstPhases(self.theta, dims.num_kv_heads, rotary_dim("tape", 1.0, dims.head_dim))

    def layer(self, dims: Dims) -> EncodingLayer:
        return Phased(self, dims.num_kv_heads)

    def after_feed_forward(self, dims: Dims) -> nn.Module:
        return Gated(self, dims.num_kv_heads)

    def cached_widths(self, dims: Dims, key: int, value: int) -> tuple[int, int]:
        return key, value + dims.head_dim


class Phases(NamedTuple):
    """z, float32: its real and imaginary part `[B, T, K, H/2]`."""

    real: jax.Array
    imaginary: jax.Array

    def plus(self, other: Phases) -> Phases:
        return Phases(self.real + other.real, self.imaginary + other.imaginary)

    def turn(self, x: jax.Array) -> jax.Array:
        """x `[B, T, N, H]` times z of its key/value head, pair by pair, in the dtype of x."""
        real, imaginary = (jnp.repeat(z, x.shape[2] // z.shape[2], axis=2) for z in self)
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([a * real - b * imaginary, a * imaginary + b * real], axis=-1)
        return turned.astype(x.dtype)


class FirstPhases(nn.Module):
    theta: float
    heads: int
    rotary_dim: int

    @nn.compact
    def __call__(self, x: jax.Array, place: Place) -> Phases:
        first = rotation(place.queries.token, plain_frequencies(self.theta, self.rotary_dim))
        shape = (*x.shape[:2], self.heads, self.rotary_dim // 2)
        return Phases(*(jnp.broadcast_to(part[:, :, None], shape) for part in first))


class Phased(EncodingLayer):
    encoding: Tape
    heads: int

    def setup(self):
        shape = (self.heads,) if self.encoding.mixing == "gain" else (self.heads, self.heads)
        self.gain = self.param("gain", nn.initializers.zeros, shape, jnp.float32)

    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        if site.place.sources is not None:
            raise UserError(
                "encoding 'tape' carries the positions of one sequence from layer to layer; it cannot be used with attention "
                "to a context; use alibi, t5 or rope there"
            )
        z: Phases = site.side["tape"]
        return Encoded(z.turn(q), z.turn(k), jnp.concatenate([v, *(part.astype(v.dtype) for part in z)], axis=-1))

    def back(self, out: jax.Array, shared: None, side: dict[str, Any], site: Site) -> tuple[jax.Array, dict[str, Any]]:
        z: Phases = side["tape"]
        pairs = z.real.shape[3]
        out, mixed = out[..., : -2 * pairs], out[..., -2 * pairs :].astype(jnp.float32)
        mixed = mixed.reshape(*mixed.shape[:2], self.heads, -1, 2, pairs).mean(axis=3)
        spec = "k,btkp->btkp" if self.encoding.mixing == "gain" else "kl,btkp->btlp"
        more = Phases(*(jnp.einsum(spec, self.gain, mixed[..., part, :], precision="highest") for part in (0, 1)))
        return out, {**side, "tape": z.plus(more)}


class Gated(nn.Module):
    encoding: Tape
    heads: int

    @nn.compact
    def __call__(self, z: Phases, y: jax.Array, place: Place) -> Phases:
        gates, normal = self.encoding.gates, nn.initializers.normal(self.encoding.stddev)
        content = self.param("content", normal, (y.shape[-1], gates), jnp.float32)
        up = self.param("up", nn.initializers.zeros, (self.heads, gates), jnp.float32)
        down = self.param("down", normal, (gates, self.heads), jnp.float32)
        gate = jax.nn.silu(jnp.matmul(y.astype(jnp.float32), content, precision="highest"))

        def mixed(part: jax.Array) -> jax.Array:
            return jnp.einsum("btg,kg,btkp,gl->btlp", gate, up, part, down, precision="highest")

        return z.plus(Phases(mixed(z.real), mixed(z.imaginary)))
