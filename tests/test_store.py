"""The run folder: what is read is what was written, and foreign files are not touched."""

import json
import os
import stat
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xarray as xr

import metadyn
from metadyn import dynamics, figures
from metadyn.errors import ConfigError, ConfigWarning
from metadyn.store import SUMS, NotMeasured, RunFolder
from metadyn.study import HELDOUT, TRACKED
from metadyn.trajectories import About, Modes, dataset, describe

IDENTITY = {"study": "s", "preset": "quick", "seed": 0, "config": {"outer": {"steps": 4}, "a": 1}}
RNG = np.random.default_rng(0)
MODES = {"mode_strength": Modes((2.0, 0.5), "singular value", "singular_value")}


def readings(*lead, time=3, learner="lstm", trained=False):
    """Returns arrays [*lead, time, mode] and their description."""
    axes = (*(("seed",) if trained else ()), "task", "step")
    arrays = {
        "mode_strength": RNG.normal(size=(*lead, time, 2)).astype(np.float32),
        "loss": RNG.normal(size=(*lead, time)).astype(np.float32),
    }
    kind = {"lstm": "meta", "bayes": "bayes"}.get(learner, "ordinary")
    about = describe(
        About(learner, learner.upper(), kind, "observations", 0.5),
        {"mode_strength": (*axes, "mode"), "loss": axes},
        {"time": ("step", range(time)), "singular_value": ("mode", [2.0, 0.5])},
        MODES,
    )
    return arrays, about


def tracked_readings():
    """Returns a meta-learner's readings on both sets as in checkpoints, {set: {learner: …}}."""
    by_set = {name: readings(2, 5, trained=True) for name in (TRACKED, HELDOUT)}
    return tuple({name: {"lstm": pair[i]} for name, pair in by_set.items()} for i in (0, 1))


def write_run(path):
    """Writes 3 checkpoints with trajectories, one without, Bayes on both sets, SGD on another."""
    run = RunFolder.create(path, IDENTITY)
    written = {}
    for step in (0, 1, 4):
        written[step], abouts = tracked_readings()
        run.save_checkpoint(step, {"w": np.float32(step)}, written[step], abouts)
    run.save_checkpoint(5, {"w": np.float32(5)}, None, abouts)
    for task_set in (TRACKED, HELDOUT):
        run.save_measurement(task_set, "bayes", *readings(5, learner="bayes"))
    run.save_measurement("in_distribution", "lstm", *readings(2, 7, trained=True))
    run.save_measurement("in_distribution", "sgd", *readings(4, time=6, learner="sgd"))
    run.finish()
    return run, written


@pytest.fixture(scope="module")
def written_run(tmp_path_factory):
    """Returns such a run and what was written."""
    return write_run(tmp_path_factory.mktemp("run") / "r")


def test_a_measurement_comes_back_labelled(tmp_path):
    run = RunFolder.create(tmp_path / "r", IDENTITY)
    arrays, about = readings(5)
    assert not run.has_measurement("in_distribution", "lstm")
    run.save_measurement("in_distribution", "lstm", arrays, about)
    run.finish()
    data = run.measurement("in_distribution", "lstm")
    xr.testing.assert_identical(data, dataset(arrays, about))
    assert data["mode_strength"].dims == ("task", "step", "mode")
    assert run.measurements() == {"in_distribution": ["lstm"]}
    assert dynamics.samples(data, "loss").shape == (1, 5, 3)


def test_trajectories_of_all_outer_steps_come_back_in_order(written_run):
    run, written = written_run
    assert run.outer_steps() == [0, 1, 4]
    assert run.steps() == [0, 1, 4, 5]
    learners = {task_set: [*abouts] for task_set, abouts in run.about(4).items()}
    assert learners == {TRACKED: ["lstm"], HELDOUT: ["lstm"]}
    data = run.trajectories(TRACKED, "lstm")
    assert dict(data["mode_strength"].sizes) == {
        "outer_step": 3, "seed": 2, "task": 5, "step": 3, "mode": 2
    }  # fmt: skip
    for step, by_set in written.items():
        np.testing.assert_array_equal(
            data["mode_strength"].sel(outer_step=step), by_set[TRACKED]["lstm"]["mode_strength"]
        )
    two_steps = run.trajectories(TRACKED, "lstm", [1, 4])
    xr.testing.assert_identical(two_steps, data.sel(outer_step=[1, 4]))


