"""The product of a Toeplitz matrix and a sequence, which is a long convolution over tokens.

`toeplitz_matmul` computes it, forward and backward, at lengths up to a million.
"""

from kernels.toeplitz.api import toeplitz_matmul

__all__ = ["toeplitz_matmul"]
