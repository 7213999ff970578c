"""Studies of several domains at once, with what each domain's own study compares."""

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
"""What figures and tables call each domain."""
STUDIES = {name: load_study(title.replace(" ", "_")) for name, title in TITLES.items()}
SMALL: dict[str, Any] = {
    "linear": LinearRegression(n_x=3, n_y=3),
    "nonlinear": FourierRegression(band(1, 3), steps=20),
    "bandit": ContextualBandit(contexts=3, actions=3, steps=20),
}
"""Three modes in each domain, for what is to be quick."""
EVEN = SMALL | {"linear": LinearRegression(n_x=3, n_y=3, spread="even")}
"""The same with singular values at even steps, of which the least is large enough to be placed."""
SIGN = {"linear": -1, "nonlinear": 1, "bandit": 1}
"""The sign of the figure of merit of a learner that learns one mode after another."""
NETWORKS = get_args(Network)
DESCENTS = ("maml", "learned_optimizer")
"""Those that train a network on squared errors within the episode: not for the bandit."""


@dataclasses.dataclass(frozen=True)
class SeveralDomainsConfig(StudyConfig):
    """The settings of a study of several domains, which are fields of a subclass."""

    of: str = "quick"
    """The preset of the domains' own studies, for whatever is not set here."""

    def within(self, name: str, **fields: Any) -> Any:
        """Makes a domain's own study's configuration, its fields replaced by those of this one.

        So the networks and the outer loop are those of this configuration (an LSTM of 64 units, if
        nothing else is said), not those of the domain's own preset. `fields` that the study does
        not have are left out.
        """
        own = STUDIES[name].config(self.of)
        given = vars(self) | {"domain": getattr(self, name)} | fields
        return dataclasses.replace(own, **{f: v for f, v in given.items() if hasattr(own, f)})

    def comparison(self, name: str, **fields: Any) -> Comparison:
        """Makes what a domain's own study compares, configured so."""
        return STUDIES[name].plan(self.within(name, **fields)).comparisons[0]


@dataclasses.dataclass(frozen=True)
class DomainsConfig(SeveralDomainsConfig):
    """The settings of a study of all three domains; its own are added in a subclass."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression()
    bandit: ContextualBandit = ContextualBandit()


@dataclasses.dataclass(frozen=True)
class LearnersConfig(SeveralDomainsConfig):
    """The settings of a study of several meta-learners; its domains are added in a subclass."""

    learners: tuple[str, ...] = NETWORKS
    """The meta-learners that are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        right = self.learners and set(self.learners) <= set(NETWORKS)
        check(right, "learners", self.learners, f"choose from {', '.join(NETWORKS)}")
        once = len({*self.learners}) == len(self.learners)
        check(once, "learners", self.learners, "name each once")
        fix = "does not choose what is trained here: --learners does"
        check(self.meta == type(self).meta, "meta", self.meta, fix)

    def contenders(self, name: str) -> tuple[Comparison, list[Contender]]:
        """Returns a domain's own comparison, and those of `learners` that can serve there.

        Where none can, the study's own, `meta`.
        """
        able = [meta for meta in self.learners if name != "bandit" or meta not in DESCENTS]
        bases = {meta: self.comparison(name, meta=meta) for meta in able or [self.meta]}
        metas = [
            dataclasses.replace(base.metas[0], label=getattr(self, meta).label)
            for meta, base in bases.items()
        ]
        return next(iter(bases.values())), metas
