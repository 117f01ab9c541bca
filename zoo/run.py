"""A run folder: what a config and its data make, and how the folder alone gives it back.

<workdir>/config.json   the config with everything the data decided filled in; alone it rebuilds the model
<workdir>/tokenizer/    the tokenizer, whole
<workdir>/data/         prepared stores and harvests; can be made again
<workdir>/checkpoints/  the training states
<workdir>/metrics.jsonl, timing.jsonl, *.png, tensorboard/
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from zoo.config import completed, difference, load_saved, plain, save_config
from zoo.data import registry as sources
from zoo.data.tokenizer import Tokenizer
from zoo.data.tokenizers import TRAINING, load_tokenizer
from zoo.data.tokenizers import registry as tokenizers
from zoo.errors import UserError, near
from zoo.interop import starting_point
from zoo.interop.load import HEAD_SETTINGS, is_checkpoint
from zoo.layers.block import BlockSpec
from zoo.models import Stage, Transformer, build
from zoo.overrides import apply
from zoo.registry import make, to_config
from zoo.tasks import registry as tasks
from zoo.tasks.task import Task
from zoo.training.checkpoints import newest_extra, steps_in
from zoo.training.settings import ProcessSettings, RunSettings
from zoo.training.sharding import put_whole

logger = logging.getLogger(__name__)

CONFIG, TOKENIZER, DATA, CHECKPOINTS = "config.json", "tokenizer", "data", "checkpoints"
# What a run writes and a start that was broken off before config.json does not leave.
WRITTEN = (CHECKPOINTS, "metrics.jsonl", "timing.jsonl", "loss.png", "scores.png", "tensorboard")
# Settings that may change between a run and its resumption: they decide neither what is computed nor what is recorded,
# but for the policy, which counts from where the run stands.
CHANGEABLE = ("train.nonfinite", "train.keep", "train.tensorboard", "train.checkpoint_every", "mesh.")

# Settings that change no score.
PLACE = ("mesh.", "train.evaluation_batch_size")


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

    def at(self, values: Mapping[str, Any]) -> Parts:
        """The parts with `values` of the task replaced, as a stage of the run has them."""
        if not values:
            return self
        task = _with_values(self.task, values)
        return dataclasses.replace(self, task=task, module=task.module(self.model))

    def at_length(self, length: int) -> Parts:
        """The parts on rows of `length`: the text cut anew, or, where the source is drawn by rule, longer rows drawn."""
        own = self.at({"max_length": length})
        if not hasattr(self.source, "at_length"):
            return own
        return dataclasses.replace(own, source=self.source.at_length(length))

    def unfused(self) -> nn.Module:
        """The module with attention in plain operations: a fused kernel is one operation to who counts a program's arithmetic."""
        return self.task.module(self.model.clone(stages=_without_kernels(self.model.stages)))

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint remembers of the data: resuming on other data is refused."""
        return {"data": self.source.fingerprint(), "tokenizer": self.tokenizer.fingerprint}


def process_settings(config: ConfigDict) -> ProcessSettings:
    """`config.processes`, or its defaults where a config has none."""
    return make(ProcessSettings, plain(config.get("processes", {})), "processes")


def override_processes(
    overrides: Sequence[tuple[str, str]],
) -> tuple[ProcessSettings, list[tuple[str, str]]]:
    """The processes that command-line overrides name where no config does, and the other overrides."""
    tree: dict[str, Any] = {"processes": {}}
    apply(tree, [(path, text) for path, text in overrides if path.startswith("processes.")])
    return process_settings(ConfigDict(tree)), [o for o in overrides if not o[0].startswith("processes.")]


def without_processes(config: ConfigDict) -> ConfigDict:
    """What of a config belongs to the run: which processes compute it is said anew at every start."""
    tree = plain(config)
    tree.pop("processes", None)
    return ConfigDict(tree).lock()


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Refuses a folder that holds something else than this config's run, before anything is written.

    Raises:
      UserError: the folder cannot be written to, or holds a run of another config (lists the differences), or files of
        the names that a run writes without its config.
    """
    existing = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"workdir {workdir}: {existing} is a file; give a folder, which is made if missing")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"workdir {workdir}: {existing} may not be written to; choose another --workdir")
    saved_at = workdir / CONFIG
    if not saved_at.exists():
        for name in WRITTEN:
            if (workdir / name).exists():
                raise UserError(
                    f"{workdir} holds {name} but no {CONFIG}: not a run this command may write to; choose another "
                    "--workdir"
                )
        return
    saved = completed(load_saved(saved_at))
    lines = difference(_filled_in(completed(config), saved), saved, names=("now", "in the folder"))
    other = [line for line in lines if not line.startswith(CHANGEABLE)]
    if other:
        raise UserError(
            f"{workdir} holds the run of another config; choose another --workdir, or give the same config:\n  "
            + "\n  ".join(other)
        )
    for line in lines:
        logger.info("resuming with %s", line)


