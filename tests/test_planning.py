"""What a plan says of a run, against the run itself, and what it refuses."""

import dataclasses
import json
from collections import namedtuple
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import patch

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

import metadyn
from benchmarks import compile as compiling
from benchmarks import tiny_study
from metadyn import absent_devices, inner, measuring, mesh, outer, planning, program_cost
from metadyn.cli import main
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.kernels.lstm import Backend
from metadyn.learners.bayes import bayes_linear
from metadyn.outer import OuterLoop
from metadyn.study import load_study
from metadyn.sweep_programs import ProgramCache
from metadyn.sweep_training import OuterLoops

STUDY = str(Path(tiny_study.__file__))
SHORT = ["--outer.steps", "40"]


@pytest.fixture(scope="module")
def plan():
    return planned()


def test_a_plan_says_what_a_run_needs_and_runs_nothing(tmp_path, capsys):
    assert main(["run", STUDY, "--plan", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for part in ("outer step of lstm", "bayes on tracked", "FLOPs in all", "on disk", "training"):
        assert part in said


def test_programs_are_those_that_a_run_compiles(plan, tmp_path):
    inner.measure.clear_cache()
    assert main(["run", STUDY, "--out", str(tmp_path / "out"), *SHORT]) == 0
    programs = planning.programs(*plan)
    measured = [each for each in programs if " on " in each.name]
    assert inner.measure._cache_size() == len(measured)
    assert {each.name for each in programs} - {each.name for each in measured} == {
        "outer step of lstm",
        "initial state",
    }
    needed = planning.disk(*plan)
    assert needed > 0


def test_every_update_of_an_outer_step_is_counted(plan):
    (once, *_), (thrice, *_) = (
        planning.programs(*plan),
        planning.programs(*planned(updates_per_step=3)),
    )
    assert thrice.times == 3 * once.times > 0


def test_operations_are_those_of_the_products_and_a_little_more(plan):
    """An outer step of 8 episodes of 3 steps at 4 units, forwards once and backwards twice."""
    step = planning.programs(*plan)[0]
    devices = len(mesh.devices())
    n, h, share = 2, 4, 8 // devices
    products = 3 * 2 * 3 * share * (4 * h * (2 * n + h) + h * n)
    assert products < planning.compiled(step).operations < 4 * products


def test_each_step_of_an_episode_counts_once(plan):
    """A loop of unknown length from one probed time to the next, in a scan over these times."""
    found, _ = plan
    program = planning.programs(*plan)[-1]

    def scans(jaxpr):
        for equation in jaxpr.eqns:
            within = [*jaxprs_in_params(equation.params)]
            if equation.primitive.name == "scan":
                names = {each.primitive.name for part in within for each in part.eqns}
                yield from [equation.params["length"]] * ("while" in names)
            for part in within:
                yield from scans(part)

    (times,) = scans(program.trace().jaxpr.jaxpr)
    assert program.turns * times == found.comparisons[0].domain.steps


def test_stored_bytes_are_those_of_state_and_readings(plan):
    """8 episodes of 4 probed times, two modes; weights, two moments, two counts and a step."""
    found, loop = plan
    checkpoints = len(found.outer.checkpoint_steps)
    weights = sum(leaf.size for leaf in jax.tree.leaves(loop.abstract.params))
    state = sum(leaf.size for leaf in jax.tree.leaves(loop.abstract))
    assert 3 * weights < state < 3 * weights + 6
    least = 4 * checkpoints * (state + 2 * 8 * 4)
    assert least < planning.disk(found, loop) < 4 * least


def test_time_is_estimated_from_few_steps(plan, monkeypatch):
    """One dispatch is timed, of 20 steps, or of fewer where that would take too long."""
    _, loop = plan
    ran, run = [], loop.advance
    monkeypatch.setattr(
        loop, "compiled", lambda name: lambda state, n: (ran.append(int(n)), run(state, n))[1]
    )
    for seconds, steps in ((1e9, 20), (1e-9, 1)):
        monkeypatch.setattr(outer, "DISPATCH_SECONDS", seconds)
        ran.clear()
        loop.pace = 0.0
        found = planning.estimated([loop], loop.init(), loop.run)
        assert ran == [1, 1, steps]
        assert found == {"lstm": pytest.approx(loop.seconds["lstm"] / steps * loop.config.steps)}


def test_time_of_settings_side_by_side_is_that_of_all(monkeypatch):
    """Settings share the time of a step evenly, and the estimate is of what they take together."""
    loops = [planned(learning_rate=rate)[1] for rate in (1e-2, 3e-2)]
    rows, ran = OuterLoops(loops), []

    def counted(states, target):
        for state, metrics in rows.run(states, target):
            ran.append(int(state[0].step))
            yield state, metrics

    monkeypatch.setattr(outer, "DISPATCH_SECONDS", 1e9)
    found = planning.estimated(loops, rows.start(ProgramCache()), counted)
    assert ran == [1, 2, 22]
    first, second = (loop.seconds["lstm"] for loop in loops)
    assert first == second > 0
    assert found == {"lstm": pytest.approx((first + second) / 20 * loops[0].config.steps)}


@pytest.mark.parametrize("name", ["h200", "h100:3", "v5e:x", "", "here:2"])
def test_an_unknown_device_is_refused(name, refused):
    refused([STUDY, f"--plan={name}"], f"--plan {name}: is not a known device: choose from h100:1")


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    def missing(**told):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(absent_devices, "get_topology_desc", missing)
    with pytest.raises(ConfigError, match=r"--plan h100:8: .*\[aot\].*no plugin"):
        absent_devices.find("h100:8")


@pytest.fixture
def accounts(monkeypatch):
    """Programs that take 5 GiB each, by an account that is made up."""
    row = lambda program, there: planning.Needs(program, 1.0, 5 << 30, "", 0.0)
    monkeypatch.setattr(planning, "compiled", row)
    monkeypatch.setattr(planning, "estimated", lambda *given: {})


def test_what_does_not_fit_is_refused_once_all_is_said(accounts, refused, monkeypatch):
    monkeypatch.setattr(mesh, "memory", lambda split: 4 << 30)
    # What cannot fit is not run, to be timed: that would end in an error of its own.
    monkeypatch.setattr(planning, "estimated", lambda *given: pytest.fail("it was timed"))
    said = refused([STUDY, "--plan"], "--outer.batch 8: outer step of lstm would take 5 GiB, more")
    assert "lower it" in said


def test_a_sweep_is_planned_and_refused_once_all_is_said(
    accounts, plan, monkeypatch, tmp_path, capsys
):
    """Two settings are trained as one program, which does twice what that of a run does.

    Of what measures, which is traced for each setting, one program stands for all.
    """
    monkeypatch.setattr(mesh, "memory", lambda split: 4 << 30)
    found, plan_sweep, measuring = [], planning.plan_sweep, planning.measuring
    monkeypatch.setattr(planning, "measuring", lambda *given: measuring(*given)[-1:])
    monkeypatch.setattr(
        planning, "plan_sweep", lambda *given: found.extend(plan_sweep(*given)) or found
    )
    out, rates = tmp_path / "out", ["--outer.learning-rate", "1e-2", "3e-2"]
    assert main(["sweep", STUDY, *rates, "--plan", "--out", str(out)]) == 2
    said, errors = capsys.readouterr()
    assert not out.exists()
    (line,) = errors.splitlines()
    refused = "--part 1/1: outer step of lstm × 2 settings would take 5 GiB, more than 4 GiB; use"
    assert refused in line
    assert "2 settings side by side, from setting 1 on" in said
    assert "fit into the memory side by side: 1\n" in said
    both, alone = found[0].programs, planning.programs(*plan)
    assert [each.name for each in both[1:]] == [each.name for each in alone[1:]]
    assert [each.times for each in both[1:]] == [2 * each.times for each in alone[1:]]
    assert found[0].disk == 2 * planning.disk(*plan)
    flops = lambda program: program_cost.operations(program.trace().jaxpr)
    devices = len(mesh.devices())  # rows are split over them, of a run its episodes
    ratio = devices * -(-2 // devices)
    assert flops(both[0]) / flops(alone[0]) == pytest.approx(ratio, rel=0.1)


def test_a_sweep_that_cannot_be_run_is_not_planned(monkeypatch, tmp_path, capsys):
    def broken(plan):
        raise ConfigError("it cannot take a step")

    monkeypatch.setattr(planning, "check_traced", broken)
    out = tmp_path / "out"
    rates = ["--outer.learning-rate", "1e-2", "3e-2"]
    assert main(["sweep", STUDY, *rates, "--plan", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "it cannot take a step" in line
    assert not out.exists()


def test_a_full_disk_is_refused(accounts, refused, monkeypatch):
    monkeypatch.setattr(mesh, "memory", lambda split: 6 << 30)
    usage = namedtuple("usage", "total used free")(100, 99, 1)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage)
    refused([STUDY, "--plan"], "arrays may take")


def test_a_compiler_that_runs_out_of_memory_is_told_apart(plan):
    """From other failures of a compiler, which are raised as they are."""
    for said, raised in {
        "RESOURCE_EXHAUSTED: Used 17.2G of 15.75G hbm": ConfigError,
        "INTERNAL: something else": jax.errors.JaxRuntimeError,
    }.items():

        class Traced:
            def lower(self):
                return self

            def compile(self, options, said=said):
                raise jax.errors.JaxRuntimeError(said)

        with pytest.raises(raised):
            planning.compiled(planning.programs(*plan)[0]._replace(trace=Traced))


def test_a_compiler_is_told_the_next_where_it_fails_by_what_it_was_told(plan):
    program = planning.programs(*plan)[-1]
    unknown = {"xla_no_such_option": "1"}
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        planning.compiled(program, mesh.TargetDevices(jax.devices(), 1 << 30, [unknown]))
    made = planning.compiled(program, mesh.TargetDevices(jax.devices(), 1 << 30, [unknown, {}]))
    assert made.memory == planning.compiled(program).memory


def test_sizes_are_said_in_units():
    assert [planning.size(each) for each in (0, 1023, 1536, 5 << 30)] == [
        "0 B",
        "1,023 B",
        "1.5 KiB",
        "5 GiB",
    ]
    assert [planning.number(each) for each in (7, 1500, 2.5e13)] == ["7", "1.5 k", "25 T"]


def planned(**outer):
    """The least study there is, with some settings of its outer loop."""
    config = tiny_study.Config()
    config = dataclasses.replace(config, outer=dataclasses.replace(config.outer, **outer))
    plan = tiny_study.study.plan(config)
    return plan, OuterLoop(plan.trained, plan.outer, jax.random.key(0))


def test_each_comparison_is_measured_by_its_own_chunk():
    domain = LinearRegression(2, 2, steps=4)
    bayes = metadyn.Contender("bayes", "Bayes", bayes_linear(domain), "bayes")
    parts = []
    for name, chunk in (("two", 8), ("four", 4)):
        sizes = metadyn.MeasureConfig(tasks=16, chunk=chunk)
        tasks = sizes.sized(domain.evaluation(sizes.probe_points), name=name)
        parts.append(metadyn.Comparison(domain, [bayes], [tasks], measure=sizes, name=name))
    plan = metadyn.Plan(metadyn.OuterConfig(), parts)
    found = planning.measuring(plan, OuterLoop({}, plan.outer, jax.random.key(0)))
    assert [(each.name, each.times) for each in found] == [
        ("bayes on two", 2),
        ("bayes on four", 4),
    ]


@pytest.mark.parametrize(("size", "parts"), [(3, [3]), (4, [4]), (5, [3, 3]), (9, [3, 3, 3])])
def test_tasks_are_measured_in_equal_parts_of_at_most_a_chunk(size, parts):
    domain = LinearRegression(2, 2, steps=4)
    tasks = dataclasses.replace(domain.evaluation(6), size=size)
    bayes = metadyn.Contender("bayes", "Bayes", bayes_linear(domain), "bayes")
    found = measuring.calls(tasks, bayes, (), jax.random.key(0), chunk=4)
    indices = [given[-1] for given in found]
    assert [len(part) for part in indices] == parts
    assert [i for part in indices for i in part] == [*range(sum(parts))]


def test_a_small_memory_bounds_the_tasks_that_are_measured_at_a_time(monkeypatch):
    """To half of it, for all seeds at once: of an LSTM, its state and the gates of all queries."""
    two_seeds = planned(seeds=2)
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    monkeypatch.setattr(mesh, "memory", lambda split: 2 * mesh.WORKING_COPIES * 300 * 5)
    assert mesh.task_chunk(300) == 5
    assert mesh.task_chunk(300, seeds=2) == 2
    assert mesh.task_chunk(1 << 60) == 1
    asked = []
    monkeypatch.setattr(mesh, "task_chunk", lambda *given: asked.append(given) or 4)
    jax.clear_caches()
    for program in planning.programs(*two_seeds)[1:]:
        program.trace()
    jax.clear_caches()
    state = 4 * (4 + 4 + 2 + 1)  # h, c, feedback, diagnosis
    gates = 4 * 6 * 4 * 4  # of 6 queries
    assert {(state, 2, True), (state + gates, 2, True)} < set(asked)


def test_devices_elsewhere_stand_in_and_leave():
    class Device:
        platform = "tpu"
        device_kind = "TPU v5 lite"

    here = mesh.devices(), mesh.backend(), mesh.memory(True)
    with mesh.compiling_for(mesh.TargetDevices([Device()] * 4, 10, [])):
        assert (len(mesh.devices()), mesh.backend()) == (4, "tpu")
        assert (mesh.memory(split=False), mesh.memory(split=True)) == (10, 40)
        assert mesh.processor() == "4 × TPU v5 lite"
        assert mesh.shares(2, 8) == (2, 2, 1)
    assert (mesh.devices(), mesh.backend(), mesh.memory(True)) == here


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_a_container_or_a_job_are_those_of_every_group_above_the_process(
    version, tmp_path, monkeypatch
):
    job = tmp_path / ("memory" if version == 1 else "") / "slurm" / "job_7"
    (job / "step_0").mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    name = "memory.limit_in_bytes" if version == 1 else "memory.max"
    (job / name).write_text("12345\n")
    (job / "step_0" / name).write_text(f"{1 << 62}\n" if version == 1 else "max\n")
    (job / "cpu.max").write_text("250000 100000\n")
    own = "/slurm/job_7/step_0"
    said = f"9:memory:{own}\n1:cpu:/\n0::/\n" if version == 1 else f"0::{own}\n"
    (tmp_path / "of_process").write_text(said)
    assert mesh.memory(split=True) > 12345
    monkeypatch.setattr(mesh, "CGROUPS", tmp_path)
    monkeypatch.setattr(mesh, "CGROUPS_OF_PROCESS", tmp_path / "of_process")
    monkeypatch.setattr(mesh.os, "sched_getaffinity", lambda process: {*range(8)}, raising=False)
    assert mesh.memory(split=True) == 12345
    assert mesh.cores() == (8 if version == 1 else 2)


# Of `benchmarks.compile`.


@pytest.mark.parametrize("platform", compiling.TARGETS)
def test_programs_are_lowered_with_the_choices_of_their_platform(platform, plan):
    """Those of linear regression at `paper` size; CI lowers those of all studies by the command."""
    with compiling.said_to_be_here(platform):
        programs = {each.name: each for each in compiling.programs("linear_regression")}
        text = compiling.lowered(programs["outer step of lstm"], platform)
        assert "f64" not in text
        devices = len(mesh.devices())
        assert f"tensor<6x{4 // devices}x256x{128}xf32>" in text or devices != 2
        text = compiling.lowered(programs["lstm on in_distribution"], platform)
        assert "f64" not in text
        assert "custom_call @lapack" not in text


@pytest.mark.parametrize("platform", compiling.TARGETS)
def test_every_backend_of_the_lstm_kernel_is_lowered(platform):
    with compiling.said_to_be_here(platform):
        texts = {p.name: compiling.lowered(p, platform) for p in compiling.kernels(platform)}
    fused = {"fused", "fused_remat"}
    assert {*texts} == {*get_args(Backend)} - (fused if platform == "tpu" else set())
    assert texts["scan"] != texts["backward"]
    assert {name for name, text in texts.items() if "triton" in text} == (
        {"auto", *fused} if platform == "cuda" else set()
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--platform", "rocm"], "--platform: invalid choice: 'rocm'"),
        (["--only", "("], "--only: '(' is not a regular expression"),
        (["--platform", "cuda"], "install the compiler for cuda: pip install -e '.[aot]'"),
    ],
)
def test_what_cannot_be_compiled_is_one_line_and_exit_code_2(given, said, monkeypatch, capsys):
    def missing(**told):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(absent_devices, "get_topology_desc", missing)
    monkeypatch.setattr(absent_devices, "use_cpus_alone", lambda: None)
    with pytest.raises(SystemExit) as stop:
        compiling.main(given)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith("compile: ")
    assert said in line


def test_programs_that_are_gone_are_no_longer_stored(monkeypatch, tmp_path):
    stored = {"a: here": {"h100:1": {"fails": "x"}}, "a: gone": {"h100:1": {"fails": "x"}}}
    monkeypatch.setattr(compiling, "FILE", tmp_path / "compiled.json")
    compiling.store(stored)
    monkeypatch.setattr(compiling, "programs", lambda study: [SimpleNamespace(name="here")])
    monkeypatch.setattr("metadyn.study.study_names", lambda: ["a"])
    monkeypatch.setattr("metadyn.absent_devices.find", lambda target: None)
    monkeypatch.setattr(mesh, "compiling_for", lambda there: nullcontext())
    compiling.compile_all("h100:1", lambda name: False)
    assert json.loads(compiling.FILE.read_text()) == {"a: here": stored["a: here"]}


def test_only_what_the_code_has_changed_since_is_compiled_anew(monkeypatch, tmp_path):
    """And of programs that differ in numbers alone, the first."""
    made, functions = [], {"one": jnp.sin, "same": jnp.sin, "other": jnp.cos}

    def programs(study):
        for name, function in functions.items():
            trace = partial(jax.jit(function).trace, jnp.float32(1))
            yield SimpleNamespace(name=name, trace=trace, turns=(), times=1)

    def compiled(program, there):
        made.append(program.name)
        text = "ENTRY %main (x: f32[2]) -> f32[2] {\n  %x = f32[2]{0} parameter(0)\n}\n"
        return SimpleNamespace(operations=1.0, seconds=1.0, memory=1, text=text)

    monkeypatch.setattr(compiling, "FILE", tmp_path / "compiled.json")
    monkeypatch.setattr(compiling, "FUSED", {})
    monkeypatch.setattr(compiling, "programs", programs)
    monkeypatch.setattr(planning, "compiled", compiled)
    monkeypatch.setattr("metadyn.study.study_names", lambda: ["a"])
    monkeypatch.setattr("metadyn.absent_devices.find", lambda target: None)
    monkeypatch.setattr(mesh, "compiling_for", lambda there: nullcontext())
    compiling.compile_all("h100:1", lambda name: True)
    assert made == ["one", "other"]
    compiling.compile_all("h100:1", lambda name: True)
    assert made == ["one", "other"]
    functions["other"] = jnp.tanh
    compiling.compile_all("h100:1", lambda name: True)
    assert made == ["one", "other", "other"]
    with patch.object(jax, "__version__", "another"):
        compiling.compile_all("h100:1", lambda name: True)
    assert made == ["one", "other", "other", "one", "other"]
    rows = json.loads(compiling.FILE.read_text())
    assert [found["h100:1"]["memory"] for found in rows.values()] == [1, 1, 1]


def test_the_stored_table_is_of_the_stored_programs():
    rows = json.loads(compiling.FILE.read_text())
    lines = "\n".join(compiling.table(rows)) + "\n"
    assert compiling.FILE.with_suffix(".md").read_text() == lines


def test_a_table_says_what_was_compiled_what_failed_and_what_was_not():
    row = {"memory": 1536, "reduced": [8], "launches": [6, 5], "operations": 2e9, "seconds": 1.4}
    found = {"h100:1": row | {"calls": 7, "moved": 3072}, "h100:8": {"fails": "Error: a | b"}}
    *_, line = compiling.table({"study: outer step of x": found})
    cells = "1.5 KiB; 6 + 5; 8 B reduced; 1 s | Error: a / b | – | –"
    assert line == f"| outer step of x | 7 | 2 G | 3 KiB | {cells} |"
    *_, line = compiling.table({"study: outer step of x": {"v5e:1": row | {"calls": 7}}})
    assert (
        line == "| outer step of x | 7 | 2 G | – | – | – | 1.5 KiB; 6 + 5; 8 B reduced; 1 s | – |"
    )


def test_registers_and_spills_are_read_off_what_the_assembler_says():
    said = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'forward_kernel' for 'sm_90a'
ptxas info    : Function properties for forward_kernel
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size"""
    assert compiling.used(said) == [255, 20]


def test_registers_of_the_fused_kernels_are_stored_where_one_gpu_is_compiled_for(
    monkeypatch, tmp_path
):
    name = "kernel: fused, 64 units, products in float32"
    found = {"backward": [238, 0], "forward": [255, 3], "bytes": 37_000}
    monkeypatch.setattr(compiling, "FILE", tmp_path / "compiled.json")
    monkeypatch.setattr(compiling, "FUSED", {name: ("fused", 64, "float32")})
    monkeypatch.setattr(compiling, "registers", lambda *kernel: found)
    monkeypatch.setattr("metadyn.study.study_names", lambda: [])
    monkeypatch.setattr("metadyn.absent_devices.find", lambda target: None)
    monkeypatch.setattr(mesh, "compiling_for", lambda there: nullcontext())
    compiling.compile_all("h100:8", lambda name: True)
    assert json.loads(compiling.FILE.read_text()) == {}
    compiling.compile_all("h100:1", lambda name: True)
    assert json.loads(compiling.FILE.read_text()) == {name: {"h100:1": found}}
    compiling.compile_all("h100:8", lambda name: True)
    lines = compiling.FILE.with_suffix(".md").read_text().splitlines()
    assert lines[-1] == "| fused, 64 units, products in float32 | 255, 3 B | 238, 0 B | 37,000 |"


@pytest.mark.parametrize("name", ["linear_regression", "nonlinear_regression", "contextual_bandit"])
def test_a_study_that_is_planned_again_shares_what_is_compiled(name):
    """So do the settings of a sweep that differ in something else."""
    study = load_study(name)
    one, other = (study.plan(study.presets["quick"]).comparisons[0] for _ in range(2))
    assert [each.make for each in one.contenders] == [each.make for each in other.contenders]
    form = jax.tree.structure
    drawn = [[(form(each.sample), each.probes) for each in p.sets] for p in (one, other)]
    assert drawn[0] == drawn[1]
