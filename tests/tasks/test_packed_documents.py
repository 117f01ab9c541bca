"""Rows of documents whose positions have gaps: the tasks that take them, and the model that is told."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small_runs import config, write_texts
from tests.tasks.standins import LetterTokenizer, ListSource, stack
from zoo.config import load_config
from zoo.data.pipeline import Pipeline
from zoo.errors import UserError
from zoo.models import build
from zoo.run import assemble
from zoo.tasks import registry

TEXT = ListSource(**dict.fromkeys(("train", "dev"), [{"text": "ab cd efgh ij kl mnop qr st uv wx yz " * 4}] * 6))
SEGMENTED = {"name": "segmented", "longest": 40, "pieces": 3}
VOCABULARY = LetterTokenizer.vocabulary


def task_of(name="masked_lm", **fields):
    return registry.build({"name": name, "max_length": 12, "positions": SEGMENTED, **fields})


def model(encoding="alibi", **parts):
    tree = load_config("configs/demo.py:pretrain", []).to_dict()
    tree["model"].update(vocab_size=40, model_dim=16, num_layers=1, max_length=40, dropout=0.0, attention_dropout=0.0)
    return build(tree | {"encoding": {"name": encoding}} | parts)


@pytest.mark.parametrize("across", [True, False])
def test_training_rows_have_gaps_and_evaluation_rows_none(tmp_path, across):
    task = task_of(attend_across=across)
    examples = {split: task.examples(TEXT, split, LetterTokenizer(), tmp_path) for split in ("train", "dev")}
    assert examples["train"][0]["input_ids"].shape == (40,) and examples["dev"][0]["input_ids"].shape == (12,)

    def features(split, epoch=0, seed=0):
        return task.features(examples[split].at_epoch(epoch)[0], np.random.default_rng(seed), VOCABULARY)

    plain = features("dev")
    assert (np.diff(plain["positions"])[plain["segment_ids"][1:] == plain["segment_ids"][:-1]] == 1).all()
    chosen = features("train")
    chex.assert_trees_all_equal_shapes(chosen, plain)
    chex.assert_trees_all_equal(chosen, features("train"))
    same = chosen["segment_ids"][1:] == chosen["segment_ids"][:-1]
    steps = np.diff(chosen["positions"])[same]
    assert (steps > 0).all() and (steps > 1).any() and chosen["positions"].max() < 40
    assert (features("train", seed=1)["positions"] != chosen["positions"]).any()


def test_the_last_token_of_a_run_predicts_none(tmp_path):
    task = task_of("causal_lm")
    examples = task.examples(TEXT, "train", LetterTokenizer(), tmp_path)
    row = task.features(examples[0], np.random.default_rng(0), VOCABULARY)
    ends = np.append(np.diff(row["positions"]) > 1, True)
    np.testing.assert_array_equal(row["label_weights"], ~ends)
    assert 1 < ends.sum() <= 3


def test_a_model_sees_the_distances_of_the_text(tmp_path):
    """The loss is that of the hidden states at the rows' positions; a kernel that cannot gather tables refuses them."""
    task = task_of(attend_across=True)
    examples = task.examples(TEXT, "train", LetterTokenizer(), tmp_path)
    pipeline = Pipeline(examples, lambda e, rng: task.features(e, rng, VOCABULARY), seed=0, batch_size=2)
    batch = pipeline.batch(0)
    module = task.module(model())
    params = jax.jit(module.init)(jax.random.key(0), batch)
    run = jax.jit(module.apply)
    losses = run(params, batch).losses["masked_lm"]
    assert jnp.isfinite(losses[0])
    further = {**batch, "positions": batch["positions"] + (batch["positions"] > batch["positions"][:, 5:6])}
    assert run(params, further).losses["masked_lm"][0] != losses[0]
    outside = {**batch, "positions": batch["positions"] + 30}
    assert jnp.isnan(run(params, outside).losses["masked_lm"][0]), "a position beyond the model's max_length"
    fused = task.module(model(mixer={"name": "softmax", "implementation": "pallas_gpu"}))
    with pytest.raises(ValueError, match="distances need contiguous positions"):
        jax.eval_shape(fused.apply, params, batch)


@pytest.mark.parametrize(
    ("longest", "message"),
    [
        (32, r"task.positions.longest=32 is longer than model.max_length=16; lower the one or raise the other"),
        (16, r"task.positions.longest=16 leaves nothing to choose for rows of max_length=16"),
    ],
)
def test_lengths_that_do_not_fit_are_found_before_the_data_is_prepared(tmp_path, longest, message):
    made = config(write_texts(tmp_path), task__positions={"name": "segmented", "longest": longest})
    with pytest.raises(UserError, match=message):
        assemble(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mixer_that_cannot_keep_documents_apart_is_refused(tmp_path):
    """Also where a stage alone would pack so."""
    folder, mixer = write_texts(tmp_path), {"name": "fourier", "pads": "tokens"}
    parts = dict(mixer=mixer, encoding={"name": "learned"})
    assert assemble(config(folder, **parts), tmp_path / "run").task.attend_across
    with pytest.raises(UserError, match=r"^task\.attend_across=False packs .* mixer 'fourier' cannot keep them apart"):
        assemble(config(folder, **parts, task__attend_across=False), tmp_path / "run")
    stages = ({"steps": 3}, {"steps": 3, "task": {"attend_across": False}})
    with pytest.raises(UserError, match=r"^train\.stages\[1\]\.task\.attend_across=False packs"):
        assemble(config(folder, **parts, train__stages=stages, train__steps=None), tmp_path / "run")


def test_rows_through_one_batch_are_stacked():
    """Features of plain and of segmented rows have one shape."""
    task, index = task_of(), np.arange(40)
    row = {"input_ids": index + 5, "segment_ids": index * 0 + 1, "positions": index, "word_starts": index > -1}
    made = [
        task.features(jax.tree.map(lambda a, n=n: a[:n], row), np.random.default_rng(0), VOCABULARY) for n in (12, 40)
    ]
    assert stack(made)["positions"].shape == (2, 12)
