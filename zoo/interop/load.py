"""`load_pretrained`: a directory in the Hugging Face layout, or a run of ours, ready to run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from zoo.config import completed, load_saved, plain
from zoo.data.tokenizer import Tokenizer
from zoo.data.tokenizers import load_tokenizer
from zoo.errors import UserError, near
from zoo.interop import parameters
from zoo.interop.architecture import Architecture
from zoo.interop.architectures import architecture
from zoo.interop.json_files import read_json
from zoo.interop.pretrained import EncoderWithHeads, Head, Pretrained
from zoo.interop.sentence_embedding import sentence_embedding
from zoo.interop.weights import open_weights
from zoo.models import build
from zoo.training.checkpoints import restore_numpy

logger = logging.getLogger(__name__)

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer", "checkpoints"
MODEL = ("model", "encoding", "mixer", "feed_forward", "norm")
# What a config file of ours has and one of theirs has not.
_OURS = "format_version"
# Layers that share their parameters are no tensors of their own.
_DEEPEST = 1000
# The fields of a task that say what its masked-LM or tagging head computes.
HEAD_SETTINGS = ("activation", "norm_epsilon", "transform", "transform_bias", "output_bias", "tied")
# From this size on a person wants to see that something moves.
_LARGE = 100 * 2**20
_MOSAIC = (
    ". With alibi_starting_size in it this is MosaicBERT, which calls itself 'bert': set model_type to 'mosaicbert'"
)
_TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "merges.txt")


def load_pretrained(path: str | os.PathLike[str], *, heads: bool = True) -> Pretrained:
    """The checkpoint in a directory: config.json with model.safetensors or pytorch_model.bin, whole or in shards, or a run of ours.

    Args:
      path: the directory.
      heads: False reads the encoder alone, also of a class whose heads this zoo does not have.

    Raises:
      UserError: what is missing, not ours to compute, or does not fit; nothing in the directory is ever executed.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; a checkpoint is a directory with a config.json")
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory} is neither a checkpoint's directory nor a run folder: it has no {CONFIG}")
    return _load_theirs(directory, heads) if is_checkpoint(directory) else _load_run(directory, heads)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a checkpoint in the Hugging Face layout, as far as its config.json says."""
    file = Path(path) / CONFIG
    return file.is_file() and _OURS not in read_json(file, dict)


def family_of(directory: Path) -> tuple[dict[str, Any], Architecture, str]:
    """What a checkpoint's config.json holds, the architecture it names, and where it stands.

    Raises:
      UserError: no such file, code of its own, or an architecture that there is not.
    """
    found, where = read_json(directory / CONFIG, dict), str(directory / CONFIG)
    return found, _family(found, where), where


def _load_theirs(directory: Path, with_heads: bool) -> Pretrained:
    found, family, where = family_of(directory)
    tree = family.read(found, where)
    with open_weights(directory) as weights:
        _check_depth(tree, len(weights.names()), where)
        names = _heads_of(family, found, weights.names(), where) if with_heads else ()
        tensors = parameters.NamedTensors(weights, family, heads=bool(names))
        tree["model"]["pooler"] = any(family.prefix + rule.theirs in tensors for rule in family.pooler)
        for name in names:
            tree["model"].update(family.head(name).model(tree))
        labels = _labels(found, where)
        heads = tuple(_head(family, name, tree, found, tensors, labels, where) for name in names)
        try:
            model = build(tree)
        except UserError as error:
            raise UserError(f"{where} describes a model that cannot be built: {error}") from error
        module = EncoderWithHeads(model, heads, family.own_positions)
        shapes = _shapes(module)
        mapped = parameters.written_out(family, tree, names, model.stages, shapes, tensors)
        params = parameters.load(
            tensors,
            family,
            mapped,
            shapes,
            str(directory),
            only_encoder=not with_heads,
            constants=family.constant_tensors(tree),
            track=_tracker(weights.nbytes, directory),
        )
    tokenizer = tokenizer_in(directory)
    if tokenizer is not None and tokenizer.vocabulary.size > model.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocabulary.size} pieces, the token table {model.vocab_size} rows; they are "
            "not of one model"
        )
    classified = any(head.name in ("classification", "token_tagging") for head in heads)
    return Pretrained(
        model=model,
        params=params,
        tokenizer=tokenizer,
        config=ConfigDict(tree).lock(),
        architecture=family.model_type,
        heads=heads,
        labels=labels if classified else (),
        sentence_embedding=sentence_embedding(directory),
        positions_from_mask=family.own_positions,
        pad_token_id=found.get("pad_token_id"),
    )


def _check_depth(tree: Mapping[str, Any], num_tensors: int, where: str) -> None:
    """Refuses more layers than the file can hold before their names are written out."""
    layers, shared = tree["model"]["num_layers"], any(stage.get("share") for stage in tree["model"]["stages"])
    if layers > (_DEEPEST if shared else num_tensors):
        raise UserError(
            f"{where} describes {layers} layers, the weights are {num_tensors} tensors; they are not of one model"
        )


def _family(found: Mapping[str, Any], where: str) -> Architecture:
    if "auto_map" in found:
        raise UserError(
            f"{where} names code of its own (auto_map: {found['auto_map']!r}), which is never run. If the model is one that this zoo "
            "computes itself, take the key out and let model_type say which; docs/checkpoints.md lists them"
            + (_MOSAIC if _is_mosaic(found) else "")
        )
    if not isinstance(found.get("model_type"), str):
        raise UserError(f"{where}: the key 'model_type', which names the architecture, is missing")
    if _is_mosaic(found):
        raise UserError(f"{where} is not of the architecture that it names{_MOSAIC}")
    return architecture(found["model_type"], where)


def _is_mosaic(found: Mapping[str, Any]) -> bool:
    return found.get("model_type") == "bert" and "alibi_starting_size" in found


def _heads_of(family: Architecture, found: Mapping[str, Any], names: Iterable[str], where: str) -> tuple[str, ...]:
    """The heads of the class that config.json names, or else of the first class whose heads are all in the file; and those beside."""
    present = set(map(parameters.new_name, names))
    beside = tuple(name for name in family.beside if family.head(name).is_in(present))
    given = found.get("architectures")
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str):
        if given[0] not in family.classes:
            raise UserError(
                f"{where}: the heads of {given[0]!r} are not among ours; {near(given[0], family.classes)}. "
                "load_pretrained(path, heads=False) reads the encoder alone"
            )
        return family.classes[given[0]] + beside
    if given:
        raise UserError(f"{where}: architectures must be a list of one class, but is {given!r}")
    whole = [
        heads
        for heads in family.classes.values()
        if heads and all(family.head(head).is_in(present, family.tied) for head in heads)
    ]
    longest = max(map(len, whole), default=0)
    best = [heads for heads in whole if len(heads) == longest]
    if len(best) > 1:
        raise UserError(
            f"{where} names no class in 'architectures', and the weights may be of {' or '.join(' + '.join(h) for h in best)}; add it"
        )
    return (best[0] if best else ()) + beside


def _head(
    family: Architecture,
    name: str,
    tree: Mapping[str, Any],
    found: Mapping[str, Any],
    tensors: parameters.NamedTensors,
    labels: tuple[str, ...],
    where: str,
) -> Head:
    described = family.head(name)
    classes = 0
    kernels = [rule for rule in described.rules if rule.ours == f"heads/{name}/output/kernel"]
    if kernels and kernels[0].theirs in tensors:
        classes = tensors.shape(kernels[0].theirs)[0]
        if name in ("classification", "token_tagging") and labels and len(labels) != classes:
            raise UserError(f"{where}: id2label names {len(labels)} labels, {kernels[0].theirs} has {classes} rows")
    return Head(name, tuple(described.read(tree, found, where).items()), max(classes, 1))


def _labels(found: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = found.get("id2label")
    if not given:
        return ()
    try:
        numbered = {int(number): str(label) for number, label in given.items()}
    except (AttributeError, ValueError) as error:
        raise UserError(f"{where}: id2label must map numbers to names, but is {given!r}") from error
    if sorted(numbered) != list(range(len(numbered))):
        raise UserError(
            f"{where}: id2label must number its labels from 0 to {len(numbered) - 1}, but has {sorted(numbered)}"
        )
    return tuple(numbered[number] for number in range(len(numbered)))


def _shapes(module: EncoderWithHeads) -> dict[str, tuple[int, ...]]:
    one = jnp.zeros((1, 1), jnp.int32)
    tree = jax.eval_shape(module.init, jax.random.key(0), one, one, None)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def _tracker(nbytes: int, directory: Path) -> Callable[[list[Any]], Iterable[Any]]:
    if nbytes < _LARGE:
        return iter
    return lambda items: track(
        items, description=f"reading {directory.name}", console=Console(stderr=True), transient=True
    )


def tokenizer_in(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None where the directory has no file of one."""
    if not any((directory / name).exists() for name in _TOKENIZER_FILES) and not any(directory.glob("*.model")):
        return None
    if not any((directory / name).exists() for name in _TOKENIZER_FILES) and _shifts_pieces(directory):
        raise UserError(
            f"{directory}: its architecture gives the pieces of a SentencePiece model other ids than the model does; add the "
            "tokenizer.json that the source library writes, or take the model away to load without a tokenizer"
        )
    return load_tokenizer(directory, jieba_first=_jieba_first(directory))


