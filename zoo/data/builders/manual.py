"""What our builders share: one file per split in a folder that you give, examples in the file's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from zoo.data.files import content_hash, read_lines
from zoo.data.record import Record
from zoo.errors import UserError

# Split of TFDS → what a file of that split has between the dots of its name: `example.dev`, `dev.txt.xz`, `dev.tsv`.
SPLITS = {"train": "train", "validation": "dev", "test": "test"}
FILES = "files"


class ManualBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder over a manual folder; a subclass says what features there are and how a file is read.

    The order of the files is kept: example k of a split is record k of its file. The prepared data hold the name and
    the SHA-256 of each file in their metadata, so that a changed file is noticed.
    """

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        files = split_files(Path(dl_manager.manual_dir))
        self.info.metadata[FILES] = file_hashes(files)
        return {split: self._generate_examples(str(path)) for split, path in files.items()}

    def _generate_examples(self, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, record in enumerate(self.records(path)):
            yield index, dict(record.fields)

    def records(self, path: str) -> Iterator[Record]:
        """The records of one file, whose fields have the features' names.

        Raises:
          UserError: a row that is none; says file and line.
        """
        raise TypeError(f"{type(self).__name__} does not say how to read a file")

    def described(self, description: str, features: dict[str, Any]) -> tfds.core.DatasetInfo:
        """What `_info` returns: the features, with examples kept in order."""
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )


def split_files(folder: Path) -> dict[str, Path]:
    """Split → its file in `folder`, for the splits that have one: `train.txt`, `example.dev`, `test.tsv.xz`, ...

    Raises:
      UserError: no such folder, no file of any split, or two of one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; manual_dir is where the files of the data set lie")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    found: dict[str, Path] = {}
    for split, word in SPLITS.items():
        named = [name for name in names if word in name.split(".")]
        if len(named) > 1:
            raise UserError(f"{folder} holds several files for the split {split!r}: {', '.join(named)}; leave one")
        if named:
            found[split] = folder / named[0]
    if not found:
        raise UserError(
            f"{folder} holds no file for any split; expected names such as train.txt, dev.tsv.xz or example.test, "
            f"found {', '.join(names[:10]) or 'nothing'}"
        )
    return found


def file_hashes(files: dict[str, Path]) -> dict[str, list[str]]:
    """Split → [name, SHA-256] of its file."""
    return {split: [path.name, content_hash(str(path))] for split, path in files.items()}


def begins_with_header(path: str, column: int) -> bool:
    """Whether the first row of a tab-separated file has the word "label" in `column`: some editions have a header."""
    first = next(read_lines(path)).text
    columns = first.split("\t") if first is not None else []
    return -len(columns) <= column < len(columns) and columns[column] == "label"


def checked(records: Iterable[Record], labels: tuple[str, ...]) -> Iterator[Record]:
    """The records, each with one of the `labels`.

    Raises:
      UserError: another label; says file and line.
    """
    for record in records:
        label = record.fields["label"]
        if label not in labels:
            raise UserError(f"{record.file}:{record.line}: label {label!r}; expected {' or '.join(labels)}")
        yield record
