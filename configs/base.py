"""What every config starts from. Not a result of its own: compose it, never copy it."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from zoo.models import preset


def base(model: str, **model_values: Any) -> ConfigDict:
    """The preset `model` with `model_values` set, and the neutral settings of a run."""
    config = ConfigDict(preset(model))
    config.model.update(model_values)
    config.update(
        dict(
            seed=0,
            task=dict(name="masked_lm"),
            data=dict(name="builtin"),
            tokenizer=dict(name="wordpiece"),
            optimizer=dict(name="lamb"),
            schedule=dict(name="linear", warmup=0.1),
            train=dict(steps=placeholder(int), epochs=placeholder(float)),
            mesh=dict(data=-1),
            processes=dict(count=1),
            init_from=placeholder(str),
        )
    )
    return config
