r"""Experts: several LoRA branches on one layer, and who decides which of them speak.

Conventions: gates [B, T, E] are >= 0 and add up to 1 over the E experts of a token. What depends on the input
cannot be folded into a weight: these modules stay.

Functions: ``router`` gates from the hidden state, by one router or a mixture of them; ``by_step`` gates from
the step of the chain that a token belongs to; ``lora_experts`` the branches on a linear layer; ``gates``
reads what was decided, for ``losses.regularize.localized_balance``; ``hyper_adapter`` bottlenecks made
from the name of a task; ``layer_ensemble`` one small head per layer beside a small model, averaged.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as affine
from torch.nn.functional import relu

from cotkit import _check
from cotkit.adapters._wrap import Wrapped, kaiming, place, sizes

__all__ = ["by_step", "gates", "hyper_adapter", "layer_ensemble", "lora_experts", "router"]

_CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


class _Router(nn.Module):
    """sum_j m_j softmax(W_j x), m = softmax(W_m x); the top k of it, if asked for."""

    def __init__(self, d: int, n_experts: int, n_routers: int, top_k: int | None) -> None:
        super().__init__()
        self.n_experts, self.top_k = n_experts, top_k
        self.routers = nn.Parameter(torch.empty(n_routers, n_experts, d))
        self.main = nn.Parameter(torch.empty(n_routers, d)) if n_routers > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        z = affine(x.to(self.routers.dtype), self.routers.flatten(0, 1)).to(wide)
        p = z.unflatten(-1, (-1, self.n_experts)).softmax(-1)
        if self.main is None:
            p = p.squeeze(-2)
        else:
            m = affine(x.to(self.main.dtype), self.main).to(wide).softmax(-1)
            p = (m[..., None] * p).sum(-2)
        if self.top_k is not None:
            best = p.topk(self.top_k, dim=-1)
            shares = best.values / best.values.sum(-1, keepdim=True)
            p = torch.zeros_like(p).scatter(-1, best.indices, shares)
        return p.to(x.dtype)


class _Given(nn.Module):
    """Gates from a function of the input that is no module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Experts(Wrapped):
    """W0 x + s [(1 - shared) sum_i g_i B_i A_i x + shared B_s A_s x]."""

    def __init__(
        self,
        base: nn.Module,
        n_experts: int,
        r: int,
        *,
        router: nn.Module,
        shared: float,
        scale: float,
        dropout: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(base)
        d_in, d_out = sizes("lora_experts", base)
        where = place(base)
        total = n_experts + (shared > 0)
        self.n_experts, self.shared, self.scale = n_experts, shared, scale
        drawn = [kaiming((r, d_in), generator, where) for _ in range(total)]
        self.down = nn.Parameter(torch.stack(drawn))
        self.up = nn.Parameter(torch.zeros(total, d_out, r, **where))
        self.router, self.dropout = router, nn.Dropout(dropout)
        self.gates, self.spoken = nn.Identity(), nn.Identity()  # to be hooked: `gates`, `lora.valve`

    @property
    def branch(self) -> nn.Module:  # type: ignore[override]
        return self.spoken

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        g = self.gates(self.router(x))
        if g.shape != (*x.shape[:-1], self.n_experts):
            raise ValueError(
                f"lora_experts: expected gates {[*x.shape[:-1], self.n_experts]} for an input "
                f"{list(x.shape)}, got {list(g.shape)}."
            )
        z = affine(self.dropout(x.to(self.down.dtype)), self.down.flatten(0, 1))
        z = z.unflatten(-1, (len(self.down), -1))
        weight = (1 - self.shared) * g.to(z.dtype)
        if self.shared > 0:
            weight = torch.cat([weight, weight.new_full((*weight.shape[:-1], 1), self.shared)], -1)
        z = (z * weight[..., None]).flatten(-2)
        out = affine(z, self.up.transpose(0, 1).flatten(1)) * self.scale
        return y + self.spoken(out).to(y.dtype)


class _HyperAdapter(nn.Module):
    """h + Up(task, layer) relu(Down(task, layer) norm(h)), both made from embeddings."""

    def __init__(self, d: int, r: int, n_tasks: int, n_layers: int, d_task: int) -> None:
        super().__init__()
        self.d, self.r = d, r
        self.task, self.layer = nn.Embedding(n_tasks, d_task), nn.Embedding(n_layers, d_task)
        self.mix = nn.Sequential(nn.Linear(2 * d_task, d_task), nn.ReLU(), nn.Linear(d_task, d_task))
        self.make_down, self.make_up = nn.Linear(d_task, r * d), nn.Linear(d_task, d * r)
        self.norm = nn.LayerNorm(d)

    def forward(self, h: Tensor, task: int | Tensor, layer: int) -> Tensor:
        tasks = torch.as_tensor(task, device=h.device).expand(len(h))
        layers = torch.as_tensor(layer, device=h.device).expand(len(h))
        z = self.mix(torch.cat([self.task(tasks), self.layer(layers)], -1))
        down, up = self.make_down(z).view(-1, self.r, self.d), self.make_up(z).view(-1, self.d, self.r)
        return h + (relu(self.norm(h) @ down.transpose(1, 2)) @ up.transpose(1, 2)).to(h.dtype)


class _LayerEnsemble(nn.Module):
    """Mean over the layers of head_l(relu(A_l [h_l ; s]))."""

    def __init__(self, dims: Sequence[int], small_dim: int, out_dim: int, width: int) -> None:
        super().__init__()
        self.adapt = nn.ModuleList(nn.Linear(d + small_dim, width) for d in dims)
        self.heads = nn.ModuleList(nn.Linear(width, out_dim) for _ in dims)

    def forward(self, hidden: Sequence[Tensor], small: Tensor) -> Tensor:
        if len(hidden) != len(self.heads):
            raise ValueError(
                f"layer_ensemble: expected hidden states of {len(self.heads)} layers, got {len(hidden)}."
            )
        both = zip(self.adapt, self.heads, hidden, strict=True)
        return torch.stack([head(relu(adapt(torch.cat([h, small], -1)))) for adapt, head, h in both]).mean(0)


def router(
    d: int,
    n_experts: int,
    *,
    n_routers: int = 1,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Gates over experts from the hidden state of a token.

    $p = \sum_j m_j \,\mathrm{softmax}(W_j x)$ with $m = \mathrm{softmax}(W_m x)$; with ``top_k`` all but
    the k largest are set to 0 and these divided by their sum.

    One router without ``top_k`` is LoRAMoE's, with ``top_k`` the usual mixture of LoRA experts; several are
    the mixture of routers. A term against all tokens going one way is a loss:
    ``losses.regularize.localized_balance``.

    Args:
        d: width of the hidden state.
        n_experts: E >= 1.
        n_routers: >= 1; how many routers are mixed.
        top_k: 1 to E; experts per token. None: all.
        generator: source of the first weights, uniform in +-1/sqrt(d), no bias.

    Returns:
        A module x [..., D] -> gates [..., E], float32 inside, in the dtype of x.

    Raises:
        ValueError: a number out of range.

    Source: LoRAMoE (2023) arXiv:2312.09979
    Source: MoR (2025) arXiv:2503.23362
    Basis: authors' code for LoRAMoE, run (equal outputs); the mixture reconstructed from an abstract.
    Differs: LoRAMoE nothing; of the mixture the order softmax, mix, top-k, renormalise is our reading.

    Example:
        >>> route = router(2, 3, top_k=2)
        >>> g = route(torch.tensor([[1.0, -1.0]]))
        >>> (g > 0).sum().item(), round(g.sum().item(), 5)
        (2, 1.0)
    """
    _check.integers("router", d=d, n_experts=n_experts, n_routers=n_routers)
    _check.at_least("router", 1, d=d, n_experts=n_experts, n_routers=n_routers)
    if top_k is not None:
        _check.integers("router", top_k=top_k)
        _check.between("router", 1, n_experts, top_k=top_k)
    made = _Router(d, n_experts, n_routers, top_k)
    with torch.no_grad():
        for parameter in made.parameters():
            flat = kaiming((parameter.numel() // d, d), generator, _CPU)
            parameter.copy_(flat.view(parameter.shape))
    return made


def by_step(steps: Tensor, n_experts: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Gates that send each token to the expert of the step it belongs to, without anything learned.

    Use them through a function that returns those of the batch at hand, and a shared expert beside them:
    ``lora_experts(layer, 3, 16, router=lambda x: now["gates"], shared=0.5)``.

    Args:
        steps: number of the step of each token, 0, 1, ..., integers [B, T]; below 0: the question, which one
            expert per row reads, drawn at random.
        n_experts: E, the number of steps.
        generator: source of that draw.

    Returns:
        Float32 [B, T, E], one 1 for each token.

    Raises:
        ValueError: steps of another shape, or (on the CPU) a step with no expert.
        TypeError: steps that are no integers.

    Source: MoTE (2024) arXiv:2405.00557
    Basis: paper; no code was found.
    Differs: nothing; dropping steps in the attention is a mask of the model, not of the experts.

    Example:
        >>> by_step(torch.tensor([[0, 1]]), 2).tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    _check.ndim("by_step", "B T", steps=steps)
    _check.integer("by_step", steps=steps)
    _check.integers("by_step", n_experts=n_experts)
    _check.at_least("by_step", 1, n_experts=n_experts)
    if steps.device.type == "cpu" and bool((steps >= n_experts).any()):
        raise ValueError(f"by_step: expected steps below {n_experts}, got {int(steps.max())}.")
    device = steps.device if generator is None else generator.device
    drawn = torch.randint(n_experts, (len(steps), 1), generator=generator, device=device).to(steps.device)
    expert = torch.where(steps < 0, drawn, steps.long())
    return torch.nn.functional.one_hot(expert, n_experts).float()


def lora_experts(
    linear: nn.Module,
    n_experts: int,
    r: int,
    *,
    router: Callable[[Tensor], Tensor],
    shared: float = 0.0,
    alpha: float = 32.0,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Several LoRA branches on one linear layer, weighted by gates.

    $$y = W_0 x + \frac{\alpha}{r}\Big[(1 - \lambda) \sum_i g_i B_i A_i x + \lambda B_s A_s x\Big]$$
    with gates g from the router and $\lambda$ the weight of one expert that all tokens share. Every branch is
    computed, also where its gate is 0.

    LoRAMoE: on the three feed-forward maps of each block, six experts of rank 4, a router for each map,
    ``lambda m: lora_experts(m, 6, 4, router=router(m.in_features, 6))``. MoTE: one expert for each step of
    the chain, `by_step`, and ``shared=0.5``.

    Args:
        linear: the layer, frozen by ``modules.inject``; in 4 bit if you like.
        n_experts: E >= 1.
        r: >= 1; rank of each expert.
        router: from the input [B, T, D] to gates [B, T, E]: `router`, or any function. A module becomes part
            of the layer and is trained and saved with it.
        shared: lambda in [0, 1]; above 0 there is one more expert. MoTE: 0.5.
        alpha: LoRA's alpha. LoRAMoE: 32.
        dropout: in [0, 1), on the branches' input. LoRAMoE: 0.05.
        generator: source of each first A, uniform in +-1/sqrt(d_in); each B starts at 0, so nothing changes.

    Returns:
        A module with ``base``, ``down`` [E(+1), r, D], ``up`` [E(+1), Do, r], ``router``.

    Raises:
        ValueError: not a linear layer, a number out of range, or, in the forward pass, gates of another
            shape.

    Source: LoRAMoE (2023) arXiv:2312.09979
    Source: MoTE (2024) arXiv:2405.00557
    Source: MoR (2025) arXiv:2503.23362
    Basis: authors' code for LoRAMoE, run (equal outputs); MoTE after its text; MoR from an abstract.
    Differs: dropout is drawn once for all experts, the released LoRAMoE draws it for each.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> expert = lora_experts(layer, 2, 1, router=lambda x: torch.tensor([[0.25, 0.75]]), alpha=1.0)
        >>> _ = nn.init.ones_(expert.down)
        >>> expert.up.data[1] = torch.tensor([[2.0], [0.0]])
        >>> x = torch.tensor([[1.0, 3.0]])
        >>> (expert(x) - layer(x)).tolist()  # 0.75 * 2 * (1 + 3)
        [[6.0, 0.0]]
    """
    _check.integers("lora_experts", n_experts=n_experts, r=r)
    _check.at_least("lora_experts", 1, n_experts=n_experts, r=r)
    _check.between("lora_experts", 0, 1, shared=shared, dropout=dropout)
    _check.finite("lora_experts", alpha=alpha)
    module = router if isinstance(router, nn.Module) else _Given(router)
    return _Experts(
        linear,
        n_experts,
        r,
        router=module.to(**place(linear)),
        shared=shared,
        scale=alpha / r,
        dropout=dropout,
        generator=generator,
    )


@contextmanager
def gates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Listen to the gates of every layer of experts while the model runs.

    Args:
        model: with `lora_experts` in it.

    Yields:
        A dict, filled by each forward pass inside the block: name of the layer -> gates [B, T, E], gradient
        flows. Under gradient checkpointing they carry none: switch it off where a loss needs them.

    Raises:
        ValueError: the model has no such layer.

    Source: none (plumbing)

    Example:
        >>> layer = nn.Sequential(lora_experts(nn.Linear(2, 2), 3, 1, router=router(2, 3)))
        >>> with gates(layer) as seen:
        ...     _ = layer(torch.ones(4, 5, 2))
        >>> {name: tuple(g.shape) for name, g in seen.items()}
        {'0': (4, 5, 3)}
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _Experts)}
    if not layers:
        raise ValueError("gates: expected a model with lora_experts, got none. Put them in with inject.")
    seen: dict[str, Tensor] = {}

    def listen(name: str) -> Callable:
        return lambda _module, _args, out: seen.__setitem__(name, out)

    handles = [m.gates.register_forward_hook(listen(name)) for name, m in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hyper_adapter(
    d: int,
    r: int,
    n_tasks: int,
    n_layers: int,
    *,
    d_task: int = 64,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""One generator for the bottleneck adapters of all tasks and layers.

    $h + U \,\mathrm{relu}(D \,\mathrm{norm}(h))$ where D and U are linear in
    $z = \mathrm{MLP}([\text{task} ; \text{layer}])$, and U is 0 at first.

    Hang it behind the blocks, with the task of the batch at hand:
    ``block.register_forward_hook(lambda m, i, out: adapter(out, now["task"], l))``.

    Args:
        d: width of the hidden states.
        r: width of the bottleneck.
        n_tasks: number of task embeddings.
        n_layers: number of layer embeddings.
        d_task: width of both, and of z.
        generator: source of the first weights.

    Returns:
        A module ``adapter(h [B, T, D], task, layer) -> [B, T, D]``; ``task`` an integer or one per row [B].

    Raises:
        ValueError: a size below 1.

    Source: FM3 (2023) arXiv:2303.12489
    Basis: reconstructed from the abstract; the equations are those of HyperFormer, from memory.
    Differs: no embedding of the position within a layer.

    Example:
        >>> adapter = hyper_adapter(4, 2, n_tasks=3, n_layers=2)
        >>> h = torch.ones(1, 5, 4)
        >>> torch.equal(adapter(h, 1, 0), h)
        True
    """
    given = {"d": d, "r": r, "n_tasks": n_tasks, "n_layers": n_layers, "d_task": d_task}
    _check.integers("hyper_adapter", **given)
    _check.at_least("hyper_adapter", 1, **given)
    with torch.random.fork_rng(devices=[]):  # PyTorch's own first values are replaced
        made = _HyperAdapter(d, r, n_tasks, n_layers, d_task)
    _draw(made, generator)
    with torch.no_grad():
        made.make_up.weight.zero_()
    return made


def layer_ensemble(
    dims: Sequence[int],
    small_dim: int,
    out_dim: int,
    *,
    width: int = 64,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Many views of one input: each layer of a large model beside a small model, averaged.

    $\frac1L \sum_l H_l \,\mathrm{relu}(A_l [h_l ; s])$ with $h_l$ the pooled hidden state of layer l and s
    the features of a small model that saw the raw input and was not pre-trained.

    Args:
        dims: width of each layer's pooled hidden state.
        small_dim: width of the small model's features.
        out_dim: width of the output (classes, or 1).
        width: width of each adapting layer.
        generator: source of the first weights.

    Returns:
        A module ``ensemble(hidden, small) -> [B, out_dim]``; ``hidden`` a list of [B, dims[l]], ``small``
        [B, small_dim]. Detach ``hidden`` to keep the large model as it is.

    Raises:
        ValueError: no layer, a size below 1, or, in the forward pass, another number of layers.

    Source: LEVI (2024) arXiv:2402.04644
    Basis: reconstructed from the abstract and from memory; the form of the combination is not verified.
    Differs: not known.

    Example:
        >>> ensemble = layer_ensemble([4, 6], 3, 2)
        >>> ensemble([torch.ones(5, 4), torch.ones(5, 6)], torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """
    if not dims:
        raise ValueError("layer_ensemble: expected the width of at least one layer, got none.")
    given = {"small_dim": small_dim, "out_dim": out_dim, "width": width}
    given |= {f"dims[{i}]": d for i, d in enumerate(dims)}
    _check.integers("layer_ensemble", **given)
    _check.at_least("layer_ensemble", 1, **given)
    with torch.random.fork_rng(devices=[]):  # PyTorch's own first values are replaced
        made = _LayerEnsemble(dims, small_dim, out_dim, width)
    _draw(made, generator)
    return made


def _draw(module: nn.Module, generator: torch.Generator | None) -> None:
    """First weights from the given source: uniform in +-1/sqrt(fan_in), biases 0."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                part.weight.copy_(kaiming(tuple(part.weight.shape), generator, _CPU))
            if isinstance(part, nn.Linear):
                part.bias.zero_()
