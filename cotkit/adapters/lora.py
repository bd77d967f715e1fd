r"""LoRA at run time: turn its strength like a valve, or tie a knot and start the next link of a chain.

Conventions: adapters are peft's; every active one counts. ``alpha`` multiplies what a branch adds, on top of
its own scaling, so 1 is the adapter as it was trained, 0 the base model, above 1 beyond what was trained.

Functions: ``valve`` scales every branch inside a ``with`` block, for all rows or row by row;
``merge_and_reset`` adds the branches to the weights and starts them anew.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cotkit import _check
from cotkit.adapters._wrap import Wrapped, is_quantized, kaiming

__all__ = ["merge_and_reset", "valve"]

_OWN_ARGUMENTS = ("adapter_names", "alora_offsets")  # of peft's layers; their base does not take them


@contextmanager
def valve(model: nn.Module, alpha: float | Tensor) -> Iterator[None]:
    r"""Run a model at $\theta + \alpha \Delta\theta$: scale what its LoRA branches add, inside the block.

    $y = W x + \alpha \, s B A x$ in every adapted layer. Where $\Delta\theta$ was learned on short chains,
    the chains grow shorter with alpha: between 0 and 1 lengths in between, above 1 shorter ones than were
    ever trained, below 0 longer ones than the base model's. An adapter that learned long chains turns the
    other way round.

    With one alpha per row a batch mixes strengths, which trains the valve for all its positions
    (CoT-Valve++): ``alpha = 1 - (m - m_min) / (m_max - m_min)`` with m the length of the row's chain among
    those of its question. The gradient a row sends to the adapter is scaled by its alpha, hence a row at 0
    teaches nothing.

    Works on a 4-bit base, in ``generate``, and on DoRA and the modules of `inject`, where the output is
    interpolated from the base's. Blocks inside one another multiply. Call ``backward`` inside the block: with
    gradient checkpointing the layers run again in it.

    Args:
        model: with peft's LoRA, or with modules put in by ``modules.inject``; its weights are not touched.
        alpha: a number, negative or above 1 if you like, or a tensor [B] with one for each row of the batch
            (each sequence that is generated, with several per prompt). Constant: no gradient reaches it.

    Yields:
        None.

    Raises:
        ValueError: no adapter, one that is merged into the weights, one that trained more than branches
            (biases, whole modules), so that alpha 0 would not be the base; alpha not finite; in the forward
            pass, another number of rows.
        TypeError: ``alpha`` is neither a number nor a float tensor.

    Source: CoT-Valve (2025) arXiv:2502.09601 Eq. 2, 3
    Basis: paper; no code was released.
    Differs: nothing.

    Example:
        >>> from cotkit import lab
        >>> model, tokenizer = lab.load("tiny", lora=4)
        >>> ids = tokenizer("17+5", return_tensors="pt")["input_ids"]
        >>> with torch.no_grad(), valve(model, 0.0):
        ...     closed = model(ids).logits
        >>> with torch.no_grad(), model.disable_adapter():
        ...     torch.equal(closed, model(ids).logits)
        True
    """
    rows = _rows(_factor(alpha))
    handles = []
    try:
        for module, hook in _branches(model, rows):
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def merge_and_reset(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    generator: torch.Generator | None = None,
) -> list[str]:
    r"""Tie a knot: add each LoRA to its weight and start the next link of the chain.

    $W \leftarrow W + s B A$, then $B = 0$ and A drawn anew. The model computes what it did; after M links the
    change of a weight has rank up to M r, with the memory of one adapter. Start the schedule of the learning
    rate again too.

    Args:
        model: with peft's LoRA on weights in full precision; changed in place, its active adapters only.
        optimizer: whose state of A and B is dropped (moments and step count).
        generator: source of the new A, uniform in +-1/sqrt(fan_in).

    Returns:
        The names of the layers that were merged.

    Raises:
        ValueError: no LoRA; a base in 4 or 8 bit, which would round the sum (take it out with
            ``interop.peft.merged`` and load it again); a weight that is tied to another one; DoRA or another
            variant; an adapter that is merged already; NaN or infinity in a product. Nothing is changed then.

    Source: Chain of LoRA (2024) arXiv:2401.04151
    Basis: second-hand: abstract and summaries; no code was released.
    Differs: nothing known; the rank of the next link stays the same.

    Example:
        >>> from cotkit import lab
        >>> model, tokenizer = lab.load("tiny", lora=4)
        >>> len(merge_and_reset(model))  # seven linear layers in each of four blocks
        28
    """
    layers = [(name, m) for name, m in _lora_layers(model) if _active(m)]
    if not layers:
        raise ValueError("merge_and_reset: expected a model with LoRA, got none. Use peft.get_peft_model.")
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    for name, layer in layers:
        _mergeable(name, layer, owners)
    for _, layer in layers:
        base = layer.get_base_layer().weight
        for adapter in _active(layer):
            with torch.no_grad():
                base.add_(layer.get_delta_weight(adapter).to(base.dtype))
                fresh, silent = _factors(layer, adapter)
                where = {"device": fresh.device, "dtype": fresh.dtype}
                fresh.copy_(kaiming(tuple(fresh.shape), generator, where))
                silent.zero_()
            if optimizer is not None:
                for parameter in (fresh, silent):
                    optimizer.state.pop(parameter, None)
    return [name for name, _ in layers]


def _factor(alpha: Any) -> Tensor:
    if isinstance(alpha, Tensor):
        _check.floating("valve", alpha=alpha)
        if alpha.dim() > 1:
            raise ValueError(
                f"valve: expected alpha as a number or one per row [B], got {list(alpha.shape)}."
            )
        if alpha.device.type == "cpu" and not bool(torch.isfinite(alpha).all()):
            raise ValueError(f"valve: expected alpha finite, got {alpha.tolist()}.")
        return alpha.detach().clone()
    _check.finite("valve", alpha=alpha)
    return torch.tensor(float(alpha), dtype=torch.float64)


def _rows(factor: Tensor) -> Callable[[Tensor], Tensor]:
    """The factor for an output: over all but its rows, at least in float32, copied to a device once."""
    placed: dict[Any, Tensor] = {}

    def rows(out: Tensor) -> Tensor:
        if factor.dim() == 1 and len(factor) != len(out):
            raise ValueError(
                f"valve: expected one alpha for each of {len(out)} rows, got {len(factor)}. "
                f"Several answers per prompt are rows too: alpha.repeat_interleave(n)."
            )
        key = out.device, torch.promote_types(out.dtype, torch.float32)
        if key not in placed:
            placed[key] = factor.to(*key)
        return placed[key].view(-1, *[1] * (out.dim() - 1)) if factor.dim() else placed[key]

    return rows


def _scaled(rows: Callable[[Tensor], Tensor]) -> Callable:
    def hook(_module: nn.Module, _args: Any, _kwargs: Any, out: Tensor) -> Tensor:
        by = rows(out)
        # a tensor on purpose, never a number: checkpointing then notices a backward pass outside of the block
        return (out.to(by.dtype) * by).to(out.dtype)

    return hook


def _interpolated(rows: Callable[[Tensor], Tensor], base: nn.Module) -> Callable:
    """Output of the base plus alpha times what the module changes; exact at 0 and at 1."""

    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        if getattr(module, "disable_adapters", False):
            return out
        plain = base(*args, **{k: v for k, v in kwargs.items() if k not in _OWN_ARGUMENTS})
        first, start = (out[0], plain[0]) if isinstance(out, tuple) else (out, plain)
        by = rows(first)
        mixed = torch.lerp(start.to(by.dtype), first.to(by.dtype), by).to(first.dtype)
        return (mixed, *out[1:]) if isinstance(out, tuple) else mixed

    return hook


def _branches(model: nn.Module, rows: Callable[[Tensor], Tensor]) -> list[tuple[nn.Module, Callable]]:
    """What to hook: the last map of each branch, or the whole layer where a branch cannot be told apart."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[tuple[nn.Module, Callable]] = []
    for name, layer in _lora_layers(model):
        if layer.merged:
            raise ValueError(f"valve: expected LoRA beside the weights, got {name} merged. Unmerge it first.")
        maps = [layer.lora_B[a] for a in layer.lora_B]
        if maps and all(isinstance(m, nn.Module) for m in maps) and not layer.lora_variant:
            found += [(m, _scaled(rows)) for m in maps]
        else:
            found.append((layer, _interpolated(rows, layer.base_layer)))
    for _, wrapped in model.named_modules():
        if isinstance(wrapped, Wrapped):
            branch = wrapped.branch
            hook = _interpolated(rows, wrapped.base) if branch is None else _scaled(rows)
            found.append((wrapped if branch is None else branch, hook))
    if not found:
        raise ValueError("valve: expected a model with LoRA, got none. Use peft.get_peft_model or inject.")
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"valve: expected an adapter of LoRA branches alone, got {name} trained whole "
                f"(modules_to_save). At alpha = 0 it would not be the base model."
            )
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"valve: expected an adapter of LoRA branches alone, got bias={config.bias!r}. "
                f"At alpha = 0 it would not be the base model."
            )
    return found


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in layers:
        if isinstance(layer, MultiheadAttention | ParamWrapper):
            raise ValueError(
                f"lora: expected LoRA on linear layers, embeddings or convolutions, got "
                f"{type(layer).__name__} at {name}, whose branch is not a module of its own."
            )
    return layers


