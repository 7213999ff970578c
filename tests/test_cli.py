"""The command line runs a small study, resumes it after interruptions, and refuses bad input."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import get_args

import matplotlib.image
import numpy as np
import pytest
import xarray as xr
from processes import newest, trains

import metadyn
from metadyn import cli, figures, runner
from metadyn.cli import main
from metadyn.errors import ConfigError, check_positive
from metadyn.options import configured, options_of
from metadyn.store import RunFolder
from metadyn.study import Network, load_study

ROOT = Path(__file__).parent.parent
STUDY = str(ROOT / "experiments" / "linear_regression.py")
TINY = str(ROOT / "benchmarks" / "tiny_study.py")
LONG = [TINY, "--outer.steps", "2000", "--outer.checkpoints", "12"]
SHORT = [TINY, "--outer.steps", "60", "--outer.checkpoints", "4"]
SMALL = [
    *("--domain.n-x", "2", "--domain.n-y", "3", "--domain.steps", "4", "--lstm.hidden", "4"),
    *("--outer.steps", "2000", "--outer.batch", "4", "--outer.seeds", "2", "--outer.warmup", "1"),
    *("--outer.checkpoints", "4", "--outer.dispatch", "5", "--outer.schedule", "constant"),
    *("--sgd.updates", "6", "--sgd.records", "4", "--measure.tasks", "32"),
    *("--measure.updating-tasks", "4", "--measure.shifted-tasks", "8"),
    *("--measure.tracked-tasks", "4", "--measure.chunk", "4"),
    *("--measure.heldout-tasks", "16", "--measure.probe-points", "6"),
]


def metadyn_run(out, *options):
    return main(["run", STUDY, "--out", str(out), *SMALL, *options])


def draw_nothing(monkeypatch):
    """Stops the drawing of figures, at which the test does not look."""
    monkeypatch.setattr(figures, "draw", lambda *arguments: [])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Returns the folder of a study that was run once. It is too small to meet its criteria."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert metadyn_run(out) == 1
    return out


def test_the_run_folder_keeps_the_contract(run_folder):
    assert {p.name for p in run_folder.iterdir()} >= {
        "config.json", "checkpoints", "figures", "summary.json"
    }  # fmt: skip
    summary = json.loads((run_folder / "summary.json").read_text())
    assert {"study", "preset", "seed", "environment", "criteria"} <= summary.keys()
    assert summary["study"] == "linear_regression"
    assert summary["environment"]["jax"]
    names = {c["name"] for c in summary["criteria"]}
    assert names >= {"sgd_slope", "lstm_minus_bayes_slope", "bayes_slope", "saxe_balanced"}
    assert names >= {"lstm_excess_loss", "lstm_out_of_distribution_x4"}
    for row in summary["criteria"]:
        assert set(row) == {"name", "value", "low", "high", "expected", "passed", "verdict"}
        assert isinstance(row["passed"], bool)
        if row["low"] is not None:
            assert row["low"] <= row["high"]


def test_every_figure_is_drawn_and_drawn_again_from_stored_results(run_folder, capsys):
    names = {
        "mode_strength", "learning_times", "learned_spectrum",
        "inner_curves", "outer_learning", "distance_to_bayes", "orders",
    }  # fmt: skip
    assert {p.stem for p in (run_folder / "figures").glob("*.png")} == names
    shutil.rmtree(run_folder / "figures")
    assert main(["figures", str(run_folder)]) == 0
    printed = capsys.readouterr().out.split()
    assert {Path(p).stem for p in printed} == names
    for path in printed:
        if path.endswith(".png"):
            image = matplotlib.image.imread(path)
            assert image.shape[0] > 300
            assert image.std() > 0.02


def test_figures_of_a_changed_study_that_kept_its_name_give_a_hint(
    run_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(figures, "draw", lambda folder, *arguments: [folder / "one.png"])
    hint = "'linear_regression' has other options than this run: if the study is yours, add --study"
    assert main(["figures", str(run_folder)]) == 0
    assert hint not in capsys.readouterr().err
    shutil.copytree(run_folder, tmp_path / "run")
    config = json.loads((run_folder / "config.json").read_text())
    config["config"]["own"] = 1
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert main(["figures", str(tmp_path / "run")]) == 0
    assert hint in capsys.readouterr().err
    assert main(["figures", str(tmp_path / "run"), "--study", STUDY]) == 0
    assert "--study" not in capsys.readouterr().err


def test_panels_show_the_curves_of_the_learner_that_they_name(run_folder):
    data = metadyn.load(run_folder, "in_distribution")
    results = RunFolder(run_folder).results()
    drawings = figures.of_every_run(results, figures.histories(results))
    names = {"SGD": "sgd", "meta-trained LSTM": "lstm", "Bayes": "bayes"}
    for axis, (title, name) in zip(drawings["mode_strength"]().axes, names.items(), strict=True):
        assert title in axis.get_title()
        assert "slope" in axis.get_title()
        mean = data["mode_strength"].sel(learner=name).mean(["seed", "task"])
        lines = {line.get_label(): line for line in axis.get_lines()}
        for k, s in enumerate(data["singular_value"].to_numpy()):
            line = lines[f"{s:.3g}"]
            expected = mean.isel(mode=k).dropna("step").to_numpy()[-len(line.get_ydata()) :]
            np.testing.assert_allclose(line.get_ydata(), expected, atol=1e-5)
        assert axis.get_xlabel() == (
            "optimiser updates" if name == "sgd" else "observations in the episode"
        )


def test_figures_that_cannot_be_written_give_one_line(run_folder, tmp_path, capsys):
    out = tmp_path / "r"
    shutil.copytree(run_folder, out)
    shutil.rmtree(out / "figures")
    (out / "figures").write_text("in the way")
    assert main(["figures", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{out / 'figures'} cannot be read or written" in line


def test_report_prints_the_verdict(run_folder, capsys):
    assert main(["report", str(run_folder)]) == 1
    printed = capsys.readouterr().out
    assert "sgd_slope" in printed
    assert "FAILED" in printed


def test_a_terminal_of_another_encoding_gets_the_characters_that_it_has(run_folder):
    command = [sys.executable, "-m", "metadyn.cli", "report", str(run_folder)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    report = subprocess.run(command, env=environment, capture_output=True, timeout=100)
    assert report.returncode == 1
    assert b"sgd_slope" in report.stdout
    assert report.stderr == b""


def test_trajectories_load_with_the_contracts_dimensions(run_folder):
    data = metadyn.load(run_folder)
    assert {"learner", "outer_step", "task", "mode", "step"} <= set(data["mode_strength"].dims)
    assert data["outer_step"].values[[0, -1]].tolist() == [0, 2000]
    in_distribution = metadyn.load(run_folder, "in_distribution")
    assert set(in_distribution["learner"].values) == {"sgd", "lstm", "bayes"}


def test_the_same_command_again_ends_at_once(run_folder):
    before = {p: p.stat().st_mtime_ns for p in run_folder.rglob("*") if p.is_file()}
    start = time.monotonic()
    assert metadyn_run(run_folder) == 1
    assert time.monotonic() - start < 5
    after = {p: p.stat().st_mtime_ns for p in run_folder.rglob("*") if p.is_file()}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


def start(out):
    return subprocess.Popen(
        [sys.executable, "-m", "metadyn.cli", "run", *LONG, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def test_interrupted_then_killed_then_resumed_equals_undisturbed(tmp_path, monkeypatch):
    """Ctrl-C exits with 130, kill -9 leaves what it leaves, and the end is the same bit for bit."""
    draw_nothing(monkeypatch)
    undisturbed, out = tmp_path / "whole", tmp_path / "disturbed"
    assert main(["run", *LONG, "--out", str(undisturbed)]) == 0
    run = start(out)
    trains([run], out)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    newest_step = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    assert 0 < newest_step < 2000
    assert main(["report", str(out)]) == 0  # a run that is not done can be reported

    run = start(out)
    trains([run], out)
    run.kill()
    run.communicate(timeout=60)
    assert newest(out) < 2000
    assert not (out / "summary.json").exists()

    assert float((out / "seconds").read_text()) > 0
    (out / "seconds").write_text("1000\n")
    started = time.monotonic()
    assert main(["run", *LONG, "--out", str(out)]) == 0
    duration = time.monotonic() - started
    for task_set in ("tracked", "heldout", "in_distribution"):
        xr.testing.assert_identical(
            metadyn.load(undisturbed, task_set), metadyn.load(out, task_set)
        )
    expected, summary = (json.loads((d / "summary.json").read_text()) for d in (undisturbed, out))
    assert expected["criteria"] == summary["criteria"]
    assert 1000 < summary["environment"]["seconds"] < 1000 + duration  # the sum over all parts


def test_a_run_whose_output_is_no_longer_read_ends_quietly(tmp_path):
    """The output ends early as in `metadyn run … | head -1`."""
    out = tmp_path / "r"
    run = start(out)
    assert run.stdout.readline().startswith("metadyn: tiny")
    trains([run], out)
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait(timeout=60) == 130
    run.stderr.close()
    assert RunFolder(out).steps()


def test_another_configuration_is_refused_and_nothing_changes(run_folder, capsys):
    before = (run_folder / "config.json").read_bytes()
    assert metadyn_run(run_folder, "--seed", "1") == 2
    assert metadyn_run(run_folder, "--domain.sigma", "0.2") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "domain.sigma = 0.1, not 0.2" in errors[1]
    assert (run_folder / "config.json").read_bytes() == before


EMPTY = "x = 1\n"
BROKEN = "import nonsense_that_is_not_there\n"
LEAVES = "raise SystemExit(0)\n"
WRONG = "study = 'linear regression'\n"
TYPO = "import metadyn\nstudy = metadyn.load_study('linear_regresion')\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "fly"),
        (["run"], "study"),
        (["run", "nowhere.py"], "no such file"),
        (
            ["run", "linear"],
            "no such study: choose from amortised_bayes, ",
        ),
        (["run", "."], "the folder holds no studies"),
        (["run", "EMPTY"], "defines no `study"),
        (["run", "WRONG"], "defines no `study"),
        (["run", "BROKEN"], "nonsense_that_is_not_there"),
        (["run", "LEAVES"], "cannot be imported"),
        (["run", "TYPO"], "did you mean 'linear_regression'?"),
        (["sweep", "FOREIGN", "--domain.sigma", "1", "2"], "is a folder: name one study"),
        (["run", STUDY, "--preset", "huge"], "choose from quick, workstation, paper"),
        (["run", STUDY, "--seed", "-1"], "--seed -1"),
        (
            ["run", STUDY, "--seed", "4294967296"],
            "--seed 4294967296: must be a whole number from 0",
        ),
        (
            ["run", STUDY, "--measure.tracked-tasks", "1"],
            "--measure.tracked-tasks 1: must be at least 2",
        ),
        (["run", STUDY, "--seed", "x"], "invalid int value"),
        (["run", STUDY, "--nonsense", "1"], "nonsense"),
        (["run", STUDY, "--domain.sigmoid", "1"], "sigmoid"),
        (["run", STUDY, "stray"], "stray"),
        (["run", STUDY, "--domain.sigma", "-1"], "--domain.sigma -1: must be positive"),
        (["run", STUDY, "--domain.sigma", "nan"], "--domain.sigma nan: must be positive"),
        (["run", STUDY, "--domain.sigma", "loud"], "--domain.sigma loud: must be a number"),
        (["run", STUDY, "--domain.sigma"], "--domain.sigma: give it a value"),
        (["run", STUDY, "--domain.sigma", "0.1", "0.3"], "--domain.sigma 0.1 0.3: takes one value"),
        (["run", STUDY, "—domain.sigma", "1"], "did you mean '--domain.sigma'?"),
        (["run", STUDY, "--outer.b2", "none"], "--outer.b2 none: must be a number, or None"),
        (["run", STUDY, "--domain.steps", "0"], "--domain.steps 0: must be positive"),
        (["run", STUDY, "--outer.batch", "3000000000"], "--outer.batch 3000000000: must be below"),
        (["run", STUDY, "--lstm.hidden", "2000000000"], "--lstm.hidden 2000000000: too large"),
        (["run", STUDY, "--domain.n-x", "2.5"], "--domain.n-x 2.5: must be a whole number"),
        (["run", STUDY, "--outer.optimizer", "magic"], "--outer.optimizer magic: "),
        (["run", STUDY, "--outer.schedule", "sawtooth"], "--outer.schedule sawtooth: choose from"),
        (
            ["run", STUDY, "--outer.precision", "float8"],
            "--outer.precision float8: choose from 'float32', 'tensorfloat32', 'bfloat16'",
        ),
        (["run", STUDY, "--outer.warmup", "10000000"], "--outer.warmup 10000000: must be from 0"),
        (["run", STUDY, "--lstm.backend", "abacus"], "abacus"),
        (["run", STUDY, "--sgd.depth", "0"], "--sgd.depth 0: must be positive"),
        (["run", STUDY, "--sgd.depth", "3"], "--sgd.updates 0: give a number: the default"),
        (["run", STUDY, "--measure.probe-points", "3"], "--measure.probe-points 3: must be"),
        (["run", STUDY, "--domain.row-covariance", "1 2 2 1"], "give rows such as"),
        (["run", STUDY, "--domain.mean", "[[1,0]]"], "--domain.mean [[1,0]]: give"),
        (["run", STUDY, "--out", "/proc/nowhere"], "cannot be written"),
        (["run", STUDY, "--out", "FOREIGN"], "holds no run"),
        (["figures", "nowhere"], "holds no run"),
        (["report", "FOREIGN"], "holds no run"),
        (["report", ""], "metadyn: /"),
        (["report", "--loud", "x"], "--loud"),
        (["devices", "extra"], "extra"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("EMPTY", "BROKEN", "LEAVES", "WRONG", "TYPO"):
        Path(name).write_text(globals()[name])
    Path("FOREIGN").mkdir()
    Path("FOREIGN/thesis.tex").write_text("dear")
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1, captured.err
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(p)] == before


def test_choices_are_listed_in_one_line_in_a_narrow_terminal(refused, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    line = refused(["linear_regression", "--meta", "lstn"], "metadyn: --meta lstn: choose from ")
    assert [name for name in get_args(Network) if f"'{name}'" not in line] == []


@pytest.mark.parametrize("option", [("--domain.sigma", "-1"), ("--domain.sigma=-1",)])
def test_bad_values_are_named_as_they_were_typed(option, refused):
    refused([STUDY, *option], "metadyn: --domain.sigma -1: must be positive and finite\n")


@pytest.mark.parametrize(
    ("option", "value", "program"),
    [
        ("--lstm.hidden", "200000", "weights, gradients and moments of lstm"),
        ("--outer.seeds", "100000000", "weights, gradients and moments of lstm"),
        (
            "--measure.tracked-tasks",
            "2000000000",
            "on 2,000,000,000 tasks of 'tracked' at 21 times",
        ),
        ("--domain.steps", "10000000", "at 10,000,001 times"),
        ("--maml.inner-steps", "300000000", "weights, gradients and moments of maml"),
    ],
)
def test_what_cannot_fit_into_the_memory_is_refused_in_one_line(option, value, program, refused):
    meta = ["--meta", "maml"] if "maml" in option else []
    line = refused([STUDY, *meta, option, value], f"metadyn: {option} {value}: ")
    assert f"{program} would take " in line
    assert " GiB, more than the " in line


def test_a_general_prior_can_be_given():
    default = load_study(STUDY).presets["quick"]
    options = ["--domain.n-y", "2", "--domain.sigma", "0.3"]
    options += ["--domain.row-covariance", "[[2,1],[1,3]]"]
    domain = configured(default, options).domain
    np.testing.assert_array_equal(domain.R, [[2, 1], [1, 3]])
    assert (domain.n_x, domain.n_y, domain.sigma) == (3, 2, 0.3)
    with pytest.raises(metadyn.ConfigError, match="positive definite"):
        configured(default, ["--domain.n-y", "2", "--domain.row-covariance", "[[1,2],[2,1]]"])


def test_a_study_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "linear_regression", "--options"]) == 0
    assert "--domain.sigma" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_study_is_found_by_its_name_beside_a_folder_of_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linear_regression").mkdir()
    assert main(["run", "linear_regression", "--options"]) == 0
    assert "--domain.sigma" in capsys.readouterr().out


def test_an_interrupted_command_ends_at_once_whatever_is_still_compiled():
    """Threads still compile programs at the interruption, and Python itself would wait for them."""
    program = "from concurrent.futures import ThreadPoolExecutor as P; import time; "
    program += "P().submit(time.sleep, 60); from metadyn import cli; print(1); "
    program += "cli.main = lambda: cli.INTERRUPTED; cli.console()"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=50)
    assert (process.returncode, process.stdout) == (130, b"1\n")


def test_devices_that_jax_does_not_have_give_one_line():
    command = [sys.executable, "-m", "metadyn.cli", "devices"]
    for platform in ("cuda", "foo"):
        environment = os.environ | {"JAX_PLATFORMS": platform}
        process = subprocess.run(
            command, capture_output=True, timeout=100, text=True, env=environment
        )
        message = f"metadyn: JAX_PLATFORMS={platform}: JAX has no such devices here"
        assert process.returncode == 2
        assert process.stderr.splitlines()[-1].startswith(message)
        assert "Traceback" not in process.stderr


def test_a_signal_that_a_library_turns_into_another_error_is_an_interruption(monkeypatch, capsys):
    def interrupted_import(arguments):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("partially initialized module") from None

    monkeypatch.setitem(cli._DOES, "devices", (interrupted_import, ""))
    assert main(["devices"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_another_meta_learner_takes_the_place_of_the_lstm(tmp_path):
    out, gru = tmp_path / "gru", ["--meta", "gru", "--gru.hidden", "4"]
    assert main(["run", *SHORT, *gru, "--out", str(out)]) == 0
    for task_set in ("tracked", "in_distribution"):
        assert set(metadyn.load(out, task_set)["learner"].values) == {"gru", "bayes"}
    assert {"mode_strength", "orders"} <= {p.stem for p in (out / "figures").glob("*.png")}

    study = load_study(STUDY)
    config = configured(study.presets["quick"], [*SMALL, *gru])
    plan = study.plan(config)
    learners = {m.contender.name for m in plan.measurements if m.tasks.name == "in_distribution"}
    assert learners == {"sgd", "gru", "bayes"}
    names = {criterion.name for criterion in runner.rehearse(study, config, plan)}
    assert {"gru_minus_bayes_slope", "gru_slope", "gru_excess_loss"} <= names
    assert not any(name.startswith("lstm") for name in names)


def test_a_run_of_an_earlier_metadyn_is_refused(run_folder, tmp_path, capsys):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    config = json.loads((run_folder / "config.json").read_text())
    assert config.pop("format") == 3
    (earlier / "config.json").write_text(json.dumps(config))
    before = (earlier / "config.json").read_bytes()
    for command in (["report", str(earlier)], ["figures", str(earlier)]):
        assert main(command) == 2
    assert metadyn_run(earlier) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(f"{earlier} holds a run of another version of metadyn" in line for line in lines)
    assert [p.name for p in earlier.iterdir()] == ["config.json"]
    assert (earlier / "config.json").read_bytes() == before


def test_a_run_out_of_memory_gives_one_line_and_resumes_from_its_checkpoint(
    tmp_path, monkeypatch, capsys
):
    out, run = tmp_path / "r", runner.OuterLoop.run
    command = ["run", *SHORT, "--out", str(out)]

    def run_out(*arguments):
        for state, metrics in run(*arguments):
            if int(state.step) > 20:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes")
            yield state, metrics

    monkeypatch.setattr(runner.OuterLoop, "run", run_out)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("metadyn: memory ran out; the last checkpoint is intact: lower --outer")
    folder = RunFolder(out)
    assert not folder.damage()
    assert folder.steps() == [0, 1, 4, 15]
    assert folder.summary() is None
    assert main(["figures", str(out)]) == 0  # draws the figures that can be drawn already
    assert {p.stem for p in folder.figures.glob("*.png")} >= {"inner_curves", "outer_learning"}
    monkeypatch.undo()
    draw_nothing(monkeypatch)
    assert main(command) == 0
    assert folder.outer_steps() == [0, 1, 4, 15, 60]


def test_options_and_devices_are_listed(capsys):
    assert main(["run", STUDY, "--options"]) == 0
    assert "--domain.sigma" in capsys.readouterr().out
    assert main(["devices"]) == 0
    assert "backend: cpu" in capsys.readouterr().out


def test_options_printed_into_a_closed_pipe_are_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "metadyn.cli", "run", STUDY, "--options"]
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (process.returncode, process.stderr) == (130, "")


def test_options_of_a_configuration_that_cannot_be_copied_are_named():
    fields = dataclasses.make_dataclass("Fields", ["lock"])(threading.Lock())
    assert dict(options_of(fields)) == {"--lock": fields.lock}


@dataclasses.dataclass
class Sized:
    n: int


@pytest.mark.parametrize(
    ("n", "message"), [(np.int64(2**40), "must be below"), (True, "must be a whole number")]
)
def test_whole_numbers_of_numpy_must_keep_the_same_bounds(n, message):
    with pytest.raises(
        ConfigError, match=f"n = {n!r}: {message}".replace("(", ".").replace(")", ".")
    ):
        check_positive(Sized(n), "n")
    check_positive(Sized(np.int64(8)), "n")


def test_help_exits_with_0():
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0


def test_close_names_are_suggested(refused):
    refused(["linear_regresion"], "did you mean 'linear_regression'?")
    refused(["linear_regression", "--preset", "qick"], "did you mean 'quick'?")
    refused(["linear_regression", "--domain.sigm", "1"], "did you mean '--domain.sigma'?")
    refused(["linear_regression", "--lstm", "hidden", "8"], "did you mean '--lstm.hidden'?")
    refused(["linear_regression", "--lstm", "8"], "did you mean '--lstm.hidden'?")


def test_an_option_of_a_study_is_not_taken_for_an_abbreviated_option_of_the_command(
    refused, tmp_path, capsys
):
    _, overrides = cli._parser().parse_known_args(["run", "x", "--s", "7", "--pre", "quick"])
    assert overrides == ["--s", "7", "--pre", "quick"]
    study = tmp_path / "mine.py"
    study.write_text(f"""
