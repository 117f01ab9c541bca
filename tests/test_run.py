"""A run folder: what is filled in, what it gives back, what another run may take from it, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tests.faults import tiny
from tests.faults.corpus import write_corpus
from zoo.config import load_config, load_saved
from zoo.data.pipeline import evaluation_batches
from zoo.errors import UserError
from zoo.run import (
    CHECKPOINTS,
    CONFIG,
    TOKENIZER,
    Parts,
    assemble,
    check_same_data,
    check_workdir,
    load_parameters,
    reassemble,
    save_run,
)
from zoo.training.checkpoints import Checkpoints
from zoo.training.step import TrainState

WITH_POOLER = ("model.pooler", "true"), ("task.pooling", "cls")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("run") / "corpus", documents=40)


def config(corpus: Path, task: str, *overrides: tuple[str, Any]) -> ConfigDict:
    return load_config(f"{tiny.__file__}:{task},folder={corpus}", [(name, str(value)) for name, value in overrides])


def random_parameters(parts: Parts, workdir: Path, seed: int) -> dict[str, Any]:
    """Parameters of the right shapes, drawn without compiling anything."""
    batch = next(evaluation_batches(parts.examples("train", workdir), parts.features, batch_size=1))
    shapes = jax.eval_shape(parts.module.init, jax.random.key(0), batch)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def write_run(made: ConfigDict, workdir: Path) -> dict[str, Any]:
    """A run folder with a checkpoint of step 3, as training leaves it; returns the parameters in it."""
    parts = assemble(made, workdir)
    params = random_parameters(parts, workdir, seed=1)
    save_run(parts, workdir)
    checkpoints = Checkpoints(workdir / CHECKPOINTS)
    state = TrainState(np.int32(3), params, opt_state=(), extra={})
    checkpoints.save(3, state, parts.fingerprints())
    checkpoints.close()
    return params


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    return workdir, write_run(config(corpus, "masked_lm"), workdir)


# --- what a run is


def test_what_the_data_decides_is_filled_in(corpus, tmp_path):
    made = config(corpus, "classification", ("task.labels", "()"))
    parts = assemble(made, tmp_path)
    size = parts.tokenizer.vocabulary.size
    assert 20 < size <= 100 and parts.config.model.vocab_size == size == parts.model.vocab_size
    assert parts.config.task.labels == ("even", "odd") == parts.task.labels
    assert made.model.vocab_size is None and made.task.labels == (), "what was given stays what it was"
    assert parts.config.is_locked


def test_a_larger_vocabulary_than_the_tokenizers_is_allowed(corpus, tmp_path):
    """Padded, so that it divides over a mesh."""
    assert assemble(config(corpus, "masked_lm", ("model.vocab_size", 128)), tmp_path).model.vocab_size == 128
    with pytest.raises(UserError, match=r"model.vocab_size is 20, the tokenizer has \d+ pieces; leave vocab_size None"):
        assemble(config(corpus, "masked_lm", ("model.vocab_size", 20)), tmp_path)


def test_the_folder_alone_gives_the_run_back(tmp_path):
    """Also where the vocabulary it was made with is gone, and words that would now be learnt are others."""
    corpus = write_corpus(tmp_path / "corpus", documents=40)
    learnt = assemble(config(corpus, "masked_lm"), tmp_path / "first").tokenizer
    learnt.save(tmp_path / "given")
    made = config(corpus, "token_tagging", ("tokenizer.path", tmp_path / "given"), ("task.labels", "()"))
    parts = assemble(made, tmp_path / "run")
    write_run(made, tmp_path / "run")
    shutil.rmtree(tmp_path / "given")
    again = reassemble(tmp_path / "run")
    assert again.config.to_dict() == parts.config.to_dict() == load_saved(tmp_path / "run" / CONFIG).to_dict()
    assert again.fingerprints() == parts.fingerprints()
    assert (again.model, again.task, again.source) == (parts.model, parts.task, parts.source)
    assert again.task.labels == ("B-BIG", "O")
    assert again.tokenizer.encode("one red bird").ids.tolist() == learnt.encode("one red bird").ids.tolist()


def test_what_is_no_run_gives_none_back(corpus, tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.json"):
        reassemble(tmp_path)
    save_run(assemble(config(corpus, "masked_lm"), tmp_path / "run"), tmp_path / "run")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        reassemble(tmp_path / "run")


def test_a_tokenizer_is_learnt_once(corpus, tmp_path, monkeypatch):
    first = assemble(config(corpus, "masked_lm"), tmp_path).tokenizer.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr("zoo.data.tokenizers.train_wordpiece", lambda *a, **k: pytest.fail("learnt again"))
        assert assemble(config(corpus, "masked_lm"), tmp_path).tokenizer.fingerprint == first
    smaller = assemble(config(corpus, "masked_lm", ("tokenizer.size", 60)), tmp_path).tokenizer
    assert smaller.vocabulary.size == 60, "a start that was broken off binds nobody"


# --- the same folder again


def test_the_same_config_goes_on(corpus, pretrained, caplog):
    """What the data decided is in the folder and open in the config; that is no difference."""
    caplog.set_level(logging.INFO, "zoo.run")
    check_workdir(config(corpus, "masked_lm"), pretrained[0])
    assert not caplog.messages
    check_workdir(config(corpus, "masked_lm", ("train.keep", 7), ("mesh.tensor", 2)), pretrained[0])
    assert caplog.messages == [
        "resuming with mesh.tensor: 2 now, 1 in the folder",
        "resuming with train.keep: 7 now, 3 in the folder",
    ]


def test_a_folder_from_before_a_field_was_there_goes_on(corpus, pretrained, tmp_path):
    """A new field's default is what was done before; another value is another run."""
    saved = json.loads((pretrained[0] / CONFIG).read_text())
    del saved["config"]["train"]["stages"], saved["config"]["task"]["split_documents"]
    (tmp_path / CONFIG).write_text(json.dumps(saved))
    check_workdir(config(corpus, "masked_lm"), tmp_path)
    with pytest.raises(UserError, match=r"task.split_documents: False now, True in the folder"):
        check_workdir(config(corpus, "masked_lm", ("task.split_documents", "false")), tmp_path)


