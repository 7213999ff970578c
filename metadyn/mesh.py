"""Devices: the one module that knows how many there are.

Episodes and tasks are split over all devices along one axis; parameters are replicated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from metadyn.base import check

AXIS = "devices"


def mesh() -> Mesh:
    """All devices of all processes along one axis."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), (jax.sharding.AxisType.Auto,))


def replicated() -> NamedSharding:
    """A copy on every device: how parameters are placed."""
    return NamedSharding(mesh(), PartitionSpec())


def on_every_device(f: Callable[..., Any]) -> Callable[..., Any]:
    """f run whole on every device, on replicated arguments and with replicated results.

    Inside it `my_share` and `mean` divide the work and bring it together again.
    """
    everywhere = PartitionSpec()
    return jax.shard_map(f, mesh=mesh(), in_specs=everywhere, out_specs=everywhere, check_vma=False)


def my_share(total: int) -> Int[Array, " share"]:
    """This device's part of 0 … total − 1, inside `on_every_device`.

    Raises `ConfigError` unless the devices' parts are equal.
    """
    devices = jax.device_count()
    check(total % devices == 0, "batch", total, f"must be a multiple of the {devices} devices")
    share = total // devices
    return jax.lax.axis_index(AXIS) * share + jnp.arange(share)


def mean(tree: Any) -> Any:
    """The mean over devices of every leaf, by one all-reduce, inside `on_every_device`."""
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, AXIS))


def over_tasks(
    f: Callable[[Any, Array], Any], everywhere: Any, indices: Int[Array, " tasks"]
) -> Any:
    """f(everywhere, indices) with the indices, and the result's leading axis, split by device."""
    padding = -len(indices) % jax.device_count()
    padded = jnp.pad(indices, (0, padding), mode="edge")
    split = PartitionSpec(AXIS)
    sharded = jax.shard_map(
        f, mesh=mesh(), in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False
    )
    return jax.tree.map(lambda leaf: leaf[: len(indices)], sharded(everywhere, padded))


def over_seeds(f: Callable[..., Any], *stacked: Any) -> Any:
    """f for each index of the leading (seed) axis: at once, or in turn on a CPU.

    A CPU gains little from batching matrix products that already fill its cores.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda each: f(*each), stacked)
    return jax.vmap(f)(*stacked)


def describe() -> dict[str, Any]:
    """What a run would use: backend, devices, processes, memory of each device in bytes."""
    devices = jax.devices()
    memory = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return {
        "backend": jax.default_backend(),
        "devices": [f"{d.id}: {d.device_kind}" for d in devices],
        "memory": memory,
        "processes": jax.process_count(),
    }
