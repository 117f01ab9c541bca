"""Training steps compiled for TPUs and a GPU: attention is the fused kernels, and no array has all queries by all keys."""

from __future__ import annotations

import pytest

from benchmarks.chips import chip
from benchmarks.pretraining_step import DEFAULT, Cell
from benchmarks.programs import FUSED, program
from benchmarks.training import Training, random_batch
from configs.base import base
from tests.aot.chips import or_skipped, topology
from zoo.config import plain
from zoo.tasks.masked_lm import MaskedLM
from zoo.training.sharding import make_mesh

pytestmark = pytest.mark.aot


def compiled(cell, target, layers, *overrides):
    or_skipped(chip, target)
    found, _ = program(cell, target, 1024, [("model.num_layers", str(layers)), *overrides])
    assert "failed" not in found, found
    return found


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize("model", ["bert-base", "nezha-base", "deberta-v3-base"])
def test_attention_of_a_training_step_is_fused(model, generation):
    found = compiled(Cell(model, 512, DEFAULT, "loop"), generation, 1)
    assert found["kernels"] == 3 and not found["scores"], found


@pytest.mark.parametrize("target", ["v5e", "h100"])
@pytest.mark.parametrize(("policy", "kernels"), [("dots", 3), ("dots_no_batch", 3), ("full", 4)])
def test_only_full_remat_attends_again(target, policy, kernels):
    # In a loop of two, whose kernels stand once; what one layer has XLA would merge.
    found = compiled(Cell("bert-base", 512, FUSED, "loop"), target, 2, ("model.remat", policy))
    assert found["kernels"] == kernels, found


def test_on_eight_chips_each_has_its_rows_and_heads():
    """Of 16 rows a fourth, over the axes data and fsdp; of two heads one, over tensor."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=topology("v5e:2x4"))
    tree, task = plain(base("bert-tiny", dtype="bfloat16", pooler=False)), MaskedLM(max_length=512, max_predictions=80)
    tree["model"]["vocab_size"] = 1000
    text = Training.of(tree, task, "lamb", mesh).compiled_for_mesh(random_batch(task, 1000, 16, 2)).as_text()
    calls = [line for line in text.splitlines() if "attention_forward" in line and "custom-call(" in line]
    assert calls and all("bf16[4,512,128]" in line and "f32[4,1,2,512]" in line for line in calls)
    assert "512,512]" not in text
