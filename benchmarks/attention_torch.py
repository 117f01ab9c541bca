"""The peers of `benchmarks.attention` that are in torch; on a GPU alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

if TYPE_CHECKING:
    from benchmarks.attention import Setting, Timing


# Of FlexAttention's kernels, where its own choice does not fit the shared memory: with a table that has a gradient.
SMALL_TILES = {
    **{"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 1},
    **{"BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32},
}


def measured(setting: Setting, repeats: int) -> Iterator[tuple[str, Timing]]:
    """(name, timing) of scaled-dot-product attention, the same with the bias materialised, and FlexAttention."""
    calls = {
        "torch SDPA, none": plain,
        "torch SDPA, bias [1, N, T, T]": with_bias,
        "torch FlexAttention, table": flex,
        "torch FlexAttention, table, small tiles": functools.partial(flex, options=SMALL_TILES),
    }
    for name, make in calls.items():
        torch.cuda.empty_cache()
        yield name, timing(setting, make, repeats)


def plain(setting: Setting) -> Callable:
    return lambda q, k, v, values: F.scaled_dot_product_attention(q, k, v, is_causal=setting.causal)


def with_bias(setting: Setting) -> Callable:
    index = torch.arange(setting.T, device="cuda")
    r = index[None, :] - index[:, None]

    def call(q, k, v, values):
        bias = values[:, (r + 128).clamp(0, 256)].to(q.dtype)[None]
        if setting.causal:
            bias = bias.masked_fill(r > 0, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return call


def flex(setting: Setting, options: dict[str, int] | None = None) -> Callable:
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if setting.causal:
        mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, setting.T, setting.T)

    def call(q, k, v, values):
        def score(score, b, h, i, j):
            return score + values[h, (j - i + 128).clamp(0, 256)]

        return compiled(q, k, v, score_mod=score, block_mask=mask, kernel_options=options)

    return call


def timing(setting: Setting, make: Callable, repeats: int) -> Timing:
    from benchmarks.attention import Timing, clocked

    *arrays, values = setting.arrays()
    q, k, v, cotangent = (
        torch.tensor(x, device="cuda").to(torch.bfloat16).transpose(1, 2).contiguous() for x in arrays
    )
    values = torch.tensor(values, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v, values)]

    def wait(_) -> None:
        torch.cuda.synchronize()

    try:
        call = make(setting)

        def both():
            out = call(*leaves)
            return torch.autograd.grad(out, leaves, cotangent, allow_unused=True)

        def forward():
            with torch.no_grad():
                return call(*leaves)

        return Timing(clocked(forward, wait, repeats), clocked(both, wait, repeats))
    except Exception as error:  # whatever a library says is its line in the table
        return Timing(failed=" ".join(str(error).split())[:100] or type(error).__name__)
