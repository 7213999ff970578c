"""The command line: a whole small study, resumed and interrupted, and bad input."""

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


def metadyn_run(out, *more):
    return main(["run", STUDY, "--out", str(out), *SMALL, *more])


def draw_nothing(monkeypatch):
    """From here on figures, which nobody looks at, are not drawn."""
    monkeypatch.setattr(figures, "draw", lambda *given: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole study, run once; its criteria are not met by so small a one."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert metadyn_run(out) == 1
    return out


def test_the_run_folder_is_as_the_contract_says(finished):
    assert {p.name for p in finished.iterdir()} >= {
        "config.json", "checkpoints", "figures", "summary.json"
    }  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())
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


def test_every_figure_is_drawn_and_drawn_again_from_what_is_stored(finished, capsys):
    names = {
        "mode_strength", "learning_times", "learned_spectrum",
        "inner_curves", "outer_learning", "distance_to_bayes", "orders",
    }  # fmt: skip
    assert {p.stem for p in (finished / "figures").glob("*.png")} == names
    shutil.rmtree(finished / "figures")
    assert main(["figures", str(finished)]) == 0
    printed = capsys.readouterr().out.split()
    assert {Path(p).stem for p in printed} == names
    for path in printed:
        if path.endswith(".png"):
            image = matplotlib.image.imread(path)
            assert image.shape[0] > 300
            assert image.std() > 0.02


