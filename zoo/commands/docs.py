"""`python -m zoo docs`: the tables under docs/ that are made from the code."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

from zoo.atomic import write_atomically
from zoo.command_line import Parser
from zoo.commands import checkpoints_page, encodings_page
from zoo.commands.list_parts import preset_parameters
from zoo.errors import UserError
from zoo.parts import REGISTRIES, describe_fields, schema, summary

MADE = "<!-- Made from the code by `make docs`; a test fails when it is stale. -->"


def main(argv: list[str]) -> int:
    """Writes the tables, or with --check names the stale ones and returns 1.

    Raises:
      UserError: the folder does not exist.
    """
    parser = Parser(prog="python -m zoo docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is stale")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the tables stand, by default docs")
    parser.add_argument("--pictures", action="store_true", help="also draw the pictures anew, half a minute")
    flags = parser.read(argv)
    if not flags.folder.is_dir():
        raise UserError(f"no folder {flags.folder}; run this in the repository, or name it with --folder")
    made = {name: "\n".join(make()) + "\n" for name, make in TABLES.items()}
    made["encodings.md"] = encodings_page.page(flags.folder)
    made["checkpoints.md"] = checkpoints_page.page(flags.folder)
    stale = 0
    for name, text in made.items():
        path = flags.folder / name
        present = path.read_text(encoding="utf-8") if path.is_file() else ""
        if present == text:
            continue
        stale += 1
        if flags.check:
            print(f"{path} is stale; `make docs` writes it")
            print(
                "\n".join(
                    difflib.unified_diff(present.splitlines(), text.splitlines(), "there", "now", lineterm="", n=0)
                )
            )
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    if flags.pictures:
        from zoo.commands.encoding_pictures import contact_sheet  # needs jax and matplotlib

        write_atomically(flags.folder / encodings_page.PICTURE, contact_sheet())
        print(f"drew {flags.folder / encodings_page.PICTURE}")
    return 1 if flags.check and stale else 0


def parts() -> Iterator[str]:
    """docs/parts.md: every part by kind, with its arguments."""
    yield from ("# Parts", "", MADE, "")
    yield "What `python -m zoo list` prints: a config chooses a part by `dict(name=..., argument=value)`, the command line by"
    yield "`--config.KEY=NAME:argument=value`."
    for key in REGISTRIES:
        registry = schema(key)
        yield from ("", f"## {registry.kind} (`{key}`)", "", "| name | what it is | arguments |", "|---|---|---|")
        for name in registry.names():
            cls = registry.get(name)
            yield f"| `{name}` | {_cell(summary(cls))} | {_code(describe_fields(cls))} |"


def compatibility() -> Iterator[str]:
    """docs/compatibility.md: every encoding with every mixer, and why not where not."""
    import zoo
    from zoo.encodings import registry as encodings
    from zoo.mixers import registry as mixers

    yield from ("# Which encoding goes with which mixer", "", MADE, "")
    yield "By `zoo.compatible(encoding, mixer)`: each with its default arguments. Building a refused pair raises the reason."
    yield from ("", f"| encoding | {' | '.join(f'`{m}`' for m in mixers)} |", "|---" * (1 + len(mixers.names())) + "|")
    reasons: list[str] = []
    for encoding in encodings:
        cells = []
        for mixer in mixers:
            answer = zoo.compatible(encoding, mixer)
            if not answer:
                reasons.append(answer.reason)
            cells.append(_directions(encoding, mixer) if answer else f"no ({len(reasons)})")
        yield f"| `{encoding}` | {' | '.join(cells)} |"
    if reasons:
        yield ""
        yield from (f"{i}. {_cell(reason)}" for i, reason in enumerate(reasons, start=1))


def _directions(encoding: str, mixer: str) -> str:
    import zoo
    from kernels.attention import AttentionMask

    possible = {
        "bidirectional": zoo.compatible(encoding, mixer, mask=AttentionMask()),
        "causal": zoo.compatible(encoding, mixer, mask=AttentionMask(causal=True)),
    }
    grouped = " (no grouped heads)" if not zoo.compatible(encoding, mixer, grouped_heads=True) else ""
    return ", ".join(name for name, answer in possible.items() if answer) + grouped


def parameters() -> Iterator[str]:
    """docs/parameters.md: the presets and how many parameters they have."""
    from zoo.models import presets

    yield from ("# Presets", "", MADE, "")
    yield "Parameters of the encoder with its embeddings and pooler, without heads; nothing is allocated to count them."
    yield from ("", "| preset | layers | width | heads | vocabulary | encoding | mixer | feed-forward | parameters |")
    yield "|---|---:|---:|---:|---:|---|---|---|---:|"
    for name in presets.names():
        preset = presets.preset(name)
        model = preset["model"]
        sizes = " | ".join(str(model[key]) for key in ("num_layers", "model_dim", "num_heads", "vocab_size"))
        chosen = " | ".join(f"`{preset[key]['name']}`" for key in ("encoding", "mixer", "feed_forward"))
        yield f"| `{name}` | {sizes} | {chosen} | {preset_parameters(name):,} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(fields: str) -> str:
    return fields if fields == "no arguments" else f"`{_cell(fields)}`"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "parts.md": parts,
    "compatibility.md": compatibility,
    "parameters.md": parameters,
}
