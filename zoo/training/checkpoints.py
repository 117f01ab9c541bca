"""Checkpoints of a training state: asynchronous, atomic, verified by content, independent of the mesh.

`<directory>/step_00000100/` is one checkpoint: an Orbax tree of arrays named by their paths in the state, and our manifest.
It is written under another name and renamed when complete, so that a kill at any moment leaves it whole or absent.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from zoo.atomic import sync_directory
from zoo.errors import UserError, WriteFailed
from zoo.training.manifest import Damaged, read_manifest, verify, write_manifest
from zoo.training.processes import Processes
from zoo.training.rules import named_leaves

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8,})$")
_ASIDE = re.compile(r"step_\d{8,}\.damaged-\d+$")
_UNFINISHED = (".saving-", ".deleting-")
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in the messages of TensorStore, whose errors are no OSError


class SaveFailed(WriteFailed):
    """A checkpoint could not be written (a full disk, a lost directory); the cause is chained."""


class Restored(NamedTuple):
    """What a checkpoint holds: the state, its step, and the JSON value that was saved beside it."""

    state: Any
    step: int
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` stay.

    All processes of the run make the same calls: each writes and reads its part of the arrays; process 0 picks, commits,
    sets aside and removes.

    `save` returns as soon as the arrays are copied to the host; what goes wrong afterwards is raised by the next call of
    `check`, `save`, `wait` or `close`.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3, processes: Processes | None = None):
        if keep < 1:
            raise UserError(f"keep is the number of checkpoints that stay, at least 1, not {keep}")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.processes = Processes() if processes is None else processes
        self.last_step: int | None = None
        self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Starts saving `state` and the JSON value `extra` as the checkpoint of `step`.

        Waits for the save before it, if that is still under way. The state may be donated as soon as this returns.

        Raises:
          SaveFailed: the save before this one failed.
          ValueError: there is a checkpoint of this step already.
        """
        self.wait()
        final = self.directory / _name(step)
        if final.exists():
            raise ValueError(f"there is a checkpoint of step {step} already: {final}")
        leaves = named_leaves(state)
        arrays = {"/".join(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for path, leaf in leaves}
        partial = self.directory / f".saving-{final.name}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            self._checkpointer.save(partial, args=ocp.args.StandardSave(_nest(leaves)))
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = self._executor.submit(self._commit, step, partial, final, arrays, extra)
        self.last_step = step

    def check(self) -> None:
        """Returns at once, also while a save is under way.

        Raises:
          SaveFailed: the last save has failed.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is committed.

        Raises:
          SaveFailed: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, then ends the threads."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            self._checkpointer.close()

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint whose content is what was written, or None where there is none at all.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct` with shardings; the mesh may be another than at the save.
        Damaged checkpoints newer than the one used are logged, by name and file, and set aside under another name; what a
        kill has left unfinished is removed.

        Raises:
          UserError: checkpoints exist but each is damaged (all are listed); the state has other arrays than the
            checkpoint (all are listed); a checkpoint was written by a newer version.
        """
        self.wait()
        found = _newest_valid(self.directory) if self.processes.primary else None
        name = self.processes.share("checkpoint to restore", found and found[0].name)
        if name is None:
            self._remove_unfinished()
            return None
        path, body, damaged = found or self._as_picked(name)
        _check_arrays(path, body["arrays"], abstract_state)
        leaves = named_leaves(abstract_state)
        restored = self._checkpointer.restore(path, args=ocp.args.StandardRestore(_nest(leaves)))
        by_name = dict(named_leaves(restored))
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [by_name[name] for name, _ in leaves])
        if self.processes.primary:
            for bad in damaged:
                _set_aside(bad)
        self._remove_unfinished()
        self.last_step = body["step"]
        return Restored(state, body["step"], body["extra"])

    def _as_picked(self, name: str) -> tuple[Path, dict[str, Any], list[Path]]:
        """What `_newest_valid` has found in process 0, which has verified it."""
        path = self.directory / name
        try:
            return path, read_manifest(path), []
        except Damaged as error:
            raise UserError(
                f"process 0 goes on from {path}, which is not here ({error}); give a --workdir on a file system that all "
                "hosts share"
            ) from error

    def _commit(self, step: int, partial: Path, final: Path, arrays: dict[str, Any], extra: dict[str, Any]) -> None:
        """In the background: when all arrays are written, the manifest; then the name; then older checkpoints go."""
        try:
            self._checkpointer.wait_until_finished()
            if not self.processes.primary:
                return
            write_manifest(partial, step=step, arrays=arrays, extra=extra)
            partial.rename(final)
            sync_directory(self.directory)
            for path in _committed(self.directory)[self.keep :]:
                doomed = path.with_name(f".deleting-{path.name}")
                path.rename(doomed)
                shutil.rmtree(doomed)
        except Exception as error:
            raise self._failed(step, error) from error

    def _failed(self, step: int, error: Exception) -> SaveFailed:
        before = f"; the same command goes on from {left[0].name}" if (left := _committed(self.directory)) else ""
        return SaveFailed(
            f"the checkpoint of step {step} could not be written to {self.directory}: {_cause(error)}{before}"
        )

    def _remove_unfinished(self) -> None:
        if self.processes.primary and self.directory.is_dir():
            for path in self.directory.iterdir():
                if path.name.startswith(_UNFINISHED):
                    logger.info("removing %s, which was left unfinished", path)
                    shutil.rmtree(path)


