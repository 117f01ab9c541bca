"""The public functions: check, choose an implementation, run it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Literal

import jax
from jaxtyping import Array, Float

from kernels.attention import reference
from kernels.attention.dropout import key_words
from kernels.attention.mask import AttentionMask
from kernels.attention.positions import Placement, Positions
from kernels.attention.terms import Term
from kernels.attention.validate import check_arrays, check_mask, check_terms

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
_FEW_QUERIES = 64  # half a tile of the fused kernels
_log = logging.getLogger(__name__)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    *,
    terms: tuple[Term, ...] = (),
    mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen, without arrays)
    scale: float | int | Array | None = None,
    positions: Positions | tuple[Positions, Positions] | None = None,
    dropout: tuple[float, Array] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N W"]:
    """Softmax attention with any sum of position terms.

    For query i, key j, head n and r = j − i, the difference of positions:

        logit = scale · ( ⟨q_i, k_j⟩ + ⟨q_i, A[ρ(r)]⟩ + ⟨k_j, C[ρ(r)]⟩ ) · m[n,r]  +  t[n,r]  +  a[n,i] + b[n,j]  +  f(i, j; θ)  +  dense[n,i,j]
        out_i = Σ_j p̃_ij ( v_j + E[ρ(r)] ),   p = softmax over the visible keys, p̃ = p after dropout

    Terms of one kind add up; several `Multiply` terms multiply, the per-channel ones inside ⟨q, k⟩. Head n of q reads
    head ⌊n · K / N⌋ of k and v. Softmax and every bias are float32 (float64 for float64 inputs); matmul operands stay in
    the dtype of q with float32 sums. A query that sees no key gives zeros and zero gradients.

    Args:
      q, k, v: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, Hv]`, one dtype; N a multiple of K.
      terms: position terms of `kernels.attention`.
      mask: who may attend to whom.
      scale: a number or a scalar array; None = 1/√H.
      positions: None = keys 0 … S − 1 with the queries last; one struct for both sides; or (the query's, the key's).
        Tables are sliced for None and for one contiguous struct, gathered otherwise.
      dropout: (rate, key). The bits are a hash of (key, b, n, i, j) with i, j array indices, the same in every implementation.
      implementation: a named one runs or raises; None takes "pallas_tpu" on TPUs and "pallas_gpu" on Hopper GPUs
        where they compute this call and have queries enough for their tiles, else "xla".

    Returns:
      `[B, T, N, Hv]` in the dtype of q.

    Raises:
      ValueError: a shape, dtype or term does not fit, or the named implementation does not exist.

    Sources: Vaswani et al. 2017 (arXiv:1706.03762); relative terms Shaw et al. 2018 (arXiv:1803.02155).
    """
    check_arrays(q, k, v)
    placement = check_call(q, k, terms, mask, scale, positions, v.shape[3])
    if implementation is None:
        implementation = _best(q, v, terms, mask, placement)
        _log.debug("attention: %s for q %s, k %s, %d terms", implementation, q.shape, k.shape, len(terms))
    return _named(implementation)(
        q,
        k,
        v,
        terms=terms,
        mask=mask,
        scale=_scale(scale, q),
        placement=placement,
        dropout=dropout_words(dropout),
    )


def logits(
    terms: tuple[Term, ...],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    mask: AttentionMask | None = None,
    scale: float | int | Array | None = None,
    positions: Positions | tuple[Positions, Positions] | None = None,
) -> Float[Array, "B N T S"]:
    """The scores of `attention` before softmax, dense, for cores that use them otherwise (relu², clipped softmax).

    Args as in `attention`; value tables of `terms` are not used here.

    Returns:
      `[B, N, T, S]` in float32 (float64 for float64 inputs); −inf where `mask` is given and hides the key.
    """
    check_arrays(q, k)
    placement = check_call(q, k, terms, mask, scale, positions, None)
    return reference.logits(terms, q, k, mask=mask, scale=_scale(scale, q), placement=placement)


def check_call(
    q: Array,
    k: Array,
    terms: tuple[Term, ...],
    mask: AttentionMask | None,
    scale: float | int | Array | None,
    positions: Positions | tuple[Positions, Positions] | None,
    value_width: int | None,
) -> Placement:
    """Holds the rest of a call against the shapes of q and k, and says where queries and keys stand."""
    check_terms(terms, q.shape, k.shape, value_width)
    if mask is not None:
        check_mask(mask, q.shape[0], q.shape[1], k.shape[1])
    if isinstance(scale, jax.Array) and scale.ndim != 0:
        raise ValueError(f"scale has shape {scale.shape}, expected a scalar (multiply q for one scale per head)")
    placement = Placement.of(positions, q.shape[1], k.shape[1])
    for side in (placement.query, placement.key):
        if side.token.shape[0] not in (1, q.shape[0]):
            raise ValueError(f"positions have a batch of {side.token.shape[0]}, expected 1 or {q.shape[0]}")
    return placement


def _scale(scale: float | int | Array | None, q: Array) -> float | Array:
    return q.shape[-1] ** -0.5 if scale is None else scale


def dropout_words(dropout: tuple[float, Array] | None) -> tuple[float, Array] | None:
    """(rate, the words its bits are counted from), None for no dropout."""
    if dropout is None:
        return None
    rate, key = dropout
    if isinstance(rate, jax.Array) or not 0 <= rate < 1:
        raise ValueError(f"dropout rate is {rate}, expected a Python number, 0 or more and below 1")
    return None if rate == 0 else (float(rate), key_words(key))


def platform_of(x: Array) -> str:
    """The platform of the devices that x is divided among, which need not be here; else that of JAX's own devices."""
    device = getattr(jax.typeof(x).sharding.mesh, "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def on_hopper() -> bool:
    """Whether the devices are GPUs that run "pallas_gpu"."""
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def _best(q: Array, v: Array, terms: tuple[Term, ...], mask: AttentionMask, placement: Placement) -> Implementation:
    fused = "pallas_tpu" if platform_of(q) == "tpu" else "pallas_gpu" if on_hopper() else None
    if fused is None or q.shape[1] < _FEW_QUERIES:
        return "xla"
    return "xla" if _module(fused).refusals(q, v, terms, mask, placement) else fused


def _module(name: str) -> ModuleType:
    # Those of Pallas take a second to import.
    return importlib.import_module(f"kernels.attention.{name}")


def _named(name: str) -> Callable[..., Array]:
    if name not in _IMPLEMENTATIONS:
        exist = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(
            f"attention implementation {name!r}: there is no such implementation; those that exist: {exist}"
        )
    return _module(name).attention
