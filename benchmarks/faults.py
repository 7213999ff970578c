"""Tries runs that are killed, damaged, out of disk space, or given bad input.

    python -m benchmarks.faults [--only NAME ...] [--seed N]

Runs `tiny_study.py` under each kind of fault, compares the result with that of an undisturbed run
bit for bit, and prints what was tried, how often, and what was lost.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

import metadyn
from metadyn.cli import main as metadyn_main
from metadyn.store import RunFolder

ROOT = Path(__file__).parent.parent
STUDY = str(Path(__file__).parent / "tiny_study.py")
STUDIES = [STUDY, *(str(path) for path in sorted((ROOT / "experiments").glob("*.py")))]
LONG = ("--outer.steps", "300000", "--outer.checkpoints", "450", "--outer.dispatch", "50")
NASTY = ["-1", "0", "nan", "-inf", "1e999", "x", "None", "[]", "[[1]]", "{}", "--", "1,2", "true"]
NASTY += [
    "0x10",
    "1e-400",
    "\N{BOMB}",
    "../..",
    "$(id)",
    "",
    " ",
    "1 2",
    "\n",
    "9" * 40,
    "a" * 5000,
]


class Lost(AssertionError):
    """Raised for a fault that did harm."""


def expect(holds, said):
    """Raises `Lost` with the message `said` unless `holds`."""
    if not holds:
        raise Lost(said)


def ask(arguments):
    """Returns a command's exit code and stderr lines. Raises `Lost` if it raises or takes 120 s."""

    def time_out(number, frame):
        raise Lost(f"{arguments}: no answer within 120 s")

    out, err = io.StringIO(), io.StringIO()
    old_handler = signal.signal(signal.SIGALRM, time_out)
    signal.alarm(120)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = metadyn_main([str(a) for a in arguments])
    except (Exception, SystemExit) as error:
        raise Lost(f"{arguments}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
    return code, err.getvalue().splitlines()


def refused(arguments):
    """Raises `Lost` unless a command ends with exit code 2 and one line on stderr."""
    code, lines = ask(arguments)
    expect(code == 2 and len(lines) == 1, f"{arguments}: {code}, {lines}")


def begin(out, *more, before=()):
    """Starts a run of the tiny study in its own process, through the command `before` if given."""
    command = [*before, sys.executable, "-m", "metadyn.cli", "run", STUDY, "--out", str(out), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(command, env=environment, **pipes)


def ends(run, code, said=""):
    """Raises `Lost` unless a run ends with this exit code and text, bad input in one line."""
    _, errors = run.communicate()
    expect(run.returncode == code and said in errors, f"exit code {run.returncode}: {errors}")
    expect(code != 2 or len(errors.splitlines()) == 1, errors)


def finish(out, *more):
    """Runs the tiny study to its end, and returns its folder."""
    ends(begin(out, *more), 0)
    return out


def same(one, other):
    """Raises `Lost` unless two runs hold the same bits: parameters, trajectories, measurements."""
    runs = RunFolder(one), RunFolder(other)
    steps, other_steps = (run.outer_steps() for run in runs)
    expect(steps == other_steps, f"outer steps {other_steps}, not {steps}")
    arrays = [{} for _ in runs]
    for run, stored in zip(runs, arrays, strict=True):
        stored["state"] = jax.tree.leaves(run.state(steps[-1]))
        for task_set in ("tracked", "heldout", "in_distribution"):
            data = metadyn.load(run.path, task_set)
            stored[task_set] = [data[name].to_numpy() for name in sorted(data)]
    for name in arrays[0]:
        for a, b in zip(arrays[0][name], arrays[1][name], strict=True):
            expect(a.tobytes() == b.tobytes(), f"{name} differs")


def kills(folder, count, rng):
    """`kill -9` at random moments of one run, every third aimed at a save."""
    intact, out = finish(folder / "whole", *LONG), folder / "killed"
    saves = n_kills = 0
    while n_kills < count:
        run = begin(out, *LONG)
        if n_kills % 3 == 2:  # anywhere, start-up included
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(rng.uniform(0, 12))
        else:
            training = _await_training(run)
            if n_kills % 3 == 0 and training:
                while run.poll() is None and not list(out.glob("checkpoints/*.part*")):
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.05))
                saves += bool(list(out.glob("checkpoints/*.part*")))
            elif training:
                time.sleep(rng.uniform(0, 2))
        expect(run.poll() is None, f"done after {n_kills} kills, too soon: {run.returncode}")
        run.kill()
        run.communicate()
        n_kills += 1
    finish(out, *LONG)
    same(intact, out)
    return n_kills, f"{saves} of them while a folder was being written"


def _await_training(run):
    """Reads output until a run trains. Returns whether it does before it ends."""
    return any(re.match("training [1-9]", line) for line in run.stdout)


