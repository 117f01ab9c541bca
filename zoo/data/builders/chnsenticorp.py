"""ChnSentiCorp (Tan and Zhang 2008): is a Chinese hotel, book or computer review good? 9,600 / 1,200 / 1,200 reviews.

Files `train.tsv`, `dev.tsv`, `test.tsv` (also `.txt`, `.gz`, `.xz`) of `label TAB text`, with or without the usual
header `label TAB text_a`; the label is 0 or 1.

    python -m zoo prepare chnsenticorp --manual_dir=data/chnsenticorp --data_dir=data/tfds
"""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow_datasets as tfds

from zoo.data.builders.manual import ManualBuilder, begins_with_header, checked
from zoo.data.record import Record
from zoo.data.tables import TsvSource

LABELS = ("0", "1")


class ChnSentiCorp(ManualBuilder):
    """Features `text` and `label`, "1" for a good review."""

    name = "chnsenticorp"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "One file for each split: train.tsv, dev.tsv, test.tsv."

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=LABELS)}
        return self.described("Chinese sentiment of reviews.", features)

    def records(self, path: str) -> Iterator[Record]:
        header = begins_with_header(path, 0)
        source = TsvSource(test=(path,), header=header, text=1, label=0)
        return checked(source.records("test"), LABELS)
