"""Argument checks: say what was expected, what came, and what to do about it.

Every message reads ``function: expected ..., got ... . remedy``. Only ``ValueError`` and ``TypeError`` are raised.
Tensor *values* are looked at on the CPU only, since reading them on an accelerator would wait for the device.
"""

from collections.abc import Collection
from math import isfinite
from numbers import Real
from typing import Any

from torch import Tensor, bool as torch_bool


def is_tensor(fn: str, **tensors: Any) -> None:
    """Raise TypeError unless every keyword is a tensor."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{fn}: expected {name} as a torch.Tensor, got {type(value).__name__}.")


def same_shape(fn: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have one shape."""
    is_tensor(fn, **tensors)
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    if len({tuple(s) for s in shapes.values()}) > 1:
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{fn}: expected equal shapes, got {got}. cotkit does not broadcast; pass one value each.")


def ndim(fn: str, dims: str, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has as many dimensions as ``dims`` names, e.g. ``"B T"``."""
    is_tensor(fn, **tensors)
    for name, t in tensors.items():
        if t.dim() != len(dims.split()):
            raise ValueError(f"{fn}: expected {name} [{dims.replace(' ', ', ')}], got {list(t.shape)}.")


def boolean(fn: str, **masks: Tensor) -> None:
    """Raise TypeError unless every mask is a bool tensor (floats and 0/1 integers are refused)."""
    is_tensor(fn, **masks)
    for name, m in masks.items():
        if m.dtype != torch_bool:
            kind = str(m.dtype).removeprefix("torch.")
            raise TypeError(
                f"{fn}: expected {name} as a bool tensor (True = counts), got {kind}. Convert with {name}.bool()."
            )


def floating(fn: str, **tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is of a floating type."""
    is_tensor(fn, **tensors)
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise TypeError(f"{fn}: expected {name} as a float tensor, got {str(t.dtype).removeprefix('torch.')}.")


def integer(fn: str, **tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is of an integer type."""
    is_tensor(fn, **tensors)
    for name, t in tensors.items():
        if t.is_floating_point() or t.is_complex() or t.dtype == torch_bool:
            raise TypeError(f"{fn}: expected {name} as an integer tensor, got {str(t.dtype).removeprefix('torch.')}.")


def positive(fn: str, **numbers: Any) -> None:
    """Raise unless every Python number is finite and above 0."""
    for name, value in numbers.items():
        finite(fn, **{name: value})
        if value <= 0:
            raise ValueError(f"{fn}: expected {name} > 0, got {value}.")


def finite(fn: str, **numbers: Any) -> None:
    """Raise unless every keyword is a finite Python number."""
    for name, value in numbers.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{fn}: expected {name} as a number, got {type(value).__name__}.")
        if not isfinite(value):
            raise ValueError(f"{fn}: expected {name} finite, got {value}.")


def between(fn: str, low: float, high: float, **numbers: Any) -> None:
    """Raise unless every Python number lies in [low, high]."""
    for name, value in numbers.items():
        finite(fn, **{name: value})
        if not low <= value <= high:
            raise ValueError(f"{fn}: expected {name} in [{low}, {high}], got {value}.")


def one_of(fn: str, allowed: Collection[Any], **values: Any) -> None:
    """Raise ValueError unless every keyword is one of ``allowed``."""
    for name, value in values.items():
        if value not in allowed:
            listed = ", ".join(repr(a) for a in allowed)
            raise ValueError(f"{fn}: expected {name} to be one of {listed}, got {value!r}.")


def token_logps(fn: str, mask: Tensor, **logps: Tensor) -> None:
    """Check log-probs [B, T] against their mask and guess the usual mistakes.

    Refuses a mask that is not bool, shapes that differ (with a word on the [B, T-1] of other libraries), positive
    values (logits), values that are all zero under the mask, and a support that is the mask moved one step to the
    left (labels that were shifted before the call and again inside it).
    """
    is_tensor(fn, mask=mask, **logps)
    for name, x in logps.items():
        if x.dim() == 3:
            raise ValueError(
                f"{fn}: expected {name} [B, T], got {list(x.shape)}. These look like logits [B, T, V]; "
                f"call tokens.token_logps(logits, labels) first."
            )
    ndim(fn, "B T", mask=mask, **logps)
    boolean(fn, mask=mask)
    floating(fn, **logps)
    for name, x in logps.items():
        if x.shape != mask.shape:
            hint = "cotkit does not broadcast; pass one value per token."
            if x.shape[0] == mask.shape[0] and x.shape[1] == mask.shape[1] - 1:
                hint = (
                    f"{name} has one column fewer: other libraries drop the first position; "
                    f"put a zero column in front, torch.nn.functional.pad({name}, (1, 0))."
                )
            raise ValueError(f"{fn}: expected equal shapes, got {name} {list(x.shape)}, mask {list(mask.shape)}. {hint}")
        if x.device.type == "cpu" and bool(mask.any()):
            _values(fn, name, x.detach(), mask)


def _values(fn: str, name: str, x: Tensor, mask: Tensor) -> None:
    counted = x[mask]
    if bool((counted > 1e-6).any()):
        raise ValueError(
            f"{fn}: expected {name} as log-probabilities (at most 0), got {counted.max():.4g}. "
            f"These look like logits or probabilities; call tokens.token_logps(logits, labels) first."
        )
    support = x != 0
    if not bool((support & mask).any()):
        raise ValueError(
            f"{fn}: expected {name} below 0 somewhere under the mask, got zeros only. "
            f"The mask counts positions whose labels are -100: use mask = labels != -100, both unshifted."
        )
    if bool((support[:, :-1] == mask[:, 1:]).all()) and not bool(support[:, -1].any()) and bool(mask[:, 1:].any()):
        if not bool((support == mask).all()):
            raise ValueError(
                f"{fn}: expected {name} at the positions of the mask, got them one step to the left. "
                f"The labels were shifted twice: pass them unshifted, tokens.token_logps shifts once."
            )
