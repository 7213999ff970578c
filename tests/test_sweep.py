"""Sweeps: equal to single runs, read as one dataset, gone on with, and bad input."""

import itertools
import json
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
import xarray as xr
from browser import in_browser, needs_chromium, text_of

import metadyn
from metadyn import program_cost, runner, sweep, sweep_results, sweep_training, view
from metadyn.cli import main
from metadyn.errors import ConfigError
from metadyn.options import configured
from metadyn.outer import OuterLoop
from metadyn.progress import Progress
from metadyn.study import load_study

ROOT = Path(__file__).parent.parent
STUDY = str(ROOT / "benchmarks" / "tiny_study.py")
SMALL = ["--outer.steps", "30", "--outer.checkpoints", "3", "--outer.dispatch", "10"]
GRID = ["--outer.learning-rate", "1e-2", "3e-2", "--domain.sigma", "0.1", "0.3"]
SETS = ("tracked", "heldout", "in_distribution")


def metadyn_sweep(out, *options):
    return main(["sweep", STUDY, "--out", str(out), *SMALL, *options])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two rates by two kinds of noise, with two seeds each."""
    out = tmp_path_factory.mktemp("sweeps") / "grid"
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0
    return out


def test_each_setting_is_what_a_run_with_its_options_gives(done, tmp_path):
    """To 1e-4: the numbers are arguments of the program instead of constants in it."""
    single = ["--outer.learning-rate", "3e-2", "--domain.sigma", "0.3", "--outer.seeds", "2"]
    assert main(["run", STUDY, "--out", str(tmp_path / "one"), *SMALL, *single]) == 0
    for task_set in SETS:
        one, other = (metadyn.load(d, task_set) for d in (tmp_path / "one", done / "settings/3"))
        xr.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    one, other = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path / "one", done / "settings/3")
    )
    assert one == other
    again = ["run", STUDY, "--out", str(done / "settings" / "3"), *SMALL, *single]
    assert main(again) == 0  # it is done


def test_a_sweep_is_one_dataset_with_what_is_swept_as_dimensions(done):
    for task_set in SETS:
        data = metadyn.load(done, task_set)
        assert data["loss"].dims[:2] == ("outer.learning_rate", "domain.sigma")
        np.testing.assert_array_equal(data["outer.learning_rate"], [1e-2, 3e-2])
        np.testing.assert_array_equal(data["domain.sigma"], [0.1, 0.3])
        for i, (rate, sigma) in enumerate([(1e-2, 0.1), (1e-2, 0.3), (3e-2, 0.1), (3e-2, 0.3)]):
            one = metadyn.load(done / "settings" / str(i), task_set)
            of = data.sel({"outer.learning_rate": rate, "domain.sigma": sigma})
            assert np.isfinite(one["loss"].isel(step=-1)).all()
            for name in one:
                np.testing.assert_array_equal(of[name].transpose(*one[name].dims), one[name])


def one_option(done, out, *sigmas):
    """The first settings of that sweep, as a sweep of the noise alone."""
    shutil.copytree(done, out, ignore=lambda of, names: {"summary.json", "figures"} & {*names})
    asked = json.loads((out / "sweep.json").read_text())
    asked["options"] |= {"--outer.learning-rate": ["1e-2"], "--domain.sigma": sigmas}
    asked["settings"] = asked["settings"][: len(sigmas)]
    (out / "sweep.json").write_text(json.dumps(asked))
    return out


def test_a_sweep_of_one_option_has_one_dimension(done, tmp_path):
    out = one_option(done, tmp_path / "one", "0.1", "0.3")
    data = metadyn.load(out, "heldout")
    assert data["loss"].dims[0] == "domain.sigma"
    whole = metadyn.load(done, "heldout").sel({"outer.learning_rate": 1e-2})
    for sigma in (0.1, 0.3):
        one, other = (each["loss"].sel({"domain.sigma": sigma}) for each in (data, whole))
        np.testing.assert_array_equal(one, other.transpose(*one.dims))


def test_of_a_sweep_of_one_setting_there_is_nothing_to_draw(done, tmp_path, capsys):
    assert main(["figures", str(one_option(done, tmp_path / "one", "0.1"))]) == 0
    assert "nothing is drawn, as no option has several" in capsys.readouterr().err


def test_what_is_varied_changes_what_it_should(done):
    """Noise alone changes losses before anything is learned; once it is, the rate does too."""
    loss = metadyn.load(done, "heldout")["loss"].sel(learner="lstm").isel(step=1)
    start, end = (loss.isel(outer_step=i).to_numpy() for i in (0, -1))  # [rate, noise, ...]
    np.testing.assert_array_equal(start[0], start[1])
    assert not np.isclose(start[:, 0], start[:, 1]).any()
    assert not np.isclose(end[0], end[1]).all()


def test_the_report_ranks_by_excess_loss_over_bayes(done, capsys):
    assert main(["report", str(done)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ranked = [line.split() for line in lines if line.split()[0].isdecimal() and "sigma" in line]
    loss = metadyn.load(done, "heldout")["loss"].isel(step=slice(1, None), outer_step=-1)
    lstm, bayes = (loss.sel(learner=n).mean(["seed", "task", "step"]) for n in ("lstm", "bayes"))
    excess = (lstm - bayes) / (bayes - loss["domain.sigma"] ** 2)
    best = [excess.to_numpy().ravel()[int(words[1])] for words in ranked]
    assert len(best) == 4
    assert best == sorted(best)
    for words, value in zip(ranked, best, strict=True):
        said = words[words.index("loss") + 1].replace("−", "-")
        assert float(said) == pytest.approx(value, rel=1e-2)


def test_figures_are_drawn_against_each_option_and_as_a_map(done, capsys):
    names = {"against_outer.learning_rate", "against_domain.sigma", "map"}
    assert {path.stem for path in (done / "figures").glob("*.png")} == names
    shutil.rmtree(done / "figures")
    assert main(["figures", str(done), "--study", STUDY]) == 2
    assert main(["figures", str(done)]) == 0
    for path in map(Path, capsys.readouterr().out.split()):
        assert matplotlib.image.imread(path).std() > 0.02


def test_a_map_has_its_numbers_in_order_however_they_were_typed():
    grid = list(itertools.product((3e-2, 1e-2), ("sgd", 8, 4)))
    merits = [dict.fromkeys(sweep_results.MERITS, [float(i)] * 3) for i in range(len(grid))]
    about = {"learner": "LSTM", "merit": "slope"}
    rows = [
        {"options": {"rate": rate, "other": other}, **about, **merit}
        for (rate, other), merit in zip(grid, merits, strict=True)
    ]
    axis = sweep_results.heat_map(rows, "rate", "other").axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.01", "0.03"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["4", "8", "sgd"]
    np.testing.assert_array_equal(axis.images[0].get_array(), [[5, 2], [4, 1], [3, 0]])


def test_a_sweep_ends_with_a_page_of_all_settings(done, capsys, monkeypatch):
    page = done / "report.html"
    data = view.collect(sweep.SweepFolder(done))
    assert page.read_text() == view.page(data)
    page.unlink()
    assert main(["view", str(done)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text() == view.page(data)
    options, settings = data["sweep"]["options"], data["sweep"]["settings"]
    assert [*itertools.chain(*([name, *values] for name, values in options.items()))] == GRID
    assert [each["values"] for each in settings] == [
        ["1e-2", "0.1"], ["1e-2", "0.3"], ["3e-2", "0.1"], ["3e-2", "0.3"]
    ]  # fmt: skip
    written = json.loads((done / "summary.json").read_text())["settings"]
    assert [row for each in settings for row in each["merits"]] == written
    for i, each in enumerate(settings):
        assert each["run"] == view.collect(metadyn.RunFolder(done / "settings" / str(i)))
    best = min(written, key=lambda row: row["excess"][0])["setting"]
    monkeypatch.setattr(view, "MOST_SETTINGS", 1)
    few = view.collect(sweep.SweepFolder(done))["sweep"]["settings"]
    assert [i for i, each in enumerate(few) if each["run"]] == [best]
    assert [each["merits"] for each in few] == [each["merits"] for each in settings]
    monkeypatch.setattr(view, "MOST_BYTES", 0)
    assert not any(e["run"] for e in view.collect(sweep.SweepFolder(done))["sweep"]["settings"])


@needs_chromium
def test_in_a_browser_options_choose_what_is_shown(done, tmp_path):
    address = (done / "report.html").as_uri()
    settings = view.collect(sweep.SweepFolder(done))["sweep"]["settings"]

    def verdict(document):
        return text_of(document, "setting"), text_of(document, "criteria")

    ranked = sorted(range(4), key=lambda i: settings[i]["merits"][0]["excess"][0])
    best, worst = ranked[0], ranked[-1]
    shown = [in_browser(f"{address}{fragment}") for fragment in ("", f"#setting={worst}")]
    for i, document in zip((best, worst), shown, strict=True):
        rate, sigma = settings[i]["values"]
        said, table = verdict(document)
        assert said.startswith(f"--outer.learning-rate {rate} --domain.sigma {sigma} (settings/")
        assert f"{settings[i]['run']['criteria'][0]['value']:.3g}" in table
    # By hand: the event that a browser sends when another value is chosen.
    change = "const chosen = $('options').querySelectorAll('select')[1];"
    change += f"chosen.value = {worst % 2}; chosen.dispatchEvent(new Event('change'));"
    moved = tmp_path / "moved.html"
    text = (done / "report.html").read_text()
    moved.write_text(text.replace("if (whole.live) {", f"{change}\nif (whole.live) {{", 1))
    other = worst + 1 - 2 * (worst % 2)  # of the same rate, with the other noise
    assert verdict(in_browser(f"{moved.as_uri()}#setting={other}")) == verdict(shown[1])


def test_a_sweep_that_goes_on_is_served_as_it_grows(done, tmp_path):
    out = tmp_path / "live"
    shutil.copytree(done, out)
    (out / "summary.json").unlink()
    (out / "settings" / "3" / "summary.json").unlink()
    last = out / "settings" / "3" / "checkpoints" / "30"
    last.rename(tmp_path / "30")
    folder = sweep.SweepFolder(out)
    before = view.collect(folder)["sweep"]["settings"]
    assert [each["done"] for each in before] == [True, True, True, False]
    (tmp_path / "30").rename(last)
    after = view.collect(folder)["sweep"]["settings"]
    steps = [each[3]["run"]["groups"][0]["learners"][0]["steps"] for each in (before, after)]
    assert steps[1] == [*steps[0], 30]
    assert after[2]["run"] is before[2]["run"]  # which nobody had to read again


def test_a_page_that_cannot_be_made_is_one_line(done, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(done, out)

    def refused():
        assert main(["view", str(out)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (out / "summary.json").write_text('{"settings": [{"setting": 0, "lost": null}]}')
    assert "summary.json is not as metadyn writes it; remove the file" in refused()
    (out / "summary.json").unlink()
    array = next(p for p in out.glob("settings/2/measurements/*/*/arrays/**/*") if p.is_file())
    array.write_bytes(b"damaged")
    assert "is damaged" in refused()
    for path in out.glob("settings/*/summary.json"):
        path.unlink()
    assert "no setting is done yet" in refused()
    (out / "sweep.json").write_text('{"format": 1}')
    assert "sweep.json: lacks ['preset', 'seed', 'study']; not a sweep of metadyn" in refused()
    (out / "sweep.json").write_text('{"format": 1, "study": "s", "preset": "p", "seed": 0}')
    assert "sweep.json: is not as metadyn writes it" in refused()
    (out / "sweep.json").write_text("{")
    assert "holds no sweep of metadyn" in refused()


def test_a_disturbed_sweep_goes_on_to_the_same_bits(done, tmp_path, monkeypatch):
    """One setting lost its end, another all but its start, a third has a damaged measurement."""
    out = tmp_path / "disturbed"
    shutil.copytree(done, out)
    for setting, kept in (("1", {"0", "1", "5"}), ("2", {"0"})):
        folder = out / "settings" / setting
        (folder / "summary.json").unlink()
        shutil.rmtree(folder / "measurements" / "in_distribution")
        for path in (folder / "checkpoints").iterdir():
            if path.name not in kept:
                shutil.rmtree(path)
    damaged(out / "settings" / "3")
    damaged(out / "settings" / "0")  # which is done
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0
    for task_set in SETS:
        xr.testing.assert_identical(metadyn.load(done, task_set), metadyn.load(out, task_set))

    def planned(*given):
        raise ConfigError("it is gone on with")

    monkeypatch.setattr(sweep, "planned", planned)
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0  # done: there is nothing to plan
    damaged(out / "settings" / "1")
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 2


def damaged(folder):
    """Changes a byte of a measurement."""
    files = (folder / "measurements" / "in_distribution").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_figures_are_drawn_after_all_if_the_last_part_died_drawing_them(
    done, tmp_path, monkeypatch
):
    out = tmp_path / "undrawn"
    shutil.copytree(done, out, ignore=shutil.ignore_patterns("figures"))
    (out / "summary.json").unlink()

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sweep_results, "draw", killed)
        assert metadyn_sweep(out, *GRID, "--seeds", "2") == 130
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0
    assert len(list((out / "figures").glob("*.png"))) == 3
    assert (out / "summary.json").read_text() == (done / "summary.json").read_text()


def test_of_parts_that_end_together_one_draws(done, tmp_path, monkeypatch):
    out = tmp_path / "together"
    shutil.copytree(done, out)
    (out / "summary.json").unlink()
    drew, both = [], threading.Barrier(2)
    found, study = sweep.SweepFolder(out), load_study(STUDY)
    default = study.presets[found.sweep.preset]
    configs = {i: found.sweep.config(i, default) for i in range(4)}

    def conclude(folder, progress):
        drew.append(folder)
        time.sleep(0.2)
        (folder.path / "summary.json").write_text("{}")

    def end():
        both.wait()
        sweep.run_sweep(found.sweep, study, configs, out, Progress(None))

    monkeypatch.setattr(sweep_results, "conclude", conclude)
    parts = [threading.Thread(target=end) for _ in range(2)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert len(drew) == 1


def test_a_done_sweep_ends_at_once_and_another_is_refused(done, capsys):
    before = {p: p.stat().st_mtime_ns for p in (done / "settings").rglob("*") if p.is_file()}
    assert metadyn_sweep(done, *GRID, "--seeds", "2") == 0
    after = {p: p.stat().st_mtime_ns for p in (done / "settings").rglob("*") if p.is_file()}
    assert before == after
    capsys.readouterr()
    assert metadyn_sweep(done, *GRID, "--seeds", "3") == 2
    assert metadyn_sweep(done, *GRID, "--seeds", "2", "--part", "1/2") == 2
    assert main(["run", STUDY, "--out", str(done), *SMALL]) == 2
    assert metadyn_sweep(done / "settings" / "0", *GRID) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [len(lines), "options.--outer.seeds = ['2'], not ['3']" in lines[0]] == [4, True]
    assert "holds a sweep with parts = 1, not 2" in lines[1]
    assert "holds no run" in lines[2]
    assert "holds no sweep" in lines[3]


def test_a_done_sweep_is_not_that_of_a_preset_that_was_changed_since(done, tmp_path, capsys):
    changed = tmp_path / "tiny_study.py"
    text = Path(STUDY).read_text()
    assert text.count("heldout_tasks=8") == 1
    changed.write_text(text.replace("heldout_tasks=8", "heldout_tasks=16"))
    again = [*SMALL, *GRID, "--seeds", "2", "--out", str(done)]
    assert main(["sweep", str(changed), *again]) == 2
    assert "holds a run with measure.heldout_tasks = 8, not 16" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_marked_and_the_others_go_on(tmp_path, capsys):
    """Also other widths are programs of their own, and parts make up the whole."""
    out, wild = tmp_path / "wild", ["--outer.optimizer", "sgd", "--outer.clip", "1e30"]
    wild += ["--outer.learning-rate", "1e-2", "1e30", "--lstm.hidden", "4", "5"]
    assert metadyn_sweep(out, *wild, "--part", "2/2") == 0
    assert not (out / "summary.json").exists()
    said = capsys.readouterr().out
    assert "part 2 of 2 runs 2 of these settings" in said
    assert "figures and page: made by the part that ends last" in said
    assert metadyn_sweep(out, *wild, "--part", "1/2") == 0
    said = capsys.readouterr().out
    assert "--outer.learning-rate 1e30: the loss of lstm is no longer finite at outer step" in said
    assert "2 of 4 settings done" in said
    data = metadyn.load(out, "heldout")["loss"].isel(step=-1)
    finite = np.isfinite(data.sel(learner="lstm")).all(["outer_step", "seed", "task"])
    np.testing.assert_array_equal(finite, [[True, True], [False, False]])
    summary = json.loads((out / "summary.json").read_text())
    assert [row["lost"] is None for row in summary["settings"]] == [True, True, False, False]
    settings = view.collect(sweep.SweepFolder(out))["sweep"]["settings"]
    for row, each in zip(summary["settings"], settings, strict=True):
        assert each["lost"] == (row["lost"] or "")
    assert metadyn_sweep(out, *wild, "--part", "1/2") == 0


NAMED = """
import dataclasses
from metadyn import load_study
tiny = load_study(TINY)
def criteria(config, results):
    results["in_distribution", "lstm"]
    yield from tiny.criteria(config, results)
