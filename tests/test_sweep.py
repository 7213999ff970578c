"""Sweeps equal single runs, are read as one dataset, can be resumed, and refuse bad input."""

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
def swept(tmp_path_factory):
    """Returns the folder of a sweep over two rates and two noise levels, with two seeds each."""
    out = tmp_path_factory.mktemp("sweeps") / "grid"
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0
    return out


def test_each_setting_is_what_a_run_with_its_options_gives(swept, tmp_path):
    """They agree to 1e-4: a run's program has as constants what are arguments of a sweep's."""
    single = ["--outer.learning-rate", "3e-2", "--domain.sigma", "0.3", "--outer.seeds", "2"]
    folders = tmp_path / "one", swept / "settings/3"
    assert main(["run", STUDY, "--out", str(tmp_path / "one"), *SMALL, *single]) == 0
    for task_set in SETS:
        run, setting = (metadyn.load(folder, task_set) for folder in folders)
        xr.testing.assert_allclose(run, setting, rtol=1e-4, atol=1e-5)
    run, setting = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert run == setting
    again = ["run", STUDY, "--out", str(swept / "settings" / "3"), *SMALL, *single]
    assert main(again) == 0  # the setting is a run that is done


def test_a_sweep_is_one_dataset_with_the_swept_options_as_dimensions(swept):
    for task_set in SETS:
        data = metadyn.load(swept, task_set)
        assert data["loss"].dims[:2] == ("outer.learning_rate", "domain.sigma")
        np.testing.assert_array_equal(data["outer.learning_rate"], [1e-2, 3e-2])
        np.testing.assert_array_equal(data["domain.sigma"], [0.1, 0.3])
        for i, (rate, sigma) in enumerate([(1e-2, 0.1), (1e-2, 0.3), (3e-2, 0.1), (3e-2, 0.3)]):
            setting = metadyn.load(swept / "settings" / str(i), task_set)
            part = data.sel({"outer.learning_rate": rate, "domain.sigma": sigma})
            assert np.isfinite(setting["loss"].isel(step=-1)).all()
            for name in setting:
                expected = setting[name]
                np.testing.assert_array_equal(part[name].transpose(*expected.dims), expected)


def one_option(swept, out, *sigmas):
    """Makes a sweep of the noise alone from the first settings of the grid."""
    shutil.copytree(swept, out, ignore=lambda _, names: {"summary.json", "figures"} & {*names})
    description = json.loads((out / "sweep.json").read_text())
    description["options"] |= {"--outer.learning-rate": ["1e-2"], "--domain.sigma": sigmas}
    description["settings"] = description["settings"][: len(sigmas)]
    (out / "sweep.json").write_text(json.dumps(description))
    return out


def test_a_sweep_of_one_option_has_one_dimension(swept, tmp_path):
    out = one_option(swept, tmp_path / "one", "0.1", "0.3")
    data = metadyn.load(out, "heldout")
    assert data["loss"].dims[0] == "domain.sigma"
    grid = metadyn.load(swept, "heldout").sel({"outer.learning_rate": 1e-2})
    for sigma in (0.1, 0.3):
        loss, expected = (dataset["loss"].sel({"domain.sigma": sigma}) for dataset in (data, grid))
        np.testing.assert_array_equal(loss, expected.transpose(*loss.dims))


def test_a_sweep_of_one_setting_has_nothing_to_draw(swept, tmp_path, capsys):
    assert main(["figures", str(one_option(swept, tmp_path / "one", "0.1"))]) == 0
    assert "nothing is drawn, as no option has several" in capsys.readouterr().err


def test_noise_and_rate_change_the_losses_that_they_should(swept):
    """Noise alone changes losses before training. After training, the rate changes them too."""
    loss = metadyn.load(swept, "heldout")["loss"].sel(learner="lstm").isel(step=1)
    start, end = (loss.isel(outer_step=i).to_numpy() for i in (0, -1))  # [rate, noise, ...]
    np.testing.assert_array_equal(start[0], start[1])
    assert not np.isclose(start[:, 0], start[:, 1]).any()
    assert not np.isclose(end[0], end[1]).all()


