"""The claims table, and folders of studies."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from metadyn import claims
from metadyn.cli import main
from metadyn.errors import ConfigError
from metadyn.store import RunFolder
from metadyn.study import load_studies

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def between(text):
    """Returns the part of a README between the marks of the claims table."""
    return text.partition(claims.BEGIN)[2].partition(claims.END)[0].strip()


def test_the_table_in_the_repository_is_that_of_the_stored_summaries():
    assert between((EXPERIMENTS / "README.md").read_text()) == claims.tables(EXPERIMENTS)


def test_every_claim_has_a_measured_verdict_and_its_figure():
    for study in load_studies(str(EXPERIMENTS)):
        path = EXPERIMENTS / "results" / f"{study.name}-quick.json"
        summary = json.loads(path.read_text())
        rows = {row["name"]: row for row in summary["criteria"]}
        assert study.claims
        for figure, criteria in study.claims.items():
            assert all(isinstance(rows[criterion]["passed"], bool) for criterion in criteria)
            assert (EXPERIMENTS / "figures" / f"{study.name}_{figure}.png").is_file()


STUDY = """
import dataclasses
import numpy as np
from benchmarks.tiny_study import study as tiny
from matplotlib.figure import Figure
from metadyn import criterion
from metadyn.dynamics import Estimate
small = tiny.presets["quick"]
small = dataclasses.replace(
    small, outer=dataclasses.replace(small.outer, steps=6, checkpoints=2)
)
def plan(config):
    whole = tiny.plan(config)
    alone = whole.comparisons[0].alone("", followed=False)  # which has no figures
    return dataclasses.replace(whole, comparisons=[alone])
def criteria(config, results):
    last = float(results["tracked", "lstm"]["outer_step"][-1])
    steps = Estimate(*(np.array(last * by) for by in (1, 3.5 / 6, 2)))
    yield criterion("steps", steps, "steps taken", at_most=3.0)
study = dataclasses.replace(
    tiny, name={name!r}, section={section!r}, presets={{"quick": small}}, plan=plan,
    criteria=criteria, figures={{"own": lambda results: Figure()}},
    claims={{"own": {{"steps": "It takes few steps"}}}},
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two small studies that were run, whose order in the paper is not alphabetical."""
    folder = tmp_path_factory.mktemp("studies")
    for name, section in (("first", "§2"), ("a_second", "§3")):
        text = STUDY.format(name=name, section=section)
        (folder / f"{name}.py").write_text(text)
    (folder / "README.md").write_text(f"before\n{claims.BEGIN}\n{claims.END}\nafter\n")
    assert main(["run", str(folder), "--out", str(folder / "runs")]) == 1  # too small to pass
    return folder


def test_a_folder_of_studies_is_run_in_order_and_once(folder, capsys):
    runs = sorted((folder / "runs").iterdir())
    assert [run.name for run in runs] == ["a_second-quick-0", "first-quick-0"]
    before = [(run / "summary.json").stat().st_mtime_ns for run in runs]
    assert main(["run", str(folder), "--out", str(folder / "runs")]) == 1
    assert before == [(run / "summary.json").stat().st_mtime_ns for run in runs]
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if "metadyn: " in line]
    assert headings[0].startswith("[1/2 first] metadyn: first, preset quick")
    assert headings[1].startswith("[2/2 a_second] metadyn: a_second, preset quick")


def test_studies_of_the_paper_come_first_in_the_order_of_the_paper(tmp_path):
    for name, section in (("a", "ours"), ("b", "§3"), ("c", "§2"), ("d", "")):
        (tmp_path / f"{name}.py").write_text(STUDY.format(name=name, section=section))
    assert [study.name for study in load_studies(str(tmp_path))] == ["c", "b", "d", "a"]


def test_a_folder_takes_no_overrides_and_must_hold_studies(folder, tmp_path, refused):
    refused([str(folder), "--domain.sigma", "0.2"], "overrides are for one study")
    refused([str(folder), "--preset", "paper"], "choose from quick")
    (tmp_path / "none").mkdir()
    refused([str(tmp_path / "none")], "holds no studies")
    (tmp_path / "none" / "x.py").write_text("y = 1\n")
    refused([str(tmp_path / "none")], "defines no `study")


def test_claims_are_collected_judged_and_written(folder, capsys):
    assert main(["claims", str(folder)]) == 0
    table = between((folder / "README.md").read_text())
    assert table.endswith("Not measured: first quick, a_second quick.")
    runs = [str(folder / "runs" / f"{name}-quick-0") for name in ("first", "a_second")]
    assert main(["claims", str(folder), *runs]) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    lines = between(text).splitlines()[2:]
    assert ["first" in lines[0], "a_second" in lines[1]] == [True, True]
    assert lines[0].startswith("| It takes few steps | steps taken; at most 3 | first, §2 |")
    assert lines[0].endswith("| **refuted**: 6 [3.5, 12] ([own](figures/first_own.png)) |")
    assert (folder / "figures" / "first_own.png").is_file()
    assert "Not measured" not in text


@pytest.fixture(scope="module")
def study_and_run(tmp_path_factory):
    """A folder of one study, and the folder of a run of it with another seed."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "first.py").write_text(STUDY.format(name="first", section="§2"))
    (study,) = load_studies(str(folder))
    config = json.loads(json.dumps(dataclasses.asdict(study.config("quick"))))
    about = {"study": "first", "preset": "quick", "seed": 3}
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "r", about | {"config": config})
    row = {"name": "steps", "value": 1.0, "low": 0.5, "high": 2.0, "passed": True}
    row |= {"expected": "steps taken; at most 3", "verdict": "holds"}
    run.write_summary(about | {"environment": {"processor": "a clock"}, "criteria": [row]})
    run.figures.mkdir(exist_ok=True)
    for name in ("own", "shown", "other"):
        (run.figures / f"{name}.png").write_text("new")
    return folder, run.path


