"""Embeddings, norms, feed-forwards, and the block that joins them to a mixer."""
