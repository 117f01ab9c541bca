"""The registry of tasks."""

from zoo.registry import Registry

registry = Registry("task")
