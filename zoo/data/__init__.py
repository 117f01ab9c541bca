"""Data: sources, tokenizers, the prepared store, packing, masking and the pipeline. It knows nothing of models."""

from zoo.data import builtin, conll, tables, text, tfds
from zoo.data.record import Record, Source, texts
from zoo.data.registration import registry
from zoo.data.synthetic import copying, flip_flop, mqar, passkey

names = registry.names

__all__ = [
    "Record",
    "Source",
    "builtin",
    "conll",
    "copying",
    "flip_flop",
    "mqar",
    "names",
    "passkey",
    "registry",
    "tables",
    "text",
    "texts",
    "tfds",
]
