"""Where the time of a step goes on a GPU: kernels by name, from the profiler's own record."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData


class Kernel(NamedTuple):
    """Milliseconds and runs of one kernel in a call, and the operation of the model that XLA made it from, where it says."""

    name: str
    milliseconds: float
    runs: float
    operation: str


def profile(call: Callable[[], object], calls: int, program: str) -> list[Kernel]:
    """The kernels of `call()`, the longest first; `program` is the compiled program's text.

    Raises:
      RuntimeError: the device says nothing of its kernels, as a CPU does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
        (record,) = Path(folder).rglob("*.xplane.pb")
        planes = ProfileData.from_file(str(record)).planes
        time, runs = collections.Counter(), collections.Counter()
        for plane in planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for event in (e for line in plane.lines if line.name.startswith("Stream") for e in line.events):
                time[event.name] += event.duration_ns / 1e6 / calls
                runs[event.name] += 1 / calls
    if not time:
        raise RuntimeError(f"{jax.devices()[0].device_kind} gives the profiler no kernels")
    made_from = dict(re.findall(r'%([\w.\-]+) = [^\n]*?metadata=\{op_name="([^"]*)"', program))
    return [Kernel(name, ms, runs[name], made_from.get(name, "")) for name, ms in time.most_common()]
