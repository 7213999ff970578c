"""Devices and processes: the one module that knows how many there are, and of which kind.

Tasks are split over all devices; in training seeds are, and the episodes of a seed over what
devices are left. Parameters are replicated. All processes run the same program; what is to be done
once, such as making a folder or drawing, is done by process 0.
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
CACHED_EPISODES, LEAST_TASKS, SMALL_TASKS = 128, 64, 512  # our choice
CACHE = 1 << 20  # bytes: our choice
CGROUPS, CGROUPS_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
TAKEN = 2  # times its state and the greatest array that measuring a task takes: our choice


def start(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of a run by JAX's distributed runtime, if there are to be others.

    They are named by the arguments, by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID where arguments are None, or by what Slurm, Open MPI or a TPU pod says, which JAX
    reads itself. Raises `ConfigError` if they are named in part, or cannot be joined.
    """
    told: dict[str, Any] = {
        "coordinator_address": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _whole(processes, "JAX_NUM_PROCESSES"),
        "process_id": _whole(process_id, "JAX_PROCESS_ID"),
    }
    lacking = [name for name, value in told.items() if value is None]
    if len(lacking) == len(told) and not _launched():
        return
    if 0 < len(lacking) < len(told):
        missing = {"coordinator_address": "--coordinator", "num_processes": "--processes"}
        option = missing.get(lacking[0], "--process-id")
        said = "give all of --coordinator HOST:PORT, --processes and --process-id, or none"
        raise ConfigError(f"{option} is missing: {said}")
    if not lacking:
        n, i = told["num_processes"], told["process_id"]
        host, _, port = str(told["coordinator_address"]).rpartition(":")
        right = host and port.isdecimal() and 0 < int(port) < 1 << 16
        fix = "must be HOST:PORT, with a port from 1 to 65535"
        check(right, "--coordinator", told["coordinator_address"], fix)
        check(n >= 1, "--processes", n, "must be 1 or more")
        check(0 <= i < n, "--process-id", i, f"must be from 0 to {n - 1}, below --processes {n}")
        if i == 0:  # which is to listen there: JAX ends in a segmentation fault if it cannot
            fix = "process 0 cannot listen there: choose a port that is free"
            check(_is_free(int(port)), "--coordinator", told["coordinator_address"], fix)
    # Its handler of SIGTERM would take the place of ours, which saves.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **told, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT
        )
    except (RuntimeError, ValueError, IndexError) as error:
        said = str(error).splitlines()[0]
        where = f"--coordinator {told['coordinator_address']}" if not lacking else "this launcher"
        raise ConfigError(f"{where}: the processes cannot be joined ({said})") from error
    counts = Counter(device.process_index for device in jax.devices())
    fix = "must be as many in each process (on CPUs: JAX_NUM_CPU_DEVICES)"
    check(len({*counts.values()}) == 1, "devices by process", dict(sorted(counts.items())), fix)


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def _whole(value: int | None, variable: str) -> int | None:
    if value is None and variable in os.environ:
        text = os.environ[variable]
        check(text.isdecimal(), variable, text, "must be a whole number")
        value = int(text)
    return value


def _launched() -> bool:
    """Whether a launcher that JAX knows started several processes."""
    counts = (os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    several = any(count.isdecimal() and int(count) > 1 for count in counts)
    tpu = "TPU_ML_PLATFORM" in os.environ  # set by JAX itself where it finds TPUs
    alone = "TPU_SKIP_MDS_QUERY" in os.environ and "," not in os.environ.get(
        "TPU_WORKER_HOSTNAMES", ""
    )
    return several or (tpu and not alone)


def is_main_process() -> bool:
    """Tells whether this is process 0: the one that prints, and writes what is no array."""
    return jax.process_index() == 0


def is_distributed() -> bool:
    """Tells whether this process has others to wait for."""
    return jax.distributed.is_initialized()


def shut_down() -> None:
    """Shuts the distributed runtime down once all processes are here, if there are several."""
    if is_distributed():
        jax.distributed.shutdown()


def has_devices() -> bool:
    """Tells whether JAX has the devices that the environment asks for (JAX_PLATFORMS)."""
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):  # the latter, without a word, where CUDA is not there
        return False


