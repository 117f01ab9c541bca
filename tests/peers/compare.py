"""What "the same as the source library" means, for outputs and for gradients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict

from tests.peers.ours import Results


def check_outputs(ours: Results, theirs: Mapping[str, np.ndarray], attention_mask: np.ndarray) -> None:
    """Within 1e-5 of each other at every real token.

    Values are below 10, and most of the size of one: float32 sums of 13 to 128 products in another order, through two
    layers, end 2.5e-6 apart at most. At padding nobody reads hidden states and logits, and the two differ.
    """
    real = attention_mask.astype(bool)
    for name, expected in theirs.items():
        found = getattr(ours, name)
        if name in ("hidden_states", "logits"):
            found, expected = found[..., real, :], expected[..., real, :]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=name)


def check_gradients(ours: dict, theirs: dict) -> None:
    """Within 2e-5 of each leaf's largest entry; found were 6e-6.

    The gradient of the keys' bias is zero but for rounding, since it shifts all scores of a query alike: a leaf of small
    entries is measured by a hundredth of the largest entry of all leaves.
    """
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert set(ours) == set(theirs)
    sizes = {name: float(np.abs(leaf).max()) for name, leaf in theirs.items()}
    least = 1e-2 * max(sizes.values())
    apart = {name: float(np.abs(ours[name] - leaf).max()) / max(sizes[name], least) for name, leaf in theirs.items()}
    assert max(apart.values()) < 2e-5, {name: value for name, value in apart.items() if value >= 2e-5}
