"""The built-in source, on the packages whose harvest is quick."""

import collections
import json
import os
import re
import subprocess
import sys

import pytest

from zoo.data import docstring_items, docstrings
from zoo.data.builtin import BuiltinSource
from zoo.data.docstring_items import Runs, split_of
from zoo.data.docstrings import Docstring
from zoo.errors import UserError

PACKAGES = ("numpy", "scipy")
LABELLED = ("parameter_names", "parameter_types")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("harvest")


@pytest.fixture(scope="module")
def sources(cache):
    return {s: BuiltinSource(s, packages=PACKAGES).with_cache(cache) for s in ("text", *LABELLED)}


def text_of(record):
    return record.fields["text"] if "text" in record.fields else " ".join(record.fields["words"])


def module_of(record):
    return record.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_the_splits_are_disjoint_by_module_and_follow_the_rule(sources):
    for subset, source in sources.items():
        modules = {split: {module_of(r) for r in source.records(split)} for split in source.splits()}
        for split, names in modules.items():
            assert names and {split_of(name) for name in names} == {split}, (subset, split)
    assert sources["text"].splits() == ("train", "dev")


def test_about_a_fifth_of_modules_is_held_out():
    counts = collections.Counter(split_of(f"package.module_{k}") for k in range(5000))
    assert counts["train"] == pytest.approx(4000, abs=120)
    assert counts["dev"] == pytest.approx(250, abs=60)
    assert split_of("numpy.linalg._linalg") == "train" and split_of("numpy.ma.core") == split_of("numpy.ma.core")


def test_text_is_prose_with_the_objects_name_before_it(sources):
    records = list(sources["text"].records("train"))
    assert len(records) > 3000
    assert sum(len(text_of(r)) for r in records) > 1_500_000
    found = next(r for r in records if r.file == "numpy/linalg/_linalg.py" and r.fields["text"].startswith("svd "))
    assert "it is factorized as" in found.fields["text"] and ">>>" not in found.fields["text"]
    assert found.line > 100
    assert not any(re.search(r"\s\s|-{4}", text_of(r)) for r in records[:1000])


def test_no_two_labelled_texts_are_equal_and_no_test_item_stands_in_the_training_text(sources):
    training = [text_of(r) for s in ("text", *LABELLED) for r in sources[s].records("train")]
    runs = Runs(training)
    for subset in LABELLED:
        texts = [text_of(r) for split in ("train", "dev", "test") for r in sources[subset].records(split)]
        assert len(set(texts)) == len(texts)
        for split in ("dev", "test"):
            assert max(runs.overlap(text_of(r)) for r in sources[subset].records(split)) < 0.5


def test_parameter_names_are_tagged_by_the_signature(sources):
    source = sources["parameter_names"]
    counts = {split: len(list(source.records(split))) for split in source.splits()}
    assert counts["train"] == 400 and counts["dev"] >= 60 and counts["test"] >= 250
    for record in source.records("train"):
        words, tags = record.fields["words"], record.fields["tags"]
        assert len(words) == len(tags) <= 40 and set(tags) == {"O", "B-PARAM"}
    positive = [tag != "O" for r in source.records("train") for tag in r.fields["tags"]]
    assert 0.04 < sum(positive) / len(positive) < 0.12


def test_parameter_types_are_balanced(sources):
    source = sources["parameter_types"]
    train = collections.Counter(r.fields["label"] for r in source.records("train"))
    assert train == dict.fromkeys(docstring_items.TYPES, 50)
    test = collections.Counter(r.fields["label"] for r in source.records("test"))
    assert set(test) == set(docstring_items.TYPES)
    assert max(test.values()) <= 100 and sum(test.values()) > 200
    assert max(test.values()) < 0.45 * sum(test.values())


def test_the_seed_draws_the_labelled_texts_and_nothing_else(sources):
    for subset in LABELLED:
        first, second = sources[subset], BuiltinSource(subset, seed=1, packages=PACKAGES, cache=sources[subset].cache)
        assert list(first.records("test")) == list(second.records("test"))
        assert list(first.records("dev")) == list(second.records("dev"))
        a, b = ({text_of(r) for r in s.records("train")} for s in (first, second))
        assert len(a) == len(b) and a != b
        assert first.fingerprint() != second.fingerprint()


