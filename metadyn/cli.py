"""The command line: metadyn run, sweep, list, view, figures, report, claims, devices, completion.

Exit codes: 0 done, 1 a criterion failed, 2 bad input, a DIR that cannot be written or memory that
is not there (one line on stderr), 130 interrupted, or another process of the run, or whoever read
its output, was lost: the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from metadyn.errors import ConfigError, ConfigWarning, check, check_seed, meant
from metadyn.options import as_typed, configured, options_of

if TYPE_CHECKING:  # imported when needed: they start JAX
    from metadyn.progress import Progress
    from metadyn.study import Study

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
STOPPED = "interrupted; the same command goes on from here"
GRACE_SECONDS = 6.0  # seconds


class _Parser(argparse.ArgumentParser):
    def __init__(self, **given: Any):
        super().__init__(allow_abbrev=False, **given)  # --s is not --seed, but an option of a study

    def error(self, message: str) -> NoReturn:
        unknown = re.match("argument command: invalid choice: '(.*?)'", message)
        near = meant(unknown[1], _DOES) if unknown else ""
        raise ConfigError(f"{message}{near}; see metadyn --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="metadyn",
        description="Measures in what order learners learn.",
        epilog=f"Example: metadyn run {_DOES['run'][1]}",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="do a whole study: train, measure, draw, judge",
        description="Does a study. The same command on the same DIR goes on where it was left. "
        "Options that are not listed here override the preset: see `metadyn run STUDY --options`.",
    )
    run.add_argument("study", help="a study's name, a Python file that defines one, or a folder")
    run.add_argument(
        "--out",
        metavar="DIR",
        help="default runs/STUDY-PRESET-SEED; of a folder of studies, what stands for runs",
    )
    run.add_argument("--options", action="store_true", help="list what can be overridden")
    run.add_argument("--tensorboard", action="store_true", help="log scalars to DIR/tensorboard")
    sweep = commands.add_parser(
        "sweep",
        help="do a study under many settings, which share their compiled programs",
        description="Does a study under every combination of the values that are given. Any option "
        "of the study may have several. The same command on the same DIR goes on.",
    )
    sweep.add_argument("study", help="a study's name, or a Python file that defines one")
    sweep.add_argument("--out", metavar="DIR", help="default runs/STUDY-PRESET-SEED-sweep")
    sweep.add_argument("--seeds", nargs="+", metavar="N", help="the same as --outer.seeds")
    ways = sweep.add_mutually_exclusive_group()
    ways.add_argument(
        "--zip", action="store_true", help="first with first, second with second, ..."
    )
    said = "N settings drawn from the ranges that pairs of values give, by --seed"
    ways.add_argument("--random", type=int, metavar="N", help=said)
    said = "do the I-th of N parts, which share DIR: for job arrays"
    sweep.add_argument("--part", metavar="I/N", default="1/1", help=said)
    sweep.add_argument("--yes", action="store_true", help="do more than 10,000 settings")
    for command in (run, sweep):
        command.add_argument(
            "--preset", default="quick", help="quick (default), workstation, paper"
        )
        command.add_argument("--seed", type=int, default=0)
        said = "compile anew, and keep nothing compiled"
        command.add_argument("--no-cache", action="store_true", help=said)
        said = "say what it would need, without running it: here, or on a device such as h100:8"
        command.add_argument("--plan", nargs="?", const="here", metavar="DEVICE", help=said)
    devices = commands.add_parser("devices", help="say what a run would use")
    for command in (run, devices):
        several = command.add_argument_group(
            "several processes",
            "What Slurm, Open MPI and TPU pods say by themselves. Process 0 listens at HOST:PORT.",
        )
        several.add_argument("--coordinator", metavar="HOST:PORT")
        several.add_argument("--processes", type=int, metavar="N")
        several.add_argument("--process-id", type=int, metavar="I", help="from 0 to N - 1")
    figures = commands.add_parser("figures", help="draw the figures again from what DIR holds")
    figures.add_argument("dir", metavar="DIR")
    figures.add_argument("--study", metavar="FILE", help="of a study of your own: its file")
    report = commands.add_parser("report", help="print the verdict, or how far a run has come")
    report.add_argument("dir", metavar="DIR")
    view = commands.add_parser("view", help="make DIR/report.html, a page of a run or a sweep")
    view.add_argument("dir", metavar="DIR")
    said = "show it at 127.0.0.1:PORT instead, while it goes on"
    view.add_argument("--serve", type=int, metavar="PORT", help=said)
    commands.add_parser("list", help="name the studies, their presets, how long they took")
    claims = commands.add_parser(
        "claims",
        help="judge the paper's claims from what runs came to",
        description="Copies what the given runs came to beside the studies, and writes the tables "
        "in the folder's README.md anew.",
    )
    claims.add_argument("folder", help="a folder of studies")
    claims.add_argument("dir", metavar="DIR", nargs="*", default=[], help="runs that are done")
    completion = commands.add_parser("completion", help="print a shell's completion script")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    for name, (do, example) in _DOES.items():
        own = [*commands.choices[name]._option_string_actions]  # which a study does not have
        commands.choices[name].set_defaults(do=do, own=own)
        commands.choices[name].epilog = f"Example: metadyn {name} {example}".rstrip()
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; after help, raises `SystemExit`."""
    came: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    warnings.showwarning = _warn
    do: Any = None
    try:
        given = sys.argv[1:] if argv is None else argv
        arguments, overrides = _parser().parse_known_args(given or ["--help"])
        do = arguments.do
        if overrides and do not in (_run, _sweep):
            near = meant(overrides[0], arguments.own)
            raise ConfigError(f"unrecognized arguments: {' '.join(overrides)}{near}")
        arguments.overrides = overrides
        if (out := getattr(arguments, "out", None)) is not None:
            arguments.out = os.path.expanduser(out)
            if not out:
                raise ConfigError("--out '': name a folder, or leave it out")
        with _in_time():
            code = do(arguments)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        code, said = BAD_INPUT, str(error)
        if "metadyn.mesh" in sys.modules:  # the others are to say the same before this one is gone
            from metadyn import mesh

            with contextlib.suppress(RuntimeError):
                mesh.shut_down()
    except KeyboardInterrupt:
        code, said = INTERRUPTED, STOPPED
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, said = INTERRUPTED if do in (_run, _sweep) else DONE, ""
    except Exception as error:
        if came:  # it met a library that made something else of it, as in an import
            _say(STOPPED)
            return INTERRUPTED
        from metadyn import mesh

        code = BAD_INPUT
        if mesh.is_peer_loss(error):
            code, said = INTERRUPTED, " ".join(str(error).split())[:120]
            again = "start all of them again to go on from the last checkpoint"
            said = f"another process of this run was lost; {again} ({said})"
        elif isinstance(error, OSError):
            said = f"{error.filename or 'a file'} cannot be read or written"
            said += f" ({error.strerror or error})"
        elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            lower = "lower --outer.batch, --outer.seeds or --measure.chunk, in another DIR"
            said = f"memory ran out; the last checkpoint is whole: {lower}"
        elif not mesh.has_devices():
            asked = os.environ.get("JAX_PLATFORMS", "")
            said = f"JAX_PLATFORMS={asked}: JAX has no such devices here: install them, or unset it"
        elif mesh.is_distributed():
            traceback.print_exc()
            code, said = FAILED, ""
        else:
            raise
    if said:
        _say(said)
    return code


