"""Sweeps of one study over many settings, in few programs, with a run folder for each setting.

    DIR/sweep.json          the sweep as requested; written first, compared on every later run
    DIR/settings/NUMBER/    the run of one setting, as `metadyn run` with its options would make it
    DIR/figures/*.png       figures of merit against the swept options (sweep_results.py)
    DIR/report.html         an interactive page of results: each swept option is a control (view.py)
    DIR/summary.json        figures of merit of every setting

Settings whose programs differ only in numbers share one training program (sweep_training.py) and
one measuring program. Settings with other shapes have programs of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from metadyn import inner, sweep_programs
from metadyn.errors import ConfigError, check, error_context
from metadyn.options import as_typed, configured
from metadyn.progress import Progress
from metadyn.runner import (
    Runner,
    check_memory,
    check_objectives,
    domain_summary,
    judge,
    rehearse,
    run_config,
    train,
    writing,
)
from metadyn.store import OutputFolder, RunFolder, lock, read_json, write_json
from metadyn.study import Plan, Study
from metadyn.sweep_training import OuterLoops, by_program

SweepKind = Literal["grid", "zip", "random"]
MAX_UNCONFIRMED = 10_000
"""Largest number of settings that runs without confirmation by --yes: our choice."""
SPARE_FILES = 256
"""Open files allowed for in addition to one lock per setting: our choice."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep as requested: values of the options of one study, as typed on the command line."""

    study: str
    preset: str
    seed: int
    kind: SweepKind
    options: Mapping[str, Sequence[str]]
    """The values of each option, such as {"--domain.sigma": ("0.1", "0.3")}."""
    settings: Sequence[Sequence[str]]
    """The value of each option in each setting."""
    parts: int = 1
    """Number of parts that share the settings: each does every `parts`-th setting (`part_of`)."""

    @property
    def swept(self) -> list[str]:
        """Names the swept options: those with several values."""
        return [name for name, values in self.options.items() if len(values) > 1]

    def typed(self, i: int) -> dict[str, str]:
        """Returns the value of each option in setting `i`, as typed."""
        return dict(zip(self.options, self.settings[i], strict=True))

    def overrides(self, i: int) -> list[str]:
        """Returns the command-line words that make `metadyn run` run setting `i`.

        A value such as "1 5" becomes several words; a matrix, "[[1, 0], [0, 2]]", remains one.
        """
        split = lambda value: [value] if value.startswith("[") else value.split() or [value]
        return [word for name, value in self.typed(i).items() for word in (name, *split(value))]

    def label(self, i: int) -> str:
        """Labels a setting for messages by its position and its values of the swept options."""
        typed = self.typed(i)
        values = " ".join(f"{name} {typed[name]}" for name in self.swept)
        return f"setting {i + 1} of {len(self.settings)}" + (f" ({values})" if values else "")

    @contextmanager
    def naming_errors(self, i: int, config: Any) -> Iterator[None]:
        """Adds a setting's label, and its options as typed, to a `ConfigError` raised inside."""
        try:
            yield
        except ConfigError as error:
            message = as_typed(error, config, self.overrides(i))
            raise ConfigError(f"{self.label(i)}: {message}") from error

    def config(self, i: int, default: Any, beside: Sequence[str] = ()) -> Any:
        """Builds the configuration of a setting. Raises `ConfigError` if a value is refused.

        For an unknown option the error suggests one of the study's, or one of those in `beside`.
        """
        with self.naming_errors(i, default):
            return configured(default, self.overrides(i), beside)


def parsed(words: Sequence[str]) -> dict[str, list[str]]:
    """Parses the words of a command line into the values of each option: --a 1 2 or --a=1.

    Every word that begins with two dashes names an option. Raises `ConfigError` for an option that
    comes twice or has no value, and for a value before the first option.
    """
    options: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            if name in options:
                raise ConfigError(f"{name}: given twice; list all its values after one")
            options[name] = [value] if equals else []
        elif not name:
            raise ConfigError(f"unrecognized arguments: {word}")
        else:
            options[name].append(word)
    for name, values in options.items():
        if not values:
            raise ConfigError(f"{name}: give one or more values")
    return options


