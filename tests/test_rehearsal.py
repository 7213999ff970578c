"""Errors in a study are found, and named, before anything is trained or written."""

import dataclasses
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metadyn as md
from metadyn import dynamics, figures, inner, mesh, runner
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError, ConfigWarning
from metadyn.learners.bayes import bayes_linear
from metadyn.learners.gradient import DescentConfig
from metadyn.learners.lstm import LSTMConfig
from metadyn.measuring import bytes_needed, check_step
from metadyn.progress import Progress
from metadyn.store import RunFolder, differing
from metadyn.study import beyond_bayes, excess


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """An LSTM of four units that learns 2 × 2 tasks."""

    domain: LinearRegression = LinearRegression(2, 2, steps=3)
    lstm: LSTMConfig = LSTMConfig(hidden=4)
    outer: md.OuterConfig = md.OuterConfig(steps=4, batch=8, seeds=2, warmup=1, checkpoints=2)
    measure: md.MeasureConfig = md.MeasureConfig(
        tasks=8, shifted_tasks=8, tracked_tasks=8, heldout_tasks=8, probe_points=6
    )


def comparison(config):
    """Compares the LSTM and Bayes on two task sets, of which the criteria read only one."""
    domain, sizes = config.domain, config.measure
    bayes = md.Contender("bayes", "Bayes", bayes_linear(domain), "bayes")
    sets = [
        sizes.sized(domain.evaluation(sizes.probe_points)),
        sizes.sized(domain.evaluation(sizes.probe_points, 4), "shifted_tasks", "x4"),
    ]
    return md.Comparison(domain, [config.meta_learner(domain), bayes], sets, measure=sizes)


def plan(config):
    return md.Plan(config.outer, [comparison(config)])


def plan_with(**changes):
    """Returns a plan of that comparison in which functions have changed some fields' values."""

    def plan(config):
        original = comparison(config)
        fields = {name: change(getattr(original, name)) for name, change in changes.items()}
        return md.Plan(config.outer, [dataclasses.replace(original, **fields)])

    return plan


def loss_of(results, task_set, learner):
    losses = dynamics.samples(results[task_set, learner], "loss")[:, :, -1]
    return md.criterion("loss", dynamics.estimate(np.asarray, losses), "at least 0", at_least=0.0)


def criteria(config, results):
    yield loss_of(results, "in_distribution", "lstm")
    yield from beyond_bayes(results, within=0.2)
    yield from excess(results)


def figure(results):
    return figures.mode_strength(results.learners("in_distribution"))


def test_if_a_plan_is_too_large_the_setting_that_grew_most_is_named():
    @dataclasses.dataclass(frozen=True)
    class Sizes:
        few: int = 3
        many: int = 8192

    def too_large(config):
        raise MemoryError

    study = md.Study("large", {"quick": Sizes()}, too_large, lambda config, results: [], {})
    with pytest.raises(ConfigError, match="--few 5000: too large a number"):
        study.plan(Sizes(few=5000))


STUDY = md.Study("tiny", {"quick": Config()}, plan, criteria, {"own": figure})


def run(study, out):
    config = study.presets["quick"]
    return runner.run_study(study, "quick", 0, config, out, Progress(None))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Returns the folder of a run of the study, and the run's summary."""
    out = tmp_path_factory.mktemp("runs") / "r"
    return out, run(STUDY, out)


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """Returns the folder of a copy of that run."""
    return Path(shutil.copytree(finished_run[0], tmp_path / "r"))


def refused(study, out, monkeypatch):
    """Returns the one line with which a study is refused, before it has a folder or is trained."""

    def begun(*arguments):
        raise AssertionError("training was begun")

    monkeypatch.setattr(runner, "OuterLoop", begun)
    with pytest.raises(ConfigError) as caught:
        run(study, out)
    assert not out.exists()
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


def test_a_correct_study_is_rehearsed_without_writing_and_runs(finished_run, tmp_path):
    config = STUDY.presets["quick"]
    rehearsal = runner.rehearse(STUDY, config, plan(config))
    assert list(tmp_path.iterdir()) == []
    out, summary = finished_run
    rows = [*summary["criteria"], *summary["reported"]]
    assert {criterion.name for criterion in rehearsal} == {row["name"] for row in rows}
    assert {row["name"] for row in summary["criteria"]} == {"loss", "lstm_minus_bayes_slope"}
    assert (out / "figures" / "own.png").is_file()


def test_a_figure_of_every_run_that_cannot_be_drawn_is_found_before_training(tmp_path, monkeypatch):
    def broken(training):
        raise ValueError("no such axis")

    monkeypatch.setattr(figures, "outer_learning", broken)
    broken.__name__ = "outer_learning"
    line = refused(STUDY, tmp_path / "r", monkeypatch)
    assert "figure 'outer_learning' cannot be drawn (ValueError: no such axis)" in line


