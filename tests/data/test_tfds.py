"""Data sets of TFDS, without TensorFlow: TFDS's own builders on made-up rows, ours on made-up and on real files."""

import gzip
import json
import logging
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.testing import mocking
from tensorflow_datasets.text.glue import Glue
from tensorflow_datasets.text.wikipedia import Wikipedia
from tensorflow_datasets.text.xnli import Xnli

from zoo import data, tasks
from zoo.__main__ import main
from zoo.data.builders.preparation import prepare
from zoo.data.store import prepare as prepare_store
from zoo.data.tokenizers import train_wordpiece
from zoo.errors import UserError
from zoo.overrides import parse_parts

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data sets in ../shared/data")

LANGUAGES = ["ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"]
SST2 = {
    "train": [{"sentence": f"film {i} ", "label": i % 2, "idx": i} for i in range(20)],
    "validation": [{"sentence": 'a "quoted" café', "label": "positive", "idx": 0}],
    "test": [{"sentence": "who knows", "label": -1, "idx": 0}],
}
MRPC = {"train": [{"sentence1": "a b", "sentence2": "b a", "label": "equivalent", "idx": 0}]}
STSB = {"train": [{"sentence1": "a", "sentence2": "b", "label": 3.8, "idx": 0}]}
XNLI = {
    "validation": [
        {"premise": {code: f"premise {code}" for code in LANGUAGES}, "hypothesis": hypothesis, "label": "neutral"}
        for hypothesis in ({"en": "hypothesis", "zh": "假设"}, {"en": "only English"})
    ]
}
WIKIPEDIA = {"train": [{"title": "Zulu", "text": "First paragraph.\n\nSecond, with \u2028 inside."}]}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    tfds.disable_progress_bar()
    logging.getLogger("absl").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Made-up rows prepared by TFDS's own builders: their features, configs and versions, only the rows are ours."""
    folder = tmp_path_factory.mktemp("prepared")
    for cls, config, rows in (
        (Glue, "sst2", SST2),
        (Glue, "mrpc", MRPC),
        (Glue, "stsb", STSB),
        (Xnli, None, XNLI),
        (Wikipedia, "20190301.zu", WIKIPEDIA),
    ):
        write(folder, cls, config, rows)
    return folder


def write(folder, cls, config, rows):
    def split_generators(self, dl_manager):
        return {split: enumerate(examples) for split, examples in rows.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "_split_generators", split_generators)
        cls(data_dir=str(folder), config=config, file_format="array_record").download_and_prepare()


def source(folder, dataset, **options):
    return data.registry.build({"name": "tfds", "dataset": dataset, "data_dir": str(folder), **options})


def sst2(folder, **options):
    return source(folder, "glue/sst2", text="sentence", label="label", **options)


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_glue_by_the_names_of_its_classes(prepared):
    found = sst2(prepared)
    assert found.splits() == ("train", "dev", "test")
    (dev,) = found.records("dev")
    assert dev.fields == {"text": 'a "quoted" café', "label": "positive"}
    assert (dev.file, dev.line) == ("glue/sst2/validation", 1)
    train = list(found.records("train"))
    assert [record.line for record in train] == list(range(1, 21))
    names = ("negative", "positive")
    expected = {(row["sentence"], names[row["label"]]) for row in SST2["train"]}
    assert {(record.fields["text"], record.fields["label"]) for record in train} == expected


def test_an_example_without_a_class_has_no_label_and_a_task_says_so(prepared):
    found = sst2(prepared)
    (record,) = found.records("test")
    assert record.fields == {"text": "who knows"}
    task = tasks.registry.build("classification").resolve(found)
    assert task.labels == ("negative", "positive")
    assert "glue/sst2/test:1" in refusal(lambda: task.examples(found, "test", wordpiece(["a"]), None))


