"""Fine-tuning a checkpoint that you have on a file that you have: docs/checkpoints.md walks through it.

    python train.py --config=configs/finetune.py:classification --workdir=runs/reviews --config.init_from=my-bert \\
        --config.data.train=train.tsv --config.data.dev=dev.tsv

`classification` and `regression` read a table with the columns `text` and `label`; for pairs `config.data.text_pair` names a third, and
`config.data` may be `csv` or `jsonl`. `tagging` reads words and tags in CoNLL's columns. Labels are those of the training file.
`pooling=mean` takes the mean over the tokens in the place of the layer over the first, as sentence encoders do.

Model and tokenizer are those of `init_from`, a directory in the Hugging Face layout or a run of ours. AdamW, 3e-5, 10 % warm-up, batches
of 32, 3 epochs: the middle of what Devlin et al. 2018 (arXiv:1810.04805, appendix A.3) try on every task. A base model takes minutes per
ten thousand rows on one accelerator; what comes out depends on your data.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base
from zoo.config import parse_argument

TASKS = ("classification", "regression", "tagging")


def get_config(argument: str = "classification") -> ConfigDict:
    task, chosen = parse_argument(argument, tasks=TASKS, options={"pooling": ("cls", "mean")})
    config = base("bert-base", vocab_size=None, pooler=task != "tagging" and chosen["pooling"] == "cls")
    if task == "tagging":
        config.data = dict(name="conll", train=("train.conll",), dev=())
        config.task = dict(name="token_tagging", max_length=128)
    else:
        config.data = dict(name="tsv", header=True, text="text", label="label", train=("train.tsv",), dev=())
        config.task = dict(name=task, max_length=128, pooling=chosen["pooling"])
    config.optimizer = dict(name="adamw", learning_rate=3e-5, bias_correction=True)
    config.schedule = dict(name="linear", warmup=0.1)
    config.train.update(epochs=3.0, batch_size=32, log_every=50, checkpoint_every=500)
    return config