def test_results_of_a_run_that_goes_on_are_of_one_moment(tmp_path):
    run, _ = write_run(tmp_path / "r")
    results = RunFolder(tmp_path / "r").results()
    arrays, abouts = tracked_readings()
    before = results[TRACKED, "lstm"]
    run.save_checkpoint(6, {"w": np.float32(6)}, arrays, abouts)
    run.forget(5)
    assert run.steps() == [0, 1, 4, 6]
    after = results[HELDOUT, "lstm"]
    assert before["outer_step"].values.tolist() == after["outer_step"].values.tolist() == [0, 1, 4]
    assert RunFolder(tmp_path / "r").results()[HELDOUT, "lstm"].sizes["outer_step"] == 4


def test_a_state_that_is_removed_while_a_run_is_read_is_no_error(written_run, monkeypatch):
    run = RunFolder(written_run[0].path)
    steps = run.steps()
    monkeypatch.setattr(run, "steps", lambda: [*steps, 7])  # step 7 is listed, but removed
    assert run.outer_steps() == [0, 1, 4]


WRITE = """
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from metadyn import mesh
from metadyn.trajectories import About, Modes, describe
from metadyn.store import RunFolder

run = RunFolder.create(sys.argv[1], {"study": "s", "preset": "quick", "seed": 0, "config": {}})
spread = NamedSharding(mesh.mesh(), PartitionSpec(mesh.TASKS))
values = jax.device_put(np.arange(8, dtype=np.float32).reshape(8, 1, 1), spread)
assert len(values.sharding.device_set) == 4
about = describe(
    About("bayes", "Bayes", "bayes", "observations", 0.5),
    {"mode_strength": ("task", "step", "mode")},
    {"time": ("step", [0])},
    {"mode_strength": Modes((1.0,), "mode")},
)
run.save_measurement("in_distribution", "bayes", {"mode_strength": values}, about)
run.finish()
"""
READ = """
import json, sys, jax, metadyn
data = metadyn.load(sys.argv[1], "in_distribution")
print(json.dumps([jax.device_count(), data["mode_strength"].fillna(0).values.tolist()]))
"""


def test_a_run_is_read_on_other_devices_than_wrote_it(tmp_path):
    """Four devices write it, and a process that has one device reads it."""
    for code, devices in ((WRITE, 4), (READ, 1)):
        process = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "r"],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        )
    assert json.loads(process.stdout) == [1, np.arange(8.0).reshape(1, 8, 1, 1).tolist()]


def test_load_gives_one_labelled_dataset(written_run):
    run, written = written_run
    data = metadyn.load(run.path)
    assert data["mode_strength"].dims == ("learner", "outer_step", "seed", "task", "mode", "step")
    assert set(data["learner"].values) == {"lstm", "bayes"}
    np.testing.assert_array_equal(data["outer_step"], [0, 1, 4])
    np.testing.assert_array_equal(data["singular_value"], [2.0, 0.5])
    lstm = data["mode_strength"].sel(learner="lstm", outer_step=4)
    np.testing.assert_array_equal(
        lstm.transpose("seed", "task", "step", "mode"), written[4][TRACKED]["lstm"]["mode_strength"]
    )
    bayes = data["mode_strength"].sel(learner="bayes")
    expected = run.measurement(TRACKED, "bayes")["mode_strength"].transpose("task", "mode", "step")
    np.testing.assert_array_equal(bayes.sel(outer_step=1, seed=1), expected)
    assert metadyn.load(run.path, HELDOUT)["loss"].sizes["outer_step"] == 3


