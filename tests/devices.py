"""The devices that a test takes."""

from __future__ import annotations

import jax
import pytest


def first(count: int) -> list[jax.Device]:
    """The first `count` devices. On an accelerator (`ZOO_TEST_PLATFORM`) that has fewer the test is skipped; of CPU devices there are eight."""
    devices = jax.devices()
    if len(devices) < count and jax.default_backend() != "cpu":
        pytest.skip(f"needs {count} devices, here are {len(devices)}")
    assert len(devices) >= count, f"{count} CPU devices are needed: XLA_FLAGS=--xla_force_host_platform_device_count=8"
    return devices[:count]