def console() -> NoReturn:
    """Runs a command for the shell and leaves at once.

    Python would wait for programs that are still being compiled, and JAX for other processes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what its encoding lacks
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(what: str) -> None:
    print(f"metadyn: {what}".replace("\n", " "), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Ends the process `GRACE_SECONDS` after Ctrl-C or SIGTERM, whatever it is doing.

    What is stored is whole: the same command goes on from the last complete checkpoint.

    Python hears of signals only between calls, and compiling a program is one long call.
    """
    read, write = socket.socketpair()
    write.setblocking(False)
    before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    left = threading.Event()

    def watch() -> None:
        while came := read.recv(1):
            if came[0] in (signal.SIGINT, signal.SIGTERM) and not left.wait(GRACE_SECONDS):
                _say(STOPPED)
                os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        write.close()


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """One line, of our own warnings; those of libraries are for developers."""
    if category is ConfigWarning:
        _say(f"warning: {message}")


def _run(arguments: argparse.Namespace) -> int:
    from metadyn import mesh

    _begin(arguments)
    mesh.start(arguments.coordinator, arguments.processes, arguments.process_id)
    code = _studies(arguments)
    mesh.shut_down()
    return code


def _begin(arguments: argparse.Namespace) -> None:
    """What comes before anything is run."""
    from metadyn import mesh

    if arguments.plan not in (None, "here"):
        from metadyn import absent_devices

        absent_devices.use_cpus_alone()
    # Of one error, as on a full disk, each thread of Orbax prints its own trace: for developers.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    mesh.use_every_core()
    mesh.use_compilation_cache(not arguments.no_cache)
    check_seed(arguments.seed, "--seed")


