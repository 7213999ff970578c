"""What is wrong with a study is found, and named, before anything is trained or written."""

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
    """An LSTM of four units on 2 × 2 tasks."""

    domain: LinearRegression = LinearRegression(2, 2, steps=3)
    lstm: LSTMConfig = LSTMConfig(hidden=4)
    outer: md.OuterConfig = md.OuterConfig(steps=4, batch=8, seeds=2, warmup=1, checkpoints=2)
    measure: md.MeasureConfig = md.MeasureConfig(
        tasks=8, shifted_tasks=8, tracked_tasks=8, heldout_tasks=8, probe_points=6
    )


def comparison(config):
    """The LSTM and Bayes on two sets, of which the criteria read one."""
    domain, sizes = config.domain, config.measure
    bayes = md.Contender("bayes", "Bayes", bayes_linear(domain), "bayes")
    sets = [
        sizes.sized(domain.evaluation(sizes.probe_points)),
        sizes.sized(domain.evaluation(sizes.probe_points, 4), "shifted_tasks", "x4"),
    ]
    return md.Comparison(domain, [config.meta_learner(domain), bayes], sets, measure=sizes)


def plan(config):
    return md.Plan(config.outer, [comparison(config)])


def changed(**changes):
    """A plan of that comparison, changed: each change is a function of what it was."""

    def plan(config):
        whole = comparison(config)
        fields = {name: change(getattr(whole, name)) for name, change in changes.items()}
        return md.Plan(config.outer, [dataclasses.replace(whole, **fields)])

    return plan


def loss_of(results, task_set, learner):
    last = dynamics.samples(results[task_set, learner], "loss")[:, :, -1]
    return md.criterion("loss", dynamics.estimate(np.asarray, last), "at least 0", at_least=0.0)


def criteria(config, results):
    yield loss_of(results, "in_distribution", "lstm")
    yield from beyond_bayes(results, within=0.2)
    yield from excess(results)


def figure(results):
    return figures.mode_strength(results.learners("in_distribution"))


def test_of_a_plan_that_is_too_large_the_setting_that_grew_most_is_named():
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
def finished(tmp_path_factory):
    """A run of the study, and its summary."""
    out = tmp_path_factory.mktemp("runs") / "r"
    return out, run(STUDY, out)


@pytest.fixture
def done(finished, tmp_path):
    """A copy of that run."""
    return Path(shutil.copytree(finished[0], tmp_path / "r"))


def refused(study, out, monkeypatch):
    """The one line with which a study is refused, before there is a folder or an outer loop."""

    def began(*arguments):
        raise AssertionError("training was begun")

    monkeypatch.setattr(runner, "OuterLoop", began)
    with pytest.raises(ConfigError) as caught:
        run(study, out)
    assert not out.exists()
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    return said


def test_a_study_that_is_right_is_rehearsed_silently_and_runs(finished, tmp_path):
    config = STUDY.presets["quick"]
    rehearsed = runner.rehearse(STUDY, config, plan(config))
    assert list(tmp_path.iterdir()) == []
    out, summary = finished
    rows = [*summary["criteria"], *summary["reported"]]
    assert {each.name for each in rehearsed} == {row["name"] for row in rows}
    assert {row["name"] for row in summary["criteria"]} == {"loss", "lstm_minus_bayes_slope"}
    assert (out / "figures" / "own.png").is_file()


def test_a_figure_of_every_run_that_cannot_be_drawn_is_found_before(tmp_path, monkeypatch):
    def broken(training):
        raise ValueError("no such axis")

    monkeypatch.setattr(figures, "outer_learning", broken)
    broken.__name__ = "outer_learning"
    said = refused(STUDY, tmp_path / "r", monkeypatch)
    assert "figure 'outer_learning' cannot be drawn (ValueError: no such axis)" in said


def test_what_cannot_fit_into_the_memory_is_refused_in_a_notebook_too(monkeypatch):
    domain = Config().domain
    learners = {"bayes": bayes_linear(domain)}
    said = r"tasks = 2000000000: bayes on 2,000,000,000 tasks of '\w+' at 4 times would take "
    with pytest.raises(ConfigError, match=said):
        md.measure(domain, learners, tasks=2_000_000_000, points=6, progress=False)
    monkeypatch.setattr(mesh, "memory", lambda split: 1000)
    meta = LSTMConfig(hidden=4).make(domain)
    with pytest.raises(ConfigError, match="seeds = 3: their weights, gradients and moments would"):
        md.train(meta, domain, steps=2, seeds=3, progress=False)


