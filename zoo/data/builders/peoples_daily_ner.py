"""People's Daily NER: persons, places and organisations in Chinese news, 20,864 / 2,318 / 4,636 sentences.

Files `example.train`, `example.dev`, `example.test` (also `train.txt` and so on, `.gz`, `.xz`) of one `character tag` per
line, an empty line after each sentence; tags O, B- and I- with PER, LOC and ORG.

    python -m zoo prepare peoples_daily_ner --manual_dir=data/peoples_daily_ner --data_dir=data/tfds
"""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow_datasets as tfds

from zoo.data.builders.manual import ManualBuilder
from zoo.data.conll import ConllSource
from zoo.data.record import Record
from zoo.errors import UserError

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG")


class PeoplesDailyNer(ManualBuilder):
    """Features `words`, the characters of a sentence, and their `tags`."""

    name = "peoples_daily_ner"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "One file for each split: example.train, example.dev, example.test."

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "words": tfds.features.Sequence(tfds.features.Text()),
            "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=TAGS)),
        }
        return self.described("Named entities in Chinese news.", features)

    def records(self, path: str) -> Iterator[Record]:
        for record in ConllSource(test=(path,)).records("test"):
            for offset, tag in enumerate(record.fields["tags"]):
                if tag not in TAGS:
                    line = record.line + offset  # a sentence has a word on every line
                    raise UserError(f"{path}:{line}: tag {tag!r}; expected one of {', '.join(TAGS)}")
            yield record