def _check_preset(study: Study, preset: str, own: Sequence[str]) -> None:
    known, near = ", ".join(study.presets), meant(preset, study.presets)
    fix = f"of {study.name}, choose from {known}{near}"
    check(preset in study.presets, "--preset", preset, fix)
    for field, _ in options_of(study.presets[preset]):
        if field in own:
            said = "is an option of `metadyn run` itself: rename this field of its configuration"
            raise ConfigError(f"study {study.name!r}: {field} {said}")


def _sweep(arguments: argparse.Namespace) -> int:
    from metadyn import planning, sweep, sweep_results
    from metadyn.progress import Progress, Terminal
    from metadyn.study import load_study

    _begin(arguments)
    study, preset, seed = load_study(arguments.study), arguments.preset, arguments.seed
    _check_preset(study, preset, arguments.own)
    default, words = study.presets[preset], list(arguments.overrides)
    if arguments.seeds:
        words = ["--outer.seeds", *arguments.seeds, *words]
    for word in ("--options", "--tensorboard"):
        if word in words:
            raise ConfigError(f"{word}: is an option of `metadyn run` alone")
    options, known = sweep.parsed(words), dict(options_of(default))
    kind: sweep.SweepKind = (
        "random" if arguments.random is not None else "zip" if arguments.zip else "grid"
    )
    count = arguments.random or 0
    check(kind != "random" or count >= 1, "--random", count, "must be 1 or more")
    settings = sweep.settings(options, kind, known, count, seed, arguments.yes)
    mine = sweep.part_of(arguments.part, len(settings))
    asked = sweep.Sweep(study.name, preset, seed, kind, options, settings, mine.step)
    configs = {i: asked.config(i, default, arguments.own) for i in mine}
    out = arguments.out or str(Path("runs") / f"{study.name}-{preset}-{seed}-sweep")
    progress = Progress(Terminal())
    progress.say(f"metadyn: {len(settings)} settings of {study.name}, preset {preset}, into {out}")
    if mine.step > 1:
        said = f"this is part {mine.start + 1} of {mine.step}, with {len(mine)} of them"
        progress.say(f"metadyn: {said}")
    if arguments.plan is not None:
        planned = lambda: planning.of_sweep(asked, study, configs, arguments.part)
        planning.report(planned, arguments.plan, out, progress)
        return DONE
    folder = sweep.run_sweep(asked, study, configs, out, progress)
    progress.say("\n".join(sweep_results.report(folder)))
    drawn = (folder.path / "summary.json").exists()
    there = f"figures: {folder.figures}, page: {folder.path / 'report.html'}"
    other = "figures: drawn by the part that ends last, and so is the page"
    progress.say(there if drawn else other)
    return DONE


