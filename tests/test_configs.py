"""Every config is loaded, built and stepped; the published numbers in them are the published ones."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import train
from tests.devices import first
from zoo.command_line import split_overrides
from zoo.config import difference, load_config
from zoo.models import build
from zoo.models.parameters import count_parameters, parameter_shapes
from zoo.run import assemble
from zoo.training.settings import RunSettings
from zoo.training.sharding import make_mesh, put_batch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
FAMILIES, TASKS, SIZES = ("bert", "nezha"), ("pretrain", "ner", "lcqmc", "chnsenti"), ("base", "large", "tiny")
GLUE = {
    "sst2": ("SST-2", 872),
    "rte": ("RTE", 277),
    "cola": ("CoLA", 1043),
    "stsb": ("STS-B", 1500),
}  # folder, dev rows
CHINESE = [(family, task, size) for family in FAMILIES for task in TASKS for size in SIZES]
SMALL = [
    ("model.model_dim", "16"),
    ("model.num_heads", "2"),
    ("model.num_layers", "1"),
    ("feed_forward.width", "16"),
    ("train.batch_size", "4"),
]
# What a size may change beside what `SMALL` sets. None of it changes the program that is compiled.
NUMBERS = ("optimizer.learning_rate", "train.steps", "schedule.warmup")
SENTENCES = ["今天天气很好", "我们去北京吧", "这家酒店不错", "他在上海工作", "孩子喜欢看书", "明天要下雨了"]


def config(spec: str, *overrides: tuple[str, str]) -> ConfigDict:
    return load_config(str(ROOT / "configs" / spec), list(overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data of a few rows in the published formats, and a vocabulary of their characters."""
    folder = tmp_path_factory.mktemp("chinese")
    characters = sorted(set("".join(SENTENCES)))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (folder / "corpus.txt").write_text("\n\n".join("\n".join(SENTENCES[k:] + SENTENCES[:k]) for k in range(8)) + "\n")
    for split in ("train", "dev", "test"):
        rows = "".join(
            f"{a}\t{b}\t{k % 2}\n" for k, (a, b) in enumerate(zip(SENTENCES, reversed(SENTENCES), strict=True))
        )
        (folder / f"lcqmc.{split}").write_text(rows)
        (folder / f"chnsenti.{split}").write_text(
            "label\ttext_a\n" + "".join(f"{k % 2}\t{s}\n" for k, s in enumerate(SENTENCES))
        )
        (folder / f"ner.{split}").write_text(
            "\n\n".join("\n".join(f"{c} {'B-LOC' if c == '北' else 'O'}" for c in s) for s in SENTENCES) + "\n"
        )
    return folder


def on_small_data(task: str, folder: Path) -> list[tuple[str, str]]:
    files = [("data.train", f"{folder}/corpus.txt"), ("task.max_predictions", "3")]
    if task != "pretrain":
        files = [(f"data.{split}", f"{folder}/{task}.{split}") for split in ("train", "dev", "test")]
    return [*files, ("tokenizer.path", f"{folder}/vocab.txt"), ("task.max_length", "16"), ("model.max_length", "16")]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """These are runs of one device; the meshes are tested in test_train.py."""
    monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=first(1)))


def first_losses(made: ConfigDict, workdir: Path, steps: int = 1) -> list[float]:
    trainer = train.build_trainer(assemble(made, workdir), workdir)
    state, losses = train.initial(trainer), []
    for step, (stage, batch) in zip(range(steps), trainer.batches(0), strict=False):
        state, metrics = stage.train_step(state, put_batch(batch, trainer.mesh))
        assert bool(metrics["finite"]) and int(state.step) == step + 1
        losses.append(float(metrics["loss"]))
    return losses


# --- built and stepped


@pytest.mark.parametrize(("family", "task", "size"), CHINESE)
def test_the_model_has_the_published_size(family, task, size):
    made = config(f"{family}.py:{task},size={size}", ("model.vocab_size", "21128"), ("model.pooler", "true"))
    count = count_parameters(parameter_shapes(build(made.to_dict())))
    published = {
        ("bert", "base"): 102_267_648,
        ("nezha", "base"): 101_874_432,
        ("bert", "large"): 325_522_432,
        ("nezha", "large"): 324_998_144,
    }
    if size == "tiny":
        assert count < 5_000_000
    else:
        assert count == published[family, size]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_chinese_config(family, task, folder, tmp_path):
    """Reduced, the sizes are one program but for numbers that it is given; so one of them is stepped."""
    overrides = [*SMALL, *on_small_data(task, folder)]
    base, large, tiny = (config(f"{family}.py:{task},size={size}", *overrides) for size in SIZES)
    for other in (large, tiny):
        assert all(line.startswith(NUMBERS) for line in difference(base, other))
    (loss,) = first_losses(base, tmp_path)
    classes = {"ner": 7, "lcqmc": 2, "chnsenti": 2}
    if task in classes:
        assert loss == pytest.approx(np.log(classes[task]), rel=0.1), "an untrained head knows nothing"
    else:
        vocabulary = 5 + len(set("".join(SENTENCES)))
        assert loss == pytest.approx(np.log(vocabulary) + np.log(2), rel=0.1), "nor do two"


