"""The modules behind the builders of ``adapters.modules``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad, scaled_dot_product_attention
from torch.nn.utils import skip_init

from cotkit.adapters._wrap import Foldable, Wrapped, kaiming, merged_base, place, plain, rebuilt


class Delta(Wrapped):
    """F(x) + g * scale * Up(W_n .. W_1 act(Down(.))), with Up = 0 and W_i = I at first."""

    def __init__(
        self,
        base: nn.Module,
        d_in: int,
        d_out: int,
        r: int,
        *,
        scale: float,
        act: Callable[[Tensor], Tensor] | None,
        bias: bool,
        chain: int,
        sequential: bool,
        gate: float | None,
        tau: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(base)
        where = place(base)
        self.scale, self.act, self.sequential, self.tau = scale, act, sequential, tau
        self.down = skip_init(nn.Linear, d_in, r, bias=bias, **where)
        self.up = skip_init(nn.Linear, r, d_out, bias=bias, **where)
        with torch.no_grad():
            self.down.weight.copy_(kaiming((r, d_in), generator, where))
            for zero in (self.up.weight, self.down.bias, self.up.bias):
                if zero is not None:
                    zero.zero_()
        self.links = nn.ParameterList(nn.Parameter(torch.eye(r, **where)) for _ in range(chain))
        self.gate = None if gate is None else nn.Parameter(torch.tensor(gate, **where))

    @property
    def branch(self) -> nn.Module:  # type: ignore[override]
        return self.up

    def open(self) -> Tensor | float:
        """1 if the gate's value reaches tau, else 0; its gradient is passed straight through."""
        if self.gate is None:
            return 1.0
        return (self.gate >= self.tau).to(self.gate.dtype) + (self.gate - self.gate.detach())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base(*args, **kwargs)
        h = out[0] if isinstance(out, tuple) else out
        x = h if self.sequential else args[0] if args else kwargs["hidden_states"]
        z = self.down(x.to(self.down.weight.dtype))
        z = z if self.act is None else self.act(z)
        for link in self.links:
            z = linear(z, link)
        y = h + (self.up(z) * self.scale * self.open()).to(h.dtype)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def merge(self) -> nn.Module:
        """A plain linear layer that does the same; refused where the branch is not linear."""
        if self.act is not None:
            raise ValueError(
                "merge: expected a linear branch, got an activation in it. Keep the module: a bottleneck "
                "cannot be folded into a weight."
            )
        base = merged_base(self)
        weight, bias = plain("merge", base)
        with torch.no_grad():
            product = _wide(self.down.weight)
            for link in self.links:
                product = _wide(link) @ product
            product = self.scale * float(self.open()) * (_wide(self.up.weight) @ product)
            change = product @ weight.to(product.dtype) if self.sequential else product
            if self.sequential and bias is not None:
                bias = bias.to(product.dtype) + product @ bias.to(product.dtype)
            return rebuilt(base, weight.to(product.dtype) + change, bias)


class Givens(Wrapped):
    """base(R^T x): the input coordinates are rotated, R = P_1 .. P_L, each level rotates disjoint pairs."""

    def __init__(self, base: nn.Module, d: int, *, free: bool) -> None:
        super().__init__(base)
        where = place(base)
        self.free = free
        if free:
            self.block = nn.Parameter(torch.eye(2, **where).repeat(d - 1, 1, 1))
        else:
            self.angle = nn.Parameter(torch.zeros(d - 1, **where))
        for level, (first, second) in enumerate(pairs(d)):
            partner = torch.arange(d)
            partner[first], partner[second] = second, first
            for name, index in (("first", first), ("second", second), ("partner", partner)):
                self.register_buffer(f"_{name}{level}", index.to(where["device"]), persistent=False)
        self.levels = len(pairs(d))

    def rotate(self, x: Tensor) -> Tensor:
        """R^T x over the last dimension, level 1 first."""
        if self.free:
            m00, m01, m10, m11 = self.block.flatten(1).unbind(1)
        else:
            m00, m10 = self.angle.cos(), self.angle.sin()
            m01, m11 = -m10, m00
        done = 0
        for level in range(self.levels):
            first, second = getattr(self, f"_first{level}"), getattr(self, f"_second{level}")
            now = slice(done, done + len(first))
            keep = x.new_ones(x.shape[-1]).index_copy(0, first, m00[now]).index_copy(0, second, m11[now])
            give = x.new_zeros(x.shape[-1]).index_copy(0, first, m10[now]).index_copy(0, second, m01[now])
            x = x * keep + x.index_select(-1, getattr(self, f"_partner{level}")) * give
            done += len(first)
        return x

    def forward(self, x: Tensor) -> Tensor:
        dtype = (self.block if self.free else self.angle).dtype
        return self.base(self.rotate(x.to(dtype)).to(x.dtype))

    def penalty(self) -> Tensor:
        """Sum over the blocks of the squared inner product of their columns; 0 for strict rotations."""
        if not self.free:
            return self.angle.new_zeros(())
        return (self.block[:, :, 0] * self.block[:, :, 1]).sum(1).square().sum()

    def merge(self) -> nn.Module:
        """A plain linear layer with the rotation in its weight."""
        base = merged_base(self)
        weight, bias = plain("merge", base)
        with torch.no_grad():
            # row k of rotate(I) is R^T e_k, so rotate(I) = R, and W R^T has the rows R w
            wide = _wide(weight)
            rotation = self.rotate(torch.eye(wide.shape[1], device=wide.device, dtype=wide.dtype))
            return rebuilt(base, wide @ rotation.T.to(wide.dtype), bias)


