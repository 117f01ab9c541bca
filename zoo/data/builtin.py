"""The built-in source: real English that every installation carries, so that the quick start needs no download.

The text is the docstrings of the standard library, numpy, scipy, jax, flax and optax, and the language reference's
topics (`pydoc_data`), read from source files with `ast`. It is read from the user's own installation and never
shipped, so it changes with the versions of the packages: `versions()` and `fingerprint()` name it exactly.

**Split.** A module whose hash is 0 modulo 5 is held out: its text takes no part in tokenizer training, pretraining or
labelled training; a quarter of the held-out modules are "dev" and the rest "test". Exact duplicates are removed, and
so are held-out labelled items half of whose runs of 8 words stand in the training text (packages copy each other's
docstrings), or, for test items, in that of dev.

**Cache.** Harvesting takes a few seconds. `with_cache(directory)` keeps the result there as one JSON-lines file. Its
name is a hash of the package versions, of path, size and modification time of every source file, and of the code that
cuts the text, so a file made from anything else is never read; its first line holds the hash of the rest, so a damaged
one is harvested again; it is written under another name and renamed, so an interrupted one does not exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from zoo.data import docstring_items, docstrings
from zoo.data.docstring_items import TYPES, Item, Runs, rank, split_of
from zoo.data.record import Record
from zoo.data.registration import registry
from zoo.errors import UserError, near, writing

PACKAGES = (docstrings.STANDARD_LIBRARY, "numpy", "scipy", "jax", "flax", "optax")
SPLITS = {
    "text": ("train", "dev"),
    "parameter_names": ("train", "dev", "test"),
    "parameter_types": ("train", "dev", "test"),
}
# The number of labelled texts per split; for parameter_types per class, where fewer exist all are taken.
LABELLED = {
    "parameter_names": {"train": 400, "dev": 300, "test": 600},
    "parameter_types": {"train": 50, "dev": 50, "test": 100},
}
OVERLAP = 0.5


@registry.register("builtin")
@dataclasses.dataclass(frozen=True)
class BuiltinSource:
    """Text, or one of two labelled tasks cut from it.

    Attributes:
      subset: "text": one document per docstring, the object's name before its prose, fields {"text"}, splits train and
        dev. "parameter_names": fields {"words", "tags"}, tags O and B-PARAM, 400 labelled texts to train on.
        "parameter_types": fields {"text", "label"}, six classes, 50 labelled texts of each.
      seed: which labelled texts are drawn for "train"; dev and test are the same for every seed.
      packages: where the text comes from; one that is not installed is left out with a logged warning.
      cache: folder to keep the harvest in, or None to harvest anew.
    """

    subset: Literal["text", "parameter_names", "parameter_types"] = "text"
    seed: int = 0
    packages: tuple[str, ...] = PACKAGES
    cache: str | None = None

    def __post_init__(self):
        for package in self.packages:
            if not package.isidentifier():
                raise UserError(f"built-in source: {package!r} is no package name; {near(package, PACKAGES)}")
        if not self.versions():
            raise UserError(f"built-in source: none of the packages {', '.join(self.packages)} is installed")

    def with_cache(self, directory: str | os.PathLike) -> BuiltinSource:
        """The same source, its harvest kept in `directory` (made when first needed)."""
        return dataclasses.replace(self, cache=os.fspath(directory))

    def splits(self) -> tuple[str, ...]:
        return SPLITS[self.subset]

    def versions(self) -> dict[str, str]:
        """The versions of the packages the text comes from."""
        return docstrings.versions(self.packages)

    def fingerprint(self) -> str:
        """A hash of the text, the choice of the subset and the seed; the same wherever the text is the same."""
        return hashlib.sha256(f"{self._corpus.digest} {self.subset} {self.seed}".encode()).hexdigest()

    def records(self, split: str) -> Iterator[Record]:
        """The records of a split; `file` and `line` say where in the package the text stands.

        Raises:
          UserError: no such split.
        """
        if split not in self.splits():
            raise UserError(
                f"built-in source, subset {self.subset!r}: no split {split!r}; {near(split, self.splits())}"
            )
        pool = self._corpus.items[self.subset, split]
        if self.subset == "text":
            chosen: Iterable[Item] = pool
        else:
            chosen = _draw(pool, LABELLED[self.subset][split], self.seed if split == "train" else 0)
        for item in chosen:
            yield Record(item.fields, item.file, item.line)

    @functools.cached_property
    def _corpus(self) -> _Corpus:
        if self.cache is None:
            return _Corpus.parse(_serialise(_cut(self.packages)))
        path = Path(self.cache) / f"builtin-{_key(self.packages)}.jsonl"
        body = _read_cache(path)
        if body is None:
            body = _serialise(_cut(self.packages))
            _write_cache(path, body)
        return _Corpus.parse(body)


@dataclasses.dataclass(frozen=True)
class _Corpus:
    items: dict[tuple[str, str], list[Item]]  # (subset, split) → all there are
    digest: str

    @classmethod
    def parse(cls, body: bytes) -> _Corpus:
        items: dict[tuple[str, str], list[Item]] = {(s, split): [] for s, splits in SPLITS.items() for split in splits}
        for line in body.splitlines():
            subset, split, fields, file, number = json.loads(line)
            if "words" in fields:
                fields = {name: tuple(value) for name, value in fields.items()}
            items[subset, split].append(Item(fields, file, number))
        return cls(items, hashlib.sha256(body).hexdigest())


def _draw(pool: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` items of every label (untyped ones count as one label), in the order of a hash of seed and text."""
    ordered = sorted(pool, key=lambda item: rank("draw", seed, item.text))
    taken: dict[object, int] = dict.fromkeys((*TYPES, None), 0)
    chosen = []
    for item in ordered:
        label = item.fields.get("label")
        if taken[label] < count:
            taken[label] += 1
            chosen.append(item)
    return chosen


