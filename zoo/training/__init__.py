"""How a model is trained: optimizer, shards, one step, checkpoints, and what a run writes down."""
