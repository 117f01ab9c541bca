"""eval.py --lengths on a finished run: each number against a plain recomputation, what is refused, what is drawn."""

from __future__ import annotations

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import eval as scoring
import train as training
from tests.devices import first
from zoo.command_line import MISTAKE, run_main
from zoo.commands import lengths
from zoo.commands.lengths import AtLength
from zoo.config import load_config
from zoo.run import CHECKPOINTS, assemble, reassemble
from zoo.training.checkpoints import restore_numpy
from zoo.training.sharding import make_mesh

TINY = {
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 1,
    "model.unroll": 1,
    "model.stddev": 0.5,
    "feed_forward": "gelu:width=16",
    "train.steps": 1,
    "train.batch_size": 8,
}
TABLE, LENGTH, STRIDE, TOKENS = 512, 16, 6, 1024


def config(spec, **values):
    return load_config(f"configs/{spec}", [(name, str(value)) for name, value in {**TINY, **values}.items()])


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "make_mesh", functools.partial(make_mesh, devices=first(1)))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step on rows of 16 tokens, whose table of positions has 512 rows."""
    folder = tmp_path_factory.mktemp("lengths")
    (folder / "text.txt").write_text(
        "\n".join(f"The {k} owls saw {k * k % 97} mice and the sky is blue ." for k in range(200))
    )
    text = {f"data.{split}": folder / "text.txt" for split in ("train", "dev")}
    sizes = {"model.max_length": TABLE, "task.max_length": LENGTH, "tokenizer.size": 200, "encoding": "learned"}
    training.train(config("compare.py:causal_lm", **text, **sizes), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def report(run):
    """(what was printed, lengths_dev.json) of a command that asks for everything."""
    handlers = logging.root.handlers[:]
    with pytest.MonkeyPatch.context() as patched:
        said = []
        patched.setattr("builtins.print", lambda text, **_: said.append(text))
        flags = (f"--lengths=1024,{LENGTH},{TABLE}", f"--tokens={TOKENS}", f"--sliding={STRIDE}", "--passkey=2")
        assert run_main(scoring.main, [f"--workdir={run}", *flags]) == 0
    logging.root.handlers[:] = handlers
    return "\n".join(said).splitlines(), json.loads((run / "lengths_dev.json").read_text())


@pytest.fixture(scope="module")
def plain(run):
    """(the first tokens of the split, a function from rows [B, T] to −log p of each next token [B, T − 1])."""
    parts = reassemble(run)
    params = restore_numpy(run / CHECKPOINTS, part="params").state["params"]["model"]
    ids = parts.at({"max_length": TOKENS}).examples("dev", run)[0]["input_ids"]

    @jax.jit
    def losses(rows):
        log_p = jax.nn.log_softmax(parts.model.apply({"params": params}, rows).hidden @ parts_table(params).T)
        return -jnp.take_along_axis(log_p[:, :-1], rows[:, 1:, None], axis=2)[..., 0]

    return ids, losses


def parts_table(params):
    return params["embeddings"]["token"]["embedding"]


def test_rows_and_positions_equal_a_plain_recomputation(report, plain):
    _, found = report
    ids, losses = plain
    expected = np.asarray(losses(jnp.asarray(ids.reshape(-1, LENGTH))), np.float64)
    entry = found["lengths"][str(LENGTH)]
    assert (entry["rows"], found["trained_at"], found["tokens"], found["step"]) == (64, LENGTH, TOKENS, 1)
    assert entry["scores"]["loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert entry["scores"]["perplexity"] == pytest.approx(np.exp(expected.mean()), rel=1e-5)
    buckets = [(b["from"], b["to"], b["tokens"]) for b in entry["by_position"]]
    assert buckets == [(1, 1, 64), (2, 2, 64), (3, 3, 64), (4, 5, 128), (6, 7, 128), (8, 11, 256), (12, 15, 256)]
    for bucket in entry["by_position"]:
        columns = expected[:, bucket["from"] - 1 : bucket["to"]]
        assert bucket["loss"] == pytest.approx(columns.mean(), rel=1e-5)


def test_sliding_equals_a_plain_recomputation(report, plain):
    """Token by token: its window is the first that begins on the stride and holds it, so that it comes among the last."""
    _, found = report
    ids, losses = plain
    starts = [0 if at < LENGTH else STRIDE * -(-(at + 1 - LENGTH) // STRIDE) for at in range(1, TOKENS)]
    padded = np.append(ids, np.zeros(LENGTH, ids.dtype))
    windows = jnp.asarray([padded[s : s + LENGTH] for s in sorted(set(starts))])
    of_window = dict(zip(sorted(set(starts)), np.asarray(losses(windows), np.float64), strict=True))
    expected = [of_window[start][at - 1 - start] for at, start in enumerate(starts, start=1)]
    assert all(at - start >= LENGTH - STRIDE for at, start in enumerate(starts, start=1) if start)
    sliding = found["lengths"][str(LENGTH)]["sliding"]
    assert sliding["stride"] == STRIDE
    assert sliding["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert sliding["loss"] != pytest.approx(found["lengths"][str(LENGTH)]["scores"]["loss"], rel=1e-4)


def test_what_the_encoding_refuses_is_said_and_left_out_of_the_picture(report, run):
    said, found = report
    refusal = found["lengths"]["1024"]["refused"]
    assert "encoding 'learned' has max_length=512 positions, the sequence has 1024" in refusal
    assert f"dev length 1024 refused: {refusal}" in said
    passkey = found["passkey"]["lengths"]
    assert "without any filler" in passkey[str(LENGTH)] and "has max_length=512" in passkey["1024"]
    assert len(passkey[str(TABLE)]) == len(found["passkey"]["depths"]) == 11 and set(passkey[str(TABLE)]) <= {0, 0.5, 1}
    assert [line.split()[:3] for line in said] == [
        *(["dev", "length", n] for n in ("16", "512", "1024")),
        *(["dev", "passkey", "length"] for _ in range(3)),
    ]
    assert "sliding perplexity" in said[0] and "resolution" in said[0]
    picture = imread(run / "lengths_dev.png")
    panels = np.array_split(picture, 4, axis=1)
    assert all(panel.std() > 0.05 for panel in panels), "perplexity, loss by position, resolution, passkeys"


def test_a_passkey_is_found_where_every_digit_is(run, monkeypatch):
    def predict(evaluation, params, rows):
        weight = np.stack([evaluation.parts.features(row, None)["label_weights"] for row in rows])
        correct = weight.copy()
        for row in correct[-3:]:  # both of the last depth and one of that before it
            row[np.flatnonzero(row)[2]] = 0
        return {"weight": weight, "correct": correct}

    monkeypatch.setattr(lengths, "predict", predict)
    params = restore_numpy(run / CHECKPOINTS, part="params").state["params"]
    assert lengths.passkeys_found(reassemble(run), params, TABLE, keys=2) == [1] * 9 + [0.5, 0]


def test_scores_at_lengths_are_those_of_the_report(report, run):
    _, found = report
    scores = scoring.score_at_lengths(run, (LENGTH, 1024), tokens=TOKENS)
    assert scores[LENGTH] == found["lengths"][str(LENGTH)]["scores"]
    assert str(scores[1024]) == found["lengths"]["1024"]["refused"]


def test_a_source_drawn_by_rule_is_drawn_longer(tmp_path):
    few = {"data.train_examples": 8, "data.dev_examples": 6}
    parts = assemble(config("recall.py:copy", encoding="rope", **few), tmp_path)
    row = parts.features(parts.examples("dev", tmp_path)[0], None)
    batch = {name: value[None] for name, value in row.items()} | {"example_weight": np.ones(1, np.float32)}
    shapes = jax.eval_shape(parts.module.init, jax.random.key(0), batch)["params"]
    assert set(shapes) == {"model"}, "as causal_lm, whose run may be asked the same"
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    longer = AtLength.of(parts.at_length(128), params, "dev", tmp_path, tokens=4 * 128)
    assert [len(row.ids) for row in longer.rows] == [128] * 4
    found = longer.measured(None)
    assert set(found["scores"]) == {"loss", "accuracy", "exact"} and found["rows"] == 4
    # Until the middle nothing is to be recalled; after it four rows, a word each.
    assert [(b["from"], b["tokens"]) for b in found["by_position"]] == [(64, 4 * 31), (96, 4 * 32)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lengths=16,a",), "--lengths takes integers with commas between them, not '16,a'"),
        (("--lengths=16,2",), "a row has at least 4 tokens"),
        (("--lengths=16,32", "--sliding=16"), "--sliding=16: expected 1 to 15"),
        (("--lengths=16", "--sliding=0"), "--sliding=0: expected 1 to 15"),
        (("--lengths=16", "--tokens=8"), "--tokens=8 is not one row of 16 tokens"),
        (("--lengths=16", "--passkey=0"), "--passkey=0: at least one key"),
        (("--sliding=8",), "--sliding belongs to --lengths, which is not given"),
        (("--passkey",), "--passkey belongs to --lengths"),
        (("--lengths=16", "--split=tets"), "no split 'tets'"),
        (("--lengths=16", "--slidin=8"), "unknown flag --slidin; did you mean '--sliding'"),
        (("--lengths=16", "--step=7"), "there is no checkpoint of step 7"),
        (("--lengths=16", "--config.processes.detect=True"), "--lengths runs on one process"),
    ],
)
def test_bad_flags(run, flags, message, capsys):
    handlers = logging.root.handlers[:]
    before = {path: path.stat().st_mtime_ns for path in run.glob("lengths_*")}
    code = run_main(scoring.main, [f"--workdir={run}", *flags])
    logging.root.handlers[:] = handlers
    printed, error = capsys.readouterr()
    assert code == MISTAKE and not printed and message in error and "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in run.glob("lengths_*")} == before
