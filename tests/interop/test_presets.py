"""Every published model is written as a checkpoint of its family, whatever other families make of its settings."""

from __future__ import annotations

import pytest

from zoo.config import completed, plain
from zoo.interop.export import written_as
from zoo.models import preset, presets

# Presets whose family is not the first part of their name.
FAMILY = {"deberta-v2": "deberta-v2", "deberta-v3": "deberta-v2", "nomic-bert": "nomic_bert"}


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_written_as_its_family(name):
    parts = name.split("-")
    family, _ = written_as(plain(completed(preset(name))), (), None)
    assert family.model_type == FAMILY.get("-".join(parts[:2]), parts[0])
