"""What the code published with NeoBERT and MosaicBERT computes, in NumPy and float64: the definition of both, for the tests.

No library has them. Read of github.com/chandar-lab/NeoBERT (model.py) and github.com/mosaicml/examples (bert_layers.py), and
stated anew; a tensor has the name and shape it has in their files. `p` maps names to float64 arrays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import erf

Tensors = Mapping[str, np.ndarray]


def linear(p: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def rms_norm(p: Tensors, name: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p[f"{name}.weight"]


def layer_norm(p: Tensors, name: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, real: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """softmax(q kᵀ / √H + bias) v over the real keys, `[B, T, N, H]` → `[B, T, N · H]`."""
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]) + bias
    scores = np.where(real[:, None, None] > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    return out.reshape(*out.shape[:2], -1)


def turned(x: np.ndarray) -> np.ndarray:
    """Channels 2m and 2m + 1 as one complex number times exp(i · t · 10000^(−2m/H)), at position t of `[B, T, N, H]`."""
    length, width = x.shape[1], x.shape[-1]
    angle = np.outer(np.arange(length), 10_000.0 ** (-np.arange(0, width, 2) / width))
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[None, :, None]
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def neobert(p: Tensors, ids: np.ndarray, real: np.ndarray, *, layers: int, heads: int, epsilon: float) -> np.ndarray:
    """The last layer, normalised: x ← x + attention(norm(x)); x ← x + W₃(silu(a) · b), [a, b] = W₁₂ norm(x)."""
    x = p["model.encoder.weight"][ids]
    for layer in range(layers):
        at = f"model.transformer_encoder.{layer}"
        # Each head's query, key and value stand together.
        qkv = linear(p, f"{at}.qkv", rms_norm(p, f"{at}.attention_norm", x, epsilon))
        q, k, v = np.split(qkv.reshape(*ids.shape, heads, -1), 3, axis=-1)
        x = x + linear(p, f"{at}.wo", attend(turned(q), turned(k), v, real))
        a, b = np.split(linear(p, f"{at}.ffn.w12", rms_norm(p, f"{at}.ffn_norm", x, epsilon)), 2, axis=-1)
        x = x + linear(p, f"{at}.ffn.w3", silu(a) * b)
    return rms_norm(p, "model.layer_norm", x, epsilon)


def slopes(heads: int) -> np.ndarray:
    """2^(−8(n+1)/N) where N is a power of two; else those of the next power below, then every other one of the next above."""
    lower = 1 << (heads.bit_length() - 1)
    if lower == heads:
        return 2.0 ** (-8 * (np.arange(heads) + 1) / heads)
    return np.concatenate([slopes(lower), slopes(2 * lower)[0::2][: heads - lower]])


def mosaicbert(
    p: Tensors, ids: np.ndarray, real: np.ndarray, types: np.ndarray, *, layers: int, heads: int, epsilon: float
) -> np.ndarray:
    """The last layer: BERT's block with biases −m_n |i − j| for positions and W_o(gelu(a) · b) + b_o, [a, b] = W x, to feed forward."""
    x = p["bert.embeddings.word_embeddings.weight"][ids] + p["bert.embeddings.token_type_embeddings.weight"][types]
    x = layer_norm(p, "bert.embeddings.LayerNorm", x, epsilon)
    apart = np.abs(np.arange(ids.shape[1])[:, None] - np.arange(ids.shape[1]))
    bias = -slopes(heads)[:, None, None] * apart
    for layer in range(layers):
        at = f"bert.encoder.layer.{layer}"
        qkv = linear(p, f"{at}.attention.self.Wqkv", x).reshape(*ids.shape, 3, heads, -1)
        mixed = linear(p, f"{at}.attention.output.dense", attend(*np.moveaxis(qkv, 2, 0), real, bias))
        x = layer_norm(p, f"{at}.attention.output.LayerNorm", x + mixed, epsilon)
        a, b = np.split(linear(p, f"{at}.mlp.gated_layers", x), 2, axis=-1)
        x = layer_norm(p, f"{at}.mlp.layernorm", x + linear(p, f"{at}.mlp.wo", gelu(a) * b), epsilon)
    return x
