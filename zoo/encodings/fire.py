"""FIRE: functional interpolation for relative positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import PiecewiseLinear
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Site
from zoo.encodings.registration import registry

Transform = Literal["log", "identity"]

_EPSILON = 1e-6


@registry.register("fire")
@dataclass(frozen=True)
class Fire(Encoding):
    """A small network of the distance relative to the query's position: logit = ⟨q_i, k_j⟩/√H + f_n(ψ(i − j) / ψ(max(i, L))).

    ψ(x) = ln(|c x| + 1) (or x itself, transform="identity"), c and L = |m · threshold| learned, and f a ReLU network
    1 → width → N, linear in u between its `width` knots, which is how attention evaluates it. For keys at or before the
    query u lies in [0, 1], so that f never leaves the range it was trained on, whatever the length. i is the query's position
    in its document. Parameters are a layer's own, or shared by all layers (FIRE-S).
    Source: Li et al. 2023 (arXiv:2310.04418); initial values c = 0.1, threshold 512, width 32 from its appendix.
    """

    threshold: float = 512.0
    width: int = 32
    transform: Transform = "log"
    share_layers: bool = False

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"piecewise_linear"}), bidirectional=False)

    def shared(self, dims: Dims) -> nn.Module | None:
        return FireNetwork(self, dims.num_heads) if self.share_layers else None

    def layer(self, dims: Dims) -> EncodingLayer:
        return FireLayer(self, dims.num_heads)


class Network(NamedTuple):
    """FIRE's parameters: c and L (scalars), and u → relu(u W1 + b1) W2 + b2 with W1 `[1, M]`, W2 `[M, N]`."""

    c: jax.Array
    threshold: jax.Array
    hidden_kernel: jax.Array
    hidden_bias: jax.Array
    output_kernel: jax.Array
    output_bias: jax.Array


class FireNetwork(nn.Module):
    """Holds the parameters; the first values are those of a PyTorch linear layer, U(−1/√inputs, 1/√inputs)."""

    encoding: Fire
    num_heads: int

    @nn.compact
    def __call__(self, place: Place) -> Network:
        width = self.encoding.width

        def even(inputs: int):
            bound = inputs**-0.5
            return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)

        def param(name: str, draw: Any, *shape: int) -> jax.Array:
            return self.param(name, draw, shape, jnp.float32)

        return Network(
            c=param("c", nn.initializers.constant(0.1)),
            threshold=jnp.abs(param("threshold", nn.initializers.ones) * self.encoding.threshold),
            hidden_kernel=param("hidden_kernel", even(1), 1, width),
            hidden_bias=param("hidden_bias", even(1), width),
            output_kernel=param("output_kernel", even(width), width, self.num_heads),
            output_bias=param("output_bias", even(width), self.num_heads),
        )


class FireLayer(EncodingLayer):
    encoding: Fire
    num_heads: int

    @nn.compact
    def __call__(self, shared: Network | None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        place = site.place
        net = FireNetwork(self.encoding, self.num_heads, name="network")(place) if shared is None else shared

        token = jnp.broadcast_to(place.queries.token, q.shape[:2])
        return Encoded(q, k, v, terms=(fire_bias(net, self.encoding.transform, token, place.span),))


def fire_bias(net: Network, transform: Transform, token: jax.Array, span: int) -> PiecewiseLinear:
    """f(ψ(i − j) / ψ(max(i, L))) for queries at the positions i = token, `[B, T]`, that look back at most `span`."""

    def psi(x: jax.Array) -> jax.Array:
        return x if transform == "identity" else jnp.log(jnp.abs(net.c * x) + 1.0)

    # Look-backs span … 0; a key after the query, which no causal mask shows, counts as one at it.
    distance = psi(jnp.arange(span, -1, -1).astype(jnp.float32))
    row_scale = 1.0 / (psi(jnp.maximum(token.astype(jnp.float32), net.threshold)) + _EPSILON)
    return PiecewiseLinear(distance, row_scale, *pieces(net), zero=span)


def pieces(net: Network) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The network over 0 ≤ u ≤ 1 as line[0] + line[1] · u + Σ_m slopes_m max(u, knots_m): knots `[M]`, slopes `[N, M]`, line `[N, 2]`.

    A unit relu(w u + b) bends at t = −b/w: it is w (max(u, t) − t) where w ≥ 0, else w (u − max(u, t)), plus its value
    at t, relu(w t + b). A knot that no u meets stands at −1 or 2 at the farthest, where the value at t makes up for it: so a unit
    with a tiny w has no huge knot, and kernels, which leave out what is not met, find none at u = 0. All of it is differentiable,
    and JAX's gradients through t are those of the network.
    """
    w, b = net.hidden_kernel[0], net.hidden_bias
    rising = w >= 0
    # The end for w = 0 where 0/0 would be: on for b > 0, off otherwise.
    end = jnp.where((b > 0) == rising, -1.0, 2.0)
    near = jnp.abs(b) < 2 * jnp.abs(w)
    t = jnp.where(near, jnp.clip(-b / jnp.where(near, w, 1.0), -1.0, 2.0), end)
    value = jax.nn.relu(w * t + b)
    constant = value - jnp.where(rising, w * t, 0.0)
    straight = jnp.where(rising, 0.0, w)
    bend = jnp.where(rising, w, -w)
    out = net.output_kernel
    through = jnp.matmul(jnp.stack([constant, straight]), out, precision="highest")
    line = jnp.stack([through[0] + net.output_bias, through[1]], axis=-1)
    return t, (bend[:, None] * out).T, line
