"""A small NEZHA on text that every installation carries: docstrings of Python and of this library's dependencies.

    python train.py --config=configs/demo.py:pretrain --workdir=runs/pretrain
    python train.py --config=configs/demo.py:parameter_names --workdir=runs/names --config.init_from=runs/pretrain

The model is NEZHA's (Wei et al. 2019, arXiv:1909.00204) at 2 layers of width 128, pretrained by whole-word masking under
LAMB. `:pretrain` takes about a minute on 2 CPU cores; `make demo` pretrains longer and compares with no pretraining.
`:parameter_names` tags the words of a docstring that are parameters of its function, `:parameter_types` says the type of
a parameter from its description.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base
from zoo.config import parse_argument


def get_config(argument: str = "pretrain") -> ConfigDict:
    task, _ = parse_argument(argument, tasks=("pretrain", "parameter_names", "parameter_types"), options={})
    config = base("nezha-base", vocab_size=None, model_dim=128, num_heads=2, num_layers=2, max_length=64)
    config.feed_forward = dict(name="gelu", width=512, approximate=True)
    config.tokenizer = dict(name="wordpiece", size=4096, lowercase=True)
    if task == "pretrain":
        _pretrain(config)
    else:
        _fine_tune(config, task)
    return config


def _pretrain(config: ConfigDict) -> None:
    config.model.update(dropout=0.0, attention_dropout=0.0, pooler=False)
    config.task = dict(
        name="masked_lm",
        max_length=64,
        rate=0.25,
        max_predictions=16,
        whole_word=True,
        attend_across=True,
        specials="none",
        activation="gelu_tanh",
    )
    config.data = dict(name="builtin", subset="text")
    config.optimizer = dict(name="lamb", learning_rate=1.2e-2, b2=0.98)
    config.schedule = dict(name="linear", warmup=0.1, end=0.02)
    config.train.update(
        steps=600, batch_size=16, log_every=20, evaluate_every=300, checkpoint_every=200, evaluation_batch_size=64
    )


def _fine_tune(config: ConfigDict, task: str) -> None:
    config.data = dict(name="builtin", subset=task)
    if task == "parameter_names":
        config.model.pooler = False
        config.task = dict(name="token_tagging", max_length=64, labels=("O", "B-PARAM"))
    else:
        config.model.pooler = False
        config.task = dict(name="classification", max_length=64, pooling="mean")
    config.optimizer = dict(name="adamw", learning_rate=1e-3)
    config.schedule = dict(name="cosine", warmup=0.1)
    config.train.update(
        epochs=8.0, batch_size=16, log_every=10, evaluate_every=50, checkpoint_every=0, evaluation_batch_size=64
    )
