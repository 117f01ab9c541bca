"""LCQMC (Liu et al. 2018, COLING C18-1166): do two Chinese questions mean the same? 238,766 / 8,802 / 12,500 pairs.

Files `train.txt`, `dev.txt`, `test.txt` (also `.tsv`, `.gz`, `.xz`) of `sentence1 TAB sentence2 TAB label`, with or
without a header; the label is 0 or 1. The first publisher, HIT Shenzhen, gives them for research on request.

    python -m zoo prepare lcqmc --manual_dir=data/lcqmc --data_dir=data/tfds
"""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow_datasets as tfds

from zoo.data.builders.manual import ManualBuilder, begins_with_header, checked
from zoo.data.record import Record
from zoo.data.tables import TsvSource

LABELS = ("0", "1")


class Lcqmc(ManualBuilder):
    """Features `text`, `text_pair` and `label`, "1" where the two mean the same."""

    name = "lcqmc"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "One file for each split: train.txt, dev.txt, test.txt."

    def _info(self) -> tfds.core.DatasetInfo:
        text, label = tfds.features.Text(), tfds.features.ClassLabel(names=LABELS)
        return self.described("Chinese question matching.", {"text": text, "text_pair": text, "label": label})

    def records(self, path: str) -> Iterator[Record]:
        header = begins_with_header(path, -1)
        source = TsvSource(test=(path,), header=header, text=0, text_pair=1, label=2)
        return checked(source.records("test"), LABELS)
