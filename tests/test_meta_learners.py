"""Every meta-learner that is a network passes the checks of `contract.py`."""

import pytest
from contract import (
    DOMAINS,
    all_parameters_are_trained,
    made,
    step_by_step_is_whole,
    the_future_is_not_read,
    untrained_it_answers_zero,
)
from test_attention import ONE_LAYER

from metadyn.learners.attention import LinearAttentionConfig, TransformerConfig
from metadyn.learners.deltanet import DeltaNetConfig
from metadyn.learners.linear_recurrent import MinLSTMConfig
from metadyn.learners.lstm import LSTMConfig
from metadyn.learners.networks import GRUConfig

HEADED = {"hidden": 8, "attention_heads": 2}
NETWORKS = {
    "lstm": LSTMConfig(hidden=8),
    "gru": GRUConfig(hidden=8),
    "minlstm": MinLSTMConfig(hidden=8),
    "transformer": TransformerConfig(**HEADED),
    "linear_attention": LinearAttentionConfig(**HEADED),
    "deltanet": DeltaNetConfig(**HEADED),
}


PAIRS = [(name, "linear") for name in NETWORKS | ONE_LAYER]
PAIRS += [(name, d) for name in ("gru", "transformer") for d in DOMAINS if d != "linear"]
"""Every network on one domain, and every other domain with a recurrent and a causal network.
More pairs are not needed, since a network sees only the arrays of a domain."""


@pytest.mark.parametrize(("name", "domain"), PAIRS)
def test_step_by_step_and_whole_episode_give_the_same_numbers(name, domain):
    scale = 1.0 if name in ONE_LAYER else 0.2  # answers of one layer are products of three weights
    step_by_step_is_whole((NETWORKS | ONE_LAYER)[name], domain, scale)


@pytest.mark.parametrize("name", NETWORKS | ONE_LAYER)
def test_training_reads_the_past_alone_and_reaches_every_parameter(name):
    the_future_is_not_read((NETWORKS | ONE_LAYER)[name])
    all_parameters_are_trained((NETWORKS | ONE_LAYER)[name], "linear")


@pytest.mark.parametrize("name", ["lstm", "transformer", "one_layer_separate"])
def test_training_with_a_critic_reaches_every_parameter(name):
    """One of each class of meta-learners is enough, whose heads are the same for all networks."""
    all_parameters_are_trained((NETWORKS | ONE_LAYER)[name], "bandit")


@pytest.mark.parametrize("name", NETWORKS)
def test_untrained_networks_answer_zero_and_seeds_start_apart(name):
    untrained_it_answers_zero(made(NETWORKS[name], "linear"))