def _studies(arguments: argparse.Namespace) -> int:
    import jax

    from metadyn import mesh
    from metadyn.progress import Progress, Terminal
    from metadyn.study import known, load_studies, load_study

    preset, seed = arguments.preset, arguments.seed
    several = os.path.isdir(arguments.study) and arguments.study not in known()
    if several and (arguments.overrides or arguments.options):
        raise ConfigError(f"{arguments.study}: overrides are for one study, not for a folder")
    studies = load_studies(arguments.study) if several else [load_study(arguments.study)]
    for study in studies:
        _check_preset(study, preset, arguments.own)
    progress = Progress(Terminal() if mesh.is_main_process() else None)
    codes = []
    with progress.studies([study.name for study in studies]) as begin:
        for i, study in enumerate(studies):
            begin(i)
            if i:  # a process can hold only so many programs, and those of a study are done with
                jax.clear_caches()
            out = arguments.out
            if several or not out:
                out = str(Path(out or "runs") / f"{study.name}-{preset}-{seed}")
            codes.append(_run_one(study, arguments, out, progress))
    return max(codes)


def _run_one(study: Study, arguments: argparse.Namespace, out: str, progress: Progress) -> int:
    from metadyn import planning, report
    from metadyn.runner import run_study

    preset, seed, overrides = arguments.preset, arguments.seed, arguments.overrides
    given = ["--help"] if arguments.options else overrides
    config = configured(study.presets[preset], given, arguments.own)
    if config is None:
        return DONE
    progress.say(f"metadyn: {study.name}, preset {preset}, into {out}")
    try:
        if arguments.plan is not None:
            planned = lambda: planning.of_run(study, config)
            planning.report(planned, arguments.plan, out, progress)
            return DONE
        summary = run_study(study, preset, seed, config, out, progress, arguments.tensorboard)
    except ConfigError as error:
        raise as_typed(error, config, overrides) from error
    progress.say("\n".join(report.verdict(summary)))
    progress.say(f"figures: {Path(out) / 'figures'}, page: {Path(out) / 'report.html'}")
    return _code(summary)


def _code(summary: dict[str, Any]) -> int:
    return DONE if all(row["passed"] for row in summary["criteria"]) else FAILED


def _progress() -> Progress:
    """Makes the progress of a command, said on stderr: stdout is for what was asked for."""
    from rich.console import Console

    from metadyn.progress import Progress

    return Progress(Console(stderr=True))


def _figures(arguments: argparse.Namespace) -> int:
    from metadyn import figures
    from metadyn.store import RunFolder
    from metadyn.study import known, load_study
    from metadyn.sweep import SweepFolder, is_sweep

    progress = _progress()
    if is_sweep(arguments.dir):
        from metadyn import sweep_results

        fix = "figures of a sweep are the same for all studies: leave it out"
        check(not arguments.study, "--study", arguments.study, fix)
        sweep = SweepFolder(arguments.dir)
        settings = sweep_results.rows(sweep, progress)
        paths = sweep_results.draw(sweep, settings, progress)
        why = "of its settings this is said: "
        why += "; ".join(sorted({str(row["lost"]) for row in settings if row["lost"]}))
        if not sweep.sweep.swept:
            why = "it has one setting, with nothing to draw it against"
        return _drawn(arguments.dir, paths, why)
    run = RunFolder(arguments.dir)
    name = arguments.study or run.config["study"]
    found = load_study(name) if arguments.study or name in known() else None
    own = found.own_figures() if found else {}
    if found and found.name != run.config["study"]:
        theirs = f"{arguments.dir} is a run of {run.config['study']!r}"
        raise ConfigError(f"--study {name}: defines {found.name!r}, but {theirs}")
    paths = figures.draw(run.figures, run.results(), own, progress)
    preset = found.presets.get(run.config["preset"]) if found and not arguments.study else None
    names = lambda config: sorted(name for name, _ in options_of(config))
    if paths and preset and names(preset) != names(run.config["config"]):
        _say(f"{name!r} has other settings than this run: --study FILE draws a study of your own")
    if paths and not found:
        _say(f"{name!r} is a study of your own: --study FILE draws its own figures too")
    return _drawn(arguments.dir, paths)