def is_peer_loss(error: BaseException) -> bool:
    """Tells whether an error says that another process is gone."""
    said = "gloo|nccl|peer|socket closed|coordination|barrier|deadline"
    return is_distributed() and re.search(said, str(error), re.IGNORECASE) is not None


def any_process(*flags: bool) -> list[bool]:
    """Returns for each flag whether it is true in any process; all processes must call it."""
    found = multihost_utils.process_allgather(np.array(flags))
    return found.reshape(-1, len(flags)).any(0).tolist()


def broadcast(number: int) -> int:
    """Gives the number that process 0 has to all processes; all must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def on_main_process(f: Callable[[], Any]) -> Any:
    """Calls f in process 0 alone and gives its result, which is JSON, to all processes.

    Where it raises `ConfigError` or OSError all processes leave the run and raise: process 0 that
    error, the others a `ConfigError` without words.
    """
    if jax.process_count() == 1:
        return f()
    said = b""
    error: Exception = ConfigError()
    if is_main_process():
        try:
            said = json.dumps(f()).encode()
        except (ConfigError, OSError) as raised:
            error = raised
    length = broadcast(len(said))
    if not length:
        shut_down()
        raise error
    padded = np.frombuffer(said or bytes(length), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def _cgroup_limits(files: Mapping[str, str]) -> Iterator[str]:
    """What the control groups of this process, and those above them, limit: each file's text.

    `files` are the names of the file by the controller; of version 2 by "".
    """
    with contextlib.suppress(OSError):  # not on every system
        for line in CGROUPS_OF_PROCESS.read_text().splitlines():
            _, controller, path = line.split(":", 2)
            own = Path(CGROUPS, controller, path.lstrip("/"))
            for group in (own, *own.parents) if controller in files else ():
                with contextlib.suppress(OSError):
                    yield (group / files[controller]).read_text()


def cores() -> int:
    """Counts the CPU cores that this process may use: as many whole ones as a container has."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    found = len(affinity(0)) if affinity else os.cpu_count() or 1
    for quota, period in map(str.split, _cgroup_limits({"": "cpu.max"})):
        if quota != "max":
            found = min(found, max(1, int(quota) // int(period)))
    return found


def use_every_core() -> None:
    """Makes each CPU core a device of its own, if it is CPUs that JAX will run on.

    The products of one outer step are too small for several cores to share well; two halves of its
    episodes, or two seeds, are not. The number is a power of two, as batches are, and at most 8.
    If that is as many as there are cores, XLA is told not to share out one device's work any more.
    Nothing is changed if JAX has started, or if the environment says how many there are to be.
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
    """Keeps what is compiled in the user's cache folder, readable by them alone; or keeps nothing.

    By JAX's own persistent cache; processors of other kinds have folders of their own. Nothing is
    changed if the environment says where it is to be (JAX_COMPILATION_CACHE_DIR), or that there is
    to be none (JAX_ENABLE_COMPILATION_CACHE=false); and none is used where no folder can be had.
    """
    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
    if not wanted or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    kind = [jax.__version__, platform.machine()]
    kind += [_cpu().get(name, "") for name in ("model name", "flags", "Features")]
    if not os.path.isabs(home):  # as ~ is for a user whom the system does not know
        return
    folder = Path(home) / "metadyn" / hashlib.sha256(" ".join(kind).encode()).hexdigest()[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
            return
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _cpu() -> dict[str, str]:
    """What the system says of this machine's processor, by name: on Linux alone."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return {name.strip(): of.strip() for name, _, of in (x.partition(":") for x in lines)}
    return {}


class TargetDevices(NamedTuple):
    """Devices that are not here, and for which programs can be made all the same."""

    devices: Sequence[Any]
    memory: int
    """Bytes that each of them has."""
    options: Sequence[Mapping[str, str]]
    """What their compiler is told; each is tried where it fails by those before."""


_elsewhere: list[TargetDevices] = []


@contextlib.contextmanager
def compiling_for(there: TargetDevices) -> Iterator[None]:
    """Makes programs for devices elsewhere as long as it is entered; they cannot be run."""
    jax.clear_caches()  # of what was traced for the devices here
    _elsewhere.append(there)
    try:
        yield
    finally:
        _elsewhere.pop()
        jax.clear_caches()


def devices() -> Sequence[Any]:
    """Lists the devices that programs are made for: of all processes, if not some elsewhere."""
    return _elsewhere[-1].devices if _elsewhere else jax.devices()


def backend() -> str:
    """Says what these devices are: "cpu", "gpu" or "tpu"."""
    return _elsewhere[-1].devices[0].platform if _elsewhere else jax.default_backend()


def mesh() -> Mesh:
    """Makes a mesh of all devices of all processes along one axis."""
    return _made((len(devices()),), (TASKS,))


def _made(shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    return jax.make_mesh(shape, axes, (AxisType.Auto,) * len(axes), devices=devices())


def replicated() -> NamedSharding:
    """Returns the placement of parameters: a copy on every device."""
    return NamedSharding(mesh(), PartitionSpec())


def one_device() -> SingleDeviceSharding:
    """Returns the placement of initial states: the first device of this process alone."""
    return SingleDeviceSharding((devices() if _elsewhere else jax.local_devices())[0])


def replicate(tree: Any) -> Any:
    """Places a tree that every process has computed for itself on every device."""
    return jax.device_put(jax.tree.map(np.asarray, tree), replicated())


def train_seeds(
    f: Callable[[Any, Any], Any],
    everywhere: Any,
    stacked: Any,
    seeds: int,
    batch: int,
    together: int,
) -> Any:
    """Computes f(everywhere, one) for each index of the leading (seed) axis of `stacked`.

    Devices are split into the groups that `shares` gives, each with its share of the seeds: seeds
    need not communicate. Within a group f runs whole on every device, and divides the `batch` of
    episodes, of which `together` must stay on one device, by `local_episodes` and `mean`.
    """
    shape, axes = shares(seeds, batch, together), (SEEDS, EPISODES, "spare")
    by_seed = PartitionSpec(SEEDS)
    sharded = jax.shard_map(
        lambda everywhere, stacked: map_seeds(lambda one: f(everywhere, one), stacked),
        mesh=_made(shape, axes),
        in_specs=(PartitionSpec(), by_seed),
        out_specs=by_seed,
        check_vma=False,
    )
    return sharded(everywhere, stacked)


def shares(
    seeds: int, batch: int, together: int = 1, field: str = "outer.batch"
) -> tuple[int, int, int]:
    """Says how seeds and their episodes are divided over the devices.

    Returns the number of groups of devices, which divides both the devices and the seeds; the
    number of devices of a group that share its episodes; and how many devices repeat the same work.
    Raises `ConfigError`, naming `field`, unless the devices of a group can share a batch equally,
    `together` episodes at a time. CPU cores that cannot share it so repeat each other's work.
    """
    groups = math.gcd(seeds, len(devices()))
    group = len(devices()) // groups
    sharing = math.gcd(batch // together, group)
    equal = sharing == group or backend() == "cpu"
    fix = f"must be a multiple of {group * together}, as {group} devices share it"
    check(equal, field, batch, fix)
    return groups, sharing, group // sharing


def local_episodes(total: int) -> Int[Array, " share"]:
    """Returns this device's part of 0 … total − 1, inside `train_seeds`."""
    share = total // jax.lax.axis_size(EPISODES)
    return jax.lax.axis_index(EPISODES) * share + jnp.arange(share)


def microbatch(episodes: int, together: int = 1, cached: int = CACHED_EPISODES) -> int:
    """Chooses how many of its episodes a device differentiates at a time, in equal parts.

    A part is a whole number of groups of `together`. On a CPU core it has so many that what the
    backward pass needs stays in the core's cache, which is said to hold that of `cached` episodes;
    elsewhere it has all.
    """
    if backend() != "cpu":
        return episodes
    parts = range(together, max(cached, together) + 1, together)
    whole = [n for n in parts if episodes % n == 0 and 2 * n > cached]
    return max(whole, default=episodes)


def cached_episodes(meta: Any) -> int:
    """Counts the episodes of a meta-learner whose backward pass stays in a CPU core's cache."""
    return getattr(meta, "cached_episodes", CACHED_EPISODES)


def mean(tree: Any) -> Any:
    """Averages every leaf over the group's devices, by one all-reduce, inside `train_seeds`."""
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, EPISODES))


def map_tasks(
    f: Callable[[Any, Array], Any],
    everywhere: Any,
    indices: Int[Array, " tasks"],
    chunk: int,
) -> Any:
    """Computes f(everywhere, index) for each index, with these and the results split by device.

    Each device takes its own in equal parts of at most `chunk`.
    """
    count = len(devices())
    parts = -(-len(indices) // (count * chunk))
    each = -(-len(indices) // (count * parts))
    padded = jnp.pad(indices, (0, -len(indices) % (count * parts)), mode="edge")
    split = PartitionSpec(TASKS)
    sharded = jax.shard_map(
        lambda everywhere, mine: jax.lax.map(partial(f, everywhere), mine, batch_size=each),
        mesh=mesh(),
        in_specs=(PartitionSpec(), split),
        out_specs=split,
        check_vma=False,
    )
    return jax.tree.map(lambda leaf: leaf[: len(indices)], sharded(everywhere, padded))


def task_chunk(taken: int, seeds: int = 1, shared: bool = False) -> int:
    """Chooses how many of its tasks a device measures at a time, if it has so many.

    Each takes `taken` bytes. On a CPU core, which takes seeds in turn, as many as half of its cache
    holds, but at least four, as XLA sums fewer in another order; more of small ones, whose
    operations take longer to begin than to do; and if they share their weights, enough of them to
    fill the products with these. Elsewhere as many as take half of the device's memory.
    """
    if backend() != "cpu":
        return max(1, memory(split=False) // (2 * TAKEN * seeds * taken))
    small = SMALL_TASKS if SMALL_TASKS * taken <= CACHE else 4
    return max(LEAST_TASKS if shared else small, CACHE // (2 * taken))


def map_seeds(f: Callable[[Any], Any], stacked: Any) -> Any:
    """Computes f(one) for each index of the leading (seed) axis: at once, or in turn on a CPU.

    A CPU gains little from batching matrix products that already fill its cores.
    """
    if backend() == "cpu":
        return jax.lax.map(f, stacked)
    return jax.vmap(f)(stacked)


def joined_along(axis: int, parts: Sequence[Array]) -> Any:
    """Joins arrays that are split over devices: on this machine, if this process has all."""
    if jax.process_count() == 1:
        return np.concatenate([np.asarray(part) for part in parts], axis)
    return jax.jit(partial(jnp.concatenate, axis=axis), out_shardings=replicated())(parts)


def describe() -> dict[str, Any]:
    """Says what a run would use: backend, devices, processes, memory of each device in bytes."""
    devices = jax.devices()
    memory = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return {
        "backend": jax.default_backend(),
        "devices": [f"{d.id}: {d.device_kind}" for d in devices],
        "memory": memory,
        "processes": jax.process_count(),
    }


def processor() -> str:
    """Names the hardware as a reader would: "2 × AMD EPYC 7B13" or "8 × NVIDIA H100"."""
    kind = devices()[0].device_kind
    if backend() == "cpu":
        kind = _cpu().get("model name", kind)
    return f"{len(devices())} × {kind}"


def memory(split: bool) -> int:
    """Says how many bytes an array may have: split over all devices, or with a copy on each.

    Accelerators have memory of their own; CPU devices share this machine's.
    """
    if _elsewhere:
        return _elsewhere[-1].memory * (len(devices()) if split else 1)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if jax.default_backend() != "cpu" and limit:
        return limit * jax.device_count() if split else limit
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for text in _cgroup_limits({"": "memory.max", "memory": "memory.limit_in_bytes"}):
        if text.strip() != "max":
            limits.append(int(text))
    return min(limits) if split else min(limits) // jax.local_device_count()
