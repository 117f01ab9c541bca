"""What costs as much as matrix products to compute anew, by a name that policies of rematerialisation know it by."""

from __future__ import annotations

from typing import Any

from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"


def kept(results: Any) -> Any:
    """Arrays that the backward pass of attention needs of its forward pass, named so that `jax.checkpoint_policies.save_only_these_names(ATTENTION)`
    keeps them.
    """
    return checkpoint_name(results, ATTENTION)