def test_what_is_not_tracked_is_measured_once_trained_alone(tmp_path):
    one = lambda config, results: [loss_of(results, "in_distribution", "lstm")]
    once = lambda sizes: dataclasses.replace(sizes, tracked_tasks=0, heldout_tasks=0)
    plan = changed(measure=once, sets=lambda sets: sets[:1])
    study = dataclasses.replace(STUDY, plan=plan, criteria=one, figures={})
    summary = run(study, tmp_path / "r")
    assert [row["name"] for row in summary["criteria"]] == ["loss"]
    stored = RunFolder(tmp_path / "r")
    assert [*stored.measurements()] == ["in_distribution"]
    assert not stored.outer_steps()
    assert stored.steps() == [*Config().outer.checkpoint_steps]


def test_a_learner_whose_loss_is_not_finite_is_named(tmp_path):
    """It answers NaN to some inputs; the others are measured and judged all the same."""
    bayes = bayes_linear(Config().domain)
    predict = lambda state, x: jnp.where(x[0] > 1, jnp.nan, bayes.predict(state, x))
    halting = md.Contender("halting", "halting", bayes._replace(predict=predict), "ordinary")
    plan = changed(contenders=lambda old: [*old, halting], sets=lambda sets: sets[:1])
    one = lambda config, results: [loss_of(results, "in_distribution", "lstm")]
    study = dataclasses.replace(STUDY, plan=plan, criteria=one, figures={})
    with pytest.warns(ConfigWarning) as said:
        assert np.isfinite(run(study, tmp_path / "r")["criteria"][0]["value"])
    (warned,) = said
    found = re.match(r"the loss of halting on in_dist.* in (\d) of 8 episodes", str(warned.message))
    data = RunFolder(tmp_path / "r").measurement("in_distribution", "halting")
    assert int(found[1]) == np.isnan(data["loss"][:, 1:]).any("step").sum() > 0


def test_sets_are_not_called_as_those_of_checkpoints(tmp_path, monkeypatch):
    rename = lambda sets: [dataclasses.replace(sets[0], name="heldout_x"), *sets[1:]]
    study = dataclasses.replace(STUDY, plan=changed(sets=rename))
    says = "set of tasks = 'heldout_x': this name is reserved for sets measured"
    assert says in refused(study, tmp_path / "r", monkeypatch)


def test_a_closed_form_that_cannot_be_stored_is_refused(tmp_path, monkeypatch):
    curve = np.zeros((3, 2))
    sgd = md.Contender("sgd", "SGD", bayes_linear(Config().domain), "ordinary", curve=curve)
    study = dataclasses.replace(STUDY, plan=changed(contenders=lambda old: [*old, sgd]))
    says = r"curve = \(3, 2\): .*'sgd', must be of shape \(4, 2\)"
    assert re.search(says, refused(study, tmp_path / "r", monkeypatch))


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
    bayes = lambda of: dataclasses.replace(of, times=np.arange(4))
    study = dataclasses.replace(STUDY, plan=changed(contenders=lambda of: [of[0], bayes(of[1])]))
    assert run(study, tmp_path / "r")["study"] == "tiny"


def test_what_is_measured_beside_the_contenders_is_none_that_would_need_training():
    whole = comparison(Config())
    (meta, _), tasks = whole.contenders, whole.sets[0]
    other = dataclasses.replace(meta, name="other")
    for who in (other, other.remade(lambda learner: learner, name="copy")):
        with pytest.raises(
            ConfigError, match=r"derived_from = 'other': .* needs this meta-learner"
        ):
            dataclasses.replace(whole, pairs=[(tasks, who)])
    copy = meta.remade(lambda learner: learner, name="copy")
    *_, last = dataclasses.replace(whole, pairs=[(tasks, copy)]).measurements
    assert (last.tasks, last.contender) == (tasks, copy)
    # An ordinary learner takes no outer parameters, whatever it is called.
    plain = md.Contender(meta.name, "Bayes", bayes_linear(Config().domain))
    *_, last = dataclasses.replace(whole, pairs=[(tasks, plain)]).measurements
    assert last.arguments({last.meta: "weights"}, None)[2] == ()


