"""Position encodings: one concept per file, each a part under one name; a file in this folder is all it takes."""

import importlib
import pkgutil

from zoo.encodings.encoding import AddTerms, Core, Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Project, Site
from zoo.encodings.registration import registry
from zoo.encodings.scores import initial_parameters, logits

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

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
    "initial_parameters",
    "logits",
    "names",
    "registry",
]
