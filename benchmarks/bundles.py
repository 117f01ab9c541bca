"""How many bundles has a kernel, compiled for a TPU that is not there?

A bundle is a very long instruction word, issued about once a cycle, in the final schedule of libtpu's compiler, so that formulations of
a kernel can be compared without a TPU. It says nothing of waiting for memory, and is no time.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.chips import chip

# A bundle's line begins with its address and a mark where a loop begins, and has one ">" for each loop around it.
_LINE = re.compile(r"\s*0x[0-9a-f]+\s+(LB)?\w*\s*:\s*(>*)")


class Compiler:
    """libtpu's, which reads where to write its schedules when it is loaded: one for a process, and before any other use of it."""

    def __init__(self):
        self._folder = Path(tempfile.mkdtemp())
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={self._folder} --xla_jf_dump_llo_text=true"

    def bundles(
        self,
        generation: str,
        function: Callable,
        *arguments: jax.ShapeDtypeStruct,
        count: Callable[[str], int] | None = None,
    ) -> dict[str, int]:
        """By the name of each kernel that `function` calls: `count` of its schedule, the bundles of one turn of its longest loop by default."""
        count = count or longest_loop
        whole = NamedSharding(Mesh(np.array([chip(generation)]), ("x",)), PartitionSpec())
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in arguments]
        self.forget()
        self._folder.mkdir()
        program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
        names = set(re.findall(r'kernel_name = "(\w+)"', program.as_text()))
        program.compile()
        schedules = sorted(self._folder.glob("*final_bundles.txt"))
        return {
            name: count(path.read_text())
            for name in sorted(names)
            for path in schedules
            if re.search(rf"{name}_*(\.\d+)?-\d+-final_bundles", path.name)
        }

    def forget(self) -> None:
        """Removes what was written, megabytes for each kernel."""
        shutil.rmtree(self._folder, ignore_errors=True)


def longest_loop(schedule: str) -> int:
    """Of the loops that hold no other; of all of it where there is none."""
    lines = _lines(schedule)
    longest = 0
    for first, (begins, depth) in enumerate(lines):
        if not begins:
            continue
        last = next((i for i in range(first + 1, len(lines)) if lines[i][0] or lines[i][1] < depth), len(lines))
        holds_another = last < len(lines) and lines[last][0] and lines[last][1] > depth
        longest = longest if holds_another else max(longest, last - first)
    return longest or len(lines)


def all_of_it(schedule: str) -> int:
    """Of a kernel whose grid is its only loop; of what it does in one case or another, both."""
    return len(_lines(schedule))


def _lines(schedule: str) -> list[tuple[bool, int]]:
    """(whether a loop begins, how many loops there are around it) of each bundle."""
    return [(bool(m[1]), len(m[2])) for m in map(_LINE.match, schedule.splitlines()) if m]
