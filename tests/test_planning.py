"""Compares what a plan states with the run itself, and tests what a plan refuses."""

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
def plan_and_loop():
    return tiny_plan()


def test_a_plan_states_what_a_run_needs_and_runs_nothing(tmp_path, capsys):
    assert main(["run", STUDY, "--plan", "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for part in ("outer step of lstm", "bayes on tracked", "FLOPs in all", "on disk", "training"):
        assert part in output


def test_planned_programs_are_those_that_a_run_compiles(plan_and_loop, tmp_path):
    inner.measure.clear_cache()
    assert main(["run", STUDY, "--out", str(tmp_path / "out"), *SHORT]) == 0
    programs = planning.programs(*plan_and_loop)
    measurements = [program for program in programs if " on " in program.name]
    assert inner.measure._cache_size() == len(measurements)
    assert {program.name for program in programs} - {program.name for program in measurements} == {
        "outer step of lstm",
        "initial state",
    }


def test_every_update_of_an_outer_step_is_counted(plan_and_loop):
    (once, *_), (thrice, *_) = (
        planning.programs(*plan_and_loop),
        planning.programs(*tiny_plan(updates_per_step=3)),
    )
    assert thrice.times == 3 * once.times > 0


def test_operations_are_at_least_those_of_the_matrix_products(plan_and_loop):
    """An outer step runs 8 episodes of 3 steps at 4 units, forwards once and backwards twice."""
    step = planning.programs(*plan_and_loop)[0]
    devices = len(mesh.devices())
    n, h, share = 2, 4, 8 // devices
    products = 3 * 2 * 3 * share * (4 * h * (2 * n + h) + h * n)
    assert products < planning.compiled(step).operations < 4 * products


def test_each_step_of_an_episode_counts_once(plan_and_loop):
    """A loop of unknown length, from one probed time to the next, is in a scan over these times."""
    plan, _ = plan_and_loop
    program = planning.programs(*plan_and_loop)[-1]

    def scans(jaxpr):
        for equation in jaxpr.eqns:
            inner_jaxprs = [*jaxprs_in_params(equation.params)]
            if equation.primitive.name == "scan":
                names = {
                    inner_equation.primitive.name
                    for inner_jaxpr in inner_jaxprs
                    for inner_equation in inner_jaxpr.eqns
                }
                yield from [equation.params["length"]] * ("while" in names)
            for inner_jaxpr in inner_jaxprs:
                yield from scans(inner_jaxpr)

    (times,) = scans(program.trace().jaxpr.jaxpr)
    assert program.turns * times == plan.comparisons[0].domain.steps


def test_stored_bytes_are_those_of_state_and_readings(plan_and_loop):
    """The state is weights, two moments, two counts and a step.

    8 episodes are read at 4 probed times, with two modes.
    """
    plan, loop = plan_and_loop
    checkpoints = len(plan.outer.checkpoint_steps)
    weights = sum(leaf.size for leaf in jax.tree.leaves(loop.abstract.params))
    state = sum(leaf.size for leaf in jax.tree.leaves(loop.abstract))
    assert 3 * weights < state < 3 * weights + 6
    least = 4 * checkpoints * (state + 2 * 8 * 4)
    assert least < planning.disk(plan, loop) < 4 * least


def test_time_is_estimated_from_a_few_steps(plan_and_loop, monkeypatch):
    """One dispatch of 20 steps is timed, or of fewer steps where 20 would take too long."""
    _, loop = plan_and_loop
    counts, advance = [], loop.advance
    monkeypatch.setattr(
        loop,
        "compiled",
        lambda name: lambda state, n: (counts.append(int(n)), advance(state, n))[1],
    )
    for seconds, steps in ((1e9, 20), (1e-9, 1)):
        monkeypatch.setattr(outer, "DISPATCH_SECONDS", seconds)
        counts.clear()
        loop.pace = 0.0
        estimate = planning.estimated([loop], loop.init(), loop.run)
        assert counts == [1, 1, steps]
        assert estimate == {"lstm": pytest.approx(loop.seconds["lstm"] / steps * loop.config.steps)}


def test_time_of_settings_side_by_side_is_that_of_all_together(monkeypatch):
    """Settings share the time of a step evenly, and the estimate is their time together."""
    loops = [tiny_plan(learning_rate=rate)[1] for rate in (1e-2, 3e-2)]
    rows, steps = OuterLoops(loops), []

    def counted(states, target):
        for state, metrics in rows.run(states, target):
            steps.append(int(state[0].step))
            yield state, metrics

    monkeypatch.setattr(outer, "DISPATCH_SECONDS", 1e9)
    estimate = planning.estimated(loops, rows.start(ProgramCache()), counted)
    assert steps == [1, 2, 22]
    first, second = (loop.seconds["lstm"] for loop in loops)
    assert first == second > 0
    assert estimate == {"lstm": pytest.approx((first + second) / 20 * loops[0].config.steps)}


@pytest.mark.parametrize("name", ["h200", "h100:3", "v5e:x", "", "here:2"])
def test_an_unknown_device_is_refused(name, refused):
    refused([STUDY, f"--plan={name}"], f"--plan {name}: is not a known device: choose from h100:1")


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    def missing(**options):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(absent_devices, "get_topology_desc", missing)
    with pytest.raises(ConfigError, match=r"--plan h100:8: .*\[aot\].*no plugin"):
        absent_devices.find("h100:8")


@pytest.fixture
def made_up_needs(monkeypatch):
    """Makes every program take 5 GiB."""
    needs = lambda program, devices: planning.Needs(program, 1.0, 5 << 30, "", 0.0)
    monkeypatch.setattr(planning, "compiled", needs)
    monkeypatch.setattr(planning, "estimated", lambda *arguments: {})


def test_what_does_not_fit_is_refused_after_the_whole_plan_is_printed(
    made_up_needs, refused, monkeypatch
):
    monkeypatch.setattr(mesh, "memory", lambda split: 4 << 30)
    # What cannot fit must not be run to be timed, since that would end in another error.
    monkeypatch.setattr(planning, "estimated", lambda *arguments: pytest.fail("it was timed"))
    line = refused([STUDY, "--plan"], "--outer.batch 8: outer step of lstm would take 5 GiB, more")
    assert "lower it" in line


def test_a_sweep_that_does_not_fit_is_refused_after_the_whole_plan_is_printed(
    made_up_needs, plan_and_loop, monkeypatch, tmp_path, capsys
):
    """One program trains two settings, and does twice what that of a run does.

    Of the programs that measure, each traced for each setting, one stands for all.
    """
    monkeypatch.setattr(mesh, "memory", lambda split: 4 << 30)
    plans, plan_sweep, measuring = [], planning.plan_sweep, planning.measuring
    monkeypatch.setattr(planning, "measuring", lambda *arguments: measuring(*arguments)[-1:])
    monkeypatch.setattr(
        planning, "plan_sweep", lambda *arguments: plans.extend(plan_sweep(*arguments)) or plans
    )
    out, rates = tmp_path / "out", ["--outer.learning-rate", "1e-2", "3e-2"]
    assert main(["sweep", STUDY, *rates, "--plan", "--out", str(out)]) == 2
    output, stderr = capsys.readouterr()
    assert not out.exists()
    (line,) = stderr.splitlines()
    message = "--part 1/1: outer step of lstm × 2 settings would take 5 GiB, more than 4 GiB; use"
    assert message in line
    assert "2 settings side by side, from setting 1 on" in output
    assert "fit into the memory side by side: 1\n" in output
    programs, expected = plans[0].programs, planning.programs(*plan_and_loop)
    assert [program.name for program in programs[1:]] == [program.name for program in expected[1:]]
    assert [program.times for program in programs[1:]] == [2 * p.times for p in expected[1:]]
    assert plans[0].disk == 2 * planning.disk(*plan_and_loop)
    flops = lambda program: program_cost.operations(program.trace().jaxpr)
    devices = len(mesh.devices())  # a sweep's rows, but a run's episodes, are split over them
    ratio = devices * -(-2 // devices)
    assert flops(programs[0]) / flops(expected[0]) == pytest.approx(ratio, rel=0.1)


def test_a_sweep_that_cannot_be_run_is_not_planned(monkeypatch, tmp_path, capsys):
    def broken(plan_and_loop):
        raise ConfigError("it cannot take a step")

    monkeypatch.setattr(planning, "check_traced", broken)
    out = tmp_path / "out"
    rates = ["--outer.learning-rate", "1e-2", "3e-2"]
    assert main(["sweep", STUDY, *rates, "--plan", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "it cannot take a step" in line
    assert not out.exists()


def test_a_full_disk_is_refused(made_up_needs, refused, monkeypatch):
    monkeypatch.setattr(mesh, "memory", lambda split: 6 << 30)
    usage = namedtuple("usage", "total used free")(100, 99, 1)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage)
    refused([STUDY, "--plan"], "arrays may take")


def test_a_compiler_that_runs_out_of_memory_is_recognised(plan_and_loop):
    """Other failures of a compiler are raised as they are."""
    for message, error in {
        "RESOURCE_EXHAUSTED: Used 17.2G of 15.75G hbm": ConfigError,
        "INTERNAL: something else": jax.errors.JaxRuntimeError,
    }.items():

        class Traced:
            def lower(self):
                return self

            def compile(self, options, message=message):
                raise jax.errors.JaxRuntimeError(message)

        with pytest.raises(error):
            planning.compiled(planning.programs(*plan_and_loop)[0]._replace(trace=Traced))


def test_a_compiler_that_fails_by_its_options_is_given_the_next_ones(plan_and_loop):
    program = planning.programs(*plan_and_loop)[-1]
    unknown = {"xla_no_such_option": "1"}
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        planning.compiled(program, mesh.TargetDevices(jax.devices(), 1 << 30, [unknown]))
    compiled = planning.compiled(program, mesh.TargetDevices(jax.devices(), 1 << 30, [unknown, {}]))
    assert compiled.memory == planning.compiled(program).memory


def test_sizes_are_printed_in_units():
    sizes = [planning.size(n) for n in (0, 1023, 1536, 5 << 30)]
    assert sizes == ["0 B", "1,023 B", "1.5 KiB", "5 GiB"]
    assert [planning.number(n) for n in (7, 1500, 2.5e13)] == ["7", "1.5 k", "25 T"]


def tiny_plan(**outer):
    """Returns the plan and the outer loop of the smallest study, with some settings of the loop."""
    config = tiny_study.Config()
    config = dataclasses.replace(config, outer=dataclasses.replace(config.outer, **outer))
    plan = tiny_study.study.plan(config)
    return plan, OuterLoop(plan.trained, plan.outer, jax.random.key(0))


def test_each_comparison_is_measured_in_its_own_chunks():
    domain = LinearRegression(2, 2, steps=4)
    bayes = metadyn.Contender("bayes", "Bayes", bayes_linear(domain), "bayes")
    comparisons = []
    for name, chunk in (("two", 8), ("four", 4)):
        sizes = metadyn.MeasureConfig(tasks=16, chunk=chunk)
        tasks = sizes.sized(domain.evaluation(sizes.probe_points), name=name)
        comparisons.append(metadyn.Comparison(domain, [bayes], [tasks], measure=sizes, name=name))
    plan = metadyn.Plan(metadyn.OuterConfig(), comparisons)
    programs = planning.measuring(plan, OuterLoop({}, plan.outer, jax.random.key(0)))
    assert [(program.name, program.times) for program in programs] == [
        ("bayes on two", 2),
        ("bayes on four", 4),
    ]


@pytest.mark.parametrize(("size", "parts"), [(3, [3]), (4, [4]), (5, [3, 3]), (9, [3, 3, 3])])
def test_tasks_are_measured_in_equal_parts_of_at_most_a_chunk(size, parts):
    domain = LinearRegression(2, 2, steps=4)
    tasks = dataclasses.replace(domain.evaluation(6), size=size)
    bayes = metadyn.Contender("bayes", "Bayes", bayes_linear(domain), "bayes")
    calls = measuring.calls(tasks, bayes, (), jax.random.key(0), chunk=4)
    indices = [arguments[-1] for arguments in calls]
    assert [len(part) for part in indices] == parts
    assert [i for part in indices for i in part] == [*range(sum(parts))]


def test_a_small_memory_bounds_the_tasks_that_are_measured_at_a_time(monkeypatch):
    """They take half of it for all seeds: an LSTM needs its state and the gates of all queries."""
    two_seeds = tiny_plan(seeds=2)
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    monkeypatch.setattr(mesh, "memory", lambda split: 2 * mesh.WORKING_COPIES * 300 * 5)
    assert mesh.task_chunk(300) == 5
    assert mesh.task_chunk(300, seeds=2) == 2
    assert mesh.task_chunk(1 << 60) == 1
    requests = []
    monkeypatch.setattr(mesh, "task_chunk", lambda *arguments: requests.append(arguments) or 4)
    jax.clear_caches()
    for program in planning.programs(*two_seeds)[1:]:
        program.trace()
    jax.clear_caches()
    state = 4 * (4 + 4 + 2 + 1)  # h, c, feedback, diagnosis
    gates = 4 * 6 * 4 * 4  # of 6 queries
    assert {(state, 2, True), (state + gates, 2, True)} < set(requests)


def test_absent_devices_replace_the_local_ones_only_within_the_block():
    class Device:
        platform = "tpu"
        device_kind = "TPU v5 lite"

    local = mesh.devices(), mesh.backend(), mesh.memory(True)
    with mesh.compiling_for(mesh.TargetDevices([Device()] * 4, 10, [])):
        assert (len(mesh.devices()), mesh.backend()) == (4, "tpu")
        assert (mesh.memory(split=False), mesh.memory(split=True)) == (10, 40)
        assert mesh.processor() == "4 × TPU v5 lite"
        assert mesh.shares(2, 8) == (2, 2, 1)
    assert (mesh.devices(), mesh.backend(), mesh.memory(True)) == local


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_every_control_group_above_the_process_hold(version, tmp_path, monkeypatch):
    job = tmp_path / ("memory" if version == 1 else "") / "slurm" / "job_7"
    (job / "step_0").mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    name = "memory.limit_in_bytes" if version == 1 else "memory.max"
    (job / name).write_text("12345\n")
    (job / "step_0" / name).write_text(f"{1 << 62}\n" if version == 1 else "max\n")
    (job / "cpu.max").write_text("250000 100000\n")
    group = "/slurm/job_7/step_0"
    lines = f"9:memory:{group}\n1:cpu:/\n0::/\n" if version == 1 else f"0::{group}\n"
    (tmp_path / "of_process").write_text(lines)
    assert mesh.memory(split=True) > 12345
    monkeypatch.setattr(mesh, "CGROUPS", tmp_path)
    monkeypatch.setattr(mesh, "CGROUPS_OF_PROCESS", tmp_path / "of_process")
    monkeypatch.setattr(mesh.os, "sched_getaffinity", lambda process: {*range(8)}, raising=False)
    assert mesh.memory(split=True) == 12345
    assert mesh.cores() == (8 if version == 1 else 2)


# Tests of `benchmarks.compile`.


@pytest.mark.parametrize("platform", compiling.TARGETS)
def test_programs_are_lowered_with_the_choices_of_their_platform(platform, plan_and_loop):
    """The programs are linear regression's at `paper` size. CI lowers those of all studies."""
    with compiling.said_to_be_here(platform):
        programs = {program.name: program for program in compiling.programs("linear_regression")}
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
    assert platform != "cuda" or texts["fused"] != texts["fused_remat"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--platform", "rocm"], "--platform: invalid choice: 'rocm'"),
        (["--only", "("], "--only: '(' is not a regular expression"),
        (["--platform", "cuda"], "install the compiler for cuda: pip install -e '.[aot]'"),
    ],
)
def test_what_cannot_be_compiled_gives_one_line_and_exit_code_2(
    arguments, message, monkeypatch, capsys
):
    def missing(**options):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(absent_devices, "get_topology_desc", missing)
    monkeypatch.setattr(absent_devices, "use_cpus_alone", lambda: None)
    with pytest.raises(SystemExit) as stop:
        compiling.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith("compile: ")
    assert message in line


def test_programs_that_no_longer_exist_are_removed_from_the_stored_table(monkeypatch, tmp_path):
    stored = {"a: here": {"h100:1": {"fails": "x"}}, "a: gone": {"h100:1": {"fails": "x"}}}
    monkeypatch.setattr(compiling, "FILE", tmp_path / "compiled.json")
    compiling.store(stored)
    monkeypatch.setattr(compiling, "programs", lambda study: [SimpleNamespace(name="here")])
    monkeypatch.setattr("metadyn.study.study_names", lambda: ["a"])
    monkeypatch.setattr("metadyn.absent_devices.find", lambda target: None)
    monkeypatch.setattr(mesh, "compiling_for", lambda devices: nullcontext())
    compiling.compile_all("h100:1", lambda name: False)
    assert json.loads(compiling.FILE.read_text()) == {"a: here": stored["a: here"]}


def test_only_programs_that_the_code_has_changed_are_compiled_again(monkeypatch, tmp_path):
    """Of programs that differ only in numbers, the first is compiled."""
    names, functions = [], {"one": jnp.sin, "same": jnp.sin, "other": jnp.cos}

    def programs(study):
        for name, function in functions.items():
            trace = partial(jax.jit(function).trace, jnp.float32(1))
            yield SimpleNamespace(name=name, trace=trace, turns=(), times=1)

    def compiled(program, devices):
        names.append(program.name)
        text = "ENTRY %main (x: f32[2]) -> f32[2] {\n  %x = f32[2]{0} parameter(0)\n}\n"
        return SimpleNamespace(operations=1.0, seconds=1.0, memory=1, text=text)

    monkeypatch.setattr(compiling, "FILE", tmp_path / "compiled.json")
    monkeypatch.setattr(compiling, "FUSED", {})
    monkeypatch.setattr(compiling, "programs", programs)
    monkeypatch.setattr(planning, "compiled", compiled)
    monkeypatch.setattr("metadyn.study.study_names", lambda: ["a"])
    monkeypatch.setattr("metadyn.absent_devices.find", lambda target: None)
    monkeypatch.setattr(mesh, "compiling_for", lambda devices: nullcontext())
    compiling.compile_all("h100:1", lambda name: True)
    assert names == ["one", "other"]
    compiling.compile_all("h100:1", lambda name: True)
    assert names == ["one", "other"]
    functions["other"] = jnp.tanh
    compiling.compile_all("h100:1", lambda name: True)
    assert names == ["one", "other", "other"]
    with patch.object(jax, "__version__", "another"):
        compiling.compile_all("h100:1", lambda name: True)
    assert names == ["one", "other", "other", "one", "other"]
    rows = json.loads(compiling.FILE.read_text())
    assert [row["h100:1"]["memory"] for row in rows.values()] == [1, 1, 1]


def test_the_stored_table_shows_the_stored_programs():
    rows = json.loads(compiling.FILE.read_text())
    lines = "\n".join(compiling.table(rows)) + "\n"
    assert compiling.FILE.with_suffix(".md").read_text() == lines


def test_a_table_shows_what_was_compiled_what_failed_and_what_was_not():
    row = {"memory": 1536, "reduced": [8], "launches": [6, 5], "operations": 2e9, "seconds": 1.4}
    targets = {"h100:1": row | {"calls": 7, "moved": 3072}, "h100:8": {"fails": "Error: a | b"}}
    *_, line = compiling.table({"study: outer step of x": targets})
    cells = "1.5 KiB; 6 + 5; 8 B reduced; 1 s | Error: a / b | – | –"
    assert line == f"| outer step of x | 7 | 2 G | 3 KiB | {cells} |"
    *_, line = compiling.table({"study: outer step of x": {"v5e:1": row | {"calls": 7}}})
    assert (
        line == "| outer step of x | 7 | 2 G | – | – | – | 1.5 KiB; 6 + 5; 8 B reduced; 1 s | – |"
    )


def test_registers_and_spills_are_read_from_the_assemblers_output():
    output = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'forward_kernel' for 'sm_90a'
ptxas info    : Function properties for forward_kernel
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size"""
    assert compiling.used(output) == [255, 20]


def test_registers_of_the_fused_kernels_are_stored_for_the_target_of_one_gpu(monkeypatch, tmp_path):
    name = "kernel: fused, 64 units, products in float32"
    usage = {"backward": [238, 0], "forward": [255, 3], "bytes": 37_000}
    monkeypatch.setattr(compiling, "FILE", tmp_path / "compiled.json")
    monkeypatch.setattr(compiling, "FUSED", {name: ("fused", 64, "float32")})
    monkeypatch.setattr(compiling, "registers", lambda *kernel: usage)
    monkeypatch.setattr("metadyn.study.study_names", lambda: [])
    monkeypatch.setattr("metadyn.absent_devices.find", lambda target: None)
    monkeypatch.setattr(mesh, "compiling_for", lambda there: nullcontext())
    compiling.compile_all("h100:8", lambda name: True)
    assert json.loads(compiling.FILE.read_text()) == {}
    compiling.compile_all("h100:1", lambda name: True)
    assert json.loads(compiling.FILE.read_text()) == {name: {"h100:1": usage}}
    compiling.compile_all("h100:8", lambda name: True)
    lines = compiling.FILE.with_suffix(".md").read_text().splitlines()
    assert lines[-1] == "| fused, 64 units, products in float32 | 255, 3 B | 238, 0 B | 37,000 |"


@pytest.mark.parametrize("name", ["linear_regression", "nonlinear_regression", "contextual_bandit"])
def test_a_study_that_is_planned_again_shares_compiled_programs(name):
    """So do the settings of a sweep that differ in nothing that changes a program."""
    study = load_study(name)
    first, second = (study.plan(study.presets["quick"]).comparisons[0] for _ in range(2))
    assert [c.make for c in first.contenders] == [c.make for c in second.contenders]
    form = jax.tree.structure
    tasks = [[(form(s.sample), s.probes) for s in part.sets] for part in (first, second)]
    assert tasks[0] == tasks[1]
