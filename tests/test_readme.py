"""The README's own learner, run as it stands there."""

import re
from pathlib import Path

import numpy as np
from test_cli import SMALL

import metadyn
from metadyn.cli import main

ROOT = Path(__file__).parent.parent


def test_the_readmes_own_learner_gets_the_same_figures(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "nearest_neighbours" in block)
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    monkeypatch.chdir(ROOT)
    (tmp_path / "my_study.py").write_text(code)
    out = tmp_path / "out"
    small = [*SMALL, "--outer.steps", "20"]
    assert main(["run", str(tmp_path / "my_study.py"), "--out", str(out), *small]) == 1
    strength = metadyn.load(out, "in_distribution")["mode_strength"].sel(learner="knn")
    learned = strength.isel(seed=0, step=slice(0, 5)).mean("task")
    assert np.all(learned.isel(step=0) == 0)
    assert np.all(learned.isel(step=4) != 0)
    assert (out / "figures" / "mode_strength.png").exists()
