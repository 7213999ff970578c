"""Devices that this machine lacks, for which XLA's compilers make programs: to plan, and to test.

Nothing can be run on them. Their compilers come with `pip install -e '.[aot]'` in the checkout.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
from jax.experimental.topologies import get_topology_desc

from metadyn.errors import ConfigError
from metadyn.mesh import TargetDevices

# NVIDIA's published figures of the card, as XLA's GpuTargetConfigProto.
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
    """Describes a kind of device to its compiler."""

    platform: str
    memory: int
    """Bytes of memory of one device that programs can use."""
    topologies: dict[int, dict[str, Any]]
    """Arguments of `get_topology_desc`, keyed by the number of devices."""
    options: list[dict[str, str]]
    """Sets of compiler options, in the order in which they are tried."""


_UNTIMED = {"xla_gpu_autotune_level": "0"}  # choosing product kernels would need a GPU to time them
KINDS = {
    # JAX allocates three quarters of a GPU's memory by default.
    "h100": DeviceKind(
        "cuda",
        84929347584 * 3 // 4,
        {n: {"target_config": _H100, "topology": f"1x1x{n}"} for n in (1, 2, 4, 8)},
        # Where Triton cannot compile its kernel of a product, cuBLAS replaces it.
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
    """Returns the devices that a name such as "h100:8" stands for.

    Raises `ConfigError` if the name is unknown, or the compiler is not installed.
    """
    known = {f"{label}:{n}": (kind, n) for label, kind in KINDS.items() for n in kind.topologies}
    full_name = name if ":" in name else f"{name}:1"
    if full_name not in known:
        raise ConfigError(f"--plan {name}: is not a known device: choose from {', '.join(known)}")
    kind, n = known[full_name]
    try:
        devices = get_topology_desc(platform=kind.platform, **kind.topologies[n]).devices
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        hint = f"install the compiler for {kind.platform}: pip install -e '.[aot]' ({cause})"
        raise ConfigError(f"--plan {name}: {hint}") from error
    return TargetDevices(devices, kind.memory, kind.options)


def use_cpus_alone() -> None:
    """Restricts JAX to this machine's CPUs; call it before JAX has started."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    # The TPU compiler would otherwise ask the network for these, and complain without an answer.
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    jax.config.update("jax_platforms", "cpu")
