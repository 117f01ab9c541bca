"""Eight CPU devices and quick compilation unless told otherwise, shapes of `kernels` checked, our own warnings made errors.

`ZOO_TEST_PLATFORM=cuda` in the environment (or `tpu`) takes the accelerator that is there: products in full float32, one process's share
of its memory, no autotuning. Tests of several devices skip themselves where there are fewer (`tests/devices.py`), those marked `cpu` are
skipped; truth in float64 is still computed on the CPU.
"""

import atexit
import os
import shutil
import tempfile

import pytest

PLATFORM = os.environ.get("ZOO_TEST_PLATFORM", "cpu")
DEVICES = "--xla_force_host_platform_device_count=8"
QUICKLY = {
    # The programs are tiny and run once: most of a test is compilation, a third less without LLVM's optimisations.
    "cpu": ("--xla_backend_optimization_level=0",),
    # No measuring of alternatives, no recording of CUDA graphs, and threads that compile are the workers of pytest.
    "cuda": (
        "--xla_gpu_autotune_level=0",
        "--xla_gpu_enable_triton_gemm=false",
        "--xla_gpu_enable_command_buffer=",
        "--xla_gpu_force_compilation_parallelism=1",
    ),
}


def set_up(environment):
    """What JAX reads when it is imported and when it starts; what the environment says already stays."""
    given = environment.setdefault("XLA_FLAGS", "")
    for flag in (DEVICES, *QUICKLY.get(PLATFORM, ())):
        if flag.partition("=")[0].removeprefix("--") not in given:
            environment["XLA_FLAGS"] += f" {flag}"
    if PLATFORM == "cpu":
        environment.setdefault("JAX_PLATFORMS", "cpu")
        share_compiled_programs(environment)
        return
    environment.setdefault("JAX_PLATFORMS", f"{PLATFORM},cpu")
    environment.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    share = 0.9 / int(environment.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.3f}")


def share_compiled_programs(environment):
    """For one session, between its workers and the processes that tests start: runs of one config compile the same programs."""
    if "JAX_COMPILATION_CACHE_DIR" in environment:
        return
    folder = tempfile.mkdtemp(prefix="zoo-tests-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    environment["JAX_COMPILATION_CACHE_DIR"] = folder
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


set_up(os.environ)


def pytest_configure(config):
    from jaxtyping import install_import_hook  # may import JAX

    install_import_hook("kernels", "beartype.beartype")
    for package in ("kernels", "zoo"):
        config.addinivalue_line("filterwarnings", rf"error:::{package}(\.|$)")


def pytest_collection_modifyitems(items):
    if PLATFORM != "cpu":
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="is about programs that are compiled for a CPU"))
