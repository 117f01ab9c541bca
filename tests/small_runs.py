"""Runs as small as the trainer can be tested with, and the text, tables and tags they learn from."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import train
from configs.base import base
from tests.devices import first
from zoo.config import plain
from zoo.training.sharding import make_mesh

NOUNS, VERBS = ("cat", "dog", "bird", "fish"), ("sees", "hears", "likes", "finds")


def write_texts(folder: Path) -> Path:
    """Text of random sentences, eight rows to learn by heart, a table labelled by its first noun, and tagged nouns."""
    rng = np.random.default_rng(0)
    rows = [(rng.choice(NOUNS), rng.choice(VERBS), rng.choice(NOUNS)) for _ in range(64)]
    (folder / "text.txt").write_text("".join(" ".join(row) + "\n" for row in rows))
    (folder / "by_heart.txt").write_text("".join(f"{word} " * 16 + "\n" for word in (*NOUNS, *VERBS)))
    (folder / "table.tsv").write_text(
        "".join(f"{' '.join(row)}\t{'pet' if row[0] in NOUNS[:2] else 'wild'}\n" for row in rows[:16])
    )
    (folder / "tags.conll").write_text(
        "\n".join("".join(f"{w} {'B-PET' if w in NOUNS[:2] else 'O'}\n" for w in row) for row in rows[:16])
    )
    return folder


def config(folder: Path, task: str = "masked_lm", text: str = "text.txt", **changes: Any) -> ConfigDict:
    """A NEZHA of two layers with dropout, in which `changes` are set by dotted name, `__` standing for the dot."""
    made = base("nezha-base", vocab_size=None, model_dim=16, num_heads=4, num_layers=2, max_length=16, pooler=False)
    made.model.dtype = "float32"  # also on an accelerator, where the trainer would fill in bfloat16
    made.encoding = dict(name="nezha", limit=4)
    made.feed_forward = dict(name="gelu", width=32)
    made.tokenizer = dict(name="wordpiece", size=100)
    made.optimizer = dict(name="lamb", learning_rate=5e-2)
    made.schedule = dict(name="linear", warmup=0)
    made.train.update(steps=6, batch_size=8, log_every=1, checkpoint_every=0, tensorboard=False)
    source, file = {
        "masked_lm": ("text", text),
        "classification": ("tsv", "table.tsv"),
        "token_tagging": ("conll", "tags.conll"),
    }[task]
    made.data = dict(name=source, train=(f"{folder}/{file}",), dev=(f"{folder}/{file}",))
    if task == "masked_lm":
        made.task = dict(name=task, max_length=16, rate=0.3, attend_across=True, specials="none")
    elif task == "classification":
        made.task = dict(name=task, max_length=16, pooling="mean")
        made.data.update(text=0, label=1)
    else:
        made.task = dict(name=task, max_length=16, labels=("O", "B-PET"))
    tree = plain(made)
    for name, value in changes.items():
        *path, last = name.split("__")
        functools.reduce(dict.__getitem__, path, tree)[last] = value
    return ConfigDict(tree)


def use_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=first(count)))


def stop_in_turn(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A SIGTERM that comes while the loop takes its `number`-th batch, counted from 1."""
    original = train.Trainer.batches

    def batches(self: train.Trainer, step: int) -> Iterator[Any]:
        for turn, item in enumerate(original(self, step), start=1):
            if turn == number:
                signal.raise_signal(signal.SIGTERM)
            yield item

    monkeypatch.setattr(train.Trainer, "batches", batches)
