"""Eight CPU devices unless told otherwise, shape annotations of `kernels` checked, our own warnings made errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook("kernels", "beartype.beartype")


def pytest_configure(config):
    for package in ("kernels", "zoo"):
        config.addinivalue_line("filterwarnings", rf"error:::{package}(\.|$)")
