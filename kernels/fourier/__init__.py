"""Mixing by the discrete Fourier transform over tokens and channels, as FNet does in the place of attention."""

from kernels.fourier.mixing import fourier_mixing

__all__ = ["fourier_mixing"]
