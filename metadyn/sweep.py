"""Sweeps: one study under many settings, as few programs, each setting in a run folder of its own.

    DIR/sweep.json          what was asked for; written first, compared on every later run
    DIR/settings/NUMBER/    the run of one setting, as `metadyn run` with its options would make it
    DIR/figures/*.png       figures of merit against what is swept (sweep_results.py)
    DIR/report.html         a page to look at, with what is swept as controls (view.py)
    DIR/summary.json        figures of merit of every setting

Settings whose programs differ in numbers alone are trained side by side as one program, in rows
(sweep_rows.py), and measured by one; where shapes differ, each has a program of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
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
from metadyn.store import RunFolder, claimed, lock, read_json, write_json
from metadyn.study import Plan, Study
from metadyn.sweep_rows import Rows, by_program

SweepKind = Literal["grid", "zip", "random"]
MOST = 10_000
"""Settings beyond which a sweep must be confirmed: our choice."""
FORMAT = 1
FILES = 256
"""Open files beside those of the settings: our choice."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep was asked for: values, as they were typed, of the options of one study."""

    study: str
    preset: str
    seed: int
    kind: SweepKind
    options: Mapping[str, Sequence[str]]
    """The values of each option, such as {"--domain.sigma": ("0.1", "0.3")}."""
    settings: Sequence[Sequence[str]]
    """The value of each option in each setting."""
    parts: int = 1
    """How many processes share it, each of which does every `parts`-th setting (`part_of`)."""

    @property
    def swept(self) -> list[str]:
        """Returns the options that have several values."""
        return [name for name, values in self.options.items() if len(values) > 1]

    def typed(self, i: int) -> dict[str, str]:
        """Returns the value of each option in a setting."""
        return dict(zip(self.options, self.settings[i], strict=True))

    def overrides(self, i: int) -> list[str]:
        """Gives what `metadyn run` would be given for a setting.

        A value such as "1 5" is several words, and a matrix, "[[1, 0], [0, 2]]", is one.
        """
        split = lambda value: [value] if value.startswith("[") else value.split() or [value]
        return [word for name, value in self.typed(i).items() for word in (name, *split(value))]

    def called(self, i: int) -> str:
        """Names a setting for messages: its place, and the values of what is swept."""
        typed = self.typed(i)
        said = " ".join(f"{name} {typed[name]}" for name in self.swept)
        return f"setting {i + 1} of {len(self.settings)}" + (f" ({said})" if said else "")

    @contextmanager
    def naming(self, i: int, config: Any) -> Iterator[None]:
        """Names a setting, and its options as they were typed, in a `ConfigError` raised inside."""
        try:
            yield
        except ConfigError as error:
            said = as_typed(error, config, self.overrides(i))
            raise ConfigError(f"{self.called(i)}: {said}") from error

    def config(self, i: int, default: Any, beside: Sequence[str] = ()) -> Any:
        """Makes the configuration of a setting. Raises `ConfigError` if it is refused.

        Hints are at options of the study, and at those `beside` them.
        """
        with self.naming(i, default):
            return configured(default, self.overrides(i), beside)


def parsed(words: Sequence[str]) -> dict[str, list[str]]:
    """Reads the values of each option as typed: --a 1 2 or --a=1. `ConfigError` for bad words.

    A word that begins with two dashes is an option.
    """
    options: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, given, value = word.partition("=")
            name = name.replace("_", "-")
            if name in options:
                raise ConfigError(f"{name}: given twice; give all its values after one")
            options[name] = [value] if given else []
        elif not name:
            raise ConfigError(f"unrecognized arguments: {word}")
        else:
            options[name].append(word)
    for name, values in options.items():
        if not values:
            raise ConfigError(f"{name}: give one or more values")
    return options


