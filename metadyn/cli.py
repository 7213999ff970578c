"""The command line: metadyn run, sweep, list, view, figures, report, claims, devices, completion.

Exit codes: 0 done; 1 a criterion failed; 2 bad input, a DIR that cannot be written, or too little
memory (one line on stderr); 130 interrupted, or the reader of the output or another process of the
run is gone. After 130, the same command resumes the run.
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

from metadyn.errors import ConfigError, ConfigWarning, check, check_seed, did_you_mean
from metadyn.options import as_typed, configured, options_of

if TYPE_CHECKING:  # commands import these modules when they need them, since they start JAX
    from metadyn.progress import Progress
    from metadyn.study import Study

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
STOPPED = "interrupted; run the same command again to resume"
GRACE_SECONDS = 6.0  # seconds that a command may go on after Ctrl-C or SIGTERM


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)  # --s may be a study's option, not --seed

    def error(self, message: str) -> NoReturn:
        unknown = re.match("argument command: invalid choice: '(.*?)'", message)
        suggestion = did_you_mean(unknown[1], _DOES) if unknown else ""
        raise ConfigError(f"{message}{suggestion}; see metadyn --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="metadyn",
        description="Measures in what order learners learn.",
        epilog=f"Example: metadyn run {_DOES['run'][1]}",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run a whole study: train, measure, draw figures, judge criteria",
        description="Runs a study. The same command on the same DIR resumes where it stopped. "
        "Options that are not listed here override the preset: see `metadyn run STUDY --options`.",
    )
    run.add_argument("study", help="a study's name, a Python file that defines one, or a folder")
    run.add_argument(
        "--out",
        metavar="DIR",
        help="default runs/STUDY-PRESET-SEED; for a folder of studies, replaces runs/",
    )
    run.add_argument("--options", action="store_true", help="list the study's options")
    run.add_argument("--tensorboard", action="store_true", help="log scalars to DIR/tensorboard")
    sweep = commands.add_parser(
        "sweep",
        help="run a study with many settings, which share compiled programs",
        description="Runs a study with every combination of the given values. Every option of the "
        "study takes one or more values. The same command on the same DIR resumes.",
    )
    sweep.add_argument("study", help="a study's name, or a Python file that defines one")
    sweep.add_argument("--out", metavar="DIR", help="default runs/STUDY-PRESET-SEED-sweep")
    sweep.add_argument("--seeds", nargs="+", metavar="N", help="the same as --outer.seeds")
    combination = sweep.add_mutually_exclusive_group()
    combination.add_argument(
        "--zip", action="store_true", help="take all first values, then all second values, ..."
    )
    text = "draw N settings; two values of an option are the ends of its range"
    combination.add_argument("--random", type=int, metavar="N", help=text)
    text = "run only part I of N, all with the same DIR: for job arrays"
    sweep.add_argument("--part", metavar="I/N", default="1/1", help=text)
    sweep.add_argument("--yes", action="store_true", help="allow more than 10,000 settings")
    for command in (run, sweep):
        command.add_argument(
            "--preset", default="quick", help="quick (default), workstation, paper"
        )
        command.add_argument("--seed", type=int, default=0)
        text = "neither read nor write the cache of compiled programs"
        command.add_argument("--no-cache", action="store_true", help=text)
        text = "print what it would need, without running it: here, or on a device such as h100:8"
        command.add_argument("--plan", nargs="?", const="here", metavar="DEVICE", help=text)
    devices = commands.add_parser("devices", help="print which devices a run would use")
    for command in (run, devices):
        processes = command.add_argument_group(
            "several processes",
            "Slurm, Open MPI and TPU pods set these by themselves. Process 0 listens at HOST:PORT.",
        )
        processes.add_argument("--coordinator", metavar="HOST:PORT")
        processes.add_argument("--processes", type=int, metavar="N")
        processes.add_argument("--process-id", type=int, metavar="I", help="from 0 to N - 1")
    figures = commands.add_parser("figures", help="draw the figures again from what DIR holds")
    figures.add_argument("dir", metavar="DIR")
    figures.add_argument("--study", metavar="FILE", help="the file, if the study is your own")
    report = commands.add_parser("report", help="print the verdict, or how far a run has come")
    report.add_argument("dir", metavar="DIR")
    view = commands.add_parser("view", help="make DIR/report.html, a page of a run or a sweep")
    view.add_argument("dir", metavar="DIR")
    text = "serve it at 127.0.0.1:PORT instead, updated during the run"
    view.add_argument("--serve", type=int, metavar="PORT", help=text)
    commands.add_parser("list", help="list the studies, their presets, how long they took")
    claims = commands.add_parser(
        "claims",
        help="judge the claims, the paper's and ours, by the results of runs",
        description="Copies the results of the given runs into the folder of studies, and rewrites "
        "the tables in its README.md.",
    )
    claims.add_argument("folder", help="a folder of studies")
    claims.add_argument("dir", metavar="DIR", nargs="*", default=[], help="finished runs")
    completion = commands.add_parser("completion", help="print a shell's completion script")
    completion.add_argument("shell", choices=["bash", "zsh"])
    completion.set_defaults(commands=commands.choices)
    for name, (function, example) in _DOES.items():
        command = commands.choices[name]
        flags = [*command._option_string_actions]  # to tell them from a study's options
        command.set_defaults(function=function, flags=flags)
        command.epilog = f"Example: metadyn {name} {example}".rstrip()
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. Raises `SystemExit` after printing help."""
    signals: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    warnings.showwarning = _warn
    function: Any = None
    try:
        words = sys.argv[1:] if argv is None else argv
        arguments, overrides = _parser().parse_known_args(words or ["--help"])
        function = arguments.function
        if overrides and function not in (_run, _sweep):
            suggestion = did_you_mean(overrides[0], arguments.flags)
            raise ConfigError(f"unrecognized arguments: {' '.join(overrides)}{suggestion}")
        arguments.overrides = overrides
        if (out := getattr(arguments, "out", None)) is not None:
            arguments.out = os.path.expanduser(out)
            if not out:
                raise ConfigError("--out '': name a folder, or leave it out")
        with _grace_period():
            code = function(arguments)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        code, message = BAD_INPUT, str(error)
        if "metadyn.mesh" in sys.modules:  # the others print the same error before this exits
            from metadyn import mesh

            with contextlib.suppress(RuntimeError):
                mesh.shut_down()
    except KeyboardInterrupt:
        code, message = INTERRUPTED, STOPPED
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = INTERRUPTED if function in (_run, _sweep) else DONE, ""
    except Exception as error:
        if signals:  # a library turned our KeyboardInterrupt into this, as during an import
            _say(STOPPED)
            return INTERRUPTED
        from metadyn import mesh

        code = BAD_INPUT
        if mesh.is_peer_loss(error):
            code, cause = INTERRUPTED, " ".join(str(error).split())[:120]
            hint = "start all of them again to resume from the last checkpoint"
            message = f"another process of this run was lost; {hint} ({cause})"
        elif isinstance(error, OSError):
            message = f"{error.filename or 'a file'} cannot be read or written"
            message += f" ({error.strerror or error})"
        elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            hint = "lower --outer.batch, --outer.seeds or --measure.chunk, in a new DIR"
            message = f"memory ran out; the last checkpoint is intact: {hint}"
        elif not mesh.has_devices():
            message = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
            message += ": JAX has no such devices here: install them, or unset it"
        elif mesh.is_distributed():
            traceback.print_exc()
            code, message = FAILED, ""
        else:
            raise
    if message:
        _say(message)
    return code