def test_what_cannot_fit_into_the_memory_is_refused_in_a_notebook_too(monkeypatch):
    domain = Config().domain
    learners = {"bayes": bayes_linear(domain)}
    pattern = r"tasks = 2000000000: bayes on 2,000,000,000 tasks of '\w+' at 4 times would take "
    with pytest.raises(ConfigError, match=pattern):
        md.measure(domain, learners, tasks=2_000_000_000, points=6, progress=False)
    monkeypatch.setattr(mesh, "memory", lambda split: 1000)
    meta = LSTMConfig(hidden=4).make(domain)
    with pytest.raises(ConfigError, match="seeds = 3: their weights, gradients and moments would"):
        md.train(meta, domain, steps=2, seeds=3, progress=False)


def test_without_tracking_learners_are_measured_only_once_trained(tmp_path):
    loss_alone = lambda config, results: [loss_of(results, "in_distribution", "lstm")]
    untracked = lambda sizes: dataclasses.replace(sizes, tracked_tasks=0, heldout_tasks=0)
    plan = plan_with(measure=untracked, sets=lambda sets: sets[:1])
    study = dataclasses.replace(STUDY, plan=plan, criteria=loss_alone, figures={})
    summary = run(study, tmp_path / "r")
    assert [row["name"] for row in summary["criteria"]] == ["loss"]
    folder = RunFolder(tmp_path / "r")
    assert [*folder.measurements()] == ["in_distribution"]
    assert not folder.outer_steps()
    assert folder.steps() == [*Config().outer.checkpoint_steps]


def test_a_learner_whose_loss_is_not_finite_is_named(tmp_path):
    """Its predictions are NaN for some inputs. The others are measured and judged all the same."""
    bayes = bayes_linear(Config().domain)
    predict = lambda state, x: jnp.where(x[0] > 1, jnp.nan, bayes.predict(state, x))
    halting = md.Contender("halting", "halting", bayes._replace(predict=predict), "ordinary")
    plan = plan_with(contenders=lambda old: [*old, halting], sets=lambda sets: sets[:1])
    loss_alone = lambda config, results: [loss_of(results, "in_distribution", "lstm")]
    study = dataclasses.replace(STUDY, plan=plan, criteria=loss_alone, figures={})
    with pytest.warns(ConfigWarning) as caught:
        assert np.isfinite(run(study, tmp_path / "r")["criteria"][0]["value"])
    (warning,) = caught
    match = re.match(
        r"the loss of halting on in_dist.* in (\d) of 8 episodes", str(warning.message)
    )
    data = RunFolder(tmp_path / "r").measurement("in_distribution", "halting")
    assert int(match[1]) == np.isnan(data["loss"][:, 1:]).any("step").sum() > 0


def test_names_of_task_sets_measured_at_checkpoints_are_reserved(tmp_path, monkeypatch):
    rename_first = lambda sets: [dataclasses.replace(sets[0], name="heldout_x"), *sets[1:]]
    study = dataclasses.replace(STUDY, plan=plan_with(sets=rename_first))
    message = "set of tasks = 'heldout_x': this name is reserved for sets measured"
    assert message in refused(study, tmp_path / "r", monkeypatch)


def test_a_closed_form_that_cannot_be_stored_is_refused(tmp_path, monkeypatch):
    curve = np.zeros((3, 2))
    sgd = md.Contender("sgd", "SGD", bayes_linear(Config().domain), "ordinary", curve=curve)
    study = dataclasses.replace(STUDY, plan=plan_with(contenders=lambda old: [*old, sgd]))
    pattern = r"curve = \(3, 2\): .*'sgd', must be of shape \(4, 2\)"
    assert re.search(pattern, refused(study, tmp_path / "r", monkeypatch))


@pytest.mark.parametrize(
    ("field", "value"), [("tracked_tasks", 1), ("heldout_tasks", -2), ("tasks", 0)]
)
def test_sizes_that_no_set_has_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field} = {value}: must be"):
        md.MeasureConfig(**{field: value})
    assert md.MeasureConfig(tracked_tasks=0, heldout_tasks=0).tracked_tasks == 0


@pytest.mark.parametrize("times", [(1, 2, 3), (), (0,), (0, 2, 2), np.array([0, 1.5, 2])])
def test_times_that_do_not_increase_from_0_are_refused(times):
    with pytest.raises(ConfigError, match="must be whole numbers that increase strictly"):
        md.Contender("sgd", "SGD", bayes_linear(Config().domain), times=times)


