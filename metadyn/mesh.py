"""Devices: the one module that knows how many there are.

Tasks are split over all of them; in training seeds are, and the episodes of a seed over what
devices are left. Parameters are replicated.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int

from metadyn.base import check

TASKS, SEEDS, EPISODES = "tasks", "seeds", "episodes"
CACHED_EPISODES, CACHED_TASKS = 128, 16  # our choice


def use_every_core() -> None:
    """Makes each CPU core a device of its own, if it is CPUs that JAX will run on.

    The products of one outer step are too small for several cores to share well; two halves of its
    episodes, or two seeds, are not. The number is a power of two, as batches are, and at most 8.
    Nothing is changed if JAX has started, or if the environment says how many there are to be.
    """
    said = "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in os.environ.get("XLA_FLAGS", "")
    if not said:
        affinity = getattr(os, "sched_getaffinity", None)  # not on every system
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", min(8, 1 << (cores.bit_length() - 1)))


def mesh() -> Mesh:
    """All devices of all processes along one axis."""
    return jax.make_mesh((jax.device_count(),), (TASKS,), (AxisType.Auto,))


def replicated() -> NamedSharding:
    """A copy on every device: how parameters are placed."""
    return NamedSharding(mesh(), PartitionSpec())


def here() -> SingleDeviceSharding:
    """One device of this process: for arrays that are read where what wrote them is not there."""
    return SingleDeviceSharding(jax.local_devices()[0])


def train_seeds(
    f: Callable[[Any, Any], Any], everywhere: Any, stacked: Any, seeds: int, parts: int
) -> Any:
    """f(everywhere, one) for each index of the leading (seed) axis of `stacked`.

    Devices are split into as many groups as divide both them and the seeds, each with its share of
    the seeds: seeds need not communicate. Within a group f runs whole on every device, and
    divides the episodes, which fall into `parts` equal parts, by `my_share` and `mean`. Raises
    `ConfigError` unless the devices of a group can share them equally; CPU cores that cannot repeat
    each other's work.
    """
    groups = math.gcd(seeds, jax.device_count())
    group = jax.device_count() // groups
    sharing = math.gcd(parts, group)
    equal = sharing == group or jax.default_backend() == "cpu"
    check(
        equal,
        "parts of the batch",
        parts,
        f"must be a multiple of the {group} devices that share it",
    )
    shape, axes = (groups, sharing, group // sharing), (SEEDS, EPISODES, "spare")
    by_seed = PartitionSpec(SEEDS)
    sharded = jax.shard_map(
        lambda everywhere, stacked: over_seeds(lambda one: f(everywhere, one), stacked),
        mesh=jax.make_mesh(shape, axes, (AxisType.Auto,) * 3),
        in_specs=(PartitionSpec(), by_seed),
        out_specs=by_seed,
        check_vma=False,
    )
    return sharded(everywhere, stacked)


def my_share(total: int) -> Int[Array, " share"]:
    """This device's part of 0 … total − 1, inside `train_seeds`."""
    share = total // jax.lax.axis_size(EPISODES)
    return jax.lax.axis_index(EPISODES) * share + jnp.arange(share)


def at_a_time(episodes: int, together: int = 1) -> int:
    """How many of a device's episodes to differentiate at a time, in equal parts of whole groups.

    On a CPU core so many that what the backward pass needs stays in its cache; elsewhere all.
    """
    if jax.default_backend() != "cpu":
        return episodes
    parts = range(together, CACHED_EPISODES + 1, together)
    whole = [n for n in parts if episodes % n == 0 and 2 * n > CACHED_EPISODES]
    return max(whole, default=episodes)


def mean(tree: Any) -> Any:
    """The mean over the group's devices of every leaf, by one all-reduce, in `train_seeds`."""
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, EPISODES))


def over_tasks(
    f: Callable[[Any, Array], Any], everywhere: Any, indices: Int[Array, " tasks"]
) -> Any:
    """f(everywhere, indices) with the indices, and the result's leading axis, split by device."""
    padding = -len(indices) % jax.device_count()
    padded = jnp.pad(indices, (0, padding), mode="edge")
    split = PartitionSpec(TASKS)
    sharded = jax.shard_map(
        f, mesh=mesh(), in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False
    )
    return jax.tree.map(lambda leaf: leaf[: len(indices)], sharded(everywhere, padded))


def tasks_at_a_time(most: int) -> int:
    """How many tasks each device should measure at a time, up to `most`.

    On a CPU core so few that the networks of as many ordinary learners stay in its cache.
    """
    return min(most, CACHED_TASKS) if jax.default_backend() == "cpu" else most


def over_seeds(f: Callable[[Any], Any], stacked: Any) -> Any:
    """f(one) for each index of the leading (seed) axis: at once, or in turn on a CPU.

    A CPU gains little from batching matrix products that already fill its cores.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(f, stacked)
    return jax.vmap(f)(stacked)


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
