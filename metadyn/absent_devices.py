"""Devices that are not here, for which XLA's own compilers make programs: to plan, and to test.

Nothing can be run on them. Their compilers come with `pip install -e '.[aot]'` in the checkout.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
from jax.experimental.topologies import get_topology_desc

from metadyn.errors import ConfigError
from metadyn.mesh import TargetDevices

# What NVIDIA publishes of the card, in the words of XLA's GpuTargetConfigProto.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 } dnn_version_info { major: 9 }
"""


class DeviceKind(NamedTuple):
    """A kind of device."""

    platform: str
    memory: int
    """Bytes of one, as far as programs get them."""
    topologies: dict[int, dict[str, Any]]
    """What their compiler is told of them, by how many there are."""
    options: list[dict[str, str]]
    """Options of the compiler, in the order in which they are tried."""


_UNTIMED = {"xla_gpu_autotune_level": "0"}  # kernels of products cannot be timed, to choose among
KINDS = {
    # JAX takes three quarters of a GPU's memory, unless it is told otherwise.
    "h100": DeviceKind(
        "cuda",
        84929347584 * 3 // 4,
        {n: {"target_config": _H100, "topology": f"1x1x{n}"} for n in (1, 2, 4, 8)},
        # Where Triton's kernel of a product turns out impossible, cuBLAS takes its place.
        [_UNTIMED, _UNTIMED | {"xla_gpu_enable_triton_gemm": "False"}],
    ),
    "v5e": DeviceKind(
        "tpu",
        63 << 28,  # 15.75 GiB
        {
            1: {"topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)},
            4: {"topology_name": "v5e:2x2"},
        },
        [{}],
    ),
}


def find(name: str) -> TargetDevices:
    """Returns the devices that a name such as "h100:8" is of.

    Raises `ConfigError` if there are none, or their compiler is not installed.
    """
    known = {f"{each}:{n}": (of, n) for each, of in KINDS.items() for n in of.topologies}
    asked = name if ":" in name else f"{name}:1"
    if asked not in known:
        raise ConfigError(f"--plan {name}: is not known: choose from {', '.join(known)}")
    kind, n = known[asked]
    try:
        devices = get_topology_desc(platform=kind.platform, **kind.topologies[n]).devices
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        said = f"the compiler for {kind.platform} is not here: pip install -e '.[aot]' ({cause})"
        raise ConfigError(f"--plan {name}: {said}") from error
    return TargetDevices(devices, kind.memory, kind.options)


def use_cpus_alone() -> None:
    """Keeps JAX, before it has started, from looking for devices here beyond CPUs."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    # What the TPU's compiler would ask the network for, and complain of not being told.
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    jax.config.update("jax_platforms", "cpu")