def test_a_step_of_both_lengths(folder, tmp_path):
    """BERT's 90 % at 128 and 10 % at 512, reduced to nine steps of 16 tokens and one of 24."""
    small = dict([*SMALL, *on_small_data("pretrain", folder)]) | {
        "task.max_length": "24",
        "model.max_length": "24",
        "train.stages.0.task.max_length": "16",
        "train.stages.0.task.max_predictions": "2",
        "train.stages.1.batch_size": "2",
        "train.steps": "10",
        "schedule.warmup": "2",
    }
    made = config("bert.py:pretrain,lengths=128-512", *small.items())
    trainer = train.build_trainer(assemble(made, tmp_path), tmp_path)
    state, steps = train.initial(trainer), []
    for stage, batch in trainer.batches(0):
        state, metrics = stage.train_step(state, put_batch(batch, trainer.mesh))
        steps.append((batch["input_ids"].shape, bool(metrics["finite"])))
    assert steps == [((4, 16), True)] * 9 + [((2, 24), True)]


@pytest.mark.parametrize("task", ["pretrain", "parameter_names", "parameter_types"])
def test_a_step_of_every_demo_config(task, tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "harvest"
    overrides = [
        *SMALL,
        ("data.cache", str(cache)),
        ("data.packages", "('flax', 'optax', 'jax')"),
        ("tokenizer.size", "500"),
    ]
    (loss,) = first_losses(config(f"demo.py:{task}", *overrides), tmp_path)
    if task == "pretrain":
        assert loss == pytest.approx(np.log(500), rel=0.1), "an untrained model spreads over the vocabulary"
    else:
        assert 0 < loss < np.log(100)


@pytest.mark.parametrize("source", ["flip_flop", "mqar", "copy"])
def test_recall(source, tmp_path):
    """The three are one program on other rows, so one of them is stepped."""
    made = config(f"recall.py:{source}", *SMALL, ("data.train_examples", "16"), ("data.dev_examples", "4"))
    parts = assemble(made, tmp_path)
    for example in parts.examples("dev", tmp_path):
        row = parts.features(example, None)
        assert len(row["input_ids"]) == made.task.max_length == made.model.max_length
        assert len(example.ids) <= made.task.max_length and row["label_weights"].sum() == example.answers.sum() > 0
    if source == "copy":
        (loss,) = first_losses(made, tmp_path)
        assert loss == pytest.approx(np.log(5 + 2 + 16), rel=0.1)


@pytest.mark.parametrize("task", GLUE)
def test_glue(task, tmp_path):
    """In GLUE's own columns. The programs of classification are stepped as lcqmc and chnsenti, so only regression is here."""
    header, row, label = {
        "sst2": ("sentence\tlabel\n", 'he said "so {k}\t{y}', int),
        "rte": ("index\tsentence1\tsentence2\tlabel\n", "{k}\tit is {k}\tnot so\t{word}", int),
        "cola": ("", "gj04\t{y}\t*\tit is {k}", int),
        "stsb": ("index\tgenre\tsentence1\tsentence2\tscore\n", "{k}\tnews\tit is {k}\tnot so\t{y}.000", float),
    }[task]
    values = [dict(k=k, y=k % 2, word=("entailment", "not_entailment")[k % 2]) for k in range(4)]
    (tmp_path / "train.tsv").write_text(header + "".join(row.format(**value) + "\n" for value in values))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "is"]) + "\n")
    files = [("data.train", f"{tmp_path}/train.tsv"), ("data.dev", "()"), ("tokenizer.path", f"{tmp_path}/vocab.txt")]
    made = config(f"glue.py:{task},pooling=mean", *SMALL, *files)
    examples = assemble(made, tmp_path / "run").examples("train", tmp_path)
    assert [example.label for example in examples] == [label(value["y"]) for value in values]
    assert all((example.second is not None) == (task in ("rte", "stsb")) for example in examples)
    if task == "stsb":
        (loss,) = first_losses(made, tmp_path / "run")
        assert loss == pytest.approx(0.5, rel=0.1), "an untrained head says about 0 of labels 0, 1, 0, 1"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the repository")