def test_load_pads_learners_of_other_lengths(written_run):
    run, _ = written_run
    data = metadyn.load(run.path, "in_distribution")
    assert dict(data["mode_strength"].sizes) == {
        "learner": 2, "seed": 2, "task": 7, "mode": 2, "step": 6
    }  # fmt: skip
    sgd, lstm = (data["mode_strength"].sel(learner=name) for name in ("sgd", "lstm"))
    assert np.isnan(sgd.isel(task=slice(4, None))).all()
    assert not np.isnan(sgd.isel(task=slice(0, 4))).any()
    assert np.isnan(lstm.isel(step=slice(3, None))).all()
    assert not np.isnan(lstm.isel(step=slice(0, 3))).any()
    np.testing.assert_array_equal(data["time"].sel(learner="sgd"), range(6))
    with pytest.raises(ConfigError, match="holds heldout, in_distribution, tracked"):
        metadyn.load(run.path, "nonsense")
    with pytest.raises(ConfigError, match="path = None: must be the path of a folder"):
        metadyn.load.__wrapped__(None)


def test_a_run_without_trajectories_says_so(tmp_path):
    run = RunFolder.create(tmp_path / "r", IDENTITY)
    with pytest.raises(ConfigError, match="no mode trajectories are stored yet"):
        run.trajectories(TRACKED, "lstm")
    with pytest.raises(ConfigError, match=r"task_set = 'tracked': .* holds nothing yet"):
        metadyn.load(run.path)


def test_nothing_stored_is_a_pickle(written_run):
    run, _ = written_run
    for path in run.path.rglob("*"):
        if path.is_file():
            assert path.suffix not in {".pkl", ".pickle", ".npy"}
            assert not path.read_bytes().startswith(b"\x80\x04")


def test_files_that_a_file_manager_leaves_are_no_damage(tmp_path):
    run, _ = write_run(tmp_path / "r")
    for folder in (run._checkpoint(4), run._measurement("in_distribution", "sgd").parent):
        (folder / ".DS_Store").write_text("a view")
        (folder / "._state").write_text("a fork")
    reopened = RunFolder(run.path)
    assert not reopened.damage()
    assert reopened.measurements()["in_distribution"] == ["lstm", "sgd"]