def part_of(text: str, count: int) -> range:
    """Returns which of `count` settings a part does: "2/4" does every 4th, from the second on.

    Raises `ConfigError` for text of any other form, and for a part without settings.
    """
    index, _, parts = text.partition("/")
    valid = index.isdecimal() and parts.isdecimal() and 1 <= int(index) <= int(parts)
    check(valid, "--part", text, "give I/N, such as 2/4, with I from 1 to N")
    indices = range(int(index) - 1, count, int(parts))
    check(len(indices) > 0, "--part", text, f"there are only {count} settings: this part is empty")
    return indices


def settings(
    options: Mapping[str, Sequence[str]],
    kind: SweepKind,
    default: Mapping[str, Any],
    count: int,
    seed: int,
    confirmed: bool = True,
) -> list[tuple[str, ...]]:
    """Lists the settings of a sweep, each as the value of every option.

    A "grid" has every combination of the values. A "zip" combines the first value of every option,
    then the second of every option, and so on. A "random" sweep draws `count` combinations, with
    two values of an option as the ends of its range. Ranges are sampled uniformly in the logarithm.
    Samples are rounded if an option's `default` is an integer, or None and both ends are integers.
    Raises `ConfigError` for options that cannot be combined in this way, and for more than
    `MAX_UNCONFIRMED` settings unless `confirmed`.
    """
    sizes = [len(values) for values in options.values()]
    total = {"grid": math.prod(sizes), "zip": max(sizes, default=1), "random": count}[kind]
    if total > MAX_UNCONFIRMED and not confirmed:
        raise ConfigError(
            f"{total:,} settings are more than {MAX_UNCONFIRMED:,}: confirm with --yes"
        )
    if kind == "grid":
        for name, values in options.items():
            for value in values:
                matches = [*map(value_of, values)].count(value_of(value))  # NaN matches nothing
                check(matches <= 1, name, value, "given twice")
        return list(itertools.product(*options.values()))
    swept = {name: len(values) for name, values in options.items() if len(values) > 1}
    if kind == "random":
        hint = "give the least and the greatest value of at least one option, to draw from"
        check(swept, "--random", count, hint)
    if kind == "zip":
        listed = ", ".join(f"{n} of {name}" for name, n in swept.items())
        check(len({*swept.values()}) <= 1, "--zip", listed, "give each the same number, or one")
    rng = np.random.default_rng(seed)
    columns = []
    for name, values in options.items():
        if len(values) == 1:
            columns.append([values[0]] * total)
        elif kind == "zip":
            columns.append([*values])
        else:
            low, high = _range(name, values)
            samples = np.exp(rng.uniform(math.log(low), math.log(high), total))
            usual = default.get(name)
            integral = all(type(value_of(value)) is int for value in values)
            spec = ".0f" if type(usual) is int or (usual is None and integral) else ".6g"
            columns.append([f"{x:{spec}}" for x in samples.tolist()])
    return list(zip(*columns, strict=True)) if columns else [()]


def zipped(default: Any, words: str) -> list[tuple[str, Any]]:
    """Lists the configurations that `metadyn sweep --zip` makes from `default` and typed options.

    Each comes with the setting's value of the first option. Raises `ConfigError` for bad options.
    """
    options = parsed(words.split())
    sweep = Sweep("", "", 0, "zip", options, settings(options, "zip", {}, 0, 0))
    return [(first, sweep.config(i, default)) for i, (first, *_) in enumerate(sweep.settings)]


def value_of(text: str) -> float | int | str:
    """Converts the typed value of an option to a number, or returns it unchanged if it is none."""
    for convert in (int, float):
        with suppress(ValueError):
            return convert(text)
    return text


def _range(name: str, values: Sequence[str]) -> tuple[float, float]:
    """Parses the two ends of a range. Raises `ConfigError` unless 0 < low < high < ∞."""
    with suppress(ValueError):
        low, high = map(float, values)
        if 0 < low < high < math.inf:
            return low, high
    hint = "for --random, give one value, or the ends of a range, both above 0"
    raise ConfigError(f"{name} {' '.join(values)}: {hint}")


