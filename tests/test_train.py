"""train.py as a whole, in one process: devices, micro-batches, dtypes, depth, and that it learns."""

from __future__ import annotations

import contextlib
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import eval as scoring
import train
from configs.base import base
from zoo.config import plain
from zoo.data.pipeline import evaluation_batches
from zoo.errors import UserError
from zoo.run import assemble
from zoo.training.records import read_records
from zoo.training.sharding import make_mesh, put_batch

NOUNS, VERBS = ("cat", "dog", "bird", "fish"), ("sees", "hears", "likes", "finds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sentences with an order to them, as text, a table labelled by the first noun, and tagged words."""
    folder = tmp_path_factory.mktemp("sentences")
    rng = np.random.default_rng(0)
    rows = [(rng.choice(NOUNS), rng.choice(VERBS), rng.choice(NOUNS)) for _ in range(64)]
    (folder / "text.txt").write_text("".join(" ".join(row) + "\n" for row in rows))
    (folder / "table.tsv").write_text(
        "".join(f"{' '.join(row)}\t{'pet' if row[0] in NOUNS[:2] else 'wild'}\n" for row in rows[:16])
    )
    (folder / "tags.conll").write_text(
        "\n".join("".join(f"{w} {'B-PET' if w in NOUNS[:2] else 'O'}\n" for w in row) for row in rows[:16])
    )
    return folder


def config(folder: Path, task: str = "masked_lm", **changes) -> ConfigDict:
    """A NEZHA of two layers, as nested values that `changes` (by dotted name, `__` for the dot) are set in."""
    made = base("nezha-base", vocab_size=None, model_dim=16, num_heads=4, num_layers=2, max_length=16)
    made.model.update(dropout=0.1, attention_dropout=0.1, pooler=False)
    made.encoding = dict(name="nezha", limit=4)
    made.feed_forward = dict(name="gelu", width=32)
    made.tokenizer = dict(name="wordpiece", size=60)
    made.train.update(steps=6, batch_size=8, log_every=1, checkpoint_every=0, tensorboard=False)
    files = {
        "masked_lm": ("text", "text.txt"),
        "classification": ("tsv", "table.tsv"),
        "token_tagging": ("conll", "tags.conll"),
    }
    source, file = files[task]
    made.data = dict(name=source, train=(f"{folder}/{file}",), dev=(f"{folder}/{file}",))
    if task == "masked_lm":
        made.task = dict(name=task, max_length=16, rate=0.3, attend_across=True, specials="none")
    elif task == "classification":
        made.task = dict(name=task, max_length=16, pooling="mean")
        made.data.update(text=0, label=1)
    else:
        made.task = dict(name=task, max_length=16, labels=("O", "B-PET"))
    tree = plain(made)
    for name, value in changes.items():
        *path, last = name.split("__")
        node = tree
        for key in path:
            node = node[key]
        node[last] = value
    return ConfigDict(tree)


@contextlib.contextmanager
def devices(monkeypatch, count: int):
    monkeypatch.setattr(train, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:count]))
    yield


def run_steps(made: ConfigDict, workdir: Path, steps: int):
    """The losses of the first steps and the parameters after them."""
    trainer = train.build_trainer(assemble(made, workdir), workdir)
    state, losses = train.initial(trainer), []
    for step in range(steps):
        state, metrics = trainer.train_step(state, put_batch(trainer.pipeline.batch(step), trainer.mesh))
        losses.append(metrics["loss"])
    return np.asarray(jax.device_get(losses)), jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, devices(patch, 1):
        # Padded, so that it divides over every mesh below.
        return run_steps(config(folder, model__vocab_size=64), tmp_path_factory.mktemp("one"), 5)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 8, "data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_draw_the_curve_of_one(mesh, folder, tmp_path, one_device, monkeypatch):
    """Dropout and masks included: neither depends on the number of devices."""
    with devices(monkeypatch, 8):
        made = config(folder, mesh={"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1, **mesh}, model__vocab_size=64)
        many, _ = run_steps(made, tmp_path, 5)
    np.testing.assert_allclose(many, one_device[0], rtol=2e-5)


def test_micro_batches_equal_the_big_batch(folder, tmp_path, monkeypatch):
    still = {"model__dropout": 0.0, "model__attention_dropout": 0.0, "schedule__warmup": 0}
    with devices(monkeypatch, 1):
        whole, whole_params = run_steps(config(folder, **still), tmp_path, 2)
        parts, parts_params = run_steps(config(folder, train__accumulation=4, **still), tmp_path, 2)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    chex.assert_trees_all_close(parts_params, whole_params, atol=2e-6)


def test_bfloat16_follows_float32_and_keeps_float32_parameters(folder, tmp_path, one_device, monkeypatch):
    with devices(monkeypatch, 1):
        low, params = run_steps(config(folder, model__dtype="bfloat16", model__vocab_size=64), tmp_path, 5)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    # Losses of about 4 in a format of 8 significant bits.
    np.testing.assert_allclose(low, one_device[0], rtol=2**-7)


def test_recomputing_changes_no_step(folder, tmp_path, one_device, monkeypatch):
    with devices(monkeypatch, 1):
        again, _ = run_steps(config(folder, model__remat="dots", model__vocab_size=64), tmp_path, 5)
    np.testing.assert_allclose(again, one_device[0], rtol=1e-5)


def test_lamb_adapts_every_layer_and_tensor_also_under_scan(folder, tmp_path, monkeypatch):
    """Two steps of the scanned model equal two of the same model written out layer by layer."""
    still = {"model__dropout": 0.0, "model__attention_dropout": 0.0, "schedule__warmup": 0}
    with devices(monkeypatch, 1):
        scanned = config(folder, **still)
        unrolled = config(folder, model__stages=({"pattern": ({},)}, {"pattern": ({},)}), **still)
        stepped = []
        shared = None
        for made in (scanned, unrolled):
            trainer = train.build_trainer(assemble(made, tmp_path), tmp_path)
            state = train.initial(trainer)
            if shared is None:
                shared = state.params["model"]["stage_0"]
                rest = jax.device_get(state.params)
            else:
                split = {
                    f"stage_{k}": jax.tree.map(lambda a, k=k: jnp.array(a[k : k + 1]), rest["model"]["stage_0"])
                    for k in range(2)
                }
                same = {k: v for k, v in rest["model"].items() if k != "stage_0"}
                state = state.replace(params=jax.tree.map(jnp.array, {**rest, "model": {**same, **split}}))
            for step in range(2):
                state, _ = trainer.train_step(state, put_batch(trainer.pipeline.batch(step), trainer.mesh))
            stepped.append(jax.device_get(state.params)["model"])
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), stepped[1]["stage_0"], stepped[1]["stage_1"])
    chex.assert_trees_all_close(stepped[0]["stage_0"], joined, atol=2e-6)