def test_pairs_and_numbers(prepared):
    columns = dict(text="sentence1", text_pair="sentence2", label="label")
    (pair,) = source(prepared, "glue/mrpc", **columns).records("train")
    assert pair.fields == {"text": "a b", "text_pair": "b a", "label": "equivalent"}
    (scored,) = source(prepared, "glue/stsb", **columns).records("train")
    assert scored.fields["label"] == "3.8"
    assert [
        r.fields["label"] for r in source(prepared, "glue/mrpc", text="sentence1", label="idx").records("train")
    ] == ["0"]


def test_parts_of_a_split_make_up_the_whole(prepared):
    whole = [record.fields for record in sst2(prepared).records("train")]
    cut = sst2(prepared, train=("train[:75%]",), dev=("train[75%:]", "validation"))
    train, dev = list(cut.records("train")), list(cut.records("dev"))
    assert [record.fields for record in train] == whole[:15]
    assert [record.fields for record in dev[:-1]] == whole[15:]
    assert [(r.file, r.line) for r in dev[-2:]] == [("glue/sst2/train[75%:]", 5), ("glue/sst2/validation", 1)]


def test_records_come_in_batches_without_a_seam(prepared, monkeypatch):
    expected = list(sst2(prepared).records("train"))
    monkeypatch.setattr("zoo.data.tfds.BATCH", 7)
    assert list(sst2(prepared).records("train")) == expected


def test_xnli_in_one_language(prepared):
    columns = dict(text="premise", text_pair="hypothesis", label="label")
    english = list(source(prepared, "xnli", language="en", **columns).records("dev"))
    assert {r.fields["text_pair"] for r in english} == {"hypothesis", "only English"}
    assert {(r.fields["text"], r.fields["label"]) for r in english} == {("premise en", "neutral")}
    assert source(prepared, "xnli:1.1.0", language="en", **columns).splits() == ("dev",)
    chinese = source(prepared, "xnli", language="zh", **columns)
    line = next(r.line for r in english if r.fields["text_pair"] == "only English")
    message = refusal(lambda: list(chinese.records("dev")))
    assert f"xnli/validation:{line}" in message and "0 texts in the language 'zh'" in message
    assert "set language" in refusal(lambda: source(prepared, "xnli", **columns).records("dev"))
    assert "no language 'zn'" in refusal(lambda: source(prepared, "xnli", language="zn", **columns).records("dev"))
    assert "none of its features" in refusal(lambda: sst2(prepared, language="en").records("dev"))


def test_wikipedia_is_documents(prepared, tmp_path):
    found = source(prepared, "wikipedia/20190301.zu", text="text")
    (record,) = found.records("train")
    assert found.splits() == ("train",)
    assert record.fields == {"text": WIKIPEDIA["train"][0]["text"]}
    store = prepare_store(found, "train", wordpiece([record.fields["text"]]), tmp_path)
    assert len(store) == 1 and store.num_tokens > 5


def test_mock_data_of_tfds(prepared, monkeypatch):
    def getitems(keys, generator):
        """TFDS 4.9.10 mocks this as a method, which is called without self, and gives text where files give bytes."""
        examples = (mocking._getitem(None, key, generator) for key in keys)
        return [{name: v.encode() if isinstance(v, str) else v for name, v in example.items()} for example in examples]

    monkeypatch.setattr(mocking, "_getitems", getitems)
    with tfds.testing.mock_data(num_examples=15, data_dir=str(prepared / "glue/sst2/2.0.0")):
        records = list(sst2(prepared).records("train"))
    assert len(records) == 15 and len({record.fields["text"] for record in records}) > 1
    assert {record.fields["label"] for record in records} == {"negative", "positive"}


