"""The training step of published models compiled for a TPU: attention is the fused kernels, and no array has all queries by all keys."""

from __future__ import annotations

import pytest

from benchmarks.tpu_programs import KERNELS, program
from tests.aot.tpus import GENERATIONS, topology

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize("model", ["bert-base", "nezha-base", "deberta-v3-base"])
def test_attention_of_a_training_step_is_fused(model, generation):
    topology(GENERATIONS[generation])  # skips where there is no compiler
    found = program(model, generation, 512, None, tokens=1024, layers=1)
    assert found["kernels"] == sorted(KERNELS) and not found["scores"], found
