"""What BERT and NEZHA share on Chinese: pretraining from plain text, and the fine-tuning settings of NEZHA's report.

Hyper-parameters of the fine-tuning tasks: Wei et al. 2019 (arXiv:1909.00204), table "hyper-parameters", base column.
Data are files that you have; the defaults are where the README says to put them.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.base import base

SIZES = ("base", "large", "tiny")
LENGTHS = ("128", "128-512")
TASKS = ("ner", "lcqmc", "chnsenti")

VOCABULARY = "data/vocab.txt"
ENTITIES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG")
_TINY = dict(model_dim=128, num_heads=2, num_layers=2)


def _model(family: str, size: str, **values: Any) -> ConfigDict:
    """BERT or NEZHA over the Chinese vocabulary; tiny has 2 layers of width 128."""
    if size == "tiny":
        config = base(f"{family}-base", **{**_TINY, **values}, vocab_size=None)
        config.feed_forward = dict(name="gelu", width=512)
    else:
        config = base(f"{family}-{size}", **values, vocab_size=None)
    config.tokenizer = dict(name="wordpiece", path=VOCABULARY, chinese_words=True)
    return config


def pretrain(family: str, size: str, lengths: str) -> ConfigDict:
    """Whole-word masked LM and next-sentence prediction, 128 long, 15 % of the tokens in at most 20 slots, by LAMB.

    `lengths` "128-512" is BERT's: nine steps of ten 128 long, the last of ten 512 long with 80 slots, here in batches of a
    quarter, so that each has as many tokens as before (BERT kept its 256 rows). Scores are those on 512 throughout.

    The corpus has a sentence per line and an empty line between documents. Without next-sentence prediction:
    `--config.task=masked_lm:max_length=128,max_predictions=20,whole_word=True --config.model.pooler=False`.

    NEZHA's report: LAMB, peak 1.8e-4 (base) or 1e-4 (large), 1800 steps of warm-up, global batches of 14,400 or 5,120
    sequences; it gives no number of steps. Here one pass is `steps` updates that you choose for your corpus.
    """
    config = _model(family, size, pooler=True)
    config.data = dict(name="text", train=("data/corpus.txt",), documents="blank_line")
    config.task = dict(
        name="masked_lm_with_sentences", objective="nsp", max_length=128, rate=0.15, max_predictions=20, whole_word=True
    )
    peak, batch, steps, warmup = {
        "base": (1.8e-4, 14_400, 100_000, 1800),
        "large": (1e-4, 5_120, 100_000, 1800),
        "tiny": (1e-2, 64, 2_000, 200),
    }[size]
    config.optimizer = dict(name="lamb", learning_rate=peak)
    config.schedule = dict(name="linear", warmup=warmup)
    config.train.update(steps=steps, batch_size=batch, log_every=50, checkpoint_every=1000)
    if lengths == "128-512":
        config.task.update(max_length=512, max_predictions=80)
        config.train.stages = (
            dict(steps=0.9, task=dict(max_length=128, max_predictions=20)),
            dict(steps=0.1, batch_size=batch // 4),
        )
        config.train.evaluation_batch_size = batch // 4
    return config


def fine_tune(family: str, size: str, task: str) -> ConfigDict:
    """People's Daily NER, LCQMC or ChnSentiCorp by AdamW, 3e-5, 10 % warm-up, batch 64 (large 16 or 32)."""
    config = _model(family, size, pooler=task != "ner")
    {"ner": _ner, "lcqmc": _lcqmc, "chnsenti": _chnsenti}[task](config)
    config.tokenizer.chinese_words = False
    # A tiny model starts from little and has to travel further than a pretrained base model.
    config.optimizer = dict(name="adamw", learning_rate=1e-3 if size == "tiny" else 3e-5, bias_correction=True)
    config.schedule = dict(name="linear", warmup=0.1)
    batch = {"base": 64, "large": 32 if task == "lcqmc" else 16, "tiny": 32}[size]
    config.train.update(batch_size=batch, log_every=50, checkpoint_every=500)
    return config


def _ner(config: ConfigDict) -> None:
    files = {split: (f"data/peoples_daily_ner/example.{split}",) for split in ("train", "dev", "test")}
    config.data = dict(name="conll", **files)
    config.task = dict(name="token_tagging", max_length=256, labels=ENTITIES)
    config.train.epochs = 5.0


def _lcqmc(config: ConfigDict) -> None:
    files = {split: (f"data/lcqmc/{split}.txt",) for split in ("train", "dev", "test")}
    config.data = dict(name="tsv", text=0, text_pair=1, label=2, **files)
    config.task = dict(name="classification", max_length=128, labels=("0", "1"))
    config.train.epochs = 5.0


def _chnsenti(config: ConfigDict) -> None:
    files = {split: (f"data/chnsenticorp/{split}.tsv",) for split in ("train", "dev", "test")}
    config.data = dict(name="tsv", header=True, label="label", text="text_a", **files)
    config.task = dict(name="classification", max_length=256, labels=("0", "1"))
    config.train.epochs = 10.0
