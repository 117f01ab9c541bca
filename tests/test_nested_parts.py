"""A part as the argument of another, `scaling` of `rope`: in a config file, on the command line and back from JSON."""

import pytest

from zoo.config import completed, load_saved, plain, save_config
from zoo.encodings import registry
from zoo.encodings.rope_scaling import Yarn
from zoo.errors import UserError
from zoo.overrides import apply
from zoo.registry import to_config

YARN = {
    "name": "yarn",
    "factor": 8.0,
    "original_length": 2048,
    "fast": 32.0,
    "slow": 1.0,
    "ramp": "index",
    "attention_factor": None,
}


def overridden(*flags, scaling=None):
    tree = {"encoding": {"name": "rope", "theta": 5e5, "layout": "half", "fraction": 1.0, "scaling": scaling}}
    apply(tree, [tuple(flag.split("=", 1)) for flag in flags])
    return tree["encoding"]


def test_a_mapping_becomes_the_part_and_goes_back():
    part = registry.build({"name": "rope", "scaling": {"name": "yarn", "factor": 8, "original_length": 2048}})
    assert part.scaling == Yarn(8.0, 2048)
    assert to_config(part)["scaling"] == YARN
    assert registry.build(to_config(part)) == part and hash(part) is not None


def test_the_command_line_sets_it():
    assert overridden("encoding=rope:scaling=(yarn:factor=8,original_length=2048),theta=2")["scaling"] == YARN
    assert overridden("encoding.scaling=yarn:factor=8,original_length=2048")["scaling"] == YARN
    assert overridden("encoding=rope:scaling=llama3")["scaling"]["name"] == "llama3"
    assert overridden("encoding.scaling.factor=2", scaling=YARN)["scaling"] == {**YARN, "factor": 2.0}
    assert overridden("encoding.scaling=none", scaling=YARN)["scaling"] is None
    assert overridden("encoding=rope:scaling=none")["scaling"] is None


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("encoding.scaling=yran", "unknown rope scaling 'yran'; did you mean 'yarn'"),
        ("encoding=rope:scaling=(yarn:factr=2)", "yarn has no argument 'factr'; did you mean 'factor'"),
        ("encoding=rope:scaling=yarn", "rope scaling 'yarn' needs factor, original_length"),
        ("encoding.scaling=linear:factor=0.5", "factor=0.5 stretches positions"),
    ],
)
def test_mistakes_on_the_command_line(flag, reason):
    with pytest.raises(UserError, match=reason):
        overridden(flag)


def test_a_saved_config_rebuilds_it(tmp_path):
    config = completed({"encoding": {"name": "rope", "scaling": {"name": "linear", "factor": 2.0}}})
    save_config(config, tmp_path / "config.json")
    again = load_saved(tmp_path / "config.json")
    assert registry.build(plain(again.encoding)) == registry.build(
        {"name": "rope", "scaling": {"name": "linear", "factor": 2}}
    )


def test_a_wrong_argument_in_a_file_is_named():
    with pytest.raises(UserError, match=r"config.encoding.scaling: linear has no argument 'factr'"):
        completed({"encoding": {"name": "rope", "scaling": {"name": "linear", "factr": 2.0}}})
