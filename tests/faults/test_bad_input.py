"""What a user gives wrong: said what, where and what would be right; exit code 2; nothing trained or overwritten."""

from __future__ import annotations

import logging
import shutil

import pytest

import train
from tests.faults.corpus import write_corpus
from tests.faults.process import ROOT, Launcher, contents
from zoo.command_line import MISTAKE, run_main
from zoo.data.tokenizers import TRAINING
from zoo.run import CHECKPOINTS, CONFIG

TRAINED = (CHECKPOINTS, CONFIG, "metrics.jsonl", "timing.jsonl")


@pytest.fixture
def refused(capsys):
    """A function that runs `train.py` with arguments that are wrong and returns what it says."""
    handlers = logging.root.handlers[:]

    def run(argv, workdir):
        before = contents(workdir)
        kept = {name for name in TRAINED if (workdir / name).exists()}
        code = run_main(train.main, argv)
        printed = capsys.readouterr().err
        assert code == MISTAKE and "Traceback" not in printed, printed
        assert {name for name in TRAINED if (workdir / name).exists()} == kept, printed
        after = contents(workdir)
        assert {path: after.get(path) for path in before} == before, printed
        (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        return printed[printed.index(error) :].removeprefix("error: ")

    yield run
    logging.root.handlers[:] = handlers  # train.main has put its own in their place


@pytest.fixture
def corpus(launcher, tmp_path):
    """A corpus that a test may spoil."""
    return Launcher(write_corpus(tmp_path / "corpus"), launcher.cache)


def assert_says(printed: str, *parts: str) -> None:
    for part in parts:
        assert part in printed, f"{part!r} is not in: {printed}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.train.stepz=3"], ["stepz", "did you mean 'steps'"]),
        (["--config.modle.dropout=0.1"], ["modle", "did you mean 'model'"]),
        (["--config.train.steps=many"], ["config.train.steps", "many", "int"]),
        (["--config.train.steps=0"], ["steps must be positive, not 0"]),
        (["--config.model.dropout=1.5"], ["dropout is a rate in [0, 1), not 1.5"]),
        (["--config.encoding=ropee"], ["unknown encoding 'ropee'", "did you mean 'rope'"]),
        (["--config.encoding=t5:num_bucket=32"], ["num_bucket", "num_buckets"]),
        (["--config.optimizer=lamb:learningrate=1"], ["learningrate", "learning_rate"]),
        (["--config.task=masked"], ["masked", "masked_lm"]),
        (["--wrkdir=x"], ["unknown flag --wrkdir", "did you mean '--workdir'"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (
            ["--config.encoding=learned", "--config.task.max_length=32"],
            ["max_length=32", "model.max_length=16", "raise"],
        ),
        (["--config.task.max_length=3"], ["max_length must be at least 4, not 3"]),
        (["--config.model.num_heads=3"], ["model_dim=16 is no multiple of num_heads=3"]),
        (["--config.model.vocab_size=20"], ["model.vocab_size is 20", "leave vocab_size None"]),
        (["--config.train.batch_size=6"], ["6", "8"]),
        (["--config.mesh.fsdp=3"], ["3", "8"]),
        (["--config.tokenizer.path=no/such/vocab.txt"], ["no/such/vocab.txt"]),
        (["--config.tokenizer.size=5"], ["5"]),
        (["--config.data.train=('no/such.txt',)"], ["no/such.txt: no such file", "there is no folder no"]),
        (["--config.data.train=()"], ["no split 'train'"]),
    ],
)
def test_wrong_values(launcher, refused, tmp_path, arguments, said):
    workdir = tmp_path / "run"
    assert_says(refused(launcher.argv(workdir, *arguments), workdir), *said)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--workdir={workdir}"], ["--config"]),
        (["--config={root}/configs/demo.py:pretrain"], ["--workdir"]),
        (["--config={root}/configs/dem.py", "--workdir={workdir}"], ["no config file", "did you mean", "demo.py"]),
        (["--config={root}/configs/demo.py:pretran", "--workdir={workdir}"], ["'pretran'", "did you mean 'pretrain'"]),
        (["--config={root}/configs/demo.py:pretrain,size=big", "--workdir={workdir}"], ["unknown key 'size'"]),
        (["--config={root}/README.md", "--workdir={workdir}"], ["path.py or path.py:argument"]),
    ],
)
def test_wrong_command_lines(refused, tmp_path, argv, said):
    workdir = tmp_path / "run"
    assert_says(refused([a.format(root=ROOT, workdir=workdir) for a in argv], workdir), *said)


def insert_line(path, number: int, line: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[: number - 1], line + b"\n", *lines[number - 1 :]]))


@pytest.mark.parametrize(
    ("task", "file", "number", "line", "said"),
    [
        ("masked_lm", "train.txt", 17, b"caf\xe9 ol\xe9", ["byte 4 of the line (0xe9) is not UTF-8; save"]),
        ("masked_lm", "dev.txt", 3, b"\xff\xfe", ["byte 1 of the line (0xff) is not UTF-8"]),
        ("masked_lm", "train.txt", 5, b"x" * 10_000_000, ["more than 1,048,576 characters", "raise max_line_length"]),
        ("classification", "train.tsv", 9, b"one two", ["1 column where the first line of the file has 2"]),
        ("classification", "train.tsv", 9, b"a\tb\tc", ["3 columns where the first line of the file has 2"]),
        ("classification", "dev.tsv", 4, b"one two\tevn", ["label 'evn' is not in the set", "did you mean 'even'"]),
        ("classification", "train.tsv", 2, b"z" * 10_000_000 + b"\teven", ["more than 1,048,576 characters"]),
        ("token_tagging", "train.conll", 1, b"big B-BGI", ["word 1 of the sentence ('big')", "'B-BGI'", "'B-BIG'"]),
        ("token_tagging", "dev.conll", 1, b"big", ["the word 'big' has no tag", "expected word tag"]),
    ],
)  # fmt: skip
def test_wrong_lines_are_named_by_file_and_number(corpus, refused, tmp_path, task, file, number, line, said):
    insert_line(corpus.corpus / file, number, line)
    workdir = tmp_path / "run"
    printed = refused(corpus.argv(workdir, task=task), workdir)
    assert_says(printed, f"{corpus.corpus / file}:{number}: ", *said)
    assert len(printed) < 1000  # no line of 10 MB is repeated


