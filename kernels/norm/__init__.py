"""Normalisation of the last axis."""

from kernels.norm.normalize import normalize

__all__ = ["normalize"]
