"""Argument checks: say what was expected, what came, and what to do about it.

Every message reads ``function: expected ..., got ... . remedy``. Only ``ValueError`` and ``TypeError`` are
raised. Tensor *values* are looked at on the CPU only, since reading them on an accelerator would wait for the
device.
"""

from collections.abc import Collection
from math import inf, isfinite
from numbers import Real
from typing import Any

from torch import Tensor
from torch import bool as torch_bool

_MANY = 64  # tokens; fewer can all be exactly 0 in a micro-batch that the model knows by heart


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
        raise ValueError(
            f"{fn}: expected equal shapes, got {got}. cotkit does not broadcast; pass one value each."
        )


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
                f"{fn}: expected {name} as a bool tensor (True = counts), got {kind}. "
                f"Convert with {name}.bool()."
            )


def floating(fn: str, **tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is of a floating type."""
    is_tensor(fn, **tensors)
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise TypeError(
                f"{fn}: expected {name} as a float tensor, got {str(t.dtype).removeprefix('torch.')}."
            )


def integer(fn: str, **tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is of an integer type."""
    is_tensor(fn, **tensors)
    for name, t in tensors.items():
        if t.is_floating_point() or t.is_complex() or t.dtype == torch_bool:
            raise TypeError(
                f"{fn}: expected {name} as an integer tensor, got {str(t.dtype).removeprefix('torch.')}."
            )


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


def at_least(fn: str, low: int | float, **numbers: Any) -> None:
    """Raise unless every Python number is finite and not below ``low``."""
    for name, value in numbers.items():
        finite(fn, **{name: value})
        if value < low:
            raise ValueError(f"{fn}: expected {name} >= {low}, got {value}.")


def interval(fn: str, **pairs: Any) -> None:
    """Raise unless every keyword is a pair (low, high) with 0 <= low <= high; high may be infinite."""
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{fn}: expected {name} as a pair (low, high), got {pair!r}.")
        low, high = pair
        finite(fn, **{f"{name}[0]": low})
        if high != inf:
            finite(fn, **{f"{name}[1]": high})
        if not 0 <= low <= high:
            raise ValueError(f"{fn}: expected {name} = (low, high) with 0 <= low <= high, got {pair!r}.")


def between(fn: str, low: int | float, high: int | float, **numbers: Any) -> None:
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

    Refused: logits [B, T, V]; a mask that is not bool; shapes that differ (with a word on the [B, T-1] of
    other libraries); values above 0 (logits, probabilities); a support that is the mask moved one step to the
    left (labels shifted before the call and again inside it); nothing but zeros under a mask of many tokens
    (a mask that counts ignored labels). Zeros alone prove little, since a well-trained model does reach
    log-probs of exactly 0: a few are never refused.
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
            elif x.shape == mask.shape[::-1]:
                hint = "One of the two is transposed: cotkit is batch first."
            raise ValueError(
                f"{fn}: expected equal shapes, got {name} {list(x.shape)}, mask {list(mask.shape)}. {hint}"
            )
        if x.device.type == "cpu" and bool(mask.any()):
            _values(fn, name, x.detach(), mask)


def _values(fn: str, name: str, x: Tensor, mask: Tensor) -> None:
    counted = x[mask]
    slack = 0.1 if x.element_size() < 4 else 1e-3  # rounding can lift a log-prob of 0 above 0, never this far
    if bool((counted > slack).any()):
        raise ValueError(
            f"{fn}: expected {name} as log-probabilities (at most 0), got {counted.max():.4g}. "
            f"These look like logits or probabilities; call tokens.token_logps(logits, labels) first."
        )
    support = x != 0
    outside = bool((support & ~mask).any())
    # Position 0 predicts nothing and is 0 either way, so it is left out of the comparison.
    if outside and bool((support[:, 1:-1] == mask[:, 2:]).all()) and not bool(support[:, -1].any()):
        raise ValueError(
            f"{fn}: expected {name} at the positions of the mask, got them one step to the left. "
            f"The labels were shifted twice: pass labels and mask unshifted, tokens.token_logps shifts once "
            f"({name}[:, t] belongs to labels[:, t])."
        )
    if counted.numel() >= _MANY and not bool(counted.any()):
        raise ValueError(
            f"{fn}: expected {name} below 0 somewhere under the mask, got {counted.numel()} zeros. "
            f"The mask counts positions whose labels are -100: use mask = labels != -100, both unshifted."
        )


def candidates(fn: str, scores: Tensor, rank: Tensor, valid: Tensor | None = None) -> None:
    """Check the scores [B, K] of K candidates of each prompt, their integer ranks and the padding of K."""
    is_tensor(fn, scores=scores, rank=rank)
    if scores.dim() == 3:
        raise ValueError(
            f"{fn}: expected scores [B, K], got {list(scores.shape)}. "
            f"These look like logits or token log-probs; "
            f"call tokens.seq_logps(tokens.token_logps(logits, labels), mask, mean=True) first."
        )
    if scores.dim() == 1:
        raise ValueError(
            f"{fn}: expected scores [B, K], got {list(scores.shape)}. "
            f"For flat rows with a group number call tokens.grouped(scores, group) first."
        )
    if rank.dtype == torch_bool:
        raise TypeError(
            f"{fn}: expected rank as an integer tensor (0 = best), got bool. "
            f"For right and wrong chains pass rank = (~correct).long()."
        )
    floating(fn, scores=scores)
    if rank.is_floating_point():
        kind = str(rank.dtype).removeprefix("torch.")
        raise TypeError(
            f"{fn}: expected rank as an integer tensor (0 = best), got {kind}. "
            f"A reward is not a rank: larger is better there, smaller is better here."
        )
    same_shape(fn, scores=scores, rank=rank)
    ndim(fn, "B K", scores=scores)
    if valid is not None:
        boolean(fn, valid=valid)
        same_shape(fn, scores=scores, valid=valid)


def integers(fn: str, **numbers: Any) -> None:
    """Raise TypeError unless every keyword is a Python int (bool is refused)."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{fn}: expected {name} as an int, got {type(value).__name__}.")