def part_of(text: str, count: int) -> range:
    """Says which of so many settings the part "2/4" does: every 4th, from the second on.

    Raises `ConfigError` for anything else, and for a part that has none.
    """
    index, _, of = text.partition("/")
    right = index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)
    check(right, "--part", text, "give I/N, such as 2/4, with I from 1 to N")
    mine = range(int(index) - 1, count, int(of))
    check(len(mine) > 0, "--part", text, f"there are {count} settings")
    return mine


def settings(
    options: Mapping[str, Sequence[str]],
    kind: SweepKind,
    default: Mapping[str, Any],
    count: int,
    seed: int,
    confirmed: bool = True,
) -> list[tuple[str, ...]]:
    """Lists the settings of a sweep, each as the value of every option.

    A "grid" has every combination of the values; "zip" the first of all, the second of all, …; and
    "random" has `count` combinations from the ranges that pairs of values give. Ranges are sampled
    evenly in logarithm, and rounded where the option's `default` value is a whole number, or where
    it is None and both ends are. Raises `ConfigError` for options that cannot be combined so, and
    for very many if not `confirmed`.
    """
    sizes = [len(values) for values in options.values()]
    total = {"grid": math.prod(sizes), "zip": max(sizes, default=1), "random": count}[kind]
    if total > MOST and not confirmed:
        raise ConfigError(f"{total:,} settings are more than {MOST:,}: confirm with --yes")
    if kind == "grid":
        for name, values in options.items():
            for value in values:
                times = [*map(value_of, values)].count(value_of(value))  # NaN is not even itself
                check(times <= 1, name, value, "given twice")
        return list(itertools.product(*options.values()))
    several = {name: len(values) for name, values in options.items() if len(values) > 1}
    if kind == "random":
        fix = "give the least and the greatest value of at least one option, to draw from"
        check(several, "--random", count, fix)
    if kind == "zip":
        said = ", ".join(f"{n} of {name}" for name, n in several.items())
        check(len({*several.values()}) <= 1, "--zip", said, "give as many values of each, or one")
    rng = np.random.default_rng(seed)
    columns = []
    for name, values in options.items():
        if len(values) == 1:
            columns.append([values[0]] * total)
        elif kind == "zip":
            columns.append([*values])
        else:
            low, high = _range(name, values)
            drawn = np.exp(rng.uniform(math.log(low), math.log(high), total))
            usual = default.get(name)
            whole = all(type(value_of(value)) is int for value in values)
            form = ".0f" if type(usual) is int or (usual is None and whole) else ".6g"
            columns.append([f"{x:{form}}" for x in drawn.tolist()])
    return list(zip(*columns, strict=True)) if columns else [()]


def zipped(default: Any, words: str) -> list[tuple[str, Any]]:
    """Says what `metadyn sweep --zip` makes of a configuration and some options, as typed.

    For each setting, the value of the first option and the configuration. Raises `ConfigError`.
    """
    options = parsed(words.split())
    asked = Sweep("", "", 0, "zip", options, settings(options, "zip", {}, 0, 0))
    return [(first, asked.config(i, default)) for i, (first, *_) in enumerate(asked.settings)]


