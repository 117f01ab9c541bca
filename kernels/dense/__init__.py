"""Products of activations with a weight matrix."""

from kernels.dense.logits import logits
from kernels.dense.product import product

__all__ = ["logits", "product"]
