"""Tensors of a checkpoint to parameters and back, by the rules of its architecture; everything must find its place."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.errors import UserError
from zoo.interop.architecture import Architecture
from zoo.interop.key_map import Entry, Rule, entries
from zoo.models import Stage

logger = logging.getLogger(__name__)

# Names that the exporters of the first TensorFlow checkpoints gave to a norm's parameters.
_OLD_NAMES = (
    (re.compile(r"(LayerNorm|layer_norm|layernorm)\.gamma$"), r"\1.weight"),
    (re.compile(r"(LayerNorm|layer_norm|layernorm)\.beta$"), r"\1.bias"),
)


class Tensors(Protocol):
    """What is read of a file of weights."""

    def names(self) -> tuple[str, ...]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...


class NamedTensors:
    """The tensors of a file under the names that the rules use: with the encoder's prefix, and norms' parameters by their new names."""

    def __init__(self, tensors: Tensors, architecture: Architecture, heads: bool):
        self._tensors = tensors
        names = tensors.names()
        prefixed = any(name.startswith(architecture.prefix) for name in names)
        self._stored = {new_name(name if prefixed or heads else architecture.prefix + name): name for name in names}
        if len(self._stored) < len(names):
            raise UserError(
                "two tensors of the checkpoint have one name once old names of norms are read as the new ones"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> tuple[str, ...]:
        return tuple(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._stored[name])

    def read(self, name: str) -> np.ndarray:
        return self._tensors.read(self._stored[name])

    def untie(self, repeats: Mapping[str, str]) -> None:
        """Reads every repeat, where the file has it, in its source's place: without the tie it is what the source library computes with."""
        for repeat, source in repeats.items():
            if repeat in self:
                self._stored[source] = self._stored[repeat]


def new_name(name: str) -> str:
    """The name that a tensor has today."""
    for old, new in _OLD_NAMES:
        name = old.sub(new, name)
    return name


def written_out(
    architecture: Architecture,
    tree: Mapping[str, Any],
    heads: Sequence[str],
    stages: Sequence[Stage],
    wanted: Iterable[str],
    names: Container[str] = (),
) -> list[Entry]:
    """Every tensor that fills a parameter of `wanted`, with the encoder's prefix; `names` are those of the file that is read."""
    wanted = set(wanted)
    encoder = [*architecture.rules(tree), *architecture.pooler]
    rules = [Rule(architecture.prefix + rule.theirs, *rule[1:]) for rule in encoder]
    # A head may bring the pooler under a name of its own.
    own = [rule for head in heads for rule in architecture.head(head).rules_in(names)]
    found: dict[tuple[str, ...], Entry] = {}
    for entry in entries([*rules, *own], stages):
        places = [(place.path, place.layer) for place in entry.ours]
        if all(path in wanted for path, _ in places):
            found[tuple(map(str, places))] = entry
    return list(found.values())