@pytest.mark.parametrize("file", ["train.txt", "dev.txt"])
@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_missing_and_empty_files(corpus, refused, tmp_path, file, content):
    path = corpus.corpus / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    said = {None: "no such file; did you mean", b"": "the file is empty", b"\n \n": "the file holds no rows"}[content]
    assert_says(refused(corpus.argv(tmp_path / "run"), tmp_path / "run"), f"{path}: {said}")


def test_a_folder_with_another_run(launcher, unbroken, refused):
    argv = launcher.argv(unbroken, "--config.optimizer.learning_rate=0.5", "--config.encoding=rope")
    assert_says(
        refused(argv, unbroken),
        f"{unbroken} holds the run of another config; choose another --workdir",
        "optimizer.learning_rate: 0.5 now, 0.0",
        "encoding.name: 'rope' now, 'nezha' in the folder",
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", "mine", "holds metrics.jsonl but no config.json"),
        ("checkpoints/weights.bin", "mine", "holds checkpoints but no config.json"),
        ("loss.png", "mine", "holds loss.png but no config.json"),
        ("config.json", '{"model_type": "bert"}', "config.json is not a saved config: it has no format_version"),
        ("config.json", "{", "config.json:1: not JSON"),
        ("tokenizer/vocab.txt", "[PAD]", "tokenizer is not a tokenizer that this run learnt"),
    ],
)
def test_a_folder_with_files_of_others(launcher, refused, tmp_path, name, content, said):
    workdir = tmp_path / "run"
    path = workdir / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    before = contents(workdir)
    assert_says(refused(launcher.argv(workdir), workdir), said, str(workdir))
    assert contents(workdir) == before


def test_a_workdir_that_is_a_file(launcher, refused, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert_says(refused(launcher.argv(tmp_path / "run"), tmp_path / "run"), f"{tmp_path / 'run'} is a file")
    assert_says(refused(launcher.argv(tmp_path / "run" / "a"), tmp_path), f"{tmp_path / 'run'} is a file")


def test_a_tokenizer_that_is_given_never_takes_the_place_of_another(launcher, unbroken, refused, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken / "tokenizer", workdir / "tokenizer")
    (workdir / "tokenizer" / TRAINING).unlink()
    vocabulary = (unbroken / "tokenizer" / "vocab.txt").read_text()
    (tmp_path / "vocab.txt").write_text(vocabulary + "more\n")
    argv = launcher.argv(workdir, f"--config.tokenizer.path={tmp_path / 'vocab.txt'}")
    assert_says(refused(argv, workdir), f"{workdir / 'tokenizer'} holds another tokenizer than the config names")


@pytest.mark.parametrize("file", ["train.txt", "dev.txt"])
def test_resuming_on_other_data(corpus, unbroken, refused, tmp_path, file):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    for split in ("train", "dev"):
        config = workdir / CONFIG  # the run of `unbroken`, as if its data lay here
        text = config.read_text()
        lay = next(word for word in text.split('"') if word.endswith(f"{split}.txt"))
        config.write_text(text.replace(lay, str(corpus.corpus / f"{split}.txt")))
    insert_line(corpus.corpus / file, 4, b"one more")
    printed = refused(corpus.argv(workdir), workdir)
    assert_says(printed, f"{corpus.corpus / file}", "changed since the checkpoints", "put back what was there")


def test_resuming_with_another_tokenizer(launcher, unbroken, refused, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    with (workdir / "tokenizer" / "vocab.txt").open("a") as file:
        file.write("more\n")
    assert_says(refused(launcher.argv(workdir), workdir), f"the tokenizer in {workdir / 'tokenizer'}", "changed since")


def test_initialising_from_what_is_no_run_or_another_model(launcher, unbroken, refused, tmp_path):
    workdir = tmp_path / "run"

    def tried(*arguments):
        return refused(launcher.argv(workdir, *arguments), workdir)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert_says(
        tried(f"--config.init_from={empty}"),
        f"init_from='{empty}' is neither a run folder nor a checkpoint's directory: it has no config.json",
    )
    wider = tried(f"--config.init_from={unbroken}", "--config.model.model_dim=32")
    assert_says(wider, f"init_from='{unbroken}' holds another model", "(16,) in the run, (32,) in the model")
    shutil.copy(unbroken / CONFIG, empty)
    shutil.copytree(unbroken / "tokenizer", empty / "tokenizer")
    assert_says(tried(f"--config.init_from={empty}"), f"there is no checkpoint in {empty / 'checkpoints'}")


def test_a_mistake_can_be_mended_in_the_same_folder(launcher, unbroken, tmp_path):
    """A real process shows the error alone, and leaves nothing that keeps the right command from running."""
    workdir = tmp_path / "run"
    wrong = launcher.argv(workdir, f"--config.init_from={unbroken}", "--config.model.model_dim=32")
    code, printed = launcher.run(wrong)
    assert code == MISTAKE and "Traceback" not in printed, printed
    assert_says(printed, "error: init_from=", "holds another model than the config describes")
    code, printed = launcher.run(launcher.argv(workdir))
    assert code == 0, printed
    assert (workdir / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