def _drawn(folder: str, paths: list[Path], why: str = "") -> int:
    for path in paths:
        print(path)
    if not paths:
        _say(f"{folder}: nothing is drawn, as {why or 'it holds no measurement yet'}")
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from metadyn import report
    from metadyn.store import RunFolder
    from metadyn.sweep import SweepFolder, is_sweep

    if is_sweep(arguments.dir):
        from metadyn import sweep_results

        for line in sweep_results.report(SweepFolder(arguments.dir), _progress()):
            print(line)
        return DONE
    run = RunFolder(arguments.dir)
    summary = run.summary()
    for line in report.so_far(run) if summary is None else report.verdict(summary):
        print(line)
    return DONE if summary is None else _code(summary)


def _completion(arguments: argparse.Namespace) -> int:
    from metadyn import completion

    (commands,) = (a.choices for a in _parser()._actions if isinstance(a.choices, dict))
    print(completion.script(commands, arguments.shell), end="")
    return DONE


def _view(arguments: argparse.Namespace) -> int:
    from metadyn import view
    from metadyn.store import RunFolder
    from metadyn.sweep import SweepFolder, is_sweep

    of = SweepFolder(arguments.dir) if is_sweep(arguments.dir) else RunFolder(arguments.dir)
    if arguments.serve is None:
        if isinstance(of, SweepFolder) and not any(map(of.ended, range(len(of.sweep.settings)))):
            raise ConfigError(f"{arguments.dir}: no setting is done yet; try --serve PORT")
        print(view.write(of, _progress()))
        return DONE
    server = view.server(of, arguments.serve, _progress())
    with server as served, contextlib.suppress(KeyboardInterrupt):
        print(f"http://{view.LOCAL}:{served.server_port}/ until Ctrl-C", flush=True)
        served.serve_forever()
    return DONE


def _claims(arguments: argparse.Namespace) -> int:
    from metadyn import claims

    folder = Path(arguments.folder)
    claims.collect(folder, arguments.dir)
    print(claims.write(folder))
    return DONE


def _list(arguments: argparse.Namespace) -> int:
    from metadyn.store import read_summary
    from metadyn.study import folder, load_studies

    for study in load_studies(str(folder())):
        about = sys.modules[study.plan.__module__].__doc__ or ""
        print(f"{study.name}: {about.splitlines()[0] if about else ''}")
        for preset in study.presets:
            path = folder() / "results" / f"{study.name}-{preset}.json"
            took = "not measured"
            if path.exists():
                found = read_summary(path)["environment"]
                took = f"{found['seconds'] / 60:.1f} min on {found['processor']}"
            print(f"  --preset {preset:12} {took}")
    return DONE


def _devices(arguments: argparse.Namespace) -> int:
    from metadyn import mesh

    mesh.use_every_core()
    mesh.start(arguments.coordinator, arguments.processes, arguments.process_id)
    for name, value in mesh.describe().items():
        if mesh.is_main_process():
            print(f"{name}: {value}")
    mesh.shut_down()
    return DONE


_RUN = "runs/linear_regression-quick-0"
_DOES = {
    "run": (_run, "linear_regression --domain.sigma 0.3"),
    "sweep": (
        _sweep,
        "linear_regression --domain.sigma 0.1 0.3 --outer.learning-rate 1e-2 3e-2",
    ),
    "figures": (_figures, _RUN),
    "report": (_report, _RUN),
    "view": (_view, f"{_RUN} --serve 8000"),
    "claims": (_claims, f"experiments/ {_RUN}"),
    "devices": (_devices, ""),
    "list": (_list, ""),
    "completion": (_completion, "bash > ~/.local/share/bash-completion/completions/metadyn"),
}
"""What each command does, and an example of its arguments."""


if __name__ == "__main__":
    console()
