"""Data sets that TFDS has no builder for, one a file, made from files that you have.

A builder is found by the name under which the source "tfds" and `python -m zoo prepare` know it; its module, and TFDS
with it, is imported only then.
"""

from __future__ import annotations

import importlib

BUILDERS: dict[str, tuple[str, str]] = {
    "peoples_daily_ner": ("zoo.data.builders.peoples_daily_ner", "PeoplesDailyNer"),
    "lcqmc": ("zoo.data.builders.lcqmc", "Lcqmc"),
    "chnsenticorp": ("zoo.data.builders.chnsenticorp", "ChnSentiCorp"),
}


def builder_class(name: str) -> type:
    """The TFDS builder of one of `BUILDERS`."""
    module, attribute = BUILDERS[name]
    return getattr(importlib.import_module(module), attribute)


__all__ = ["BUILDERS", "builder_class"]
