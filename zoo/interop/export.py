"""`export`: a run of ours, or a checkpoint that was loaded, as a directory that the source library loads."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.atomic import check_free
from zoo.config import difference, plain
from zoo.errors import UserError, near, writing
from zoo.interop import parameters
from zoo.interop.architecture import Architecture
from zoo.interop.architectures import ARCHITECTURES, architecture
from zoo.interop.load import CONFIG, HEAD_SETTINGS, load_pretrained
from zoo.interop.pretrained import OVER_TOKENS, Head, Pretrained
from zoo.interop.weights import write_weights
from zoo.tasks.masked_lm import MaskedLM
from zoo.tasks.token_tagging import TokenTagging

logger = logging.getLogger(__name__)

# Entries that say how a model is computed and trained, and of which a config.json says nothing.
_NEUTRAL = ("model.dtype", "model.remat", "model.unroll", "model.pooler:", "mixer.implementation")


def export(
    run: str | os.PathLike[str] | Pretrained, path: str | os.PathLike[str], *, model_type: str | None = None
) -> Path:
    """Writes config.json, model.safetensors and the tokenizer's files into the new directory `path`, all or nothing.

    Args:
      run: a workdir of train.py, or what `load_pretrained` returned.
      path: a directory that is not there yet, or empty.
      model_type: the architecture to write; None = the one it was loaded as, or else the first that has this model.

    Raises:
      UserError: no architecture has this model (says what differs from the nearest), or `path` is taken.
    """
    path = Path(path)
    check_free(path)
    pretrained = run if isinstance(run, Pretrained) else load_pretrained(run)
    tree = plain(pretrained.config)
    names = [head.name for head in pretrained.heads]
    family, settings = written_as(tree, names, model_type or pretrained.architecture)
    class_name = family.class_of(names)
    if class_name is None:
        raise UserError(
            f"{family.model_type} has no class with the heads {' and '.join(names)}; its classes are {', '.join(family.classes)}"
        )
    for head in pretrained.heads:
        settings = {**settings, **_head_written_as(head, family, tree)}
    shapes = pretrained.parameter_shapes()
    mapped = parameters.written_out(family, tree, names, pretrained.model.stages, shapes)
    bare = "" if names else family.prefix
    written = itertools.chain(
        parameters.store(pretrained.params, family, mapped), family.constant_tensors(tree).items()
    )
    tensors = ((name.removeprefix(bare), array) for name, array in written)
    described = {"architectures": [class_name], "model_type": family.model_type, "dtype": "float32", **settings}
    if any(head.name == "classification" and head.classes == 1 for head in pretrained.heads):
        described |= {"problem_type": "regression", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if pretrained.labels:
        described["id2label"] = {str(number): label for number, label in enumerate(pretrained.labels)}
        described["label2id"] = {label: number for number, label in enumerate(pretrained.labels)}
    pad = pretrained.pad_token_id if pretrained.tokenizer is None else pretrained.tokenizer.vocabulary.pad
    if pad is not None:
        described.setdefault("pad_token_id", pad)
    _write(path, described, tensors, pretrained)
    if caution := family.caution(tree):
        logger.warning("%s: %s", path, caution)
    return path


def written_as(
    tree: Mapping[str, Any], heads: Sequence[str], model_type: str | None
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that has this model with the pooler that its heads bring, and its settings.

    Raises:
      UserError: none has, or not that of `model_type`; says what differs from the nearest.
    """
    neutral = _NEUTRAL if tree["model"]["pooler"] else (*_NEUTRAL, "model.pooler")
    families = ARCHITECTURES.values() if model_type is None else [architecture(model_type, "export")]
    fewest: tuple[int, str, list[str]] | None = None
    for family in families:
        settings = family.write(tree)
        if settings is None:
            continue
        try:
            there = family.read(settings, "export")
        except UserError:
            if model_type is not None:
                raise
            # What another family's config.json cannot say is no model of that family.
            continue
        for head in family.heads:
            if head.name in heads:
                there["model"].update(head.model(there))
        lines = difference(tree, there, names=("here", family.model_type))
        lines = [line for line in lines if not line.startswith(neutral)]
        if not lines:
            return family, settings
        if fewest is None or len(lines) < fewest[0]:
            fewest = (len(lines), family.model_type, lines)
    if fewest is None:
        raise UserError(
            f"no architecture of the source library has this model: encoding {tree['encoding']!r}, feed_forward "
            f"{tree['feed_forward']!r}; {near(str(model_type), ARCHITECTURES)}"
        )
    raise UserError(
        f"no architecture of the source library has this model; {fewest[1]} is nearest:\n  " + "\n  ".join(fewest[2])
    )


def _head_written_as(head: Head, family: Architecture, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that decide a head.

    Raises:
      UserError: the family's head computes something else.
    """
    if head.name != "masked_lm" and head.name not in OVER_TOKENS:
        return {}
    described, its = family.head(head.name), _computed(head.name, dict(head.settings))
    written = described.write(its)
    theirs = {} if written is None else _computed(head.name, described.read(tree, written, "export"))
    if theirs != its:
        apart = [name for name in its if its[name] != theirs.get(name)]
        raise UserError(
            f"{family.model_type} has no {head.name} head of this model with "
            + ", ".join(f"{name}={its[name]!r}" for name in apart)
        )
    return written


def _computed(head: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a head that say what it computes."""
    task = MaskedLM(**settings) if head == "masked_lm" else TokenTagging(**settings)
    without = () if task.transform else ("activation", "norm_epsilon", "transform_bias")
    return {name: getattr(task, name) for name in HEAD_SETTINGS if hasattr(task, name) and name not in without}


def _write(
    path: Path, described: Mapping[str, Any], tensors: Iterable[tuple[str, np.ndarray]], pretrained: Pretrained
) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
            whole = Path(temporary) / "whole"
            if pretrained.tokenizer is None:
                whole.mkdir()
            else:
                pretrained.tokenizer.save(whole)
            (whole / CONFIG).write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            if pretrained.sentence_embedding is not None:
                pretrained.sentence_embedding.save(whole, pretrained.model.model_dim)
            write_weights(whole, tensors)
            if path.exists():
                path.rmdir()
            shutil.move(whole, path)
