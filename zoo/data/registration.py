"""The registry of data sources."""

from zoo.registry import Registry

registry = Registry("data source")
