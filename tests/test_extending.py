"""The page on extending: every file on it works as it stands, and is as short as the page says.

As it stands each is planned and rehearsed, and what it trains is traced. Then two files, of all
that add to one study, are run: of the meta-learners, the README's among them, and of the others;
and the study of a domain of its own is.
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


def together(*texts):
    """Makes one file of several, of which each adds to the study of those before it."""
    first, *more = texts
    plain = 'metadyn.load_study("linear_regression")'
    assert all(plain in text for text in texts)
    return "\n\n".join([first, *(text.replace(plain, "study") for text in more)])


def loaded(name, folder):
    """Loads one of the page's files as it stands, and returns its study."""
    (folder / name).write_text(FILES[name])
    return metadyn.load_study(str(folder / name))


def ran(folder, text, options=SMALL):
    """Runs a file of that text, and returns the folder of the run."""
    (folder / "my_study.py").write_text(text)
    code = main(["run", str(folder / "my_study.py"), "--out", str(folder / "out"), *options])
    assert code == 1  # criteria are not met by so small a one
    return folder / "out"


@pytest.fixture(scope="module")
def of_meta_learners(tmp_path_factory):
    """The folder of one run of all meta-learners, of which the transformer has one layer."""
    transformer = FILES["transformer.py"]  # two layers are traced
    assert "layers=2" in transformer
    texts = MY_STUDY, transformer.replace("layers=2", "layers=1"), FILES["late.py"]
    return ran(tmp_path_factory.mktemp("meta"), together(*texts))


@pytest.fixture(scope="module")
def of_others(tmp_path_factory):
    """The folder of one run of the nearest neighbours, the second probe and the figure."""
    texts = (FILES[name] for name in ("nearest.py", "far.py", "endings.py"))
    return ran(tmp_path_factory.mktemp("others"), together(*texts))


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


def test_the_files_are_as_short_as_they_are_to_be():
    assert set(FILES) == set(MOST)
    for name, text in FILES.items():
        assert len(lines(text)) <= MOST[name], (name, len(lines(text)))


def test_the_table_of_costs_is_of_these_files():
    costs = [int(n) for n in re.findall(r"\| (\d+), 1 \|", PAGE)]
    order = ("gru.py", "transformer.py", "sparse.py", "far.py", "late.py", "endings.py")
    assert costs == [len(lines(FILES[name])) for name in order]


@pytest.mark.parametrize("learner", ["gru", "transformer", "late"])
def test_meta_learners_are_trained_beside_the_studys_own(learner, of_meta_learners):
    out = of_meta_learners
    for task_set in ("in_distribution", "x4", "tracked", "heldout"):
        data = metadyn.load(out, task_set)
        assert {"lstm", learner, "bayes"} <= set(data["learner"].values)
    results = metadyn.RunFolder(out).results()
    summary = metadyn.RunFolder(out).summary()
    names = {row["name"] for row in summary["criteria"]}
    assert {f"{learner}_minus_bayes_slope", f"{learner}_excess_loss"} <= names
    assert {f"{learner}_out_of_distribution_{shift}" for shift in ("x2", "x8", "outsize")} <= names
    drawn = {path.stem for path in (out / "figures").glob("*.png")}
    assert {f"{each}_{learner}" for each in ("inner_curves", "distance_to_bayes")} <= drawn
    both = [results["in_distribution", each]["mode_strength"] for each in ("lstm", learner)]
    assert both[0].shape == both[1].shape
    assert not np.array_equal(*both)


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_planned_as_it_stands_rehearsed_and_traced(name, tmp_path):
    study = loaded(name, tmp_path)
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


def test_the_readmes_own_learner_is_this_pages():
    assert len(lines(MY_STUDY)) <= 12
    assert lines(MY_STUDY) == lines(FILES["gru.py"])


def test_the_nearest_neighbours_learn(of_others):
    strength = metadyn.load(of_others, "in_distribution")["mode_strength"]
    learned = strength.sel(learner="knn").isel(seed=0, step=slice(0, 5)).mean("task")
    assert np.all(learned.isel(step=0) == 0)
    assert np.all(learned.isel(step=4) != 0)