def test_a_derived_learner_says_whose_parameters_it_takes():
    meta = LSTMConfig(hidden=4).make(Config().domain)
    with pytest.raises(ConfigError, match="derived_from = '': contender 'd' is derived: name"):
        md.Contender("d", "D", md.Derived(meta, meta.learner))
    with pytest.raises(ConfigError, match=r"kind = 'bayes': of contender 'd', a Derived: choose"):
        md.Contender("d", "D", md.Derived(meta, meta.learner), "bayes", derived_from="lstm")


def test_what_is_remade_of_another_learner_has_no_closed_form_of_its_own():
    """And is that of the parameters of the same meta-learner, however often it is remade."""
    domain = Config().domain
    bayes = md.Contender("b", "B", bayes_linear(domain), curve=np.zeros((4, 2)))
    other = bayes.remade(lambda learner: learner._replace(batch=2), name="c", kind="reference")
    assert (other.name, other.kind, other.curve) == ("c", "reference", None)
    assert other.learner.batch == 2
    meta = md.Contender("lstm", "LSTM", LSTMConfig(hidden=4).make(domain))
    once = meta.remade(lambda learner: learner._replace(batch=2), name="d")
    again = once.remade(lambda learner: learner._replace(points=3), name="e")
    params = meta.learner.init(jax.random.key(0))
    found = [each.make(params) for each in (once, again)]
    assert [(each.batch, each.points) for each in found] == [(2, None), (2, 3)]
    assert [(each.derived_from, each.trained, each.kind) for each in (once, again)] == [
        ("lstm", False, "reference")
    ] * 2


def test_what_is_tracked_has_a_probe_of_mode_strengths(tmp_path, monkeypatch):
    class Renamed(LinearRegression):
        def evaluation(self, *arguments):
            tasks = super().evaluation(*arguments)
            return dataclasses.replace(tasks, probes={"mine": tasks.probes["mode_strength"]})

    plan = changed(domain=lambda _: Renamed(2, 2, steps=3), sets=lambda _: [])
    said = refused(dataclasses.replace(STUDY, plan=plan), tmp_path / "r", monkeypatch)
    assert said.startswith("probes = ['mine']: of ")


def test_a_run_whose_criteria_were_edited_since_is_judged_anew(done, monkeypatch):
    measured = done / "measurements" / "in_distribution" / "lstm"
    before = measured.stat().st_mtime_ns

    def edited(config, results):
        last = dynamics.samples(results["in_distribution", "lstm"], "loss")[:, :, -1]
        found = dynamics.estimate(np.asarray, last)
        yield md.criterion("loss", found, "at least 0", at_least=1e9)  # the words are as before

    monkeypatch.setattr(runner, "environment", lambda: {"processor": "another"})
    summary = run(dataclasses.replace(STUDY, criteria=edited), done)
    assert [(row["name"], row["passed"]) for row in summary["criteria"]] == [("loss", False)]
    assert measured.stat().st_mtime_ns == before
    assert summary["environment"]["processor"] != "another"  # it was not run there
    assert RunFolder(done).summary() == summary


def test_a_run_that_is_done_is_not_judged_anew_whatever_its_criteria_say_of_its_size(
    done, monkeypatch
):
    def sized(config, results):
        tasks = results["in_distribution", "lstm"].sizes["task"]
        yield md.criterion("loss", dynamics.exact(1.0), f"of {tasks} tasks", at_least=0.0)

    study = dataclasses.replace(STUDY, criteria=sized)
    with monkeypatch.context() as patched:  # nothing is compiled for it
        patched.setattr(runner.inner.measure, "lower", lambda *given: 1 / 0)
        run(study, done)  # other criteria: judged
    summary = done / "summary.json"
    before = summary.stat().st_mtime_ns
    run(study, done)
    assert summary.stat().st_mtime_ns == before


def test_what_cannot_be_compiled_is_found_before_training(tmp_path, monkeypatch):
    """A program that measures what is trained, on 6 tasks, once it is, and cannot be compiled."""
    sizes, lower = dataclasses.replace(Config().measure, tasks=6), runner.inner.measure.lower
    study = dataclasses.replace(STUDY, presets={"quick": Config(measure=sizes)})

    def failing(*given):
        return 1 / 0 if len(given[-1]) == 6 else lower(*given)

    monkeypatch.setattr(runner.inner.measure, "lower", failing)
    with pytest.raises(ZeroDivisionError):
        run(study, tmp_path / "r")
    assert not RunFolder(tmp_path / "r").steps()


