"""Freed memory stays with the process, so that a step on the CPU does not ask the kernel for its temporaries anew."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_KEPT, _KEPT_AT_THE_TOP = 512 * 2**20, 64 * 2**20  # bytes


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed, where there is glibc; does nothing elsewhere.

    XLA's CPU backend allocates the temporaries of each call by malloc. By default glibc gets blocks above some size from the
    kernel and gives them back at once, so every step pays page faults for all of them: 14,268 a step of configs/demo.py, which
    then takes 46 instead of 37 ms (2 cores, jax 0.10.2).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TOP_PAD, _KEPT_AT_THE_TOP)
