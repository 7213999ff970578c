"""metadyn: in what order does a learner pick up the structure of a task?

This is the whole public interface, but for domains and learners, which are in `metadyn.domains` and
`metadyn.learners`. Each name is imported when first used, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metadyn.api import Trained, measure, train
    from metadyn.base import (
        Derived,
        Domain,
        Learner,
        MetaLearner,
        Modes,
        Probe,
        Regression,
        TaskSet,
    )
    from metadyn.errors import ConfigError
    from metadyn.inner import observe, run
    from metadyn.learners.networks import Recurrent, Sequence
    from metadyn.objectives import ActorCriticConfig, Objective, actor_critic, prediction_loss
    from metadyn.outer import MetaTraining, OuterConfig, OuterLoop
    from metadyn.runner import run_study
    from metadyn.store import Results, RunFolder, load
    from metadyn.study import (
        Comparison,
        Contender,
        Criterion,
        MeasureConfig,
        Plan,
        Study,
        StudyConfig,
        Table,
        criterion,
        load_studies,
        load_study,
    )

_PUBLIC = {
    "api": "Trained measure train",
    "base": "Derived Domain Learner MetaLearner Modes Probe Regression TaskSet",
    "errors": "ConfigError",
    "inner": "observe run",
    "learners.networks": "Recurrent Sequence",
    "objectives": "ActorCriticConfig Objective actor_critic prediction_loss",
    "outer": "MetaTraining OuterConfig OuterLoop",
    "runner": "run_study",
    "store": "Results RunFolder load",
    "study": "Comparison Contender Criterion MeasureConfig Plan Study StudyConfig Table "
    "criterion load_studies load_study",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'metadyn' has no attribute {name!r}")
    return getattr(import_module(f"metadyn.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
