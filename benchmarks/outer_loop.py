"""Excess loss over Bayes that an outer loop reaches in so many outer steps, by its settings.

    python benchmarks/outer_loop.py [--steps N] [--only NAME ...] [--json FILE]

Nonlinear regression, frequencies 1-5, T = 40, one outer seed and one CPU core a run: what the quick
preset of experiments/nonlinear_regression.py is chosen from. Each row changes the setting it names.
"""

import argparse
import dataclasses
import json
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from metadyn import inner
from metadyn.domains.fourier import FourierRegression, band
from metadyn.dynamics import excess_loss
from metadyn.learners.bayes import bayes_fourier
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import prediction_loss
from metadyn.outer import MetaTraining, OuterConfig, OuterLoop

HELDOUT = 4096
BASE = {
    "domain": FourierRegression(band(1, 5), steps=40),
    "lstm": LSTMConfig(hidden=64),
    "outer": OuterConfig(batch=32, learning_rate=3e-2, seeds=1),
}


def variants(steps):
    """Name: domain, LSTM and outer configuration."""
    base = BASE | {"outer": dataclasses.replace(BASE["outer"], steps=steps)}

    def changed(part, **fields):
        return base | {part: dataclasses.replace(base[part], **fields)}

    return {
        "base": base,
        **{f"embedding {e}": changed("domain", embedding=e) for e in ("raw", "circle", "fourier")},
        **{f"hidden {n}": changed("lstm", hidden=n) for n in (32, 96)},
        **{f"learning rate {r:g}": changed("outer", learning_rate=r) for r in (1e-2, 2e-2, 5e-2)},
        "schedule linear": changed("outer", schedule="linear"),
        "schedule constant": changed("outer", schedule="constant"),
        "batch 128, a quarter of the steps": changed("outer", batch=128, steps=steps // 4),
        "optimizer adabelief": changed("outer", optimizer="adabelief"),
        "optimizer rmsprop": changed("outer", optimizer="rmsprop", learning_rate=3e-3),
    }


def train(domain, lstm, outer):
    """Seconds of training, compilation left out, and the excess loss on held-out tasks."""
    meta, bayes = lstm.make(domain), bayes_fourier(domain)
    trained = {"lstm": MetaTraining(meta, prediction_loss(domain, meta))}
    loop = OuterLoop(trained, outer, jax.random.key(0))
    *_, (state, _) = loop.run(loop.init(), outer.steps)

    def mean_loss(make, params):
        found = inner.measure(
            domain, make, params, False, Partial(domain.sample_task),
            jax.random.key(1), jnp.arange(HELDOUT), (0, domain.steps),
        )  # fmt: skip
        return float(found["loss"][:, 1].mean())

    one = jax.tree.map(lambda leaf: leaf[0], state.params["lstm"])
    losses = mean_loss(meta.learner, one), mean_loss(lambda params: bayes, ())
    return loop.seconds["lstm"], float(excess_loss(*losses, domain.loss_floor))


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}")
    for name, settings in variants(arguments.steps).items():
        if arguments.only and name not in arguments.only:
            continue
        seconds, excess = train(**settings)
        rows.append({"name": name, "seconds": seconds, "excess": excess})
        print(f"{name:36} {seconds:6.0f} s   excess {excess:.3f}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
