"""How a pair of texts that is too long for a row is cut."""

from __future__ import annotations


def longest_first(first: int, second: int, budget: int) -> tuple[int, int]:
    """What is left of two lengths after taking one from the longer, at a tie from the second, until they fit.

    The same as Google's `_truncate_seq_pair` and Hugging Face's `longest_first`, without the loop.
    """
    if first + second <= budget:
        return first, second
    if second <= budget // 2:
        return budget - second, second
    if first <= budget - budget // 2:
        return first, budget - first
    return budget - budget // 2, budget // 2
