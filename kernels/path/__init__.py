"""PaTH: softmax attention in which every token between a query and a key reflects the one before it meets the other.

`path_attention` computes it, `logits` gives the scores alone, `carried` brings keys to the end of a sequence for a cache.
"""

from kernels.path.api import carried, logits, path_attention

__all__ = ["carried", "logits", "path_attention"]