@pytest.mark.parametrize("task", GLUE)
def test_glue_on_real_data(task, tmp_path):
    """The published files are read as they are: every row of dev, its label known, the tokens real."""
    folder, count = GLUE[task]
    files = [(f"data.{split}", f"{DATA}/glue/{folder}/{split}.tsv.xz") for split in ("train", "dev")]
    made = config(f"glue.py:{task},size=tiny", *files, ("tokenizer.path", f"{DATA}/vocab/en_uncased_30522.txt.xz"))
    parts = assemble(made, tmp_path)
    examples = parts.examples("dev", tmp_path)
    assert len(examples) == count
    labels = np.asarray([example.label for example in examples])
    if task == "stsb":
        assert labels.min() == 0 and labels.max() == 5 and labels.mean() == pytest.approx(2.364, abs=1e-3)
    else:
        assert made.task.labels[np.bincount(labels).argmax()] == {"rte": "entailment"}.get(task, "1")
    pieces = np.concatenate([example.first for example in examples])
    assert (pieces == parts.tokenizer.vocabulary.unk).mean() < 0.001


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the repository")
@pytest.mark.parametrize("task", TASKS)
def test_steps_of_tiny_nezha_on_real_data(task, tmp_path):
    """The size that trains on a CPU as it is, over the real vocabulary; only the batches are smaller."""
    file, losses = {
        "pretrain": ("zh_text/news_sample.txt.xz", np.log(21128) + np.log(2)),
        "ner": ("peoples_daily_ner/example.train.first1000.xz", np.log(7)),
        "lcqmc": ("lcqmc/train.first1999.txt.xz", np.log(2)),
        "chnsenti": ("chnsenticorp/dev.tsv.xz", np.log(2)),
    }[task]
    overrides = [("data.train", f"{DATA / file}"), ("tokenizer.path", f"{DATA}/vocab/zh_21128.txt.xz")]
    if task != "pretrain":
        overrides += [("data.dev", "()"), ("data.test", "()")]
    made = config(f"nezha.py:{task},size=tiny", *overrides, ("train.batch_size", "4"))
    first, *more = first_losses(made, tmp_path, steps=3)
    assert first == pytest.approx(losses, rel=0.15)
    assert max(more) < 1.5 * first


# --- what they say


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pretraining_of_nezhas_report(family):
    """Wei et al. 2019, section 4.1 and the released code; the step number is the user's."""
    base, large = (config(f"{family}.py:pretrain,size={size}") for size in ("base", "large"))
    for made, peak, batch in ((base, 1.8e-4, 14_400), (large, 1e-4, 5_120)):
        lamb = made.optimizer
        assert (lamb.name, lamb.learning_rate, lamb.b1, lamb.b2) == ("lamb", peak, 0.9, 0.999)
        assert (lamb.epsilon, lamb.weight_decay, lamb.clip_norm, lamb.bias_correction) == (1e-6, 0.01, 1.0, True)
        assert (made.schedule.name, made.schedule.warmup, made.train.batch_size) == ("linear", 1800, batch)
        task = made.task
        assert (task.name, task.objective, task.whole_word) == ("masked_lm_with_sentences", "nsp", True)
        assert (task.max_length, task.rate, task.max_predictions) == (128, 0.15, 20)
        assert task.replace == (0.8, 0.1, 0.1)
        assert made.tokenizer.chinese_words and made.model.pooler


