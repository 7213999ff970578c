"""Reward that variants of the actor-critic estimator reach in a fixed number of outer steps.

    python benchmarks/actor_critic.py [--steps N] [--only NAME ...] [--json FILE]

Contextual bandit with K = n = 5, T = 50 and deterministic rewards; one outer seed and one CPU core
per run. The defaults of `ActorCriticConfig` were chosen from these rows. Each row changes the
setting that it names. Beside the reward it gives the standard deviation of the policy's gradient
over batches, relative to the norm of its mean, at weights that all rows share: those that the first
row reached half-way. (A critic alone as baseline has no such figure: at these weights the critic
has learned only what the group's mean leaves over.)
"""

import argparse
import dataclasses
import json
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from metadyn import inner
from metadyn.base import indexed_keys
from metadyn.domains.bandit import ContextualBandit
from metadyn.learners.bayes import bayes_bandit
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import ActorCriticConfig, actor_critic
from metadyn.outer import MetaTraining, OuterConfig, OuterLoop

HELDOUT, BATCHES = 4096, 256
DOMAIN = ContextualBandit()
META = LSTMConfig(hidden=64).make(DOMAIN, heads=1)
OUTER = OuterConfig(
    steps=3000, batch=32, learning_rate=3e-2, schedule="linear", warmup=100, seeds=1
)
BASE = ActorCriticConfig()
VARIANTS = {
    "base": {},
    "baseline value": {"baseline": "value"},
    "baseline none": {"baseline": "none"},
    "immediate sampled": {"immediate": "sampled"},
    "immediate sampled, baseline value": {"immediate": "sampled", "baseline": "value"},
    "discount 0.9": {"discount": 0.9},
    "discount 0.5": {"discount": 0.5},
    "entropy 0.05": {"entropy": 0.05},
    "entropy 0.01": {"entropy": 0.01},
    "entropy 0.5": {"entropy": 0.5},
}


def reward(learner_of, params):
    """Returns the mean reward per step on held-out tasks."""
    readings = inner.measure(
        DOMAIN, learner_of, (0, DOMAIN.steps), (),
        params, Partial(DOMAIN.sample_task), jax.random.key(1), jnp.arange(HELDOUT),
    )  # fmt: skip
    return float(1 - readings["loss"][..., 1].mean())


def noise(config, params):
    """Returns the policy gradient's standard deviation over batches, over the norm of its mean."""
    config = dataclasses.replace(config, entropy=0.0, value_weight=0.0)
    objective = actor_critic(DOMAIN, META, config)

    def gradient(index):
        keys = indexed_keys(jax.random.fold_in(jax.random.key(2), index), jnp.arange(OUTER.batch))
        return ravel_pytree(jax.grad(objective.loss, has_aux=True)(params, keys)[0])[0]

    gradients = jax.jit(lambda: jax.lax.map(gradient, jnp.arange(BATCHES)))()
    mean = gradients.mean(0)
    return float(jnp.sqrt(gradients.var(0).sum()) / jnp.linalg.norm(mean))


def main():
    """Trains each variant and prints its row; stores all rows if a JSON file is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=OUTER.steps)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    outer = dataclasses.replace(OUTER, steps=arguments.steps)
    bayes, chance = reward(lambda params: bayes_bandit(DOMAIN), ()), 1 / DOMAIN.actions
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; Bayes earns {bayes:.3f}")
    rows, half_way = [], None
    for name, changes in VARIANTS.items():
        if arguments.only and name not in arguments.only and half_way is not None:
            continue
        config = dataclasses.replace(BASE, **changes)
        training = MetaTraining(META, actor_critic(DOMAIN, META, config))
        loop = OuterLoop({"lstm": training}, outer, jax.random.key(0))
        state = loop.init()
        for target in (outer.steps // 2, outer.steps):
            *_, (state, _) = loop.run(state, target)
            half_way = half_way or jax.tree.map(lambda leaf: leaf[0].copy(), state.params["lstm"])
        mean_reward = reward(
            META.learner, jax.tree.map(lambda leaf: leaf[:1], state.params["lstm"])
        )
        seconds = loop.seconds["lstm"]
        relative_reward = (mean_reward - chance) / (bayes - chance)
        gradient_noise = None if config.baseline == "value" else noise(config, half_way)
        rows.append(
            {
                "name": name,
                "seconds": seconds,
                "relative_reward": relative_reward,
                "gradient_noise": gradient_noise,
            }
        )
        print(
            f"{name:36} {seconds:5.0f} s   reward, chance 0 to Bayes 1: {relative_reward:.3f}   "
            + ("" if gradient_noise is None else f"gradient noise {gradient_noise:.2f}"),
            flush=True,
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
