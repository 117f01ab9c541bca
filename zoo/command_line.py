"""What every command does with its arguments and with what a user can mend: say what was wrong, exit with a code, no traceback."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from zoo.errors import RunStopped, UserError, WriteFailed, near

FAULT = 1  # exit code for a fault of the program
MISTAKE = 2  # exit code for something the user can mend
NOT_WRITTEN = 4  # exit code for a full disk, or a folder or file that may not be written to
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
# Errors that the machine makes, never a program.
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` where argparse would exit, and takes no abbreviated flag."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{self.format_usage().rstrip()}")

    def flags(self) -> list[str]:
        """The flags this parser takes, such as `--workdir`."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments as a namespace.

        Raises:
          UserError: an unknown flag, a missing or wrong value; names the flags nearby.
        """
        namespace, unknown = self.parse_known_args(list(argv))
        for argument in unknown:
            flag = argument.partition("=")[0]
            if flag.startswith("-"):
                raise UserError(f"unknown flag {flag}; {near(flag, self.flags())}")
            raise UserError(f"unexpected argument {argument!r}\n{self.format_usage().rstrip()}")
        return namespace


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(the other arguments, [(dotted path, text), …]) of `--config.path=text` and `--config.path text`.

    Raises:
      UserError: an override without a value.
    """
    others: list[str] = []
    overrides: list[tuple[str, str]] = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        path, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise UserError(f"--config.{path} needs a value: --config.{path}=VALUE")
            text = remaining.pop(0)
        if not all(path.split(".")):
            raise UserError(f"{argument!r} names no key; write --config.KEY=VALUE")
        overrides.append((path, text))
    return others, overrides


def outcome(error: BaseException) -> tuple[int, str]:
    """(exit code, what is printed) of a program that ends by `error`; a fault of the program is printed with its traceback."""
    if isinstance(error, UserError):
        return MISTAKE, f"error: {error}"
    if isinstance(error, RunStopped):
        return error.exit_code, f"stopped: {error}"
    if isinstance(error, WriteFailed) or (isinstance(error, OSError) and error.errno in OF_THE_DISK):
        return NOT_WRITTEN, f"stopped: {error}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else int(error.code is not None)), ""
    return FAULT, "".join(traceback.format_exception(error)).rstrip()


def run_main(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Calls `main(arguments)` and returns the exit code, that of `outcome` where it raises.

    An exception that is a fault of the program keeps its traceback.
    """
    try:
        return main(list(sys.argv[1:] if argv is None else argv)) or 0
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code, text = outcome(error)
        if code == FAULT:
            raise
        with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
            print(text, file=sys.stderr)
        return code
