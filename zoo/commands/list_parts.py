"""`python -m zoo list`: every registered part by kind, with its arguments and their defaults, and the presets."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator

from zoo.command_line import Parser
from zoo.errors import UserError, near
from zoo.parts import REGISTRIES, describe_fields, schema, summary

KINDS = (*REGISTRIES, "preset")


def main(argv: list[str]) -> int:
    """Prints the parts of one kind or of all.

    Raises:
      UserError: an unknown kind; names those nearby.
    """
    parser = Parser(prog="python -m zoo list", description=__doc__)
    parser.add_argument("kind", nargs="?", help=f"one of {', '.join(KINDS)}; all where left out")
    kind = parser.read(argv).kind
    if kind is not None and kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}; {near(kind, KINDS)}")
    for each in KINDS if kind is None else (kind,):
        print("\n".join(list_presets() if each == "preset" else list_kind(each)))
        print()
    return 0


def list_kind(key: str) -> Iterator[str]:
    """The lines about the parts that the config key `key` may choose from."""
    registry = schema(key)
    yield f"{registry.kind}, --config.{key}=NAME or NAME:argument=value,..."
    for name in registry.names():
        cls = registry.get(name)
        yield from _wrapped(f"  {name:<14}", summary(cls))
        yield from _wrapped(" " * 16, describe_fields(cls))


def list_presets() -> Iterator[str]:
    """The lines about the presets, with their parameter counts (nothing is allocated for them)."""
    from zoo.models import presets

    yield "preset: published models as plain data, zoo.models.preset(NAME)"
    for name in presets.names():
        model = presets.preset(name)["model"]
        size = f"{model['num_layers']} layers x {model['model_dim']}, vocabulary {model['vocab_size']}"
        yield f"  {name:<14}{preset_parameters(name):>13,} parameters, {size}"


def preset_parameters(name: str) -> int:
    """The number of parameters of a preset's model, embeddings and pooler included, heads not."""
    from zoo.models import build, preset
    from zoo.models.parameters import count_parameters, parameter_shapes

    return count_parameters(parameter_shapes(build(preset(name))))


def _wrapped(label: str, text: str) -> list[str]:
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    return textwrap.wrap(text, width, initial_indent=label, subsequent_indent=" " * 16) or [label]
