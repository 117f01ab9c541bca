"""The shape of the house: imports run one way, files stay small, public functions are typed, data never becomes code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted(
    path
    for top in ("zoo", "kernels", "configs", "benchmarks", "train.py", "eval.py")
    for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))
    if path.is_file()
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))

BASE = {"zoo.errors", "zoo.registry", "zoo.atomic"}
SETTINGS = {"zoo.config", "zoo.overrides", "zoo.parts", "zoo.command_line"}
PARTS = ["kernels", "zoo.encodings", "zoo.mixers", "zoo.compatibility", "zoo.layers", "zoo.models"]
EVERYTHING = {"zoo", "kernels", "configs", "train", "eval"}
# What may be imported from where. The longest name that fits a module counts.
ALLOWED: dict[str, set[str]] = {
    "kernels": {"kernels"},
    "zoo": {"zoo.compatibility", "zoo.interop"},
    "zoo.errors": set(),
    "zoo.registry": {"zoo.errors"},
    "zoo.atomic": {"zoo.errors"},
    **{part: {*BASE, *PARTS[: i + 1]} for i, part in enumerate(PARTS) if part != "kernels"},
    "zoo.data": {*BASE, "zoo.data"},
    "zoo.tasks": {*BASE, *PARTS, "zoo.data", "zoo.tasks"},
    "zoo.evaluation": {*BASE, *PARTS, "zoo.data", "zoo.tasks", "zoo.evaluation"},
    "zoo.training": {*BASE, "zoo.training"},
    "zoo.interop": {*BASE, *SETTINGS, *PARTS, "zoo.data", "zoo.tasks", "zoo.training", "zoo.interop"},
    **{module: {*BASE, *SETTINGS} for module in SETTINGS},
    "zoo.commands": EVERYTHING,
    "zoo.__main__": EVERYTHING,
    "zoo.demo": EVERYTHING,
    "zoo.run": EVERYTHING,
    "configs": {*BASE, *SETTINGS, "zoo.models", "configs"},
    "train": EVERYTHING,
    "eval": EVERYTHING,
    "benchmarks": {*EVERYTHING, "benchmarks"},
}
# Nothing that reads a file may run it, and nothing here reaches for the network.
FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"),
    *("urllib.request", "http", "ftplib", "requests", "httpx", "aiohttp", "huggingface_hub"),
}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "socket.socket", "socket.create_connection"}
FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
LINES = {"zoo": 400, "kernels": 800, "train.py": 500}


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a file; of `from a import b` both a and a.b are candidates."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{ids(path)}:{node.lineno}: imports are absolute"
            # `from zoo import compatible` is the public name, which stands for the module it comes from.
            yield from (
                (node.lineno, f"{node.module}.{alias.name}" if node.module == "zoo" else node.module)
                for alias in node.names
            )


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_imports_run_one_way(path):
    name = module_name(path)
    owner = max(
        (key for key in ALLOWED if name == key or (name.startswith(f"{key}.") and key != "zoo")), key=len, default=None
    )
    assert owner is not None, f"{ids(path)} has no place in the order of imports; give it one in ALLOWED"
    for line, other in imported(path):
        ours = other.split(".")[0] in EVERYTHING
        assert not ours or within(other, ALLOWED[owner]), f"{ids(path)}:{line}: {owner} must not import {other}"


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_data_never_becomes_code_and_nothing_reaches_for_the_network(path):
    for line, other in imported(path):
        assert not within(other, FORBIDDEN_MODULES), f"{ids(path)}:{line}: {other}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"{ids(path)}:{node.lineno}"
            pickled = [k for k in node.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
            assert not pickled, f"{ids(path)}:{node.lineno}: allow_pickle"


@pytest.mark.parametrize("path", [*CODE, *TESTS], ids=ids)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(tree(path)), f"{ids(path)} has no module docstring"
    names = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    assert not names & FORBIDDEN_NAMES, f"{ids(path)}: name what it is about"


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_files_stay_small(path):
    limit = LINES.get(path.relative_to(ROOT).parts[0])
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert limit is None or lines <= limit, f"{ids(path)} has {lines} lines, more than {limit}: it holds two concepts"


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """The public functions and methods of a file, `__call__` included."""
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and (inner.name == "__call__" or not inner.name.startswith("_")):
                    yield inner


def public_files() -> list[Path]:
    """All of the code but the modules of `kernels` from which their folder exports nothing."""
    exported = {name for op in (ROOT / "kernels").glob("*/__init__.py") for _, name in imported(op)}
    return [path for path in CODE if not module_name(path).startswith("kernels.") or module_name(path) in exported]


@pytest.mark.parametrize("path", public_files(), ids=ids)
def test_public_functions_are_typed(path):
    for function in functions(path):
        where = f"{ids(path)}:{function.lineno}: {function.name}"
        arguments = function.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            assert argument.annotation is not None or argument.arg in ("self", "cls"), (
                f"{where}: {argument.arg} has no type"
            )
        assert function.returns is not None or function.name == "setup", f"{where} has no return type"


def test_something_real_stands_in_every_folder():
    for top in ("zoo", "kernels", "configs", "tests"):
        for folder in (ROOT / top, *(ROOT / top).rglob("*/")):
            files = [f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
            # A folder without any file is none of the repository's: git does not keep it.
            real = [f for f in files if f.name != "__init__.py"]
            assert real or not files, f"nothing but __init__.py stands in {ids(folder)}"


def test_no_path_of_one_machine_stands_in_the_repository():
    pattern = re.compile(r"""(?<![\w.])/(?:work|home|root|Users|mnt|opt|tmp)/\w""")
    kinds = {".py", ".md", ".cfg", ".toml", ".txt", ".yaml", ".json", ""}
    skipped = {".git", ".venv", "runs", "build", "dist"}
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if skipped & set(parts) or any(
            p.endswith(("cache", "cache__", ".egg-info")) or p == ".hypothesis" for p in parts
        ):
            continue
        if path.is_file() and path.suffix in kinds and path != Path(__file__).resolve():
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1):
                assert not pattern.search(line), f"{ids(path)}:{number}: {line.strip()}"
