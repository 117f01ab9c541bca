"""Disks that are full and folders that may not be written to, for a process under test; root is bound, too."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_MOUNT = 'mount -t tmpfs -o size="$1" none "$2" && echo mounted && exec cat'
# Takes from root, and from what it starts, the two capabilities by which root passes over the modes of files.
_AS_ANYBODY = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
if os.geteuid() == 0:
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""
BOUND_BY_MODES = (sys.executable, "-c", _AS_ANYBODY)
"""Prefix of a command that even root runs as somebody whom a folder's mode binds."""


class SmallDisk:
    """A disk of its own that only processes started with `prefix` see, at `mount`; the test sees it at `outside`."""

    def __init__(self, holder: int, mount: Path):
        self.mount = mount
        self.outside = Path(f"/proc/{holder}/root{mount}")
        namespaces = ("--user", "--preserve-credentials", "--mount")
        self.prefix = ("nsenter", "--target", str(holder), *namespaces, f"--wd={os.getcwd()}")
        self._filler = self.outside / "filler"

    def fill(self, *, leave: int) -> None:
        """Fills what is left of the disk but for `leave` bytes."""
        free = os.statvfs(self.outside)
        chunk = b"\0" * free.f_bsize
        with open(self._filler, "ab", buffering=0) as file:
            for _ in range(free.f_bavail - leave // free.f_bsize):
                try:
                    file.write(chunk)
                except OSError as error:  # the run has taken the rest in the meantime
                    assert error.errno == errno.ENOSPC
                    return

    def free(self) -> None:
        self._filler.unlink()


@contextlib.contextmanager
def small_disk(mount: Path, *, size: int) -> Iterator[SmallDisk]:
    """A disk of `size` bytes in memory, mounted in a namespace of its own, for which no right is needed."""
    mount.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT, "sh", str(size), str(mount)]
    try:
        # It ends when its stdin is closed, and the disk with it.
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    with holder:
        if not holder.stdout.readline():
            pytest.skip(f"this system mounts no disk for everybody: {holder.stderr.read().decode().strip()}")
        yield SmallDisk(holder.pid, mount)
        holder.stdin.close()
