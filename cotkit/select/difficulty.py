r"""Difficulty: how often the model itself solves a question, and bins of that.

Conventions: a rate is the share of a row's samples that are right, a fraction in [0, 1], larger = easier.
Functions: ``pass_rate`` samples and counts; ``tiers`` rates into bins.

Composed, not offered: dynamic sampling keeps the questions that are neither always nor never solved,
``[row for row, rate in zip(rows, rates) if 0 < rate < 1]`` (an RL group with one reward has no advantage);
the hardest questions of ReLIFT are those of rate 0, its buffer is a list from which a step takes the first M
as soon as it holds that many.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cotkit import _check
from cotkit.bootstrap.reject import sample_and_score

__all__ = ["pass_rate", "tiers"]


def pass_rate(
    rows: Sequence[Mapping[str, Any]],
    generate: Callable[[list[Any], int], list[list[str]]],
    reward: Callable[..., list[float | None]],
    *,
    n: int = 8,
    prompts: Sequence[Callable[[Mapping[str, Any]], Any]] | None = None,
) -> list[float | None]:
    """Share of a row's samples that the reward passes: the row's difficulty for this very model.

    Args:
        rows: rows with a ``prompt`` (or what ``prompts`` needs).
        generate: (prompts, n) -> n completions for each prompt. Temperature and length are its affair.
        reward: as for `bootstrap.reject.sample_and_score`; above 0 = passed. Repeated texts count each time.
        n: samples for each row and prompt, at least 1. AlphaMed counts failures: n - n * rate, plus 1 for
            its level.
        prompts: several ways to ask, row -> prompt each (phrasings, few-shot sets); the rate is over all of
            them. None: the row's own prompt.

    Returns:
        One rate for each row, in [0, 1]; None where no sample could be scored. Samples with reward None or
        NaN are left out of the share.

    Raises:
        ValueError: ``n < 1``, no way to ask, or what ``sample_and_score`` refuses.

    Source: AlphaMed (2025) arXiv:2505.17952 difficulty levels; SARI (2025) arXiv:2504.15900 error rate
        LongVILA-R1 (2025) arXiv:2507.07966; ReLIFT (2025) arXiv:2506.07527 questions that always fail
        Kimi-VL (2025) arXiv:2504.07491 prioritised by 1 - rate
    Basis: second-hand
    Differs: nothing

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "6*7=", "answer": "42"}]
        >>> pass_rate(rows, lambda prompts, n: [["2", "3", "2", "2"]] * 2, accuracy(), n=4)
        [0.75, 0.0]
    """
    if prompts is not None and not len(prompts):
        raise ValueError("pass_rate: expected a way to ask, got none. Pass prompts=None for the rows' own.")
    ways = [lambda row: row["prompt"]] if prompts is None else list(prompts)
    if prompts is None:
        asked = [dict(row) for row in rows]
    else:
        asked = [{**row, "prompt": way(row)} for row in rows for way in ways]
    groups = sample_and_score(asked, generate, reward, n=n)
    rates: list[float | None] = []
    for i in range(len(rows)):
        mine = groups[i * len(ways) : (i + 1) * len(ways)]
        scores = [s for group in mine for s in group["rewards"] if s is not None and s == s]
        rates.append(sum(s > 0 for s in scores) / len(scores) if scores else None)
    return rates


def tiers(rates: Sequence[float], edges: Sequence[float] = (0.0, 1.0)) -> list[int]:
    """Bins of pass rates, with exactly 0 and exactly 1 as bins of their own.

    Args:
        rates: pass rates, fractions in [0, 1]; leave out rows without one.
        edges: ascending, in [0, 1]. A bin holds its upper edge: with (0, 0.25, 0.5, 0.75, 0.875, 1) a rate of
            7/8 is in the bin that ends there. What equals an edge of 1 has a bin of its own behind the last.

    Returns:
        Bin of each row from 0, *hardest first*: by default 0 never solved, 1 sometimes, 2 always.

    Raises:
        ValueError: a rate outside [0, 1] or NaN, edges that are not ascending or outside [0, 1].

    Source: LongVILA-R1 (2025) arXiv:2507.07966 easy, medium, hard
        Seed-Coder (2025) arXiv:2506.03524 a rate of 7/8 is kept; ReLIFT (2025) arXiv:2506.07527 rate 0
    Basis: second-hand
    Differs: nothing

    Example:
        >>> tiers([0.0, 0.3, 1.0])
        [0, 1, 2]
        >>> tiers([0.0, 0.2, 0.5, 0.6, 1.0], edges=(0, 0.5, 1))
        [0, 1, 1, 2, 3]
    """
    cuts = [float(edge) for edge in edges]
    for edge in cuts:
        _check.between("tiers", 0, 1, edges=edge)
    if not cuts or sorted(set(cuts)) != cuts:
        raise ValueError(f"tiers: expected ascending edges, got {tuple(edges)}.")
    for rate in rates:
        _check.between("tiers", 0, 1, rates=rate)
    return [sum(edge < rate for edge in cuts) + (rate == 1 == cuts[-1]) for rate in rates]
