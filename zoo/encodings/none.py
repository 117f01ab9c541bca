"""No position encoding."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.encodings.encoding import Encoding, Facts
from zoo.encodings.registration import registry


@registry.register("none")
@dataclass(frozen=True)
class NoEncoding(Encoding):
    """No position encoding: logit = ⟨q_i, k_j⟩ / √H.

    Under a causal mask the mask itself carries position; without one the model is permutation-equivariant.
    Source: Haviv et al. 2022 (arXiv:2203.16634); "NoPE" in Kazemnejad et al. 2023 (arXiv:2305.19466).
    """

    def facts(self) -> Facts:
        return Facts(kinds=frozenset())