def pairs(d: int) -> list[tuple[Tensor, Tensor]]:
    """The pairs of each level, (2^r k, 2^r k + 2^(r-1)) where d is a power of two; d - 1 in all.

    What one level leaves over without a partner goes on to the next as it is.
    """
    levels, left = [], torch.arange(d)
    while len(left) > 1:
        n = len(left) // 2
        levels.append((left[0 : 2 * n : 2], left[1 : 2 * n : 2]))
        left = left[::2]
    return levels


class Chain(Foldable):
    """Chain i of the output reads the chains 1 .. i of the input: one weight [o_i, d_1 + .. + d_i] each."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, old: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(w, requires_grad=i >= old) for i, w in enumerate(weights)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(b, requires_grad=i >= old) for i, b in enumerate(biases or ())
        )

    @property
    def in_features(self) -> int:
        return self.weights[-1].shape[1]

    @property
    def out_features(self) -> int:
        return sum(w.shape[0] for w in self.weights)

    def forward(self, x: Tensor) -> Tensor:
        ends = [w.shape[1] for w in self.weights]
        if x.shape[-1] not in ends:
            raise ValueError(
                f"chain_linear: expected the first chains whole, a width of {ends}, got {x.shape[-1]}."
            )
        parts = []
        for i in range(ends.index(x.shape[-1]) + 1):
            bias = self.biases[i] if len(self.biases) else None
            parts.append(linear(x[..., : ends[i]], self.weights[i], bias))
        return torch.cat(parts, -1)

    def merge(self) -> nn.Linear:
        """A plain linear layer over all chains, zero above the blocks' diagonal."""
        wide = self.in_features
        rows = [pad(w.detach(), (0, wide - w.shape[1])) for w in self.weights]
        new = nn.Linear(wide, self.out_features, bias=len(self.biases) > 0, device="meta")
        new.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
        if len(self.biases):
            new.bias = nn.Parameter(torch.cat([b.detach() for b in self.biases]), requires_grad=False)
        return new.train(self.training)


class ErrorHead(nn.Module):
    """Causal attention over pilot states and earlier errors, with an output layer that starts at 0."""

    def __init__(self, d: int, vocab: int, n_layers: int) -> None:
        super().__init__()
        self.state, self.error = nn.Linear(d, d), nn.Linear(vocab, d, bias=False)
        self.blocks = nn.ModuleList(_Block(d) for _ in range(n_layers))
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, vocab)

    def forward(self, hidden: Tensor, errors: Tensor, mask: Tensor | None = None) -> Tensor:
        if hidden.dim() == 4:
            hidden = hidden.mean(0)
        if hidden.shape[:2] != errors.shape[:2]:
            raise ValueError(
                f"error_head: expected hidden [B, T, D] or [L, B, T, D] and errors [B, T, V] of one B and T, "
                f"got {list(hidden.shape)} and {list(errors.shape)}."
            )
        width = errors.shape[1]
        there = torch.ones(errors.shape[:2], dtype=torch.bool, device=errors.device)
        there = there if mask is None else mask
        known = torch.where(there[..., None], errors.detach(), torch.zeros_like(errors))
        earlier = pad(known, (0, 0, 1, 0))[:, :width]  # what is known of t comes after t
        x = self.state(hidden.detach()) + self.error(earlier)
        steps = torch.arange(width, device=x.device)
        seen = (steps[:, None] > steps) & there[:, None, :]
        seen = seen | (steps[:, None] == steps)  # itself, padding too: a row without any key would be NaN
        for block in self.blocks:
            x = block(x, seen)
        return self.out(self.norm(x))


class _Block(nn.Module):
    """Pre-norm attention of one head, then a feed-forward layer."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.before, self.qkv, self.o = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.after, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        x = x + self.o(scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return x + self.down(gelu(self.up(self.after(x))))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def widths(fn: str, name: str, chains: Sequence[int], total: int) -> list[int]:
    """The widths of the chains, which add up to the layer's size."""
    given = list(chains)
    if not given or not all(isinstance(c, int) and not isinstance(c, bool) and c > 0 for c in given):
        raise ValueError(f"{fn}: expected {name} as integers >= 1, got {chains!r}.")
    if sum(given) != total:
        raise ValueError(f"{fn}: expected {name} to add up to {total}, got {given}. They are widths.")
    return given


def split(
    weight: Tensor, bias: Tensor | None, wide: list[int], high: list[int]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Cut a weight [out, in] into what chain i may read; the rest is dropped."""
    ends = [sum(wide[: i + 1]) for i in range(len(wide))]
    rows = weight.split(high)
    weights = [part[:, :end].clone() for part, end in zip(rows, ends, strict=True)]
    return weights, None if bias is None else [b.clone() for b in bias.split(high)]
