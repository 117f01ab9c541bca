"""Configs: files, overrides that replace whole parts, the saved form, and what a user's mistake looks like."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from zoo.command_line import Parser, run_main, split_overrides
from zoo.config import difference, load_config, load_saved, parse_argument, save_config
from zoo.errors import UserError
from zoo.registry import Registry

ROOT = Path(__file__).resolve().parents[1]

encodings = Registry("encoding")
sources = Registry("data")


@encodings.register("rope")
@dataclasses.dataclass(frozen=True)
class Rope:
    theta: float = 10000.0
    layout: Literal["halves", "interleaved"] = "halves"


@encodings.register("t5")
@dataclasses.dataclass(frozen=True)
class T5:
    num_buckets: int = 32
    bidirectional: bool = True
    max_distance: int | None = 128

    def __post_init__(self):
        if self.num_buckets < 2:
            raise ValueError("num_buckets must be at least 2")


@encodings.register("none")
@dataclasses.dataclass(frozen=True)
class NoEncoding:
    pass


@sources.register("tsv")
@dataclasses.dataclass(frozen=True)
class Tsv:
    train: tuple[str, ...] = ()
    columns: tuple[int, ...] = (0, 1)
    separator: str = "\t"


@dataclasses.dataclass(frozen=True)
class Model:
    width: int
    dropout: float = 0.1
    heads: int | None = None
    encoding: str = "rope"


def schema(key: str) -> Registry | type | None:
    return {"encoding": encodings, "data": sources, "model": Model}.get(key)


CONFIG = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

def get_config(arg="small"):
    config = ConfigDict(dict(
        argument=arg,
        encoding=dict(name="rope", theta=500.0),
        pair=(dict(name="t5"), dict(name="rope")),
        data=dict(name="tsv"),
        model=dict(width=8, encoding="rope"),
        optimizer=dict(learning_rate=1e-3, betas=(0.9, 0.999), steps=100),
        init_from=placeholder(str),
        limit=placeholder(int),
        bf16=False,
        every=10,
    ))
    config.warmup = config.optimizer.get_ref("steps") // config.get_ref("every")
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def load(path, *flags: str, argument: str = "") -> ConfigDict:
    others, overrides = split_overrides(flags)
    assert not others
    return load_config(f"{path}:{argument}" if argument else str(path), overrides, schema)


def refusal(path, *flags: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, *flags)
    return str(caught.value)


def test_a_file_is_loaded_completed_and_locked(config_file):
    config = load(config_file)
    assert config.encoding.to_dict() == {"name": "rope", "theta": 500.0, "layout": "halves"}
    assert config.pair == (
        {"name": "t5"},
        {"name": "rope"},
    ), "'pair' is no registered kind, so its parts are left as they are"
    assert config.data.columns == (0, 1)
    assert config.model.to_dict() == {"width": 8, "dropout": 0.1, "heads": None, "encoding": "rope"}
    assert config.init_from is None and config.is_locked
    with pytest.raises(AttributeError):
        config.new = 1


def test_the_argument_reaches_get_config(config_file):
    assert load(config_file).argument == "small"
    assert load(config_file, argument="ner,size=tiny").argument == "ner,size=tiny"


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("optimizer.learning_rate=5e-4", "optimizer.learning_rate", 5e-4),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.steps=-3", "optimizer.steps", -3),
        ("optimizer.betas=(0.8, 1)", "optimizer.betas", (0.8, 1.0)),
        ("optimizer.betas=0.8,0.9", "optimizer.betas", (0.8, 0.9)),
        ("init_from=runs/a=b", "init_from", "runs/a=b"),
        ("init_from=none", "init_from", None),
        ("limit=7", "limit", 7),
        ("bf16=true", "bf16", True),
        ("model.width=16", "model.width", 16),
        ("model.heads=2", "model.heads", 2),
        ("model.dropout=0", "model.dropout", 0.0),
        ("model.encoding=t5", "model.encoding", "t5"),
        ("argument=none", "argument", "none"),
        ("encoding.theta=5e4", "encoding.theta", 5e4),
        ("encoding.layout=interleaved", "encoding.layout", "interleaved"),
        ("data.train=a.tsv,b.tsv", "data.train", ("a.tsv", "b.tsv")),
        ("data.train=('a,b.tsv',)", "data.train", ("a,b.tsv",)),
        ("data.separator=,", "data.separator", ","),
    ],
)
def test_a_value_is_set_with_the_type_it_has(config_file, flag, path, value):
    config = load(config_file, f"--config.{flag}")
    found = config
    for key in path.split("."):
        found = found[key]
    assert found == value and type(found) is type(value)


def test_an_override_reaches_what_is_computed_from_it(config_file):
    assert load(config_file, "--config.optimizer.steps=500").warmup == 50


def test_a_value_may_stand_in_the_next_argument(config_file):
    assert load(config_file, "--config.limit", "-1").limit == -1
    with pytest.raises(UserError, match="needs a value"):
        split_overrides(["--config.limit", "--config.bf16=true"])
    with pytest.raises(UserError, match="names no key"):
        split_overrides(["--config.=3"])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("none", {"name": "none"}),
        ("t5", {"name": "t5", "num_buckets": 32, "bidirectional": True, "max_distance": 128}),
        (
            "t5:num_buckets=8,bidirectional=false,max_distance=none",
            {"name": "t5", "num_buckets": 8, "bidirectional": False, "max_distance": None},
        ),
        (
            "t5+rope:theta=1e+4",
            (
                {"name": "t5", "num_buckets": 32, "bidirectional": True, "max_distance": 128},
                {"name": "rope", "theta": 1e4, "layout": "halves"},
            ),
        ),
    ],
)
def test_a_part_is_replaced_whole(config_file, text, part):
    encoding = load(config_file, f"--config.encoding={text}").encoding
    assert (encoding.to_dict() if isinstance(encoding, ConfigDict) else encoding) == part


def test_quoted_values_of_a_part_may_hold_separators(config_file):
    data = load(config_file, "--config.data=tsv:train=a.tsv,b.tsv,columns=(1, 0),separator=',x='").data
    assert data.to_dict() == {"name": "tsv", "train": ("a.tsv", "b.tsv"), "columns": (1, 0), "separator": ",x="}


def test_the_order_of_part_and_field_does_not_matter(config_file):
    for flags in [("--config.encoding=t5", "--config.encoding.num_buckets=4")] * 2:
        assert load(config_file, *flags).encoding.num_buckets == 4
        assert load(config_file, *reversed(flags)).encoding.num_buckets == 4


def test_one_part_of_several_is_set_by_its_index(config_file):
    config = load(config_file, "--config.encoding=t5+rope", "--config.encoding.1.theta=7")
    assert config.encoding[1]["theta"] == 7.0 and config.encoding[0]["name"] == "t5"
    message = refusal(config_file, "--config.encoding=t5+rope", "--config.encoding.theta=7")
    assert "config.encoding.0 (t5) or config.encoding.1 (rope)" in message


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("optimiser.learning_rate=1", ["config has no key 'optimiser'", "did you mean 'optimizer'"]),
        ("learning_rate=1", ["no key 'learning_rate'", "there is config.optimizer.learning_rate"]),
        ("optimizer.learning_rat=1", ["config.optimizer has no key", "did you mean 'learning_rate'"]),
        ("optimizer=adamw", ["config.optimizer is a group", "betas, learning_rate, steps"]),
        ("bf16.x=1", ["config.bf16 is a value (False)", "'x'"]),
        ("bf16=yes", ["--config.bf16", "expected bool", "'yes'"]),
        ("optimizer.steps=1.5", ["--config.optimizer.steps", "expected int", "1.5"]),
        ("optimizer.learning_rate=none", ["expected float", "None"]),
        ("every=0", ["config.warmup cannot be computed from the other values"]),
        ("optimizer.betas=(0.9, 'x')", ["expected float", "'x'"]),
        ("limit=many", ["expected int", "'many'"]),
        ("encoding=rop", ["config.encoding: unknown encoding 'rop'", "did you mean 'rope'"]),
        ("encoding=zzz", ["known: none, rope, t5"]),
        (
            "encoding=rope:thta=3",
            [
                "no argument 'thta'",
                "did you mean 'theta'",
                "theta: float = 10000.0",
                "layout: 'halves' | 'interleaved'",
            ],
        ),
        ("encoding.thta=3", ["no argument 'thta'", "theta: float = 10000.0"]),
        ("encoding=rope:theta", ["'theta' is not argument=value", "theta: float = 10000.0"]),
        ("encoding=rope:theta=1,theta=2", ["'theta' twice"]),
        ("encoding=rope:theta=big", ["argument 'theta'", "expected float", "'big'"]),
        ("encoding=rope:layout=half", ["expected 'halves' or 'interleaved'", "'half'"]),
        ("encoding=none:x=1", ["no argument 'x'", "none takes no arguments"]),
        ("encoding=t5:num_buckets=1", ["num_buckets must be at least 2"]),
        ("encoding.name=t5", ["--config.encoding=t5 replaces the whole part"]),
        ("model.widht=3", ["config.model: has no argument 'widht'; did you mean 'width'", "heads: int | None = None"]),
        ("model.heads=two", ["--config.model.heads", "expected int | None", "'two'"]),
        ("model.encoding=rop", ["config.model.encoding: unknown encoding 'rop'"]),
        ("data=tsv+tsv", ["config.data takes one part, not 2; only encoding takes several"]),
        ("pair=rope", ["config.pair cannot be replaced whole"]),
        ("encoding=", ["unknown encoding ''"]),
    ],
)
def test_a_wrong_override_says_what_would_be_right(config_file, flag, expected):
    message = refusal(config_file, f"--config.{flag}")
    for words in expected:
        assert words in message


def test_the_same_override_twice_is_refused(config_file):
    assert "--config.bf16 is given twice" in refusal(config_file, "--config.bf16=true", "--config.bf16=false")


def test_wrong_files_are_named_with_those_nearby(config_file, tmp_path):
    assert "small.py" in refusal(tmp_path / "smal.py") and "no config file" in refusal(tmp_path / "smal.py")
    assert "path.py:argument" in refusal(tmp_path / "small")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", "has no function get_config"),
        ("def get_config(arg):\n    return {}\n", "must return an ml_collections.ConfigDict, not dict"),
        ("def get_config(arg):\n\n    return 1 / 0\n", "bad.py:3: ZeroDivisionError"),
        ("def get_config(arg:\n", "bad.py:1: SyntaxError"),
        ("import no_such_module\n", "bad.py:1: ModuleNotFoundError"),
        (
            "from ml_collections import ConfigDict\ndef get_config(arg):\n    return ConfigDict(dict(a=dict(f=print)))\n",
            "config.a.f is a builtin_function_or_method",
        ),
        (
            "from ml_collections import ConfigDict\ndef get_config(arg):\n    return ConfigDict(dict(a=float('nan')))\n",
            "config.a is nan",
        ),
        (
            "from ml_collections import ConfigDict\nfrom ml_collections.config_dict import required_placeholder\n"
            "def get_config(arg):\n    return ConfigDict(dict(a=required_placeholder(int)))\n",
            "config.a must be given",
        ),
        (
            "from ml_collections import ConfigDict\ndef get_config(arg):\n    return ConfigDict(dict(encoding=dict(name='rop')))\n",
            "config.encoding: unknown encoding 'rop'; did you mean 'rope'",
        ),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config(arg):\n    return ConfigDict(dict(data=(dict(name='tsv'), dict(name='tsv'))))\n",
            "config.data takes one part, not 2",
        ),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config(arg):\n    return ConfigDict(dict(s=(dict(encoding=dict(name='rope', thta=1)),)))\n",
            "config.s.0.encoding: rope has no argument 'thta'",
        ),
    ],
)
def test_a_broken_config_file_is_explained(tmp_path, text, expected):
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert expected in refusal(path)


def test_an_argument_that_get_config_does_not_take_is_refused(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict(dict(a=1))\n")
    assert load(path).a == 1
    with pytest.raises(UserError, match="takes no argument, yet 'ner'"):
        load(path, argument="ner")


def test_a_config_file_may_define_dataclasses_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "with_class.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom ml_collections import ConfigDict\n"
        "@dataclasses.dataclass\nclass Size:\n    width: int = 3\n"
        "def get_config(arg):\n    return ConfigDict(dict(width=Size().width))\n"
    )
    before = set(sys.modules)
    assert load(path).width == 3
    assert not [name for name in set(sys.modules) - before if "with_class" in name]


def test_argument_grammar():
    assert parse_argument("ner,size=tiny,seed=3") == ("ner", {"size": "tiny", "seed": "3"})
    assert parse_argument("size=tiny") == ("", {"size": "tiny"})
    assert parse_argument(None) == ("", {})
    rules = {"tasks": ("pretrain", "ner"), "options": {"size": ("base", "tiny")}}
    assert parse_argument("", **rules) == ("pretrain", {"size": "base"})
    assert parse_argument("size=tiny", **rules) == ("pretrain", {"size": "tiny"})


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("nerr", "unknown task 'nerr' after the colon; did you mean 'ner'"),
        ("ner,sise=tiny", "unknown key 'sise' after the colon; did you mean 'size'"),
        ("ner,size=tinny", "size='tinny' after the colon: did you mean 'tiny'"),
        ("ner,tiny", "'tiny' after the colon is not key=value"),
        ("ner,size=tiny,size=base", "'size' is given twice"),
    ],
)
def test_wrong_arguments_are_refused(argument, expected):
    with pytest.raises(UserError) as caught:
        parse_argument(argument, tasks=("pretrain", "ner"), options={"size": ("base", "tiny")})
    assert expected in str(caught.value)


def test_saved_and_loaded_configs_are_equal(config_file, tmp_path):
    config = load(config_file, "--config.encoding=t5+rope", "--config.init_from=模型")
    save_config(config, tmp_path / "run" / "config.json")
    loaded = load_saved(tmp_path / "run" / "config.json")
    assert difference(config, loaded) == []
    assert loaded.encoding[1] == config.encoding[1] and loaded.optimizer.betas == (0.9, 0.999)
    assert loaded.is_locked and loaded.init_from == "模型"
    save_config(loaded, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "run" / "config.json").read_bytes()
    assert not list(tmp_path.glob("**/*.partial"))


def test_difference_names_each_value(config_file):
    a = load(config_file)
    b = load(config_file, "--config.optimizer.learning_rate=0.01", "--config.encoding=t5")
    assert difference(a, a) == []
    lines = difference(a, b, names=("now", "in the run"))
    assert "optimizer.learning_rate: 0.001 now, 0.01 in the run" in lines
    assert "encoding.name: 'rope' now, 't5' in the run" in lines
    assert "encoding.theta: 500.0 now, absent in the run" in lines
    assert "encoding.num_buckets: absent now, 32 in the run" in lines
    assert len(lines) == 7
    assert difference(ConfigDict({"x": 1}), ConfigDict({"x": True})) == ["x: 1 here, True there"]
    assert difference(ConfigDict({"x": 1}), ConfigDict({"x": 1.0})) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", ":1: not JSON"),
        ("[]", "has no format_version"),
        ('{"config": {}}', "has no format_version"),
        ('{"format_version": 99, "config": {}}', "newer version: format_version 99, this one reads up to 1"),
        ('{"format_version": 0, "config": {}}', "format_version 0 is none that was ever written"),
        ('{"format_version": "1", "config": {}}', "format_version '1'"),
        ('{"format_version": 1}', "holds no config"),
        ('{"format_version": 1, "config": {}, "code": "x"}', "unknown key 'code'"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_saved_config_that_is_not_one_is_refused(tmp_path, text, expected):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_saved(path)
    assert expected in str(caught.value) and str(path) in str(caught.value)


def test_missing_oversized_and_undecodable_saved_configs(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no saved config"):
        load_saved(tmp_path / "none.json")
    path = tmp_path / "config.json"
    path.write_bytes(b'{"format_version": 1, "config": {"a": "\xff"}}')
    with pytest.raises(UserError, match="not UTF-8"):
        load_saved(path)
    monkeypatch.setattr("zoo.config.LARGEST_SAVED_CONFIG", 10)
    with pytest.raises(UserError, match="at most 10"):
        load_saved(path)


def test_what_json_cannot_hold_is_not_saved(tmp_path):
    with pytest.raises(UserError, match=r"config\.a is inf"):
        save_config(ConfigDict({"a": float("inf")}), tmp_path / "config.json")
    with pytest.raises(UserError, match="keys are strings"):
        save_config(ConfigDict({"a": ({"b.c": 1},)}), tmp_path / "config.json")
    assert not list(tmp_path.iterdir())


def test_a_placeholder_is_saved_as_null(tmp_path):
    save_config(ConfigDict({"a": placeholder(int)}), tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["config"] == {"a": None}


def test_flags_are_not_guessed():
    parser = Parser(prog="train.py")
    parser.add_argument("--workdir", required=True)
    assert parser.read(["--workdir=a"]).workdir == "a"
    for argv, expected in [
        (["--workdir=a", "--workdirs=b"], "unknown flag --workdirs; did you mean '--workdir'"),
        (["--work=a", "--workdir=b"], "unknown flag --work"),
        (["--workdir=a", "more"], "unexpected argument 'more'"),
        ([], "--workdir"),
    ]:
        with pytest.raises(UserError) as caught:
            parser.read(argv)
        assert expected in str(caught.value)


def test_exit_codes(capsys):
    def mistaken(argv):
        raise UserError("the flag is wrong")

    def broken(argv):
        raise ZeroDivisionError

    assert run_main(mistaken, []) == 2
    assert capsys.readouterr().err == "error: the flag is wrong\n"
    assert run_main(lambda argv: None, []) == 0
    assert run_main(len, ["a", "b", "c"]) == 3
    with pytest.raises(ZeroDivisionError):
        run_main(broken, [])


PROGRAM = """
import sys
from zoo.command_line import run_main, split_overrides
from zoo.config import load_config

def main(argv):
    others, overrides = split_overrides(argv)
    print(load_config(others[0], overrides).learning_rate)

sys.exit(run_main(main))
"""


def test_a_mistake_exits_with_2_and_no_traceback(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config(arg):\n    return ConfigDict(dict(learning_rate=1.0))\n"
    )

    def run(*flags):
        command = [sys.executable, "-c", PROGRAM, str(path), *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    right = run("--config.learning_rate=3")
    assert (right.returncode, right.stdout) == (0, "3.0\n"), right.stderr
    wrong = run("--config.learning_rat=3")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: config has no key 'learning_rat'; did you mean 'learning_rate'")
    assert "Traceback" not in wrong.stderr
