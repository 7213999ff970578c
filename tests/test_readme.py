"""The code of the README, run as it stands there."""

import dataclasses
import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import metadyn
from metadyn.errors import ConfigError

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_is_one_page_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 7 * 1024
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert len(links) > 20
    assert not missing


def test_ten_lines_from_import_to_picture(tmp_path, monkeypatch, capsys):
    (code,) = (block for block in BLOCKS if "metadyn.train(" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 11
    monkeypatch.chdir(tmp_path)
    for size, smaller in (
        ("hidden=64", "hidden=8"),
        ("steps=3000", "steps=30"),
        ("seeds=4", "seeds=2"),
    ):
        assert size in code
        code = code.replace(size, smaller)
    scope = {}
    began = time.monotonic()
    exec(code, scope)
    assert time.monotonic() - began < 120
    assert matplotlib.image.imread("mode_strength.png").std() > 0.02
    assert "lstm" in capsys.readouterr().out
    data = scope["data"]
    assert set(data["mode_strength"].dims) == {"learner", "seed", "task", "mode", "step"}
    assert data["learner"].values.tolist() == ["lstm", "bayes"]
    slope = metadyn.dynamics.slope(data).sel(learner="bayes")
    assert slope["low"] < slope["value"] < slope["high"]
    assert abs(slope["value"]) < 0.15  # Bayes learns all modes at one rate


def test_bad_calls_are_named_and_tasks_do_not_depend_on_the_learners(tmp_path):
    from metadyn.domains.linear import LinearRegression
    from metadyn.learners.bayes import bayes_linear, ridge
    from metadyn.learners.lstm import LSTMConfig

    domain = LinearRegression(2, 2, steps=4)
    learners = {"bayes": bayes_linear(domain), "ridge": ridge(2, 2, 1.0)}
    meta = LSTMConfig(hidden=4)
    with pytest.raises(ConfigError, match=r"meta = .*: give a meta-learner, such as"):
        metadyn.train.__wrapped__(meta, domain)
    for bad, message in (
        ({"steps": "3"}, "steps = '3': must be a whole number"),
        ({"seed": 1.5}, r"seed = 1\.5: must be a whole number"),
        ({"learningrate": 1}, "learningrate = 1: is no field of .* mean 'learning_rate'"),
    ):
        with pytest.raises(ConfigError, match=message):
            metadyn.train.__wrapped__(meta.make(domain), domain, **bad)
    with pytest.raises(ConfigError, match="give an object, such as LinearRegression"):
        metadyn.train.__wrapped__(meta.make(domain), LinearRegression)
    with pytest.raises(ConfigError, match="objective of a meta-learner on this domain cannot be"):
        metadyn.train(meta.make(LinearRegression(3, 3)), domain)
    with pytest.raises(ConfigError, match=r"data = \{\}: holds no learner"):
        metadyn.dynamics.slope({})
    with pytest.raises(ConfigError, match="tasks = '9': must be a whole number"):
        metadyn.measure.__wrapped__(domain, learners, tasks="9")
    for name, n in {"updating_tasks": 0, "chunk": 2.5, "points": 2.5, "updates": 0}.items():
        with pytest.raises(ConfigError, match=f"{name} = {n}: must be a whole number"):
            metadyn.measure.__wrapped__(domain, learners, tasks=9, **{name: n})
    for bad in (meta.make(domain), learners["ridge"].init):
        with pytest.raises(ConfigError, match="learners = 'one': must be a `Learner`, or"):
            metadyn.measure.__wrapped__(domain, {"one": bad})
    with pytest.raises(ConfigError, match="seed = 'x': must be a whole number from 0"):
        metadyn.measure.__wrapped__(domain, learners, seed="x")
    with pytest.raises(ConfigError, match="give an object, such as LinearRegression"):
        metadyn.measure.__wrapped__(LinearRegression, learners)
    unfrozen = type("Loose", (type(domain),), {"__hash__": None})  # as if not frozen
    with pytest.raises(ConfigError, match="must be hashable: freeze its dataclass"):
        metadyn.api._check_domain.__wrapped__(unfrozen(2, 2))
    noisier = dataclasses.replace(domain, sigma=0.9)
    with pytest.raises(ConfigError, match=r"domain = .*: must be the domain of `tasks`"):
        metadyn.measure.__wrapped__(domain, learners, tasks=noisier.evaluation(8))
    stacked = jax.vmap(meta.make(domain).init)(jax.random.split(jax.random.key(0), 2))
    for params in (
        {},
        jax.tree.map(lambda leaf: leaf[0], stacked),
        jax.tree.map(lambda leaf: leaf[..., :1], stacked),
    ):
        trained = metadyn.Trained(meta.make(domain), params, {})
        with pytest.raises(ConfigError, match="learners = 'lstm': its parameters must be those"):
            metadyn.measure.__wrapped__(domain, learners | {"lstm": trained})
    large = metadyn.Trained(meta.make(domain), {"weights": np.arange(1000.0)}, {})
    with pytest.raises(ConfigError, match=r"learners = .*: must map at least one name") as error:
        metadyn.measure.__wrapped__(domain, large)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 300
    ridged = learners["ridge"]
    for broken, message in (
        (ridged._replace(update=lambda state, x, y: jnp.int32(0)), "cannot be run on .*of init's"),
        (
            ridged._replace(predict=lambda state, x: float(x[0])),
            "cannot be run on .*float",
        ),
    ):
        with pytest.raises(ConfigError, match=f"contender 'mine' {message}"):
            metadyn.measure(domain, {"bayes": learners["bayes"], "mine": broken}, tasks=8)
    for bad in (3, lambda domain, meta: None):
        with pytest.raises(ConfigError, match=r"objective = .*: give a function of a domain and"):
            metadyn.train.__wrapped__(meta.make(domain), domain, objective=bad)
    with pytest.raises(ConfigError, match=r"learners = \{\}: must map at least one name"):
        metadyn.measure(domain, {})
    with pytest.raises(ConfigError, match="must be 1 or more"):
        metadyn.measure(domain, learners, tasks=domain.evaluation(8))  # which leaves out their size
    together = metadyn.measure(domain, learners, tasks=8)
    alone = metadyn.measure(domain, {"bayes": learners["bayes"]}, tasks=8)
    np.testing.assert_array_equal(
        together["mode_strength"].sel(learner="bayes"), alone["mode_strength"].sel(learner="bayes")
    )


NUMBER = r"[−-]?\d+(?:\.\d+)?"


def committed_estimates():
    """Yields value, low and high of each row of the committed results, and its negative."""
    for path in (ROOT / "experiments" / "results").glob("*.json"):
        summary = json.loads(path.read_text())
        for row in summary["criteria"] + summary["reported"]:
            if None not in (estimate := (row["value"], row["low"], row["high"])):
                yield estimate
                yield tuple(-estimate[i] for i in (0, 2, 1))


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_intervals_on_the_front_pages_are_among_the_committed_results(page):
    estimates = np.array(list(committed_estimates()))
    intervals = re.findall(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]", (ROOT / page).read_text())
    assert len(intervals) >= 8
    for texts in intervals:
        values = np.array([float(text.replace("−", "-")) for text in texts])
        places = [len(text.partition(".")[2]) for text in texts]
        rounding = 0.51 * 10.0 ** -np.array(places)
        assert (abs(estimates - values) <= rounding).all(1).any(), (page, texts)
