"""metadyn: in what order does a learner pick up the structure of a task?

The public interface, whole. Domains and learners are in `metadyn.domains` and `metadyn.learners`.
"""

from metadyn.base import ConfigError, Domain, Learner, MetaLearner, Probe
from metadyn.inner import measure, run
from metadyn.outer import OuterConfig, Trainer, prediction_loss
from metadyn.store import RunFolder, load
from metadyn.study import (
    Contender,
    Criterion,
    MeasureConfig,
    Plan,
    Study,
    TaskSet,
    load_study,
    plain,
    run_study,
)

__all__ = [
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
    "TaskSet",
    "Trainer",
    "load",
    "load_study",
    "measure",
    "plain",
    "prediction_loss",
    "run",
    "run_study",
]