def test_another_config_is_refused_with_every_difference(corpus, pretrained):
    other = [("seed", 5), ("optimizer.learning_rate", 0.5), ("encoding", "rope"), ("model.vocab_size", 90)]
    with pytest.raises(UserError) as refused:
        check_workdir(config(corpus, "masked_lm", *other, ("train.keep", 7)), pretrained[0])
    first, *lines = str(refused.value).splitlines()
    assert f"{pretrained[0]} holds the run of another config" in first
    size = load_saved(pretrained[0] / CONFIG).model.vocab_size
    assert {
        "encoding.name: 'rope' now, 'nezha' in the folder",
        "encoding.limit: absent now, 64 in the folder",
        f"model.vocab_size: 90 now, {size} in the folder",
        "optimizer.learning_rate: 0.5 now, 0.001 in the folder",
        "seed: 5 now, 0 in the folder",
    } <= {line.strip() for line in lines}
    assert not any("train." in line for line in lines), "what may change is not in the way"


def test_labels_given_otherwise_are_another_config(corpus, tmp_path):
    write_run(config(corpus, "classification", ("task.labels", "()")), tmp_path)
    check_workdir(config(corpus, "classification", ("task.labels", "()")), tmp_path)
    check_workdir(config(corpus, "classification", ("task.labels", "('even','odd')")), tmp_path)
    with pytest.raises(UserError, match=r"task.labels: \('odd', 'even'\) now, \('even', 'odd'\) in the folder"):
        check_workdir(config(corpus, "classification", ("task.labels", "('odd','even')")), tmp_path)


@pytest.mark.parametrize(
    ("file", "said"), [("dev.txt", "the content of .*train.txt, .*dev.txt"), (None, "the tokenizer in .*tokenizer")]
)
def test_other_data_are_refused(tmp_path, file, said):
    corpus, workdir = write_corpus(tmp_path / "corpus", documents=40), tmp_path / "run"
    write_run(config(corpus, "masked_lm"), workdir)
    check_same_data(reassemble(workdir), workdir)
    with (corpus / file if file else workdir / TOKENIZER / "vocab.txt").open("a") as changed:
        changed.write("more\n")
    with pytest.raises(UserError, match=f"{said} changed since the checkpoints"):
        check_same_data(assemble(config(corpus, "masked_lm", ("model.vocab_size", 101)), workdir), workdir)


# --- initialising from another run


def test_the_tokenizer_comes_from_the_run_that_is_started_from(corpus, pretrained, tmp_path):
    before = reassemble(pretrained[0])
    smaller = ("tokenizer.size", 60)
    assert assemble(config(corpus, "token_tagging", smaller), tmp_path / "own").model.vocab_size == 60
    made = config(corpus, "token_tagging", smaller, ("init_from", pretrained[0]))
    parts = assemble(made, tmp_path / "run")
    assert parts.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert parts.model.vocab_size == before.model.vocab_size > 60
    write_run(made, tmp_path / "run")
    assert reassemble(tmp_path / "run").tokenizer.fingerprint == before.tokenizer.fingerprint