def value_of(text: str) -> float | int | str:
    """Reads the value of an option as it was typed: a number, if it is one."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _range(name: str, values: Sequence[str]) -> tuple[float, float]:
    with suppress(ValueError):
        low, high = map(float, values)
        if 0 < low < high < math.inf:
            return low, high
    fix = "of a random sweep, give one value, or the least and the greatest, above 0"
    raise ConfigError(f"{name} {' '.join(values)}: {fix}")


class SweepFolder:
    """A sweep's DIR. `SweepFolder(path)` opens one for reading."""

    def __init__(self, path: str | Path):
        """Raises `ConfigError` unless `path` holds a sweep."""
        self.path = Path(path).absolute()
        self.figures = self.path / "figures"
        self.config = read_json(self.path / "sweep.json", f"{path} holds no sweep of metadyn")
        found = dict(self.config)
        if found.pop("format", None) != FORMAT:
            raise ConfigError(f"{path} holds a sweep of another version of metadyn")
        with error_context(f"{path}/sweep.json: is not as metadyn writes it"):
            self.sweep = Sweep(**found)
            self.sweep.called(0)

    @classmethod
    def create(cls, path: str | Path, sweep: Sweep) -> SweepFolder:
        """Makes DIR, or opens it to go on. Parts may come at the same time.

        Raises `ConfigError` if it cannot be written, or holds anything but this sweep.
        """
        asked = {"format": FORMAT} | dataclasses.asdict(sweep)
        return claimed(cls, path, "sweep.json", asked, "sweep")

    def setting(self, i: int) -> Path:
        """Returns the run folder of a setting."""
        return self.path / "settings" / f"{i:0{len(str(len(self.sweep.settings) - 1))}}"

    def run(self, i: int) -> RunFolder | None:
        """Opens the run of a setting, if it has begun."""
        path = self.setting(i)
        return RunFolder(path) if (path / "config.json").exists() else None

    def lost(self, i: int) -> str:
        """Returns what was said when the loss of a setting was no longer finite; or nothing."""
        path = self.setting(i) / "lost.json"
        if not path.exists():
            return ""
        return read_json(path, f"{path} cannot be read").get("said") or "its loss was not finite"

    def set_lost(self, i: int, said: str) -> None:
        """Marks a setting as lost: it is not trained any further."""
        write_json(self.setting(i) / "lost.json", {"said": said})

    def ended(self, i: int) -> bool:
        """Tells whether a setting is done, or lost."""
        return (self.setting(i) / "summary.json").exists() or bool(self.lost(i))

    def whole(self, i: int) -> bool:
        """Tells whether a setting has ended, and nothing that is stored of it is damaged."""
        run = self.run(i)
        return self.ended(i) and not (run and run.damage())


def is_sweep(path: str | Path) -> bool:
    """Tells whether a folder holds a sweep."""
    return (Path(path) / "sweep.json").exists()


def planned(sweep: Sweep, study: Study, configs: Mapping[int, Any]) -> dict[int, Plan]:
    """Makes the plan of each setting that a part of a sweep does, by the setting's number.

    Raises `ConfigError`, as `run_sweep` does.
    """
    plans = {}
    for i, config in configs.items():
        with sweep.naming(i, config):
            plans[i] = study.plan(config)
            check_memory(plans[i])
    # Each setting keeps a lock open.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(configs) + FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        said = f"{len(configs):,} settings need {needed:,} open files, of {hard:,}"
        raise ConfigError(f"--part: {said}: give more parts")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return plans


def run_sweep(
    sweep: Sweep,
    study: Study,
    configs: Mapping[int, Any],
    out: str | Path,
    progress: Progress,
) -> SweepFolder:
    """Runs a part of a sweep into `out`, or what is left of it.

    `configs` are those of the part's settings, by their numbers. A setting whose loss is no longer
    finite is marked, and does not stop the others. Figures of merit are drawn by the part that ends
    last. Raises `ConfigError` for what can be known not to work before DIR is made, and as
    `run_study` does.
    """
    from metadyn import sweep_results

    plans: dict[int, Plan] = {}
    if not (is_sweep(out) and all(map(SweepFolder(out).whole, configs))):
        plans = planned(sweep, study, configs)
        kinds = int | str  # other sizes are other shapes; other numbers are not
        sized = lambda domain: [v for v in domain_summary(domain).values() if isinstance(v, kinds)]
        modes = lambda tasks: [len(probe.modes.values) for probe in tasks.probes.values()]
        measured = lambda plan: tuple(
            (e.called, *sized(e.tasks.domain), *modes(e.tasks)) for e in plan.every
        )
        unlike = {measured(plan): i for i, plan in plans.items()}.values()
        with progress.counting("checking", len(unlike)) as show:
            for i in unlike:
                show("criteria and figures")
                with sweep.naming(i, configs[i]):
                    rehearse(study, configs[i], plans[i])
            for i, plan in plans.items():
                with sweep.naming(i, configs[i]):
                    check_objectives(plan)
    folder = SweepFolder.create(out, sweep)
    for i in configs if not plans else ():  # all are done: by these presets, or by others?
        run = RunFolder(folder.setting(i))
        RunFolder.create(run.path, run.config | {"config": dataclasses.asdict(configs[i])})
    summary = folder.path / "summary.json"
    with writing(out):
        if plans:
            summary.unlink(missing_ok=True)
            with ExitStack() as stack:
                shared = sweep_programs.ProgramCache()
                measure = lambda *given: shared(_traced(given), *given[-4:])
                runners: dict[int, Runner] = {}
                for i, plan in plans.items():
                    asked = run_config(study, sweep.preset, sweep.seed, configs[i], plan)
                    run = RunFolder.create(folder.setting(i), asked)
                    stack.enter_context(run.locked())
                    run.set_aside_damaged()
                    said = sweep.called(i)
                    runners[i] = Runner(plan, run, sweep.seed, progress, False, measure, said)
                _run(study, configs, folder, runners, shared, progress)
        with lock(folder.path):  # of parts that end together the first draws
            if not summary.exists() and all(map(folder.ended, range(len(sweep.settings)))):
                sweep_results.conclude(folder, progress)
    return folder


