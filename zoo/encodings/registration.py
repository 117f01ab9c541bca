"""The registry of position encodings."""

from zoo.registry import Registry

registry = Registry("encoding")
