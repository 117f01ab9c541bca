"""Optimizers as parts: LAMB, which knows that scanned layers are stacked in one leaf, and AdamW."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from zoo.registry import Registry
from zoo.training.rules import HasLayerAxis, first_match, named_leaves

registry = Registry("optimizer")
names = registry.names

Decay = Literal["never", "matrices", "always"]
Mask = Callable[[Any], Any]

# As in BERT and NEZHA, biases and everything of a norm are left alone; a vector that is no bias is left alone too.
DECAY_RULES: tuple[tuple[str, Decay], ...] = (
    (r"(^|/)(bias|scale)$", "never"),
    (r"(^|/)[^/]*norm[^/]*/", "never"),
    (r"", "matrices"),
)


def decay_mask(rules: tuple[tuple[str, Decay], ...], has_layer_axis: HasLayerAxis) -> Mask:
    """A function from a parameter tree to a tree of booleans: which leaves are decayed (and, in LAMB, adapted).

    `rules` are ordered (pattern, "never" | "matrices" | "always"); "matrices" takes leaves of at least two axes beside the
    layer axis.

    Raises:
      UserError: (when called) a name that no rule covers.
    """

    def mask(params: Any) -> Any:
        leaves = named_leaves(params)
        choices = first_match(rules, ["/".join(path) for path, _ in leaves], "weight-decay")
        flags = [
            choice == "always" or (choice == "matrices" and leaf.ndim - has_layer_axis(path) >= 2)
            for choice, (path, leaf) in zip(choices, leaves, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), flags)

    return mask


def scale_by_trust_ratio(
    mask: Mask, has_layer_axis: HasLayerAxis, ratio_clip: tuple[float, float] | None = None
) -> optax.GradientTransformation:
    """u ← ρ u with ρ = ‖x‖₂ / ‖u‖₂ for each layer and tensor, and ρ = 1 where either norm is 0 or the mask says no.

    A leaf with a layer axis [L, ...] holds L tensors: norms run over all axes but the first, giving one ρ per layer, as if
    the layers were not stacked. `optax.scale_by_trust_ratio` takes one norm over the whole leaf.
    Source: arXiv 1904.00962, algorithm 2. `ratio_clip` bounds ρ, as some released code does (NEZHA: 0 to 10).
    """

    def scale(path: tuple[str, ...], adapt: bool, update: jax.Array, param: jax.Array) -> jax.Array:
        if not adapt:
            return update
        axes = tuple(range(1 if has_layer_axis(path) else 0, param.ndim))
        param_norm = jnp.sqrt(jnp.sum(jnp.square(param), axes, keepdims=True))
        update_norm = jnp.sqrt(jnp.sum(jnp.square(update), axes, keepdims=True))
        nonzero = (param_norm > 0) & (update_norm > 0)
        ratio = jnp.where(nonzero, param_norm / jnp.where(nonzero, update_norm, 1.0), 1.0)
        if ratio_clip is not None:
            ratio = jnp.clip(ratio, *ratio_clip)
        return update * ratio

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        leaves = named_leaves(params)
        flags = jax.tree.leaves(mask(params))
        new = [
            scale(path, flag, u, x) for (path, x), flag, u in zip(leaves, flags, jax.tree.leaves(updates), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), new), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_uncorrected_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    """m / (√v + ε) with m ← b1 m + (1 − b1) g and v ← b2 v + (1 − b2) g²: Adam as BERT and ALBERT have it, without bias correction."""

    def update(updates: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        new = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mu, nu)
        return new, optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


@dataclasses.dataclass(frozen=True)
class _Adaptive:
    """What LAMB and AdamW have in common. `learning_rate` is the schedule's peak; `clip_norm` acts on the raw gradients."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    bias_correction: bool = True
    decay_rules: tuple[tuple[str, Decay], ...] = DECAY_RULES

    def __post_init__(self) -> None:
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"b1 and b2 lie in [0, 1), not {self.b1!r} and {self.b2!r}")
        if self.epsilon <= 0 or self.learning_rate < 0 or self.weight_decay < 0:
            raise ValueError("epsilon must be positive, learning_rate and weight_decay must not be negative")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive, or None for no clipping, not {self.clip_norm!r}")

    def _pieces(self, mask: Mask) -> list[optax.GradientTransformation]:
        adam = optax.scale_by_adam if self.bias_correction else scale_by_uncorrected_adam
        pieces = [] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]
        pieces.append(adam(self.b1, self.b2, self.epsilon))
        if self.weight_decay:
            pieces.append(optax.add_decayed_weights(self.weight_decay, mask))
        return pieces


@registry.register("lamb")
@dataclasses.dataclass(frozen=True)
class Lamb(_Adaptive):
    """LAMB (arXiv 1904.00962): u = m̂/(√v̂ + ε) + λ x;  x ← x − η ‖x‖/‖u‖ u, for each layer and tensor.

    Leaves that are not decayed take the plain Adam step −η m̂/(√v̂ + ε) (ρ = 1, λ = 0), as in ALBERT: a bias that starts
    at zero has no norm to adapt to. `bias_correction=False` gives ALBERT's moments.
    """

    ratio_clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio_clip is not None and not 0 <= self.ratio_clip[0] < self.ratio_clip[1]:
            raise ValueError(f"ratio_clip is (lowest, highest) with 0 <= lowest < highest, not {self.ratio_clip!r}")

    def build(self, schedule: optax.Schedule, *, has_layer_axis: HasLayerAxis) -> optax.GradientTransformation:
        """The transformation; `schedule` maps the number of updates so far to η."""
        mask = decay_mask(self.decay_rules, has_layer_axis)
        return optax.chain(
            *self._pieces(mask),
            scale_by_trust_ratio(mask, has_layer_axis, self.ratio_clip),
            optax.scale_by_learning_rate(schedule),
        )


@registry.register("adamw")
@dataclasses.dataclass(frozen=True)
class AdamW(_Adaptive):
    """AdamW (arXiv 1711.05101): x ← x − η (m̂/(√v̂ + ε) + λ x). `bias_correction=False` is the optimizer of BERT's released code."""

    def build(self, schedule: optax.Schedule, *, has_layer_axis: HasLayerAxis) -> optax.GradientTransformation:
        """The transformation; `schedule` maps the number of updates so far to η."""
        mask = decay_mask(self.decay_rules, has_layer_axis)
        return optax.chain(*self._pieces(mask), optax.scale_by_learning_rate(schedule))
