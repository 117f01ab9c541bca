"""Position encodings: one concept per file, each a part under one name."""

from zoo.encodings import alibi, learned, nezha, none, rope, sinusoidal, t5
from zoo.encodings.encoding import AddTerms, Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Project, Site
from zoo.encodings.registration import registry

names = registry.names

__all__ = [
    "AddTerms",
    "Dims",
    "Encoded",
    "Encoding",
    "EncodingLayer",
    "Facts",
    "Place",
    "Project",
    "Site",
    "alibi",
    "learned",
    "names",
    "nezha",
    "none",
    "registry",
    "rope",
    "sinusoidal",
    "t5",
]
