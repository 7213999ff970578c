"""Many ordinary learners at once: metadyn against a loop over learners and torch.func.vmap.

    python -m benchmarks.inner_loops [--full] [--json FILE]

Every learner has a task of its own and draws a fresh minibatch for each update. Kinds: two-layer
linear network, 5 → 32 → 5, plain SGD, batch 20; ReLU network, 1 → 64 → 64 → 64 → 64 → 1, SGD,
batch 20, on functions of frequencies 1-5; softmax policy, 5 contexts × 5 actions, REINFORCE with a
running baseline, batch 20. The loop's time for one update of one learner does not depend on how
many learners there are, so it is measured on one and the rest is arithmetic. metadyn multiplies a
linear network out before it sees the batch; torch.func.vmap is measured without that and with it.
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
    # W₂W₁ and its two derivatives; its product with the batch and the derivative of that.
    "linear": 2.0 * (3 * 5 * 32 * 5 + 2 * BATCH * 5 * 5),
    "mlp": 6.0 * BATCH * (WIDTH + 3 * WIDTH**2 + WIDTH),
    "policy": 6.0 * BATCH * 5,
}
"""Of the products that one update needs: forwards once, backwards at most twice as many."""


def metadyn_side(kind: str, learners: int) -> Run:
    """`inner.measure`: UPDATES updates of all learners."""
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
            found = inner.measure(
                domain, make, (0, UPDATES), (),
                (), sample, jax.random.key(i), jnp.arange(learners),
            )  # fmt: skip
            jax.block_until_ready(found)

    return run


def _torch_kind(kind: str, learners: int, multiplied: bool = False) -> tuple[Any, Any, Any]:
    """Weights of all learners, minibatches of all learners, and the loss of one on its own.

    With `multiplied`, a linear network is multiplied out before it sees the batch.
    """
    import torch

    lead = (learners,)
    uniform = lambda *shape: torch.rand(shape) - 0.5
    if kind == "linear":
        W = torch.randn(*lead, 5, 5) / 5**0.5
        weights = [1e-2 * torch.randn(*lead, 32, 5), 1e-2 * torch.randn(*lead, 5, 32)]

        def minibatch() -> tuple[Any, ...]:
            x = torch.randn(*lead, BATCH, 5)
            return x, x @ W.mT + SIGMA * torch.randn(*lead, BATCH, 5)

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
            weights += [2 * uniform(*lead, m, n) / n**0.5, 2 * uniform(*lead, m) / n**0.5]
        turns = 2 * torch.pi * torch.arange(1, 6)
        cosine, sine = torch.randn(2, *lead, 1, 5) / 5**0.5

        def minibatch() -> tuple[Any, ...]:
            x = uniform(*lead, BATCH, 1)
            f = (cosine * torch.cos(turns * x) + sine * torch.sin(turns * x)).sum(-1, keepdim=True)
            return x, f + SIGMA * torch.randn(*lead, BATCH, 1)

        def loss(weights: Any, x: Any, y: Any) -> Any:
            for layer in range(4):
                x = torch.relu(torch.nn.functional.linear(x, *weights[2 * layer : 2 * layer + 2]))
            answers = torch.nn.functional.linear(x, *weights[8:])
            return 0.5 * ((answers - y) ** 2).sum(-1).mean()

    else:
        best = torch.randint(5, (*lead, 5))
        weights = [torch.randn(*lead, 5, 5), torch.randn(*lead, 5)]
        mean = torch.zeros(*lead, 1)

        def minibatch() -> tuple[Any, ...]:
            context = torch.randint(5, (*lead, BATCH))
            logits = weights[0].detach() + weights[1].detach()[..., None, :]  # [context, action]
            chosen = torch.gather(logits, -2, context[..., None].expand(*context.shape, 5))
            action = (chosen - torch.empty_like(chosen).exponential_().log()).argmax(-1)
            reward = (action == torch.gather(best, -1, context)).float()
            advantage = reward - mean
            mean.mul_(0.99).add_(reward.mean(-1, keepdim=True), alpha=0.01)
            return context, action, advantage

        def loss(weights: Any, context: Any, action: Any, advantage: Any) -> Any:
            logits = weights[0][context] + weights[1]
            taken = torch.log_softmax(logits, -1).gather(-1, action[:, None])[:, 0]
            return -(advantage * taken).mean()

    return weights, minibatch, loss


def loop_side(kind: str) -> Run:
    """One learner after another, as a plain loop has it: autograd and torch.optim.SGD."""
    import torch

    torch.set_num_threads(1)  # so small operations gain nothing from more
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
    """One update of all learners by torch.func.vmap of torch.func.grad."""
    import torch

    torch.set_num_threads(cores())
    weights, minibatch, loss = _torch_kind(kind, learners, multiplied)
    gradient = torch.func.vmap(torch.func.grad(loss))

    def run(count: int) -> None:
        for _ in range(count):
            torch._foreach_add_(weights, gradient(weights, *minibatch()), alpha=-RATE)

    return run


def benchmark(full: bool = False) -> Iterator[Result]:
    """Microseconds for one update of one learner, and the ratios."""
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
            taken = alternate(sides)
            taken["metadyn"] = taken["metadyn"] / (learners * UPDATES)
            taken |= {name: taken[name] / learners for name in taken if name.startswith("vmap")}
            where = f"{learners} learners, {kind}"
            for name, seconds in taken.items():
                yield result(f"{where}: {name}, µs an update", 1e6 * seconds)
                share = limits().share(seconds, OPERATIONS[kind])
                yield result(f"{where}: {name}, share of the product rate", share)
            targets = {"loop": 20.0, "vmap": 2.0} if learners == 1000 else {}
            ours = taken.pop("metadyn")
            for name, seconds in taken.items():
                yield result(f"{where}: × torch {name}", seconds / ours, at_least=targets.get(name))


if __name__ == "__main__":
    main({"inner_loops": benchmark}, __doc__ or "")