def test_what_is_wrong_is_named(prepared):
    assert "text='sentense' is not a feature; did you mean 'sentence'" in refusal(
        lambda: source(prepared, "glue/sst2", text="sentense").records("dev")
    )
    assert "is Tensor, not text" in refusal(lambda: source(prepared, "glue/sst2", text="idx").records("dev"))
    assert "not a sequence" in refusal(
        lambda: source(prepared, "glue/sst2", words="sentence", tags="label").records("dev")
    )
    assert "no split 'valid'" in refusal(lambda: sst2(prepared, dev=("valid",)).records("dev"))
    assert "no split 'train[:5'" in refusal(lambda: sst2(prepared, dev=("train[:5",)).records("dev"))
    assert "no split 'dve'" in refusal(lambda: sst2(prepared).records("dve"))
    assert "holds no examples" in refusal(lambda: list(sst2(prepared, dev=("train[:0]",)).records("dev")))
    assert "glue/mrpc, glue/sst2, glue/stsb" in refusal(source(prepared, "glue", text="sentence").splits)
    for columns in ({}, dict(label="label"), dict(words="a"), dict(text="a", words="b", tags="c")):
        assert "name the features" in refusal(lambda columns=columns: source(prepared, "glue/sst2", **columns))
    for name in ("../glue", "glue/../sst2", "Glue", "glue/sst2:2", ""):
        assert "names no data set" in refusal(source(prepared, name, text="sentence").splits)


def test_data_that_are_not_prepared_are_not_fetched(tmp_path):
    message = refusal(sst2(tmp_path).splits)
    assert f"python -m zoo prepare glue/sst2 --data_dir={tmp_path}" in message and "download=True" in message
    message = refusal(source(tmp_path, "lcqmc", text="text").splits)
    assert "--manual_dir=FOLDER" in message and "manual_dir to the folder of your files" in message
    assert "cannot be downloaded" in refusal(lambda: source(tmp_path, "lcqmc", text="text", download=True))
    assert "manual_dir is for" in refusal(lambda: sst2(tmp_path, manual_dir="x"))
    assert not any(tmp_path.iterdir())


def test_download_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Glue, "_split_generators", lambda self, dl_manager: {"train": enumerate(SST2["train"])})
    assert len(list(sst2(tmp_path, download=True).records("train"))) == 20
    assert sst2(tmp_path).splits() == ("train",)


def test_names_that_cannot_be_prepared(tmp_path):
    assert "did you mean 'lcqmc'" in refusal(lambda: prepare("lcqm", str(tmp_path)))
    assert "has no config 'sst3'; did you mean 'sst2'" in refusal(lambda: prepare("glue/sst3", str(tmp_path)))
    assert "has 12 configs" in refusal(lambda: prepare("glue", str(tmp_path)))
    assert "9.9.9" in refusal(lambda: prepare("glue/sst2:9.9.9", str(tmp_path)))


# Our own builders

LCQMC = "你好吗\t你 好 吗\t1\n他说\"好\"\t不\t0\n\t空\t0\n"  # fmt: skip
CHNSENTICORP = "label\ttext_a\n1\t很好\n0\t很差\n"
PEOPLE = "厦 B-LOC\n门 I-LOC\n\u3000 O\n\n人 O\n"


def manual(tmp_path, **files):
    folder = tmp_path / "manual"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        name = name.replace("__", ".")
        packed = {"gz": gzip.compress, "xz": lzma.compress}.get(name.rsplit(".")[-1], bytes)(content.encode())
        (folder / name).write_bytes(packed)
    return folder


LCQMC_COLUMNS = dict(text="text", text_pair="text_pair", label="label")
CASES = {
    "lcqmc": (LCQMC, LCQMC_COLUMNS, dict(name="tsv", text=0, text_pair=1, label=2)),
    "chnsenticorp": (
        CHNSENTICORP,
        dict(text="text", label="label"),
        dict(name="tsv", header=True, text="text_a", label="label"),
    ),
    "peoples_daily_ner": (PEOPLE, dict(words="words", tags="tags"), dict(name="conll")),
}