class Killed(BaseException):
    """A process that is gone at once."""


def test_the_state_is_stored_from_time_to_time_whatever_checkpoints_are_planned(
    tmp_path, monkeypatch
):
    """A run that is killed loses some minutes, not all since a checkpoint; old states go."""
    config = STUDY.presets["quick"]
    few = dataclasses.replace(config.outer, steps=9, checkpoints=1, dispatch=1)
    study = dataclasses.replace(STUDY, presets={"quick": dataclasses.replace(config, outer=few)})
    run(study, tmp_path / "whole")
    assert RunFolder(tmp_path / "whole").steps() == [0, 9]

    def killed(loop, step, metrics):
        if step == 7:
            raise Killed

    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(runner.OuterLoop, "check_finite", killed)
        with pytest.raises(Killed):
            run(study, tmp_path / "killed")
    assert RunFolder(tmp_path / "killed").steps() == [0, 5, 6]
    restored, restore = [], RunFolder.restore_state
    noted = lambda folder, step, like: restored.append(step) or restore(folder, step, like)
    monkeypatch.setattr(RunFolder, "restore_state", noted)
    run(study, tmp_path / "killed")
    assert restored[0] == 6
    assert RunFolder(tmp_path / "killed").steps() == [0, 8, 9]
    whole, other = (RunFolder(tmp_path / name).state(9) for name in ("whole", "killed"))
    chex.assert_trees_all_equal(whole, other)


def test_a_page_that_was_not_written_is_written_when_the_run_is_asked_for_again(done):
    page = done / "report.html"
    page.unlink()
    run(STUDY, done)
    assert page.is_file()


def unknown_learner(config, results):
    yield loss_of(results, "in_distribution", "nobody")


def unknown_set(config, results):
    yield loss_of(results, "x5", "lstm")


def unknown_reading(config, results):
    yield from criteria(config, results)
    results["x4", "bayes"]["saturated_gates"]


def twice(config, results):
    yield from criteria(config, results)
    yield loss_of(results, "x4", "lstm")


def late(config, results):
    yield loss_of(results, "in_distribution", "lstm")
    raise ValueError("of two\nlines")


@pytest.mark.parametrize(
    ("criteria", "says"),
    [
        (unknown_learner, "'nobody' on 'in_distribution' is not measured in this run"),
        (unknown_set, "'lstm' on 'x5' is not measured in this run"),
        (unknown_reading, "saturated_gates"),
        (late, "ValueError: of two lines"),
        (twice, "criterion = 'loss': two have this name"),
        (lambda config, results: [1], "'int' object has no attribute 'name'"),
    ],
)
def test_criteria_that_cannot_be_had(criteria, says, tmp_path, monkeypatch):
    said = refused(dataclasses.replace(STUDY, criteria=criteria), tmp_path / "r", monkeypatch)
    assert said.startswith("study 'tiny': ")
    assert says in said


def test_a_figure_that_cannot_be_drawn(tmp_path, monkeypatch):
    def broken(results):
        return figure(results).no_such_thing

    both = {"own": figure, "broken": broken}
    said = refused(dataclasses.replace(STUDY, figures=both), tmp_path / "r", monkeypatch)
    assert said.startswith("study 'tiny': figure 'broken' cannot be drawn (AttributeError: ")


def test_a_figure_that_fails_as_it_is_rendered(tmp_path, monkeypatch):
    def broken(results):
        made = figure(results)
        made.axes[0].xaxis.set_major_formatter(lambda x, place: [][int(x)])
        return made

    study = dataclasses.replace(STUDY, figures={"broken": broken})
    said = refused(study, tmp_path / "r", monkeypatch)
    assert said.startswith("study 'tiny': figure 'broken' cannot be drawn (IndexError: ")


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda results: None, "figure = 'NoneType': must be a `Figure`"),
        (lambda results: figure(results).axes[0], "figure = 'Axes'"),
        (lambda results: figure(results).suptitle(r"$\foo$").figure, "Unknown symbol"),
    ],
)
def test_what_is_no_figure_or_has_words_that_cannot_be_set(draw, says, tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, figures={"mine": draw})
    said = refused(study, tmp_path / "r", monkeypatch)
    assert said.startswith("study 'tiny': figure 'mine' cannot be drawn (ConfigError: ")
    assert says in said


