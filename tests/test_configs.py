"""Every config is loaded, built and stepped once; the published numbers in them are the published ones."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import train
from zoo.config import load_config
from zoo.models import build
from zoo.models.parameters import count_parameters, parameter_shapes
from zoo.run import assemble
from zoo.training.sharding import put_batch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
CHINESE = [
    (family, task, size)
    for family in ("bert", "nezha")
    for task in ("pretrain", "ner", "lcqmc", "chnsenti")
    for size in ("base", "large", "tiny")
]
SMALL = [
    ("model.model_dim", "16"),
    ("model.num_heads", "2"),
    ("model.num_layers", "1"),
    ("feed_forward.width", "16"),
    ("train.batch_size", "4"),
    ("mesh.data", "1"),
    ("train.tensorboard", "false"),
]
SENTENCES = ["今天天气很好", "我们去北京吧", "这家酒店不错", "他在上海工作", "孩子喜欢看书", "明天要下雨了"]


def config(spec: str, *overrides: tuple[str, str]):
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
    files = [("data.train", f"{folder}/corpus.txt")]
    if task != "pretrain":
        files = [(f"data.{split}", f"{folder}/{task}.{split}") for split in ("train", "dev", "test")]
    return [*files, ("tokenizer.path", f"{folder}/vocab.txt"), ("task.max_length", "16"), ("model.max_length", "16")]


def step_once(made, workdir: Path) -> float:
    trainer = train.build_trainer(assemble(made, workdir), workdir)
    state, metrics = trainer.train_step(train.initial(trainer), put_batch(trainer.pipeline.batch(0), trainer.mesh))
    assert bool(metrics["finite"]) and int(state.step) == 1
    return float(metrics["loss"])


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """These are runs of one device; the meshes are tested in test_train.py."""
    monkeypatch.setattr(train, "make_mesh", lambda **sizes: make_one_device_mesh())


def make_one_device_mesh():
    from zoo.training.sharding import make_mesh

    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize(("family", "task", "size"), CHINESE, ids="-".join)
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


@pytest.mark.parametrize("task", ["pretrain", "ner", "lcqmc", "chnsenti"])
@pytest.mark.parametrize("family", ["bert", "nezha"])
def test_a_step_of_every_chinese_config(family, task, folder, tmp_path):
    overrides = [*SMALL, *on_small_data(task, folder)]
    if task == "pretrain":
        overrides += [("task.max_predictions", "3"), ("train.steps", "20"), ("schedule.warmup", "2")]
    loss = step_once(config(f"{family}.py:{task}", *overrides), tmp_path)
    classes = {"ner": 7, "lcqmc": 2, "chnsenti": 2}
    if task in classes:
        assert loss == pytest.approx(np.log(classes[task]), rel=0.1), "an untrained head knows nothing"


@pytest.mark.parametrize("size", ["base", "large", "tiny"])
def test_the_hyper_parameters_of_nezhas_report(size):
    pretrain = config(f"nezha.py:pretrain,size={size}")
    if size != "tiny":
        assert pretrain.optimizer.name == "lamb"
        assert pretrain.optimizer.learning_rate == {"base": 1.8e-4, "large": 1e-4}[size]
        assert pretrain.schedule.warmup == 1800
        assert pretrain.train.batch_size == {"base": 14_400, "large": 5_120}[size]
        assert (pretrain.task.max_length, pretrain.task.rate, pretrain.task.max_predictions) == (128, 0.15, 20)
    published = {"ner": (256, 5.0, 64, 16), "lcqmc": (128, 5.0, 64, 32), "chnsenti": (256, 10.0, 64, 16)}
    for task, (length, epochs, base, large) in published.items():
        tuned = config(f"nezha.py:{task},size={size}")
        assert (tuned.task.max_length, tuned.train.epochs, tuned.optimizer.name) == (length, epochs, "adamw")
        assert tuned.schedule.warmup == 0.1
        if size != "tiny":
            assert tuned.optimizer.learning_rate == 3e-5
            assert tuned.train.batch_size == {"base": base, "large": large}[size]


@pytest.mark.parametrize("task", ["pretrain", "parameter_names", "parameter_types"])
def test_a_step_of_every_demo_config(task, tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "harvest"
    overrides = [
        *SMALL,
        ("data.cache", str(cache)),
        ("data.packages", "('flax', 'optax', 'jax')"),
        ("tokenizer.size", "500"),
    ]
    assert step_once(config(f"demo.py:{task}", *overrides), tmp_path) > 0


def test_the_demo_writes_enough_lines():
    made = config("demo.py:pretrain")
    assert made.train.steps // made.train.log_every >= 20


def test_bert_and_nezha_differ_in_the_encoding_alone():
    from zoo.config import difference

    lines = difference(config("bert.py:ner"), config("nezha.py:ner"))
    assert lines and all(line.startswith("encoding.") for line in lines)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the repository")
@pytest.mark.parametrize("task", ["pretrain", "ner", "lcqmc", "chnsenti"])
def test_a_step_on_real_data(task, tmp_path):
    real = {
        "pretrain": [("data.train", f"{DATA}/zh_text/news_sample.txt.xz")],
        "ner": [
            ("data.train", f"{DATA}/peoples_daily_ner/example.train.first1000.xz"),
            ("data.dev", "()"),
            ("data.test", "()"),
        ],
        "lcqmc": [("data.train", f"{DATA}/lcqmc/train.first1999.txt.xz"), ("data.dev", "()"), ("data.test", "()")],
        "chnsenti": [("data.train", f"{DATA}/chnsenticorp/dev.tsv.xz"), ("data.dev", "()"), ("data.test", "()")],
    }[task]
    overrides = [
        *SMALL,
        *real,
        ("tokenizer.path", f"{DATA}/vocab/zh_21128.txt.xz"),
        ("task.max_length", "64"),
        ("model.max_length", "64"),
    ]
    loss = step_once(config(f"nezha.py:{task},size=tiny", *overrides), tmp_path)
    if task == "pretrain":
        assert loss > np.log(21128) * 0.95, "an untrained model spreads over the vocabulary"
