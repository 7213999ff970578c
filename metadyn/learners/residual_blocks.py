"""Residual blocks, shared by our causal sequence models, which differ in how they mix over time.

A block adds to each token the output of a mixer, which reads the tokens up to it, then the output
of an MLP, which reads this token alone. Both read a normalised copy of their input: the pre-norm
transformer (Xiong et al. 2020).
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
    """Options of all networks of residual blocks; a subclass sets how they mix over time."""

    hidden: int = 64
    """Size of a token, H."""
    layers: int = 2
    """Number of blocks."""
    mlp: int = 2
    """Width of the MLPs' hidden layer, in multiples of H."""
    outer_learning_rate: float = 5e-3
    """Peak learning rate of this network's outer loop, in place of `--outer.learning-rate`."""
    mixer: ClassVar[Any]
    """Part of a block that lets a token depend on earlier ones. `mixer(config, steps, rngs=rngs)`
    makes it, for episodes of `steps` tokens. It is a `CausalModel` that runs many episodes at once,
    [..., T, H]. Its `step` must compute the output from the old memory, not from the new one: XLA
    then drops the new memory where a probe asks many queries of one memory."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden", "layers", "mlp", "outer_learning_rate")

    def make(self, domain: Domain, heads: int = 0) -> Sequence:
        """Returns the meta-learner for a domain."""
        return Sequence(domain, lambda n, rngs: Blocks(n, self, domain.steps, rngs=rngs), heads)


@dataclasses.dataclass(frozen=True)
class HeadedConfig(BlocksConfig):
    """Options of networks whose mixers have several heads, each with an equal share of a token."""

    attention_heads: int = 4
    """Number of heads in each mixer; it must divide `hidden`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "attention_heads")
        heads, hint = self.attention_heads, f"must divide hidden = {self.hidden}"
        check(self.hidden % heads == 0, "attention_heads", heads, hint)

    @property
    def head_size(self) -> int:
        """Size d of the queries, keys and values of one head."""
        return self.hidden // self.attention_heads


def by_token(layer: nnx.Linear, x: Float[Array, "*T n"]) -> Float[Array, "*T m"]:
    """Applies a layer to each token: one matrix product, whose derivative transposes no array."""
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def queries_keys_values(
    project: nnx.Linear, x: Float[Array, "*T H"], heads: int
) -> list[Float[Array, "*T heads d"]]:
    """Returns the queries, keys and values of each token, made by one layer and split by head."""
    projections = jnp.split(by_token(project, x), 3, axis=-1)
    return [a.reshape(*x.shape[:-1], heads, -1) for a in projections]


def merge_heads(x: Float[Array, "*B heads T d"]) -> Float[Array, "*B T H"]:
    """Concatenates the outputs of all heads into one token."""
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)


class Block(nnx.Module):
    """A mixer and an MLP with one hidden layer, each with a residual connection around it."""

    def __init__(self, config: BlocksConfig, steps: int, *, rngs: nnx.Rngs):
        H = config.hidden
        self.norms = nnx.List([nnx.RMSNorm(H, rngs=rngs) for _ in range(2)])
        self.mixer = config.mixer(config, steps, rngs=rngs)
        self.wide = nnx.Linear(H, config.mlp * H, rngs=rngs)
        self.narrow = nnx.Linear(config.mlp * H, H, rngs=rngs)

    def _mlp(self, x: Float[Array, "*T H"]) -> Float[Array, "*T H"]:
        return x + by_token(self.narrow, jax.nn.gelu(by_token(self.wide, self.norms[1](x))))

    def __call__(self, x: Float[Array, "*B T H"]) -> Float[Array, "*B T H"]:
        """Returns the tokens for the next block, given whole episodes of tokens."""
        return self._mlp(x + self.mixer(self.norms[0](x)))

    def step(self, memory: Carry, x: Float[Array, " H"]) -> tuple[Carry, Float[Array, " H"]]:
        """Returns the mixer's memory with x added, and the token for the next block."""
        memory, mixed = self.mixer.step(memory, self.norms[0](x))
        return memory, self._mlp(x + mixed)


class Blocks(nnx.Module):
    """A `networks.CausalModel` that passes tokens, each made from two inputs, through all blocks.

    The input at t holds x_t and y_{t−1}. Its token is made from it and the previous input, so that
    x_{t−1} and y_{t−1}, which belong together, are in one token and no block is spent on bringing
    them together. This is the short convolution of Yang et al. (2024), two inputs wide. Positions
    are not encoded: a causal model can count, and the pairs of an episode are exchangeable.
    """

    def __init__(self, n_in: int, config: BlocksConfig, steps: int, *, rngs: nnx.Rngs):
        self.n_in = n_in
        self.embed = nnx.Linear(2 * n_in, config.hidden, rngs=rngs)
        self.blocks = nnx.List([Block(config, steps, rngs=rngs) for _ in range(config.layers)])

    def __call__(self, inputs: Float[Array, "*B T n"]) -> Float[Array, "*B T H"]:
        """Returns the outputs of whole episodes."""
        zero = jnp.zeros_like(inputs[..., :1, :])
        previous = jnp.concatenate([zero, inputs[..., :-1, :]], axis=-2)
        tokens = by_token(self.embed, jnp.concatenate([inputs, previous], axis=-1))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def episodes(self, inputs: Float[Array, "T n B"]) -> Float[Array, "T H B"]:
        """Returns the outputs of B whole episodes, run at once."""
        return jnp.moveaxis(self(jnp.moveaxis(inputs, -1, 0)), 0, -1)

    def start(self, steps: int) -> Carry:
        """Returns an empty cache: a previous input of zero and the empty memory of each block."""
        return jnp.zeros(self.n_in), [block.mixer.start(steps) for block in self.blocks]

    def step(self, cache: Carry, x: Float[Array, " n"]) -> tuple[Carry, Float[Array, " H"]]:
        """Reads the input x and returns the cache with x added, and the output."""
        previous, memories = cache
        token = self.embed(jnp.concatenate([x, previous]))
        new_memories = []
        for block, memory in zip(self.blocks, memories, strict=True):
            memory, token = block.step(memory, token)
            new_memories.append(memory)
        return (x, new_memories), token
