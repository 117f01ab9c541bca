"""Small language models on running text, for comparing parts with everything else equal: what `python -m zoo compare` trains.

    python -m zoo compare --workdir=runs/compare --config.data.train=train.txt --config.data.dev=valid.txt
    python train.py --config=configs/compare.py:causal_lm --config.data.train=train.txt --workdir=runs/one

`:causal_lm` and `:masked_lm`: 2 layers of width 64, rows of 128 tokens cut from the text as it stands, 1.02 million tokens in
2,000 steps, about a minute on one CPU core. The vocabulary is learnt from the training text.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base
from zoo.config import parse_argument

OBJECTIVES = ("causal_lm", "masked_lm")


def get_config(argument: str = "causal_lm") -> ConfigDict:
    objective, _ = parse_argument(argument, tasks=OBJECTIVES, options={})
    config = base(
        "bert-tiny",
        vocab_size=None,
        model_dim=64,
        num_heads=4,
        max_length=128,
        token_types=0,
        embedding_norm=False,
        pooler=False,
        arrangement="pre_norm",
        causal=objective == "causal_lm",
        dropout=0.0,
        attention_dropout=0.0,
        unroll=2,
    )
    config.feed_forward = dict(name="gelu", width=256, approximate=True)
    config.data = dict(name="text", train=(), dev=(), documents="file")
    config.tokenizer = dict(name="wordpiece", size=1024)
    config.task = dict(name=objective, max_length=128, attend_across=True, specials="none")
    if objective == "masked_lm":
        config.task.update(rate=0.4, activation="gelu_tanh")
    config.optimizer = dict(name="adamw", learning_rate=3e-3, b2=0.98)
    config.schedule = dict(name="cosine", warmup=0.1)
    config.train.update(
        steps=2000, batch_size=4, log_every=100, checkpoint_every=0, evaluate_every=None, tensorboard=False
    )
    return config