def test_only_figures_that_claims_name_or_that_exist_are_copied(study_and_run):
    folder, run = study_and_run
    (folder / "figures").mkdir()
    (folder / "figures" / "first_shown.png").write_text("old")
    claims.collect(folder, [str(run)])
    figures = {path.name: path.read_text() for path in (folder / "figures").iterdir()}
    assert figures == {"first_own.png": "new", "first_shown.png": "new"}
    measured = "Measured: `metadyn run first --seed 3` on a clock."
    assert claims.tables(folder).endswith(measured)


def test_a_run_of_another_folders_study_is_not_collected(study_and_run, tmp_path):
    _, run = study_and_run
    (tmp_path / "second.py").write_text(STUDY.format(name="second", section="§2"))
    with pytest.raises(ConfigError, match=r"its study, .*, is not in"):
        claims.collect(tmp_path, [str(run)])


def test_what_cannot_be_collected_is_named(folder, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(folder / "runs" / "first-quick-0", unfinished)
    (unfinished / "summary.json").unlink()
    overridden = tmp_path / "overridden"
    shutil.copytree(folder / "runs" / "first-quick-0", overridden)
    about = json.loads((overridden / "config.json").read_text())
    about["config"]["outer"]["steps"] = 10
    (overridden / "config.json").write_text(json.dumps(about))
    for run, message in (
        (unfinished, "is not done"),
        (tmp_path, "holds no run"),
        (overridden, "differs from preset 'quick'"),
    ):
        assert main(["claims", str(folder), str(run)]) == 2
        assert message in capsys.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "first.py", bare)
    with pytest.raises(ConfigError, match="must have the lines"):
        claims.write(bare)


def test_expectations_that_differ_in_bounds_are_joined_into_one():
    bounds = [f"excess loss at most {bound}" for bound in (0.3, 0.2, 0.2)]
    assert claims._joined(bounds) == "excess loss at most 0.3 / 0.2"
    assert claims._joined(["three drops", "four", "four"]) == "three drops; four"
    assert claims._joined(["the worst of them", "the worst recurrent network"]).count(";") == 1


def test_tables_set_figures_of_merit_side_by_side():
    rows = {
        "sgd_slope": {"value": -0.25, "low": -0.5, "high": None},
        "adam_excess": {"value": 2, "low": 2, "high": 2},
    }
    table = claims.Table(
        "t", {"sgd": "SGD", "adam": "Adam"}, {"slope": "slope", "excess": "excess"}, "f"
    )
    table = dataclasses.replace(table, rows=table.rows | {"lion": "Lion, of another preset"})
    assert list(claims._table(table, rows)) == [
        "| | slope | excess |",
        "| --- | --- | --- |",
        "| SGD | −0.25 [−0.5, –] |  |",
        "| Adam |  | 2 |",
    ]


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", sorted(path.stem for path in EXPERIMENTS.glob("*.py")))
def test_quick_presets_come_to_the_verdicts_in_the_repository(name, tmp_path):
    """Numbers may differ, because another processor's last digits lead training elsewhere."""
    stored = json.loads((EXPERIMENTS / "results" / f"{name}-quick.json").read_text())
    main(["run", str(EXPERIMENTS / f"{name}.py"), "--out", str(tmp_path / "r")])
    measured = json.loads((tmp_path / "r" / "summary.json").read_text())
    verdicts, new_verdicts = (
        {row["name"]: row["passed"] for row in summary["criteria"]}
        for summary in (stored, measured)
    )
    assert verdicts == new_verdicts