def same(ours, files, **reader):
    """Asserts that splits of `ours` equal those read straight from the files, row by row and in order."""
    plain = data.registry.build({**reader, **{split: (str(file),) for split, file in files.items()}})
    for split in files:
        found, expected = ours.records(split), plain.records(split)
        for k, (one, other) in enumerate(zip(found, expected, strict=True), 1):
            assert (one.fields, one.line) == (other.fields, k)


@pytest.mark.parametrize("name", CASES)
def test_our_builders_keep_every_row_in_order(tmp_path, name):
    content, columns, reader = CASES[name]
    folder = manual(tmp_path, train__txt=content, example__dev=content, test__tsv__xz=content)
    made = source(tmp_path / "made", name, manual_dir=str(folder), **columns)
    assert made.splits() == ("train", "dev", "test")
    files = {"train": "train.txt", "dev": "example.dev", "test": "test.tsv.xz"}
    same(made, {split: folder / file for split, file in files.items()}, **reader)
    again = source(tmp_path / "made", name, **columns)  # prepared now: the files are needed no more
    assert again.fingerprint() == made.fingerprint()


def test_headers_are_told_from_rows(tmp_path):
    folder = manual(tmp_path, train__txt="text_a\ttext_b\tlabel\n" + LCQMC, dev__txt=LCQMC)
    made = source(tmp_path / "made", "lcqmc", manual_dir=str(folder), **LCQMC_COLUMNS)
    train, dev = ([record.fields for record in made.records(split)] for split in ("train", "dev"))
    assert train == dev and len(train) == 3 and made.splits() == ("train", "dev")
    folder = manual(tmp_path / "made", train__tsv=CHNSENTICORP, dev__tsv__gz=CHNSENTICORP.split("\n", 1)[1])
    made = source(tmp_path / "more", "chnsenticorp", manual_dir=str(folder), text="text", label="label")
    train, dev = ([record.fields for record in made.records(split)] for split in ("train", "dev"))
    assert train == dev == [{"text": "很好", "label": "1"}, {"text": "很差", "label": "0"}]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("lcqmc", LCQMC + "a\tb\t2\n", "train.txt:4: label '2'; expected 0 or 1"),
        ("lcqmc", LCQMC + "a\tb\n", "train.txt:4: 2 columns"),
        ("chnsenticorp", CHNSENTICORP + "good\tfine\n", "train.txt:4: label 'good'"),
        ("peoples_daily_ner", PEOPLE + "\n国 B-GPE\n", "train.txt:7: tag 'B-GPE'"),
        ("peoples_daily_ner", PEOPLE + "国\n", "train.txt:6: 1 column"),
        ("lcqmc", "", "train.txt: the file is empty"),
    ],
)
def test_bad_rows_name_file_and_line_and_leave_nothing_behind(tmp_path, name, content, expected):
    folder = manual(tmp_path, train__txt=content)
    assert expected in refusal(lambda: prepare(name, str(tmp_path / "made"), str(folder)))
    assert not list((tmp_path / "made").rglob("dataset_info.json"))
    manual(tmp_path, train__txt=CASES[name][0])
    prepare(name, str(tmp_path / "made"), str(folder))


def test_folders_that_do_not_say_which_file_is_which(tmp_path):
    made = str(tmp_path / "made")
    assert "no such folder" in refusal(lambda: prepare("lcqmc", made, str(tmp_path / "none")))
    folder = manual(tmp_path, readme__md="x")
    assert "no file for any split" in refusal(lambda: prepare("lcqmc", made, str(folder)))
    manual(tmp_path, train__txt=LCQMC, train__first10__txt=LCQMC)
    assert "train.first10.txt, train.txt; leave one" in refusal(lambda: prepare("lcqmc", made, str(folder)))
    assert "name their folder in manual_dir" in refusal(lambda: prepare("lcqmc", made))