study = dataclasses.replace(tiny, criteria=criteria)
"""


def test_settings_that_measure_other_things_are_rehearsed_too(tmp_path, capsys):
    """The second has no LSTM, which a criterion asks for."""
    study, out = tmp_path / "named.py", tmp_path / "out"
    study.write_text(NAMED.replace("TINY", repr(STUDY)))
    assert main(["sweep", str(study), "--out", str(out), *SMALL, "--meta", "lstm", "gru"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--meta gru" in said
    assert "'lstm'" in said
    assert not out.exists()


ONLY_SOME = """
import dataclasses
from metadyn import load_study, prediction_loss
from metadyn.objectives import Objective
tiny = load_study(TINY)
def objective(domain, meta):
    usual = prediction_loss(domain, meta)
    def loss(*given):
        if domain.sigma == 0.3:
            raise ValueError("not of that noise")
        return usual.loss(*given)
    return Objective(loss)
def plan(config):
    (part,), whole = tiny.plan(config).comparisons, tiny.plan(config)
    return dataclasses.replace(whole, comparisons=[dataclasses.replace(part, objective=objective)])
study = dataclasses.replace(tiny, plan=plan)
"""


def test_an_objective_that_one_setting_alone_does_not_have_is_found_before(tmp_path, capsys):
    """Not the last one, which is rehearsed for all that are of its sizes."""
    study, out = tmp_path / "some.py", tmp_path / "out"
    study.write_text(ONLY_SOME.replace("TINY", repr(STUDY)))
    noise = ["--domain.sigma", "0.1", "0.3", "0.5"]
    assert main(["sweep", str(study), "--out", str(out), *SMALL, *noise]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "setting 2 of 3 (--domain.sigma 0.3): the objective of lstm cannot be computed" in said
    assert not out.exists()


def test_optimisers_whose_states_are_called_otherwise_are_no_rows_of_one_program():
    study = load_study(STUDY)
    loops = {}
    for i, name in enumerate(("sgd", "scale_by_learning_rate", "sgd")):
        config = configured(study.presets["quick"], ["--outer.optimizer", name])
        part = study.plan(config)
        loops[i] = OuterLoop(part.trained, config.outer, jax.random.key(0))
    assert sweep_training.by_program(loops) == [[0, 2], [1]]


NAMED_LOSS = """
import dataclasses
from metadyn import load_study
tiny = load_study(TINY)
@dataclasses.dataclass(frozen=True)
class Config(type(tiny.presets["quick"])):
    loss: float = 0.1
    task: int = 1