def test_the_report_ranks_by_excess_loss_over_bayes(swept, capsys):
    assert main(["report", str(swept)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ranked = [line.split() for line in lines if line.split()[0].isdecimal() and "sigma" in line]
    loss = metadyn.load(swept, "heldout")["loss"].isel(step=slice(1, None), outer_step=-1)
    lstm, bayes = (loss.sel(learner=n).mean(["seed", "task", "step"]) for n in ("lstm", "bayes"))
    excess = (lstm - bayes) / (bayes - loss["domain.sigma"] ** 2)
    ranked_excess = [excess.to_numpy().ravel()[int(words[1])] for words in ranked]
    assert len(ranked_excess) == 4
    assert ranked_excess == sorted(ranked_excess)
    for words, value in zip(ranked, ranked_excess, strict=True):
        printed = words[words.index("loss") + 1].replace("−", "-")
        assert float(printed) == pytest.approx(value, rel=1e-2)


def test_figures_are_drawn_against_each_option_and_as_a_map(swept, capsys):
    names = {"against_outer.learning_rate", "against_domain.sigma", "map"}
    assert {path.stem for path in (swept / "figures").glob("*.png")} == names
    shutil.rmtree(swept / "figures")
    assert main(["figures", str(swept), "--study", STUDY]) == 2
    assert main(["figures", str(swept)]) == 0
    for path in map(Path, capsys.readouterr().out.split()):
        assert matplotlib.image.imread(path).std() > 0.02


def test_a_map_has_its_numbers_in_order_however_they_were_typed():
    grid = list(itertools.product((3e-2, 1e-2), ("sgd", 8, 4)))
    merits = [dict.fromkeys(sweep_results.MERITS, [float(i)] * 3) for i in range(len(grid))]
    about = {"learner": "LSTM", "merit": "slope"}
    rows = [
        {"options": {"rate": rate, "other": width}, **about, **merit}
        for (rate, width), merit in zip(grid, merits, strict=True)
    ]
    axis = sweep_results.heat_map(rows, "rate", "other").axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.01", "0.03"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["4", "8", "sgd"]
    np.testing.assert_array_equal(axis.images[0].get_array(), [[5, 2], [4, 1], [3, 0]])


def test_a_sweep_ends_with_a_page_of_all_settings(swept, capsys, monkeypatch):
    page = swept / "report.html"
    data = view.collect(sweep.SweepFolder(swept))
    assert page.read_text() == view.page(data)
    page.unlink()
    assert main(["view", str(swept)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text() == view.page(data)
    options, settings = data["sweep"]["options"], data["sweep"]["settings"]
    assert [*itertools.chain(*([name, *values] for name, values in options.items()))] == GRID
    assert [setting["values"] for setting in settings] == [
        ["1e-2", "0.1"], ["1e-2", "0.3"], ["3e-2", "0.1"], ["3e-2", "0.3"]
    ]  # fmt: skip
    stored_rows = json.loads((swept / "summary.json").read_text())["settings"]
    assert [row for setting in settings for row in setting["merits"]] == stored_rows
    for i, setting in enumerate(settings):
        assert setting["run"] == view.collect(metadyn.RunFolder(swept / "settings" / str(i)))
    best = min(stored_rows, key=lambda row: row["excess"][0])["setting"]
    monkeypatch.setattr(view, "MOST_SETTINGS", 1)
    few = view.collect(sweep.SweepFolder(swept))["sweep"]["settings"]
    assert [i for i, setting in enumerate(few) if setting["run"]] == [best]
    assert [setting["merits"] for setting in few] == [setting["merits"] for setting in settings]
    monkeypatch.setattr(view, "MOST_BYTES", 0)
    none = view.collect(sweep.SweepFolder(swept))["sweep"]["settings"]
    assert not any(setting["run"] for setting in none)


@needs_chromium
def test_in_a_browser_options_choose_the_setting_that_is_shown(swept, tmp_path):
    address = (swept / "report.html").as_uri()
    settings = view.collect(sweep.SweepFolder(swept))["sweep"]["settings"]

    def verdict(document):
        return text_of(document, "setting"), text_of(document, "criteria")

    ranked = sorted(range(4), key=lambda i: settings[i]["merits"][0]["excess"][0])
    best, worst = ranked[0], ranked[-1]
    documents = [in_browser(f"{address}{fragment}") for fragment in ("", f"#setting={worst}")]
    for i, document in zip((best, worst), documents, strict=True):
        rate, sigma = settings[i]["values"]
        title, table = verdict(document)
        assert title.startswith(f"--outer.learning-rate {rate} --domain.sigma {sigma} (settings/")
        assert f"{settings[i]['run']['criteria'][0]['value']:.3g}" in table
    # The script sends the event that a browser sends when another value is chosen.
    change = "const chosen = $('options').querySelectorAll('select')[1];"
    change += f"chosen.value = {worst % 2}; chosen.dispatchEvent(new Event('change'));"
    changed_page = tmp_path / "moved.html"
    text = (swept / "report.html").read_text()
    changed_page.write_text(text.replace("if (whole.live) {", f"{change}\nif (whole.live) {{", 1))
    neighbour = worst + 1 - 2 * (worst % 2)  # the setting of the same rate and the other noise
    chosen = in_browser(f"{changed_page.as_uri()}#setting={neighbour}")
    assert verdict(chosen) == verdict(documents[1])


def test_a_sweep_that_goes_on_is_served_as_it_grows(swept, tmp_path):
    out = tmp_path / "live"
    shutil.copytree(swept, out)
    (out / "summary.json").unlink()
    (out / "settings" / "3" / "summary.json").unlink()
    last = out / "settings" / "3" / "checkpoints" / "30"
    last.rename(tmp_path / "30")
    folder = sweep.SweepFolder(out)
    before = view.collect(folder)["sweep"]["settings"]
    assert [setting["done"] for setting in before] == [True, True, True, False]
    (tmp_path / "30").rename(last)
    after = view.collect(folder)["sweep"]["settings"]
    steps = [s[3]["run"]["groups"][0]["learners"][0]["steps"] for s in (before, after)]
    assert steps[1] == [*steps[0], 30]
    assert after[2]["run"] is before[2]["run"]  # it was not read again


def test_a_page_that_cannot_be_made_is_refused_in_one_line(swept, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(swept, out)

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


def test_a_disturbed_sweep_resumes_to_the_same_bits(swept, tmp_path, monkeypatch):
    """One setting lost its end, another all but its start, a third has a damaged measurement."""
    out = tmp_path / "disturbed"
    shutil.copytree(swept, out)
    for setting, kept in (("1", {"0", "1", "5"}), ("2", {"0"})):
        folder = out / "settings" / setting
        (folder / "summary.json").unlink()
        shutil.rmtree(folder / "measurements" / "in_distribution")
        for path in (folder / "checkpoints").iterdir():
            if path.name not in kept:
                shutil.rmtree(path)
    damage(out / "settings" / "3")
    damage(out / "settings" / "0")  # this setting is done
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0
    for task_set in SETS:
        xr.testing.assert_identical(metadyn.load(swept, task_set), metadyn.load(out, task_set))

    def planned(*arguments):
        raise ConfigError("it is gone on with")

    monkeypatch.setattr(sweep, "planned", planned)
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0  # it is done, so nothing is planned
    damage(out / "settings" / "1")
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 2


def damage(folder):
    """Changes a byte of a measurement."""
    files = (folder / "measurements" / "in_distribution").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_figures_are_drawn_by_a_later_call_if_the_last_part_died_drawing_them(
    swept, tmp_path, monkeypatch
):
    out = tmp_path / "undrawn"
    shutil.copytree(swept, out, ignore=shutil.ignore_patterns("figures"))
    (out / "summary.json").unlink()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_results, "draw", interrupt)
        assert metadyn_sweep(out, *GRID, "--seeds", "2") == 130
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0
    assert len(list((out / "figures").glob("*.png"))) == 3
    assert (out / "summary.json").read_text() == (swept / "summary.json").read_text()


def test_only_one_of_the_parts_that_end_together_draws(swept, tmp_path, monkeypatch):
    out = tmp_path / "together"
    shutil.copytree(swept, out)
    (out / "summary.json").unlink()
    concluded, barrier = [], threading.Barrier(2)
    sweep_folder, study = sweep.SweepFolder(out), load_study(STUDY)
    default = study.presets[sweep_folder.sweep.preset]
    configs = {i: sweep_folder.sweep.config(i, default) for i in range(4)}

    def conclude(folder, progress):
        concluded.append(folder)
        time.sleep(0.2)
        (folder.path / "summary.json").write_text("{}")

    def end_part():
        barrier.wait()
        sweep.run_sweep(sweep_folder.sweep, study, configs, out, Progress(None))

    monkeypatch.setattr(sweep_results, "conclude", conclude)
    parts = [threading.Thread(target=end_part) for _ in range(2)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert len(concluded) == 1


def test_a_done_sweep_ends_at_once_and_another_is_refused(swept, capsys):
    before = {p: p.stat().st_mtime_ns for p in (swept / "settings").rglob("*") if p.is_file()}
    assert metadyn_sweep(swept, *GRID, "--seeds", "2") == 0
    after = {p: p.stat().st_mtime_ns for p in (swept / "settings").rglob("*") if p.is_file()}
    assert before == after
    capsys.readouterr()
    assert metadyn_sweep(swept, *GRID, "--seeds", "3") == 2
    assert metadyn_sweep(swept, *GRID, "--seeds", "2", "--part", "1/2") == 2
    assert main(["run", STUDY, "--out", str(swept), *SMALL]) == 2
    assert metadyn_sweep(swept / "settings" / "0", *GRID) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [len(lines), "options.--outer.seeds = ['2'], not ['3']" in lines[0]] == [4, True]
    assert "holds a sweep with parts = 1, not 2" in lines[1]
    assert "holds no run" in lines[2]
    assert "holds no sweep" in lines[3]


def test_a_done_sweep_is_refused_after_its_preset_was_changed(swept, tmp_path, capsys):
    changed_study = tmp_path / "tiny_study.py"
    text = Path(STUDY).read_text()
    assert text.count("heldout_tasks=8") == 1
    changed_study.write_text(text.replace("heldout_tasks=8", "heldout_tasks=16"))
    again = [*SMALL, *GRID, "--seeds", "2", "--out", str(swept)]
    assert main(["sweep", str(changed_study), *again]) == 2
    assert "holds a run with measure.heldout_tasks = 8, not 16" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_marked_and_the_others_go_on(tmp_path, capsys):
    """Other widths are also programs of their own, and two parts complete the sweep."""
    out, wild = tmp_path / "wild", ["--outer.optimizer", "sgd", "--outer.clip", "1e30"]
    wild += ["--outer.learning-rate", "1e-2", "1e30", "--lstm.hidden", "4", "5"]
    assert metadyn_sweep(out, *wild, "--part", "2/2") == 0
    assert not (out / "summary.json").exists()
    text = capsys.readouterr().out
    assert "part 2 of 2 runs 2 of these settings" in text
    assert "figures and page: made by the part that ends last" in text
    assert metadyn_sweep(out, *wild, "--part", "1/2") == 0
    text = capsys.readouterr().out
    assert "--outer.learning-rate 1e30: the loss of lstm is no longer finite at outer step" in text
    assert "2 of 4 settings done" in text
    data = metadyn.load(out, "heldout")["loss"].isel(step=-1)
    finite = np.isfinite(data.sel(learner="lstm")).all(["outer_step", "seed", "task"])
    np.testing.assert_array_equal(finite, [[True, True], [False, False]])
    summary = json.loads((out / "summary.json").read_text())
    assert [row["lost"] is None for row in summary["settings"]] == [True, True, False, False]
    settings = view.collect(sweep.SweepFolder(out))["sweep"]["settings"]
    for row, setting in zip(summary["settings"], settings, strict=True):
        assert setting["lost"] == (row["lost"] or "")
    assert metadyn_sweep(out, *wild, "--part", "1/2") == 0


READS_LSTM = """
import dataclasses
from metadyn import load_study
tiny = load_study(TINY)
def criteria(config, results):
    results["in_distribution", "lstm"]
    yield from tiny.criteria(config, results)
study = dataclasses.replace(tiny, criteria=criteria)
"""


def test_settings_that_measure_other_learners_are_rehearsed_too(tmp_path, capsys):
    """The second setting has no LSTM, which a criterion reads."""
    study, out = tmp_path / "named.py", tmp_path / "out"
    study.write_text(READS_LSTM.replace("TINY", repr(STUDY)))
    assert main(["sweep", str(study), "--out", str(out), *SMALL, "--meta", "lstm", "gru"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--meta gru" in line
    assert "'lstm'" in line
    assert not out.exists()


FAILS_FOR_ONE_NOISE = """
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


def test_an_objective_that_fails_for_one_setting_is_found_before_training(tmp_path, capsys):
    """That setting is not the last one, which is rehearsed for all settings of its sizes."""
    study, out = tmp_path / "some.py", tmp_path / "out"
    study.write_text(FAILS_FOR_ONE_NOISE.replace("TINY", repr(STUDY)))
    noise = ["--domain.sigma", "0.1", "0.3", "0.5"]
    assert main(["sweep", str(study), "--out", str(out), *SMALL, *noise]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "setting 2 of 3 (--domain.sigma 0.3): the objective of lstm cannot be computed" in line
    assert not out.exists()


def test_optimisers_whose_states_have_other_names_do_not_share_a_program():
    study = load_study(STUDY)
    loops = {}
    for i, name in enumerate(("sgd", "scale_by_learning_rate", "sgd")):
        config = configured(study.presets["quick"], ["--outer.optimizer", name])
        part = study.plan(config)
        loops[i] = OuterLoop(part.trained, config.outer, jax.random.key(0))
    assert sweep_training.by_program(loops) == [[0, 2], [1]]


OPTION_NAMED_LOSS = """
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


def test_an_option_with_the_name_of_a_measured_variable_replaces_nothing(tmp_path):
    study, out = tmp_path / "named.py", tmp_path / "out"
    study.write_text(OPTION_NAMED_LOSS.replace("TINY", repr(STUDY)))
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
    """What counts is the memory that the compiler states for the program that trains them."""
    monkeypatch.setattr(program_cost, "memory", lambda compiled: 1 << 60)
    assert metadyn_sweep(tmp_path / "out", "--domain.sigma", "0.1", "0.3") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--part: an outer step of lstm for 2 settings at once would take 1,073,741,824.0" in line
    assert line.endswith("use more parts, in another DIR")
    assert metadyn_sweep(tmp_path / "one", "--domain.sigma", "0.1") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--outer.batch 8: an outer step of lstm would take" in line


def test_settings_of_each_size_are_rehearsed(tmp_path, monkeypatch, capsys):
    """One setting of each size is rehearsed, whatever its noise."""
    domains = []

    def rehearse(study, config, plan):
        domains.append((config.domain.n_x, config.domain.sigma))
        if len(domains) == 2:
            raise ConfigError("it cannot be run")

    monkeypatch.setattr(sweep, "rehearse", rehearse)
    sizes = ["--domain.n-x", "2", "3", "--domain.sigma", "0.1", "0.3"]
    assert metadyn_sweep(tmp_path / "out", *sizes) == 2
    assert "it cannot be run" in capsys.readouterr().err
    assert sorted(n for n, _ in domains) == [2, 3]
    assert not (tmp_path / "out").exists()


def test_values_are_drawn_from_ranges_or_zipped_into_rows():
    options = {"--a": ["1e-3", "1e-1"], "--b": ["2", "64"], "--c": ["x"]}
    defaults = {"--b": 8}
    drawn = sweep.settings(options, "random", defaults, 400, 0)
    a, b = (np.array([float(row[i]) for row in drawn]) for i in (0, 1))
    assert a.min() >= 1e-3
    assert a.max() <= 1e-1
    assert np.mean(a < 1e-2) == pytest.approx(0.5, abs=0.1)  # evenly in logarithm
    assert {row[1] for row in drawn} <= {str(n) for n in range(2, 65)}
    assert np.mean(b <= 11) == pytest.approx(0.5, abs=0.1)
    assert {row[2] for row in drawn} == {"x"}
    assert drawn == sweep.settings(options, "random", defaults, 400, 0)
    assert drawn != sweep.settings(options, "random", defaults, 400, 1)
    zipped = sweep.settings(options, "zip", defaults, 0, 0)
    assert zipped == [("1e-3", "2", "x"), ("1e-1", "64", "x")]
    with pytest.raises(ConfigError, match="give each the same number"):
        sweep.settings(options | {"--c": ["x", "y", "z"]}, "zip", defaults, 0, 0)


def test_an_option_whose_default_is_none_is_drawn_as_its_range_is_typed():
    for typed, integers in ((["4", "16"], True), (["4.0", "16"], False)):
        ((*_,), (*drawn,)) = zip(
            *sweep.settings({"--a": ["x"], "--n": typed}, "random", {"--n": None}, 9, 0),
            strict=True,
        )
        assert all(value.isdecimal() for value in drawn) == integers


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_bad_input_is_one_line_and_exit_code_2(options, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sweep", STUDY, "--out", str(out), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()


def test_a_part_that_died_writing_sweep_json_leaves_dir_usable(tmp_path):
    description = asdict(sweep.Sweep("tiny", "quick", 0, "grid", {"--a": ("1",)}, [("1",)]))
    (tmp_path / "sweep.json.part").write_text("{")
    assert sweep.SweepFolder.create(tmp_path, description).sweep.study == "tiny"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="is not empty and holds no sweep"):
        sweep.SweepFolder.create(tmp_path / "other", description)


def test_more_settings_than_files_may_be_open_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda which: (100, 200))
    study = load_study(STUDY)
    single = sweep.Sweep("tiny", "quick", 0, "grid", {}, [()])
    arguments = single, study, {0: study.presets["quick"]}
    with pytest.raises(ConfigError, match=r"1 settings need 257 open files \(limit 200"):
        sweep.planned(*arguments)


def test_a_value_that_is_not_finite_is_an_option_like_any_other(swept, tmp_path):
    out = Path(shutil.copytree(swept, tmp_path / "grid", ignore=shutil.ignore_patterns("figures")))
    (out / "sweep.json").write_text((out / "sweep.json").read_text().replace('"3e-2"', '"inf"'))
    folder = sweep.SweepFolder(out)
    sweep_results.conclude(folder)
    rates = {row["options"]["outer.learning_rate"] for row in sweep_results.rows(folder)}
    assert rates == {0.01, "inf"}
    assert (folder.figures / "map.png").exists()
    np.testing.assert_array_equal(metadyn.load(out)["outer.learning_rate"], [1e-2, np.inf])


def test_settings_without_a_tracked_meta_learner_count_as_done(swept, monkeypatch):
    monkeypatch.setattr("metadyn.figures.histories", lambda results: {})
    rows = sweep_results.measured(sweep.SweepFolder(swept))
    assert [row["setting"] for row in rows] == [0, 1, 2, 3]
    assert {row["lost"] for row in rows} == {
        "no excess loss: no meta-learner is measured on tracked and held-out tasks"
    }


def test_the_warning_of_a_measured_loss_that_is_not_finite_names_the_setting(
    swept, tmp_path, monkeypatch, capsys
):
    out = Path(shutil.copytree(swept, tmp_path / "grid"))
    setting = out / "settings" / "2"
    shutil.rmtree(setting / "measurements" / "in_distribution" / "bayes")
    for path in (setting / "summary.json", out / "summary.json"):
        path.unlink()
    readings = runner.readings

    def unbounded(*arguments):
        return {name: reading * np.nan for name, reading in readings(*arguments).items()}

    monkeypatch.setattr(runner, "readings", unbounded)
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0
    message = "setting 3 of 4 (--outer.learning-rate 3e-2 --domain.sigma 0.1): the loss of bayes on"
    assert message in capsys.readouterr().err


def test_criteria_that_fail_on_one_setting_do_not_stop_the_others_from_being_judged(
    swept, tmp_path, monkeypatch, capsys
):
    """The error is reported at the end, with its setting. Once it is mended, the sweep goes on."""
    out = Path(shutil.copytree(swept, tmp_path / "grid"))
    for path in [out / "summary.json", *(out / f"settings/{i}/summary.json" for i in (1, 2))]:
        path.unlink()
    judge, sigmas = sweep.judge, []

    def failing(study, config, *arguments):
        sigmas.append(config.domain.sigma)
        if config.domain.sigma == 0.3:
            raise ConfigError("its criteria cannot be computed")
        return judge(study, config, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "judge", failing)
        assert metadyn_sweep(out, *GRID, "--seeds", "2") == 2
    assert sigmas == [0.3, 0.1]
    line = capsys.readouterr().err.splitlines()[-1]
    assert "setting 2 of 4 (" in line
    assert "its criteria cannot be computed" in line
    assert (out / "settings/2/summary.json").exists()
    assert not (out / "summary.json").exists()
    assert metadyn_sweep(out, *GRID, "--seeds", "2") == 0
    assert (out / "summary.json").exists()


def test_a_value_of_several_words_is_one_setting():
    """A matrix is one word, whatever spaces it has."""
    words = ["--stop-band", "1 5", "2 4", "--learners", "lstm gru", "--rows", "[[1, 0], [0, 2]]"]
    options = sweep.parsed(words)
    settings = sweep.settings(options, "grid", dict.fromkeys(options, False), 0, 0)
    value_sweep = sweep.Sweep("tiny", "quick", 0, "grid", options, settings)
    overrides = [value_sweep.overrides(i) for i in range(len(settings))]
    ends = ["--learners", "lstm", "gru", "--rows", "[[1, 0], [0, 2]]"]
    assert overrides == [["--stop-band", "1", "5", *ends], ["--stop-band", "2", "4", *ends]]


@pytest.mark.parametrize(
    ("texts", "values"),
    [(["None", "0.9"], [np.nan, 0.9]), (["8", "16"], [8, 16]), (["adam", "1"], ["adam", "1"])],
)
def test_options_are_coordinates_of_numbers_where_they_can_be(texts, values):
    np.testing.assert_array_equal(sweep_results.coordinate(texts), values)
