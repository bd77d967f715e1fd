"""What the injected modules share: a base with a trainable part beside it, sizes, dtypes, plain copies."""

import math
from typing import Any

import torch
from torch import Tensor, nn


class Foldable(nn.Module):
    """A module that can be asked for a plain layer that does the same."""

    def merge(self) -> nn.Module:
        """A plain linear layer; refused where there is none."""
        raise ValueError(
            "merge: expected a change of a weight, got one that depends on the input. Keep the module."
        )


class Wrapped(Foldable):
    """A module with a trainable part. What it does not have itself (``weight``, ...) is its base's."""

    base: nn.Module
    branch: nn.Module | None = None  # what its output is added to the base's, if that is how it works

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("penalty", "base", "_own"):
                raise
            return getattr(super().__getattr__("base"), name)


def sizes(fn: str, module: nn.Module) -> tuple[int, int]:
    """Input and output size of a linear map: ``nn.Linear`` and its quantized kin, or Conv1D."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{fn}: expected an nn.Module, got {type(module).__name__}.")
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if hasattr(module, "nx") and hasattr(module, "nf"):  # transformers' Conv1D: weight [in, out]
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    raise ValueError(
        f"{fn}: expected a linear layer, got {type(module).__name__}. "
        f"Name the size of what goes in and out, or a linear layer inside it."
    )


def place(module: nn.Module) -> dict[str, Any]:
    """Device and dtype for new parameters beside ``module``: its own, float32 beside quantized weights."""
    found: list[Tensor] = [*module.parameters()] or [torch.empty(0)]
    packed = any(not p.is_floating_point() or hasattr(p, "quant_state") for p in found)
    return {"device": found[0].device, "dtype": torch.float32 if packed else found[0].dtype}


def kaiming(shape: tuple[int, ...], generator: torch.Generator | None, where: dict[str, Any]) -> Tensor:
    """Uniform in +-1/sqrt(fan_in), as ``nn.Linear`` and LoRA's A begin."""
    bound = 1 / math.sqrt(max(1, math.prod(shape[1:])))
    device = where["device"] if generator is None else generator.device
    dtype = torch.float64 if where["dtype"] == torch.float64 else torch.float32
    drawn = torch.rand(shape, generator=generator, device=device, dtype=dtype)
    return ((2 * drawn - 1) * bound).to(**where)


def is_quantized(module: nn.Module) -> bool:
    """Does the layer hold its weight in 4 or 8 bit?"""
    weight = getattr(module, "weight", None)
    return weight is not None and (
        not weight.is_floating_point() or hasattr(weight, "quant_state") or "Int8" in type(weight).__name__
    )


def plain(fn: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear layer in full precision, detached."""
    sizes(fn, module)
    if is_quantized(module):
        raise ValueError(
            f"{fn}: expected weights in full precision, got {type(module).__name__}. "
            f"The sum would be rounded again: call model.dequantize() first."
        )
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr,operator,assignment]
    bias = getattr(module, "bias", None)
    return weight.T if hasattr(module, "nf") else weight, None if bias is None else bias.detach()


def rebuilt(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A fresh linear layer of the same kind with this weight [out, in] and bias."""
    found = plain("merge", module)[0]
    where: dict[str, Any] = {"device": found.device, "dtype": found.dtype}
    with torch.device("meta"):  # no memory, and nothing drawn from the global generator
        if hasattr(module, "nf"):
            new: nn.Module = type(module)(module.nf, module.nx)  # type: ignore[operator,arg-type]
            weight = weight.T.contiguous()
        else:
            new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    new.weight = nn.Parameter(weight.to(**where), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(**where), requires_grad=False)
    return new.train(module.training)


def merged_base(module: Wrapped) -> nn.Module:
    """The base of a wrapped module; where that was put in too, folded first."""
    return module.base.merge() if isinstance(module.base, Foldable) else module.base