class SweepFolder(OutputFolder):
    """The folder DIR of a sweep. `SweepFolder(path)` opens it for reading; parts may share it."""

    kind, file, format = "sweep", "sweep.json", 1

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the sweep in `path`. Raises `ConfigError` unless `path` holds one."""
        super().__init__(path)
        with error_context(f"{path}/sweep.json: is not as metadyn writes it"):
            self.sweep = Sweep(**{n: v for n, v in self.config.items() if n != "format"})
            self.sweep.label(0)  # fails if options and settings do not fit together

    def setting(self, i: int) -> Path:
        """Returns the path of the run folder of a setting."""
        return self.path / "settings" / f"{i:0{len(str(len(self.sweep.settings) - 1))}}"

    def run(self, i: int) -> RunFolder | None:
        """Opens the run of a setting. Returns None if the run has not begun."""
        path = self.setting(i)
        return RunFolder(path) if (path / "config.json").exists() else None

    def lost(self, i: int) -> str:
        """Returns the message stored when a setting's loss became non-finite, or "" otherwise."""
        path = self.setting(i) / "lost.json"
        if not path.exists():
            return ""
        return read_json(path, f"{path} cannot be read").get("said") or "its loss was not finite"

    def set_lost(self, i: int, said: str) -> None:
        """Marks a setting as lost, with a message: it is not trained any further."""
        write_json(self.setting(i) / "lost.json", {"said": said})

    def ended(self, i: int) -> bool:
        """Tells whether a setting has ended: it has a summary, or is lost."""
        return (self.setting(i) / "summary.json").exists() or bool(self.lost(i))

    def intact(self, i: int) -> bool:
        """Tells whether a setting has ended and none of its stored data is damaged."""
        run = self.run(i)
        return self.ended(i) and not (run and run.damage())


def is_sweep(path: str | Path) -> bool:
    """Tells whether a folder holds a sweep."""
    return (Path(path) / "sweep.json").exists()


def planned(sweep: Sweep, study: Study, configs: Mapping[int, Any]) -> dict[int, Plan]:
    """Makes the plan of each setting in `configs`, keyed by the setting's number.

    Increases this process's limit on open files where necessary. Raises `ConfigError` for a plan
    that is refused or does not fit into memory, and for more settings than files can be opened.
    """
    plans = {}
    for i, config in configs.items():
        with sweep.naming_errors(i, config):
            plans[i] = study.plan(config)
            check_memory(plans[i])
    # Each setting keeps its lock file open.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed_files = len(configs) + SPARE_FILES
    if hard != resource.RLIM_INFINITY and needed_files > hard:
        message = f"{len(configs):,} settings need {needed_files:,} open files (limit {hard:,})"
        raise ConfigError(f"--part: {message}: use more parts")
    if soft != resource.RLIM_INFINITY and soft < needed_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed_files, hard))
    return plans


def run_sweep(
    sweep: Sweep,
    study: Study,
    configs: Mapping[int, Any],
    out: str | Path,
    progress: Progress,
) -> SweepFolder:
    """Runs one part of a sweep into the folder `out`, or resumes that part.

    `configs` holds the configurations of the part's settings, keyed by the settings' numbers. A
    setting whose loss becomes non-finite is marked as lost and does not stop the others. The part
    that ends last draws the figures of merit. Raises `ConfigError` before DIR is made if a setting
    can be known to fail, and later as `run_study` does.
    """
    from metadyn import sweep_results

    plans: dict[int, Plan] = {}
    if not (is_sweep(out) and all(map(SweepFolder(out).intact, configs))):
        plans = planned(sweep, study, configs)
        sizes = int | str  # fields of these types can change shapes; floats cannot
        fields = lambda domain: [v for v in domain_summary(domain).values() if isinstance(v, sizes)]
        modes = lambda tasks: [len(probe.modes.values) for probe in tasks.probes.values()]
        shapes = lambda plan: tuple(
            (m.label, *fields(m.tasks.domain), *modes(m.tasks)) for m in plan.measurements
        )
        distinct = {shapes(plan): i for i, plan in plans.items()}.values()
        with progress.counting("checking", len(distinct)) as show:
            for i in distinct:
                show("criteria and figures")
                with sweep.naming_errors(i, configs[i]):
                    rehearse(study, configs[i], plans[i])
            for i, plan in plans.items():
                with sweep.naming_errors(i, configs[i]):
                    check_objectives(plan)
    folder = SweepFolder.create(out, dataclasses.asdict(sweep))
    for i in configs if not plans else ():  # all have ended: `create` refuses other configurations
        run = RunFolder(folder.setting(i))
        RunFolder.create(run.path, run.config | {"config": dataclasses.asdict(configs[i])})
    summary = folder.path / "summary.json"
    with writing(out):
        if plans:
            summary.unlink(missing_ok=True)
            with ExitStack() as stack:
                programs = sweep_programs.ProgramCache()
                measure = lambda *arguments: programs(_traced(arguments), *arguments[-4:])
                runners: dict[int, Runner] = {}
                for i, plan in plans.items():
                    contents = run_config(study, sweep.preset, sweep.seed, configs[i], plan)
                    run = RunFolder.create(folder.setting(i), contents)
                    stack.enter_context(run.locked())
                    run.set_aside_damaged()
                    label = sweep.label(i)
                    runners[i] = Runner(plan, run, sweep.seed, progress, False, measure, label)
                _train_and_measure(study, configs, folder, runners, programs, progress)
        with lock(folder.path):  # of parts that end at the same time, the first one draws
            if not summary.exists() and all(map(folder.ended, range(len(sweep.settings)))):
                sweep_results.conclude(folder, progress)
    return folder