def test_a_label_that_cannot_be_set(tmp_path, monkeypatch):
    label = lambda old: [old[0], dataclasses.replace(old[1], label=r"$\foo$ and more")]
    study = dataclasses.replace(STUDY, plan=changed(contenders=label))
    assert "cannot be typeset" in refused(study, tmp_path / "r", monkeypatch)


def with_learner(**functions):
    """A plan with a learner beside that answers 0, but for some of what it is made of."""
    zero = md.Learner(lambda key: jnp.zeros(3), lambda s, x: jnp.zeros(2), lambda s, x, y: s)
    own = md.Contender("own", "own", zero._replace(**functions), "reference")
    return dataclasses.replace(STUDY, plan=changed(contenders=lambda old: [*old, own]))


@pytest.mark.parametrize(
    ("functions", "says"),
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
def test_a_learner_that_cannot_be_stepped(functions, says):
    made = with_learner(**functions).plan(Config())
    tasks, own = made.measurements[-1].tasks, made.comparisons[0].contenders[-1]
    checks = lambda: (bytes_needed(tasks, own, 2), check_step(tasks, own))
    with pytest.raises(ConfigError) as caught:
        checks()
    assert str(caught.value).startswith("contender 'own' cannot ")
    assert says in str(caught.value)


def test_a_learner_that_cannot_be_stepped_is_refused_before_there_is_a_folder(
    tmp_path, monkeypatch
):
    """Its answers have one number, where two are asked for, and would be spread over both."""
    study = with_learner(predict=lambda state, x: jnp.ones(1))
    said = refused(study, tmp_path / "r", monkeypatch)
    assert said.startswith("contender 'own' cannot be run on 'in_distribution' (")


def test_a_criterion_is_of_words_and_numbers():
    for changes, says in ({"expected": None}, "expected of a criterion"), ({"low": "x"}, "could n"):
        fields = {"name": "a", "value": 1, "low": 0, "high": 2, "expected": "b", "passed": None}
        made = object.__new__(md.Criterion)  # types are checked in tests alone
        vars(made).update(fields | changes)
        with pytest.raises((ConfigError, ValueError), match=says):
            made.__post_init__()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"clock": "steps"}, "clock = 'steps': choose from observations, updates"),
        ({"clock": "updates"}, "times = None: of contender 'own', which counts updates"),
        ({"batch": 0}, "batch = 0: of contender 'own', must be a whole number from 1"),
        ({"batch": 4, "points": 2}, "points = 2: of contender 'own', must be at least its batch"),
    ],
)
def test_settings_of_a_learner_that_cannot_be(fields, says):
    with pytest.raises(ConfigError) as caught:
        with_learner(**fields).plan(Config())
    assert str(caught.value).startswith(says)


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
    ("objective", "says"),
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
def test_an_objective_that_cannot_be_computed(objective, says, tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, plan=changed(objective=lambda _: objective))
    said = refused(study, tmp_path / "r", monkeypatch)
    assert said.startswith("the objective of lstm cannot be computed (")
    assert says in said


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda config: config.domian, "study 'tiny': its plan cannot be made (AttributeError"),
        (lambda config: None, "plan = None: must return a `metadyn.Plan`"),
        (changed(objective=lambda _: lambda domain, meta: 1), "objective = 1: of 'lstm', must"),
        (changed(domain=lambda d: dataclasses.replace(d, sigma=-1.0)), "sigma = -1.0: must be"),
    ],
)
def test_a_plan_that_cannot_be_made(broken, says, tmp_path, monkeypatch):
    said = refused(dataclasses.replace(STUDY, plan=broken), tmp_path / "r", monkeypatch)
    assert said.startswith(says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "a/b"}, "name of a study = 'a/b'"),
        ({"figures": {"../f": figure}}, "name of a figure = '../f'"),
        ({"presets": {"quick": Config}}, "preset 'quick' = <class"),
    ],
)
def test_a_study_that_cannot_be(changes, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        dataclasses.replace(STUDY, **changes)


@dataclasses.dataclass(frozen=True)
class Own(Config):
    """With a setting of its own."""

    own: object = 0.0


def test_a_setting_that_cannot_be_stored_is_refused_and_one_that_is_no_number_is_found_again(
    tmp_path, monkeypatch
):
    study = lambda value: dataclasses.replace(STUDY, presets={"quick": Own(own=value)})
    assert [*differing({"a": float("nan")}, {"a": float("nan")})] == []
    assert [*differing({"a": float("nan")}, {"a": 1.0})] != []
    said = refused(study(np.zeros(2)), tmp_path / "r", monkeypatch)
    assert said.startswith("--own = array([0., 0.]) cannot be stored: use numbers")


def failing(results):
    """A figure that fails on what is measured, and not in the rehearsal, which has fewer tasks."""
    if results["in_distribution", "lstm"].sizes["task"] == Config().measure.tasks:
        Path("/no/such/background.png").read_bytes()
    return figure(results)


def failing_criteria(config, results):
    failing(results)
    yield from criteria(config, results)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"figures": {"own": failing}}, "figure 'own' cannot be drawn (FileNotFoundError: "),
        ({"criteria": failing_criteria}, "its criteria cannot be computed (FileNotFoundError: "),
    ],
)
def test_what_a_study_itself_gets_wrong_is_named_and_the_measurements_are_kept(broken, says, done):
    (done / "summary.json").unlink()
    with pytest.raises(ConfigError) as caught:
        run(dataclasses.replace(STUDY, **broken), done)
    assert str(caught.value).startswith(f"study 'tiny': {says}")
    left = RunFolder(done)
    assert left.measurements()["x4"] == ["bayes", "lstm"]
    assert left.steps() == [0, 1, 4]
    before = (left.path / "measurements" / "x4" / "lstm").stat().st_mtime_ns
    assert run(STUDY, done)["study"] == "tiny"
    assert (left.path / "measurements" / "x4" / "lstm").stat().st_mtime_ns == before