def test_times_may_be_an_array(tmp_path):
    with_array = lambda contender: dataclasses.replace(contender, times=np.arange(4))
    study = dataclasses.replace(
        STUDY, plan=plan_with(contenders=lambda old: [old[0], with_array(old[1])])
    )
    assert run(study, tmp_path / "r")["study"] == "tiny"


def test_a_contender_measured_beside_the_others_must_not_need_training():
    original = comparison(Config())
    (meta, _), tasks = original.contenders, original.sets[0]
    untrained = dataclasses.replace(meta, name="other")
    for contender in (untrained, untrained.remade(lambda learner: learner, name="copy")):
        with pytest.raises(
            ConfigError, match=r"derived_from = 'other': .* needs this meta-learner"
        ):
            dataclasses.replace(original, pairs=[(tasks, contender)])
    copy = meta.remade(lambda learner: learner, name="copy")
    *_, last = dataclasses.replace(original, pairs=[(tasks, copy)]).measurements
    assert (last.tasks, last.contender) == (tasks, copy)
    # An ordinary learner takes no outer parameters, whatever its name is.
    ordinary = md.Contender(meta.name, "Bayes", bayes_linear(Config().domain))
    *_, last = dataclasses.replace(original, pairs=[(tasks, ordinary)]).measurements
    assert last.arguments({last.meta: "weights"}, None)[2] == ()


def test_a_derived_learner_must_say_whose_parameters_it_takes():
    meta = LSTMConfig(hidden=4).make(Config().domain)
    with pytest.raises(ConfigError, match="derived_from = '': contender 'd' is derived: name"):
        md.Contender("d", "D", md.Derived(meta, meta.learner))
    with pytest.raises(ConfigError, match=r"kind = 'bayes': of contender 'd', a Derived: choose"):
        md.Contender("d", "D", md.Derived(meta, meta.learner), "bayes", derived_from="lstm")


def test_a_remade_contender_does_not_keep_the_closed_form():
    """It takes the parameters of the same meta-learner, however often it is remade."""
    domain = Config().domain
    bayes = md.Contender("b", "B", bayes_linear(domain), curve=np.zeros((4, 2)))
    remade = bayes.remade(lambda learner: learner._replace(batch=2), name="c", kind="reference")
    assert (remade.name, remade.kind, remade.curve) == ("c", "reference", None)
    assert remade.learner.batch == 2
    meta = md.Contender("lstm", "LSTM", LSTMConfig(hidden=4).make(domain))
    once = meta.remade(lambda learner: learner._replace(batch=2), name="d")
    again = once.remade(lambda learner: learner._replace(points=3), name="e")
    params = meta.learner.init(jax.random.key(0))
    learners = [contender.make(params) for contender in (once, again)]
    assert [(learner.batch, learner.points) for learner in learners] == [(2, None), (2, 3)]
    for contender in (once, again):
        assert (contender.derived_from, contender.trained, contender.kind) == (
            "lstm", False, "reference"
        )  # fmt: skip


def test_a_tracked_task_set_must_have_a_probe_of_mode_strengths(tmp_path, monkeypatch):
    class Renamed(LinearRegression):
        def evaluation(self, *arguments):
            tasks = super().evaluation(*arguments)
            return dataclasses.replace(tasks, probes={"mine": tasks.probes["mode_strength"]})

    plan = plan_with(domain=lambda _: Renamed(2, 2, steps=3), sets=lambda _: [])
    line = refused(dataclasses.replace(STUDY, plan=plan), tmp_path / "r", monkeypatch)
    assert line.startswith("probes = ['mine']: of ")


def test_a_run_whose_criteria_were_edited_since_is_judged_anew(run_copy, monkeypatch):
    measurement = run_copy / "measurements" / "in_distribution" / "lstm"
    before = measurement.stat().st_mtime_ns

    def edited(config, results):
        losses = dynamics.samples(results["in_distribution", "lstm"], "loss")[:, :, -1]
        estimate = dynamics.estimate(np.asarray, losses)
        yield md.criterion("loss", estimate, "at least 0", at_least=1e9)  # the same words as before

    monkeypatch.setattr(runner, "environment", lambda: {"processor": "another"})
    summary = run(dataclasses.replace(STUDY, criteria=edited), run_copy)
    assert [(row["name"], row["passed"]) for row in summary["criteria"]] == [("loss", False)]
    assert measurement.stat().st_mtime_ns == before
    assert summary["environment"]["processor"] != "another"  # it was not run there
    assert RunFolder(run_copy).summary() == summary