def damages(path):
    """Yields the name of each way to damage a file, and a function that does so."""
    content = path.read_bytes()

    def flip(i):
        path.write_bytes(content[:i] + bytes([content[i] ^ 0x2A]) + content[i + 1 :])

    yield "missing", path.unlink
    if content:
        yield "truncated", lambda: path.write_bytes(content[:-1])
        for i in {0, len(content) // 2, len(content) - 1}:
            yield f"byte {i}", lambda i=i: flip(i)


def test_any_damage_to_stored_files_is_found_named_and_never_read(written_run):
    run, _ = written_run
    checkpoint, measurement = run._checkpoint(4), run._measurement("in_distribution", "sgd")
    count = 0
    for folder in (checkpoint, measurement):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            content = path.read_bytes()
            for kind, damage in damages(path):
                damage()
                ((damaged, message),) = RunFolder(run.path).damage().items()
                assert damaged == folder, (path, kind)
                assert f"{folder} is damaged" in message
                task_set = TRACKED if folder == checkpoint else "in_distribution"
                with pytest.raises(ConfigError, match=f"{folder} is damaged"):
                    metadyn.load(run.path, task_set)
                path.write_bytes(content)
                count += 1
    assert count > 100
    assert not RunFolder(run.path).damage()


def test_a_damaged_checkpoint_is_made_again_and_nothing_is_deleted(tmp_path):
    run, written = write_run(tmp_path / "r")
    folder = run._checkpoint(4)
    for aside in ("4.damaged", "4.damaged-2"):
        (folder / SUMS).write_text("nonsense")
        reopened = RunFolder(run.path)
        reopened.write_summary({"criteria": []})
        with pytest.warns(ConfigWarning, match="does not match its sum in SHA256SUMS"):
            reopened.set_aside_damaged()
        assert reopened.steps() == [0, 1, 5]
        assert reopened.summary() is None  # even if killed now, the run does not count as done
        about = tracked_readings()[1]
        reopened.save_checkpoint(4, {"w": np.float32(4)}, written[4], about)
        reopened.finish()
        assert reopened.steps() == [0, 1, 4, 5]
        reopened.write_summary({"criteria": []})
        reopened.set_aside_damaged()
        assert reopened.summary() is not None
        assert (folder.with_name(aside) / SUMS).read_text() == "nonsense"
    assert RunFolder(run.path).outer_steps() == [0, 1, 4]


def test_a_set_that_is_not_tracked_is_named(tmp_path):
    run, _ = write_run(tmp_path / "r")
    for absent in (lambda run: run.state(7), lambda run: run.measurement("nowhere", "sgd")):
        with pytest.raises(NotMeasured, match="is not stored"):
            absent(run)
    with pytest.raises(ConfigError, match=r"learner = 'bayes': .* tracks "):
        run.trajectories(TRACKED, "bayes")
    with pytest.raises(ConfigError, match=r"task_set = 'trakced': .* tracks .*tracked"):
        run.trajectories("trakced", "lstm")
    with pytest.raises(ConfigError, match="tracks"):
        run.trajectories(TRACKED, "gru")
    with pytest.raises(ConfigError, match="task_set = 'trakced'"):
        metadyn.load(run.path, "trakced")


def test_a_checkpoint_keeps_the_saved_state_although_its_memory_is_reused(tmp_path):
    run = RunFolder.create(tmp_path / "r", IDENTITY)
    state = {"w": jax.device_put(np.arange(4.0, dtype=np.float32))}
    forward = jax.jit(lambda state: jax.tree.map(lambda w: w + 1, state), donate_argnums=0)
    for step in range(5):
        run.save_checkpoint(step, state, None, {})
        state = forward(state)  # this may use the memory of the state
    run.finish()
    for step in range(5):
        np.testing.assert_array_equal(run.state(step)["w"], np.arange(4) + step)


def test_a_failed_write_is_reported_at_the_next_save_or_at_the_end(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "r", IDENTITY)

    def full(*args, **kwargs):
        raise ValueError("Error writing [os_error_code='28']")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    for next_step in (lambda: run.save_checkpoint(1, {"w": np.ones(2)}, None, {}), run.finish):
        run.save_checkpoint(0, {"w": np.zeros(2)}, None, {})
        with pytest.raises(OSError, match="No space left"):
            next_step()
        run.finish()  # the error is raised only once
    assert run.steps() == []


def test_leaving_a_run_waits_for_what_is_being_written(tmp_path, monkeypatch):
    run, write = RunFolder.create(tmp_path / "r", IDENTITY), ocp.Checkpointer.save

    def slow(*args, **kwargs):
        time.sleep(0.5)
        write(*args, **kwargs)

    monkeypatch.setattr(ocp.Checkpointer, "save", slow)
    with run.locked():
        run.save_checkpoint(0, {"w": np.zeros(2)}, None, {})
        assert run.steps() == []  # otherwise the test would show nothing
    assert RunFolder(run.path).steps() == [0]
    assert not RunFolder(run.path).damage()


def test_unfinished_folders_of_a_killed_run_are_removed(tmp_path):
    run, _ = write_run(tmp_path / "r")
    for part in ("checkpoints/6.part.orbax-checkpoint-tmp", "measurements/x4/lstm.part"):
        (run.path / part).mkdir(parents=True)
        (run.path / part / "zarr").write_text("half")
    assert run.outer_steps() == [0, 1, 4]
    assert "x4" not in run.measurements()
    with run.locked():
        assert not list(run.path.rglob("*.part*"))


def test_the_same_configuration_resumes_and_another_is_refused_by_name(tmp_path):
    RunFolder.create(tmp_path / "r", IDENTITY)
    RunFolder.create(tmp_path / "r", IDENTITY)
    longer = IDENTITY | {"config": {"outer": {"steps": 9}, "a": 1}}
    with pytest.raises(ConfigError, match=r"outer\.steps = 4, not 9"):
        RunFolder.create(tmp_path / "r", longer)
    with pytest.raises(ConfigError, match="seed = 0, not 1"):
        RunFolder.create(tmp_path / "r", IDENTITY | {"seed": 1})
    stored = json.loads((tmp_path / "r" / "config.json").read_text())
    assert stored == IDENTITY | {"format": RunFolder.format}


def test_a_run_that_another_process_begins_meanwhile_is_opened(tmp_path, monkeypatch):
    RunFolder.create(tmp_path, IDENTITY)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    paths, exists = [], os.path.exists

    def not_yet(path):
        paths.append(path)
        return len(paths) > 1 and exists(path)

    monkeypatch.setattr(os.path, "exists", not_yet)
    assert RunFolder.create(tmp_path, IDENTITY).config["seed"] == 0
    assert paths


def test_foreign_and_broken_folders_are_refused_untouched(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        RunFolder.create(foreign, IDENTITY)
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder.create(foreign / "thesis.tex", IDENTITY)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder.create("/proc/nowhere", IDENTITY)
    for text in ("", "[]", "{", "{}", "[" * 100_000, '{"study": 1}', "\x00"):
        (foreign / "config.json").write_text(text)
        with pytest.raises(ConfigError) as caught:
            RunFolder(foreign)
        assert "\n" not in str(caught.value)
        with pytest.raises(ConfigError):
            RunFolder.create(foreign, IDENTITY)
        assert (foreign / "config.json").read_text() == text


def test_a_url_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--out gs://bucket/x is a URL, not a folder"):
        RunFolder.create("gs://bucket/x", IDENTITY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a[1]", "[p]/run", "what?", "a*"])
def test_a_folder_whose_files_orbax_would_not_find_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=r"--out .* cannot have any of \[ \] \* \? in it"):
        RunFolder.create(tmp_path / name, IDENTITY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            RunFolder.create(tmp_path / "r", IDENTITY)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


LACKS_VALUE = '{"reported": [{"name": "a", "expected": "b", "low": 1, "high": 1}]}'


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"criteria": 3}',
        '{"criteria": [{"name": 1}]}',
        '{"reported": [[]]}',
        LACKS_VALUE,
    ],
)
def test_a_damaged_summary_is_named(text, tmp_path):
    run = RunFolder.create(tmp_path / "r", IDENTITY)
    assert run.summary() is None
    (run.path / "summary.json").write_text(text)
    with pytest.raises(ConfigError, match=r"summary\.json"):
        run.summary()


