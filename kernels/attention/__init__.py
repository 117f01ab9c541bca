"""Softmax attention with structural masks and any sum of position terms.

`attention` computes it, `logits` gives the scores alone; terms and masks are data.
"""

from kernels.attention.api import attention, logits
from kernels.attention.mask import AttentionMask
from kernels.attention.positions import Positions
from kernels.attention.terms import (
    Clip,
    Dense,
    LogBuckets,
    Multiply,
    Pairwise,
    PiecewiseLinear,
    Relative,
    Reverse,
    RowColumn,
    RowMap,
    Table,
    Term,
    Toeplitz,
    Wave,
)

__all__ = [
    "AttentionMask",
    "Clip",
    "Dense",
    "LogBuckets",
    "Multiply",
    "Pairwise",
    "PiecewiseLinear",
    "Positions",
    "Relative",
    "Reverse",
    "RowColumn",
    "RowMap",
    "Table",
    "Term",
    "Toeplitz",
    "Wave",
    "attention",
    "logits",
]
