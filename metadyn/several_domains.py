"""Configurations of studies of several domains, built on the comparisons of each domain's study."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check
from metadyn.study import Comparison, Contender, Network, StudyConfig, load_study

TITLES = {
    "linear": "linear regression",
    "nonlinear": "nonlinear regression",
    "bandit": "contextual bandit",
}
"""Name of each domain in figures and tables."""
STUDIES = {name: load_study(title.replace(" ", "_")) for name, title in TITLES.items()}
SMALL: dict[str, Any] = {
    "linear": LinearRegression(n_x=3, n_y=3),
    "nonlinear": FourierRegression(band(1, 3), steps=20),
    "bandit": ContextualBandit(contexts=3, actions=3, steps=20),
}
"""Small domains with three modes each, for quick presets."""
EVEN = SMALL | {"linear": LinearRegression(n_x=3, n_y=3, spread="even")}
"""The same with evenly spaced singular values, so that even the least mode can be measured."""
SIGN = {"linear": -1, "nonlinear": 1, "bandit": 1}
"""The sign of the figure of merit of a learner that learns one mode after another."""
NETWORKS = get_args(Network)
REGRESSION_ONLY = ("maml", "learned_optimizer")
"""Meta-learners that train a network on squared errors within the episode; none for the bandit."""


@dataclasses.dataclass(frozen=True)
class SeveralDomainsConfig(StudyConfig):
    """Settings of a study of several domains. Subclasses add the domains as fields."""

    of: str = "quick"
    """Preset of the domains' own studies, which gives every setting that is not set here."""

    def domain_config(self, name: str, **fields: Any) -> Any:
        """Returns a domain study's configuration with its fields replaced by those of this one.

        Its networks and outer loop are therefore those of this configuration (by default an LSTM of
        64 units), not those of the domain's preset. `fields` replace further fields; those that the
        domain's study lacks are ignored.
        """
        config = STUDIES[name].config(self.of)
        settings = vars(self) | {"domain": getattr(self, name)} | fields
        known = {field: value for field, value in settings.items() if hasattr(config, field)}
        return dataclasses.replace(config, **known)

    def comparison(self, name: str, **fields: Any) -> Comparison:
        """Returns the first comparison of a domain's own study, with that configuration."""
        return STUDIES[name].plan(self.domain_config(name, **fields)).comparisons[0]


@dataclasses.dataclass(frozen=True)
class DomainsConfig(SeveralDomainsConfig):
    """Settings of a study of all three domains. Subclasses add the study's own settings."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression()
    bandit: ContextualBandit = ContextualBandit()


@dataclasses.dataclass(frozen=True)
class LearnersConfig(SeveralDomainsConfig):
    """Settings of a study of several meta-learners. Subclasses add the domains as fields."""

    learners: tuple[str, ...] = NETWORKS
    """Names of the meta-learners to compare."""

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.learners and set(self.learners) <= set(NETWORKS)
        check(valid, "learners", self.learners, f"choose from {', '.join(NETWORKS)}")
        unique = len({*self.learners}) == len(self.learners)
        check(unique, "learners", self.learners, "name each once")
        hint = "does not choose what is trained here: --learners does"
        check(self.meta == type(self).meta, "meta", self.meta, hint)

    def contenders(self, name: str) -> tuple[Comparison, list[Contender]]:
        """Returns a domain's own comparison and a contender per meta-learner that can serve it.

        The meta-learners are those of `learners`, or `meta` if none of them can.
        """
        usable = [meta for meta in self.learners if name != "bandit" or meta not in REGRESSION_ONLY]
        bases = {meta: self.comparison(name, meta=meta) for meta in usable or [self.meta]}
        metas = [
            dataclasses.replace(base.metas[0], label=getattr(self, meta).label)
            for meta, base in bases.items()
        ]
        return next(iter(bases.values())), metas