def signals(folder, count, rng):
    """SIGTERM and Ctrl-C at random moments of one run, each answered within 10 s."""
    intact, out, slowest = finish(folder / "whole", *LONG), folder / "stopped", 0.0
    for turn in range(count):
        run = begin(out, *LONG)
        _await_training(run)
        time.sleep(rng.uniform(0, 1))
        run.send_signal((signal.SIGTERM, signal.SIGINT)[turn % 2])
        start = time.monotonic()
        ends(run, 130, "the same command")
        slowest = max(slowest, time.monotonic() - start)
        expect(slowest < 10, f"{slowest:.1f} s")
    finish(out, *LONG)
    same(intact, out)
    return count, f"slowest to leave: {slowest:.1f} s"


def damage(folder, count, rng):
    """Every file of two checkpoints and a measurement: missing, cut short, a byte changed.

    The file must be found, named and not read. Runs over damage in each must give the same bits.
    """
    intact = finish(folder / "whole")
    run, tried = RunFolder(intact), 0
    steps = run.outer_steps()
    folders = [intact / "checkpoints" / str(step) for step in (steps[-1], steps[2])]
    folders.append(intact / "measurements" / "in_distribution" / "lstm")
    for stored in folders:
        for path in sorted(p for p in stored.rglob("*") if p.is_file()):
            content = path.read_bytes()
            changes = [None, content[: len(content) // 2], content[:-1]]
            for _ in range(count):
                i, mask = rng.randrange(len(content)), rng.randrange(1, 256)
                changes.append(content[:i] + bytes([content[i] ^ mask]) + content[i + 1 :])
            for changed in changes:
                path.unlink() if changed is None else path.write_bytes(changed)
                code, lines = ask(["figures", intact])
                is_named = len(lines) == 1 and f"{stored} is damaged" in lines[0]
                expect(code == 2 and is_named, (path, lines))
                path.write_bytes(content)
                tried += 1
    for turn, path in enumerate((folders[0] / "state", folders[1] / "trajectories", folders[2])):
        out = folder / f"damaged{turn}"
        shutil.copytree(intact, out)
        file = rng.choice([p for p in (out / path.relative_to(intact)).rglob("*") if p.is_file()])
        file.unlink()
        finish(out)
        expect(len(list(out.rglob("*.damaged"))) == 1, "nothing was kept aside")
        same(intact, out)
    return tried, "each found and named; 3 runs over damage made it anew, bit for bit"


def full_disk(folder, count, rng):
    """Writing fails from the 200th, the 1 500th or the 4 000th byte of a file on."""
    intact = finish(folder / "whole")
    for turn in range(count):
        out, limit = folder / f"full{turn}", (200, 1500, 4000)[turn % 3]
        shutil.copytree(intact, out)
        for step in RunFolder(intact).outer_steps()[turn + 1 :]:
            shutil.rmtree(out / "checkpoints" / str(step))
        shutil.rmtree(out / "measurements")
        (out / "summary.json").unlink()
        ends(begin(out, before=("prlimit", f"--fsize={limit}")), 2, "cannot be written")
        finish(out)
        same(intact, out)
    return count, "one line and exit code 2 each; gone on with once there was space"


def read_only(folder, count, rng):
    """A DIR that may not be written."""
    out = finish(folder / "whole")
    (out / "summary.json").unlink()
    for path in (out, *(p for p in out.rglob("*") if p.is_dir())):
        path.chmod(0o555)
    prefix = ("setpriv", "--bounding-set=-dac_override")  # else root writes anywhere
    for _ in range(count):
        ends(begin(out, before=prefix if os.geteuid() == 0 else ()), 2, "cannot be written")
    for path in (out, *(p for p in out.rglob("*") if p.is_dir())):
        path.chmod(0o755)
    return count, "one line, exit code 2"


def in_use(folder, count, rng):
    """A second run on a DIR in use."""
    out = folder / "held"
    run = begin(out, *LONG)
    _await_training(run)
    for _ in range(count):
        ends(begin(out, *LONG), 2, "in use by another run")
    run.terminate()
    run.communicate()
    expect(not RunFolder(out).damage(), "the first run was harmed")
    return count, "one line, exit code 2; the first run unharmed"


def not_finite(folder, count, rng):
    """A loss that overflows."""
    unstable = ("--outer.optimizer", "sgd", "--outer.learning-rate", "1e30", "--outer.clip", "1e30")
    for turn in range(count):
        out = folder / f"wild{turn}"
        ends(begin(out, *unstable, "--outer.seeds", str(1 + turn)), 2, "no longer finite")
        run = RunFolder(out)
        expect(not run.damage() and run.outer_steps(), "no checkpoint is left")
    return count, "one line, exit code 2, the checkpoints before it sound"


def bad_inputs(folder, count, rng):
    """Generated bad options, studies, DIRs, config.json and summary.json files, a fifth each."""
    if not (folder / "whole").exists():
        finish(folder / "whole")
    attempts = [attempt(folder, rng) for attempt in (_bad_option, _bad_study, _bad_folder)]
    attempts += [_bad_file(name, folder, rng) for name in ("config.json", "summary.json")]
    for turn in range(count):
        next(attempts[turn % len(attempts)])
    return count, "no traceback, no hang, nothing overwritten"


def _bad_option(folder, rng):
    """Yields after each try of an odd or cut-short option, into a DIR that must stay as it is."""
    foreign = folder / "thesis.tex"
    foreign.write_text("dear")
    while True:
        study = rng.choice(STUDIES)
        name, value = rng.choice(_options(study)), rng.choice(NASTY)
        options = rng.choice(
            [[name, value], [name], [name + "x", value], [name, value, name], [value]]
        )
        refused(["run", study, "--out", foreign, *options])
        expect(foreign.read_text() == "dear", options)
        yield


@functools.cache
def _options(study):
    """Lists the options of a study."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        metadyn_main(["run", study, "--options"])
    return sorted({word for word in text.getvalue().split() if word.startswith("--")} - {"--help"})


def _bad_study(folder, rng):
    """Yields after each try of a path that is no study."""
    studies = folder / "studies"
    studies.mkdir(exist_ok=True)
    source = Path(STUDY).read_bytes()
    out = folder / "never"
    while True:
        path = studies / f"study_{rng.randrange(10**9)}.py"
        cut = rng.randrange(len(source))
        content = rng.choice([
            source[:cut],
            source[:cut] + bytes([rng.randrange(256)]) * 3 + source[cut:],
            rng.randbytes(rng.randrange(1, 2000)),
            b"study = " + repr(rng.choice(NASTY)).encode(),
            b"raise " + rng.choice([b"ValueError('a\\nb')", b"SystemExit(0)", b"RecursionError"]),
            b"def f(): f()\nf()",
        ])  # fmt: skip
        path.write_bytes(content + b"\nstudy = None\n")
        argument = rng.choice(
            [path, path, path, studies, f"{path}\n", "\0", "a" * 5000, "/dev/zero", ""]
        )
        refused(["run", argument, "--out", out])
        expect(not out.exists(), argument)
        yield


def _bad_folder(folder, rng):
    """Yields after each try of a path that is no DIR, or not one of metadyn."""
    foreign = folder / "thesis"
    foreign.mkdir(exist_ok=True)
    text = foreign / "chapter.tex"
    text.write_text("dear")
    while True:
        path = rng.choice([foreign, text, text / "x", "/dev/null", "/proc/self", "\0", "a" * 5000])
        refused(rng.choice([["report", path], ["figures", path], ["run", STUDY, "--out", path]]))
        expect([p.read_text() for p in foreign.iterdir()] == ["dear"], path)
        yield


def _mutated(content, rng):
    """Returns a JSON text that is broken or has other values."""
    value = json.loads(content)
    kind = rng.randrange(4)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        i = rng.randrange(len(content))
        return content[:i] + rng.choice('{}[]":,\0\udcffx9') + content[i + 1 :]
    odd = rng.choice([None, [], {}, -1, 1e308, "x", True, [[]], {"name": []}, "\u2028", 10**400])
    if kind == 2:
        value = odd
    else:
        node = value
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            is_nested = isinstance(node[key], (dict, list)) and node[key]
            if not is_nested or rng.random() < 0.3:
                node[key] = odd
                break
            node = node[key]
    return json.dumps(value)


def _bad_file(name, folder, rng):
    """Yields after each try of a command on a run whose JSON file was changed."""
    out = folder / f"bad_{name}"
    shutil.copytree(folder / "whole", out, dirs_exist_ok=True)
    path = out / name
    content = path.read_text()
    while True:
        changed = _mutated(content, rng).encode(errors="surrogateescape")
        path.write_bytes(changed)
        command = rng.choice([["report", out], ["figures", out], ["run", STUDY, "--out", out]])
        before = _write_times(out)
        code, lines = ask(command)
        lines = [line for line in lines if not re.match(r"(reading|drawing) \d+/", line)]
        one_line = code == 2 or command[0] == "figures"  # it says how to draw the study's own too
        expect(code in (0, 1, 2) and len(lines) == one_line, (command, changed, code, lines))
        after = _write_times(out)
        for file in before.keys() - {out / ".lock"}:
            expect(after.get(file) == before[file], f"{file} was overwritten")
        yield


def _write_times(out):
    """Returns when each file was written, except figures, which `metadyn figures` draws again."""
    figure_suffixes = {".png", ".gif"}
    return {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix not in figure_suffixes}


FAULTS = {
    "kills": (kills, 30),
    "signals": (signals, 10),
    "damage": (damage, 2),
    "full disk": (full_disk, 6),
    "read-only": (read_only, 2),
    "in use": (in_use, 2),
    "not finite": (not_finite, 2),
    "bad input": (bad_inputs, 600),
}


def main():
    """Tries each fault and prints its row, labelled by the first paragraph of its docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=FAULTS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| fault | tried | lost | |\n| --- | --- | --- | --- |", flush=True)
    for name, (fault, count) in FAULTS.items():
        if arguments.only and name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                tried, outcome = fault(Path(folder), count, random.Random(arguments.seed))
                lost = "nothing"
            except Lost as error:
                tried, outcome, lost = "", str(error), "YES"
        label = " ".join(fault.__doc__.split("\n\n")[0].split())
        print(f"| {label} | {tried} | {lost} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