def one_too_many(read):
    """A probe's `read` that gives a strength more than there are modes."""

    def wrong(task, answers):
        found = read(task, answers)
        return {**found, "strength": jnp.append(found["strength"], 0.0)}

    return wrong


def without_strength(read):
    return lambda task, answers: {"strengths": read(task, answers)["strength"]}


def with_more(read):
    return lambda task, answers: {**read(task, answers), "norm": jnp.sum(answers**2)}


def raising(read):
    return lambda task, answers: {"strength": task.no_such_thing}


def reading(task_set, wrong):
    """The change of sets of tasks by which what the probe of one of them reads is wrong."""

    def change(sets):
        for tasks in sets:
            if tasks.name == task_set:
                ((name, probe),) = tasks.probes.items()
                bad = dataclasses.replace(probe, read=wrong(probe.read))
                tasks = dataclasses.replace(tasks, probes={name: bad})
            yield tasks

    return lambda sets: list(change(sets))


@pytest.mark.parametrize("task_set", ["in_distribution", "x4"])  # read by the criteria, or not
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (one_too_many, "must return 'strength' of shape (2,)"),
        (without_strength, "must return 'strength' of shape (2,)"),
        (with_more, "norm"),
        (raising, "no_such_thing"),
    ],
)
def test_a_probe_that_reads_other_than_it_says(wrong, says, task_set, tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, plan=changed(sets=reading(task_set, wrong)))
    said = refused(study, tmp_path / "r", monkeypatch)
    assert "probe 'mode_strength'" in said
    assert says in said


@pytest.mark.parametrize(
    ("probes", "extras", "says"),
    [
        ("loss", (), "probe 'loss' = 'loss': this name is taken"),
        ("kind", (), "probe 'kind' = 'kind': this name is taken"),
        ("a/b", (), "name of a probe = 'a/b': must be made of letters"),
        ("p", ("strengths", "strengths"), "this name is taken"),
        ("other", ("mode_value",), "probe 'other' = 'other_mode_value': this name is taken"),
        ("off_diagonal", (), "probe 'off_diagonal' = 'off_diagonal': this name is taken"),
    ],
)
def test_what_a_probe_records_has_a_name_of_its_own(probes, extras, says, tmp_path, monkeypatch):
    """Not that of what is recorded beside it, which would be lost."""

    def change(sets):
        for tasks in sets:
            ((name, probe),) = tasks.probes.items()
            one = dataclasses.replace(
                probe,
                modes=md.Modes((1.0, 2.0), "mode"),
                read=lambda task, answers: {
                    "strength": answers[:2, 0], **dict.fromkeys(extras, answers[0, 0])
                },
                extras=dict.fromkeys(extras, ()),
            )  # fmt: skip
            more = {probes: one} if probes != "p" else {"p": one, "p_strengths": one}
            yield dataclasses.replace(tasks, probes={name: probe, **more})

    study = dataclasses.replace(STUDY, plan=changed(sets=lambda sets: [*change(sets)]))
    assert says in refused(study, tmp_path / "r", monkeypatch)


