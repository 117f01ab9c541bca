"""Eight CPU devices and quick compilation unless told otherwise, shapes of `kernels` checked, our own warnings made errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    # The programs are tiny and run once: most of a test is compilation, a third less without LLVM's optimisations.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

from jaxtyping import install_import_hook

install_import_hook("kernels", "beartype.beartype")


def pytest_configure(config):
    for package in ("kernels", "zoo"):
        config.addinivalue_line("filterwarnings", rf"error:::{package}(\.|$)")