def test_a_second_probe_is_recorded_analysed_and_drawn_by_its_name(of_others):
    data = metadyn.load(of_others, "in_distribution")
    bayes = data.sel(learner="bayes").isel(seed=0)  # it is linear: far out it answers the same
    both = (bayes[name].transpose("task", "step", ...) for name in ("far", "mode_strength"))
    far, near = (each.to_numpy() for each in both)
    np.testing.assert_allclose(far, near, atol=1e-4)
    assert "far_mode" in data["far"].dims
    drawn = {path.stem for path in (of_others / "figures").glob("*.png")}
    assert {"mode_strength_far", "learning_times_far"} <= drawn
    over = "inner_curves", "outer_learning", "distance_to_bayes"
    assert {f"{each}_far" for each in over} <= drawn
    assert (of_others / "figures" / "inner_curves_far.gif").stat().st_size > 0
    results = metadyn.RunFolder(of_others).results()
    found = metadyn.figures.by_probe(metadyn.figures.histories(results))
    assert [*found] == ["", "_far"]
    assert found["_far"].label == f"{found[''].label}, far"
    np.testing.assert_allclose(found["_far"].strengths[1], found[""].strengths[1], atol=1e-4)
    assert not np.allclose(found["_far"].strengths[0], found[""].strengths[0], atol=1e-2)
    axis = found["_far"].trained, found["_far"].bayes
    lstm = metadyn.dynamics.outer_merit(*axis), metadyn.dynamics.outer_merit(*axis, "far")
    assert lstm[0] != lstm[1]
    slopes = metadyn.dynamics.slope(data, "far")
    assert np.isfinite(slopes.sel(learner="bayes")["value"])


def test_a_figure_is_drawn_by_the_run_and_again(of_others, tmp_path, capsys):
    picture = of_others / "figures" / "losses.png"
    picture.unlink()
    assert main(["figures", str(of_others)]) == 0  # nothing of the folder is executed
    assert "does not come with metadyn" in capsys.readouterr().err
    assert not picture.exists()
    (tmp_path / "endings.py").write_text(FILES["endings.py"])
    assert main(["figures", str(of_others), "--study", str(tmp_path / "endings.py")]) == 0
    assert picture.exists()


def test_sparse_regression_runs_and_is_learned_by_sgd_and_bayes(tmp_path):
    out = ran(tmp_path, FILES["sparse.py"], SPARSE)
    assert (out / "figures" / "inner_curves.png").exists()
    assert "lstm" in metadyn.load(out, "tracked")["learner"]
    data = metadyn.load(out, "in_distribution").sel(learner=["sgd", "bayes"])
    slope = metadyn.dynamics.slope(data)["value"]
    assert slope.sel(learner="sgd") < -0.3  # the greater weight first
    assert slope.sel(learner="bayes") > slope.sel(learner="sgd") + 0.2  # to Bayes too, but less
    loss = data["loss"].sel(learner="bayes", seed=0).mean("task").dropna("step")
    assert loss.isel(step=-1) < 0.1 * loss.isel(step=0)


def test_sparse_bayes_is_that_of_numerical_integration(tmp_path):
    """Two inputs of which one matters: the posterior mean on a grid, in float64."""
    loaded("sparse.py", tmp_path)
    module = sys.modules["metadyn_study_sparse"]
    domain = module.SparseRegression(n=2, active=1, sigma=0.5, steps=3)
    learner, rng = module.bayes(domain), np.random.default_rng(0)
    x, y = rng.normal(size=(3, 2)), rng.normal(size=3)
    state = learner.init(jax.random.key(0))
    w = np.linspace(-8, 8, 4001)
    log = np.array([-0.5 * w**2 for _ in range(2)])  # for either input: over its weight
    for one, value in zip(x, y, strict=True):
        state = learner.update(state, jnp.float32(one), jnp.float32([value]))
        log -= 0.5 * ((value - one[:, None] * w) / domain.sigma) ** 2
    mass = np.exp(log - log.max())
    mean = (mass * w).sum(1) / mass.sum()
    query = np.array([0.7, -1.3])
    found = learner.predict(state, jnp.float32(query))
    np.testing.assert_allclose(found, [mean @ query], rtol=1e-4)
