"""The product of activations with a weight matrix."""

from kernels.dense.product import product

__all__ = ["product"]