def test_of_a_changed_study_that_kept_its_name_it_is_said_how_its_own_figures_are_drawn(
    finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(figures, "draw", lambda folder, *given: [folder / "one.png"])
    hint = "'linear_regression' has other options than this run: if the study is yours, add --study"
    assert main(["figures", str(finished)]) == 0
    assert hint not in capsys.readouterr().err
    shutil.copytree(finished, tmp_path / "run")
    asked = json.loads((finished / "config.json").read_text())
    asked["config"]["own"] = 1
    (tmp_path / "run" / "config.json").write_text(json.dumps(asked))
    assert main(["figures", str(tmp_path / "run")]) == 0
    assert hint in capsys.readouterr().err
    assert main(["figures", str(tmp_path / "run"), "--study", STUDY]) == 0
    assert "--study" not in capsys.readouterr().err


def test_panels_show_the_curves_of_the_learner_that_they_name(finished):
    data = metadyn.load(finished, "in_distribution")
    results = RunFolder(finished).results()
    drawn = figures.of_every_run(results, figures.histories(results))
    names = {"SGD": "sgd", "meta-trained LSTM": "lstm", "Bayes": "bayes"}
    for axis, (title, name) in zip(drawn["mode_strength"]().axes, names.items(), strict=True):
        assert title in axis.get_title()
        assert "slope" in axis.get_title()
        mean = data["mode_strength"].sel(learner=name).mean(["seed", "task"])
        lines = {line.get_label(): line for line in axis.get_lines()}
        for k, s in enumerate(data["singular_value"].to_numpy()):
            line = lines[f"{s:.3g}"]
            shown = mean.isel(mode=k).dropna("step").to_numpy()[-len(line.get_ydata()) :]
            np.testing.assert_allclose(line.get_ydata(), shown, atol=1e-5)
        assert axis.get_xlabel() == (
            "optimiser updates" if name == "sgd" else "observations in the episode"
        )


def test_figures_that_cannot_be_written_are_one_line(finished, tmp_path, capsys):
    out = tmp_path / "r"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "figures")
    (out / "figures").write_text("in the way")
    assert main(["figures", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{out / 'figures'} cannot be read or written" in line


def test_report_prints_the_verdict(finished, capsys):
    assert main(["report", str(finished)]) == 1
    printed = capsys.readouterr().out
    assert "sgd_slope" in printed
    assert "FAILED" in printed


def test_a_terminal_of_another_encoding_is_told_what_it_can_be(finished):
    command = [sys.executable, "-m", "metadyn.cli", "report", str(finished)]
    plain = os.environ | {"PYTHONIOENCODING": "ascii"}
    said = subprocess.run(command, env=plain, capture_output=True, timeout=100)
    assert said.returncode == 1
    assert b"sgd_slope" in said.stdout
    assert said.stderr == b""


def test_trajectories_load_with_the_contracts_dimensions(finished):
    data = metadyn.load(finished)
    assert {"learner", "outer_step", "task", "mode", "step"} <= set(data["mode_strength"].dims)
    assert data["outer_step"].values[[0, -1]].tolist() == [0, 2000]
    everyone = metadyn.load(finished, "in_distribution")
    assert set(everyone["learner"].values) == {"sgd", "lstm", "bayes"}


def test_the_same_command_again_ends_at_once(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    start = time.monotonic()
    assert metadyn_run(finished) == 1
    assert time.monotonic() - start < 5
    after = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
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
    """Ctrl-C leaves with 130; kill -9 leaves what it leaves; the end is the same, bit for bit."""
    draw_nothing(monkeypatch)
    whole, out = tmp_path / "whole", tmp_path / "disturbed"
    assert main(["run", *LONG, "--out", str(whole)]) == 0
    run = start(out)
    trains([run], out)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    reached = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    assert 0 < reached < 2000
    assert main(["report", str(out)]) == 0  # on a run that is not done

    run = start(out)
    trains([run], out)
    run.kill()
    run.communicate(timeout=60)
    assert newest(out) < 2000
    assert not (out / "summary.json").exists()

    assert float((out / "seconds").read_text()) > 0
    (out / "seconds").write_text("1000\n")
    begun = time.monotonic()
    assert main(["run", *LONG, "--out", str(out)]) == 0
    took = time.monotonic() - begun
    for task_set in ("tracked", "heldout", "in_distribution"):
        xr.testing.assert_identical(metadyn.load(whole, task_set), metadyn.load(out, task_set))
    one, other = (json.loads((d / "summary.json").read_text()) for d in (whole, out))
    assert one["criteria"] == other["criteria"]
    assert 1000 < other["environment"]["seconds"] < 1000 + took  # of all parts together


def test_a_run_whose_output_is_no_longer_read_ends_quietly(tmp_path):
    """As in `metadyn run … | head -1`."""
    out = tmp_path / "r"
    run = start(out)
    assert run.stdout.readline().startswith("metadyn: tiny")
    trains([run], out)
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait(timeout=60) == 130
    run.stderr.close()
    assert RunFolder(out).steps()


def test_another_configuration_is_refused_and_nothing_changes(finished, capsys):
    before = (finished / "config.json").read_bytes()
    assert metadyn_run(finished, "--seed", "1") == 2
    assert metadyn_run(finished, "--domain.sigma", "0.2") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "domain.sigma = 0.1, not 0.2" in errors[1]
    assert (finished / "config.json").read_bytes() == before


EMPTY = "x = 1\n"
BROKEN = "import nonsense_that_is_not_there\n"
LEAVES = "raise SystemExit(0)\n"
WRONG = "study = 'linear regression'\n"
TYPO = "import metadyn\nstudy = metadyn.load_study('linear_regresion')\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
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
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("EMPTY", "BROKEN", "LEAVES", "WRONG", "TYPO"):
        Path(name).write_text(globals()[name])
    Path("FOREIGN").mkdir()
    Path("FOREIGN/thesis.tex").write_text("dear")
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1, captured.err
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(p)] == before


def test_choices_are_said_in_one_line_in_a_narrow_terminal(refused, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    said = refused(["linear_regression", "--meta", "lstn"], "metadyn: --meta lstn: choose from ")
    assert [name for name in get_args(Network) if f"'{name}'" not in said] == []


@pytest.mark.parametrize("option", [("--domain.sigma", "-1"), ("--domain.sigma=-1",)])
def test_bad_values_are_named_as_they_were_typed(option, refused):
    refused([STUDY, *option], "metadyn: --domain.sigma -1: must be positive and finite\n")


@pytest.mark.parametrize(
    ("option", "value", "what"),
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
def test_what_cannot_fit_into_the_memory_is_one_line(option, value, what, refused):
    more = ["--meta", "maml"] if "maml" in option else []
    said = refused([STUDY, *more, option, value], f"metadyn: {option} {value}: ")
    assert f"{what} would take " in said
    assert " GiB, more than the " in said


def test_a_general_prior_can_be_given():
    default = load_study(STUDY).presets["quick"]
    given = ["--domain.n-y", "2", "--domain.sigma", "0.3"]
    given += ["--domain.row-covariance", "[[2,1],[1,3]]"]
    domain = configured(default, given).domain
    np.testing.assert_array_equal(domain.R, [[2, 1], [1, 3]])
    assert (domain.n_x, domain.n_y, domain.sigma) == (3, 2, 0.3)
    with pytest.raises(metadyn.ConfigError, match="positive definite"):
        configured(default, ["--domain.n-y", "2", "--domain.row-covariance", "[[1,2],[2,1]]"])


def test_a_study_is_known_by_its_name_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "linear_regression", "--options"]) == 0
    assert "--domain.sigma" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_study_is_known_by_its_name_beside_a_folder_of_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linear_regression").mkdir()
    assert main(["run", "linear_regression", "--options"]) == 0
    assert "--domain.sigma" in capsys.readouterr().out


def test_the_shell_has_its_prompt_at_once_whatever_is_still_compiled():
    """Interrupted while programs compile in threads, for which Python itself would wait."""
    compiling = "from concurrent.futures import ThreadPoolExecutor as P; import time; "
    compiling += "P().submit(time.sleep, 60); from metadyn import cli; print(1); "
    compiling += "cli.main = lambda: cli.INTERRUPTED; cli.console()"
    found = subprocess.run([sys.executable, "-c", compiling], capture_output=True, timeout=50)
    assert (found.returncode, found.stdout) == (130, b"1\n")


def test_devices_that_jax_does_not_have_are_one_line():
    command = [sys.executable, "-m", "metadyn.cli", "devices"]
    for platform in ("cuda", "foo"):
        asked = os.environ | {"JAX_PLATFORMS": platform}
        found = subprocess.run(command, capture_output=True, timeout=100, text=True, env=asked)
        said = f"metadyn: JAX_PLATFORMS={platform}: JAX has no such devices here"
        assert found.returncode == 2
        assert found.stderr.splitlines()[-1].startswith(said)
        assert "Traceback" not in found.stderr


def test_a_signal_that_a_library_makes_something_else_of_is_an_interruption(monkeypatch, capsys):
    def importing(arguments):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("partially initialized module") from None

    monkeypatch.setitem(cli._DOES, "devices", (importing, ""))
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
    everyone = {
        each.contender.name for each in plan.measurements if each.tasks.name == "in_distribution"
    }
    assert everyone == {"sgd", "gru", "bayes"}
    names = {each.name for each in runner.rehearse(study, config, plan)}
    assert {"gru_minus_bayes_slope", "gru_slope", "gru_excess_loss"} <= names
    assert not any(name.startswith("lstm") for name in names)


def test_a_run_of_an_earlier_metadyn_is_refused(finished, tmp_path, capsys):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    config = json.loads((finished / "config.json").read_text())
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


def test_a_run_out_of_memory_is_one_line_and_goes_on_from_its_checkpoint(
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
    left = RunFolder(out)
    assert not left.damage()
    assert left.steps() == [0, 1, 4, 15]
    assert left.summary() is None
    assert main(["figures", str(out)]) == 0  # those that can be drawn already
    assert {p.stem for p in left.figures.glob("*.png")} >= {"inner_curves", "outer_learning"}
    monkeypatch.undo()
    draw_nothing(monkeypatch)
    assert main(command) == 0
    assert left.outer_steps() == [0, 1, 4, 15, 60]


def test_options_and_devices_are_listed(capsys):
    assert main(["run", STUDY, "--options"]) == 0
    assert "--domain.sigma" in capsys.readouterr().out
    assert main(["devices"]) == 0
    assert "backend: cpu" in capsys.readouterr().out


def test_options_that_nobody_reads_are_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "metadyn.cli", "run", STUDY, "--options"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (130, "")


def test_options_are_named_of_a_configuration_that_cannot_be_copied():
    fields = dataclasses.make_dataclass("Fields", ["lock"])(threading.Lock())
    assert dict(options_of(fields)) == {"--lock": fields.lock}


@dataclasses.dataclass
class Sized:
    n: int


@pytest.mark.parametrize(
    ("n", "words"), [(np.int64(2**40), "must be below"), (True, "must be a whole number")]
)
def test_whole_numbers_of_numpy_are_held_to_the_same_bounds(n, words):
    with pytest.raises(
        ConfigError, match=f"n = {n!r}: {words}".replace("(", ".").replace(")", ".")
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


def test_an_option_of_a_study_is_not_taken_for_the_beginning_of_one_of_the_commands(
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


def test_figures_of_another_study_are_not_drawn(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in (finished / "figures").iterdir()}
    assert main(["figures", str(finished), "--study", "contextual_bandit"]) == 2
    said = capsys.readouterr().err
    assert "defines 'contextual_bandit', but" in said
    assert "is a run of 'linear_regression'" in said
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "figures").iterdir()}


def test_a_study_imports_what_stands_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_mine.py").write_text(f"STUDY = {TINY!r}")
    mine = "import metadyn, beside_mine\nstudy = metadyn.load_study(beside_mine.STUDY)"
    (tmp_path / "mine.py").write_text(mine)
    assert load_study(str(tmp_path / "mine.py")).name == load_study(TINY).name


def test_what_is_put_beside_a_study_must_be_a_contender():
    study = load_study(TINY).beside("mine", lambda comparison: None)
    with pytest.raises(metadyn.ConfigError, match=r"NoneType.*that return a `metadyn\.Contender"):
        study.plan(study.presets["quick"])


@pytest.mark.parametrize("name", ["amortised_bayes", "teaching"])
def test_studies_that_make_more_of_each_learner_take_none_beside_their_own(name):
    with pytest.raises(metadyn.ConfigError, match=f"'{name}': takes no learner beside its own: "):
        load_study(name).beside("mine", lambda comparison: comparison.bayes)


def test_metadyn_alone_says_what_to_type(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "Example: metadyn run linear_regression" in said
    assert all(name in said for name in ("view", "list", "report", "figures"))


def test_the_studies_are_listed_with_their_presets_and_what_they_took(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for name in ("linear_regression", "nonlinear_regression", "contextual_bandit"):
        assert f"{name}:" in said
        stored = ROOT / "experiments" / "results" / f"{name}-quick.json"
        seconds = json.loads(stored.read_text())["environment"]["seconds"]
        assert f"{seconds / 60:.1f} min on" in said
    assert "--preset paper" in said
