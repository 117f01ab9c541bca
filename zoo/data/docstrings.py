"""Docstrings of installed packages, read from their source files with `ast`: nothing is imported or run."""

from __future__ import annotations

import ast
import dataclasses
import gc
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

STANDARD_LIBRARY = "python"
LARGEST_FILE = 2_000_000  # bytes; generated tables are larger, no module with prose is
NOT_READ = frozenset(
    {"test", "tests", "testing", "idle_test", "lib2to3", "ensurepip", "site-packages", "dist-packages", "__pycache__"}
)
TOPICS = "pydoc_data/topics.py"

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Docstring:
    """One object's documentation.

    Attributes:
      module: dotted name of the module it stands in (for a language topic: `pydoc_data.topics.<topic>`).
      name: the object's own name, without those of the classes and modules around it.
      parameters: names in a function's signature, without `self` and `cls`; empty for classes and modules.
      text: the docstring with its indentation removed.
      file: path relative to the folder the package is installed in, with "/".
      line: the line the object begins at, from 1.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    text: str
    file: str
    line: int


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The version of each package that is installed here, in the given order; the others are left out."""
    found = {}
    for package in packages:
        if package == STANDARD_LIBRARY:
            found[package] = platform.python_version()
        elif package_root(package) is not None:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = "unknown"
    return found


def package_root(package: str) -> Path | None:
    """The folder a package's modules lie in, or None where it is not installed."""
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def source_files(package: str) -> list[tuple[Path, str]]:
    """(path, path relative to the installation) of every Python file of a package, tests left out, in sorted order."""
    root = package_root(package)
    if root is None:
        logger.warning("built-in text: package %s is not installed, its docstrings are left out", package)
        return []
    base = root if package == STANDARD_LIBRARY else root.parent
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in NOT_READ and not f.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    existing = (path for path in found if path.is_file())  # a link may lead nowhere
    return sorted(((path, path.relative_to(base).as_posix()) for path in existing), key=lambda item: item[1])


def harvest(packages: tuple[str, ...]) -> Iterator[Docstring]:
    """Every docstring of `packages`, in an order that depends on nothing but the files' contents.

    Files above `LARGEST_FILE`, and files that this Python cannot parse (templates, code for other versions), are
    left out with a logged warning.
    """
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many small objects without cycles: the collector would take a quarter of the time
    try:
        for package in packages:
            for path, relative in source_files(package):
                yield from _docstrings_of(path, relative)
    finally:
        if collecting:
            gc.enable()


def _docstrings_of(path: Path, relative: str) -> Iterator[Docstring]:
    content = path.read_bytes()
    if b'"""' not in content and b"'''" not in content:
        return
    if len(content) > LARGEST_FILE:
        logger.warning("built-in text: %s is larger than %d bytes and left out", path, LARGEST_FILE)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escape sequences
            tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError) as error:
        logger.warning("built-in text: %s is left out: %s", path, error)
        return
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if relative == TOPICS:
        yield from _topics(tree, module, relative)
    else:
        yield from _walk(tree, module, module.rpartition(".")[2], relative)


def _walk(node: ast.AST, module: str, name: str, file: str) -> Iterator[Docstring]:
    if isinstance(node, (ast.Module, *_DEFINITIONS)):
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            yield Docstring(module, name, _parameters(node), _clean(text), file, getattr(node, "lineno", 1))
    for child in _statements(node):
        yield from _walk(child, module, getattr(child, "name", None) or name, file)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements inside `node` under which a definition may stand."""
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, None) or ():
            if isinstance(child, (*_DEFINITIONS, ast.If, ast.Try, ast.With, ast.For, ast.While, ast.ExceptHandler)):
                yield child


def _parameters(node: ast.AST) -> tuple[str, ...]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ()
    a = node.args
    arguments = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    return tuple(x.arg for x in arguments if x is not None and x.arg not in ("self", "cls"))


def _topics(tree: ast.Module, module: str, file: str) -> Iterator[Docstring]:
    """The language reference's topics, which `pydoc_data` holds as one dictionary of strings."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for key, value in sorted(ast.literal_eval(statement.value).items()):
                yield Docstring(f"{module}.{key}", key, (), _clean(value), file, statement.lineno)


def _clean(text: str) -> str:
    """`inspect.cleandoc`, and what no UTF-8 file can hold (lone surrogates of escape sequences) replaced."""
    return inspect.cleandoc(text).encode("utf-8", "replace").decode("utf-8")