@pytest.mark.parametrize("task", ["masked_lm", "classification", "token_tagging"])
def test_it_learns_and_eval_agrees_with_the_trainer(task, folder, tmp_path, capsys):
    """A run of every task to its end; the scores recorded are those that eval.py finds in the folder."""
    rate = {
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "model__dropout": 0.0,
        "model__attention_dropout": 0.0,
    }
    made = config(folder, task, train__steps=150, train__log_every=50, **rate)
    scores = train.train(made, tmp_path / "run")
    if task == "masked_lm":
        losses = [r["loss"] for r in read_records(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
        assert scores["perplexity"] < 8 and losses[-1] < losses[0]
    else:
        assert scores["accuracy" if task == "classification" else "f1"] > 0.95
    found = scoring.score(tmp_path / "run", "dev")
    assert found == pytest.approx(scores, rel=1e-5)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"no split 'tset'.*dev"):
        scoring.score(tmp_path / "run", "tset")


def test_a_partly_filled_last_batch_changes_no_score(folder, tmp_path):
    made = config(folder, "token_tagging", train__evaluation_batch_size=16)
    parts = assemble(made, tmp_path)
    examples = parts.examples("dev", tmp_path)[:11]
    one = jax.tree.map(jnp.asarray, next(evaluation_batches(examples, parts.features, batch_size=1)))
    params = parts.module.init(jax.random.key(0), one)["params"]
    scores = []
    for size in (11 * 8, 8):
        evaluation = train.build_evaluation(parts, params)._replace(batch_size=size)
        scores.append(train.evaluate(evaluation, params, examples))
    assert scores[0] == scores[1]


def test_epochs_are_counted_in_steps(folder, tmp_path):
    made = config(folder, "classification", train__steps=None, train__epochs=2.5)
    assert train.build_trainer(assemble(made, tmp_path), tmp_path).total_steps == 5  # 16 examples, batches of 8


def test_a_resumed_run_sees_the_batches_it_would_have_seen(folder, tmp_path):
    pipeline = train.build_trainer(assemble(config(folder), tmp_path), tmp_path).pipeline
    unbroken = [batch for (_, batch), _ in zip(pipeline.iterate(0), range(5), strict=False)]
    resumed = [batch for (_, batch), _ in zip(pipeline.iterate(3), range(2), strict=False)]
    for one, two in zip(unbroken[3:], resumed, strict=True):
        chex.assert_trees_all_equal(one, two)


def test_fine_tuning_refuses_other_ids_than_those_it_starts_from(folder, tmp_path):
    pretrained = tmp_path / "pretrained"
    train.train(config(folder, train__steps=2, schedule__warmup=0), pretrained)
    pieces = (pretrained / "tokenizer" / "vocab.txt").read_text().split("\n")
    pieces[-2], pieces[-3] = pieces[-3], pieces[-2]
    (tmp_path / "other.txt").write_text("\n".join(pieces))
    made = config(folder, "classification", init_from=str(pretrained), tokenizer__path=str(tmp_path / "other.txt"))
    with pytest.raises(UserError, match="gives other ids than"):
        assemble(made, tmp_path / "tuned")
    made = config(folder, "classification", init_from=str(pretrained), tokenizer__path=None)
    assert assemble(made, tmp_path / "tuned").tokenizer.fingerprint
