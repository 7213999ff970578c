"""The least study there is: what fault and two-process tests run, since they start it often."""

import dataclasses

import numpy as np

import metadyn
from metadyn import dynamics
from metadyn.domains.linear import LinearRegression
from metadyn.learners.bayes import bayes_linear
from metadyn.learners.lstm import LSTMConfig, LSTMMetaLearner
from metadyn.store import HELDOUT, TRACKED


@dataclasses.dataclass(frozen=True)
class Config:
    """An LSTM of four units on 2 × 2 tasks."""

    domain: LinearRegression = LinearRegression(2, 2, steps=3)
    lstm: LSTMConfig = LSTMConfig(hidden=4)
    outer: metadyn.OuterConfig = metadyn.OuterConfig(
        steps=4000, batch=8, seeds=1, warmup=1, checkpoints=6, dispatch=20
    )
    tasks: int = 8


def plan(config: Config) -> metadyn.Plan:
    """One meta-learner, Bayes, one measurement of each."""
    domain, times = config.domain, tuple(range(config.domain.steps + 1))
    meta = LSTMMetaLearner(domain, config.lstm)
    probe = domain.probe(6)
    coords = {"singular_value": ("mode", [1.0, 0.5])}
    about = {"mode_coordinate": "singular_value", "mode_label": "singular value", "p": 0.5}
    sets = {
        name: metadyn.TaskSet(
            name, domain, domain.evaluation_task, config.tasks, np.float32([1, 0.5]), probe,
            coords, about,
        )
        for name in (TRACKED, HELDOUT, "in_distribution")
    }  # fmt: skip
    lstm = metadyn.Contender("lstm", "LSTM", meta.learner, times, trained=True, panel=0)
    bayes = metadyn.plain("bayes", "Bayes", bayes_linear(domain), times, panel=1)
    trainee = metadyn.Trainee(meta, metadyn.prediction_loss(domain, meta))
    training = metadyn.Training(lstm, trainee, bayes, sets[TRACKED], sets[HELDOUT])
    both = [(sets["in_distribution"], who) for who in (lstm, bayes)]
    return metadyn.Plan(config.outer, [training], both)


def criteria(config: Config, run: metadyn.RunFolder):
    """One that always passes, from trajectories at all outer steps and a measurement."""
    losses = [run.trajectories(), run.measurement("in_distribution", "lstm")]
    values = [dynamics.samples(data.isel(step=[-1]), "loss") for data in losses[1:]]
    yield metadyn.criterion(
        "loss",
        dynamics.estimate(lambda mean: mean, values[0][:, :, 0]),
        f"finite, at {losses[0].sizes['outer_step']} outer steps",
        at_least=0.0,
    )


study = metadyn.Study("tiny", {"quick": Config()}, plan, criteria)
