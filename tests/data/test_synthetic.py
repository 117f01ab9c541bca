"""Sources drawn by rule: the rows follow from where they stand, and a reader who knows the rule alone finds every answer."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from zoo.data import registry
from zoo.data.synthetic import passkey
from zoo.errors import UserError

SIZES = {"train_examples": 30, "dev_examples": 20, "test_examples": 10}
SOURCES = {
    "flip_flop": dict(length=64, ignore=0.6),
    "mqar": dict(length=48, pairs=6, vocabulary=32),
    "copy": dict(length=20, shortest=2),
    "passkey": dict(length=120),
}


def source(name, **values):
    return registry.build({"name": name, **SIZES, **SOURCES[name], **values})


def read_flip_flop(words):
    """Word by word: the bit last written."""
    kept, found = None, {}
    for at in range(0, len(words), 2):
        if words[at] == "w":
            kept = words[at + 1]
        elif words[at] == "r":
            found[at + 1] = kept
    return found


def read_mqar(words):
    """Key by key: what stood behind it when it came first, where it comes again."""
    values, found = {}, {}
    for at in range(0, len(words), 2):
        if at < 2 * 6:
            values[words[at]] = words[at + 1]
        elif words[at] in values:
            found[at + 1] = values[words[at]]
    return found


def read_copy(words):
    middle = words.index("again")
    return {middle + k: words[k] for k in range(1, middle)}


def read_passkey(words):
    text = " ".join(words)
    key = text.split("The pass key is ", 1)[1].split(" .")[0].split()
    assert text.count(" ".join(key)) == 3
    return dict(enumerate(key, start=len(words) - len(key)))


@pytest.mark.parametrize("name", SOURCES)
def test_a_reader_who_knows_the_rule_finds_every_answer(name):
    read = {"flip_flop": read_flip_flop, "mqar": read_mqar, "copy": read_copy, "passkey": read_passkey}[name]
    made = source(name)
    for record in made.records("train"):
        words, answers = record.fields["words"], record.fields["answers"]
        assert read(words) == {answer: words[answer] for answer in answers} and list(answers) == sorted(answers)
        assert len(words) == made.length or (name == "copy" and len(words) < made.length)
        assert not any(len(word.split()) != 1 for word in words)


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_a_function_of_seed_split_and_index(name):
    made = source(name)
    rows = {split: [record.fields["words"] for record in made.records(split)] for split in made.splits()}
    assert {split: len(words) for split, words in rows.items()} == {"train": 30, "dev": 20, "test": 10}
    assert len({row for words in rows.values() for row in words}) == 60, "no row twice, in whatever split"
    assert made.record("dev", 7).fields["words"] == rows["dev"][7]
    assert (made.record("dev", 7).file, made.record("dev", 7).line) == (f"{name}:dev", 8)
    assert dataclasses.replace(made, train_examples=3).record("dev", 7) == made.record("dev", 7)
    assert dataclasses.replace(made, seed=1).record("dev", 7) != made.record("dev", 7)
    prints = {made.fingerprint(), source(name).fingerprint(), made.at_length(made.length + 2).fingerprint()}
    assert len(prints) == 2
    assert dataclasses.replace(made, test_examples=0).splits() == ("train", "dev")
    with pytest.raises(UserError, match=r"has no split 'tets'; did you mean 'test'"):
        made.records("tets")


def test_flip_flop_has_the_frequencies_it_says():
    made = source("flip_flop", length=4000, ignore=0.9)
    words = made.record("train", 0).fields["words"]
    counts = Counter(words[0::2])
    assert (words[0], words[-2]) == ("w", "r")
    assert counts["i"] == pytest.approx(1800, abs=60) and counts["w"] == pytest.approx(100, abs=40)
    free = [bit for instruction, bit in zip(words[0::2], words[1::2], strict=True) if instruction != "r"]
    assert Counter(free)["1"] == pytest.approx(950, abs=100)


def test_keys_are_asked_soon_rather_than_late_and_fillers_belong_to_nobody():
    gaps, n = Counter(), 6
    for record in source("mqar", length=240, train_examples=200).records("train"):
        words, answers = record.fields["words"], record.fields["answers"]
        assert len(answers) == n
        pairs, fill = (
            set(words[: 2 * n]),
            [w for k, w in enumerate(words) if k >= 2 * n and not {k, k + 1} & set(answers)],
        )
        assert not pairs & set(fill) and len(pairs) == 2 * n and len(set(fill)) == 32 - 2 * n
        gaps.update(answer // 2 - n for answer in answers)
    late = sum(count for gap, count in gaps.items() if gap >= 54)  # 600 if all were alike
    assert gaps[0] > 120 and 120 < late < 300


def test_copies_at_another_length_are_all_of_it():
    made = source("copy")
    lengths = {len(record.fields["words"]) for record in made.records("train")}
    assert min(lengths) >= 6 and len(lengths) > 4 and max(lengths) <= 20
    assert {len(record.fields["words"]) for record in made.at_length(32).records("dev")} == {32}


def test_the_key_stands_where_depth_says():
    def place(depth, length=400):
        words = source("passkey", length=length, depth=depth).record("dev", 0).fields["words"]
        told = next(k for k in range(len(words)) if words[k : k + 4] == ("The", "pass", "key", "is"))
        return (told - len(passkey.TASK.split())) / (length - 67)

    assert place(0.0) == 0
    assert place(1.0) == pytest.approx(1, abs=0.02)
    assert place(0.5) == pytest.approx(0.5, abs=0.02)
    assert place(None) == pytest.approx(place(None, 800), abs=0.02), "one row at whatever length"
    assert source("passkey", length=67).record("dev", 0).fields["answers"] == tuple(range(62, 67))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("flip_flop", {"length": 7}, r"'flip_flop': length is 7; pairs make an even number"),
        ("flip_flop", {"ignore": 1.5}, "ignore is 1.5; it is a probability"),
        ("mqar", {"length": 22}, r"6 pairs, each asked once, need an even number, at least 24"),
        ("mqar", {"vocabulary": 12}, "at least 14"),
        ("mqar", {"power": 0.0}, "power is 0.0; it must be above 0"),
        ("copy", {"length": 9}, "length is 9; it must be even"),
        ("copy", {"shortest": 10}, "a row of 20 words copies 1 to 9"),
        ("copy", {"vocabulary": 1}, "vocabulary is 1"),
        ("passkey", {"length": 66}, "without any filler a row has 67 words"),
        ("passkey", {"depth": 2.0}, "depth is 2.0"),
        ("passkey", {"digits": 0}, "digits is 0"),
        ("copy", {"dev_examples": -1}, "dev_examples is -1"),
        ("copy", {"seed": -1}, "seed is -1"),
    ],
)
def test_refusals(name, values, message):
    with pytest.raises(UserError, match=message):
        source(name, **values)