def console() -> NoReturn:
    """Runs a command for the shell and exits the process without clean-up.

    On a normal exit, Python waits for programs that still compile, and JAX for other processes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that its encoding lacks
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(message: str) -> None:
    print(f"metadyn: {message}".replace("\n", " "), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _grace_period() -> Iterator[None]:
    """Ends the process `GRACE_SECONDS` after Ctrl-C or SIGTERM, whatever it is doing.

    Stored checkpoints stay complete, and the same command resumes from the last one.

    Python handles signals only between calls, and compiling a program is one long call.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    previous = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    finished = threading.Event()

    def watch() -> None:
        while byte := receiver.recv(1):
            if byte[0] in (signal.SIGINT, signal.SIGTERM) and not finished.wait(GRACE_SECONDS):
                _say(STOPPED)
                os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        finished.set()
        signal.set_wakeup_fd(previous)
        sender.close()


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Prints one of our own warnings in one line. Warnings of libraries are for developers."""
    if category is ConfigWarning:
        _say(f"warning: {message}")


def _prepare(arguments: argparse.Namespace) -> None:
    """Sets up the processors, logging and compilation cache of a command, and checks its seed."""
    from metadyn import mesh

    if arguments.plan not in (None, "here"):
        from metadyn import absent_devices

        absent_devices.use_cpus_alone()
    # On an error such as a full disk, each Orbax thread prints its own trace, for developers.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    mesh.use_every_core()
    mesh.use_compilation_cache(not arguments.no_cache)
    check_seed(arguments.seed, "--seed")


def _check_preset(study: Study, arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` unless the study has the preset, and no option that the command has."""
    preset = arguments.preset
    presets, suggestion = ", ".join(study.presets), did_you_mean(preset, study.presets)
    hint = f"{study.name} has no such preset: choose from {presets}{suggestion}"
    check(preset in study.presets, "--preset", preset, hint)
    for option, _ in options_of(study.presets[preset]):
        if option in arguments.flags:
            hint = f"is an option of `metadyn {arguments.command}` itself: rename this field"
            raise ConfigError(f"study {study.name!r}: {option} {hint}")