def test_a_changed_file_is_noticed(tmp_path):
    folder = manual(tmp_path, train__txt=LCQMC)
    made = source(tmp_path / "made", "lcqmc", manual_dir=str(folder), **LCQMC_COLUMNS)
    before = made.fingerprint()
    manual(tmp_path, train__txt=LCQMC + "x\ty\t1\n")
    fresh = source(tmp_path / "made", "lcqmc", manual_dir=str(folder), **LCQMC_COLUMNS)
    assert "was prepared from other files" in refusal(fresh.splits)
    other = source(tmp_path / "other", "lcqmc", manual_dir=str(folder), **LCQMC_COLUMNS)
    assert other.fingerprint() != before


def test_fingerprint_is_of_the_content_and_how_it_is_read(prepared, tmp_path):
    for folder, rows in (("same", SST2), ("row", {**SST2, "test": [{**SST2["test"][0], "sentence": "who knew"}]})):
        write(tmp_path / folder, Glue, "sst2", rows)
    first = sst2(prepared).fingerprint()
    assert sst2(tmp_path / "same").fingerprint() == first
    others = [
        sst2(tmp_path / "row"),
        sst2(prepared, train=("train[:50%]",)),
        source(prepared, "glue/sst2", text="sentence"),
    ]
    (tmp_path / "same/glue/sst2/2.0.0/label.labels.txt").write_text("bad\ngood\n")
    others.append(sst2(tmp_path / "same"))
    assert len({first, *(other.fingerprint() for other in others)}) == 5


@pytest.fixture
def copied(tmp_path):
    write(tmp_path, Glue, "sst2", SST2)
    return tmp_path / "glue/sst2/2.0.0"


def test_damaged_files_are_named(tmp_path, copied):
    shard = copied / "glue-train.array_record-00000-of-00001"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    for damage in (bytes(content), bytes(content[:100]), bytes(content[:65536]), None):
        shard.unlink() if damage is None else shard.write_bytes(damage)
        message = refusal(lambda: list(sst2(tmp_path).records("train")))
        assert "glue/sst2/train" in message and "damaged" in message
    for name in ("features.json", "dataset_info.json"):
        (copied / name).write_text("{")
        assert "damaged" in refusal(sst2(tmp_path).splits)


def test_prepared_data_never_become_code(tmp_path, copied):
    features = json.loads((copied / "features.json").read_text())
    inner = features["featuresDict"]["features"]["sentence"]
    (tmp_path / "planted.py").write_text("raise SystemExit('this was run')")
    for name in ("planted.Feature", "tensorflow_datasets.scripts.cli.main.Feature"):
        inner["pythonClassName"] = name
        (copied / "features.json").write_text(json.dumps(features))
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(tmp_path))
            assert f"{name!r} is not one of TFDS" in refusal(sst2(tmp_path).splits)


def test_files_that_need_tensorflow_are_refused(tmp_path, copied):
    info = (copied / "dataset_info.json").read_text()
    (copied / "dataset_info.json").write_text(info.replace('"array_record"', '"tfrecord"'))
    assert "tfrecord files, which are not read here" in refusal(sst2(tmp_path).splits)