def test_two_harvests_are_equal_whatever_the_hash_seed(tmp_path):
    code = (
        "from zoo.data.builtin import BuiltinSource as S; s = S('parameter_types', packages=('optax', 'flax'));"
        "print(s.fingerprint(), [r.fields['text'] for r in s.records('train')][:5])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] and len(outputs[0]) > 64


def test_a_kept_harvest_is_reused_and_a_damaged_one_made_anew(tmp_path, monkeypatch):
    source = BuiltinSource("text", packages=("optax",))
    fresh = source.fingerprint()
    kept = source.with_cache(tmp_path / "new")
    assert kept.fingerprint() == fresh
    (file,) = (tmp_path / "new").iterdir()
    assert file.name.startswith("builtin-") and json.loads(file.read_bytes().split(b"\n", 1)[0])["sha256"]

    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "harvest", lambda packages: pytest.fail("harvested although it was kept"))
        assert source.with_cache(tmp_path / "new").fingerprint() == fresh

    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], b"", b"[]\n"):
        file.write_bytes(damaged)
        assert source.with_cache(tmp_path / "new").fingerprint() == fresh
        assert file.read_bytes() == whole
    assert [f.name for f in (tmp_path / "new").iterdir()] == [file.name]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of our own, whose text a test may change."""
    folder = tmp_path / "site" / "grown"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""A package of which the text is known."""\n')
    (folder / "tests" / "__init__.py").write_text('"""Tests are never read at all."""\n')
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_changed_source_files_are_harvested_again(package, tmp_path):
    source = BuiltinSource("text", packages=("grown",)).with_cache(tmp_path / "cache")
    before = source.fingerprint()
    (package / "more.py").write_text('"""Another sentence of quite plain words."""\n')
    after = BuiltinSource("text", packages=("grown",)).with_cache(tmp_path / "cache")
    assert after.fingerprint() != before
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_files_that_cannot_be_parsed_are_left_out_with_a_warning(package, caplog):
    (package / "template.py").write_text('"""Text of a template."""\ndef {{ name }}(): pass\n')
    harvested = list(docstrings.harvest(("grown", "absent_package")))
    assert [d.text for d in harvested] == ["A package of which the text is known."]
    assert "template.py" in caplog.text and "absent_package is not installed" in caplog.text
    assert docstrings.versions(("grown", "absent_package")) == {"grown": "unknown"}


def test_what_ast_reads(package):
    (package / "code.py").write_text(
        '"""Module."""\n'
        "import nothing_of_this_is_imported\n"
        "class Thing:\n"
        '    """Class."""\n'
        "    if True:\n"
        "        async def run(self, a, /, b, *rest, key=1, **more):\n"
        '            """\n            Method.\n\n              Indented.\n            """\n'
    )
    module, thing, run = [d for d in docstrings.harvest(("grown",)) if d.module == "grown.code"]
    assert (module.name, module.text, module.line) == ("code", "Module.", 1)
    assert (thing.name, thing.text, thing.parameters) == ("Thing", "Class.", ())
    assert run == Docstring(
        "grown.code", "run", ("a", "b", "rest", "key", "more"), "Method.\n\n  Indented.", "grown/code.py", 6
    )


def test_topics_of_the_language_reference():
    topics = [
        d
        for path, relative in docstrings.source_files("python")
        if relative == docstrings.TOPICS
        for d in docstrings._docstrings_of(path, relative)
    ]
    assert len(topics) > 50
    assert {d.module for d in topics if d.name == "lambda"} == {"pydoc_data.topics.lambda"}


DOCSTRING = Docstring(
    module="m",
    name="resample",
    parameters=("x", "num", "kind"),
    text="""Resample `x` to ``num`` samples along the axis.

Heading
-------
>>> a doctest that is no prose at all

The 'kind' decides how; it's just a name. 1 2 3

+---+---+ 11 22 33 44 55 66 77

Parameters
----------
x : array_like, shape (n,)
    The data to be resampled.
num : int or None, optional
    The number of samples
    in the resampled signal.

    A second paragraph.
kind : {'linear', 'cubic'}
    The name of the method.
axis : int
    Short.
scale, shift : float, default 1.0
    Both are applied to the data.
both : int or str
    Not clearly of one type.
check : bool
    Whether to check the data.
fn : callable ``f(x)``
    Called with every single sample.

Returns
-------
y : ndarray
    Results are no parameters here.
""",
    file="m.py",
    line=3,
)


def test_prose_by_hand():
    assert docstring_items.prose(DOCSTRING.text)[:2] == [
        "Resample `x` to ``num`` samples along the axis.",
        "The 'kind' decides how; it's just a name. 1 2 3",
    ]


def test_parameter_names_by_hand():
    item = docstring_items.parameter_names(DOCSTRING)
    assert " ".join(item.fields["words"]) == (
        "Resample x to num samples along the axis . The kind decides how ; it's just a name . 1 2 3"
    )
    tagged = [w for w, t in zip(item.fields["words"], item.fields["tags"], strict=True) if t == "B-PARAM"]
    assert tagged == ["x", "num", "kind"]


def test_parameter_types_by_hand():
    assert [(i.fields["text"], i.fields["label"]) for i in docstring_items.parameter_types(DOCSTRING)] == [
        ("x : The data to be resampled.", "array"),
        ("num : The number of samples in the resampled signal. A second paragraph.", "int"),
        ("kind : The name of the method.", "str"),
        ("scale, shift : Both are applied to the data.", "float"),
        ("check : Whether to check the data.", "bool"),
        ("fn : Called with every single sample.", "callable"),
    ]


def test_overlap_is_the_share_of_runs_of_eight_words():
    runs = Runs(["one two three four five six seven eight nine ten", "alpha beta"])
    assert runs.overlap("One, two three four five six seven eight!") == 1.0
    assert runs.overlap("zero one two three four five six seven eight") == 0.5
    assert runs.overlap("one two three four five six seven nine eight") == 0.0
    assert runs.overlap("nine ten alpha beta one two three four") == 0.0
    assert runs.overlap("too short to tell") == 1.0
    assert Runs([]).overlap("one two three four five six seven eight") == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: list(BuiltinSource("text", packages=("optax",)).records("tset")), "no split 'tset'.*train"),
        (lambda: BuiltinSource(packages=("nump y",)), "'nump y' is no package name; did you mean 'numpy'"),
        (lambda: BuiltinSource(packages=("absent_package",)), "none of the packages absent_package is installed"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UserError, match=message):
        make()
