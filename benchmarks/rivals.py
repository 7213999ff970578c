"""Networks of metadyn's meta-learners in PyTorch and flax, for `outer_step`.

Each is made by name and maps inputs [T, B, n_in] to hidden states [T, B, hidden]:

lstm         nn.LSTM; nnx.RNN of an OptimizedLSTMCell.
lstm loop    PyTorch only: the LSTM as a plain loop over time, which torch.func.vmap can batch.
transformer  pre-norm blocks with RMS normalisation and a GELU MLP of twice the width;
             scaled_dot_product_attention; nnx.MultiHeadAttention.
deltanet     the same blocks, with fast weights under the delta rule in place of attention,
             written as a plain loop over time (PyTorch) and as a scan (flax).

A token of the last two joins the present and the previous input, as in metadyn.
"""

from __future__ import annotations

from typing import Any

LAYERS, HEADS, WIDER = 2, 4, 2


def torch_body(name: str, n_in: int, hidden: int) -> Any:
    """Makes the network of a name in PyTorch."""
    import torch
    from torch import nn

    if name == "lstm":

        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(n_in, hidden)

            def forward(self, x: Any) -> Any:
                return self.lstm(x)[0]

        return Recurrent()

    if name == "lstm loop":

        class Looped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.input = nn.Linear(n_in, 4 * hidden)
                self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)

            def forward(self, x: Any) -> Any:
                h = c = torch.zeros(x.shape[1], hidden, device=x.device)
                states = []
                for z in self.input(x).unbind():
                    i, f, g, o = (z + self.recurrent(h)).chunk(4, -1)
                    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                    h = torch.sigmoid(o) * torch.tanh(c)
                    states.append(h)
                return torch.stack(states)

        return Looped()

    def heads(x: Any, parts: int) -> tuple[Any, ...]:
        """Splits [T, B, parts · hidden] into `parts` arrays [B, heads, T, size]."""
        T, B, _ = x.shape
        return x.reshape(T, B, parts, HEADS, hidden // HEADS).permute(2, 1, 3, 0, 4).unbind()

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(hidden, 3 * hidden)
            self.out = nn.Linear(hidden, hidden)

        def forward(self, x: Any) -> Any:
            q, k, v = heads(self.project(x), 3)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(mixed.permute(2, 0, 1, 3).reshape(x.shape))

    class Delta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(hidden, 3 * hidden, bias=False)
            self.strength = nn.Linear(hidden, HEADS)
            self.out = nn.Linear(hidden, hidden, bias=False)

        def forward(self, x: Any) -> Any:
            q, k, v = heads(self.project(x), 3)
            q, k = (nn.functional.normalize(nn.functional.silu(a), dim=-1) for a in (q, k))
            beta = torch.sigmoid(self.strength(x)).permute(1, 2, 0).unsqueeze(-1)
            S = torch.zeros(*q.shape[:2], q.shape[-1], q.shape[-1], device=x.device)
            mixed = []
            for t in range(x.shape[0]):
                key = k[:, :, t]
                error = v[:, :, t] - torch.einsum("bhij,bhj->bhi", S, key)
                S = S + torch.einsum("bhi,bhj->bhij", beta[:, :, t] * error, key)
                mixed.append(torch.einsum("bhij,bhj->bhi", S, q[:, :, t]))
            return self.out(torch.stack(mixed).reshape(x.shape))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.RMSNorm(hidden) for _ in range(2)])
            self.mixer = Attention() if name == "transformer" else Delta()
            wide, narrow = nn.Linear(hidden, WIDER * hidden), nn.Linear(WIDER * hidden, hidden)
            self.mlp = nn.Sequential(wide, nn.GELU(approximate="tanh"), narrow)

        def forward(self, x: Any) -> Any:
            x = x + self.mixer(self.norms[0](x))
            return x + self.mlp(self.norms[1](x))

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2 * n_in, hidden)
            self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])

        def forward(self, x: Any) -> Any:
            previous = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            return self.blocks(self.embed(torch.cat([x, previous], -1)))

    return Blocks()


def flax_body(name: str, n_in: int, hidden: int, rngs: Any) -> Any:
    """Makes the network of a name in flax NNX, from its own modules."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    if name == "lstm":

        class Recurrent(nnx.Module):
            def __init__(self) -> None:
                cell = nnx.OptimizedLSTMCell(n_in, hidden, rngs=rngs)
                self.rnn = nnx.RNN(cell, time_major=True)

            def __call__(self, x: Any) -> Any:
                zeros = jnp.zeros((x.shape[1], hidden))
                return self.rnn(x, initial_carry=(zeros, zeros))

        return Recurrent()

    class Attention(nnx.Module):
        def __init__(self) -> None:
            self.attention = nnx.MultiHeadAttention(HEADS, hidden, decode=False, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.attention(x, mask=nnx.make_causal_mask(x[..., 0]))

    class Delta(nnx.Module):
        def __init__(self) -> None:
            self.project = nnx.Linear(hidden, 3 * hidden, use_bias=False, rngs=rngs)
            self.strength = nnx.Linear(hidden, HEADS, rngs=rngs)
            self.out = nnx.Linear(hidden, hidden, use_bias=False, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            B, T, _ = x.shape
            parts = self.project(x).reshape(B, T, 3, HEADS, -1).transpose(2, 1, 0, 3, 4)
            unit = lambda a: a / jnp.sqrt(jnp.sum(a**2, -1, keepdims=True) + 1e-12)
            q, k = (unit(nnx.silu(a)) for a in parts[:2])
            beta = nnx.sigmoid(self.strength(x)).transpose(1, 0, 2)[..., None]

            def step(S: Any, inputs: Any) -> tuple[Any, Any]:
                q, k, v, beta = inputs
                error = v - jnp.einsum("bhij,bhj->bhi", S, k)
                S = S + jnp.einsum("bhi,bhj->bhij", beta * error, k)
                return S, jnp.einsum("bhij,bhj->bhi", S, q)

            size = hidden // HEADS
            start = jnp.zeros((B, HEADS, size, size))
            mixed = jax.lax.scan(step, start, (q, k, parts[2], beta))[1]
            return self.out(mixed.swapaxes(0, 1).reshape(x.shape))

    class Block(nnx.Module):
        def __init__(self) -> None:
            self.norms = nnx.List([nnx.RMSNorm(hidden, rngs=rngs) for _ in range(2)])
            self.mixer = Attention() if name == "transformer" else Delta()
            self.wide = nnx.Linear(hidden, WIDER * hidden, rngs=rngs)
            self.narrow = nnx.Linear(WIDER * hidden, hidden, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = x + self.mixer(self.norms[0](x))
            return x + self.narrow(nnx.gelu(self.wide(self.norms[1](x))))

    class Blocks(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Linear(2 * n_in, hidden, rngs=rngs)
            self.blocks = nnx.List([Block() for _ in range(LAYERS)])

        def __call__(self, x: Any) -> Any:
            x = x.swapaxes(0, 1)  # flax's attention has the batch first
            previous = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], 1)
            x = self.embed(jnp.concatenate([x, previous], -1))
            for block in self.blocks:
                x = block(x)
            return x.swapaxes(0, 1)

    return Blocks()