def _traced(arguments: tuple[Any, ...]) -> Any:
    """Traces `inner.measure` for these arguments, once for all parameters of the same shapes.

    Without this JAX would trace anew for device arrays, NumPy arrays and shapes with a sharding.
    """
    *static, params, sample, key, indices = arguments
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return inner.measure.trace(*static, shapes, sample, key, indices)


def _train_and_measure(
    study: Study,
    configs: Mapping[int, Any],
    folder: SweepFolder,
    runners: Mapping[int, Runner],
    programs: sweep_programs.ProgramCache,
    progress: Progress,
) -> None:
    """Trains and measures settings; those whose training programs share a form run together."""
    sweep = folder.sweep
    errors: list[ConfigError] = []
    groups = by_program({i: runner.loop for i, runner in runners.items()})
    with progress.counting("tracing", len(runners)) as show:
        for i, runner in runners.items():
            show(sweep.label(i))
            # Measurements that are stored are announced too. A resumed sweep, or part of one, then
            # takes the same numbers as arguments, and its results are the same to the bit.
            ended = folder.ended(i)
            for _, stored, calls in runner.calls():
                for arguments in calls:
                    params, *others = arguments[-4:]  # of a meta-learner, params are still shapes
                    known = not (ended or stored or jax.tree.leaves(params))
                    with error_context(sweep.label(i)):
                        programs.expect(_traced(arguments), (params, *others) if known else None)
    names = [f"{len(members)} settings" for members in groups]
    with progress.studies(names, "groups of settings") as begin:
        for k, members in enumerate(groups):
            begin(k)
            started = time.monotonic()
            group = [runners[i] for i in members]
            if group[0].plan.trained and not all(map(folder.ended, members)):
                loops = OuterLoops([runner.loop for runner in group])
                lost_before = [k for k, i in enumerate(members) if folder.lost(i)]

                def mark_lost(k: int, error: ConfigError, members: list[int] = members) -> None:
                    i = members[k]
                    message = str(as_typed(error, configs[i], sweep.overrides(i)))
                    folder.set_lost(i, message)
                    progress.say(f"{sweep.label(i)}: {message}")

                start = lambda loops=loops: loops.start(programs)
                first, *others = members
                with nullcontext() if others else sweep.naming_errors(first, configs[first]):
                    train(group, start, loops.run, mark_lost, lost_before)
            training_share = (time.monotonic() - started) / len(members)
            for i in members:
                if not folder.ended(i):
                    started = time.monotonic()
                    runners[i].measure_all()
                    seconds = training_share + time.monotonic() - started
                    run = runners[i].store
                    try:
                        with sweep.naming_errors(i, configs[i]):
                            judge(study, configs[i], run, run.results(), seconds)
                    except ConfigError as error:  # the other settings are still measured
                        errors.append(error)
    if errors:
        raise errors[0]
