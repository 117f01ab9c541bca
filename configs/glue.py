"""GLUE (Wang et al. 2018, arXiv:1804.07461): fine-tuning a BERT-shaped encoder on English sentences and pairs.

    python train.py --config=configs/glue.py:sst2 --workdir=runs/sst2 --config.init_from=checkpoint
    python train.py --config=configs/glue.py:rte  --workdir=runs/rte  --config.init_from=checkpoint

Tasks sst2, rte, cola and stsb; `size=base` (default), `minilm` or `tiny` says what is built from scratch, and `pooling=mean`
takes the mean over the tokens, as sentence encoders do, in the place of the layer over [CLS]: `configs/glue.py:stsb,pooling=mean`.
The files are GLUE's own, `data/glue/SST-2/train.tsv` and so on; its test files have no labels, so the dev split is scored.
From scratch a vocabulary is needed too: `--config.tokenizer.path=data/vocab.txt`.

Published for BERT-base (Devlin et al. 2018, arXiv:1810.04805, table 1; test): SST-2 accuracy 93.5, RTE accuracy 66.4, CoLA
Matthews correlation 52.1, STS-B Spearman correlation 85.8, by batches of 32, 3 epochs and the best of four learning rates
(appendix A.3); minutes to an hour on one accelerator. On a CPU: docs/results.md, a 6-layer MiniLM in minutes.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base
from zoo.config import parse_argument

TASKS = ("sst2", "rte", "cola", "stsb")
SIZES = {
    "base": dict(num_layers=12, model_dim=768, num_heads=12),
    # Wang et al. 2020 (arXiv:2002.10957): heads of 32.
    "minilm": dict(num_layers=6, model_dim=384, num_heads=12),
    "tiny": dict(num_layers=2, model_dim=128, num_heads=2),
}


def get_config(argument: str = "sst2") -> ConfigDict:
    task, chosen = parse_argument(argument, tasks=TASKS, options={"size": tuple(SIZES), "pooling": ("cls", "mean")})
    size = SIZES[chosen["size"]]
    config = base("bert-base", **size, vocab_size=None, pooler=chosen["pooling"] == "cls")
    config.feed_forward.width = 4 * size["model_dim"]
    {"sst2": _sst2, "rte": _rte, "cola": _cola, "stsb": _stsb}[task](config)
    config.task.pooling = chosen["pooling"]
    config.optimizer = dict(name="adamw", learning_rate=3e-5, bias_correction=True)
    config.schedule = dict(name="linear", warmup=0.1)
    config.train.update(epochs=3.0, batch_size=32, log_every=50, checkpoint_every=500, evaluation_batch_size=64)
    return config


def _files(folder: str) -> dict[str, tuple[str, ...]]:
    return {split: (f"data/glue/{folder}/{split}.tsv",) for split in ("train", "dev")}


def _sst2(config: ConfigDict) -> None:
    """Sentiment of sentences, and in the training file of their phrases."""
    config.data = dict(name="tsv", header=True, text="sentence", label="label", **_files("SST-2"))
    config.task = dict(name="classification", max_length=128, labels=("0", "1"))


def _rte(config: ConfigDict) -> None:
    """Whether the first text entails the second."""
    columns = dict(text="sentence1", text_pair="sentence2", label="label")
    config.data = dict(name="tsv", header=True, **columns, **_files("RTE"))
    config.task = dict(name="classification", max_length=128, labels=("entailment", "not_entailment"))


def _cola(config: ConfigDict) -> None:
    """Whether a sentence is grammatical; the score that counts is `mcc`."""
    config.data = dict(name="tsv", text=3, label=1, **_files("CoLA"))
    config.task = dict(name="classification", max_length=128, labels=("0", "1"))


def _stsb(config: ConfigDict) -> None:
    """How alike two sentences are, 0 to 5."""
    columns = dict(text="sentence1", text_pair="sentence2", label="score")
    config.data = dict(name="tsv", header=True, **columns, **_files("STS-B"))
    config.task = dict(name="regression", max_length=128)