def test_tensorflow_is_never_imported_and_tfds_only_when_needed(tmp_path):
    folder = manual(tmp_path, train__txt=LCQMC)
    program = (
        "import sys\nfrom zoo import data\nassert 'tensorflow_datasets' not in sys.modules\n"
        f"s = data.registry.build(dict(name='tfds', dataset='lcqmc', data_dir={str(tmp_path)!r}, text='text',"
        f" manual_dir={str(folder)!r}))\n"
        "assert len(list(s.records('train'))) == 3 and s.fingerprint()\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tensorflow" not in sys.modules


def test_the_command(tmp_path, capsys):
    folder = manual(tmp_path, train__txt=LCQMC, dev__txt=LCQMC)
    argv = ["prepare", "lcqmc", f"--manual_dir={folder}", f"--data_dir={tmp_path / 'made'}"]
    for _ in range(2):  # the second time there is nothing to do
        assert main(argv) == 0
        printed = capsys.readouterr().out
        assert str(tmp_path / "made/lcqmc/1.0.0") in printed
        assert "validation   3 examples" in printed and "text_pair" in printed


def test_chosen_on_the_command_line():
    text = "tfds:dataset=glue/sst2,text=sentence,label=label,train=('train[:90%]',),dev=('train[90%:]',)"
    built = data.registry.build(parse_parts(text, "config.data"))
    assert (built.dataset, built.train, built.dev) == ("glue/sst2", ("train[:90%]",), ("train[90%:]",))


# Tasks, and real data


def wordpiece(texts):
    return train_wordpiece(texts, size=200)


def linked(tmp_path, names):
    folder = tmp_path / "linked"
    folder.mkdir()
    for name in names:
        (folder / Path(name).name).symlink_to(DATA / name)
    return folder


def alike(task, ours, plain, tokenizer, split="dev"):
    for one, other in zip(
        task.examples(ours, split, tokenizer, None), task.examples(plain, split, tokenizer, None), strict=True
    ):
        features = [task.features(example, np.random.default_rng(0), tokenizer.vocabulary) for example in (one, other)]
        for name in features[0]:
            np.testing.assert_array_equal(features[0][name], features[1][name])


@pytest.mark.parametrize("name, task", [("lcqmc", "classification"), ("peoples_daily_ner", "token_tagging")])
def test_a_task_sees_the_same_examples(tmp_path, name, task):
    content, columns, reader = CASES[name]
    folder = manual(tmp_path, train__txt=content, dev__txt=content)
    made = source(tmp_path / "made", name, manual_dir=str(folder), **columns)
    plain = data.registry.build({**reader, "train": (str(folder / "train.txt"),), "dev": (str(folder / "dev.txt"),)})
    resolved = tasks.registry.build({"name": task, "max_length": 16}).resolve(made)
    assert resolved == tasks.registry.build({"name": task, "max_length": 16}).resolve(plain)
    alike(resolved, made, plain, wordpiece(data.texts(plain.records("train"))))


@real_data
@pytest.mark.parametrize(
    "name, files",
    [
        ("lcqmc", ("train.first1999.txt.xz", "dev.txt.xz", "test.txt.xz")),
        ("chnsenticorp", ("train.tsv.xz", "dev.tsv.xz", "test.tsv.xz")),
        ("peoples_daily_ner", ("example.train.first1000.xz", "example.dev.xz", "example.test.xz")),
    ],
)
def test_real_files_row_by_row(tmp_path, name, files):
    _, columns, reader = CASES[name]
    folder = linked(tmp_path, [f"{name}/{file}" for file in files])
    made = source(tmp_path / "made", name, manual_dir=str(folder), **columns)
    same(made, {split: folder / file for split, file in zip(("train", "dev", "test"), files, strict=True)}, **reader)
    sizes = {"lcqmc": (1999, 8802, 12500), "chnsenticorp": (9600, 1200, 1200), "peoples_daily_ner": (1000, 2318, 4636)}
    assert tuple(made._builder.info.splits[s].num_examples for s in ("train", "validation", "test")) == sizes[name]


@real_data
def test_real_glue_through_the_features_of_tfds(tmp_path):
    file = DATA / "glue/SST-2/dev.tsv.xz"
    plain = data.registry.build(dict(name="tsv", dev=(str(file),), header=True, text="sentence", label="label"))
    rows = [r.fields for r in plain.records("dev")]
    names = ("negative", "positive")
    write(
        tmp_path,
        Glue,
        "sst2",
        {"validation": [{"sentence": r["text"], "label": int(r["label"]), "idx": k} for k, r in enumerate(rows)]},
    )
    found = sorted((r.fields["text"], r.fields["label"]) for r in sst2(tmp_path).records("dev"))
    assert len(found) == 872
    assert found == sorted((row["text"], names[int(row["label"])]) for row in rows)
