"""Every published model is written as a checkpoint of its family, whatever other families make of its settings."""

from __future__ import annotations

import pytest

from zoo.config import completed, plain
from zoo.interop.export import written_as
from zoo.models import preset, presets

# Presets whose family is not the first part of their name.
FAMILY = {"deberta-v2": "deberta-v2", "deberta-v3": "deberta-v2", "nomic-bert": "nomic_bert"}
# Without a head these are the models of a family that is asked first; of its own family where that is named.
THE_SAME = {
    "xlm-roberta-base": ("roberta", "xlm-roberta"),
    "electra-base": ("bert", "electra"),
    "electra-large": ("bert", "electra"),
}


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_written_as_its_family(name):
    parts, tree = name.split("-"), plain(completed(preset(name)))
    family, _ = written_as(tree, (), None)
    if name in THE_SAME:
        first, own = THE_SAME[name]
        assert family.model_type == first and written_as(tree, (), own)[0].model_type == own
        return
    assert family.model_type == FAMILY.get("-".join(parts[:2]), parts[0])
