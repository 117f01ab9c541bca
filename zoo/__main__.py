"""`python -m zoo COMMAND`: what stands beside training and scoring."""

from __future__ import annotations

import importlib
import sys

from zoo.command_line import run_main
from zoo.errors import UserError, near

# Command → (module with `main(argv)`, what it does). A module is imported only when its command is called.
COMMANDS: dict[str, tuple[str, str]] = {
    "list": ("zoo.commands.list_parts", "every part by kind, with its arguments, and the presets"),
    "tokenizer": ("zoo.commands.tokenizer", "train a vocabulary on files; show one; encode text with it"),
    "prepare": ("zoo.commands.prepare", "write a TFDS data set, or one from your own files, for the source tfds"),
    "convert": (
        "zoo.commands.convert",
        "a checkpoint of another library to a run folder of ours, or a run to a checkpoint",
    ),
    "selfcheck": ("zoo.commands.selfcheck", "versions, devices, and every attention kernel against its plain twin"),
    "compare": ("zoo.commands.compare", "train small models with every position encoding, everything else equal"),
    "docs": ("zoo.commands.docs", "write the tables under docs/ that are made from the code"),
    "demo": ("zoo.demo", "pretrain, fine-tune and compare on text that is already on this machine"),
}


def usage() -> str:
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m zoo COMMAND [...]", "", *lines, "", "python -m zoo COMMAND --help says more."])


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit code.

    Raises:
      UserError: no command, or an unknown one; names those nearby.
    """
    if not argv:
        raise UserError(f"no command given\n{usage()}")
    if argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; {near(argv[0], COMMANDS)}")
    module, _ = COMMANDS[argv[0]]
    return importlib.import_module(module).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(run_main(main))