def test_a_done_run_whose_criteria_state_its_size_is_not_judged_anew(run_copy, monkeypatch):
    def sized(config, results):
        tasks = results["in_distribution", "lstm"].sizes["task"]
        yield md.criterion("loss", dynamics.exact(1.0), f"of {tasks} tasks", at_least=0.0)

    study = dataclasses.replace(STUDY, criteria=sized)
    with monkeypatch.context() as patch:  # judging must compile nothing
        patch.setattr(runner.inner.measure, "lower", lambda *arguments: 1 / 0)
        run(study, run_copy)  # is judged, because its criteria are others
    summary = run_copy / "summary.json"
    before = summary.stat().st_mtime_ns
    run(study, run_copy)
    assert summary.stat().st_mtime_ns == before


def test_a_program_that_cannot_be_compiled_is_found_before_training(tmp_path, monkeypatch):
    """The program that measures trained learners on 6 tasks, after training, cannot be compiled."""
    sizes, lower = dataclasses.replace(Config().measure, tasks=6), runner.inner.measure.lower
    study = dataclasses.replace(STUDY, presets={"quick": Config(measure=sizes)})

    def failing(*arguments):
        return 1 / 0 if len(arguments[-1]) == 6 else lower(*arguments)

    monkeypatch.setattr(runner.inner.measure, "lower", failing)
    with pytest.raises(ZeroDivisionError):
        run(study, tmp_path / "r")
    assert not RunFolder(tmp_path / "r").steps()


class Killed(BaseException):
    """Stands for the end of a process that is killed."""


def test_the_state_is_stored_from_time_to_time_whatever_checkpoints_are_planned(
    tmp_path, monkeypatch
):
    """A run that is killed loses only some minutes of training, and old states are removed."""
    config = STUDY.presets["quick"]
    few = dataclasses.replace(config.outer, steps=9, checkpoints=1, dispatch=1)
    study = dataclasses.replace(STUDY, presets={"quick": dataclasses.replace(config, outer=few)})
    run(study, tmp_path / "whole")
    assert RunFolder(tmp_path / "whole").steps() == [0, 9]

    def kill(loop, step, metrics):
        if step == 7:
            raise Killed

    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(runner.OuterLoop, "check_finite", kill)
        with pytest.raises(Killed):
            run(study, tmp_path / "killed")
    assert RunFolder(tmp_path / "killed").steps() == [0, 5, 6]
    restored, restore = [], RunFolder.restore_state
    recording = lambda folder, step, like: restored.append(step) or restore(folder, step, like)
    monkeypatch.setattr(RunFolder, "restore_state", recording)
    run(study, tmp_path / "killed")
    assert restored[0] == 6
    assert RunFolder(tmp_path / "killed").steps() == [0, 8, 9]
    uninterrupted, resumed = (RunFolder(tmp_path / name).state(9) for name in ("whole", "killed"))
    chex.assert_trees_all_equal(uninterrupted, resumed)


def test_a_page_that_was_not_written_is_written_when_the_run_is_asked_for_again(run_copy):
    page = run_copy / "report.html"
    page.unlink()
    run(STUDY, run_copy)
    assert page.is_file()


def unknown_learner(config, results):
    yield loss_of(results, "in_distribution", "nobody")


def unknown_set(config, results):
    yield loss_of(results, "x5", "lstm")


def unknown_reading(config, results):
    yield from criteria(config, results)
    results["x4", "bayes"]["saturated_gates"]


def same_name_twice(config, results):
    yield from criteria(config, results)
    yield loss_of(results, "x4", "lstm")


def failing_late(config, results):
    yield loss_of(results, "in_distribution", "lstm")
    raise ValueError("of two\nlines")


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        (unknown_learner, "'nobody' on 'in_distribution' is not measured in this run"),
        (unknown_set, "'lstm' on 'x5' is not measured in this run"),
        (unknown_reading, "saturated_gates"),
        (failing_late, "ValueError: of two lines"),
        (same_name_twice, "criterion = 'loss': two have this name"),
        (lambda config, results: [1], "'int' object has no attribute 'name'"),
    ],
)
def test_criteria_that_cannot_be_computed_are_refused(criteria, message, tmp_path, monkeypatch):
    line = refused(dataclasses.replace(STUDY, criteria=criteria), tmp_path / "r", monkeypatch)
    assert line.startswith("study 'tiny': ")
    assert message in line


def test_a_figure_that_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    def broken(results):
        return figure(results).no_such_thing

    drawings = {"own": figure, "broken": broken}
    line = refused(dataclasses.replace(STUDY, figures=drawings), tmp_path / "r", monkeypatch)
    assert line.startswith("study 'tiny': figure 'broken' cannot be drawn (AttributeError: ")


