"""`python -m zoo tokenizer`: train a vocabulary on text files, show one, encode text with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from zoo.command_line import Parser
from zoo.errors import UserError, near
from zoo.overrides import parse_parts

USAGE = """usage: python -m zoo tokenizer train --files FILE [FILE ...] --size N --out DIR [--kind NAME[:argument=value,...]]
       python -m zoo tokenizer show PATH
       python -m zoo tokenizer encode PATH TEXT"""


def main(argv: list[str]) -> int:
    """Runs `train`, `show` or `encode`.

    Raises:
      UserError: no or an unknown action, files that cannot be read, a folder that already holds something.
    """
    actions = {"train": train, "show": show, "encode": encode}
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not argv or argv[0] not in actions:
        wrong = f"unknown action {argv[0]!r}; {near(argv[0], actions)}" if argv else "no action given"
        raise UserError(f"{wrong}\n{USAGE}")
    actions[argv[0]](argv[1:])
    return 0


def train(argv: list[str]) -> None:
    """Trains on the lines of the files and writes the vocabulary into a new folder."""
    parser = Parser(prog="python -m zoo tokenizer train")
    parser.add_argument("--files", nargs="+", required=True, help="plain text, UTF-8, also .gz and .xz")
    parser.add_argument("--size", type=int, required=True, help="pieces, special ones included")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--kind", default="wordpiece", help="such as sentencepiece, or wordpiece:lowercase=false")
    flags = parser.read(argv)
    if flags.out.exists() and (not flags.out.is_dir() or any(flags.out.iterdir())):
        raise UserError(f"{flags.out} exists and is not an empty folder; nothing was trained or overwritten")

    from zoo.data import registry as sources
    from zoo.data import texts
    from zoo.data.tokenizers import registry as tokenizers

    part = tokenizers.build(parse_parts(flags.kind, "tokenizer"))
    if not hasattr(part, "train"):
        trainable = [name for name in tokenizers if hasattr(tokenizers.get(name), "train")]
        raise UserError(f"a {part.name} tokenizer cannot be trained here, only {' or '.join(trainable)}")
    source = sources.build({"name": "text", "train": tuple(flags.files)})
    tokenizer = dataclasses.replace(part, size=flags.size).train(texts(source.records("train")))
    tokenizer.save(flags.out)
    print(f"{tokenizer.vocabulary.size} pieces in {flags.out}, fingerprint {tokenizer.fingerprint[:12]}")


def show(argv: list[str]) -> None:
    """Prints the size, the special pieces and the fingerprint of a vocabulary."""
    parser = Parser(prog="python -m zoo tokenizer show")
    parser.add_argument("path", type=Path, help="a vocabulary file, or a folder that holds one")
    tokenizer = _load(parser.read(argv).path)
    vocabulary = tokenizer.vocabulary
    print(f"pieces       {vocabulary.size}")
    for name in ("pad", "unk", "cls", "sep", "mask"):
        print(f"{name:<12} {getattr(vocabulary, name)}")
    print(f"fingerprint  {tokenizer.fingerprint}")


def encode(argv: list[str]) -> None:
    """Prints one line per piece of a text: its id, its text, and a mark where a word starts."""
    parser = Parser(prog="python -m zoo tokenizer encode")
    parser.add_argument("path", type=Path, help="a vocabulary file, or a folder that holds one")
    parser.add_argument("text")
    flags = parser.read(argv)
    tokenizer = _load(flags.path)
    pieces = tokenizer.encode(flags.text)
    for piece, starts in zip(pieces.ids.tolist(), pieces.word_starts.tolist(), strict=True):
        print(f"{piece:>7}  {'word' if starts else '    '}  {tokenizer.decode([piece])}")


def _load(path: Path):
    from zoo.data.tokenizers import load_tokenizer

    return load_tokenizer(path)
