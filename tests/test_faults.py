"""Runs damaged, out of disk space or badly asked for: the fast part of benchmarks/faults.py."""

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
    """From here on figures, which nobody looks at, are not drawn."""
    monkeypatch.setattr(figures, "draw", lambda *given: [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of the tiny study."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_nothing(monkeypatch)
        assert faults.ask(["run", faults.STUDY, "--out", out]) == (0, [])
    return out


def test_damage_is_skipped_named_and_made_anew_bit_for_bit(whole, tmp_path, monkeypatch):
    """In the newest checkpoint, in one before it, and in a measurement, at once."""
    out = tmp_path / "damaged"
    shutil.copytree(whole, out)
    newest, before = (RunFolder(out).steps()[i] for i in (-1, 2))
    victims = [
        out / "checkpoints" / str(newest) / "state" / "manifest.ocdbt",
        out / "checkpoints" / str(before) / "trajectories" / "manifest.ocdbt",
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
    faults.same(whole, out)


def test_damage_where_a_run_was_interrupted_is_got_over(whole, tmp_path, monkeypatch):
    """Such a checkpoint is on no schedule, so nothing makes it anew."""
    draw_nothing(monkeypatch)
    out = tmp_path / "interrupted"
    shutil.copytree(whole, out)
    step = RunFolder(out).steps()[2]
    stray = out / "checkpoints" / str(step + 1)
    shutil.copytree(out / "checkpoints" / str(step), stray)
    shutil.rmtree(stray / "trajectories")  # so that its checksums no longer hold
    (out / "summary.json").unlink()
    code, lines = faults.ask(["run", faults.STUDY, "--out", out])
    assert (code, len(lines)) == (0, 1), lines
    assert f"{stray} is damaged" in lines[0]
    assert stray.with_name(f"{step + 1}.damaged").is_dir()
    faults.same(whole, out)


def test_a_full_disk_is_one_line_and_the_checkpoints_before_it_are_gone_on_with(
    whole, tmp_path, monkeypatch
):
    draw_nothing(monkeypatch)
    out = tmp_path / "full"
    shutil.copytree(whole, out)
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
    faults.same(whole, out)


def test_a_loss_that_is_not_finite_leaves_the_checkpoints_before_it(tmp_path):
    wild = ("--outer.optimizer", "sgd", "--outer.learning-rate", "1e30", "--outer.clip", "1e30")
    code, lines = faults.ask(["run", faults.STUDY, "--out", tmp_path / "wild", *wild])
    assert (code, len(lines)) == (2, 1)
    assert "--outer.learning-rate 1e30: the loss of lstm is no longer finite" in lines[0]
    run = RunFolder(tmp_path / "wild")
    assert not run.damage()
    assert 0 in run.outer_steps()


def test_bad_inputs_are_one_line(whole, monkeypatch):
    draw_nothing(monkeypatch)
    faults.bad_inputs(whole.parent, 40, random.Random(1))


def test_reading_a_run_unpickles_and_executes_nothing(whole, tmp_path, monkeypatch):
    """Not even where a folder was made to be read, checksums and all."""
    touched = tmp_path / "touched"

    class Payload:
        def __reduce__(self):
            return (touched.touch, ())

    bomb, unpickled = pickle.dumps(Payload()), []
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *args, name=name: unpickled.append(name))
    faults.same(whole, whole)
    folder = tmp_path / "bomb" / "checkpoints" / "0"
    shutil.copytree(whole, tmp_path / "bomb")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        path.write_bytes(bomb)
        (folder / "SHA256SUMS").write_bytes(metadyn.store._sums(folder))
        with contextlib.suppress(Exception):  # whatever Orbax makes of it
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
