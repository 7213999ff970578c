"""Residual blocks, which causal models of sequences share; they differ by how they mix over time.

A block adds to each token what a mixer makes of the tokens up to it, then what an MLP makes
of it alone, each reading a normalised copy: the pre-norm transformer (Xiong et al. 2020).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metadyn.base import Domain
from metadyn.errors import check, check_positive
from metadyn.learners.networks import Carry, Sequence


@dataclasses.dataclass(frozen=True)
class BlocksConfig:
    """What all networks of residual blocks have; a subclass says how they mix over time."""

    hidden: int = 64
    """H, numbers in a token."""
    layers: int = 2
    """Blocks."""
    mlp: int = 2
    """Width of the MLPs, in units of H."""
    outer_learning_rate: float = 5e-3
    """Peak learning rate of its outer loop, in the place of `--outer.learning-rate`."""
    mixer: ClassVar[Any]
    """What lets a token depend on those before it: `mixer(config, steps, rngs=rngs)` makes that of
    one block, for episodes of so many steps. It is a `CausalModel` that runs many of them at once,
    [..., T, H], and whose stepping computes nothing as large as its memory for an answer alone: a
    probe asks many queries of one."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden", "layers", "mlp", "outer_learning_rate")

    def make(self, domain: Domain, heads: int = 0) -> Sequence:
        """Makes the meta-learner for a domain."""
        return Sequence(domain, lambda n, rngs: Blocks(n, self, domain.steps, rngs=rngs), heads)


@dataclasses.dataclass(frozen=True)
class HeadedConfig(BlocksConfig):
    """What networks have whose mixers have several heads, each with its share of the H numbers."""

    attention_heads: int = 4
    """Heads of each mixer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "attention_heads")
        fix = f"must divide hidden = {self.hidden}"
        check(self.hidden % self.attention_heads == 0, "attention_heads", self.attention_heads, fix)

    @property
    def head_size(self) -> int:
        """Says how many numbers the queries, keys and values of one head have."""
        return self.hidden // self.attention_heads


def by_token(layer: nnx.Linear, x: Float[Array, "*T n"]) -> Float[Array, "*T m"]:
    """Applies a layer to each token: one product of matrices, whose derivative transposes none."""
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def queries_keys_values(
    project: nnx.Linear, x: Float[Array, "*T H"], heads: int
) -> list[Float[Array, "*T heads d"]]:
    """Makes queries, keys and values of each token by one layer, with each head's share apart."""
    made = jnp.split(by_token(project, x), 3, axis=-1)
    return [each.reshape(*x.shape[:-1], heads, -1) for each in made]


def joined(x: Float[Array, "*B heads T d"]) -> Float[Array, "*B T H"]:
    """Puts the shares of all heads into one token again."""
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)


class Block(nnx.Module):
    """A mixer and an MLP of one hidden layer, each added to what it reads."""

    def __init__(self, config: BlocksConfig, steps: int, *, rngs: nnx.Rngs):
        H = config.hidden
        self.norms = nnx.List([nnx.RMSNorm(H, rngs=rngs) for _ in range(2)])
        self.mixer = config.mixer(config, steps, rngs=rngs)
        self.wide = nnx.Linear(H, config.mlp * H, rngs=rngs)
        self.narrow = nnx.Linear(config.mlp * H, H, rngs=rngs)

    def _mlp(self, x: Float[Array, "*T H"]) -> Float[Array, "*T H"]:
        return x + by_token(self.narrow, jax.nn.gelu(by_token(self.wide, self.norms[1](x))))

    def __call__(self, x: Float[Array, "*B T H"]) -> Float[Array, "*B T H"]:
        """The tokens of whole episodes."""
        return self._mlp(x + self.mixer(self.norms[0](x)))

    def step(self, memory: Carry, x: Float[Array, " H"]) -> tuple[Carry, Float[Array, " H"]]:
        """Makes the next token."""
        memory, mixed = self.mixer.step(memory, self.norms[0](x))
        return memory, self._mlp(x + mixed)


class Blocks(nnx.Module):
    """A `networks.CausalModel`: tokens made of two inputs each go through all blocks.

    The input at t holds x_t and y_{t−1}. A token is made of it and of the input before, so that
    x_{t−1} and y_{t−1}, which belong together, stand in one token and no block is spent on bringing
    them together. It is the short convolution of Yang et al. (2024), two inputs wide. There is no
    encoding of positions: a causal model can count, and pairs of an episode are exchangeable.
    """

    def __init__(self, n_in: int, config: BlocksConfig, steps: int, *, rngs: nnx.Rngs):
        self.n_in = n_in
        self.embed = nnx.Linear(2 * n_in, config.hidden, rngs=rngs)
        self.blocks = nnx.List([Block(config, steps, rngs=rngs) for _ in range(config.layers)])

    def __call__(self, inputs: Float[Array, "*B T n"]) -> Float[Array, "*B T H"]:
        """The outputs of whole episodes."""
        nothing = jnp.zeros_like(inputs[..., :1, :])
        before = jnp.concatenate([nothing, inputs[..., :-1, :]], axis=-2)
        tokens = by_token(self.embed, jnp.concatenate([inputs, before], axis=-1))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def episodes(self, inputs: Float[Array, "T n B"]) -> Float[Array, "T H B"]:
        """Runs B whole episodes at once."""
        return jnp.moveaxis(self(jnp.moveaxis(inputs, -1, 0)), 0, -1)

    def start(self, steps: int) -> Carry:
        """Returns the input before, zero, and the empty memory of each block."""
        return jnp.zeros(self.n_in), [block.mixer.start(steps) for block in self.blocks]

    def step(self, cache: Carry, x: Float[Array, " n"]) -> tuple[Carry, Float[Array, " H"]]:
        """Returns the next output."""
        before, memories = cache
        token, after = self.embed(jnp.concatenate([x, before])), []
        for block, memory in zip(self.blocks, memories, strict=True):
            memory, token = block.step(memory, token)
            after.append(memory)
        return (x, after), token