@pytest.mark.parametrize("size", SIZES)
def test_the_lengths_of_bert(size):
    """Devlin et al. 2018, A.2: "128 tokens for 90 % of the steps", then 512; slots as in the released README."""
    both, short = (config(f"bert.py:pretrain,size={size},lengths={lengths}") for lengths in ("128-512", "128"))
    assert (both.task.max_length, both.task.max_predictions) == (512, 80)
    first, second = RunSettings(**both.train.to_dict()).plan(num_examples=1)
    assert first.task == {"max_length": short.task.max_length, "max_predictions": short.task.max_predictions}
    assert (first.batch_size, first.last_step) == (short.train.batch_size, 0.9 * short.train.steps)
    assert (second.task, second.last_step) == ({}, short.train.steps)
    assert second.batch_size * 512 == first.batch_size * 128
    assert short.train.stages == ()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("task", "length", "epochs", "base", "large"),
    [("ner", 256, 5.0, 64, 16), ("lcqmc", 128, 5.0, 64, 32), ("chnsenti", 256, 10.0, 64, 16)],
)
def test_the_fine_tuning_of_nezhas_report(family, task, length, epochs, base, large):
    for size, batch in (("base", base), ("large", large), ("tiny", 32)):
        made = config(f"{family}.py:{task},size={size}")
        assert (made.task.max_length, made.train.epochs, made.train.steps) == (length, epochs, None)
        assert (made.schedule.name, made.schedule.warmup) == ("linear", 0.1)
        assert made.train.batch_size == batch
        adamw = made.optimizer
        assert (adamw.name, adamw.b1, adamw.b2, adamw.epsilon) == ("adamw", 0.9, 0.999, 1e-6)
        assert (adamw.weight_decay, adamw.clip_norm) == (0.01, 1.0)
        assert adamw.learning_rate == (1e-3 if size == "tiny" else 3e-5)
        assert not made.tokenizer.chinese_words
    labels = {"ner": {"O", *(f"{b}-{kind}" for b in "BI" for kind in ("PER", "LOC", "ORG"))}}.get(task, {"0", "1"})
    assert set(made.task.labels) == labels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["base", "large"])
def test_the_models_of_the_reports(family, size):
    made = config(f"{family}.py:pretrain,size={size}")
    model = made.model
    shape = {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)}[size]
    assert (model.num_layers, model.model_dim, model.num_heads, made.feed_forward.width) == shape
    assert (model.dropout, model.attention_dropout, model.stddev, model.token_types) == (0.1, 0.1, 0.02, 2)
    assert (model.arrangement, made.norm.name, made.norm.epsilon) == ("post_norm", "layernorm", 1e-12)
    assert (made.feed_forward.name, made.feed_forward.approximate) == ("gelu", False)
    if family == "nezha":
        assert (made.encoding.name, made.encoding.limit, made.encoding.phase) == ("nezha", 64, "code")
    else:
        assert made.encoding.name == "learned"


def test_bert_and_nezha_differ_in_the_encoding_alone():
    for task in TASKS:
        lines = difference(config(f"bert.py:{task}"), config(f"nezha.py:{task}"))
        assert lines and all(line.startswith("encoding.") for line in lines)


@pytest.mark.parametrize("task", GLUE)
def test_the_fine_tuning_of_bert_on_glue(task):
    """Devlin et al. 2018, A.3: batches of 32, 3 epochs, rates from 2e-5 to 5e-5; the model is bert-base."""
    made = config(f"glue.py:{task}")
    assert (made.train.batch_size, made.train.epochs, made.train.steps) == (32, 3.0, None)
    assert (made.optimizer.name, made.optimizer.weight_decay, made.schedule.warmup) == ("adamw", 0.01, 0.1)
    assert 2e-5 <= made.optimizer.learning_rate <= 5e-5
    foreign = ("data.", "optimizer.", "task.", "tokenizer.", "train.")
    assert all(line.startswith(foreign) for line in difference(config("bert.py:lcqmc"), made))
    assert made.model.pooler and not config(f"glue.py:{task},pooling=mean").model.pooler


def test_the_demo_writes_enough_lines():
    made = config("demo.py:pretrain")
    assert made.train.steps // made.train.log_every >= 20


# --- how they are called

COMMAND = re.compile(r"train\.py((?: +[^\s`]+=[^\s`]+)+)")
MENTION = re.compile(r"configs/\w+\.py(?::[\w,=]+)?")


@pytest.mark.parametrize("file", [*sorted(p.name for p in (ROOT / "configs").glob("*.py")), "../README.md"])
def test_the_commands_in_the_documents_have_the_right_names(file, monkeypatch):
    """Each command line and each config that is mentioned loads, its overrides included."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "configs" / file).read_text()
    for spec in MENTION.findall(text):
        if spec in ("configs/base.py", "configs/chinese.py"):
            assert Path(spec).is_file()  # what configs are made of is none
        else:
            load_config(spec)
    commands = COMMAND.findall(text)
    for command in commands:
        others, overrides = split_overrides(shlex.split(command))
        flags = dict(argument.split("=", 1) for argument in others)
        assert flags.keys() == {"--config", "--workdir"}
        load_config(flags["--config"], overrides)
    for sentence in re.findall(r"`(--config\.[^`]+)`", text):
        family = "nezha.py" if file == "chinese.py" else "demo.py"
        config(f"{family}:pretrain", *split_overrides(shlex.split(sentence))[1])
    assert commands or file in ("__init__.py", "base.py", "chinese.py")
