"""Rewards made of rewards: a weighted sum, and a gate that closes one.

Conventions: None (cannot be scored) is kept. A part that is None is left out of a sum, as TRL leaves it out
of its own; a gate that is None gives None. What comes out is itself a reward, so both can be nested. A
combination with a group-relative part is marked group-relative as well (``reward.grouped``).
Functions: ``weighted`` sum; ``gated`` a reward that another one can close.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from cotkit._check import finite
from cotkit.rewards._call import Reward, functions, part_of, scores

__all__ = ["gated", "weighted"]


def weighted(rewards: Sequence[Reward], weights: Sequence[float] | None = None) -> Reward:
    r"""A reward that is a weighted sum of rewards.

    $\sum_j w_j r_j$, over the parts that can score the completion.

    Args:
        rewards: at least one.
        weights: one for each; None = 1 each. They need not sum to 1.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``; None where every part is None. It
        can be pickled if its parts can, and is logged as ``weighted``. ``reward.grouped`` is True if a part
        looks at whole groups.

    Raises:
        ValueError: no rewards, or another number of weights; when called, a part that returns another number
            of scores or an infinite one.
        TypeError: a part cannot be called, a weight is no number.

    Source: LongVILA-R1 (2025) arXiv:2507.07966 (0.9 accuracy + 0.1 format); Rex-Thinker (2025)
        arXiv:2506.04034 (the same weights)
    Basis: authors' code (Rex-Thinker), second-hand
    Differs: nothing.

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> from cotkit.rewards.format import tags
        >>> reward = weighted([accuracy(), tags()], [0.9, 0.1])
        >>> reward(["2+2?"], ["<think>2+2=4</think><answer>5</answer>"], answer=["4"])
        [0.1]
    """
    parts = list(rewards)
    if not parts:
        raise ValueError("weighted: expected at least one reward, got none.")
    functions("weighted", **{f"rewards[{j}]": part for j, part in enumerate(parts)})
    factors = [1.0] * len(parts) if weights is None else list(weights)
    if len(factors) != len(parts):
        raise ValueError(f"weighted: expected {len(parts)} weights, got {len(factors)}. Pass one per reward.")
    finite("weighted", **{f"weights[{j}]": w for j, w in enumerate(factors)})
    reward = partial(_weighted, (tuple(parts), tuple(map(float, factors))))
    reward.grouped = any(getattr(part, "grouped", False) for part in parts)  # type: ignore[attr-defined]
    return reward


def _weighted(
    how: tuple[tuple[Reward, ...], tuple[float, ...]], /, prompts: Any, completions: Any, **columns: Any
) -> list[float | None]:
    parts, weights = how
    table = [scores("weighted", part, prompts, completions, columns) for part in parts]
    sums: list[float | None] = []
    for row in zip(*table, strict=True):
        known = [w * s for w, s in zip(weights, row, strict=True) if s is not None]
        sums.append(sum(known) if known else None)
    return sums


_weighted.__name__ = "weighted"  # what TRL logs; pickle goes by __qualname__


def gated(reward: Reward, gate: Reward, *, closed: float = 0.0) -> Reward:
    """A reward that counts only where another one is above 0.

    What the gate closes is not scored at all, so an expensive reward (``judge.downstream``) is called for the
    rest only; a group-relative one still gets its whole groups.

    Args:
        reward: what is given where the gate is open.
        gate: open above 0, closed at 0 and below.
        closed: what is given where it is closed.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``; None where the gate is None, or
        where it is open and ``reward`` is None. It can be pickled if its parts can, and is logged as
        ``gated``.

    Raises:
        ValueError: ``closed`` is not finite; when called, a part returns another number of scores or an
            infinite one.
        TypeError: ``reward`` or ``gate`` cannot be called, ``closed`` is no number.

    Source: RAIF (2025) arXiv:2506.01413 (a broken format costs the whole answer: ``closed=-2``); RefCritic
        (2025) arXiv:2507.15024 (refinements count where the critique calls the solution wrong)
    Basis: second-hand
    Differs: nothing.

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> from cotkit.rewards.format import tags
        >>> reward = gated(accuracy(wrong=-1.5), tags(), closed=-2.0)
        >>> reward(
        ...     ["2+2?"] * 2,
        ...     ["<think>2+2</think><answer>4</answer>", "<answer>4</answer>"],
        ...     answer=["4", "4"],
        ... )
        [1.0, -2.0]
    """
    functions("gated", reward=reward, gate=gate)
    finite("gated", closed=closed)
    made = partial(_gated, (reward, gate, float(closed)))
    made.grouped = getattr(reward, "grouped", False) or getattr(gate, "grouped", False)  # type: ignore[attr-defined]
    return made


def _gated(
    how: tuple[Reward, Reward, float], /, prompts: Any, completions: Any, **columns: Any
) -> list[float | None]:
    reward, gate, closed = how
    n = len(completions)
    doors = scores("gated", gate, prompts, completions, columns)
    result: list[float | None] = [None if door is None else closed for door in doors]
    open_ = [i for i, door in enumerate(doors) if door is not None and door > 0]
    asked = open_ if not getattr(reward, "grouped", False) else list(range(n))
    if not open_:
        return result
    some = scores(
        "gated",
        reward,
        None if prompts is None else [prompts[i] for i in asked],
        [completions[i] for i in asked],
        part_of(columns, asked, n),
    )
    found = dict(zip(asked, some, strict=True))
    for i in open_:
        result[i] = found[i]
    return result


_gated.__name__ = "gated"  # what TRL logs; pickle goes by __qualname__
