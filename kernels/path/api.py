"""The public functions: check, choose an implementation, run it."""

from __future__ import annotations

import logging
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention import AttentionMask, Positions, Term
from kernels.attention.api import check_call, dropout_words, platform_of
from kernels.attention.positions import Placement
from kernels.attention.reference import accumulator
from kernels.attention.validate import check_arrays
from kernels.path import reference, xla
from kernels.path.validate import check_additive, check_backwards, check_path

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]

_FEW_QUERIES = 64  # half a piece of the fused kernels
_log = logging.getLogger(__name__)


def path_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    w: Float[Array, "B S K H"],
    beta: Float[Array, "B S K"],
    *,
    log_forget: Float[Array, "B S N"] | None = None,
    terms: tuple[Term, ...] = (),
    mask: AttentionMask = AttentionMask(causal=True),  # noqa: B008 (frozen, without arrays)
    scale: float | int | Array | None = None,
    positions: Positions | tuple[Positions, Positions] | None = None,
    dropout: tuple[float, Array] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N W"]:
    """Causal softmax attention whose product passes every token between the two, one Householder-like matrix each.

    For query i, key j ≤ i and H_t = I − β_t w_t w_tᵀ (with |w| = 1, β = 0 is the identity, 1 a projection, 2 a reflection):

        logit = scale · q_iᵀ H_i H_{i−1} … H_{j+1} k_j  +  Σ_{j<t≤i} log_forget_t  +  terms,   out_i = Σ_j p_ij v_j

    The products along the path, w, β and sums are float32 (float64 for float64 inputs); what meets keys and values is
    multiplied in the dtype of q with float32 sums. A key that is padding, by its segment 0 or `key_valid`, is not on any path
    and forgets nothing. One that a window or a block hides still is, so that these leave the scores of what they show alone.
    A path never leaves its document: packed equals padded.

    Args:
      q, k, v: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, Hv]`, one dtype; N a multiple of K, and T ≤ S: the queries are the
        last T tokens.
      w, beta: `[B, S, K, H]` and `[B, S, K]`, in any floating dtype. |w| = 1 and 0 ≤ β ≤ 2 keep every product bounded.
      log_forget: `[B, S, N]`, ln f ≤ 0 of every token; outside the scale.
      terms: `Toeplitz`, `RowColumn`, `PiecewiseLinear`, `Pairwise` and `Dense` of `kernels.attention`.
      mask: causal and without a prefix. A document is one run of a segment id, with its keys in the order of their positions.
      scale: a number or a scalar array; None = 1/√H.
      positions: as in `attention`, for the mask and the terms; a path goes by the order of the arrays.
      dropout: (rate, key), with the bits of `attention`.
      implementation: "reference", "xla" or "pallas_tpu"; a named one runs or raises, None takes "pallas_tpu" on TPUs where it
        computes this call and has queries enough for its tiles, else "xla".

    Returns:
      `[B, T, N, Hv]` in the dtype of q.

    Raises:
      ValueError: a shape, dtype, term or mask does not fit, or the named implementation does not exist.

    Source: Yang et al. 2025 (arXiv:2505.16381); with a forget gate its PaTH-FoX, after Lin et al. 2025 (arXiv:2503.02130). The
    released code adds log_forget inside the scale: pass log_forget · scale for that.
    """
    check_arrays(q, k, v)
    placement, path = _check(q, k, v.shape[3], w, beta, log_forget, terms, mask, scale, positions)
    if implementation is None:
        implementation = _best(q, k, v, terms, mask, dropout)
        _log.debug("path_attention: %s for q %s, k %s", implementation, q.shape, k.shape)
    return _named(implementation)(
        q,
        k,
        v,
        *path,
        terms=terms,
        mask=mask,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        placement=placement,
        dropout=dropout_words(dropout),
    )


def logits(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    w: Float[Array, "B S K H"],
    beta: Float[Array, "B S K"],
    *,
    log_forget: Float[Array, "B S N"] | None = None,
    terms: tuple[Term, ...] = (),
    mask: AttentionMask = AttentionMask(causal=True),  # noqa: B008 (frozen, without arrays)
    scale: float | int | Array | None = None,
    positions: Positions | tuple[Positions, Positions] | None = None,
) -> Float[Array, "B N T S"]:
    """The scores of `path_attention` before softmax, dense, by its definition; arguments as there.

    Returns:
      `[B, N, T, S]` in float32 (float64 for float64 inputs); −inf where `mask` hides the key, and for every key after the query.
    """
    check_arrays(q, k)
    placement, path = _check(q, k, None, w, beta, log_forget, terms, mask, scale, positions)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.logits(q, k, *path, terms=terms, mask=mask, scale=scale, placement=placement)


def carried(
    k: Float[Array, "B S K H"],
    w: Float[Array, "B S K H"],
    beta: Float[Array, "B S K"],
    before: Float[Array, "B P K H"] | None = None,
) -> Float[Array, "B _ K H"]:
    """Keys at the end of the sequence, as plain attention of the last token meets them: H_S … H_{j+1} k_j.

    `before` are keys that stand at the beginning of it in the same sense, so that a cache of such keys goes on token by token;
    float32 keeps its rounding small, since every token rounds every key once more.

    Returns:
      `[B, P + S, K, H]`, those of `before` first, in the dtype of `before` or of k; computed in float32 at least.

    Raises:
      ValueError: a shape or dtype does not fit.
    """
    before = k[:, :0] if before is None else before
    check_path(k, k, w, beta, None)
    if before.shape[:1] + before.shape[2:] != k.shape[:1] + k.shape[2:]:
        raise ValueError(
            f"before has shape {before.shape}, expected [{k.shape[0]}, any length, {k.shape[2]}, {k.shape[3]}]"
        )
    return xla.carried(k, w, beta, before)


def _check(q, k, value_width, w, beta, log_forget, terms, mask, scale, positions) -> tuple[Placement, tuple]:
    """Where queries and keys stand, and (w, β, log_forget) in the dtype of sums, those of padding without effect."""
    placement = check_call(q, k, terms, mask, scale, positions, value_width)
    check_path(q, k, w, beta, log_forget)
    check_additive(terms)
    check_backwards(mask)
    wide = accumulator(q.dtype)
    given = (beta,) if log_forget is None else (beta, log_forget)
    for tokens in (mask.key_valid, None if mask.key_segments is None else mask.key_segments > 0):
        if tokens is not None:
            given = tuple(jnp.where(tokens[..., None], x, 0) for x in given)
    beta, *forget = (x.astype(wide) for x in given)
    return placement, (w.astype(wide), beta, *(forget or [None]))


def _best(q, k, v, terms: tuple[Term, ...], mask: AttentionMask, dropout) -> Implementation:
    if platform_of(q) != "tpu" or q.shape[1] < _FEW_QUERIES:
        return "xla"
    from kernels.path import pallas_tpu

    return "xla" if pallas_tpu.refusals(q, k, v, terms, mask, dropout) else "pallas_tpu"


def _named(name: str):
    match name:
        case "reference":
            return reference.path_attention
        case "xla":
            return xla.path_attention
        case "pallas_tpu":
            from kernels.path import pallas_tpu  # Pallas takes a while to import

            return pallas_tpu.path_attention
    reason = "this version has no such kernel" if name == "pallas_gpu" else "there is no such implementation"
    raise ValueError(f"path_attention implementation {name!r}: {reason}; those that exist: reference, xla, pallas_tpu")
