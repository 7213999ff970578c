"""A learned optimiser: a small network that turns gradients into updates of a larger one.

After Andrychowicz et al. (2016), arXiv:1606.04474, and Metz et al. (2020), arXiv:2009.11243. The
larger network, and its small random start, are those of an ordinary learner.
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

DECAYS = (0.5, 0.9)  # of the running means of gradients, per inner step: our choice
FEATURES = 2 * (1 + len(DECAYS)) + 3  # inputs of the MLP for one weight


class LearnedOptimizer(InnerDescent):
    """Meta-learner whose inner loop updates every weight of a network by the same small MLP.

    For each weight the MLP reads: the gradient, its running means and the weight itself, each
    divided by its root mean square over the weight's array; the logarithms of the first three of
    these root mean squares; the logarithm of the number of steps taken; and the relative depth of
    the layer. Its two outputs, d and s, change the weight by −rate · eˢ · (m + d), where m is the
    running mean of slowest decay, divided as above. At first d = s = 0, which is momentum of
    constant speed. This nominal term keeps training stable (Harrison et al. 2022,
    arXiv:2209.11208).
    """

    def init(self, key: Key) -> Params:
        """Draws the outer parameters: a hidden layer, an output layer of zeros, a log rate."""
        hidden = self.config.hidden
        return {
            "hidden": prng.normal(key, (hidden, FEATURES)) / FEATURES**0.5,
            "bias": jnp.zeros(hidden),
            "out": jnp.zeros((2, hidden)),
            "offset": jnp.zeros(2),
            "log_rate": jnp.asarray(math.log(self.config.learning_rate), jnp.float32),
        }

    def start(self, params: Params, key: Key) -> Descent:
        """Draws the initial weights of the network, with zero momentum for each of `DECAYS`."""
        weights = self.network.init(key)
        zeros = jax.tree.map(jnp.zeros_like, weights)
        return Descent(weights, ((zeros,) * len(DECAYS), jnp.int32(0)))

    def inner_step(
        self, params: Params, k: Int[Array, ""], descent: Descent, gradient: Weights
    ) -> Descent:
        """Returns the network after the MLP has updated every weight."""
        weights, (momenta, steps) = descent
        momenta = tuple(
            jax.tree.map(lambda m, g, decay=decay: decay * m + (1 - decay) * g, momentum, gradient)
            for decay, momentum in zip(DECAYS, momenta, strict=True)
        )
        log_steps, last = jnp.log1p(steps), max(len(weights) - 1, 1)
        updated = [
            jax.tree.map(partial(_updated, params, log_steps, depth / last), *layer)
            for depth, layer in enumerate(zip(weights, gradient, *momenta, strict=True))
        ]
        return Descent(updated, (momenta, steps + 1))


def _updated(params, log_steps, depth, weights, gradient, *momenta) -> Array:
    """Returns one array of weights after one step of the learned optimiser."""
    scales = [jnp.sqrt(jnp.mean(a**2) + 1e-16) for a in (gradient, *momenta, weights)]
    scaled = [a / s for a, s in zip((gradient, *momenta, weights), scales, strict=True)]
    logs = [0.1 * jnp.log(s) for s in scales[:-1]]  # our choice: about as large as other features
    uniform = [jnp.full(weights.shape, value) for value in (*logs, 0.2 * log_steps, depth)]
    features = jnp.stack([*scaled, *uniform])
    hidden = jnp.tensordot(params["hidden"], features, 1).T + params["bias"]
    d, s = (jnp.tanh(hidden) @ params["out"].T + params["offset"]).T
    return weights - jnp.exp(params["log_rate"] + s) * (scaled[len(momenta)] + d)


def evolution_strategies(domain: Domain, meta: MetaLearner, sigma: float = 0.03) -> Objective:
    """Makes an objective: the loss over whole episodes, its gradient by evolution strategies.

    The gradient is an unbiased estimate of that of the smoothed loss E L(θ + σε), ε ~ N(0, I): see
    `antithetic`. Each episode has its own ε and is run twice, by the learners θ + σε and θ − σε.
    Differentiating through many optimiser steps gives exploding gradients, and truncating the
    unrolls biases them (Metz et al. 2019, arXiv:1810.10180). Evolution strategies avoid both, and
    their memory does not grow with the number of inner steps. Persistent evolution strategies
    (Vicol et al. 2021, arXiv:2112.13835) update θ several times within an episode. With one update
    per episode, enough for a few dozen observations, they reduce to this method. Each episode draws
    its own start of the network, as `measure` does.
    """

    def loss(params: Params, keys: Keys) -> tuple[Float[Array, ""], Metrics]:
        flat, unravel = ravel_pytree(params)

        def estimate(key: Key) -> tuple[Array, Array]:
            key_task, key_episode = jax.random.split(key)
            task = inner.full_precision(domain.sample_task)(key_task)
            noise = prng.normal(jax.random.fold_in(key, 2), flat.shape)  # split uses 0 and 1

            def episode(flat: Array) -> Array:
                learner = meta.learner(unravel(flat))
                return inner.run(domain, learner, task, key_episode, (0, domain.steps))["loss"][1]

            return antithetic(episode, flat, noise, sigma)

        constant = jax.lax.stop_gradient
        means, gradients = constant(jax.vmap(estimate)(keys))
        mean, gradient = jnp.mean(means), jnp.mean(gradients, axis=0)
        # A surrogate: its value is the mean loss, its derivative the estimated gradient.
        return mean + gradient @ (flat - constant(flat)), {"loss": mean}

    return Objective(loss)


def antithetic(loss, theta: Array, noise: Array, sigma: float) -> tuple[Array, Array]:
    """Computes (L(θ + σε) + L(θ − σε)) / 2, and ε (L(θ + σε) − L(θ − σε)) / 2σ.

    Their means over ε ~ N(0, I), the `noise`, are the smoothed loss and its gradient (Salimans et
    al. 2017, arXiv:1703.03864; Nesterov & Spokoiny 2017).
    """
    up, down = jax.vmap(loss)(jnp.stack([theta + sigma * noise, theta - sigma * noise]))
    return (up + down) / 2, (up - down) / (2 * sigma) * noise


@dataclasses.dataclass(frozen=True)
class LearnedOptimizerConfig(InnerDescentConfig):
    """Settings of a learned optimiser of ordinary learners' networks. The values are our choice."""

    label, kind = "learned optimiser", LearnedOptimizer
    hidden: int = 8
    """Hidden units of the MLP, which all weights share."""
    scale: float = 1e-3
    """Standard deviation of the linear network's initial weights."""
    learning_rate: float = 0.03
    """Size of the inner steps at outer step 0."""
    sigma: float = 0.03
    """Standard deviation of the perturbations of the outer parameters."""
    outer_learning_rate: float = 2e-2
    """Peak learning rate of its outer loop, in place of `--outer.learning-rate`."""

    def objective(self, domain: Domain, meta: MetaLearner) -> Objective:
        """Makes the objective to train the meta-learner on: `evolution_strategies`."""
        return evolution_strategies(domain, meta, self.sigma)
