"""What a family of checkpoints is to us: its settings, its key maps, its heads, as one value."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zoo.config import completed, plain
from zoo.interop.key_map import Rule
from zoo.interop.settings import Setting, read, written

Tree = dict[str, Any]


@dataclass(frozen=True)
class HeadMap:
    """One head of a family.

    Attributes:
      name: the head's name with us, under `heads/`.
      rules: our parameters of the head and, where it has one of its own, of the pooler.
      settings: the fields of the head, or of its task, that have other values than their defaults, from our config.
      fields: keys of config.json that decide fields of the head's task, `ours` being the field.
      model: entries of `model` that the head decides, such as its pooler's activation, from our config. A head of dense,
        activation and projection is the model's pooler and a projection: its rules hold `model/pooler/…`.
      other: the rules of files that have the head under other names; written are `rules`.
    """

    name: str
    rules: tuple[Rule, ...]
    settings: Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(default=lambda tree: {})
    fields: tuple[Setting, ...] = ()
    model: Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(default=lambda tree: {})
    other: tuple[Rule, ...] = ()

    def rules_in(self, names: Container[str]) -> tuple[Rule, ...]:
        """The rules of a file with tensors of these names."""
        has_other = bool(self.other) and all(rule.theirs in names for rule in self.other)
        return self.other if has_other else self.rules

    def is_in(self, names: Container[str], tied: Container[str] = ()) -> bool:
        """Whether a file with tensors of these names has the head; a config may do without biases, and without a `tied` table."""
        return all(
            rule.theirs in names or rule.theirs in tied or rule.theirs.endswith(".bias")
            for rule in self.rules_in(names)
        )

    def read(self, tree: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> Tree:
        """The fields of the head's task, of our config and a config.json.

        Raises:
          UserError: a setting that is wrong, or that we do not have.
        """
        return {**self.settings(tree), **read(self.fields, theirs, {}, where)}

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """The keys of config.json that `fields` are read from; None where there are none of such values."""
        return written(self.fields, fields)


@dataclass(frozen=True)
class Architecture:
    """A family of checkpoints.

    Attributes:
      model_type: what config.json calls it.
      prefix: of the encoder's keys in a file that has a head as well; a bare encoder's file has none.
      template: entries of our config that are the same for all of the family.
      settings: those that config.json decides.
      rules: the encoder's parameters, from our config; their names are without the prefix.
      pooler: those of the encoder's own pooler, which a file may lack.
      classes: name in `architectures` → the heads it has; the first without heads is the bare encoder.
      heads: every head of the family.
      beside: heads that a file may have beside those of its class, which the source library passes over.
      tied: their keys, with the prefix, that repeat another of their keys, or are left out.
      ignored: patterns of keys that hold no parameter.
      derive: completes our config where one setting alone does not decide an entry, and `recover` gives the keys back.
    """

    model_type: str
    prefix: str
    template: Mapping[str, Any] = field(hash=False)
    settings: tuple[Setting, ...]
    rules: Callable[[Mapping[str, Any]], Sequence[Rule]]
    classes: Mapping[str, tuple[str, ...]] = field(hash=False)
    heads: tuple[HeadMap, ...] = ()
    beside: tuple[str, ...] = ()
    pooler: tuple[Rule, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict, hash=False)
    ignored: tuple[str, ...] = ()
    derive: Callable[[Tree, Mapping[str, Any], str], Tree] | None = None
    recover: Callable[[Tree], dict[str, Any] | None] | None = None
    own_positions: bool = False
    """Whether tokens are counted without the padding before them (RoBERTa)."""
    caution: Callable[[Mapping[str, Any]], str] = field(default=lambda tree: "")
    """From our config, what whoever loads our export must know; empty for nothing."""
    constants: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]] = field(default=lambda tree: {})
    """From our config, tensors that a file may hold and that config.json alone decides (RoFormer's sinusoids): checked, and written."""

    @property
    def bare_class(self) -> str:
        """The class of an encoder without heads."""
        return next(name for name, heads in self.classes.items() if not heads)

    def class_of(self, heads: Sequence[str]) -> str | None:
        """The class with exactly these heads, but for those that may stand `beside`; None where there is none."""
        wanted = set(heads).difference(self.beside)
        return next((name for name, its in self.classes.items() if set(its) == wanted), None)

    def head(self, name: str) -> HeadMap:
        return next(head for head in self.heads if head.name == name)

    def constant_tensors(self, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The constants under the names of a file with heads."""
        return {self.prefix + name: tensor for name, tensor in self.constants(tree).items()}

    def read(self, theirs: Mapping[str, Any], where: str) -> Tree:
        """Our config, complete, of a config.json.

        Raises:
          UserError: a setting that is missing, wrong, or that we do not have.
        """
        tree = read(self.settings, theirs, self.template, where)
        if self.derive is not None:
            tree = self.derive(tree, theirs, where)
        return plain(completed(tree))

    def write(self, tree: Mapping[str, Any]) -> dict[str, Any] | None:
        """The config.json that `read` makes this config from; None where there is none, so another family must hold it."""
        theirs = written(self.settings, tree)
        if theirs is not None and self.recover is not None:
            recovered = self.recover(dict(tree))
            theirs = None if recovered is None else {**theirs, **recovered}
        return theirs
