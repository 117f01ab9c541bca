"""Training steps compiled for TPUs: attention is the fused kernels, and no array has all queries by all keys."""

from __future__ import annotations

import pytest

from benchmarks.tpu_programs import KERNELS, program
from benchmarks.training import Training, random_batch
from configs.base import base
from tests.aot.tpus import GENERATIONS, topology
from zoo.config import plain
from zoo.tasks.masked_lm import MaskedLM
from zoo.training.sharding import make_mesh

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize("model", ["bert-base", "nezha-base", "deberta-v3-base"])
def test_attention_of_a_training_step_is_fused(model, generation):
    topology(GENERATIONS[generation])  # skips where there is no compiler
    found = program(model, generation, 512, None, tokens=1024, layers=1)
    assert found["kernels"] == sorted(KERNELS) and not found["scores"], found


def test_on_eight_chips_each_has_its_rows_and_heads():
    """Of 16 rows a fourth, over the axes data and fsdp; of two heads one, over tensor."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=topology("v5e:2x4"))
    tree, task = plain(base("bert-tiny", dtype="bfloat16", pooler=False)), MaskedLM(max_length=512, max_predictions=80)
    tree["model"]["vocab_size"] = 1000
    text = Training.of(tree, task, "lamb", mesh).compiled_for_tpu(random_batch(task, 1000, 16, 2)).as_text()
    calls = [line for line in text.splitlines() if "attention_forward" in line and "custom-call(" in line]
    assert calls and all("bf16[4,512,128]" in line and "f32[4,1,2,512]" in line for line in calls)
    assert "512,512]" not in text