def _cut(packages: tuple[str, ...]) -> Iterator[tuple[str, str, Item]]:
    """(subset, split, item) of everything in `packages`; training text first, so that a copy is never held out."""
    order = {"train": 0, "dev": 1, "test": 2}
    harvested = sorted(docstrings.harvest(packages), key=lambda d: order[split_of(d.module)])  # a stable sort
    training: list[str] = []
    seen: set[str] = set()
    for docstring in harvested:
        split = split_of(docstring.module)
        if split == "test":
            break
        paragraphs = [p for p in dict.fromkeys(docstring_items.prose(docstring.text)) if p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            text = f"{docstring.name} {' '.join(paragraphs)}"
            yield "text", split, Item({"text": text}, docstring.file, docstring.line)
            if split == "train":
                training.append(text)
    labelled = list(_labelled(harvested))
    training += [item.text for _, split, item in labelled if split == "train"]
    in_training = Runs(training)
    in_dev = Runs(item.text for _, split, item in labelled if split == "dev")
    for subset, split, item in labelled:
        if split != "train" and in_training.overlap(item.text) >= OVERLAP:
            continue
        if split == "test" and in_dev.overlap(item.text) >= OVERLAP:
            continue
        yield subset, split, item


def _labelled(harvested: Iterable[docstrings.Docstring]) -> Iterator[tuple[str, str, Item]]:
    seen: set[str] = set()
    for docstring in harvested:
        split = split_of(docstring.module)
        tagged = docstring_items.parameter_names(docstring)
        found = [("parameter_names", tagged)] if tagged else []
        found += [("parameter_types", item) for item in docstring_items.parameter_types(docstring)]
        for subset, item in found:
            if item.text not in seen:
                seen.add(item.text)
                yield subset, split, item


def _serialise(items: Iterable[tuple[str, str, Item]]) -> bytes:
    lines = (
        json.dumps([subset, split, item.fields, item.file, item.line], ensure_ascii=False)
        for subset, split, item in items
    )
    return "".join(line + "\n" for line in lines).encode()


def _key(packages: tuple[str, ...]) -> str:
    """What a harvest depends on: versions, every source file's path, size and time, and the code that cuts it."""
    digest = hashlib.sha256(json.dumps([packages, docstrings.versions(packages)]).encode())
    for code in (docstrings.__file__, docstring_items.__file__, __file__):
        digest.update(Path(code).read_bytes())
    for package in packages:
        for path, relative in docstrings.source_files(package):
            facts = path.stat()
            digest.update(f"{relative}\x1f{facts.st_size}\x1f{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _read_cache(path: Path) -> bytes | None:
    """The harvest kept at `path`, or None where there is none or its content is not what its first line says."""
    if not path.is_file():
        return None
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        expected = json.loads(head)["sha256"]
    except (ValueError, KeyError, TypeError):
        return None
    return body if hashlib.sha256(body).hexdigest() == expected else None


def _write_cache(path: Path, body: bytes) -> None:
    head = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(head + b"\n" + body)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