def test_a_folder_in_use_is_refused(tmp_path):
    run = RunFolder.create(tmp_path / "r", IDENTITY)
    with run.locked(), pytest.raises(ConfigError, match="in use"), RunFolder(run.path).locked():
        pass
    with run.locked():
        pass


@pytest.mark.timeout(120)
def test_several_runs_of_one_process_save_at_the_same_time(tmp_path):
    """A sweep does so. Two saves at once could wait for ever, as Orbax's waits share names."""
    runs = [RunFolder.create(tmp_path / str(i), IDENTITY) for i in range(4)]
    for k in range(6):
        for run in runs:
            run.save_measurement(f"set_{k}", "lstm", *readings(2, 5, trained=True))
    for run in runs:
        run.finish()
        assert len(run.measurements()) == 6


def test_a_run_that_was_killed_before_it_began_does_not_block_its_folder(tmp_path):
    for name in (".lock", "config.json.part"):
        (tmp_path / name).write_text("{")
    config = {"study": "s", "preset": "p", "seed": 0, "config": {}, "plan": []}
    assert RunFolder.create(tmp_path, config).config["study"] == "s"


def test_a_figure_without_measurements_raises_not_measured():
    """For this error `metadyn figures` leaves it out, as in a run that was stopped in training."""
    for figure in (figures.mode_strength, figures.learning_times):
        with pytest.raises(NotMeasured):
            figure({})
