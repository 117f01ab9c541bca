"""A run folder: what a config and its data make, and how the folder alone gives it back.

<workdir>/config.json   the config with everything the data decided filled in; alone it rebuilds the model
<workdir>/tokenizer/    the tokenizer, whole
<workdir>/data/         prepared stores and harvests; can be made again
<workdir>/checkpoints/  the training states
<workdir>/metrics.jsonl, timing.jsonl, *.png, tensorboard/
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from zoo.config import difference, load_saved, plain
from zoo.data import registry as sources
from zoo.data.tokenizer import Tokenizer
from zoo.data.tokenizers import load_tokenizer
from zoo.data.tokenizers import registry as tokenizers
from zoo.errors import UserError
from zoo.models import Transformer, build
from zoo.registry import to_config
from zoo.tasks import registry as tasks
from zoo.tasks.task import Task
from zoo.training.checkpoints import restore_numpy

logger = logging.getLogger(__name__)

CONFIG, TOKENIZER, DATA, CHECKPOINTS = "config.json", "tokenizer", "data", "checkpoints"


@dataclass(frozen=True)
class Parts:
    """What a resolved config makes."""

    config: ConfigDict
    source: Any
    tokenizer: Tokenizer
    task: Task
    model: Transformer
    module: nn.Module

    def examples(self, split: str, workdir: Path) -> Sequence:
        return self.task.examples(self.source, split, self.tokenizer, workdir / DATA)

    def features(self, example: Any, rng: Any) -> dict[str, Any]:
        return self.task.features(example, rng, self.tokenizer.vocabulary)

    def data_fingerprint(self) -> str:
        """What a checkpoint remembers of the data: resuming on other data is refused."""
        return hashlib.sha256(f"{self.source.fingerprint()} {self.tokenizer.fingerprint}".encode()).hexdigest()


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Refuses a folder that holds something else than this config's run, before anything is written.

    Raises:
      UserError: the folder holds a run of another config (lists the differences), or files of a run without its config.
    """
    saved_at = workdir / CONFIG
    if not saved_at.exists():
        for name in (CHECKPOINTS, "metrics.jsonl"):
            if (workdir / name).exists():
                raise UserError(f"{workdir} holds {name} but no {CONFIG}: not a run this command may write to")
        return
    saved = load_saved(saved_at)
    lines = difference(_filled_in(config, saved), saved, names=("now", "in the folder"))
    if lines:
        raise UserError(
            f"{workdir} holds the run of another config; choose another --workdir, or give the same config:\n  "
            + "\n  ".join(lines)
        )


def _filled_in(config: ConfigDict, saved: ConfigDict) -> ConfigDict:
    """`config` with what a run fills in taken from the saved one, where the config leaves it open."""
    tree = plain(config)
    if tree["model"]["vocab_size"] is None:
        tree["model"]["vocab_size"] = saved.model.vocab_size
    if not tree["task"].get("labels", True):
        tree["task"]["labels"] = saved.task.get("labels", ())
    return ConfigDict(tree)


def assemble(config: ConfigDict, workdir: Path) -> Parts:
    """Source, tokenizer, task and model of a config; what the data decides (vocabulary size, labels) is filled in.

    Raises:
      UserError: a part that is wrong or does not fit the others.
    """
    tree = plain(config)
    source = sources.build(tree["data"])
    if getattr(source, "cache", True) is None:
        source = source.with_cache(workdir / DATA)
    tokenizer = _tokenizer(tree, source, workdir)
    vocabulary = tokenizer.vocabulary
    if tree["model"]["vocab_size"] is None:
        tree["model"]["vocab_size"] = vocabulary.size
    if tree["model"]["vocab_size"] < vocabulary.size:
        raise UserError(
            f"model.vocab_size is {tree['model']['vocab_size']}, the tokenizer has {vocabulary.size} pieces; "
            "leave vocab_size None to take the tokenizer's"
        )
    task = tasks.build(tree["task"]).resolve(source)
    if task.max_length > tree["model"]["max_length"]:
        raise UserError(
            f"task.max_length={task.max_length} is longer than model.max_length={tree['model']['max_length']}; "
            "lower the one or raise the other"
        )
    tree["task"] = to_config(task)
    model = build(tree)
    return Parts(ConfigDict(tree).lock(), source, tokenizer, task, model, task.module(model))


def reassemble(workdir: Path) -> Parts:
    """The parts of a run, from its folder alone."""
    if not (workdir / CONFIG).exists():
        raise UserError(f"{workdir} is not a run folder: it has no {CONFIG}")
    return assemble(load_saved(workdir / CONFIG), workdir)


def _tokenizer(config: Mapping[str, Any], source: Any, workdir: Path) -> Tokenizer:
    """The run's own tokenizer where it has one; that of `init_from` where the config names no file; else the config's."""
    kept = workdir / TOKENIZER
    if (workdir / CONFIG).exists():
        return load_tokenizer(kept)
    if config["init_from"] is not None and config["tokenizer"].get("path") is None:
        tokenizer = load_tokenizer(Path(config["init_from"]) / TOKENIZER)
    else:
        tokenizer = tokenizers.build(config["tokenizer"]).tokenizer(source, kept)
    if not kept.exists():
        tokenizer.save(kept)
    return tokenizer


def load_parameters(path: str, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """`fresh` parameters with those of the run at `path` in their place.

    Everything under `model` must be there with the same shape, but for a pooler the run did not have; of the heads,
    those the run has. What starts anew is logged.

    Raises:
      UserError: no run there, or parameters that are missing, too many, or of another shape (all are listed).
    """
    folder = Path(path)
    if not (folder / CONFIG).exists():
        raise UserError(f"init_from={path!r} is not a run folder: it has no {CONFIG}")
    saved = flatten_dict(restore_numpy(folder / CHECKPOINTS, part="params").state["params"], sep="/")
    wanted = flatten_dict(dict(fresh), sep="/")
    optional = ("model/pooler/", "heads/")
    problems = [f"{n} is not in the run" for n in wanted if n not in saved and not n.startswith(optional)]
    problems += [f"{n} is not in the model" for n in saved if n not in wanted and not n.startswith(optional)]
    problems += [
        f"{n} is {saved[n].shape} in the run, {wanted[n].shape} in the model"
        for n in wanted
        if n in saved and saved[n].shape != wanted[n].shape and not n.startswith("heads/")
    ]
    if problems:
        raise UserError(
            f"init_from={path!r} holds another model than the config describes:\n  " + "\n  ".join(sorted(problems))
        )
    taken = {n: saved[n] if n in saved and saved[n].shape == wanted[n].shape else wanted[n] for n in wanted}
    anew = sorted(n for n in wanted if taken[n] is wanted[n])
    logger.info("initialised from %s; starting anew: %s", path, ", ".join(anew) or "nothing")
    return unflatten_dict(
        {n: jax.device_put(v, wanted[n].sharding) if v is not wanted[n] else v for n, v in taken.items()}, sep="/"
    )
