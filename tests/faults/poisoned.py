"""A tiny run in which one row of the data makes the loss NaN: the one that holds `corpus.POISON`."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from tests.faults import tiny
from tests.faults.corpus import is_poisoned
from zoo.tasks import registry
from zoo.tasks.masked_lm import MaskedLM


@registry.register("poisoned_lm")
@dataclasses.dataclass(frozen=True)
class PoisonedLM(MaskedLM):
    @property
    def coefficients(self):
        return {"masked_lm": 1.0}

    def features(self, example, rng, vocabulary):
        features = super().features(example, rng, vocabulary)
        poison = np.float32(np.nan if is_poisoned(example["input_ids"]) else 1.0)
        return features | {"masked_weights": features["masked_weights"] * poison}


def get_config(argument: str = "") -> ConfigDict:
    config = tiny.get_config(argument)
    config.task.name = "poisoned_lm"
    return config
