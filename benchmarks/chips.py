"""Accelerators that need not be there: their compilers run on any machine.

A TPU's is libtpu (`pip install -e '.[tpu-aot]'`), a GPU's JAX's CUDA plugin; `make test-aot` fetches both. JAX_PLATFORMS=cpu keeps JAX from
looking for the devices themselves.
"""

from __future__ import annotations

import os

import jax
from jax.experimental import topologies

from zoo.errors import UserError

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GPUS = ("h100",)
CHIPS = (*TPUS, *GPUS)

_SETTINGS = {
    # Of libtpu: ask no cloud where this machine is, and let other processes use it at the same time.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # of the driver, which need not be there either
}

# XLA's description of the chip (GpuTargetConfigProto).
_H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


def tpus(name: str) -> list[jax.Device]:
    """Of a generation's smallest slice, or of a topology such as "v5e:2x4".

    Raises:
      UserError: there is no libtpu.
    """
    return _devices("tpu", TPUS.get(name, name))


def gpus(count: int) -> list[jax.Device]:
    """So many H100.

    Raises:
      UserError: there is no CUDA plugin.
    """
    name = f"1x1x{count}"
    return _devices("cuda", name, topology=name, target_config=_H100)


def chip(name: str) -> jax.Device:
    """One of `CHIPS`; raises what `tpus` and `gpus` do."""
    return gpus(1)[0] if name in GPUS else tpus(name)[0]


def _devices(platform: str, name: str, **options: str) -> list[jax.Device]:
    os.environ.update({setting: value for setting, value in _SETTINGS.items() if setting not in os.environ})
    try:
        return topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices
    except Exception as error:  # whatever JAX raises where a compiler is missing
        compiler = "libtpu" if platform == "tpu" else "JAX's CUDA plugin"
        said = str(error).partition("\n")[0][:200]
        raise UserError(f"nothing compiles for {name}: is {compiler} installed? ({said})") from error
