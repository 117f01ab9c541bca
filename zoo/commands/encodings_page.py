"""docs/encodings.md: what every position encoding computes, costs and buys, from the code and from the finished comparison."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from zoo.commands.compare_report import Line, lines_of, markdown, read
from zoo.commands.made_blocks import with_blocks
from zoo.errors import UserError

RESULTS = Path("results") / "encodings.jsonl"
PICTURE = Path("pictures") / "encodings.png"
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
# What parameters are counted at: BERT-base.
SIZES = {"model_dim": 768, "num_heads": 12, "num_layers": 12, "max_length": 512}


def page(folder: Path) -> str:
    """The page in `folder` with its made parts as they should be now.

    Raises:
      UserError: there is no page, or it lacks a mark.
    """
    path = folder / "encodings.md"
    if not path.is_file():
        raise UserError(f"no page {path}, whose written parts stand between those that are made")
    made = {name: f"\n{text}\n\n" for name, text in blocks(read(folder / RESULTS)).items()}
    return with_blocks(path.read_text(encoding="utf-8"), made, by="`make docs`", where=str(path))


def blocks(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The parts of the page that are made, by name."""
    lines = {objective: lines_of(rows, objective) for objective in ("causal_lm", "masked_lm", "flip_flop")}
    return {
        "list": "\n".join(listing(lines)),
        **{objective: markdown(found).rstrip("\n") for objective, found in lines.items()},
        "formulas": "\n".join(formulas()),
    }


def listing(lines: Mapping[str, Sequence[Line]]) -> Iterator[str]:
    """A table: kinds of term, directions, parameters at BERT-base's size, cost and extrapolation where they were measured."""
    from zoo.encodings import registry

    yield "| encoding | brings | directions | parameters | speed | beyond 8 × | paper |"
    yield "|---|---|---|---:|---:|---:|---|"
    without = _parameters("none")
    for name in registry.names():
        cls = registry.get(name)
        facts = registry.build(name).facts()
        directions = [d for d, there in (("causal", facts.causal), ("bidirectional", facts.bidirectional)) if there]
        papers = dict.fromkeys(PAPER.findall(cls.__doc__))
        speed, change = _measured(name, lines)
        cells = (
            f"[`{name}`](#{name})",
            ", ".join(sorted(facts.kinds)).replace("_", " ") or "nothing",
            " and ".join(directions),
            f"{_parameters(name) - without:,}",
            speed,
            change,
            ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in papers),
        )
        yield f"| {' | '.join(cells)} |"


def _measured(name: str, lines: Mapping[str, Sequence[Line]]) -> tuple[str, str]:
    """Training speed relative to no encoding, and the change of loss from the training length to the longest, causal before masked."""
    for found in lines.values():
        of = {line.encoding.partition(":")[0]: line for line in found if line.values}
        if name in of:
            line = of[name]
            first, last = line.values[line.trained_at], line.values[max(line.values)]
            return f"{mean(line.speeds):.2f}", f"{mean(last) - mean(first):+.2f}" if last else "refused"
    return "", ""


def formulas() -> Iterator[str]:
    """Every encoding's docstring."""
    from zoo.encodings import registry

    for name in registry.names():
        summary, _, rest = inspect.getdoc(registry.get(name)).partition("\n")
        yield from (f"### {name}", "", "```text", summary, *rest.rstrip().splitlines(), "```", "")


def _parameters(name: str) -> int:
    """Parameters of a model of `SIZES` with one word and no feed-forward to speak of."""
    import jax
    import jax.numpy as jnp

    from kernels.attention import Positions
    from zoo.encodings import registry
    from zoo.models import build, preset

    config = preset("bert-base")
    part = registry.build(name)
    config["model"] |= SIZES | {"vocab_size": 1, "pooler": False, "causal": not part.facts().bidirectional}
    config |= {"encoding": name, "feed_forward": {"name": "gelu", "width": 1}}
    index = jnp.zeros((1, 2), jnp.int32)
    positions = Positions(index, sentence=index, within=index, contiguous=True)
    made = jax.eval_shape(
        lambda: build(config).init(jax.random.key(0), index, positions=positions if part.facts().sentences else None)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(made))
