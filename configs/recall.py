"""What a small causal model can find again in the words before it: flip-flop, associative recall, copying.

    python train.py --config=configs/recall.py:flip_flop --workdir=runs/flip_flop --config.encoding=rope

`:flip_flop`, `:mqar` and `:copy`: the model of `configs/compare.py` on rows that are drawn by rule, scored on the words that can be
known; one or two million words, a minute or two on one CPU core. Each is one that some encoding learns in that time (seed 0,
accuracy on dev; docs/evaluation.md has them at other lengths): flip_flop alibi 1.00, rope 0.70; mqar cpe 1.00; copy cpe 0.98.
With eight pairs in rows of 64 out of 64 words, mqar was not learnt in a million words (rope, cpe: 0.11).
Read the scores beyond the training length (`eval.py --lengths`), and for flip-flop with `w` rarer than in training
(`data.ignore=0.98`), where a model that has only learnt to look near shows it.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import compare
from zoo.config import parse_argument

# The data, and the updates that it takes.
SOURCES = {
    "flip_flop": (dict(length=128, ignore=0.8), dict(steps=500, batch_size=32)),
    "mqar": (dict(length=16, pairs=2, vocabulary=16), dict(steps=1000, batch_size=64)),
    "copy": (dict(length=64, vocabulary=16, shortest=1), dict(steps=1000, batch_size=32)),
}


def get_config(argument: str = "flip_flop") -> ConfigDict:
    source, _ = parse_argument(argument, tasks=tuple(SOURCES), options={})
    config = compare.get_config("causal_lm")
    data, updates = SOURCES[source]
    config.data = dict(name=source, **data)
    config.encoding = dict(name="alibi")
    config.tokenizer = dict(name="words")
    config.task = dict(name="recall", max_length=data["length"])
    config.model.max_length = data["length"]
    config.optimizer.learning_rate = 4e-3
    config.train.update(**updates, log_every=25, evaluate_every=0, evaluation_batch_size=64)
    return config
