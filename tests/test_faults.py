"""Damaged runs, full disks and bad input: the fast part of benchmarks/faults.py."""

import contextlib
import pickle
import random
import resource
import shutil

import pytest

import metadyn
from benchmarks import faults
from metadyn import figures
from metadyn.store import RunFolder


def draw_nothing(monkeypatch):
    """Stops figures from being drawn, as no test looks at them."""
    monkeypatch.setattr(figures, "draw", lambda *arguments: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of the tiny study."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_nothing(monkeypatch)
        assert faults.ask(["run", faults.STUDY, "--out", out]) == (0, [])
    return out


def test_damage_is_skipped_named_and_made_anew_bit_for_bit(finished, tmp_path, monkeypatch):
    """The newest checkpoint, an earlier one and a measurement are damaged at once."""
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    newest, earlier = (RunFolder(out).steps()[i] for i in (-1, 2))
    victims = [
        out / "checkpoints" / str(newest) / "state" / "manifest.ocdbt",
        out / "checkpoints" / str(earlier) / "trajectories" / "manifest.ocdbt",
        out / "measurements" / "in_distribution" / "bayes" / "about" / "metadata",
    ]
    content = victims[0].read_bytes()
    victims[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    victims[1].unlink()
    victims[2].write_bytes(victims[2].read_bytes()[:20])
    for command in ("figures", "report"):
        code, lines = faults.ask([command, out])
        assert (code, len(lines)) == ((2, 1) if command == "figures" else (0, 0)), lines
    draw_nothing(monkeypatch)
    code, lines = faults.ask(["run", faults.STUDY, "--out", out])
    assert code == 0
    assert sum("is damaged" in line for line in lines) == len(lines) == 3, lines
    assert len(list(out.rglob("*.damaged"))) == 3
    faults.same(finished, out)


def test_a_damaged_checkpoint_of_an_interruption_stops_no_run(finished, tmp_path, monkeypatch):
    """Such a checkpoint is not scheduled, so nothing makes it anew."""
    draw_nothing(monkeypatch)
    out = tmp_path / "interrupted"
    shutil.copytree(finished, out)
    step = RunFolder(out).steps()[2]
    stray = out / "checkpoints" / str(step + 1)
    shutil.copytree(out / "checkpoints" / str(step), stray)
    shutil.rmtree(stray / "trajectories")  # so that its checksums no longer hold
    (out / "summary.json").unlink()
    code, lines = faults.ask(["run", faults.STUDY, "--out", out])
    assert (code, len(lines)) == (0, 1), lines
    assert f"{stray} is damaged" in lines[0]
    assert stray.with_name(f"{step + 1}.damaged").is_dir()
    faults.same(finished, out)


def test_a_full_disk_is_one_line_and_the_run_can_go_on_from_earlier_checkpoints(
    finished, tmp_path, monkeypatch
):
    draw_nothing(monkeypatch)
    out = tmp_path / "full"
    shutil.copytree(finished, out)
    for step in RunFolder(out).steps()[3:]:
        shutil.rmtree(out / "checkpoints" / str(step))
    (out / "summary.json").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        code, lines = faults.ask(["run", faults.STUDY, "--out", out])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert len(lines) == 1
    assert "cannot be written (File too large)" in lines[0]
    assert not RunFolder(out).damage()
    assert faults.ask(["run", faults.STUDY, "--out", out]) == (0, [])
    faults.same(finished, out)


def test_a_loss_that_is_not_finite_leaves_earlier_checkpoints(tmp_path):
    wild = ("--outer.optimizer", "sgd", "--outer.learning-rate", "1e30", "--outer.clip", "1e30")
    code, lines = faults.ask(["run", faults.STUDY, "--out", tmp_path / "wild", *wild])
    assert (code, len(lines)) == (2, 1)
    assert "--outer.learning-rate 1e30: the loss of lstm is no longer finite" in lines[0]
    run = RunFolder(tmp_path / "wild")
    assert not run.damage()
    assert 0 in run.outer_steps()


def test_bad_inputs_are_one_line(finished, monkeypatch):
    draw_nothing(monkeypatch)
    faults.bad_inputs(finished.parent, 40, random.Random(1))


def test_reading_a_run_unpickles_and_executes_nothing(finished, tmp_path, monkeypatch):
    """This holds even for a folder made by an attacker, with matching checksums."""
    touched = tmp_path / "touched"

    class Payload:
        def __reduce__(self):
            return (touched.touch, ())

    bomb, unpickled = pickle.dumps(Payload()), []
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *args, name=name: unpickled.append(name))
    faults.same(finished, finished)
    folder = tmp_path / "bomb" / "checkpoints" / "0"
    shutil.copytree(finished, tmp_path / "bomb")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        path.write_bytes(bomb)
        (folder / "SHA256SUMS").write_bytes(metadyn.store._sums(folder))
        with contextlib.suppress(Exception):  # Orbax may refuse the file
            metadyn.load(tmp_path / "bomb")
        assert not touched.exists()
        path.write_bytes(content)
    assert not unpickled


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", faults.FAULTS)
def test_nothing_is_lost(name, tmp_path):
    fault, count = faults.FAULTS[name]
    fault(tmp_path, count, random.Random(2))
