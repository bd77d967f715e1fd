"""Rows for preference losses: scored samples of one question become ranked rows.

Conventions: a preference loss reads flat rows with a ``group`` number (the question), a ``rank`` (0 = best,
ties allowed) and ``gold`` (1 = the reference completion); whole groups stay in one batch.
Functions: ``ranked`` turns what ``bootstrap.reject.sample_and_score`` returns into such rows.
"""

import random
from collections.abc import Sequence
from typing import Any

from cotkit._check import at_least, finite, integers

__all__ = ["ranked"]


def ranked(
    groups: Sequence[dict[str, Any]],
    *,
    threshold: float = 1.0,
    most: int | None = None,
    reference: bool = True,
    keep_one_sided: bool = True,
    rng: random.Random | None = None,
) -> list[dict[str, Any]]:
    """Flat rows of a group each: the reference, then the distinct right and wrong samples.

    Args:
        groups: rows with ``completions``, ``rewards`` and ``duplicate`` beside ``prompt`` and
            ``completion``, as ``bootstrap.reject.sample_and_score`` returns them. Samples whose reward is
            None are left out.
        threshold: a sample is right (rank 0) if its reward is at least this, else wrong (rank 1).
        most: most right and most wrong samples of a group, the reference not counted; drawn by ``rng``.
            None: all.
        reference: put the row's own ``completion`` first, as a right chain (L125 counts it among the
            positives).
        keep_one_sided: keep groups without a right or without a wrong chain (their alignment loss is 0).
        rng: draws which samples stay when there are more than ``most``.

    Returns:
        Rows in the order of ``groups`` with the group's other columns and ``completion``, ``group`` (0, 1,
        ...), ``rank`` (0 right, 1 wrong), ``gold`` (1 for the reference, else 0) and ``reward``.

    Raises:
        ValueError: a group without samples, ``most`` below 1, or ``most`` without ``rng``.

    Source: AFT (2023) arXiv:2309.02144 §3
    Basis: second-hand; that duplicates are dropped is our reading.
    Differs: the paper does not say how many samples of a group are kept; ``most`` is ours.

    Example:
        >>> group = {
        ...     "prompt": "1+1=",
        ...     "completion": "2",
        ...     "completions": ["2 ", "3", "3"],
        ...     "rewards": [1.0, 0.0, 0.0],
        ... }
        >>> rows = ranked([group | {"duplicate": [False, False, True]}])
        >>> [(r["completion"], r["rank"], r["gold"]) for r in rows]
        [('2', 0, 1), ('2 ', 0, 0), ('3', 1, 0)]
    """
    finite("ranked", threshold=threshold)
    if most is not None:
        integers("ranked", most=most)
        at_least("ranked", 1, most=most)
        if rng is None:
            raise ValueError("ranked: expected rng with most, got None. Pass random.Random(seed).")
    rows: list[dict[str, Any]] = []
    number = 0
    for i, group in enumerate(groups):
        lengths = {len(group.get(name, ())) for name in ("completions", "rewards", "duplicate")}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"ranked: expected completions, rewards and duplicate of one length > 0 in group {i}."
            )
        sides: tuple[list, list] = ([], [])
        for text, reward, again in zip(
            group["completions"], group["rewards"], group["duplicate"], strict=True
        ):
            if not again and reward is not None and not (reference and text == group["completion"]):
                sides[0 if reward >= threshold else 1].append((text, reward))
        if most is not None and rng is not None:
            sides = tuple(rng.sample(side, min(most, len(side))) for side in sides)  # type: ignore[assignment]
        if not keep_one_sided and not (sides[1] and (reference or sides[0])):
            continue
        shared = {
            k: v for k, v in group.items() if k not in ("completion", "completions", "rewards", "duplicate")
        }
        if reference:
            gold = {"completion": group["completion"], "rank": 0, "gold": 1, "reward": threshold}
            rows.append(shared | gold | {"group": number})
        for rank, side in enumerate(sides):
            for text, reward in side:
                rows.append(
                    shared | {"completion": text, "rank": rank, "gold": 0, "reward": reward, "group": number}
                )
        number += bool(reference or sides[0] or sides[1])
    return rows
