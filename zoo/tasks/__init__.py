"""What a model is trained to do: pretraining objectives and downstream tasks alike, each a part under one name."""

from zoo.tasks import causal_lm, classification, masked_lm, masked_lm_with_sentences, recall, regression, token_tagging
from zoo.tasks.registration import registry
from zoo.tasks.task import Output, Task

names = registry.names

__all__ = [
    "Output",
    "Task",
    "causal_lm",
    "classification",
    "masked_lm",
    "masked_lm_with_sentences",
    "names",
    "recall",
    "registry",
    "regression",
    "token_tagging",
]
