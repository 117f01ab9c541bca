"""A text read through a window that slides over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from zoo.errors import UserError


class Windows(Sequence):
    """Windows of `length` tokens over one long row, each beginning `stride` tokens after the one before.

    Every window is a row as `zoo.data.packing.pack_row` gives it, with positions counted in the window. In the first each token is to be
    scored that has another before it, in every other the last `stride`: so each token of the text but the first is scored
    once, with at least length − stride tokens before it, or all there are (Press et al. 2021, arXiv:2108.12409, appendix B).

    Args:
      text: a packed row: `input_ids`, `segment_ids`, `positions`, `word_starts`, each [tokens]; padding is left out.
      pad: the id that fills the last window.

    Raises:
      UserError: a stride that leaves a token out or nothing to see, or a text that no window fills.
    """

    def __init__(self, text: Mapping[str, np.ndarray], length: int, stride: int, pad: int):
        if not 1 <= stride < length:
            raise UserError(f"a stride of {stride} tokens in windows of {length}: expected 1 to {length - 1}")
        real = int(np.count_nonzero(text["segment_ids"]))
        if real < length:
            raise UserError(f"the text has {real} tokens, which fill no window of {length}")
        self.length, self.stride, self._pad, self._tokens = length, stride, pad, real
        self._text = {name: values[:real] for name, values in text.items()}

    def __len__(self) -> int:
        return 1 + -(-(self._tokens - self.length) // self.stride)

    def __getitem__(self, window: int) -> dict[str, np.ndarray]:
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        start = window * self.stride
        row = {name: values[start : start + self.length].copy() for name, values in self._text.items()}
        row["positions"][row["segment_ids"] == row["segment_ids"][0]] -= row["positions"][0]
        missing = self.length - len(row["input_ids"])
        fill = {"input_ids": self._pad}
        return {name: np.pad(v, (0, missing), constant_values=fill.get(name, 0)) for name, v in row.items()}

    def scored(self) -> np.ndarray:
        """Which predictions count, bool [windows, length]; that at index t is of the token at t + 1."""
        index = np.arange(self.length)
        last = (index >= self.length - 1 - self.stride) & (index < self.length - 1)
        return np.where(np.arange(len(self))[:, None] == 0, index < self.length - 1, last)
