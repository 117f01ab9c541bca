"""What a small causal model can find again in the words before it: flip-flop, associative recall, copying.

    python train.py --config=configs/recall.py:flip_flop --workdir=runs/flip_flop --config.encoding=rope

`:flip_flop`, `:mqar` and `:copy`: the model of `configs/compare.py` on rows that are drawn by rule, scored on the words that can be
known. Read the scores at lengths beyond training, and for flip-flop with `w` rarer than in training
(`data.ignore=0.98`), where a model that had only learnt to look near shows it.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import compare
from zoo.config import parse_argument

SOURCES = {
    "flip_flop": dict(length=128, ignore=0.8),
    "mqar": dict(length=64, pairs=8, vocabulary=64),
    "copy": dict(length=64, vocabulary=16, shortest=1),
}


def get_config(argument: str = "flip_flop") -> ConfigDict:
    source, _ = parse_argument(argument, tasks=tuple(SOURCES), options={})
    config = compare.get_config("causal_lm")
    length = SOURCES[source]["length"]
    config.data = dict(name=source, **SOURCES[source])
    config.tokenizer = dict(name="words")
    config.task = dict(name="recall", max_length=length)
    config.model.max_length = length
    config.optimizer.learning_rate = 4e-3
    config.train.update(steps=500, batch_size=32, log_every=25, evaluate_every=0, evaluation_batch_size=64)
    return config
