"""Temporary memory of compiled programs, and whether it grows as the length or as its square."""

from __future__ import annotations

from collections.abc import Callable

import jax


def temporary_bytes(function: Callable, *arguments) -> int:
    """The peak of what the compiled program holds beside arguments and results; arguments may be shapes, nothing is run."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def assert_linear(peak: Callable[[int], int], length: int) -> None:
    """Twice the length costs twice the memory.

    One float32 array `[T, T]` costs 16 L² bytes at T = 2L and 4 L² at L, so 8 L² more than linear growth; a quarter of it is let
    through, which is room for how buffers are packed. Where such arrays are most of the memory the factor would be 4.
    """
    short, long = peak(length), peak(2 * length)
    assert long < 2.3 * short, f"{long:,} bytes after {short:,}: {long / short:.2f} times as much"
    assert long - 2 * short < 2 * length**2, (
        f"{long:,} bytes after {short:,}: {long - 2 * short:,} beyond linear growth"
    )
