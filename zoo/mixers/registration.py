"""The registry of sequence mixers."""

from zoo.registry import Registry

registry = Registry("mixer")