def _traced(given: tuple[Any, ...]) -> Any:
    """Traces `inner.measure` for these arguments, once for all parameters of the same shapes.

    Arrays on devices, arrays of NumPy and shapes with a placement would each be traced anew.
    """
    *fixed, params, sample, key, indices = given
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return inner.measure.trace(*fixed, shapes, sample, key, indices)


def _run(
    study: Study,
    configs: Mapping[int, Any],
    folder: SweepFolder,
    runners: Mapping[int, Runner],
    shared: sweep_programs.ProgramCache,
    progress: Progress,
) -> None:
    """Trains and measures settings, those of one form side by side."""
    sweep = folder.sweep
    failed: list[ConfigError] = []
    forms = by_program({i: runner.loop for i, runner in runners.items()})
    with progress.counting("tracing", len(runners)) as show:
        for i, runner in runners.items():
            show(sweep.called(i))
            # Those of what is stored, too: the same numbers are to be arguments when this sweep, or
            # this part of it, is gone on with, so that bits are the same.
            ended = folder.ended(i)
            for _, stored, parts in runner.calls():
                for given in parts:
                    params, *others = given[-4:]  # those of a meta-learner are shapes as yet
                    known = not (ended or stored or jax.tree.leaves(params))
                    with error_context(sweep.called(i)):
                        shared.expect(_traced(given), (params, *others) if known else None)
    names = [f"{len(members)} settings" for members in forms]
    with progress.studies(names, "groups of settings") as begin:
        for k, members in enumerate(forms):
            begin(k)
            begun = time.monotonic()
            several = [runners[i] for i in members]
            if several[0].plan.trained and not all(map(folder.ended, members)):
                rows = Rows([runner.loop for runner in several])
                gone = [k for k, i in enumerate(members) if folder.lost(i)]

                def lost(k: int, error: ConfigError, members: list[int] = members) -> None:
                    i = members[k]
                    said = str(as_typed(error, configs[i], sweep.overrides(i)))
                    folder.set_lost(i, said)
                    progress.say(f"{sweep.called(i)}: {said}")

                start = lambda rows=rows: rows.start(shared)
                first, *others = members
                with nullcontext() if others else sweep.naming(first, configs[first]):
                    train(several, start, rows.run, lost, gone)
            training = (time.monotonic() - begun) / len(members)
            for i in members:
                if not folder.ended(i):
                    begun = time.monotonic()
                    runners[i].measure_all()
                    seconds = training + time.monotonic() - begun
                    run = runners[i].store
                    try:
                        with sweep.naming(i, configs[i]):
                            judge(study, configs[i], run, run.results(), seconds)
                    except ConfigError as error:  # the others are measured all the same
                        failed.append(error)
    if failed:
        raise failed[0]
