"""Devices and processes: the only module that knows how many there are, and of which kind.

Tasks are split over all devices. Training splits seeds over devices, and the episodes of a seed
over the devices that remain. Parameters are replicated. All processes run the same program;
process 0 alone does what must be done once, such as making a folder or drawing a figure.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int

from metadyn.errors import ConfigError, check

TASKS, SEEDS, EPISODES = "tasks", "seeds", "episodes"
HEARTBEAT = 30  # seconds of silence after which a process counts as dead
# On a CPU core at a time: our choice.
CACHED_EPISODES, SHARED_WEIGHT_TASKS, SMALL_TASKS = 128, 64, 512
CPU_CACHE_BYTES = 1 << 20  # bytes of a CPU core's cache: our choice
CGROUPS, CGROUPS_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Memory to measure one task, in multiples of (state + largest array): our choice.
WORKING_COPIES = 2


def start(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to the others of a run by JAX's distributed runtime, if there are others.

    The arguments name them, and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    replace arguments that are None. Without any of these, JAX reads itself what Slurm, Open MPI or
    a TPU pod says. Raises `ConfigError` if some are missing, or if joining fails.
    """
    settings: dict[str, Any] = {
        "--coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "--processes": _whole_number(processes, "JAX_NUM_PROCESSES"),
        "--process-id": _whole_number(process_id, "JAX_PROCESS_ID"),
    }
    address, n, i = settings.values()
    missing = [option for option, value in settings.items() if value is None]
    if len(missing) == len(settings) and not _is_launched():
        return
    if 0 < len(missing) < len(settings):
        message = "give all of --coordinator HOST:PORT, --processes and --process-id, or none"
        raise ConfigError(f"{missing[0]} is missing: {message}")
    if not missing:
        host, _, port = address.rpartition(":")
        valid = host and port.isdecimal() and 0 < int(port) < 1 << 16
        hint = "must be HOST:PORT, with a port from 1 to 65535"
        check(valid, "--coordinator", address, hint)
        check(n >= 1, "--processes", n, "must be 1 or more")
        check(0 <= i < n, "--process-id", i, f"must be from 0 to {n - 1}, below --processes {n}")
        if i == 0:  # which listens on the port: JAX ends in a segmentation fault if it cannot
            hint = "process 0 cannot listen there: choose a port that is free"
            check(_is_free(int(port)), "--coordinator", address, hint)
    # This service's SIGTERM handler would replace ours, which saves a checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            n,
            i,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError, IndexError) as error:
        message = str(error).splitlines()[0]
        source = "this launcher" if missing else f"--coordinator {address}"
        raise ConfigError(f"{source}: the processes cannot be joined ({message})") from error
    counts = Counter(device.process_index for device in jax.devices())
    hint = "must be equally many (on CPUs, set JAX_NUM_CPU_DEVICES)"
    check(len({*counts.values()}) == 1, "devices by process", dict(sorted(counts.items())), hint)


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("", port)):
            return True
    except OSError:
        return False


def _whole_number(value: int | None, variable: str) -> int | None:
    """Returns `value`, or the environment variable if it is None; None if neither is set."""
    if value is None and variable in os.environ:
        text = os.environ[variable]
        check(text.isdecimal(), variable, text, "must be a whole number")
        value = int(text)
    return value


def _is_launched() -> bool:
    """Tells whether a launcher that JAX recognises has started several processes."""
    counts = (os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    several = any(count.isdecimal() and int(count) > 1 for count in counts)
    tpu = "TPU_ML_PLATFORM" in os.environ  # set by JAX itself where it finds TPUs
    single_host = "TPU_SKIP_MDS_QUERY" in os.environ and "," not in os.environ.get(
        "TPU_WORKER_HOSTNAMES", ""
    )
    return several or (tpu and not single_host)


def is_main_process() -> bool:
    """Tells whether this is process 0, which alone prints and writes all files but arrays."""
    return jax.process_index() == 0


def is_distributed() -> bool:
    """Tells whether this process has joined a distributed run, with others to wait for."""
    return jax.distributed.is_initialized()


def shut_down() -> None:
    """Shuts down the distributed runtime, if there is one, once all processes have called this."""
    if is_distributed():
        jax.distributed.shutdown()


def has_devices() -> bool:
    """Tells whether JAX finds the devices that the environment asks for (JAX_PLATFORMS)."""
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):  # the latter, without a message, if CUDA is missing
        return False