def _sweep(arguments: argparse.Namespace) -> int:
    from metadyn import planning, sweep, sweep_results
    from metadyn.progress import Progress, Terminal
    from metadyn.study import load_study

    _prepare(arguments)
    study, preset, seed = load_study(arguments.study), arguments.preset, arguments.seed
    _check_preset(study, arguments)
    default, words = study.presets[preset], list(arguments.overrides)
    if arguments.seeds:
        words = ["--outer.seeds", *arguments.seeds, *words]
    for word in ("--options", "--tensorboard"):
        if word in words:
            raise ConfigError(f"{word}: is an option of `metadyn run` alone")
    options, defaults = sweep.parsed(words), dict(options_of(default))
    kind: sweep.SweepKind = "zip" if arguments.zip else "grid"
    if arguments.random is not None:
        kind = "random"
    count = arguments.random or 0
    check(kind != "random" or count >= 1, "--random", count, "must be 1 or more")
    settings = sweep.settings(options, kind, defaults, count, seed, arguments.yes)
    indices = sweep.part_of(arguments.part, len(settings))
    request = sweep.Sweep(study.name, preset, seed, kind, options, settings, indices.step)
    configs = {i: request.config(i, default, arguments.flags) for i in indices}
    out = arguments.out or str(Path("runs") / f"{study.name}-{preset}-{seed}-sweep")
    progress = Progress(Terminal())
    progress.say(f"metadyn: {len(settings)} settings of {study.name}, preset {preset}, into {out}")
    if indices.step > 1:
        part = f"part {indices.start + 1} of {indices.step} runs {len(indices)} of these settings"
        progress.say(f"metadyn: {part}")
    if arguments.plan is not None:
        make_plan = lambda: planning.plan_sweep(request, study, configs, arguments.part)
        planning.report(make_plan, arguments.plan, out, progress)
        return DONE
    folder = sweep.run_sweep(request, study, configs, out, progress)
    progress.say("\n".join(sweep_results.report(folder)))
    if (folder.path / "summary.json").exists():
        progress.say(f"figures: {folder.figures}, page: {folder.path / 'report.html'}")
    else:
        progress.say("figures and page: made by the part that ends last")
    return DONE


def _run(arguments: argparse.Namespace) -> int:
    import jax

    from metadyn import mesh
    from metadyn.progress import Progress, Terminal
    from metadyn.study import load_studies, load_study, study_names

    _prepare(arguments)
    mesh.start(arguments.coordinator, arguments.processes, arguments.process_id)
    preset, seed = arguments.preset, arguments.seed
    is_folder = os.path.isdir(arguments.study) and arguments.study not in study_names()
    if is_folder and (arguments.overrides or arguments.options):
        raise ConfigError(f"{arguments.study}: overrides are for one study, not for a folder")
    studies = load_studies(arguments.study) if is_folder else [load_study(arguments.study)]
    for study in studies:
        _check_preset(study, arguments)
    progress = Progress(Terminal() if mesh.is_main_process() else None)
    codes = []
    with progress.studies([study.name for study in studies]) as begin:
        for i, study in enumerate(studies):
            begin(i)
            if i:  # one process can hold only so many programs; the last study's are not needed
                jax.clear_caches()
            out = arguments.out
            if is_folder or not out:
                out = str(Path(out or "runs") / f"{study.name}-{preset}-{seed}")
            codes.append(_run_one(study, arguments, out, progress))
    mesh.shut_down()
    return max(codes)


