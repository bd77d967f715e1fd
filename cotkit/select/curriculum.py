"""Curriculum: how a number, or the choice of rows, changes over a run.

Conventions: ``step`` counts from 0, ``total`` steps make the run; shares are fractions of ``total``; choices
of rows are lists of row numbers.
Functions: ``schedule`` a number from start to end; ``match_distribution`` rows drawn to a histogram of
difficulty.

Composed, not offered: stages from easy to hard are ``np.array_split(np.argsort(difficulty), stages)`` (SARI),
prioritised sampling is ``rng.choices(rows, weights=[1 - rate for rate in rates])`` (Kimi).
"""

import math
import random
from collections.abc import Mapping, Sequence

from cotkit import _check

__all__ = ["match_distribution", "schedule"]

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


def match_distribution(
    levels: Sequence[int], distribution: Mapping[int, float], k: int, *, rng: random.Random
) -> list[int]:
    r"""Draw k rows so that their difficulty follows a given histogram.

    Level $l$ gets $k\,w_l / \sum w$ rows, rounded so that the counts add up (largest remainder first, of
    equal remainders the lower level). A level with too few rows takes what it has, and each row that it lacks
    comes from the nearest level with rows left, of two equally near the lower.

    Args:
        levels: difficulty of each row, a whole number (`select.difficulty.tiers` gives them).
        distribution: weight of each level, >= 0, in any unit. P_eval of the paper is the histogram of a
            validation set, ``collections.Counter(levels_of_it)``; its P_C falls with difficulty, such as
            ``{1: 5, 2: 4, 3: 3, 4: 2, 5: 1}``. A level of weight 0, or not named, is never drawn from.
        k: rows to draw, >= 0.
        rng: draws them, without replacement.

    Returns:
        Row numbers, ascending. For a curriculum sort them by level.

    Raises:
        ValueError: a weight below 0, no weight above 0, ``k < 0`` or more than the rows of the levels with
            a weight.
        TypeError: ``k`` or a level is no int, ``rng`` no ``random.Random``.

    Source: LLM-adaptive difficulty (2025) arXiv:2504.11919 both target distributions
    Basis: second-hand; the authors released no code.
    Differs: the paper does not say how it rounds and what happens to a level with too few rows.

    Example:
        >>> levels = [1, 1, 1, 2, 2, 3]
        >>> drawn = match_distribution(levels, {1: 1, 2: 1, 3: 2}, 4, rng=random.Random(0))
        >>> [levels[i] for i in drawn]  # 1, 1 and 2 rows wanted; level 3 has one, level 2 lends the other
        [1, 2, 2, 3]
    """
    _check.integers("match_distribution", k=k)
    _check.at_least("match_distribution", 0, k=k)
    if not isinstance(rng, random.Random):
        raise TypeError(f"match_distribution: expected rng as a random.Random, got {type(rng).__name__}.")
    rows: dict[int, list[int]] = {}
    for level, weight in distribution.items():
        _check.at_least("match_distribution", 0, **{f"weight of level {level}": weight})
        _check.integers("match_distribution", **{"level of distribution": level})
        if weight > 0:
            rows[level] = []
    if not rows:
        raise ValueError("match_distribution: expected a weight above 0, got none. Name the levels to draw.")
    for i, level in enumerate(levels):
        if int(level) != level:
            raise TypeError(f"match_distribution: expected levels as whole numbers, got {level} in row {i}.")
        if level in rows:
            rows[level].append(i)
    if k > sum(map(len, rows.values())):
        raise ValueError(
            f"match_distribution: expected k of at most {sum(map(len, rows.values()))} rows in the levels of "
            f"the distribution, got {k}. Rows are drawn once: draw fewer or give other levels a weight."
        )
    counts = _shares({level: distribution[level] for level in sorted(rows)}, k)
    lacking = {level: max(count - len(rows[level]), 0) for level, count in counts.items()}
    taken = {level: count - lacking[level] for level, count in counts.items()}
    for level in sorted(rows):
        for _ in range(lacking[level]):
            free = [other for other in rows if taken[other] < len(rows[other])]
            taken[min(free, key=lambda other: (abs(other - level), other))] += 1
    return sorted(i for level in sorted(rows) for i in rng.sample(rows[level], taken[level]))


def _shares(weights: dict[int, float], k: int) -> dict[int, int]:
    """Whole counts that add up to k, by largest remainder."""
    whole = sum(weights.values())
    exact = {level: k * weight / whole for level, weight in weights.items()}
    counts = {level: math.floor(share) for level, share in exact.items()}
    by_remainder = sorted(exact, key=lambda level: (counts[level] - exact[level], level))
    for level in by_remainder[: k - sum(counts.values())]:
        counts[level] += 1
    return counts
