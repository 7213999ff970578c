"""The page on extending: every file on it works as it stands, and is as short as the page says.

Each file is planned and rehearsed as it stands, and its training is traced. Then three studies are
run: one with all meta-learners, that of the README among them, one with all other additions, and
that of the page's own domain.
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import SMALL

import metadyn
from metadyn.cli import main
from metadyn.runner import rehearse

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
(MY_STUDY,) = (block for block in BLOCKS if "nnx.GRUCell" in block)
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"`(\w+\.py)`.*?\n```python\n(.*?)```", PAGE, re.DOTALL))
SMALL = [*SMALL, "--outer.steps", "20"]
SPARSE = [
    *("--lstm.hidden", "4", "--outer.steps", "20", "--outer.batch", "4", "--outer.seeds", "2"),
    *("--outer.warmup", "1", "--outer.checkpoints", "2", "--measure.updating-tasks", "16"),
    *("--measure.tasks", "256", "--measure.tracked-tasks", "4", "--measure.heldout-tasks", "16"),
]
MOST = {"gru.py": 12, "transformer.py": 45, "sparse.py": 110, "far.py": 15, "late.py": 15}
MOST |= {"nearest.py": 30, "endings.py": 15}


def joined(*texts):
    """Joins files into one, in which each adds to the study of those before it."""
    first, *others = texts
    call = 'metadyn.load_study("linear_regression")'
    assert all(call in text for text in texts)
    return "\n\n".join([first, *(text.replace(call, "study") for text in others)])


def load(name, folder):
    """Loads one of the page's files as it stands, and returns its study."""
    (folder / name).write_text(FILES[name])
    return metadyn.load_study(str(folder / name))


def run(folder, text, options=SMALL):
    """Runs a file with this text, and returns the folder of the run."""
    (folder / "my_study.py").write_text(text)
    code = main(["run", str(folder / "my_study.py"), "--out", str(folder / "out"), *options])
    assert code == 1  # so small a study does not meet its criteria
    return folder / "out"


@pytest.fixture(scope="module")
def meta_learners_run(tmp_path_factory):
    """The folder of one run of all meta-learners, with one layer in the transformer."""
    transformer = FILES["transformer.py"]  # another test traces both layers
    assert "layers=2" in transformer
    texts = MY_STUDY, transformer.replace("layers=2", "layers=1"), FILES["late.py"]
    return run(tmp_path_factory.mktemp("meta"), joined(*texts))


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """The folder of one run of the nearest neighbours, the second probe and the figure."""
    texts = (FILES[name] for name in ("nearest.py", "far.py", "endings.py"))
    return run(tmp_path_factory.mktemp("others"), joined(*texts))


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


def test_the_files_are_as_short_as_the_page_promises():
    assert set(FILES) == set(MOST)
    for name, text in FILES.items():
        assert len(lines(text)) <= MOST[name], (name, len(lines(text)))


def test_the_table_of_costs_is_of_these_files():
    costs = [int(n) for n in re.findall(r"\| (\d+), 1 \|", PAGE)]
    order = ("gru.py", "transformer.py", "sparse.py", "far.py", "late.py", "endings.py")
    assert costs == [len(lines(FILES[name])) for name in order]


@pytest.mark.parametrize("learner", ["gru", "transformer", "late"])
def test_meta_learners_are_trained_beside_the_studys_own(learner, meta_learners_run):
    folder = meta_learners_run
    for task_set in ("in_distribution", "x4", "tracked", "heldout"):
        data = metadyn.load(folder, task_set)
        assert {"lstm", learner, "bayes"} <= set(data["learner"].values)
    results = metadyn.RunFolder(folder).results()
    summary = metadyn.RunFolder(folder).summary()
    names = {row["name"] for row in summary["criteria"]}
    assert {f"{learner}_minus_bayes_slope", f"{learner}_excess_loss"} <= names
    assert {f"{learner}_out_of_distribution_{shift}" for shift in ("x2", "x8", "outsize")} <= names
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {f"{name}_{learner}" for name in ("inner_curves", "distance_to_bayes")} <= figures
    strengths = [results["in_distribution", name]["mode_strength"] for name in ("lstm", learner)]
    assert strengths[0].shape == strengths[1].shape
    assert not np.array_equal(*strengths)


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_planned_as_it_stands_rehearsed_and_traced(name, tmp_path):
    study = load(name, tmp_path)
    config = study.presets["quick"]
    plan = study.plan(config)
    if name in ("gru.py", "transformer.py", "late.py"):
        for tasks in ("in_distribution", "x4", "tracked", "heldout"):
            names = {c.name for _, t, c, _ in plan.measurements if t.name == tasks}
            assert {"lstm", name.removesuffix(".py"), "bayes"} <= names
    rehearse(study, config, plan)
    keys = jax.random.split(jax.random.key(0), 4)
    for meta, objective, *_ in plan.trained.values():
        jax.eval_shape(objective.loss, jax.eval_shape(meta.init, keys[0]), keys)


