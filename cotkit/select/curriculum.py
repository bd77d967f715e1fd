"""Curriculum: how a number, or the choice of rows, changes over a run.

Conventions: ``step`` counts from 0, ``total`` steps make the run; shares are fractions of ``total``.
Functions: ``schedule`` a number from start to end.
"""

import math

from cotkit import _check

__all__ = ["schedule"]

_KINDS = ("linear", "cosine", "exponential", "inverse", "half-sine")


def schedule(
    step: int | float,
    total: int | float,
    start: float,
    end: float,
    *,
    kind: str = "linear",
    warmup: float = 0.0,
    hold: float = 0.0,
) -> float:
    r"""A number that moves from ``start`` to ``end`` over a run and then stays.

    With $x$ from 0 to 1, $a$ = start, $b$ = end: linear $a + (b-a)x$; cosine $b + (a-b)\frac{1+\cos\pi x}2$;
    exponential $a\,(b/a)^x$; inverse $1/(\frac{1-x}a + \frac xb)$; half-sine $b + (a-b)\sin\frac{\pi(1-x)}2$.

    Args:
        step: steps already taken; beyond ``total`` nothing changes any more.
        total: steps until ``end``, > 0.
        start: first value.
        end: last value. "exponential" and "inverse" need both ends above 0.
        kind: "linear", "cosine", "exponential", "inverse" or "half-sine".
        warmup: share of ``total`` in which the value first rises from 0 to ``start``, in a line.
        hold: share of ``total``, after the warm-up, in which it stays at ``start``.

    Returns:
        The value at ``step``.

    Raises:
        ValueError: ``total <= 0``, ``step < 0``, unknown ``kind``, shares outside [0, 1] or above 1 together,
            an end that is not above 0 where it must be.

    Source: CAFT (2025) arXiv:2506.07833 rsine of the released code (half-sine from 1 to 0)
    Source: MFT (2024) arXiv:2403.02178 ``schedule(step, 2 / 3 * total + 1, 0, p)``, the 1 as in the code
    Source: UFT (2025) arXiv:2505.16984 cosine
    Source: SKIntern (2024) arXiv:2409.13183 linear, exponential, inverse
    Basis: authors' code for CAFT and MFT; second-hand for the others, whose exponential and inverse are read
        as the geometric and the harmonic line.
    Differs: nothing

    Example:
        >>> [schedule(s, 4, 1.0, 0.0) for s in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]
        >>> round(schedule(2, 4, 1.0, 0.0, kind="half-sine"), 4)  # sin(pi / 4)
        0.7071
    """
    _check.at_least("schedule", 0, step=step)
    _check.positive("schedule", total=total)
    _check.finite("schedule", start=start, end=end)
    _check.one_of("schedule", _KINDS, kind=kind)
    _check.between("schedule", 0, 1, warmup=warmup, hold=hold)
    _check.between("schedule", 0, 1, **{"warmup + hold": warmup + hold})
    if kind in ("exponential", "inverse"):
        _check.positive("schedule", start=start, end=end)
    share = min(step / total, 1.0)
    if share < warmup:
        return start * share / warmup
    if share < warmup + hold:
        return float(start)
    x = (share - warmup - hold) / (1 - warmup - hold) if warmup + hold < 1 else 1.0
    if kind == "exponential":
        return float(start * (end / start) ** x)
    if kind == "inverse":
        return 1 / ((1 - x) / start + x / end)
    if kind == "linear":
        return start + (end - start) * x
    left = (1 + math.cos(math.pi * x)) / 2 if kind == "cosine" else math.sin(math.pi / 2 * (1 - x))
    return end + (start - end) * left