def restore_numpy(directory: str | Path, *, step: int | None = None, part: str | None = None) -> Restored:
    """A checkpoint as nested dictionaries of NumPy arrays, without devices or mesh; changes nothing on disk.

    `step=None` takes the newest valid one; `part="params"` reads that branch of the state alone.

    Raises:
      UserError: no checkpoint, no such step or part, or the content is damaged.
    """
    directory = Path(directory).absolute()
    if step is None:
        found = _newest_valid(directory)
        if found is None:
            raise UserError(f"there is no checkpoint in {directory}")
        path, body, _ = found
    else:
        path = directory / _name(step)
        if not path.is_dir():
            steps = ", ".join(str(s) for s in steps_in(directory)) or "none"
            raise UserError(f"there is no checkpoint of step {step} in {directory}; there are: {steps}")
        try:
            body = verify(path)
        except Damaged as error:
            raise UserError(f"checkpoint {path} is damaged: {error}") from error
    names = [tuple(name.split("/")) for name in body["arrays"]]
    wanted = [name for name in names if part is None or name[0] == part]
    if not wanted:
        raise UserError(f"checkpoint {path} has no part {part!r}; it has {', '.join(sorted({n[0] for n in names}))}")
    item = _nest([(name, np.zeros((), np.int32)) for name in wanted])
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True))
    return Restored(jax.tree.map(np.asarray, tree), body["step"], body["extra"])


def steps_in(directory: str | Path) -> list[int]:
    """The steps of the committed checkpoints, newest first; their content is not verified."""
    return [int(_NAME.match(path.name)[1]) for path in _committed(Path(directory))]


def newest_extra(directory: str | Path) -> dict[str, Any] | None:
    """The JSON value that was saved beside the newest checkpoint with a readable manifest; None where there is none.

    Raises:
      UserError: the checkpoint was written by a newer version.
    """
    for path in _committed(Path(directory)):
        with contextlib.suppress(Damaged):
            return read_manifest(path)["extra"]
    return None


def _cause(error: BaseException) -> str:
    """In a few words, what the operating system said, where it was the operating system."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    if found := _OS_ERROR.search(str(error)):
        return os.strerror(int(found[1]))
    if error.__cause__ is not None:
        return _cause(error.__cause__)
    return str(error)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _committed(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _newest_valid(directory: Path) -> tuple[Path, dict[str, Any], list[Path]] | None:
    """The newest valid checkpoint, its manifest's body, and the damaged ones that are newer."""
    damaged, reasons = [], []
    for path in _committed(directory):
        try:
            body = verify(path)
            if body["step"] != int(_NAME.match(path.name)[1]):
                raise Damaged(f"its manifest is that of step {body['step']}")
        except Damaged as error:
            logger.warning("checkpoint %s is damaged: %s; trying the one before", path, error)
            damaged.append(path)
            reasons.append(f"{path.name}: {error}")
            continue
        return path, body, damaged
    if directory.is_dir():
        reasons += [f"{p.name}: set aside earlier" for p in sorted(directory.iterdir()) if _ASIDE.match(p.name)]
    if reasons:
        raise UserError(
            f"no valid checkpoint is left in {directory} ({'; '.join(reasons)}); put a good copy back, or move the"
            " directory away to start anew"
        )
    return None


def _set_aside(path: Path) -> None:
    count = 1
    while (target := path.with_name(f"{path.name}.damaged-{count}")).exists():
        count += 1
    path.rename(target)
    logger.warning("checkpoint %s was set aside as %s", path, target.name)


def _nest(leaves: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = leaf
    return tree


def _check_arrays(path: Path, saved: dict[str, Any], abstract_state: Any) -> None:
    wanted = {"/".join(p): {"shape": list(x.shape), "dtype": str(x.dtype)} for p, x in named_leaves(abstract_state)}
    problems = [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
    problems += [f"{name} is not in the state" for name in saved if name not in wanted]
    problems += [
        f"{name} is {saved[name]['dtype']}{saved[name]['shape']} in the checkpoint, {spec['dtype']}{spec['shape']} here"
        for name, spec in wanted.items()
        if name in saved and saved[name] != spec
    ]
    if problems:
        raise UserError(f"checkpoint {path} is of another model or optimizer: {'; '.join(problems)}")