def check_same_data(parts: Parts, workdir: Path) -> None:
    """Refuses to go on from a checkpoint of `workdir` with another text or tokenizer, before either is prepared.

    Raises:
      UserError: says which of the two changed.
    """
    before = newest_extra(workdir / CHECKPOINTS)
    now = parts.fingerprints()
    if before is None or before == now:
        return
    files = [str(file) for split in parts.source.splits() for file in parts.config.data.get(split, ())]
    what = f"the content of {', '.join(files)}" if files else f"the text of data source {parts.config.data.name!r}"
    if before.get("data") == now["data"]:
        what = f"the tokenizer in {workdir / TOKENIZER}"
    raise UserError(
        f"{what} changed since the checkpoints of {workdir} were written; resuming would mix two runs: put back what "
        "was there, or choose another --workdir"
    )


def _filled_in(config: ConfigDict, saved: ConfigDict) -> ConfigDict:
    """`config` with what a run fills in taken from the saved one, where the config leaves it open."""
    tree, known = plain(config), plain(saved)
    if known.get("init_from") == tree["init_from"] and _began_from_checkpoint(tree["init_from"]):
        _keep_model(tree, saved)
    for name in ("vocab_size", "dtype"):
        if tree["model"].get(name) is None:
            tree["model"][name] = known["model"].get(name)
    if not tree["task"].get("labels", True):
        tree["task"]["labels"] = known["task"].get("labels", ())
    return ConfigDict(tree)


def _began_from_checkpoint(init_from: str | None) -> bool:
    """Whether a run took its model from where it began. A checkpoint that is gone by now counts: a run would be found in its config."""
    return init_from is not None and (not (Path(init_from) / CONFIG).exists() or is_checkpoint(init_from))


def _keep_model(tree: dict[str, Any], saved: ConfigDict) -> None:
    """Makes the model of a config that of the run it goes on with, which began from a checkpoint."""
    known = plain(saved)
    head = {key: known["task"][key] for key in HEAD_SETTINGS if key in known["task"] and key in tree["task"]}
    starting_point.take_over(tree, known, head, str(tree["init_from"]))


