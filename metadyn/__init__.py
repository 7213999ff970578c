"""metadyn: in what order does a learner pick up the structure of a task?

The public interface, whole. Domains and learners are in `metadyn.domains` and `metadyn.learners`.
"""

from metadyn.base import ConfigError, Domain, Learner, MetaLearner, Probe
from metadyn.inner import measure, run
from metadyn.outer import (
    ActorCriticConfig,
    OuterConfig,
    Trainee,
    Trainer,
    actor_critic,
    prediction_loss,
)
from metadyn.store import RunFolder, load
from metadyn.study import (
    Claim,
    Contender,
    Criterion,
    MeasureConfig,
    Plan,
    Study,
    Table,
    TaskSet,
    Training,
    censored,
    criterion,
    load_studies,
    load_study,
    plain,
    run_study,
)

__all__ = [
    "ActorCriticConfig",
    "Claim",
    "ConfigError",
    "Contender",
    "Criterion",
    "Domain",
    "Learner",
    "MeasureConfig",
    "MetaLearner",
    "OuterConfig",
    "Plan",
    "Probe",
    "RunFolder",
    "Study",
    "Table",
    "TaskSet",
    "Trainee",
    "Trainer",
    "Training",
    "actor_critic",
    "censored",
    "criterion",
    "load",
    "load_studies",
    "load_study",
    "measure",
    "plain",
    "prediction_loss",
    "run",
    "run_study",
]