def plan(config):
    noisy = dataclasses.replace(config.domain, sigma=config.loss)
    return tiny.plan(dataclasses.replace(config, domain=noisy))
quick = Config(**vars(tiny.presets["quick"]))
study = dataclasses.replace(tiny, plan=plan, presets={"quick": quick})
"""


def test_an_option_called_as_what_is_measured_replaces_none_of_it(tmp_path):
    study, out = tmp_path / "named.py", tmp_path / "out"
    study.write_text(NAMED_LOSS.replace("TINY", repr(STUDY)))
    options = ["--loss", "0.1", "0.3", "--task", "1", "2"]
    assert main(["sweep", str(study), "--out", str(out), *SMALL, *options]) == 0
    data = metadyn.load(out, "heldout")
    assert data["option_loss"].values.tolist() == [0.1, 0.3]
    assert data["option_task"].values.tolist() == [1, 2]
    assert data["loss"].dims[:2] == ("option_loss", "option_task")
    assert not data["loss"].isel(step=-1).isnull().any()


def test_settings_that_do_not_fit_into_the_memory_at_once_are_refused(
    tmp_path, monkeypatch, capsys
):
    """By the account of the compiler, of the program that trains them."""
    monkeypatch.setattr(program_cost, "memory", lambda compiled: 1 << 60)
    assert metadyn_sweep(tmp_path / "out", "--domain.sigma", "0.1", "0.3") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--part: an outer step of lstm for 2 settings at once would take 1,073,741,824.0" in said
    assert said.endswith("use more parts, in another DIR")
    assert metadyn_sweep(tmp_path / "one", "--domain.sigma", "0.1") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--outer.batch 8: an outer step of lstm would take" in said


def test_settings_of_other_sizes_are_rehearsed_too(tmp_path, monkeypatch, capsys):
    """The first is of another size than the last, and of another noise than the second."""
    rehearsed = []

    def rehearse(study, config, plan):
        rehearsed.append((config.domain.n_x, config.domain.sigma))
        if len(rehearsed) == 2:
            raise ConfigError("it cannot be run")

    monkeypatch.setattr(sweep, "rehearse", rehearse)
    sizes = ["--domain.n-x", "2", "3", "--domain.sigma", "0.1", "0.3"]
    assert metadyn_sweep(tmp_path / "out", *sizes) == 2
    assert "it cannot be run" in capsys.readouterr().err
    assert sorted(n for n, _ in rehearsed) == [2, 3]
    assert not (tmp_path / "out").exists()


def test_ranges_and_rows_of_values():
    options = {"--a": ["1e-3", "1e-1"], "--b": ["2", "64"], "--c": ["x"]}
    usual = {"--b": 8}
    drawn = sweep.settings(options, "random", usual, 400, 0)
    a, b = (np.array([float(row[i]) for row in drawn]) for i in (0, 1))
    assert a.min() >= 1e-3
    assert a.max() <= 1e-1
    assert np.mean(a < 1e-2) == pytest.approx(0.5, abs=0.1)  # evenly in logarithm
    assert {row[1] for row in drawn} <= {str(n) for n in range(2, 65)}
    assert np.mean(b <= 11) == pytest.approx(0.5, abs=0.1)
    assert {row[2] for row in drawn} == {"x"}
    assert drawn == sweep.settings(options, "random", usual, 400, 0)
    assert drawn != sweep.settings(options, "random", usual, 400, 1)
    zipped = sweep.settings(options, "zip", usual, 0, 0)
    assert zipped == [("1e-3", "2", "x"), ("1e-1", "64", "x")]
    with pytest.raises(ConfigError, match="give each the same number"):
        sweep.settings(options | {"--c": ["x", "y", "z"]}, "zip", usual, 0, 0)


def test_what_is_left_out_by_default_is_drawn_as_it_is_typed():
    for typed, whole in ((["4", "16"], True), (["4.0", "16"], False)):
        ((*_,), (*drawn,)) = zip(
            *sweep.settings({"--a": ["x"], "--n": typed}, "random", {"--n": None}, 9, 0),
            strict=True,
        )
        assert all(each.isdecimal() for each in drawn) == whole


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--domain.sigma", "1", "--domain.sigma", "2"], "--domain.sigma: given twice"),
        (["--lstm.forget-bias", "1", "--lstm.forget_bias=2"], "--lstm.forget-bias: given twice"),
        (["--seeds", "2", "--outer.seeds", "2"], "--outer.seeds: given twice"),
        (["--domain.sigma", "1", "2", "1"], "--domain.sigma 1: given twice"),
        (["--domain.sigma", "0.1", "1e-1"], "--domain.sigma 0.1: given twice"),
        (["--tensorboard", "--domain.sigma", "1"], "--tensorboard: is an option of `metadyn run`"),
        (["--domain.sigma"], "--domain.sigma: give one or more values"),
        (["--domain.sigma", "", "0.1"], "--domain.sigma : must be a number"),
        (["--domain.sigm", "1"], "did you mean '--domain.sigma'?"),
        (["stray"], "stray"),
        (
            ["--domain.sigma", "0.1", "-1", "--outer.learning-rate", "1", "2"],
            "setting 3 of 4 (--domain.sigma -1 --outer.learning-rate 1): --domain.sigma -1: must",
        ),
        (["--domain.sigma", "nan", "0.1"], "--domain.sigma nan: must be positive and finite"),
        (["--domain.sigma", "0.1", "loud"], "setting 2 of 2 (--domain.sigma loud): "),
        (["--measure.probe-points", "6", "3"], "--measure.probe-points 3: must be at least"),
        (
            ["--domain.sigma", *map(str, range(1, 102)), "--lstm.hidden", *map(str, range(1, 101))],
            "10,100 settings are more than 10,000: confirm with --yes",
        ),
        (["--zip", "--domain.sigma", "1", "2", "--lstm.hidden", "1", "2", "3"], "--zip"),
        (["--zip", "--random", "3"], "not allowed with"),
        (["--random", "0", "--domain.sigma", "1", "2"], "--random 0: must be 1 or more"),
        (["--random", "3", "--domain.sigma", "2", "1"], "the ends of a range"),
        (["--random", "3", "--domain.sigma", "2"], "--random 3: give the least and the greatest"),
        (["--random", "3", "--meta", "lstm", "gru"], "the ends of a range"),
        (["--part", "3/2"], "--part 3/2: give I/N"),
        (["--part", "2/2"], "--part"),
        (["--preset", "huge"], "choose from quick"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, says, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sweep", STUDY, "--out", str(out), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not out.exists()


def test_a_part_that_died_writing_what_was_asked_leaves_dir_usable(tmp_path):
    asked = asdict(sweep.Sweep("tiny", "quick", 0, "grid", {"--a": ("1",)}, [("1",)]))
    (tmp_path / "sweep.json.part").write_text("{")
    assert sweep.SweepFolder.create(tmp_path, asked).sweep.study == "tiny"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="is not empty and holds no sweep"):
        sweep.SweepFolder.create(tmp_path / "other", asked)


def test_more_settings_than_files_may_be_open_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda which: (100, 200))
    study = load_study(STUDY)
    asked = sweep.Sweep("tiny", "quick", 0, "grid", {}, [()])
    given = asked, study, {0: study.presets["quick"]}
    with pytest.raises(ConfigError, match=r"1 settings need 257 open files \(limit 200"):
        sweep.planned(*given)


def test_a_value_that_is_not_finite_is_an_option_like_any_other(done, tmp_path):
    out = Path(shutil.copytree(done, tmp_path / "grid", ignore=shutil.ignore_patterns("figures")))
    (out / "sweep.json").write_text((out / "sweep.json").read_text().replace('"3e-2"', '"inf"'))
    folder = sweep.SweepFolder(out)
    sweep_results.conclude(folder)
    rates = {row["options"]["outer.learning_rate"] for row in sweep_results.rows(folder)}
    assert rates == {0.01, "inf"}
    assert (folder.figures / "map.png").exists()
    np.testing.assert_array_equal(metadyn.load(out)["outer.learning_rate"], [1e-2, np.inf])


def test_settings_without_a_meta_learner_that_is_followed_are_said_to_be_done(done, monkeypatch):
    monkeypatch.setattr("metadyn.figures.histories", lambda results: {})
    rows = sweep_results.measured(sweep.SweepFolder(done))
    assert [row["setting"] for row in rows] == [0, 1, 2, 3]
    assert {row["lost"] for row in rows} == {
        "no excess loss: no meta-learner is measured on tracked and held-out tasks"
    }


def test_a_measured_loss_that_is_not_finite_is_said_with_its_setting(
    done, tmp_path, monkeypatch, capsys
):
    out = Path(shutil.copytree(done, tmp_path / "grid"))
    setting = out / "settings" / "2"
    shutil.rmtree(setting / "measurements" / "in_distribution" / "bayes")
    for path in (setting / "summary.json", out / "summary.json"):
        path.unlink()
    readings = runner.readings

    def unbounded(*given):
        return {name: each * np.nan for name, each in readings(*given).items()}

    monkeypatch.setattr(runner, "readings", unbounded)
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0
    said = "setting 3 of 4 (--outer.learning-rate 3e-2 --domain.sigma 0.1): the loss of bayes on"
    assert said in capsys.readouterr().err


def test_criteria_that_fail_on_one_setting_do_not_keep_the_others_from_being_judged(
    done, tmp_path, monkeypatch, capsys
):
    """What is wrong is said, with the setting, at the end; once it is mended the sweep goes on."""
    out = Path(shutil.copytree(done, tmp_path / "grid"))
    for path in [out / "summary.json", *(out / f"settings/{i}/summary.json" for i in (1, 2))]:
        path.unlink()
    judge, asked = sweep.judge, []

    def failing(study, config, *more):
        asked.append(config.domain.sigma)
        if config.domain.sigma == 0.3:
            raise ConfigError("its criteria cannot be computed")
        return judge(study, config, *more)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "judge", failing)
        assert metadyn_sweep(out, *GRID, "--seeds", "2") == 2
    assert asked == [0.3, 0.1]
    said = capsys.readouterr().err.splitlines()[-1]
    assert "setting 2 of 4 (" in said
    assert "its criteria cannot be computed" in said
    assert (out / "settings/2/summary.json").exists()
    assert not (out / "summary.json").exists()
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0
    assert (out / "summary.json").exists()


def test_a_value_of_several_words_is_one_setting():
    """A matrix is one word, whatever its spaces."""
    words = ["--stop-band", "1 5", "2 4", "--learners", "lstm gru", "--rows", "[[1, 0], [0, 2]]"]
    options = sweep.parsed(words)
    settings = sweep.settings(options, "grid", dict.fromkeys(options, False), 0, 0)
    asked = sweep.Sweep("tiny", "quick", 0, "grid", options, settings)
    given = [asked.overrides(i) for i in range(len(settings))]
    ends = ["--learners", "lstm", "gru", "--rows", "[[1, 0], [0, 2]]"]
    assert given == [["--stop-band", "1", "5", *ends], ["--stop-band", "2", "4", *ends]]