def test_a_figure_that_fails_as_it_is_rendered_is_refused(tmp_path, monkeypatch):
    def broken(results):
        drawing = figure(results)
        drawing.axes[0].xaxis.set_major_formatter(lambda x, place: [][int(x)])
        return drawing

    study = dataclasses.replace(STUDY, figures={"broken": broken})
    line = refused(study, tmp_path / "r", monkeypatch)
    assert line.startswith("study 'tiny': figure 'broken' cannot be drawn (IndexError: ")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda results: None, "figure = 'NoneType': must be a `Figure`"),
        (lambda results: figure(results).axes[0], "figure = 'Axes'"),
        (lambda results: figure(results).suptitle(r"$\foo$").figure, "Unknown symbol"),
    ],
)
def test_a_value_that_is_no_figure_and_text_that_cannot_be_typeset_are_refused(
    draw, message, tmp_path, monkeypatch
):
    study = dataclasses.replace(STUDY, figures={"mine": draw})
    line = refused(study, tmp_path / "r", monkeypatch)
    assert line.startswith("study 'tiny': figure 'mine' cannot be drawn (ConfigError: ")
    assert message in line


def test_a_label_that_cannot_be_typeset_is_refused(tmp_path, monkeypatch):
    label = lambda old: [old[0], dataclasses.replace(old[1], label=r"$\foo$ and more")]
    study = dataclasses.replace(STUDY, plan=plan_with(contenders=label))
    assert "cannot be typeset" in refused(study, tmp_path / "r", monkeypatch)


def with_learner(**functions):
    """Returns a study with another learner, which answers 0 except where `functions` differ."""
    zero = md.Learner(lambda key: jnp.zeros(3), lambda s, x: jnp.zeros(2), lambda s, x, y: s)
    contender = md.Contender("own", "own", zero._replace(**functions), "reference")
    return dataclasses.replace(STUDY, plan=plan_with(contenders=lambda old: [*old, contender]))


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"init": lambda: 0}, "takes 0 positional arguments but 1 was given"),
        ({"predict": lambda s, x: x if x[0] > 0 else -x}, "TracerBoolConversionError"),
        ({"update": lambda s, x, y: None}, "update = PyTreeDef(None): must keep the str"),
        ({"update": lambda s, x, y: jnp.zeros(4)}, "update = ((4,), 'float32'): must keep init's"),
        ({"init": lambda key: jnp.zeros(3, int), "update": lambda s, x, y: s + 0.1}, "'int32'"),
        ({"diagnose": lambda s: {"mode_strength": s.sum()}}, "this name is taken"),
        ({"diagnose": lambda s: {"unexplained": s.sum()}}, "this name is taken"),
        ({"diagnose": lambda s: s}, "AttributeError"),
    ],
)
def test_a_learner_that_cannot_be_stepped_is_named(functions, message):
    plan = with_learner(**functions).plan(Config())
    tasks, contender = plan.measurements[-1].tasks, plan.comparisons[0].contenders[-1]
    checks = lambda: (bytes_needed(tasks, contender, 2), check_step(tasks, contender))
    with pytest.raises(ConfigError) as caught:
        checks()
    assert str(caught.value).startswith("contender 'own' cannot ")
    assert message in str(caught.value)


def test_a_learner_that_cannot_be_stepped_is_refused_before_there_is_a_folder(
    tmp_path, monkeypatch
):
    """Its answers have one number where two are expected, and broadcasting would hide the error."""
    study = with_learner(predict=lambda state, x: jnp.ones(1))
    line = refused(study, tmp_path / "r", monkeypatch)
    assert line.startswith("contender 'own' cannot be run on 'in_distribution' (")


def test_a_criterion_whose_fields_have_wrong_types_is_refused():
    for changes, message in (
        ({"expected": None}, "expected of a criterion"),
        ({"low": "x"}, "could n"),
    ):
        fields = {"name": "a", "value": 1, "low": 0, "high": 2, "expected": "b", "passed": None}
        criterion = object.__new__(md.Criterion)  # `__init__` checks types, but only in tests
        vars(criterion).update(fields | changes)
        with pytest.raises((ConfigError, ValueError), match=message):
            criterion.__post_init__()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clock": "steps"}, "clock = 'steps': choose from observations, updates"),
        ({"clock": "updates"}, "times = None: of contender 'own', which counts updates"),
        ({"batch": 0}, "batch = 0: of contender 'own', must be a whole number from 1"),
        ({"batch": 4, "points": 2}, "points = 2: of contender 'own', must be at least its batch"),
    ],
)
def test_impossible_settings_of_a_learner_are_refused(fields, message):
    with pytest.raises(ConfigError) as caught:
        with_learner(**fields).plan(Config())
    assert str(caught.value).startswith(message)