import dataclasses, metadyn
base = metadyn.load_study({TINY!r})
@dataclasses.dataclass(frozen=True)
class Config(type(base.presets["quick"])):
    seed: int = 3
study = dataclasses.replace(base, presets={{"quick": Config()}})
""")
    refused([str(study)], "--seed is an option of `metadyn run` itself: rename this field")
    assert main(["sweep", str(study), "--domain.sigma", "1"]) == 2
    assert "--seed is an option of `metadyn sweep` itself" in capsys.readouterr().err


def test_an_empty_folder_is_refused_and_a_tilde_is_home(tmp_path, monkeypatch, capsys):
    assert main(["run", TINY, "--out", ""]) == 2
    assert "--out '': name a folder" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert main(["run", TINY, "--out", "~/file"]) == 2
    assert f"--out {tmp_path}/file cannot be written" in capsys.readouterr().err


def test_figures_of_another_study_are_not_drawn(run_folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in (run_folder / "figures").iterdir()}
    assert main(["figures", str(run_folder), "--study", "contextual_bandit"]) == 2
    message = capsys.readouterr().err
    assert "defines 'contextual_bandit', but" in message
    assert "is a run of 'linear_regression'" in message
    assert before == {path: path.stat().st_mtime_ns for path in (run_folder / "figures").iterdir()}


def test_a_study_imports_modules_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_mine.py").write_text(f"STUDY = {TINY!r}")
    mine = "import metadyn, beside_mine\nstudy = metadyn.load_study(beside_mine.STUDY)"
    (tmp_path / "mine.py").write_text(mine)
    assert load_study(str(tmp_path / "mine.py")).name == load_study(TINY).name


def test_a_learner_measured_beside_a_study_must_be_a_contender():
    study = load_study(TINY).beside("mine", lambda comparison: None)
    with pytest.raises(metadyn.ConfigError, match=r"NoneType.*that return a `metadyn\.Contender"):
        study.plan(study.presets["quick"])


@pytest.mark.parametrize("name", ["amortised_bayes", "teaching"])
def test_studies_that_derive_learners_from_each_learner_take_none_beside_their_own(name):
    with pytest.raises(metadyn.ConfigError, match=f"'{name}': takes no learner beside its own: "):
        load_study(name).beside("mine", lambda comparison: comparison.bayes)


def test_metadyn_without_a_command_prints_what_to_type(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "Example: metadyn run linear_regression" in output
    assert all(name in output for name in ("view", "list", "report", "figures"))


def test_the_studies_are_listed_with_their_presets_and_durations(capsys):
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    for name in ("linear_regression", "nonlinear_regression", "contextual_bandit"):
        assert f"{name}:" in output
        result = ROOT / "experiments" / "results" / f"{name}-quick.json"
        seconds = json.loads(result.read_text())["environment"]["seconds"]
        assert f"{seconds / 60:.1f} min on" in output
    assert "--preset paper" in output