def load(
    tensors: NamedTensors,
    architecture: Architecture,
    mapped: Sequence[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    *,
    only_encoder: bool = False,
    constants: Mapping[str, np.ndarray] | None = None,
    track: Any = iter,
) -> dict[str, Any]:
    """Our parameter tree, float32. `constants` are tensors that the file may hold with these values, and no parameters.

    Raises:
      UserError: tensors that are missing, of the wrong shape, without a place of ours, or repeated with other values; all are
        listed, with names nearby.
    """
    constants = constants or {}
    names = {entry.theirs for entry in mapped}
    if any(name in architecture.tied for name in names):
        tensors.untie({repeat: source for repeat, source in architecture.tied.items() if repeat not in names})
    _check(tensors, architecture, mapped, shapes, where, only_encoder, constants)
    ours: dict[str, np.ndarray] = {}
    for entry in track(mapped):
        for place, array in zip(entry.ours, entry.form.ours(tensors.read(entry.theirs)), strict=True):
            if place.path not in ours:
                ours[place.path] = np.empty(shapes[place.path], np.float32)
            target = ours[place.path] if place.layer is None else ours[place.path][place.layer]
            target[...] = array
    unfilled = sorted(shapes.keys() - ours.keys())
    if unfilled:
        raise UserError(
            f"{where}: as config.json describes this {architecture.model_type}, no tensor of a checkpoint fills "
            f"{', '.join(unfilled)}; with these settings the architecture is not among ours"
        )
    _check_tied(tensors, architecture, names, where)
    _check_constants(tensors, constants, where)
    # One by one, so that no more than one parameter is there twice.
    return unflatten_dict({path: jnp.asarray(ours.pop(path)) for path in sorted(ours)}, sep="/")


def store(
    params: Mapping[str, Any], architecture: Architecture, mapped: Sequence[Entry]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of a checkpoint that `load` makes these parameters of.

    A tied tensor is left out, as its source library does; without the tie of the output table it has all its names.
    """
    ours = flatten_dict(dict(params), sep="/")
    left = set(ours)
    names = {entry.theirs for entry in mapped}
    untied = any(name in architecture.tied for name in names)
    for entry in mapped:
        arrays = [
            np.asarray(ours[p.path] if p.layer is None else ours[p.path][p.layer], np.float32) for p in entry.ours
        ]
        left -= {place.path for place in entry.ours}
        tensor = np.ascontiguousarray(entry.form.theirs(arrays))
        yield entry.theirs, tensor
        if untied:
            repeats = [repeat for repeat, source in architecture.tied.items() if source == entry.theirs]
            yield from ((repeat, tensor) for repeat in repeats if repeat not in names)
    if left:
        raise UserError(
            f"{architecture.model_type} has no place for {', '.join(sorted(left))}; a model without them can be written"
        )


def _check(
    tensors: NamedTensors,
    architecture: Architecture,
    mapped: Sequence[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    only_encoder: bool,
    constants: Mapping[str, np.ndarray],
) -> None:
    needed = {entry.theirs for entry in mapped}
    passed = [re.compile(pattern) for pattern in architecture.ignored]
    over = [
        name
        for name in tensors.names()
        if name not in needed
        and name not in architecture.tied
        and name not in constants
        and not any(p.fullmatch(name) for p in passed)
    ]
    # A head that brings the pooler computes without the encoder's own.
    unused = [name for name in over if _is_pooler(name, architecture)]
    over = [name for name in over if name not in unused]
    if unused and not only_encoder:
        logger.info("%s: %s are not used, since the head has its own", where, " and ".join(unused))
    if only_encoder:
        over = [name for name in over if name.startswith(architecture.prefix)]
    problems = []
    for entry in mapped:
        if entry.theirs not in tensors:
            close = difflib.get_close_matches(entry.theirs, over, n=1, cutoff=0.8)
            problems.append(f"{entry.theirs} is missing" + (f"; is it {close[0]}?" if close else ""))
            continue
        problem = _shape_problem(entry, tensors.shape(entry.theirs), shapes)
        if problem:
            problems.append(problem)
    problems += [f"{name} {list(tensors.shape(name))} has no place in this architecture" for name in over]
    if problems:
        raise UserError(
            f"{where}: the weights are not those that config.json describes ({architecture.model_type}):\n  "
            + "\n  ".join(sorted(problems))
        )


def _shape_problem(entry: Entry, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a tensor of this shape does not fill its places; found with arrays that hold nothing."""
    wanted = [shapes[p.path] if p.layer is None else shapes[p.path][1:] for p in entry.ours]
    expected = entry.form.theirs([np.broadcast_to(np.float32(0), its) for its in wanted]).shape
    return None if expected == shape else f"{entry.theirs} is {list(shape)}, config.json describes {list(expected)}"


def _check_tied(tensors: NamedTensors, architecture: Architecture, used: set[str], where: str) -> None:
    """What only repeats another tensor must be equal to it; a table that the config calls untied is `used`, a parameter itself."""
    for repeat, source in architecture.tied.items():
        if repeat in used:
            continue
        if repeat in tensors and source in tensors and not np.array_equal(tensors.read(repeat), tensors.read(source)):
            raise UserError(
                f"{where}: {repeat} differs from {source}, which config.json says it repeats; for an output table of its own it "
                "must say tie_word_embeddings=false"
            )


def _check_constants(tensors: NamedTensors, constants: Mapping[str, np.ndarray], where: str) -> None:
    for name, expected in constants.items():
        if name not in tensors:
            continue
        found = np.asarray(tensors.read(name), np.float32)
        # A file in bfloat16 has its values, none above one, rounded by 2e-3.
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=0, atol=4e-3):
            raise UserError(
                f"{where}: {name} {list(found.shape)} is not the fixed table {list(expected.shape)} that config.json describes; "
                "this zoo computes with that table alone"
            )


def _is_pooler(name: str, architecture: Architecture) -> bool:
    return any(name == architecture.prefix + rule.theirs for rule in architecture.pooler)