def test_a_learner_that_chooses_by_a_number_of_its_state_is_refused():
    """Of Python's numbers, which are concrete until the inner loop traces them."""
    domain = LinearRegression(2, 2)
    learner = md.Learner(
        lambda key: 0.0,
        lambda state, x: jnp.zeros(2) if state > 0 else jnp.ones(2),
        lambda state, x, y: state + 1.0,
    )
    tasks = dataclasses.replace(domain.evaluation(6), size=4)
    with pytest.raises(ConfigError, match=r"contender 'mine' cannot be run on .*TracerBool"):
        check_step(tasks, md.Contender("mine", "mine", learner))


def test_kinds_of_learners_that_there_are_not_are_refused(finished):
    results = RunFolder(finished[0]).results()
    with pytest.raises(ConfigError, match="kinds = 'metas': choose from"):
        results.learners("in_distribution", "metas")


def test_a_figure_of_a_set_of_tasks_that_there_is_not_says_which_there_are(finished):
    results = RunFolder(finished[0]).results()
    said = r"task_set = 'in_distrbution': has no meta learner: choose from .*'in_distribution'"
    with pytest.raises(ConfigError, match=said):
        figures.strengths_on("in_distrbution", "meta")(results)


@pytest.mark.parametrize("seed", [2**32, -1, 1.5, "a", None])
def test_a_seed_of_which_jax_makes_no_key_of_its_own_is_refused(seed, tmp_path):
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


def test_two_contenders_of_one_name(tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, plan=changed(contenders=lambda of: [*of, of[-1]]))
    said = refused(study, tmp_path / "r", monkeypatch)
    assert said == "name = 'bayes': two contenders have this name: choose another"


def test_a_meta_learner_without_bayes(tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, plan=changed(contenders=lambda of: of[:1]))
    said = refused(study, tmp_path / "r", monkeypatch)
    assert (
        "contenders of kind 'bayes' = 0: comparison of LinearRegression has meta-learners" in said
    )
    assert "exactly one to compare with" in said


def test_two_measurements_of_one_name(tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, plan=changed(sets=lambda of: [*of, of[-1]]))
    said = refused(study, tmp_path / "r", monkeypatch)
    assert "('x4', 'lstm')" in said


def test_a_study_whose_plan_was_edited_does_not_go_on_in_the_same_folder(done):
    """Its configuration is the same, but what it compares is not.

    A wider network, another set, another rate, other noise.
    """

    def wider(contenders):
        meta = LSTMConfig(hidden=5).make(Config().domain)
        return [dataclasses.replace(contenders[0], learner=meta), *contenders[1:]]

    def faster(contenders):
        own = dataclasses.replace(Config().outer, learning_rate=0.5)
        return [dataclasses.replace(contenders[0], own=own), *contenders[1:]]

    def noisier(sets):
        domain = LinearRegression(2, 2, sigma=0.7, steps=3)
        return [dataclasses.replace(sets[0], domain=domain), *sets[1:]]

    edits = [{"contenders": wider}, {"sets": lambda sets: sets[:1]}]
    for changes in [*edits, {"contenders": faster}, {"sets": noisier}]:
        edited = dataclasses.replace(STUDY, plan=changed(**changes))
        with pytest.raises(ConfigError, match=r"holds a run with plan\."):
            run(edited, done)
    assert run(STUDY, done)["study"] == "tiny"


def test_two_meta_learners_of_one_name_and_names_that_are_no_folders_are_refused():
    whole = comparison(Config())
    with pytest.raises(ConfigError, match="two meta-learners have this name"):
        md.Plan(Config().outer, [whole, whole])
    for name in ("a/b", "x.part", "x.damaged-2", "", ".x"):
        with pytest.raises(ConfigError, match="name of a"):
            dataclasses.replace(whole.bayes, name=name)
        with pytest.raises(ConfigError, match="name of a"):
            dataclasses.replace(whole.sets[0], name=name)
