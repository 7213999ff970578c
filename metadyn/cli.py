"""The command line: metadyn run | list | view | figures | report | claims | devices.

Exit codes: 0 done, 1 a criterion failed, 2 bad input, a DIR that cannot be written or memory that
is not there (one line on stderr), 130 interrupted, or another process of the run was lost: the same
command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
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
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from metadyn.errors import ConfigError, ConfigWarning, meant

if TYPE_CHECKING:  # imported when needed: they start JAX
    from metadyn.progress import Progress
    from metadyn.study import Study

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
STOPPED = "interrupted; the same command goes on from here"
PATIENCE = 6.0  # seconds


_RUN = "runs/linear_regression-quick-0"
_EXAMPLES = {
    "run": "linear_regression --domain.sigma 0.3",
    "figures": _RUN,
    "report": _RUN,
    "view": f"{_RUN} --serve 8000",
    "claims": f"experiments/ {_RUN}",
    "devices": "",
    "list": "",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see metadyn --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="metadyn",
        description="Measures in what order learners learn.",
        epilog=f"Example: metadyn run {_EXAMPLES['run']}",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="do a whole study: train, measure, draw, judge",
        description="Does a study. The same command on the same DIR goes on where it was left. "
        "Options that are not listed here override the preset: see `metadyn run STUDY --options`.",
    )
    run.add_argument("study", help="a study's name, a Python file that defines one, or a folder")
    run.add_argument("--preset", default="quick", help="quick (default), paper, ...")
    run.add_argument(
        "--out",
        metavar="DIR",
        help="default runs/STUDY-PRESET-SEED; of a folder of studies, what stands for runs",
    )
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--options", action="store_true", help="list what can be overridden")
    run.add_argument(
        "--no-cache", action="store_true", help="compile anew, and keep nothing compiled"
    )
    run.add_argument("--tensorboard", action="store_true", help="log scalars to DIR/tensorboard")
    devices = commands.add_parser("devices", help="say what a run would use")
    for command in (run, devices):
        several = command.add_argument_group(
            "several processes",
            "What Slurm, Open MPI and TPU pods say by themselves. Process 0 listens at HOST:PORT.",
        )
        several.add_argument("--coordinator", metavar="HOST:PORT")
        several.add_argument("--processes", type=int, metavar="N")
        several.add_argument("--process-id", type=int, metavar="I", help="from 0 to N - 1")
    for name, what in (
        ("figures", "draw the figures again from what DIR holds"),
        ("report", "print the verdict, or how far a run has come"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("dir", metavar="DIR")
        if name == "figures":
            command.add_argument("--study", metavar="FILE", help="of a study of your own: its file")
    view = commands.add_parser("view", help="make DIR/report.html, a page to look at a run")
    view.add_argument("dir", metavar="DIR")
    view.add_argument(
        "--serve",
        type=int,
        metavar="PORT",
        help="show it at 127.0.0.1:PORT instead, while it goes on",
    )
    commands.add_parser("list", help="name the studies, their presets, and how long they took")
    claims = commands.add_parser(
        "claims",
        help="judge the paper's claims from what runs came to",
        description="Copies what the given runs came to beside the studies, and writes the tables "
        "in the folder's README.md anew.",
    )
    claims.add_argument("folder", help="a folder of studies")
    claims.add_argument("dir", metavar="DIR", nargs="*", help="runs that are done")
    for name, example in _EXAMPLES.items():
        commands.choices[name].epilog = f"Example: metadyn {name} {example}".rstrip()
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.showwarning = _warn
    try:
        if not (sys.argv[1:] if argv is None else argv):
            _parser().print_help()
            return DONE
        arguments, overrides = _parser().parse_known_args(argv)
        if overrides and arguments.command != "run":
            raise ConfigError(f"unrecognized arguments: {' '.join(overrides)}")
        return _COMMANDS[arguments.command](arguments, overrides)
    except ConfigError as error:
        if str(error):
            print(f"metadyn: {error}".replace("\n", " "), file=sys.stderr)
        return _left(BAD_INPUT)
    except KeyboardInterrupt:
        print(f"metadyn: {STOPPED}", file=sys.stderr)
        return _left(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _left(DONE)
    except Exception as error:
        from metadyn import mesh

        if mesh.lost(error):
            print(
                "metadyn: another process of this run was lost; start all of them again to go on "
                f"from the last checkpoint ({' '.join(str(error).split())[:120]})",
                file=sys.stderr,
            )
            return _left(INTERRUPTED)
        if isinstance(error, OSError):
            what = f"{error.filename or 'a file'} cannot be read or written ({error.strerror})"
            print(f"metadyn: {what}", file=sys.stderr)
            return _left(BAD_INPUT)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            lower = "lower --outer.batch, --outer.seeds or --measure.chunk, in another DIR"
            print(
                f"metadyn: memory ran out; the last checkpoint is whole: {lower}", file=sys.stderr
            )
            return _left(BAD_INPUT)
        if not mesh.joined():
            raise
        traceback.print_exc()
        return _left(FAILED)


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Leaves `PATIENCE` seconds after Ctrl-C or SIGTERM, from the last complete checkpoint.

    Python hears of signals only between calls, and compiling a program is one long call.
    """
    try:
        read, write = socket.socketpair()
        write.setblocking(False)
        before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    except ValueError:  # not in the main thread, where signals never arrive
        yield
        return
    left = threading.Event()

    def watch() -> None:
        while came := read.recv(1):
            if came[0] in (signal.SIGINT, signal.SIGTERM) and not left.wait(PATIENCE):
                print(f"metadyn: {STOPPED}", file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        write.close()


def _left(code: int) -> int:
    """The exit code. Other processes still at work notice at once, not when JAX's own exit has
    waited for them."""
    if "jax" in sys.modules:
        from metadyn import mesh

        if mesh.joined():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line, of our own warnings; those of libraries are for developers."""
    if category is ConfigWarning:
        print(f"metadyn: warning: {message}".replace("\n", " "), file=sys.stderr)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from metadyn import mesh

    # Of one error, as on a full disk, each thread of Orbax prints its own trace: for developers.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    mesh.use_every_core()
    mesh.use_compilation_cache(not arguments.no_cache)
    mesh.start(arguments.coordinator, arguments.processes, arguments.process_id)
    with _in_time():
        return _studies(arguments, overrides)


def _studies(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from rich.console import Console

    from metadyn import mesh
    from metadyn.progress import Progress
    from metadyn.scalars import check_installed
    from metadyn.study import load_studies, load_study

    if not 0 <= arguments.seed < 2**32:  # of which JAX makes a key
        raise ConfigError(f"--seed {arguments.seed}: must be from 0 to {2**32 - 1}")
    if arguments.tensorboard:
        check_installed()
    progress = Progress(Console() if mesh.first() else None)
    if not os.path.isdir(arguments.study):  # False too for what cannot be a path
        study = load_study(arguments.study)
        name = f"{study.name}-{arguments.preset}-{arguments.seed}"
        return _run_one(study, arguments, overrides, arguments.out or f"runs/{name}", progress)
    if overrides or arguments.options:
        raise ConfigError(f"{arguments.study}: overrides are for one study, not for a folder")
    studies = load_studies(arguments.study)
    for study in studies:
        _preset(study, arguments.preset)
    codes = []
    with progress.studies([study.name for study in studies]) as begin:
        for i, study in enumerate(studies):
            begin(i)
            name = f"{study.name}-{arguments.preset}-{arguments.seed}"
            out = Path(arguments.out or "runs") / name
            codes.append(_run_one(study, arguments, [], str(out), progress))
    return max(codes)


def _run_one(
    study: Study,
    arguments: argparse.Namespace,
    overrides: list[str],
    out: str,
    progress: Progress,
) -> int:
    from metadyn import report
    from metadyn.runner import run_study

    default = _preset(study, arguments.preset)
    config = configured(default, ["--help"] if arguments.options else overrides)
    if config is None:
        return DONE
    progress.say(f"metadyn: {study.name}, preset {arguments.preset}, into {out}")
    identity = (study, arguments.preset, arguments.seed, config, out)
    try:
        summary = run_study(*identity, progress, arguments.tensorboard)
    except ConfigError as error:
        raise as_typed(error, config, overrides) from error
    progress.say("\n".join(report.verdict(summary)))
    progress.say(f"figures: {Path(out) / 'figures'}")
    return DONE if all(c["passed"] for c in summary["criteria"]) else FAILED


def _preset(study: Study, preset: str) -> Any:
    if preset not in study.presets:
        known = ", ".join(study.presets)
        near = meant(preset, study.presets)
        raise ConfigError(f"--preset {preset}: of {study.name}, choose from {known}{near}")
    return study.presets[preset]


def configured(default: Any, overrides: Sequence[str]) -> Any:
    """`default` with command-line overrides, such as ["--domain.sigma", "0.2"].

    None when only help was asked for (and printed). Raises `ConfigError` for unknown names and
    values that do not parse.
    """
    import tyro

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                type(default),
                prog="metadyn run STUDY",
                default=default,
                args=list(overrides),
                config=(tyro.conf.FlagConversionOff,),
                registry=_matrices(),
            )
    except ConfigError as error:
        raise as_typed(error, default, overrides) from None
    except SystemExit as stop:
        if not stop.code:
            return None
        text = re.sub(r"\x1b\[[0-9;]*m|[─━╭╮╰╯│┃┏┓┗┛]|-{3,}", " ", errors.getvalue())
        text = re.sub(r"^\s*(Value error|Parsing error|Unrecognized options)\s", "", text)
        text = re.split(r"For full helptext|Argument helptext|Perhaps you meant", text)[0]
        options = [option for option, _ in _options(default)]
        words = (word.partition("=")[0].replace("_", "-") for word in overrides)
        unknown = (word for word in words if word.startswith("--") and word not in options)
        near = next((hint for word in unknown if (hint := meant(word, options))), "")
        raise ConfigError(f"override: {' '.join(text.split())}{near}") from None


def _matrices() -> Any:
    """How matrices are given on the command line: as JSON, [[1, 0], [0, 2]], or null."""
    import tyro

    from metadyn.domains.linear import Matrix

    registry = tyro.constructors.ConstructorRegistry()

    def parse(texts: list[str]) -> Any:
        try:
            rows = json.loads(texts[0])
            return None if rows is None else tuple(tuple(float(v) for v in row) for row in rows)
        except (ValueError, TypeError, RecursionError):
            said = f"give rows such as [[1, 0], [0, 2]], not {texts[0]!r}"
            raise ValueError(said) from None

    @registry.primitive_rule
    def _(info: Any) -> Any:
        if info.type != Matrix:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="[[ROW],[ROW],...]",
            instance_from_str=parse,
            is_instance=lambda value: value is None or isinstance(value, tuple),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    return registry


def as_typed(error: ConfigError, config: Any, overrides: Sequence[str]) -> ConfigError:
    """The same complaint about the option as it was typed: --domain.sigma -1: must be positive.

    Or, if it was not typed, about the option that would set it. Errors about anything else remain.
    """
    if not error.field:
        return error
    values = dict(_options(config))
    named = [o for o in values if f".{o[2:]}".endswith("." + error.field.replace("_", "-"))]
    typed = {}
    for i, word in enumerate(overrides):
        option, equals, value = word.partition("=")
        option = option.replace("_", "-")
        if option in named:
            rest = [value] if equals else [*_until_option(overrides[i + 1 :])]
            typed[option] = " ".join(rest)
    alike = [option for option in named if values[option] == error.value]
    meant = [option for option, text in typed.items() if _reads_as(text, error.value)]
    unknown = named[:1] if error.value is None else []
    for option in (*meant, *(o for o in alike if o in typed), *alike, *typed, *unknown):
        return ConfigError(f"{option} {typed.get(option, values[option])}: {error.fix}")
    return error


def _reads_as(text: str, value: Any) -> bool:
    """Whether an option's text is that of a value."""
    with contextlib.suppress(ValueError):
        return text == str(value) or float(text) == value
    return False


def _until_option(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if word.startswith("--"):
            return
        yield word


def _options(config: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Every option of a configuration, with its value."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{name}.")
        else:
            yield name, value


def _figures(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from metadyn import figures
    from metadyn.store import RunFolder
    from metadyn.study import known, load_study

    run = RunFolder(arguments.dir)
    name = arguments.study or run.config["study"]
    own = load_study(name).figures if arguments.study or name in known() else {}
    for path in figures.draw(run.figures, run.results(), own):
        print(path)
    if not (arguments.study or name in known()):
        said = f"{name!r} is a study of your own: --study FILE draws its own figures too"
        print(f"metadyn: {said}", file=sys.stderr)
    return DONE


def _report(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from metadyn import report
    from metadyn.store import RunFolder

    run = RunFolder(arguments.dir)
    summary = run.summary()
    for line in report.so_far(run) if summary is None else report.verdict(summary):
        print(line)
    return DONE if summary is None or all(c["passed"] for c in summary["criteria"]) else FAILED


def _view(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from rich.console import Console

    from metadyn import view
    from metadyn.progress import Progress
    from metadyn.store import RunFolder

    run = RunFolder(arguments.dir)
    if arguments.serve is None:
        print(view.write(run, Progress(Console(stderr=True))))
        return DONE
    with view.server(run, arguments.serve) as served, contextlib.suppress(KeyboardInterrupt):
        print(f"http://{view.LOCAL}:{served.server_port}/ until Ctrl-C", flush=True)
        served.serve_forever()
    return DONE


def _claims(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from metadyn import claims

    folder = Path(arguments.folder)
    claims.collect(folder, arguments.dir)
    print(claims.write(folder))
    return DONE


def _list(arguments: argparse.Namespace, overrides: list[str]) -> int:
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


def _devices(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from metadyn import mesh

    mesh.use_every_core()
    mesh.start(arguments.coordinator, arguments.processes, arguments.process_id)
    for name, value in mesh.describe().items():
        if mesh.first():
            print(f"{name}: {value}")
    return DONE


_COMMANDS = {
    "run": _run,
    "figures": _figures,
    "report": _report,
    "view": _view,
    "list": _list,
    "claims": _claims,
    "devices": _devices,
}

if __name__ == "__main__":
    sys.exit(main())