def test_the_readmes_learner_is_that_of_this_page():
    assert len(lines(MY_STUDY)) <= 12
    assert lines(MY_STUDY) == lines(FILES["gru.py"])


def test_the_nearest_neighbours_learn(other_run):
    strength = metadyn.load(other_run, "in_distribution")["mode_strength"]
    learned = strength.sel(learner="knn").isel(seed=0, step=slice(0, 5)).mean("task")
    assert np.all(learned.isel(step=0) == 0)
    assert np.all(learned.isel(step=4) != 0)


def test_a_second_probe_is_recorded_analysed_and_drawn_by_its_name(other_run):
    data = metadyn.load(other_run, "in_distribution")
    bayes = data.sel(learner="bayes").isel(seed=0)  # it is linear, so its far strength is the same
    strengths = (bayes[name].transpose("task", "step", ...) for name in ("far", "mode_strength"))
    far, near = (strength.to_numpy() for strength in strengths)
    np.testing.assert_allclose(far, near, atol=1e-4)
    assert "far_mode" in data["far"].dims
    pictures = {path.stem for path in (other_run / "figures").glob("*.png")}
    assert {"mode_strength_far", "learning_times_far"} <= pictures
    names = "inner_curves", "outer_learning", "distance_to_bayes"
    assert {f"{name}_far" for name in names} <= pictures
    assert (other_run / "figures" / "inner_curves_far.gif").stat().st_size > 0
    results = metadyn.RunFolder(other_run).results()
    probes = metadyn.figures.by_probe(metadyn.figures.histories(results))
    assert [*probes] == ["", "_far"]
    assert probes["_far"].label == f"{probes[''].label}, far"
    np.testing.assert_allclose(probes["_far"].strengths[1], probes[""].strengths[1], atol=1e-4)
    assert not np.allclose(probes["_far"].strengths[0], probes[""].strengths[0], atol=1e-2)
    curves = probes["_far"].trained, probes["_far"].bayes
    merits = metadyn.dynamics.outer_merit(*curves), metadyn.dynamics.outer_merit(*curves, "far")
    assert merits[0] != merits[1]
    slopes = metadyn.dynamics.slope(data, "far")
    assert np.isfinite(slopes.sel(learner="bayes")["value"])


def test_a_figure_is_drawn_by_the_run_and_again(other_run, tmp_path, capsys):
    picture = other_run / "figures" / "losses.png"
    picture.unlink()
    assert main(["figures", str(other_run)]) == 0  # no code of the folder is executed
    assert "does not come with metadyn" in capsys.readouterr().err
    assert not picture.exists()
    (tmp_path / "endings.py").write_text(FILES["endings.py"])
    assert main(["figures", str(other_run), "--study", str(tmp_path / "endings.py")]) == 0
    assert picture.exists()


def test_sparse_regression_runs_and_is_learned_by_sgd_and_bayes(tmp_path):
    folder = run(tmp_path, FILES["sparse.py"], SPARSE)
    assert (folder / "figures" / "inner_curves.png").exists()
    assert "lstm" in metadyn.load(folder, "tracked")["learner"]
    data = metadyn.load(folder, "in_distribution").sel(learner=["sgd", "bayes"])
    slope = metadyn.dynamics.slope(data)["value"]
    assert slope.sel(learner="sgd") < -0.3  # SGD learns the greater weight first
    assert slope.sel(learner="bayes") > slope.sel(learner="sgd") + 0.2  # Bayes too, but less
    loss = data["loss"].sel(learner="bayes", seed=0).mean("task").dropna("step")
    assert loss.isel(step=-1) < 0.1 * loss.isel(step=0)


def test_sparse_bayes_is_that_of_numerical_integration(tmp_path):
    """Of two inputs one matters. The posterior mean is computed on a grid, in float64."""
    load("sparse.py", tmp_path)
    module = sys.modules["metadyn_study_sparse"]
    domain = module.SparseRegression(n=2, active=1, sigma=0.5, steps=3)
    learner, rng = module.bayes(domain), np.random.default_rng(0)
    x, y = rng.normal(size=(3, 2)), rng.normal(size=3)
    state = learner.init(jax.random.key(0))
    w = np.linspace(-8, 8, 4001)
    log = np.array([-0.5 * w**2 for _ in range(2)])  # of each input, if it matters, by its weight
    for inputs, value in zip(x, y, strict=True):
        state = learner.update(state, jnp.float32(inputs), jnp.float32([value]))
        log -= 0.5 * ((value - inputs[:, None] * w) / domain.sigma) ** 2
    mass = np.exp(log - log.max())
    mean = (mass * w).sum(1) / mass.sum()
    query = np.array([0.7, -1.3])
    answer = learner.predict(state, jnp.float32(query))
    np.testing.assert_allclose(answer, [mean @ query], rtol=1e-4)