def is_peer_loss(error: BaseException) -> bool:
    """Tells whether an error's message means that another process of the run is gone."""
    pattern = "gloo|nccl|peer|socket closed|coordination|barrier|deadline"
    return is_distributed() and re.search(pattern, str(error), re.IGNORECASE) is not None


def any_process(*flags: bool) -> list[bool]:
    """Returns for each flag whether it is true in any process. All processes must call this."""
    gathered = multihost_utils.process_allgather(np.array(flags))
    return gathered.reshape(-1, len(flags)).any(0).tolist()


def broadcast(number: int) -> int:
    """Returns process 0's `number` in every process. All processes must call this."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def on_main_process(f: Callable[[], Any]) -> Any:
    """Calls f in process 0 alone and returns its result, which must be JSON, in all processes.

    If f raises `ConfigError` or OSError, all processes leave the run and raise: process 0 that
    error, the others a `ConfigError` without a message.
    """
    if jax.process_count() == 1:
        return f()
    encoded = b""
    error: Exception = ConfigError()
    if is_main_process():
        try:
            encoded = json.dumps(f()).encode()
        except (ConfigError, OSError) as raised:
            error = raised
    length = broadcast(len(encoded))
    if not length:
        shut_down()
        raise error
    buffer = np.frombuffer(encoded or bytes(length), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(buffer).tobytes())


def _cgroup_limits(files: Mapping[str, str]) -> Iterator[str]:
    """Yields the text of each limit file of this process's control groups and their ancestors.

    `files` maps a controller to the name of its limit file; the controller of version 2 is "".
    """
    with contextlib.suppress(OSError):  # not on every system
        for line in CGROUPS_OF_PROCESS.read_text().splitlines():
            _, controller, path = line.split(":", 2)
            innermost = Path(CGROUPS, controller, path.lstrip("/"))
            for group in (innermost, *innermost.parents) if controller in files else ():
                with contextlib.suppress(OSError):
                    yield (group / files[controller]).read_text()


def cores() -> int:
    """Counts the CPU cores that this process may use; a container's quota is rounded down."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    for quota, period in map(str.split, _cgroup_limits({"": "cpu.max"})):
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def use_every_core() -> None:
    """Makes each CPU core a JAX device of its own, if JAX will run on CPUs.

    Several cores share the small matrix products of one outer step badly, but two halves of its
    episodes, or two seeds, well. The number of devices is a power of two, as batches are, and at
    most 8. If every core is then a device, XLA is told not to split a device's work over threads.
    Nothing changes if JAX has started, or if the environment sets the number of devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in flags:
        return
    devices = min(8, 1 << (cores().bit_length() - 1))
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", devices)
        if devices == cores() and "xla_cpu_multi_thread_eigen" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def use_compilation_cache(wanted: bool = True) -> None:
    """Puts JAX's persistent compilation cache into the user's cache folder, or turns it off.

    The user alone can read the folder, and each kind of processor has its own. If `wanted`, the
    environment can name another folder (JAX_COMPILATION_CACHE_DIR) or turn the cache off
    (JAX_ENABLE_COMPILATION_CACHE=false). There is no cache where no such folder can be had.
    """
    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
    if not wanted or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    host = [jax.__version__, platform.machine()]
    host += [_cpu().get(name, "") for name in ("model name", "flags", "Features")]
    if not os.path.isabs(home):  # as ~ remains for a user whom the system does not know
        return
    folder = Path(home) / "metadyn" / hashlib.sha256(" ".join(host).encode()).hexdigest()[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
            return
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _cpu() -> dict[str, str]:
    """Returns what Linux says of this machine's processor, by name; elsewhere nothing."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return {name.strip(): text.strip() for name, _, text in (x.partition(":") for x in lines)}
    return {}


class TargetDevices(NamedTuple):
    """Devices that this machine lacks, for which programs can be compiled but not run."""

    devices: Sequence[Any]
    memory: int
    """Bytes of memory of each device."""
    options: Sequence[Mapping[str, str]]
    """Sets of compiler options; each is tried if compiling with those before it fails."""


_targets: list[TargetDevices] = []


@contextlib.contextmanager
def compiling_for(there: TargetDevices) -> Iterator[None]:
    """Makes programs for target devices within a `with` block; they can be compiled but not run."""
    jax.clear_caches()  # of what was traced for the devices of this machine
    _targets.append(there)
    try:
        yield
    finally:
        _targets.pop()
        jax.clear_caches()