def test_a_named_vocabulary_must_be_that_of_the_run_that_is_started_from(corpus, pretrained, tmp_path):
    """Same size, other order: every shape fits, and every embedding would be that of another piece."""
    *pieces, one, two = (pretrained[0] / TOKENIZER / "vocab.txt").read_text().splitlines()
    same, other = tmp_path / "same.txt", tmp_path / "other.txt"
    same.write_text("\n".join([*pieces, one, two]) + "\n")
    other.write_text("\n".join([*pieces, two, one]) + "\n")

    def tried(path: Path, chinese_words: bool) -> Parts:
        named = ("tokenizer.path", path), ("tokenizer.chinese_words", chinese_words)
        return assemble(config(corpus, "token_tagging", ("init_from", pretrained[0]), *named), tmp_path / "run")

    # Chinese words change what whole-word masking hides, not what an id means.
    assert tried(same, True).tokenizer.vocabulary.size == tried(same, False).tokenizer.vocabulary.size
    with pytest.raises(UserError, match=r"other.txt' gives other ids than .*, which its model was trained with; leave"):
        tried(other, False)


def test_the_encoder_is_taken_and_heads_and_pooler_start_anew(corpus, pretrained, tmp_path, caplog):
    caplog.set_level(logging.INFO, "zoo.run")
    made = config(corpus, "classification", ("init_from", pretrained[0]), *WITH_POOLER)
    fresh = random_parameters(assemble(made, tmp_path), tmp_path, seed=2)
    taken = load_parameters(str(pretrained[0]), fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(taken, fresh)
    pooler = fresh["model"]["pooler"]
    chex.assert_trees_all_equal(taken["model"], {**pretrained[1]["model"], "pooler": pooler})
    chex.assert_trees_all_equal(taken["heads"], fresh["heads"])
    (said,) = [message for message in caplog.messages if message.startswith("initialised from")]
    anew = said.split("starting anew: ")[1].split(", ")
    assert anew == [
        "heads/classification/output/bias",
        "heads/classification/output/kernel",
        "model/pooler/bias",
        "model/pooler/kernel",
    ]


def test_the_same_task_takes_its_head_too(corpus, pretrained, tmp_path, caplog):
    """As pretraining on other text does."""
    caplog.set_level(logging.INFO, "zoo.run")
    made = config(corpus, "masked_lm", ("init_from", pretrained[0]))
    taken = load_parameters(str(pretrained[0]), random_parameters(assemble(made, tmp_path), tmp_path, seed=2))
    chex.assert_trees_all_equal(taken, pretrained[1])
    assert caplog.messages[-1].endswith("starting anew: nothing")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [("model.model_dim", 32)],
            [
                "model/embeddings/norm/bias is (16,) in the run, (32,) in the model",
                "model/stage_0/block_0/mixer/query/kernel is (2, 16, 16) in the run, (2, 32, 32) in the model",
            ],
        ),
        (
            [("model.num_layers", 3)],
            ["model/stage_0/block_0/feed_forward/up/kernel is (2, 16, 32) in the run, (3, 16, 32)"],
        ),
        ([("encoding", "learned")], ["model/encodings/0/embedding/table is not in the run"]),
        ([("model.use_bias", "false")], ["model/stage_0/block_0/mixer/query/bias is not in the model"]),
        ([("model.vocab_size", 128)], ["model/embeddings/token/embedding is ("]),
    ],
)
def test_another_model_is_refused_and_every_name_listed(corpus, pretrained, tmp_path, overrides, said):
    made = config(corpus, "token_tagging", ("init_from", pretrained[0]), *overrides)
    fresh = random_parameters(assemble(made, tmp_path), tmp_path, seed=2)
    with pytest.raises(UserError, match="holds another model than the config describes") as refused:
        load_parameters(str(pretrained[0]), fresh)
    for part in said:
        assert part in str(refused.value)
    before, wanted = (flatten_dict(tree["model"], sep="/") for tree in (pretrained[1], fresh))
    differ = {n for n in before.keys() | wanted.keys() if np.shape(before.get(n)) != np.shape(wanted.get(n))}
    assert len(str(refused.value).splitlines()) == 1 + len(differ)


def test_a_run_that_has_begun_needs_what_it_began_from_no_longer(corpus, pretrained, tmp_path):
    shutil.copytree(pretrained[0], tmp_path / "before")
    made = config(corpus, "token_tagging", ("init_from", tmp_path / "before"))
    write_run(made, tmp_path / "run")
    shutil.rmtree(tmp_path / "before")
    assert reassemble(tmp_path / "run").config.init_from == str(tmp_path / "before")
    with pytest.raises(UserError, match=r"is neither a run folder nor .* it has no config\.json"):
        assemble(made, tmp_path / "another")