def _shifts_pieces(directory: Path) -> bool:
    """Whether the architecture's ids are not those of its SentencePiece model: fairseq put its special tokens first."""
    return read_json(directory / CONFIG, dict).get("model_type") == "xlm-roberta"


def _jieba_first(directory: Path) -> bool | None:
    """Where tokenizer_config.json names no tokenizer, the source library takes that of the architecture: RoFormer's is of Chinese words."""
    settings = directory / "tokenizer_config.json"
    named = settings.is_file() and read_json(settings, dict).get("tokenizer_class")
    return None if named else read_json(directory / CONFIG, dict).get("model_type") == "roformer"


def _load_run(workdir: Path, with_heads: bool) -> Pretrained:
    """A run of ours, from its folder alone."""
    config = completed(load_saved(workdir / CONFIG))
    tree = {name: plain(config[name]) for name in MODEL}
    params = dict(restore_numpy(workdir / CHECKPOINTS, part="params").state["params"])
    task, its = plain(config.task), dict(params.get("heads", {}))
    if not with_heads:
        params, its = {"model": params["model"]}, {}
    if "regression" in its:
        # As the source library has it: a classifier of one class.
        its = params["heads"] = {"classification": its["regression"]}
    heads = tuple(_own_head(name, head, task) for name, head in its.items())
    return Pretrained(
        model=build(tree),
        params=jax.tree.map(jnp.asarray, params),
        tokenizer=load_tokenizer(workdir / TOKENIZER) if (workdir / TOKENIZER).exists() else None,
        config=ConfigDict(tree).lock(),
        heads=heads,
        labels=tuple(task.get("labels", ())) if its else (),
    )


def _own_head(name: str, params: Mapping[str, Any], task: Mapping[str, Any]) -> Head:
    settings = tuple((key, task[key]) for key in HEAD_SETTINGS if key in task)
    if name == "masked_lm":
        return Head(name, settings)
    if "output" not in params:
        raise UserError(
            f"the head {name!r} of this run has no counterpart in a checkpoint; load_pretrained(…, heads=False)"
        )
    if task.get("pooling") == "mean":
        raise UserError(
            f"the head of this run of {task['name']!r} reads the mean over the tokens (task.pooling), which that of no checkpoint does; "
            "load_pretrained(…, heads=False), or `convert --encoder`, takes the encoder alone"
        )
    return Head(name, settings if name == "token_tagging" else (), np.shape(params["output"]["kernel"])[-1])
