"""Position encodings: one concept per file, each a part under one name."""

from zoo.encodings import alibi, learned, nezha, none, rope, sinusoidal, t5
from zoo.encodings.encoding import AddTerms, Core, Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Project, Site
from zoo.encodings.registration import registry
from zoo.encodings.scores import logits

names = registry.names

__all__ = [
    "AddTerms",
    "Core",
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
    "logits",
    "names",
    "nezha",
    "none",
    "registry",
    "rope",
    "sinusoidal",
    "t5",
]
