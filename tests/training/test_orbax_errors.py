"""A checkpoint of many arrays that does not fit: the cause is raised, and nothing is printed beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# TensorStore reports from threads of its own, so the program is one of its own, too.
PROGRAM = """
import logging, resource, signal, sys, time
import numpy as np
from zoo.training.checkpoints import Checkpoints, SaveFailed
from zoo.training.orbax_errors import say_errors_once

say_errors_once()
say_errors_once()
rng = np.random.default_rng(0)
checkpoints = Checkpoints(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(1, {f"a{n}": rng.standard_normal(50_000) for n in range(40)}, {})
    checkpoints.wait()
except SaveFailed as error:
    print(error, flush=True)
time.sleep(0.5)  # the writes that were under way
import asyncio
async def several():
    futures = [asyncio.get_running_loop().create_future() for _ in range(2)]
    gathered = asyncio.gather(*futures)
    for future in futures:
        future.set_exception(OSError("of a write that nobody waits for"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
logging.basicConfig()
asyncio.run(several())
logging.getLogger("asyncio").error("another error of asyncio")
class Loud:
    def __del__(self):
        raise ValueError("still reported")
Loud()
"""


def test_the_cause_alone(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "checkpoints")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert process.returncode == 0 and "File too large" in process.stdout, process.stderr
    # Without `say_errors_once` "Event loop is closed" stands here some forty times.
    assert "Event loop is closed" not in process.stderr and "never retrieved" not in process.stderr, process.stderr
    assert "still reported" in process.stderr and "another error of asyncio" in process.stderr, process.stderr
