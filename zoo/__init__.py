"""A zoo of text-encoder parts in JAX: every position encoding with every attention that mathematics permits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.compatibility import compatible

__all__ = ["compatible"]


def __getattr__(name: str) -> Any:
    # Lazily, so that the commands can answer --help and a wrong flag without the seconds that importing jax takes.
    if name == "compatible":
        return importlib.import_module("zoo.compatibility").compatible
    if name in {"data", "encodings", "layers", "mixers", "models", "tasks", "training"}:
        return importlib.import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