def without_metrics(domain, meta):
    return md.Objective(lambda params, keys: jnp.float32(0))


def of_several_numbers(domain, meta):
    return md.Objective(lambda params, keys: (jnp.zeros(2), {"loss": jnp.float32(0)}))


def of_whole_numbers(domain, meta):
    return md.Objective(lambda params, keys: (jnp.float32(0), {"solved": jnp.bool_(True)}))


def of_other_metrics_later(domain, meta):
    loss = lambda params, keys: (jnp.float32(0), {})
    later = lambda params, keys: (jnp.float32(0), {"loss": jnp.float32(0)})
    return md.Objective(loss, at=lambda step: md.Objective(later))


def of_several_numbers_later(domain, meta):
    loss = lambda params, keys: (jnp.float32(0), {})
    later = lambda params, keys: (jnp.zeros(2), {})
    return md.Objective(loss, at=lambda step: md.Objective(later))


def that_branches_on_the_step(domain, meta):
    loss = lambda params, keys: (jnp.float32(0), {})
    return md.Objective(loss, at=lambda step: md.Objective(loss) if step > 1 else None)


def failing_objective(domain, meta):
    return md.Objective(lambda params, keys: (params["no such"], {}))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (without_metrics, "TypeError"),
        (of_several_numbers, "loss.shape = (2,): must be one number"),
        (of_whole_numbers, "solved.dtype = 'bool': must be a floating-point type"),
        (of_other_metrics_later, "['loss: float32']: must be the same at every outer step, []"),
        (of_several_numbers_later, "loss.shape = (2,): must be one number"),
        (that_branches_on_the_step, "TracerBoolConversionError"),
        (failing_objective, "KeyError"),
    ],
)
def test_an_objective_that_cannot_be_computed_is_refused(objective, message, tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, plan=plan_with(objective=lambda _: objective))
    line = refused(study, tmp_path / "r", monkeypatch)
    assert line.startswith("the objective of lstm cannot be computed (")
    assert message in line


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda config: config.domian, "study 'tiny': its plan cannot be made (AttributeError"),
        (lambda config: None, "plan = None: must return a `metadyn.Plan`"),
        (plan_with(objective=lambda _: lambda domain, meta: 1), "objective = 1: of 'lstm', must"),
        (plan_with(domain=lambda d: dataclasses.replace(d, sigma=-1.0)), "sigma = -1.0: must be"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(broken, message, tmp_path, monkeypatch):
    line = refused(dataclasses.replace(STUDY, plan=broken), tmp_path / "r", monkeypatch)
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name of a study = 'a/b'"),
        ({"figures": {"../f": figure}}, "name of a figure = '../f'"),
        ({"presets": {"quick": Config}}, "preset 'quick' = <class"),
    ],
)
def test_invalid_fields_of_a_study_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(STUDY, **changes)


@dataclasses.dataclass(frozen=True)
class ConfigWithOwn(Config):
    """A configuration with a setting of its own."""

    own: object = 0.0


def test_a_setting_that_cannot_be_stored_is_refused_and_nan_equals_itself(tmp_path, monkeypatch):
    study = lambda value: dataclasses.replace(STUDY, presets={"quick": ConfigWithOwn(own=value)})
    assert [*differing({"a": float("nan")}, {"a": float("nan")})] == []
    assert [*differing({"a": float("nan")}, {"a": 1.0})] != []
    line = refused(study(np.zeros(2)), tmp_path / "r", monkeypatch)
    assert line.startswith("--own = array([0., 0.]) cannot be stored: use numbers")


def failing(results):
    """Fails on the measurements, but not in the rehearsal, which has fewer tasks."""
    if results["in_distribution", "lstm"].sizes["task"] == Config().measure.tasks:
        Path("/no/such/background.png").read_bytes()
    return figure(results)


def failing_criteria(config, results):
    failing(results)
    yield from criteria(config, results)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"figures": {"own": failing}}, "figure 'own' cannot be drawn (FileNotFoundError: "),
        ({"criteria": failing_criteria}, "its criteria cannot be computed (FileNotFoundError: "),
    ],
)
def test_an_error_in_a_study_after_training_is_named_and_the_measurements_are_kept(
    broken, message, run_copy
):
    (run_copy / "summary.json").unlink()
    with pytest.raises(ConfigError) as caught:
        run(dataclasses.replace(STUDY, **broken), run_copy)
    assert str(caught.value).startswith(f"study 'tiny': {message}")
    folder = RunFolder(run_copy)
    assert folder.measurements()["x4"] == ["bayes", "lstm"]
    assert folder.steps() == [0, 1, 4]
    before = (folder.path / "measurements" / "x4" / "lstm").stat().st_mtime_ns
    assert run(STUDY, run_copy)["study"] == "tiny"
    assert (folder.path / "measurements" / "x4" / "lstm").stat().st_mtime_ns == before


