"""A zoo of text-encoder parts in JAX: every position encoding with every attention that mathematics permits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.compatibility import compatible
    from zoo.interop.export import export
    from zoo.interop.load import load_pretrained

__all__ = ["compatible", "export", "load_pretrained"]

# Public name → the module it comes from.
_HOMES = {"compatible": "zoo.compatibility", "export": "zoo.interop.export", "load_pretrained": "zoo.interop.load"}


def __getattr__(name: str) -> Any:
    # Lazily, so that the commands can answer --help and a wrong flag without the seconds that importing jax takes.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in {"data", "encodings", "interop", "layers", "mixers", "models", "tasks", "training"}:
        return importlib.import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
