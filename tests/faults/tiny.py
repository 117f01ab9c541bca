"""The smallest runs that still have everything a fault could break: packing, masking, dropout, evaluation, checkpoints.

    python train.py --config=tests/faults/tiny.py:masked_lm,folder=DATA --workdir=DIR

`folder` holds what `corpus.py` wrote.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base
from zoo.config import parse_argument

STEPS = 240


def get_config(argument: str = "") -> ConfigDict:
    task, given = parse_argument(argument, tasks=("masked_lm", "classification", "token_tagging"))
    folder = given["folder"]
    config = base("nezha-base", vocab_size=None, model_dim=16, num_heads=2, num_layers=2, max_length=16)
    config.model.update(dropout=0.1, attention_dropout=0.1, pooler=False)
    config.feed_forward = dict(name="gelu", width=32)
    config.tokenizer = dict(name="wordpiece", size=100)
    config.train.update(
        steps=STEPS,
        batch_size=8,
        log_every=5,
        evaluate_every=40,
        evaluation_batch_size=8,
        checkpoint_every=20,
        keep=3,
        tensorboard=False,
    )
    if task == "masked_lm":
        config.task = dict(name="masked_lm", max_length=16, rate=0.25, whole_word=True, attend_across=True)
        config.data = dict(name="text", train=(f"{folder}/train.txt",), dev=(f"{folder}/dev.txt",))
    elif task == "classification":
        config.task = dict(name="classification", max_length=16, pooling="mean", labels=("even", "odd"))
        config.data = dict(name="tsv", train=(f"{folder}/train.tsv",), dev=(f"{folder}/dev.tsv",), text=0, label=1)
    else:
        config.task = dict(name="token_tagging", max_length=16, labels=("O", "B-BIG"))
        config.data = dict(name="conll", train=(f"{folder}/train.conll",), dev=(f"{folder}/dev.conll",))
    return config
