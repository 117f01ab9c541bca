"""Sums by position, against a loop."""

import numpy as np

from zoo.evaluation.by_position import by_position


def test_buckets_are_means_over_their_columns():
    rng = np.random.default_rng(0)
    weight = (rng.random((5, 40)) < 0.6).astype(np.float32)
    weight[:, 30:] = 0
    weight[:, 15:23] = 0  # 16 to 23 before
    loss = rng.random((5, 40)).astype(np.float32) * weight
    found = by_position(loss, weight)
    assert [(b["from"], b["to"]) for b in found] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 5),
        (6, 7),
        (8, 11),
        (12, 15),
        (24, 31),
    ]
    for bucket in found:
        inside = [
            (loss[r, t], weight[r, t]) for r in range(5) for t in range(40) if bucket["from"] <= t + 1 <= bucket["to"]
        ]
        total, count = map(sum, zip(*inside, strict=True))
        np.testing.assert_allclose([bucket["loss"], bucket["tokens"]], [total / count, count], rtol=1e-6)
    assert sum(b["tokens"] for b in found) == weight.sum()