def assemble(config: ConfigDict, workdir: Path) -> Parts:
    """Source, tokenizer, task and model of a config; what data and device decide (vocabulary size, labels, dtype) is filled in.

    Raises:
      UserError: a part that is wrong or does not fit the others.
    """
    tree = plain(config)
    task = tasks.build(tree["task"])
    # A run that has begun needs what it began from no longer.
    start_from = None if steps_in(workdir / CHECKPOINTS) else tree["init_from"]
    if start_from is not None:
        starting_point.check(start_from)
        if is_checkpoint(start_from):
            starting_point.adopt(tree, start_from)
            task = tasks.build(tree["task"])
    elif _began_from_checkpoint(tree["init_from"]):
        _keep_model(tree, load_saved(workdir / CONFIG))
        task = tasks.build(tree["task"])
    longest = tree["model"]["max_length"]
    _check_every(tree, task, lambda its: its.check_fits(longest))
    source = sources.build(tree["data"])
    if getattr(source, "cache", True) is None:
        source = source.with_cache(workdir / DATA)
    task = task.resolve(source)
    tokenizer = _tokenizer(tree, source, workdir)
    vocabulary = tokenizer.vocabulary
    if tree["model"]["vocab_size"] is None:
        tree["model"]["vocab_size"] = vocabulary.size
    if tree["model"].get("dtype") is None:
        tree["model"]["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if tree["model"]["vocab_size"] < vocabulary.size:
        raise UserError(
            f"model.vocab_size is {tree['model']['vocab_size']}, the tokenizer has {vocabulary.size} pieces; "
            "leave vocab_size None to take the tokenizer's"
        )
    tree["task"] = to_config(task)
    model = build(tree)
    _check_every(tree, task, lambda its: its.check_model(model))
    return Parts(ConfigDict(tree).lock(), source, tokenizer, task, model, task.module(model))


def _with_values(task: Task, values: Mapping[str, Any]) -> Task:
    """The task with some of its values replaced."""
    return tasks.build({**to_config(task), **values})


def _without_kernels(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    def unfused(spec: BlockSpec) -> BlockSpec:
        if not hasattr(spec.mixer, "implementation"):
            return spec
        return dataclasses.replace(spec, mixer=dataclasses.replace(spec.mixer, implementation="xla"))

    return tuple(dataclasses.replace(stage, pattern=tuple(map(unfused, stage.pattern))) for stage in stages)


def _check_every(tree: Mapping[str, Any], task: Task, check: Callable[[Task], None]) -> None:
    """Calls `check` of the task and of the task as every stage changes it.

    Raises:
      UserError: what `check` raises, and of which; or what is wrong with a stage's values of the task.
    """
    rows = {"task": task}
    settings = make(RunSettings, tree["train"], "train")
    for number, stage in enumerate(settings.plan(num_examples=1)):
        try:
            rows[f"train.stages[{number}].task"] = _with_values(task, stage.task)
        except UserError as error:
            raise UserError(f"train.stages[{number}]: {error}") from error
    for where, its in rows.items():
        try:
            check(its)
        except UserError as error:
            raise UserError(f"{where}.{error}") from error


def reassemble(workdir: Path, overrides: Sequence[tuple[str, str]] = ()) -> Parts:
    """The parts of a run, from its folder alone; `overrides` may set where it is computed, and how much at a time.

    Raises:
      UserError: no run, no checkpoint, or an override that would make it another run.
    """
    if not (workdir / CONFIG).exists():
        raise UserError(f"{workdir} is not a run folder: it has no {CONFIG}")
    if not steps_in(workdir / CHECKPOINTS):
        raise UserError(f"the run in {workdir} has no checkpoint yet")
    for path, _ in overrides:
        if not path.startswith(PLACE):
            raise UserError(f"--config.{path} would make it another run; only {', '.join(PLACE)} may be set here")
    tree = plain(load_saved(workdir / CONFIG))
    apply(tree, overrides)
    return assemble(ConfigDict(tree), workdir)


def split_of(parts: Parts, split: str, workdir: Path) -> Sequence:
    """The examples of a split of a run's data.

    Raises:
      UserError: there is no such split.
    """
    if split not in parts.source.splits():
        raise UserError(f"the run's data have no split {split!r}; {near(split, parts.source.splits())}")
    return parts.examples(split, workdir)


def _tokenizer(config: Mapping[str, Any], source: Any, workdir: Path) -> Tokenizer:
    """The run's own tokenizer once it has a checkpoint; else that of `init_from` where the config names no file; else the
    config's. One that is learnt here is kept in the folder at once.

    Raises:
      UserError: a tokenizer that is none, or a folder that holds one which is not this run's.
    """
    kept = workdir / TOKENIZER
    if steps_in(workdir / CHECKPOINTS):
        return load_tokenizer(kept)
    # What was learnt by a start that was broken off may be replaced: nothing was trained with it.
    replaceable = not kept.exists() or (kept / TRAINING).exists()
    named = config["tokenizer"].get("path") is not None
    theirs = None if config["init_from"] is None else starting_point.tokenizer_of(config["init_from"])
    if theirs is None and config["init_from"] is not None and not named:
        raise UserError(
            f"init_from={config['init_from']!r} has no tokenizer: give tokenizer.path, a vocab.txt or tokenizer.json"
        )
    if theirs is not None and not named:
        tokenizer = theirs
    elif named or replaceable:
        tokenizer = tokenizers.build(config["tokenizer"]).tokenizer(source, kept)
    else:
        raise UserError(f"{kept} is not a tokenizer that this run learnt; move it away, or choose another --workdir")
    if theirs is not None and not tokenizer.gives_the_ids_of(theirs):
        raise UserError(
            f"tokenizer.path={config['tokenizer']['path']!r} gives other ids than the tokenizer of "
            f"init_from={config['init_from']!r}, which its model was trained with; leave tokenizer.path None to take that one"
        )
    if not replaceable and load_tokenizer(kept).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{kept} holds another tokenizer than the config names; move it away, or choose another --workdir"
        )
    return tokenizer


def save_run(parts: Parts, workdir: Path, *, primary: bool = True) -> None:
    """Makes `workdir` the folder of this run: its tokenizer, then its config. Other processes than the first look for it there.

    Raises:
      UserError: another process, which sees another folder.
    """
    if not primary:
        if not (workdir / CONFIG).exists() or difference(load_saved(workdir / CONFIG), parts.config):
            raise UserError(
                f"{workdir} here is not the folder that process 0 writes to; give a --workdir on a file system that all "
                "hosts share, and the same config on all"
            )
        return
    kept = workdir / TOKENIZER
    if not kept.exists() or load_tokenizer(kept).fingerprint != parts.tokenizer.fingerprint:
        parts.tokenizer.save(kept)
    save_config(parts.config, workdir / CONFIG)


def load_parameters(path: str, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """`fresh` parameters with those of the run at `path` in their place.

    Everything under `model` must be there with the same shape, but for a pooler the run did not have; of the heads,
    those the run has. What starts anew is logged.

    Raises:
      UserError: no run there, or parameters that are missing, too many, or of another shape (all are listed).
    """
    saved = starting_point.parameters_of(path)
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
        {n: put_whole(v, wanted[n].sharding) if v is not wanted[n] else v for n, v in taken.items()}, sep="/"
    )
