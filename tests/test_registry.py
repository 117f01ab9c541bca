"""Names to parts: what a registry takes, what it refuses, and that every part of the house keeps the contract."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest

from zoo.errors import UserError, near
from zoo.parts import REGISTRIES, describe_fields, field_defaults, field_types, schema, spell_type, summary
from zoo.registry import Registry, coerce, make, to_config


@pytest.fixture
def registry():
    registry = Registry("encoding")

    @registry.register("rope")
    @dataclasses.dataclass(frozen=True)
    class Rope:
        """Rotary positions.

        More about them.
        """

        theta: float = 10000.0
        layout: Literal["half", "interleaved"] = "half"
        sizes: tuple[int, ...] = ()

        def __post_init__(self):
            if self.theta <= 0:
                raise ValueError(f"theta must be positive, not {self.theta}")

    @registry.register("table")
    @dataclasses.dataclass(frozen=True)
    class Learned:
        rows: int

    return registry


def test_a_part_is_built_from_a_name_a_mapping_or_itself(registry):
    rope = registry.build("rope")
    assert rope == registry.build({"name": "rope"}) == registry.build(rope)
    built = registry.build({"name": "rope", "theta": 500, "sizes": [1, 2]})
    assert built.theta == 500.0 and type(built.theta) is float and built.sizes == (1, 2)
    assert registry.names() == tuple(registry) == ("rope", "table")
    assert rope.name == "rope" and hash(rope) == hash(registry.build("rope"))


def test_a_part_becomes_its_config_and_back(registry):
    rope = registry.build({"name": "rope", "theta": 3, "sizes": (4,)})
    assert to_config(rope) == {"name": "rope", "theta": 3.0, "layout": "half", "sizes": (4,)}
    assert registry.build(to_config(rope)) == rope


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("rop", "unknown encoding 'rop'; did you mean 'rope'"),
        ({"name": "rope", "thta": 1}, "encoding 'rope' has no argument 'thta'; did you mean 'theta'"),
        ({"name": "rope", "theta": "big"}, "encoding 'rope', argument 'theta': expected float, got 'big'"),
        ({"name": "rope", "theta": True}, "expected float, got True"),
        ({"name": "rope", "layout": "quarter"}, "expected 'half' or 'interleaved', got 'quarter'"),
        ({"name": "rope", "sizes": (1, 2.5)}, "expected int, got 2.5"),
        ({"name": "rope", "theta": -1}, "encoding 'rope': theta must be positive, not -1.0"),
        ({"name": "table"}, "encoding 'table' needs rows"),
        ({"theta": 1}, "encoding: expected a name or a mapping with 'name'"),
        (3, "not 3"),
    ],
)
def test_a_wrong_config_says_what_would_be_right(registry, config, expected):
    with pytest.raises(UserError) as caught:
        registry.build(config)
    assert expected in str(caught.value)


def test_registering_twice_or_something_mutable_is_a_fault_of_the_program(registry):
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("rope")(registry.get("rope"))
    with pytest.raises(TypeError, match="must be a frozen dataclass"):
        registry.register("list")(list)
    with pytest.raises(TypeError, match="must be a frozen dataclass"):
        registry.register("loose")(dataclasses.make_dataclass("Loose", ["a"]))


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        (1, int, 1),
        (None, int | None, None),
        ([1, (2, 3)], tuple[int, tuple[float, ...]], (1, (2.0, 3.0))),
        ("a", Literal["a", "b"] | None, "a"),
        ("anything", Any, "anything"),
        (False, bool, False),
    ],
)
def test_coercion_converts_only_integers_and_lists(value, hint, expected):
    found = coerce(value, hint, "here")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1.0, int),
        (True, int),
        (1, bool),
        (1, str),
        ("1", int),
        ((1,), tuple[int, int]),
        ("c", Literal["a", "b"]),
        (None, int),
    ],
)
def test_coercion_refuses_the_rest(value, hint):
    with pytest.raises(UserError, match="here: expected"):
        coerce(value, hint, "here")


def test_make_serves_groups_that_are_no_parts():
    @dataclasses.dataclass(frozen=True)
    class Sizes:
        width: int
        depth: int = 2

    assert make(Sizes, {"width": 3}, "model") == Sizes(3, 2)
    with pytest.raises(UserError, match="model has no argument 'widht'; did you mean 'width'"):
        make(Sizes, {"widht": 3}, "model")


def test_near_names():
    assert near("rop", ["rope", "t5"]) == "did you mean 'rope'? (known: rope, t5)"
    assert near("zzz", ["rope", "t5"]) == "known: rope, t5"


def test_a_part_describes_itself(registry):
    rope = registry.get("rope")
    assert summary(rope) == "Rotary positions."
    assert describe_fields(rope) == (
        "theta: float = 10000.0, layout: 'half' | 'interleaved' = 'half', sizes: tuple[int, ...] = ()"
    )
    assert describe_fields(registry.get("table")) == "rows: int"
    assert spell_type(Literal["a"] | None) == "'a' | None"


ALL_PARTS = [(key, name) for key in REGISTRIES for name in schema(key).names()]


@pytest.mark.parametrize(("key", "name"), ALL_PARTS)
def test_every_part_of_the_house_is_a_described_hashable_value(key, name):
    cls = schema(key).get(name)
    assert summary(cls), f"{cls} has no docstring"
    required = {field: "x" if hint is str else 8 for field, hint in field_types(cls).items()}
    for field in field_defaults(cls):
        del required[field]
    if name == "tfds":
        required["text"] = "text"  # it asks for the columns of text or of tagged words, whichever the data set has
    part = schema(key).build({"name": name, **required})
    assert isinstance(hash(part), int)
    assert schema(key).build(to_config(part)) == part


def test_every_kind_has_a_part():
    assert {key for key, _ in ALL_PARTS} == set(REGISTRIES)
