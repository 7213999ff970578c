"""The smallest study. Tests of faults and of two processes start it often."""

import dataclasses

import metadyn as md
from metadyn import dynamics
from metadyn.domains.linear import LinearRegression
from metadyn.learners.bayes import bayes_linear
from metadyn.learners.lstm import LSTMConfig


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """An LSTM of four units on 2 × 2 tasks."""

    domain: LinearRegression = LinearRegression(2, 2, steps=3)
    lstm: LSTMConfig = LSTMConfig(hidden=4)
    outer: md.OuterConfig = md.OuterConfig(
        steps=1000, batch=8, seeds=1, schedule="constant", warmup=1, checkpoints=6, dispatch=20
    )
    measure: md.MeasureConfig = md.MeasureConfig(
        tasks=8, tracked_tasks=8, heldout_tasks=8, probe_points=6
    )


def plan(config: Config) -> md.Plan:
    """Plans one meta-learner, Bayes, and one measurement of each."""
    domain, sizes = config.domain, config.measure
    bayes = md.Contender("bayes", "Bayes", bayes_linear(domain), "bayes")
    task_sets = [sizes.sized(domain.evaluation(sizes.probe_points))]
    contenders = [config.meta_learner(domain), bayes]
    return md.Plan(config.outer, [md.Comparison(domain, contenders, task_sets, measure=sizes)])


def criteria(config: Config, results: md.Results):
    """Yields a criterion that always passes, from trajectories of all steps and a measurement."""
    steps = results["tracked", config.meta].sizes["outer_step"]
    last = dynamics.samples(results["in_distribution", config.meta], "loss")[:, :, -1]
    estimate = dynamics.estimate(lambda mean: mean, last)
    yield md.criterion("loss", estimate, f"finite, at {steps} outer steps", at_least=0.0)


study = md.Study("tiny", {"quick": Config()}, plan, criteria)
