"""Precision of products, read off programs for GPUs and TPUs. Neither device is needed."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.compile import EXACT, as_hopper, roundings, wrong
from benchmarks.rounding import rounded
from metadyn import inner
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression
from metadyn.domains.linear import LinearRegression
from metadyn.learners import bayes
from metadyn.learners.attention import TransformerConfig
from metadyn.learners.deltanet import DeltaNetConfig
from metadyn.learners.gradient import deep_linear, gradient, mlp
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import actor_critic, prediction_loss
from metadyn.outer import MetaTraining, OuterConfig, OuterLoop

LINEAR = LinearRegression(3, 2, steps=4)
FOURIER = FourierRegression(steps=4)
BANDIT = ContextualBandit(3, 4, steps=4)
ORDINARY = {
    "bayes": (LINEAR, bayes.bayes_linear(LINEAR)),
    "least_squares": (LINEAR, bayes.ridge(3, 2, 1e-5)),
    "sgd": (LINEAR, gradient(deep_linear(3, 2), optax.sgd(0.05), 4)),
    "bayes_fourier": (FOURIER, bayes.bayes_fourier(FOURIER)),
    "mlp": (FOURIER, gradient(mlp(1, 1, 2, 8), optax.sgd(0.05), 4)),
    "bayes_bandit": (BANDIT, bayes.bayes_bandit(BANDIT)),
}
TRAINED = {"lstm": LINEAR, "lstm_fourier": FOURIER, "lstm_bandit": BANDIT}
LSTM, HEADED = LSTMConfig(hidden=16), {"hidden": 8, "attention_heads": 2}
PLATFORMS = {"cuda": "gpu", "tpu": "tpu"}
"""The name of each platform in lowering, and that of its backend in JAX."""


@pytest.fixture
def platform():
    """The platform, if a test does not choose one.

    Only the LSTM's choice of a kernel depends on it. All else asks whether it runs on a CPU.
    """
    return "tpu"


@pytest.fixture
def lowered(platform, monkeypatch):
    """`lowered(jitted, *arguments)` returns the text of a program for the platform."""
    as_hopper()
    monkeypatch.setattr(jax, "default_backend", lambda: PLATFORMS[platform])
    return lambda f, *arguments: f.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", [*ORDINARY, *TRAINED])
def test_all_measurements_are_exact_in_float32(name, lowered):
    if name in ORDINARY:
        domain, learner = ORDINARY[name]
        make, params = lambda _: learner, ()
    else:
        domain = TRAINED[name]
        meta = LSTMConfig(hidden=8).make(domain)
        seeds = jax.random.split(jax.random.key(0), 2)
        make, params = meta.learner, jax.eval_shape(jax.vmap(meta.init), seeds)
    tasks, probes = domain.evaluation(16), tuple(domain.evaluation(16).probes.items())
    key, indices = jax.random.key(0), np.arange(8, dtype=np.int32)
    arguments = (params, tasks.sample, key, indices)
    text = lowered(inner.measure, domain, make, (0, 1, 4), probes, *arguments)
    assert roundings(text) == EXACT
    assert "stablehlo.fft" not in text


def loop_of(domain, precision, network=LSTM, teacher=None):
    """Returns the outer loop that trains a network on a domain."""
    critic = domain is BANDIT
    meta = network.make(domain, heads=int(critic))
    make = actor_critic if critic else partial(prediction_loss, teacher=teacher)
    objective = make(domain, meta)
    config = OuterConfig(steps=4, batch=32, seeds=2, warmup=1, precision=precision)
    return OuterLoop({"lstm": MetaTraining(meta, objective)}, config, jax.random.key(0))


def test_rounded_products_float64_and_lapack_are_found(lowered):
    a = jnp.ones((2, 2))
    exact, rounded = (partial(jnp.dot, precision=name) for name in ("highest", "default"))
    assert wrong(lowered(jax.jit(exact), a, a)) == []
    assert wrong(lowered(jax.jit(lambda a: exact(a, rounded(a, a))), a)) == [
        "products of precision ('DEFAULT', 'DEFAULT')"
    ]
    assert wrong("%1 = stablehlo.convert %0 : tensor<2xf64>") == ["float64"]
    assert wrong("custom_call @lapack_spotrf_ffi") == ["LAPACK"]


PRECISIONS = {"float32": "HIGHEST", "tensorfloat32": "HIGH", "bfloat16": "DEFAULT"}


@pytest.mark.parametrize(
    ("domain", "precision", "platform"),
    [
        (LINEAR, "float32", "cuda"),
        (LINEAR, "float32", "tpu"),
        (LINEAR, "tensorfloat32", "cuda"),
        (LINEAR, "tensorfloat32", "tpu"),
        (LINEAR, "bfloat16", "tpu"),
        (FOURIER, "bfloat16", "cuda"),  # neither the domain nor a kernel may be exact
        (FOURIER, "bfloat16", "tpu"),
        (BANDIT, "float32", "tpu"),
        (BANDIT, "bfloat16", "tpu"),
    ],
)
def test_training_rounds_products_as_configured(domain, precision, lowered):
    """Products of the domain are never rounded: W x of linear regression, and a policy's pay."""
    loop, rounding = loop_of(domain, precision), PRECISIONS[precision]
    precisions = roundings(lowered(loop.advance, loop.abstract, jnp.int32(1)))
    assert precisions == {(rounding, rounding)} | (set() if domain is FOURIER else EXACT)


def test_bayes_as_a_teacher_is_exact(lowered):
    loop = loop_of(FOURIER, "bfloat16", teacher=bayes.bayes_fourier(FOURIER))
    precisions = roundings(lowered(loop.advance, loop.abstract, jnp.int32(1)))
    assert precisions == {("DEFAULT", "DEFAULT")} | EXACT


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("backend", ["scan", "backward"])
def test_every_backend_of_the_lstm_is_rounded_alike(backend, lowered):
    loop = loop_of(FOURIER, "bfloat16", dataclasses.replace(LSTM, backend=backend))
    precisions = roundings(lowered(loop.advance, loop.abstract, jnp.int32(1)))
    assert precisions == {("DEFAULT", "DEFAULT")}


@pytest.mark.parametrize("network", [TransformerConfig(**HEADED), DeltaNetConfig(**HEADED)])
def test_attention_and_the_delta_rule_are_rounded_alike(network, lowered):
    loop = loop_of(FOURIER, "bfloat16", network)
    precisions = roundings(lowered(loop.advance, loop.abstract, jnp.int32(1)))
    assert precisions == {("DEFAULT", "DEFAULT")}


def test_the_emulation_rounds_the_factors_of_every_product_and_nothing_after_it():
    """The product is inside a scan under vmap, and 1 + 2^-9 has one bit more than bfloat16."""
    near_one = jnp.full((2, 3, 3), 1 + 2.0**-9)

    def twice(A):
        return jax.lax.scan(lambda x, _: (A @ x, None), jnp.ones(3), None, 2)[0]

    exact = jax.jit(jax.vmap(twice))(near_one)
    with rounded(7):
        np.testing.assert_array_equal(jax.jit(jax.vmap(twice))(near_one), 9.0)
    np.testing.assert_array_equal(jax.jit(jax.vmap(twice))(near_one), exact)
    assert float(exact.min()) > 9
