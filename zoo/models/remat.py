"""What the backward pass recomputes instead of storing, by name."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from kernels.kept import ATTENTION
from zoo.errors import UserError, near


def _and_attention(policy: Callable) -> Callable:
    of_attention = jax.checkpoint_policies.save_only_these_names(ATTENTION)
    return jax.checkpoint_policies.save_from_both_policies(policy, of_attention)


_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _and_attention(jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _and_attention(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def names() -> tuple[str, ...]:
    return tuple(_POLICIES)


def remat(block: type[nn.Module], policy: str, *, looped: bool = True) -> type[nn.Module]:
    """`block` under the policy: "none" stores everything, "full" nothing, "dots" matrix products and what attention gives,
    "dots_no_batch" of the products those without batch dimensions. Attention's scores are in none of these, but where a mixer multiplies them
    out itself, which "dots" stores. `looped`: the block runs in a loop of the compiled program.

    Raises:
      UserError: no such policy.
    """
    if policy not in _POLICIES:
        raise UserError(f"unknown remat policy {policy!r}; {near(policy, _POLICIES)}")
    if policy == "none":
        return block
    # In a loop nothing can be merged across iterations, so the barriers that prevent it would only cost time.
    return nn.remat(block, policy=_POLICIES[policy], prevent_cse=not looped)
