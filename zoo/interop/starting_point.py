"""What `config.init_from` names: a run of ours, or a checkpoint in the Hugging Face layout, whose model then is the run's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from zoo.config import completed, difference, plain
from zoo.data.tokenizer import Tokenizer
from zoo.data.tokenizers import load_tokenizer
from zoo.errors import UserError
from zoo.interop.load import (
    CHECKPOINTS,
    CONFIG,
    MODEL,
    TOKENIZER,
    family_of,
    is_checkpoint,
    load_pretrained,
    tokenizer_in,
)
from zoo.training.checkpoints import restore_numpy

logger = logging.getLogger(__name__)

# Entries of `model` and `mixer` that stay the config's: they say how the run trains, not what the checkpoint computes.
OWN = {
    "model": ("dtype", "remat", "unroll", "pooler", "dropout", "attention_dropout"),
    "mixer": ("implementation",),
}


def check(path: str) -> None:
    """Raises UserError where `path` is neither a run nor a checkpoint."""
    if not (Path(path) / CONFIG).exists():
        raise UserError(f"init_from={path!r} is neither a run folder nor a checkpoint's directory: it has no {CONFIG}")


def adopt(tree: dict[str, Any], path: str) -> None:
    """Makes the model of a config that of the checkpoint at `path`; what becomes other than it was is logged."""
    theirs, family, where = family_of(Path(path))
    made = family.read(theirs, where)
    for head in family.heads:
        if head.name == "classification":
            made["model"].update(head.model(made))
    head, task = {}, str(tree["task"].get("name", ""))
    if task.startswith("masked_lm"):
        head = family.head("masked_lm").read(made, theirs, where)
    elif task == "token_tagging" and any(its.name == task for its in family.heads):
        head = family.head(task).read(made, theirs, where)
    take_over(tree, made, head, path)


def take_over(tree: dict[str, Any], made: Mapping[str, Any], head: Mapping[str, Any], source: str) -> None:
    """Enters the parts of the model `made`, and the settings of its head, into the config `tree`."""
    before = plain(completed({name: tree[name] for name in MODEL}))
    for name in MODEL:
        own = {
            key: before[name][key]
            for key in OWN.get(name, ())
            if isinstance(before[name], dict) and key in before[name]
        }
        new = plain(completed({name: made[name]}))[name]
        if name == "mixer" and new["name"] != before[name]["name"]:
            own = {}
        tree[name] = {**new, **own} if isinstance(new, dict) else new
    tree["task"] = {**tree["task"], **head}
    now = {name: tree[name] for name in MODEL}
    for line in difference(before, now, names=("in the config", "in the checkpoint, which counts")):
        logger.info("init_from=%s: %s", source, line)


def tokenizer_of(path: str) -> Tokenizer | None:
    """The tokenizer of a run or a checkpoint; None where a checkpoint has none."""
    return tokenizer_in(Path(path)) if is_checkpoint(path) else load_tokenizer(Path(path) / TOKENIZER)


def parameters_of(path: str) -> dict[str, np.ndarray]:
    """Path → array of every parameter of a run or a checkpoint.

    Raises:
      UserError: weights that are missing, damaged, or not those that their config describes.
    """
    if is_checkpoint(path):
        tree = load_pretrained(path).params
    else:
        tree = restore_numpy(Path(path) / CHECKPOINTS, part="params").state["params"]
    return flatten_dict(dict(tree), sep="/")
