"""Key maps as data: which tensor of a checkpoint is which parameter of ours, and how each becomes the other.

A rule names both by pattern. `{layer}` is the layer's number in their file, `{block}` where that layer's block stands in our
tree, whose leaves have a layer axis; `zoo.models.parameters.has_layer_axis` says which.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from zoo.models import Stage


@dataclass(frozen=True)
class Form(abc.ABC):
    """How one tensor of theirs holds one or several of ours; `theirs` undoes `ours` exactly."""

    @abc.abstractmethod
    def ours(self, tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        """Our arrays, as views where that can be."""

    @abc.abstractmethod
    def theirs(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor again."""


@dataclass(frozen=True)
class Axes(Form):
    """One of ours with the axes of theirs in the order `order`; None = the same array."""

    order: tuple[int, ...] | None = None

    def ours(self, tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        return (tensor if self.order is None else tensor.transpose(self.order),)

    def theirs(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return arrays[0] if self.order is None else arrays[0].transpose(np.argsort(self.order))


@dataclass(frozen=True)
class Squeezed(Form):
    """One of ours without the axes of size one that theirs has at `axes`, and transposed where it is a matrix."""

    axes: tuple[int, ...]

    def ours(self, tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.squeeze(tensor, self.axes).T,)

    def theirs(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.expand_dims(arrays[0].T, self.axes)


@dataclass(frozen=True)
class Fused(Form):
    """`parts` of ours of one size that stand one after another along the first axis of theirs, `[parts · out, …]`.

    With `heads` they are interleaved head by head, `[heads · parts · out / heads, …]`. Kernels are transposed as well.
    """

    parts: int
    heads: int = 1

    def ours(self, tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        rest = tensor.shape[1:]
        split = tensor.reshape(self.heads, self.parts, -1, *rest)
        return tuple(split[:, part].reshape(-1, *rest).T for part in range(self.parts))

    def theirs(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        split = [array.T.reshape(self.heads, 1, -1, *array.T.shape[1:]) for array in arrays]
        return np.concatenate(split, axis=1).reshape(-1, *arrays[0].T.shape[1:])


SAME = Axes()
KERNEL = Axes((1, 0))
CONVOLUTION = Axes((2, 1, 0))


class Rule(NamedTuple):
    """`theirs` holds `ours`, paths of one or several parameters, in this form."""

    theirs: str
    ours: str | tuple[str, ...]
    form: Form = SAME


class Place(NamedTuple):
    """A parameter of ours: its path, and the layer along its leading axis, None where it has no such axis."""

    path: str
    layer: int | None


class Entry(NamedTuple):
    """One tensor of theirs and the places of ours that it fills."""

    theirs: str
    ours: tuple[Place, ...]
    form: Form


def dense(theirs: str, ours: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """The rules of a projection: `weight` `[out, in]` is our `kernel` `[in, out]`."""
    rules = (Rule(f"{theirs}.weight", f"{ours}/kernel", KERNEL),)
    return rules + ((Rule(f"{theirs}.bias", f"{ours}/bias"),) if bias else ())


def norm(theirs: str, ours: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """The rules of a norm: `weight` is our `scale`."""
    rules = (Rule(f"{theirs}.weight", f"{ours}/scale"),)
    return rules + ((Rule(f"{theirs}.bias", f"{ours}/bias"),) if bias else ())


def blocks(stages: Sequence[Stage]) -> list[Place]:
    """Where the block of each layer stands, in order of depth: its path and its place along the layer axis.

    Layers that share their parameters stand at one place.
    """
    return [
        Place(f"model/stage_{number}/block_{index}", 0 if stage.share else repeat)
        for number, stage in enumerate(stages)
        for repeat in range(stage.repeats)
        for index in range(len(stage.pattern))
    ]


def entries(rules: Iterable[Rule], stages: Sequence[Stage]) -> list[Entry]:
    """The rules written out, layer by layer."""
    places, found = blocks(stages), {}
    for rule in rules:
        paths = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        layers = enumerate(places) if "{block}" in paths[0] else [(None, None)]
        for number, place in layers:
            theirs = rule.theirs.format(layer=number)
            ours = tuple(
                Place(path if place is None else path.format(block=place.path), place and place.layer) for path in paths
            )
            # Shared layers meet here again and again at one name.
            found[theirs, ours] = Entry(theirs, ours, rule.form)
    return list(found.values())
