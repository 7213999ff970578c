"""Studies of all three domains at once, with what each domain's own study compares."""

from __future__ import annotations

import dataclasses
from typing import Any

from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.study import Comparison, StudyConfig, load_study

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


@dataclasses.dataclass(frozen=True)
class DomainsConfig(StudyConfig):
    """The settings of a study of all three domains; its own are added in a subclass."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression()
    bandit: ContextualBandit = ContextualBandit()
    of: str = "quick"
    """The preset of the domains' own studies, for whatever is not set here."""

    def within(self, name: str, **fields: Any) -> Any:
        """The configuration of a domain's own study, with what is set here and some more fields."""
        fields = self.common() | {"domain": getattr(self, name)} | fields
        return STUDIES[name].config(self.of, **fields)

    def comparison(self, name: str, **fields: Any) -> Comparison:
        """What a domain's own study compares, configured so."""
        return STUDIES[name].plan(self.within(name, **fields)).comparisons[0]