def devices() -> Sequence[Any]:
    """Lists the devices that programs are made for: the target devices, or those of the run."""
    return _targets[-1].devices if _targets else jax.devices()


def backend() -> str:
    """Returns the platform that programs are made for: "cpu", "gpu" or "tpu"."""
    return _targets[-1].devices[0].platform if _targets else jax.default_backend()


def mesh() -> Mesh:
    """Makes a mesh of all devices of all processes along one axis."""
    return _make_mesh((len(devices()),), (TASKS,))


def _make_mesh(shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    return jax.make_mesh(shape, axes, (AxisType.Auto,) * len(axes), devices=devices())


def replicated() -> NamedSharding:
    """Returns the sharding of parameters: replicated on every device."""
    return NamedSharding(mesh(), PartitionSpec())


def one_device() -> SingleDeviceSharding:
    """Returns the sharding of initial states: the first device of this process alone."""
    return SingleDeviceSharding((devices() if _targets else jax.local_devices())[0])


def replicate(tree: Any) -> Any:
    """Replicates on every device a tree that each process has computed for itself."""
    return jax.device_put(jax.tree.map(np.asarray, tree), replicated())


def train_seeds(
    f: Callable[[Any, Any], Any],
    everywhere: Any,
    stacked: Any,
    batch: int,
    together: int,
) -> Any:
    """Computes f(everywhere, row) for each row of `stacked` along its leading (seed) axis.

    The devices form the groups that `shares` gives, and each group takes an equal share of the
    seeds, which need no communication. Every device of a group runs all of f, which must divide the
    `batch` of episodes by `local_episodes` and `mean`; `together` episodes stay on one device.
    """
    seeds = len(jax.tree.leaves(stacked)[0])
    seeds_by_episodes = _make_mesh(shares(seeds, batch, together), (SEEDS, EPISODES, "spare"))
    of_device = lambda everywhere, rows: map_seeds(partial(f, everywhere), rows)
    return _split(of_device, seeds_by_episodes, SEEDS)(everywhere, stacked)


def _split(f: Callable[[Any, Any], Any], over: Mesh, axis: str) -> Callable[[Any, Any], Any]:
    """Splits the second argument and the results of f(everywhere, rows) along an axis of a mesh."""
    rows, everywhere = PartitionSpec(axis), PartitionSpec()
    return jax.shard_map(f, mesh=over, in_specs=(everywhere, rows), out_specs=rows, check_vma=False)


def shares(
    seeds: int, batch: int, together: int = 1, field: str = "outer.batch"
) -> tuple[int, int, int]:
    """Divides the devices among the seeds and their episodes.

    Returns the number of groups of devices, which divides both the devices and the seeds; the
    number of devices of a group that share its episodes; and how many devices repeat the same work.
    Raises `ConfigError`, naming `field`, unless the devices of a group can share a batch equally,
    in multiples of `together` episodes. CPU cores that cannot do so repeat each other's work.
    """
    groups = math.gcd(seeds, len(devices()))
    group_size = len(devices()) // groups
    sharing = math.gcd(batch // together, group_size)
    equal = sharing == group_size or backend() == "cpu"
    hint = f"must be a multiple of {group_size * together}, as {group_size} devices share it"
    check(equal, field, batch, hint)
    return groups, sharing, group_size // sharing


def local_episodes(total: int) -> Int[Array, " share"]:
    """Returns this device's share of the episodes 0 … total − 1, inside `train_seeds`."""
    share = total // jax.lax.axis_size(EPISODES)
    return jax.lax.axis_index(EPISODES) * share + jnp.arange(share)


def microbatch(episodes: int, together: int = 1, cached: int = CACHED_EPISODES) -> int:
    """Chooses how many of its episodes a device differentiates at a time, in equal parts.

    On a CPU core: the largest divisor of `episodes` that is a multiple of `together`, and above
    half of `cached`, the episodes whose backward pass fits into the core's cache, but no greater
    than `cached` (or `together`). If there is none, and on other devices: all `episodes`.
    """
    if backend() != "cpu":
        return episodes
    sizes = range(together, max(cached, together) + 1, together)
    divisors = [n for n in sizes if episodes % n == 0 and 2 * n > cached]
    return max(divisors, default=episodes)


def cached_episodes(meta: Any) -> int:
    """Returns how many of a meta-learner's episodes a core's cache holds in the backward pass."""
    return getattr(meta, "cached_episodes", CACHED_EPISODES)


def mean(tree: Any) -> Any:
    """Averages every leaf over a group's devices, by one all-reduce, inside `train_seeds`."""
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, EPISODES))


