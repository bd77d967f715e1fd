"""The one place where token terms become a scalar: masked sums over an explicit count."""

from typing import Any

import torch
from torch import Tensor

from cotkit._check import one_of


def check_denom(fn: str, denom: Any) -> None:
    """Raise unless ``denom`` is None, a number > 0 or a 0-d tensor (whose value is read on the CPU only)."""
    if denom is None:
        return
    if isinstance(denom, Tensor):
        if denom.dim() != 0:
            raise ValueError(
                f"{fn}: expected denom as a number or 0-d tensor, got shape {list(denom.shape)}."
            )
        if denom.device.type != "cpu":
            return
    elif isinstance(denom, bool) or not isinstance(denom, int | float):
        raise TypeError(
            f"{fn}: expected denom as a number, a 0-d tensor or None, got {type(denom).__name__}."
        )
    if not bool(denom > 0) or denom == float("inf"):
        raise ValueError(
            f"{fn}: expected denom > 0 and finite, got {float(denom)}. "
            f"It is the count over the whole accumulated batch."
        )


def total(fn: str, values: Tensor, mask: Tensor, *, per: str = "token", denom: Any = None) -> Tensor:
    """Sum of ``values`` [B, T] under ``mask``, divided once.

    per="token": the sum over all counted tokens / denom (None: their number in this call).
    per="sequence": the token mean inside each row, summed over rows / denom (None: the number of rows in this
    call that count at least one token). Masked positions are dropped before any arithmetic, so a NaN there is
    harmless; a NaN under the mask stays. An empty mask gives 0 with zero gradient.
    """
    one_of(fn, ("token", "sequence"), per=per)
    check_denom(fn, denom)
    kept = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    if per == "token":
        summed, count = kept.sum(), mask.sum()
    else:
        lengths = mask.sum(1)
        summed, count = (kept.sum(1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
    return summed / (count.clamp(min=1) if denom is None else denom)
