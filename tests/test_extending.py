"""The page on extending: every file on it runs as it stands, and is as short as the page says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import SMALL

import metadyn
from metadyn.cli import main
from metadyn.runner import rehearse

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"`(\w+\.py)`.*?\n```python\n(.*?)```", PAGE, re.DOTALL))
SMALL = [*SMALL, "--outer.steps", "20"]
SPARSE = [
    *("--domain.steps", "4", "--lstm.hidden", "4", "--outer.steps", "20", "--outer.batch", "4"),
    *("--outer.seeds", "2", "--outer.warmup", "1", "--outer.checkpoints", "3"),
    *("--measure.tasks", "32", "--measure.updating-tasks", "4", "--measure.tracked-tasks", "4"),
    *("--measure.heldout-tasks", "16"),
]
MOST = {"gru.py": 12, "transformer.py": 45, "sparse.py": 110, "far.py": 15, "late.py": 15}
MOST |= {"nearest.py": 30, "endings.py": 15}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(name)`: the folder of a run of one of the page's files."""

    def one(name):
        folder = tmp_path_factory.mktemp("extending")
        (folder / name).write_text(FILES[name])
        small = SPARSE if name == "sparse.py" else SMALL
        code = main(["run", str(folder / name), "--out", str(folder / "out"), *small])
        assert code == 1  # criteria are not met by so small a one
        return folder / "out"

    return one


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


@pytest.mark.parametrize(
    ("name", "learner"),
    [("transformer.py", "transformer"), ("late.py", "late")],
)
def test_meta_learners_are_trained_beside_the_studys_own(name, learner, run):
    out = run(name)
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


def test_a_gru_is_planned_beside_the_studys_own_and_rehearsed(tmp_path):
    (tmp_path / "gru.py").write_text(FILES["gru.py"])
    study = metadyn.load_study(str(tmp_path / "gru.py"))
    config = study.presets["quick"]
    plan = study.plan(config)
    for tasks in ("in_distribution", "x4", "tracked", "heldout"):
        assert {"lstm", "gru", "bayes"} <= {c.name for _, t, c in plan.every if t.name == tasks}
    rehearse(study, config, plan)


def test_the_nearest_neighbours_learn(run):
    strength = metadyn.load(run("nearest.py"), "in_distribution")["mode_strength"]
    learned = strength.sel(learner="knn").isel(seed=0, step=slice(0, 5)).mean("task")
    assert np.all(learned.isel(step=0) == 0)
    assert np.all(learned.isel(step=4) != 0)


def test_a_second_probe_is_recorded_analysed_and_drawn_by_its_name(run):
    out = run("far.py")
    data = metadyn.load(out, "in_distribution")
    bayes = data.sel(learner="bayes").isel(seed=0)  # it is linear: far out it answers the same
    both = (bayes[name].transpose("task", "step", ...) for name in ("far", "mode_strength"))
    far, near = (each.to_numpy() for each in both)
    np.testing.assert_allclose(far, near, atol=1e-4)
    assert "far_mode" in data["far"].dims
    drawn = {path.stem for path in (out / "figures").glob("*.png")}
    assert {"mode_strength_far", "learning_times_far"} <= drawn
    slopes = metadyn.dynamics.slope(data, "far")
    assert np.isfinite(slopes.sel(learner="bayes")["value"])


def test_a_figure_is_drawn_by_the_run_and_again(run, capsys):
    out = run("endings.py")
    (out / "figures" / "losses.png").unlink()
    assert main(["figures", str(out)]) == 0  # nothing of the folder is executed
    assert "a study of your own" in capsys.readouterr().err
    assert not (out / "figures" / "losses.png").exists()
    study = out.parent / "endings.py"
    assert main(["figures", str(out), "--study", str(study)]) == 0
    assert (out / "figures" / "losses.png").exists()


def test_sparse_bayes_is_that_of_numerical_integration(run):
    """Two inputs of which one matters: the posterior mean on a grid, in float64."""
    run("sparse.py")
    import sys

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