def map_tasks(
    f: Callable[[Any, Array], Any],
    everywhere: Any,
    indices: Int[Array, " tasks"],
    chunk: int,
) -> Any:
    """Computes f(everywhere, index) for each index; indices and results are split over devices.

    Each device computes its share in equal parts of at most `chunk` indices.
    """
    count = len(devices())
    parts = -(-len(indices) // (count * chunk))
    part_size = -(-len(indices) // (count * parts))
    padded = jnp.pad(indices, (0, -len(indices) % (count * parts)), mode="edge")
    of_device = lambda everywhere, shard: jax.lax.map(
        partial(f, everywhere), shard, batch_size=part_size
    )
    results = _split(of_device, mesh(), TASKS)(everywhere, padded)
    return jax.tree.map(lambda leaf: leaf[: len(indices)], results)


def task_chunk(taken: int, seeds: int = 1, shared: bool = False) -> int:
    """Chooses how many tasks a device measures at a time; it may have fewer.

    A task takes `taken` bytes. A CPU core takes seeds in turn, and as many tasks as fill half of
    its cache. It takes at least 4, as XLA sums fewer in another order; more if they are small, as
    their operations take longer to start than to compute; and more if tasks share their weights, to
    fill the products with these. Other devices take as many as fill half of their memory.
    """
    if backend() != "cpu":
        return max(1, memory(split=False) // (2 * WORKING_COPIES * seeds * taken))
    small = SMALL_TASKS if SMALL_TASKS * taken <= CPU_CACHE_BYTES else 4
    return max(SHARED_WEIGHT_TASKS if shared else small, CPU_CACHE_BYTES // (2 * taken))


def map_seeds(f: Callable[[Any], Any], stacked: Any) -> Any:
    """Computes f(row) for each row along the leading (seed) axis: at once, or in turn on a CPU.

    A CPU gains little from batching matrix products that already fill its cores.
    """
    if backend() == "cpu":
        return jax.lax.map(f, stacked)
    return jax.vmap(f)(stacked)


def joined_along(axis: int, parts: Sequence[Array]) -> Any:
    """Concatenates arrays split over devices: on the host for one process, otherwise replicated."""
    if jax.process_count() == 1:
        return np.concatenate([np.asarray(part) for part in parts], axis)
    return jax.jit(partial(jnp.concatenate, axis=axis), out_shardings=replicated())(parts)


def describe() -> dict[str, Any]:
    """Describes what a run would use: backend, devices, processes, bytes of memory per device."""
    devices = jax.devices()
    memory = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return {
        "backend": jax.default_backend(),
        "devices": [f"{d.id}: {d.device_kind}" for d in devices],
        "memory": memory,
        "processes": jax.process_count(),
    }


def processor() -> str:
    """Names the devices as a reader would: "2 × AMD EPYC 7B13" or "8 × NVIDIA H100"."""
    kind = devices()[0].device_kind
    if backend() == "cpu":
        kind = _cpu().get("model name", kind)
    return f"{len(devices())} × {kind}"


def memory(split: bool) -> int:
    """Returns how many bytes an array may have: `split` over all devices, or with a copy on each.

    Accelerators have memory of their own; CPU devices share this machine's.
    """
    if _targets:
        return _targets[-1].memory * (len(devices()) if split else 1)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if jax.default_backend() != "cpu" and limit:
        return limit * jax.device_count() if split else limit
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for text in _cgroup_limits({"": "memory.max", "memory": "memory.limit_in_bytes"}):
        if text.strip() != "max":
            limits.append(int(text))
    return min(limits) if split else min(limits) // jax.local_device_count()


def require_memory(
    what: str,
    needed: int,
    field: str,
    value: Any = None,
    split: bool = False,
    change: str = "lower it",
) -> None:
    """Raises `ConfigError`, naming the field to change, if more bytes are needed than there are.

    With `split` the bytes are sharded over all devices; otherwise each device has a copy of them.
    """
    limit, gib = memory(split), 1 << 30
    sizes = f"{needed / gib:,.1f} GiB, more than the {limit / gib:,.1f}"
    hint = f"{what} would take {sizes} available; {change}"
    if needed > limit:
        setting = field if value is None else f"{field} = {value!r}"
        raise ConfigError(f"{setting}: {hint}", field, value, hint)
