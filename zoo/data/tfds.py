"""Data sets prepared by TensorFlow Datasets (TFDS), read without TensorFlow.

Glue, XNLI, Wikipedia and whatever else TFDS prepares in ArrayRecord files, and our own builders for People's Daily NER,
LCQMC and ChnSentiCorp (`zoo.data.builders`):

    python -m zoo prepare glue/sst2 --data_dir=data/tfds
    python -m zoo prepare lcqmc --manual_dir=data/lcqmc --data_dir=data/tfds

    config.data = dict(name="tfds", dataset="glue/sst2", data_dir="data/tfds", text="sentence", label="label")
    config.data = dict(name="tfds", dataset="lcqmc", data_dir="data/tfds", text="text", text_pair="text_pair", label="label")
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zoo.data.builders import BUILDERS
from zoo.data.files import content_hash
from zoo.data.record import Record
from zoo.data.registration import registry
from zoo.errors import UserError, near

# TFDS takes half a second to import, so it waits until a data set is opened.

# What a split is called in TFDS where the config does not say.
SPLITS = {"train": "train", "dev": "validation", "test": "test"}
BATCH = 256

Read = Callable[[Any], Any]


@registry.register("tfds")
@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A data set in the ArrayRecord files that TFDS prepares.

    On the command line a split with brackets is quoted: `--config.data.train="('train[:90%]',)"`.
    A record's `file` is "data set/split" and its `line` the example's number there, from 1. The order is that of the
    prepared files: TFDS shuffles when it prepares, our own builders keep the order of your files. Class labels come
    by their names; an example without one (−1, as in the test sets of GLUE) gives a record without `label`.

    Attributes:
      dataset: "glue/sst2", "xnli", "wikipedia/20230601.en", "lcqmc", with a version where it matters ("xnli:1.1.0").
      data_dir: the folder of all prepared data; None: TFDS's own, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      manual_dir: for our own builders, the folder of your files: the data set is prepared where it is not yet, and
        refused where it was prepared from other files.
      download: prepare a data set of TFDS where it is not yet, which downloads it.
      train, dev, test: the TFDS splits of each, such as ("train[:90%]",), read one after the other; empty: TFDS's
        train, validation and test, where the data set has them.
      text, text_pair, label: the features that hold them; a label may be a class, a string or a number.
      words, tags: for tagged words, instead of those: features that are sequences.
      language: which of the translations in a feature (as in XNLI) is read.
    """

    dataset: str
    data_dir: str | None = None
    manual_dir: str | None = None
    download: bool = False
    train: tuple[str, ...] = ()
    dev: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    words: str | None = None
    tags: str | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        given = frozenset(self._columns())
        if not (given == {"words", "tags"} or ("text" in given and not given & {"words", "tags"})):
            raise UserError(
                f"data source 'tfds' has {', '.join(sorted(given)) or 'no columns'}; name the features that hold text "
                "(with text_pair and label where there are some), or those that hold words and tags"
            )
        name = self.dataset.split("/")[0].split(":")[0]
        if self.manual_dir is not None and name not in BUILDERS:
            raise UserError(
                f"data source 'tfds': manual_dir is for {', '.join(BUILDERS)}; prepare {self.dataset!r} by "
                f"`python -m zoo prepare {self.dataset} --manual_dir={self.manual_dir}`"
            )
        if self.download and name in BUILDERS:
            raise UserError(f"data source 'tfds': {name!r} cannot be downloaded; set manual_dir to your files' folder")

    def splits(self) -> tuple[str, ...]:
        known = self._builder.info.splits
        return tuple(split for split, usual in SPLITS.items() if getattr(self, split) or usual in known)

    def records(self, split: str) -> Iterator[Record]:
        """The records of a split, in batches that bound the memory.

        Raises:
          UserError: the data set is not prepared (says the command), is damaged, or has no such split or feature; an
            example without the text, the words or the language that is asked for.
        """
        return self._records(self._sources(split), self._readers)

    def _records(self, sources: dict[str, Any], readers: dict[str, Read]) -> Iterator[Record]:
        for where, source in sources.items():
            for start in range(0, len(source), BATCH):
                numbers = range(start, min(start + BATCH, len(source)))
                try:
                    batch = source.__getitems__(list(numbers))
                except (RuntimeError, ValueError) as error:  # what ArrayRecord and the decoder raise for bad bytes
                    place = f"{where}, examples {numbers.start + 1} to {numbers.stop}"
                    raise UserError(f"{place}: the prepared data are damaged: {error}") from error
                for number, example in enumerate(batch, start + 1):
                    yield Record(self._fields(example, readers, f"{where}:{number}"), where, number)

    def _fields(self, example: dict[str, Any], readers: dict[str, Read], place: str) -> dict[str, Any]:
        columns, fields = self._columns(), {}
        for field, read in readers.items():
            raw = example[columns[field]]
            # A shard cut short at a block's end reads as empty examples, without any error.
            if raw is None:
                raise UserError(f"{place}: feature {columns[field]!r} has no value; the prepared data may be damaged")
            try:
                value = read(raw)
            except ValueError as error:
                raise UserError(f"{place}: feature {columns[field]!r}: {error}") from error
            if value is not None:
                fields[field] = value
        if "words" in fields and len(fields["words"]) != len(fields["tags"]):
            raise UserError(f"{place}: {len(fields['words'])} words with {len(fields['tags'])} tags")
        return fields

    def fingerprint(self) -> str:
        """SHA-256 of the splits' files, of the features and their labels, and of how they are read.

        Where the data lie does not enter, nor what their version is called.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        directory, info = Path(self._builder.data_dir), self._builder.info
        # The names of the classes lie in files of their own, one per feature.
        files = {str(directory / "features.json"), *map(str, directory.glob("*.labels.txt"))}
        names = {split: self._names(split) for split in self.splits()}
        for of_split in names.values():
            for name in of_split:
                files.update(str(part.filename) for part in self._checked(name, info.splits).file_instructions)
        hashes = [[Path(file).name, content_hash(file)] for file in sorted(files)]
        facts = [self.name, self.dataset, self.language, self._columns(), names, hashes]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def _builder(self) -> Any:
        from zoo.data.builders import preparation

        directory = preparation.prepared_directory(self.dataset, self.data_dir)
        name = preparation.parse(self.dataset)[0]
        if self.manual_dir is not None or (directory is None and self.download):
            directory = preparation.prepare(self.dataset, self.data_dir, self.manual_dir)
        if directory is None:
            command = f"python -m zoo prepare {self.dataset} --data_dir={preparation.root(self.data_dir)}"
            command += " --manual_dir=FOLDER" if name in BUILDERS else ""
            option = "manual_dir to the folder of your files" if name in BUILDERS else "download=True"
            raise UserError(
                f"data set {self.dataset!r} is not prepared in {preparation.root(self.data_dir)}; run `{command}`, or "
                f"set {option}"
            )
        return preparation.open_prepared(directory)

    def _columns(self) -> dict[str, str]:
        """Field of a record → feature that it is read from."""
        named = {field: getattr(self, field) for field in ("text", "text_pair", "label", "words", "tags")}
        return {field: feature for field, feature in named.items() if feature is not None}

    def _names(self, split: str) -> tuple[str, ...]:
        if split not in self.splits():
            known = ", ".join(self._builder.info.splits)
            raise UserError(
                f"data source 'tfds' has no split {split!r}; {near(split, self.splits())}. {self.dataset} has the "
                f"splits {known}"
            )
        return getattr(self, split) or (SPLITS[split],)

    def _sources(self, split: str) -> dict[str, Any]:
        sources = {}
        for name in self._names(split):
            where = f"{self.dataset}/{name}"
            if not self._checked(name, self._builder.info.splits).num_examples:
                raise UserError(f"{where}: the split holds no examples")
            try:
                source = self._builder.as_data_source(name, file_format="array_record")
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(f"{where}: the prepared data are damaged: {error}") from error
            sources[where] = source
        return sources

    def _checked(self, name: str, splits: Any) -> Any:
        try:
            return splits[name]
        except (KeyError, ValueError) as error:
            raise UserError(f"{self.dataset} has no split {name!r}: {error}") from error

    @functools.cached_property
    def _readers(self) -> dict[str, Read]:
        """Field of a record → what makes its value of a decoded feature."""
        from zoo.data import tfds_features

        return tfds_features.readers(self._builder.info.features, self._columns(), self.language, self.dataset)
