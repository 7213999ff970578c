"""A learned optimiser: a small network that turns gradients into updates of a larger one.

After Andrychowicz et al. (2016), arXiv:1606.04474, and Metz et al. (2020), arXiv:2009.11243. The
larger network is the one that an ordinary learner trains, from the same small random start.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from metadyn import inner, prng
from metadyn.base import Domain, Key, Keys, MetaLearner, Params
from metadyn.learners.gradient import Weights
from metadyn.learners.maml import Descent, InnerDescent, InnerDescentConfig
from metadyn.objectives import Metrics, Objective

DECAYS = (0.5, 0.9)  # our choice: what a step leaves of each momentum
FEATURES = 2 * (1 + len(DECAYS)) + 3


class LearnedOptimizer(InnerDescent):
    """A multilayer perceptron, the same for every weight, that says how the weight is to move.

    It reads, of each weight: the gradient, its running means and the weight itself, each divided by
    its root mean square over the array that it is of; the logarithms of the first three of these
    root mean squares; the logarithm of the steps taken; and how deep in the network it lies. From
    its two outputs, d and s, the weight moves by −rate · eˢ · (m + d), with m the longest running
    mean, as divided: at first d = s = 0, and it is momentum of constant speed. Such a nominal term
    keeps training stable (Harrison et al. 2022, arXiv:2209.11208).
    """

    def init(self, key: Key) -> Params:
        """Draws outer parameters: a hidden layer, an output layer that is zero, a log rate."""
        hidden = self.config.hidden
        return {
            "hidden": prng.normal(key, (hidden, FEATURES)) / FEATURES**0.5,
            "bias": jnp.zeros(hidden),
            "out": jnp.zeros((2, hidden)),
            "offset": jnp.zeros(2),
            "log_rate": jnp.asarray(math.log(self.config.learning_rate), jnp.float32),
        }

    def start(self, params: Params, key: Key) -> Descent:
        """Draws the network's start, with a momentum of zero for each of `DECAYS`."""
        weights = self.network.init(key)
        zeros = jax.tree.map(jnp.zeros_like, weights)
        return Descent(weights, ((zeros,) * len(DECAYS), jnp.int32(0)))

    def stepped(
        self, params: Params, k: Int[Array, ""], descent: Descent, gradient: Weights
    ) -> Descent:
        """Moves every weight as the MLP says."""
        weights, (momenta, steps) = descent
        momenta = tuple(
            jax.tree.map(lambda m, g, decay=decay: decay * m + (1 - decay) * g, momentum, gradient)
            for decay, momentum in zip(DECAYS, momenta, strict=True)
        )
        time, last = jnp.log1p(steps), max(len(weights) - 1, 1)
        moved = [
            jax.tree.map(partial(_moved, params, time, depth / last), *layer)
            for depth, layer in enumerate(zip(weights, gradient, *momenta, strict=True))
        ]
        return Descent(moved, (momenta, steps + 1))


def _moved(params, time, depth, weights, gradient, *momenta) -> Array:
    """One array of weights, a step on."""
    scales = [jnp.sqrt(jnp.mean(a**2) + 1e-16) for a in (gradient, *momenta, weights)]
    scaled = [a / s for a, s in zip((gradient, *momenta, weights), scales, strict=True)]
    logs = [0.1 * jnp.log(s) for s in scales[:-1]]  # our choice: of the size of the others
    alike = [jnp.full(weights.shape, each) for each in (*logs, 0.2 * time, depth)]
    features = jnp.stack([*scaled, *alike])
    hidden = jnp.tensordot(params["hidden"], features, 1).T + params["bias"]
    d, s = (jnp.tanh(hidden) @ params["out"].T + params["offset"]).T
    return weights - jnp.exp(params["log_rate"] + s) * (scaled[len(momenta)] + d)


def evolution_strategies(domain: Domain, meta: MetaLearner, sigma: float = 0.03) -> Objective:
    """Trains on the loss over whole episodes, its gradient estimated by evolution strategies.

    The unbiased gradient of the smoothed loss E L(θ + σε), ε ~ N(0, I): see `antithetic`. Each
    episode is run twice, by the learners θ + σε and θ − σε, with an ε of its own. Differentiating
    through many steps of an optimiser gives gradients that explode, and truncating the unrolls
    biases them (Metz et al. 2019, arXiv:1810.10180); this does neither, and its memory does not
    grow with the inner steps. Persistent evolution strategies (Vicol et al. 2021, arXiv:2112.13835)
    update θ several times within an episode; with one update an episode, enough for a few dozen
    observations, they are what is done here. The start is drawn anew for each episode, as `measure`
    draws it.
    """

    def loss(params: Params, keys: Keys) -> tuple[Float[Array, ""], Metrics]:
        flat, unravel = ravel_pytree(params)

        def one(key: Key) -> tuple[Array, Array]:
            key_task, key_episode = jax.random.split(key)
            task = inner.full_precision(domain.sample_task)(key_task)
            noise = prng.normal(jax.random.fold_in(key, 2), flat.shape)  # 0, 1: the split's

            def episode(flat: Array) -> Array:
                learner = meta.learner(unravel(flat))
                return inner.run(domain, learner, task, key_episode, (0, domain.steps))["loss"][1]

            return antithetic(episode, flat, noise, sigma)

        fixed = jax.lax.stop_gradient
        means, gradients = fixed(jax.vmap(one)(keys))
        mean, gradient = jnp.mean(means), jnp.mean(gradients, axis=0)
        return mean + gradient @ (flat - fixed(flat)), {"loss": mean}

    return Objective(loss)


def antithetic(loss, theta: Array, noise: Array, sigma: float) -> tuple[Array, Array]:
    """Computes (L(θ + σε) + L(θ − σε)) / 2, and ε (L(θ + σε) − L(θ − σε)) / 2σ.

    For ε ~ N(0, I) their means are the smoothed loss and its gradient (Salimans et al. 2017,
    arXiv:1703.03864; Nesterov & Spokoiny 2017).
    """
    up, down = jax.vmap(loss)(jnp.stack([theta + sigma * noise, theta - sigma * noise]))
    return (up + down) / 2, (up - down) / (2 * sigma) * noise


@dataclasses.dataclass(frozen=True)
class LearnedOptimizerConfig(InnerDescentConfig):
    """A learned optimiser of the networks of ordinary learners. The values are our choice."""

    label, kind = "learned optimiser", LearnedOptimizer
    hidden: int = 8
    """Hidden units of the MLP that every weight has."""
    scale: float = 1e-3
    """Standard deviation of the linear network's initial weights."""
    learning_rate: float = 0.03
    """Size of the steps at outer step 0."""
    sigma: float = 0.03
    """Standard deviation of the outer parameters' perturbations."""
    outer_learning_rate: float = 2e-2
    """Peak learning rate of its outer loop, in the place of `--outer.learning-rate`."""

    def objective(self, domain: Domain, meta: MetaLearner) -> Objective:
        """Makes the objective that it is trained on (`evolution_strategies`)."""
        return evolution_strategies(domain, meta, self.sigma)