def _run_one(study: Study, arguments: argparse.Namespace, out: str, progress: Progress) -> int:
    from metadyn import planning, report
    from metadyn.runner import run_study

    preset, seed, overrides = arguments.preset, arguments.seed, arguments.overrides
    words = ["--help"] if arguments.options else overrides
    config = configured(study.presets[preset], words, arguments.flags)
    if config is None:
        return DONE
    progress.say(f"metadyn: {study.name}, preset {preset}, into {out}")
    try:
        if arguments.plan is not None:
            make_plan = lambda: planning.plan_run(study, config)
            planning.report(make_plan, arguments.plan, out, progress)
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
    """Makes a progress display on stderr, so that stdout holds only the command's results."""
    from rich.console import Console

    from metadyn.progress import Progress

    return Progress(Console(stderr=True))


def _figures(arguments: argparse.Namespace) -> int:
    from metadyn import figures
    from metadyn.store import RunFolder
    from metadyn.study import load_study, study_names
    from metadyn.sweep import SweepFolder, is_sweep

    progress = _progress()
    if is_sweep(arguments.dir):
        from metadyn import sweep_results

        hint = "a sweep has no figures of the study's own: leave the option out"
        check(not arguments.study, "--study", arguments.study, hint)
        folder = SweepFolder(arguments.dir)
        rows = sweep_results.rows(folder, progress)
        paths = sweep_results.draw(folder, rows, progress)
        lost = "; ".join(sorted({str(row["lost"]) for row in rows if row["lost"]}))
        reason = f"no setting has results ({lost})"
        if not folder.sweep.swept:
            reason = "no option has several values to draw results against"
        return _print_paths(arguments.dir, paths, reason)
    run = RunFolder(arguments.dir)
    name = arguments.study or run.config["study"]
    study = load_study(name) if arguments.study or name in study_names() else None
    own_figures = study.own_figures() if study else {}
    if study and study.name != run.config["study"]:
        mismatch = f"{arguments.dir} is a run of {run.config['study']!r}"
        raise ConfigError(f"--study {name}: defines {study.name!r}, but {mismatch}")
    paths = figures.draw(run.figures, run.results(), own_figures, progress)
    preset = study.presets.get(run.config["preset"]) if study and not arguments.study else None
    options = lambda config: sorted(option for option, _ in options_of(config))
    if paths and preset and options(preset) != options(run.config["config"]):
        _say(f"{name!r} has other options than this run: if the study is yours, add --study FILE")
    if paths and not study:
        _say(f"{name!r} does not come with metadyn: add --study FILE to draw its own figures too")
    return _print_paths(arguments.dir, paths)


def _print_paths(folder: str, paths: list[Path], reason: str = "") -> int:
    """Prints the paths of the figures that were drawn; on stderr the reason, if none were."""
    for path in paths:
        print(path)
    if not paths:
        _say(f"{folder}: nothing is drawn, as {reason or 'it holds no measurement yet'}")
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

    print(completion.script(arguments.commands, arguments.shell), end="")
    return DONE


def _view(arguments: argparse.Namespace) -> int:
    from metadyn import view
    from metadyn.store import RunFolder
    from metadyn.sweep import SweepFolder, is_sweep

    folder = SweepFolder(arguments.dir) if is_sweep(arguments.dir) else RunFolder(arguments.dir)
    if arguments.serve is None:
        if isinstance(folder, SweepFolder) and not any(
            map(folder.ended, range(len(folder.sweep.settings)))
        ):
            raise ConfigError(f"{arguments.dir}: no setting is done yet; try --serve PORT")
        print(view.write(folder, _progress()))
        return DONE
    server = view.server(folder, arguments.serve, _progress())
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
    from metadyn.study import load_studies, studies_folder

    for study in load_studies(str(studies_folder())):
        docstring = sys.modules[study.plan.__module__].__doc__ or ""
        print(f"{study.name}: {docstring.splitlines()[0] if docstring else ''}")
        for preset in study.presets:
            path = studies_folder() / "results" / f"{study.name}-{preset}.json"
            duration = "not measured"
            if path.exists():
                environment = read_summary(path)["environment"]
                duration = f"{environment['seconds'] / 60:.1f} min on {environment['processor']}"
            print(f"  --preset {preset:12} {duration}")
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
"""The function that carries out each command, and an example of the command's arguments."""


if __name__ == "__main__":
    console()