def one_too_many(read):
    """Returns a probe's `read` that gives one strength more than there are modes."""

    def wrong(task, answers):
        readings = read(task, answers)
        return {**readings, "strength": jnp.append(readings["strength"], 0.0)}

    return wrong


def without_strength(read):
    return lambda task, answers: {"strengths": read(task, answers)["strength"]}


def with_more(read):
    return lambda task, answers: {**read(task, answers), "norm": jnp.sum(answers**2)}


def raising(read):
    return lambda task, answers: {"strength": task.no_such_thing}


def with_wrong_probe(task_set, wrong):
    """Returns a change of a comparison's task sets: the probe of one of them reads wrongly."""

    def change(sets):
        for tasks in sets:
            if tasks.name == task_set:
                ((name, probe),) = tasks.probes.items()
                wrong_probe = dataclasses.replace(probe, read=wrong(probe.read))
                tasks = dataclasses.replace(tasks, probes={name: wrong_probe})
            yield tasks

    return lambda sets: list(change(sets))


@pytest.mark.parametrize("task_set", ["in_distribution", "x4"])  # the criteria read the first
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (one_too_many, "must return 'strength' of shape (2,)"),
        (without_strength, "must return 'strength' of shape (2,)"),
        (with_more, "norm"),
        (raising, "no_such_thing"),
    ],
)
def test_a_probe_that_reads_other_than_it_declares_is_refused(
    wrong, message, task_set, tmp_path, monkeypatch
):
    study = dataclasses.replace(STUDY, plan=plan_with(sets=with_wrong_probe(task_set, wrong)))
    line = refused(study, tmp_path / "r", monkeypatch)
    assert "probe 'mode_strength'" in line
    assert message in line


def test_a_meta_learner_that_its_own_check_refuses_is_refused(tmp_path, monkeypatch):
    def check(meta):
        raise ConfigError("it sees the future")

    monkeypatch.setattr(type(LSTMConfig(hidden=4).make(Config().domain)), "check", check)
    assert refused(STUDY, tmp_path / "r", monkeypatch) == "it sees the future"


@pytest.mark.parametrize("names", [["mode_strength"], ["far", "far"]])
def test_a_further_probe_does_not_replace_another(names, tmp_path, monkeypatch):
    study = STUDY
    for name in names:
        study = study.probing("probed", **{name: lambda tasks: tasks.domain.probe(6)})
    line = refused(study, tmp_path / "r", monkeypatch)
    assert f"probe = '{names[-1]}': " in line
    assert "of this name: choose another" in line


@pytest.mark.parametrize(
    ("name", "extras", "message"),
    [
        ("loss", (), "probe 'loss' = 'loss': this name is taken"),
        ("kind", (), "probe 'kind' = 'kind': this name is taken"),
        ("a/b", (), "name of a probe = 'a/b': must be made of letters"),
        ("p", ("strengths", "strengths"), "this name is taken"),
        ("other", ("mode_value",), "probe 'other' = 'other_mode_value': this name is taken"),
        ("off_diagonal", (), "probe 'off_diagonal' = 'off_diagonal': this name is taken"),
    ],
)
def test_a_probe_must_not_record_under_a_name_that_is_taken(
    name, extras, message, tmp_path, monkeypatch
):
    """Otherwise a recording of the same name would be lost."""

    def change(sets):
        for tasks in sets:
            ((old_name, old_probe),) = tasks.probes.items()
            new_probe = dataclasses.replace(
                old_probe,
                modes=md.Modes((1.0, 2.0), "mode"),
                read=lambda task, answers: {
                    "strength": answers[:2, 0], **dict.fromkeys(extras, answers[0, 0])
                },
                extras=dict.fromkeys(extras, ()),
            )  # fmt: skip
            added = {name: new_probe} if name != "p" else {"p": new_probe, "p_strengths": new_probe}
            yield dataclasses.replace(tasks, probes={old_name: old_probe, **added})

    study = dataclasses.replace(STUDY, plan=plan_with(sets=lambda sets: [*change(sets)]))
    assert message in refused(study, tmp_path / "r", monkeypatch)


