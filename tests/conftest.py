"""Eight CPU devices unless told otherwise, shape annotations of `kernels` checked, our own warnings made errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in flags:
    # The programs are tiny and run once: most of a test is compilation, a third less without LLVM's optimisations.
    flags += " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = flags

from jaxtyping import install_import_hook

install_import_hook("kernels", "beartype.beartype")


def pytest_configure(config):
    for package in ("kernels", "zoo"):
        config.addinivalue_line("filterwarnings", rf"error:::{package}(\.|$)")
