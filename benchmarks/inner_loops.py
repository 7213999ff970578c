"""Many ordinary learners at once: metadyn against a loop over learners and torch.func.vmap.

    python -m benchmarks.inner_loops [--full] [--json FILE]

Every learner has its own task and draws a fresh minibatch for each update. Kinds: two-layer linear
network, 5 → 32 → 5, plain SGD, batch 20; ReLU network, 1 → 64 → 64 → 64 → 64 → 1, SGD, batch 20, on
functions of frequencies 1-5; softmax policy, 5 contexts × 5 actions, REINFORCE with a running
baseline, batch 20. The loop's time per update of one learner does not depend on the number of
learners, so it is measured on one learner and multiplied. metadyn multiplies a linear network out
before it sees the batch; torch.func.vmap is measured with and without that.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from benchmarks.timing import Result, Run, Side, alternate, cores, limits, main, result

KINDS = ("linear", "mlp", "policy")
BATCH, RATE, UPDATES, WIDTH, SIGMA = 20, 0.01, 20, 64, 0.1
FULL = (1, 10, 100, 1000, 10_000)
OPERATIONS = {
    # W₂W₁ and its two derivatives; the product of W₂W₁ with the batch, and its derivative.
    "linear": 2.0 * (3 * 5 * 32 * 5 + 2 * BATCH * 5 * 5),
    "mlp": 6.0 * BATCH * (WIDTH + 3 * WIDTH**2 + WIDTH),
    "policy": 6.0 * BATCH * 5,
}
"""FLOPs of the products that one update needs: forwards, and at most twice as many backwards."""


def metadyn_side(kind: str, learners: int) -> Run:
    """Makes a run of `inner.measure`: UPDATES updates of all learners."""
    from metadyn import mesh

    mesh.use_every_core()
    import jax
    import jax.numpy as jnp
    import optax
    from jax.tree_util import Partial

    from metadyn import inner
    from metadyn.domains.bandit import ContextualBandit
    from metadyn.domains.fourier import FourierRegression
    from metadyn.domains.linear import LinearRegression
    from metadyn.learners import gradient as g

    sgd = optax.sgd(RATE)
    domain, learner = {
        "linear": lambda: (LinearRegression(), g.gradient(g.deep_linear(5, 5), sgd, BATCH)),
        "mlp": lambda: (FourierRegression(), g.gradient(g.mlp(1, 1, 4, WIDTH), sgd, BATCH)),
        "policy": lambda: (ContextualBandit(), g.reinforce(g.softmax_policy(5, 5), sgd, BATCH)),
    }[kind]()
    make = lambda params: learner
    sample = Partial(domain.sample_task)

    def run(count: int) -> None:
        for i in range(count):
            readings = inner.measure(
                domain, make, (0, UPDATES), (),
                (), sample, jax.random.key(i), jnp.arange(learners),
            )  # fmt: skip
            jax.block_until_ready(readings)

    return run


def _torch_kind(kind: str, learners: int, multiplied: bool = False) -> tuple[Any, Any, Any]:
    """Returns all learners' weights, a sampler of their minibatches, and the loss of one learner.

    With `multiplied`, a linear network is multiplied out before it sees the batch.
    """
    import torch

    axes = (learners,)
    uniform = lambda *shape: torch.rand(shape) - 0.5
    if kind == "linear":
        W = torch.randn(*axes, 5, 5) / 5**0.5
        weights = [1e-2 * torch.randn(*axes, 32, 5), 1e-2 * torch.randn(*axes, 5, 32)]

        def minibatch() -> tuple[Any, ...]:
            x = torch.randn(*axes, BATCH, 5)
            return x, x @ W.mT + SIGMA * torch.randn(*axes, BATCH, 5)

        def loss(weights: Any, x: Any, y: Any) -> Any:
            if multiplied:
                answers = x @ (weights[1] @ weights[0]).mT
            else:
                answers = x @ weights[0].mT @ weights[1].mT
            return 0.5 * ((answers - y) ** 2).sum(-1).mean()

    elif kind == "mlp":
        sizes = [1, *[WIDTH] * 4, 1]
        weights = []
        for n, m in pairwise(sizes):
            weights += [2 * uniform(*axes, m, n) / n**0.5, 2 * uniform(*axes, m) / n**0.5]
        omega = 2 * torch.pi * torch.arange(1, 6)
        cosine, sine = torch.randn(2, *axes, 1, 5) / 5**0.5

        def minibatch() -> tuple[Any, ...]:
            x = uniform(*axes, BATCH, 1)
            f = (cosine * torch.cos(omega * x) + sine * torch.sin(omega * x)).sum(-1, keepdim=True)
            return x, f + SIGMA * torch.randn(*axes, BATCH, 1)

        def loss(weights: Any, x: Any, y: Any) -> Any:
            for layer in range(4):
                x = torch.relu(torch.nn.functional.linear(x, *weights[2 * layer : 2 * layer + 2]))
            answers = torch.nn.functional.linear(x, *weights[8:])
            return 0.5 * ((answers - y) ** 2).sum(-1).mean()

    else:
        best_actions = torch.randint(5, (*axes, 5))
        weights = [torch.randn(*axes, 5, 5), torch.randn(*axes, 5)]
        baseline = torch.zeros(*axes, 1)

        def minibatch() -> tuple[Any, ...]:
            context = torch.randint(5, (*axes, BATCH))
            logits = weights[0].detach() + weights[1].detach()[..., None, :]  # [context, action]
            scores = torch.gather(logits, -2, context[..., None].expand(*context.shape, 5))
            action = (scores - torch.empty_like(scores).exponential_().log()).argmax(-1)
            reward = (action == torch.gather(best_actions, -1, context)).float()
            advantage = reward - baseline
            baseline.mul_(0.99).add_(reward.mean(-1, keepdim=True), alpha=0.01)
            return context, action, advantage

        def loss(weights: Any, context: Any, action: Any, advantage: Any) -> Any:
            logits = weights[0][context] + weights[1]
            log_chosen = torch.log_softmax(logits, -1).gather(-1, action[:, None])[:, 0]
            return -(advantage * log_chosen).mean()

    return weights, minibatch, loss


def loop_side(kind: str) -> Run:
    """Makes a run that updates one learner, as in a plain loop: autograd and torch.optim.SGD."""
    import torch

    torch.set_num_threads(1)  # operations this small gain nothing from more
    weights, minibatch, loss = _torch_kind(kind, 1)
    for leaf in weights:
        leaf.requires_grad_()
    optimizer = torch.optim.SGD(weights, lr=RATE)

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss([leaf[0] for leaf in weights], *(part[0] for part in minibatch())).backward()
            optimizer.step()

    return run


def vmap_side(kind: str, learners: int, multiplied: bool = False) -> Run:
    """Makes a run that updates all learners by torch.func.vmap of torch.func.grad."""
    import torch

    torch.set_num_threads(cores())
    weights, minibatch, loss = _torch_kind(kind, learners, multiplied)
    gradient = torch.func.vmap(torch.func.grad(loss))

    def run(count: int) -> None:
        for _ in range(count):
            torch._foreach_add_(weights, gradient(weights, *minibatch()), alpha=-RATE)

    return run


def benchmark(full: bool = False) -> Iterator[Result]:
    """Yields the microseconds per update of one learner, shares of the limit, and the ratios."""
    for kind in KINDS:
        for learners in FULL if full else (1000,):
            sides = {
                "metadyn": Side(__name__, "metadyn_side", {"kind": kind, "learners": learners}),
                "loop": Side(__name__, "loop_side", {"kind": kind}),
                "vmap": Side(__name__, "vmap_side", {"kind": kind, "learners": learners}),
            }
            if kind == "linear":
                case = {"kind": kind, "learners": learners, "multiplied": True}
                sides["vmap, multiplied out"] = Side(__name__, "vmap_side", case)
            timings = alternate(sides)
            timings["metadyn"] = timings["metadyn"] / (learners * UPDATES)
            timings |= {n: timings[n] / learners for n in timings if n.startswith("vmap")}
            label = f"{learners} learners, {kind}"
            for name, seconds in timings.items():
                yield result(f"{label}: {name}, µs an update", 1e6 * seconds)
                share = limits().share(seconds, OPERATIONS[kind])
                yield result(f"{label}: {name}, share of the product rate", share)
            targets = {"loop": 20.0, "vmap": 2.0} if learners == 1000 else {}
            ours = timings.pop("metadyn")
            for name, seconds in timings.items():
                yield result(f"{label}: × torch {name}", seconds / ours, at_least=targets.get(name))


if __name__ == "__main__":
    main({"inner_loops": benchmark}, __doc__ or "")