def test_a_learner_that_branches_on_a_number_of_its_state_is_refused():
    """Its state is a Python number, which is concrete until the inner loop traces it."""
    domain = LinearRegression(2, 2)
    learner = md.Learner(
        lambda key: 0.0,
        lambda state, x: jnp.zeros(2) if state > 0 else jnp.ones(2),
        lambda state, x, y: state + 1.0,
    )
    tasks = dataclasses.replace(domain.evaluation(6), size=4)
    with pytest.raises(ConfigError, match=r"contender 'mine' cannot be run on .*TracerBool"):
        check_step(tasks, md.Contender("mine", "mine", learner))


def test_unknown_kinds_of_learners_are_refused(finished_run):
    results = RunFolder(finished_run[0]).results()
    with pytest.raises(ConfigError, match="kinds = 'metas': choose from"):
        results.learners("in_distribution", "metas")


def test_a_figure_of_an_unknown_task_set_names_the_known_ones(finished_run):
    results = RunFolder(finished_run[0]).results()
    pattern = r"task_set = 'in_distrbution': has no meta learner: choose from .*'in_distribution'"
    with pytest.raises(ConfigError, match=pattern):
        figures.strengths_on("in_distrbution", "meta")(results)


@pytest.mark.parametrize("seed", [2**32, -1, 1.5, "a", None])
def test_a_seed_that_does_not_give_a_key_of_its_own_in_jax_is_refused(seed, tmp_path):
    config = STUDY.presets["quick"]
    with pytest.raises(ConfigError, match=r"seed = .*: must be a whole number from 0 to"):
        runner.run_study.__wrapped__(STUDY, "quick", seed, config, tmp_path / "r", Progress(None))
    assert not (tmp_path / "r").exists()


def test_numbers_beyond_what_jax_counts_to_are_refused():
    with pytest.raises(ConfigError, match="times = 4294967297: must be below 2147483648"):
        inner.checked_times((0, 2**32 + 1))
    with pytest.raises(ConfigError, match="updates = 3000000000: must be from 0 to below"):
        DescentConfig(updates=3_000_000_000)
    for config, name in ((DescentConfig, "records"), (md.OuterConfig, "checkpoints")):
        with pytest.raises(ConfigError, match=rf"{name} = 2147483647: .*at most 1,000,000"):
            config(**{name: 2**31 - 1})


def test_two_contenders_of_one_name_are_refused(tmp_path, monkeypatch):
    study = dataclasses.replace(
        STUDY, plan=plan_with(contenders=lambda contenders: [*contenders, contenders[-1]])
    )
    line = refused(study, tmp_path / "r", monkeypatch)
    assert line == "name = 'bayes': two contenders have this name: choose another"


def test_a_meta_learner_without_bayes_is_refused(tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, plan=plan_with(contenders=lambda contenders: contenders[:1]))
    line = refused(study, tmp_path / "r", monkeypatch)
    assert (
        "contenders of kind 'bayes' = 0: comparison of LinearRegression has meta-learners" in line
    )
    assert "exactly one to compare with" in line


def test_two_measurements_of_one_name_are_refused(tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, plan=plan_with(sets=lambda sets: [*sets, sets[-1]]))
    line = refused(study, tmp_path / "r", monkeypatch)
    assert "('x4', 'lstm')" in line


def test_a_study_whose_plan_was_edited_does_not_go_on_in_the_same_folder(run_copy):
    """The configuration is the same, but the network, a task set, a rate or the noise is not."""

    def wider(contenders):
        meta = LSTMConfig(hidden=5).make(Config().domain)
        return [dataclasses.replace(contenders[0], learner=meta), *contenders[1:]]

    def faster(contenders):
        outer = dataclasses.replace(Config().outer, learning_rate=0.5)
        return [dataclasses.replace(contenders[0], own=outer), *contenders[1:]]

    def noisier(sets):
        domain = LinearRegression(2, 2, sigma=0.7, steps=3)
        return [dataclasses.replace(sets[0], domain=domain), *sets[1:]]

    edits = [{"contenders": wider}, {"sets": lambda sets: sets[:1]}]
    for changes in [*edits, {"contenders": faster}, {"sets": noisier}]:
        edited = dataclasses.replace(STUDY, plan=plan_with(**changes))
        with pytest.raises(ConfigError, match=r"holds a run with plan\."):
            run(edited, run_copy)
    assert run(STUDY, run_copy)["study"] == "tiny"


def test_two_meta_learners_of_one_name_and_names_that_are_no_folders_are_refused():
    original = comparison(Config())
    with pytest.raises(ConfigError, match="two meta-learners have this name"):
        md.Plan(Config().outer, [original, original])
    for name in ("a/b", "x.part", "x.damaged-2", "", ".x"):
        with pytest.raises(ConfigError, match="name of a"):
            dataclasses.replace(original.bayes, name=name)
        with pytest.raises(ConfigError, match="name of a"):
            dataclasses.replace(original.sets[0], name=name)
