"""`config.init_from` with a checkpoint: its model, its tokenizer, its parameters; and the run goes on when it is gone."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from tests.interop import small_checkpoints
from zoo.config import load_config
from zoo.data.pipeline import evaluation_batches
from zoo.errors import UserError
from zoo.run import CHECKPOINTS, assemble, load_parameters, reassemble
from zoo.training.checkpoints import restore_numpy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path) -> Path:
    small_checkpoints.write(tmp_path / "bert")
    rows = "".join(f"{label}\t{text}\n" for label, text in [("good", "a fine film"), ("bad", "the plot was bad")] * 4)
    (tmp_path / "train.tsv").write_text("label\ttext\n" + rows)
    (tmp_path / "corpus.txt").write_text("a fine film\nthe plot was bad\n\nvery good acting\n")
    return tmp_path


def config(files: Path, *overrides, start: str = "bert"):
    usual = {"init_from": files / start, "data.train": files / "train.tsv", "train.batch_size": 8}
    given = [*((key, value) for key, value in usual.items() if key not in dict(overrides)), *overrides]
    return load_config(f"{ROOT}/configs/finetune.py:classification", [(key, str(value)) for key, value in given])


def test_the_model_is_the_checkpoints_and_training_stays_the_configs(files, caplog):
    with caplog.at_level(logging.INFO):
        parts = assemble(config(files, ("model.dropout", 0.3), ("model.remat", "full")), files / "run")
    assert (parts.config.model.num_layers, parts.config.model.model_dim, parts.config.feed_forward.width) == (2, 16, 24)
    assert (parts.config.model.dropout, parts.config.model.remat, parts.config.model.pooler) == (0.3, "full", True)
    assert parts.tokenizer.vocabulary.size == parts.model.vocab_size == len(small_checkpoints.VOCABULARY)
    assert "model.num_layers: 12 in the config, 2 in the checkpoint, which counts" in caplog.text


def test_a_run_begins_and_goes_on_without_it(files, caplog):
    small = ("train.epochs", 2), ("task.max_length", 8)
    with caplog.at_level(logging.INFO):
        train.train(config(files, *small), files / "run")
    assert "starting anew: heads/classification/output/bias" in caplog.text and "model/pooler/kernel" in caplog.text
    before = restore_numpy(files / "run" / CHECKPOINTS, part="params").state["params"]
    table = small_checkpoints.weights()["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_allclose(before["model"]["embeddings"]["token"]["embedding"], table, atol=1e-3)
    shutil.rmtree(files / "bert")
    train.train(config(files, *small), files / "run")
    assert reassemble(files / "run").config.model.num_layers == 2
    with pytest.raises(UserError, match="neither a run folder nor a checkpoint's directory"):
        assemble(config(files), files / "other")


def test_pretraining_goes_on_with_the_checkpoints_head(files):
    text = ("task", "masked_lm:max_length=8"), ("data", "text"), ("data.train", files / "corpus.txt")
    small_checkpoints.write(files / "tanh", hidden_act="gelu_new", layer_norm_eps=1e-5)
    parts = assemble(config(files, *text, ("model.pooler", "False"), start="tanh"), files / "run")
    assert (parts.task.activation, parts.task.norm_epsilon) == ("gelu_tanh", 1e-5)
    batch = next(evaluation_batches(parts.examples("train", files / "run"), parts.features, batch_size=1))
    shapes = jax.eval_shape(parts.module.init, jax.random.key(0), batch)["params"]
    fresh = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    taken = load_parameters(str(files / "tanh"), fresh)
    kernel = small_checkpoints.weights()["cls.predictions.transform.dense.weight"]
    np.testing.assert_array_equal(taken["heads"]["masked_lm"]["dense"]["kernel"], kernel.T)


def test_another_vocabulary_is_refused(files):
    (files / "other.txt").write_text("".join(f"{token}\n" for token in reversed(small_checkpoints.VOCABULARY)))
    with pytest.raises(UserError, match="gives other ids than the tokenizer of init_from="):
        assemble(config(files, ("tokenizer.path", files / "other.txt")), files / "run")


def test_without_a_tokenizer_one_must_be_named(files):
    vocabulary = (files / "bert" / "vocab.txt").rename(files / "vocab.txt")
    with pytest.raises(UserError, match=r"has no tokenizer: give tokenizer\.path"):
        assemble(config(files), files / "run")
    assert assemble(config(files, ("tokenizer.path", vocabulary)), files / "run").model.dims.num_layers == 2