def _active(layer: Any) -> list[str]:
    return [a for a in layer.active_adapters if a in layer.lora_A or a in layer.lora_embedding_A]


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A (drawn) and B (0) of a LoRA; peft starts an embedding's the other way round, which does no harm."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _mergeable(name: str, layer: Any, owners: dict[int, list[str]]) -> None:
    """Raise unless every active LoRA of the layer can be added to its weight."""
    base = layer.get_base_layer()
    if layer.merged:
        raise ValueError(f"merge_and_reset: expected LoRA beside the weights, got {name} merged already.")
    if is_quantized(base):
        raise ValueError(
            f"merge_and_reset: expected weights in full precision, got {type(base).__name__} at {name}. It "
            f"would round the sum: merge with interop.peft.merged, save, and load that in 4 bit."
        )
    others = [n for n in owners[id(base.weight)] if not n.startswith(f"{name}.")]
    if others:
        raise ValueError(
            f"merge_and_reset: expected {name} to have a weight of its own, got one tied to {others[0]}, "
            f"which would change with it. Leave one of them out of target_modules and untie them."
        )
    for adapter in _active(layer):
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            raise ValueError(f"merge_and_reset: expected plain LoRA, got a variant or a bias at {name}.")
        with torch.no_grad():
            finite = torch.isfinite(layer.get_delta_weight(adapter)).all()
        if not bool(finite):
            raise ValueError(
                f"merge_and_reset: expected finite numbers, got NaN or infinity in the LoRA of {name}. "
                f"Nothing was changed."
            )
