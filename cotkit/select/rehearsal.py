r"""Rehearsal: which rows of the old task to train on again, so that the new one does not wipe it out.

Conventions: rows of the old task lie in bins 0..K-1 (quantiles of the loss before training,
``numpy.searchsorted(numpy.quantile(losses, [.25, .5, .75]), losses)``; a language; a skill); ``was_right``
says what the model answered rightly before training on the new task.
Functions: `collateral_damage` share of right answers that turned wrong, per bin; `mix_cd` weights of the rows
that follow from it. Rehearsed rows pass through the model anyway, so both cost no forward pass.

    shares = None
    for batch in new_task:
        old = rng.choices(range(len(rows)), weights=mix_cd(bins, was_right, shares), k=4)
        ...  # train on batch and old: is_right[i] = True or False for i in old, None for the others
        shares = collateral_damage(bins, was_right, is_right, previous=shares)
"""

from collections.abc import Sequence

from cotkit import _check

__all__ = ["collateral_damage", "mix_cd"]


def collateral_damage(
    bins: Sequence[int],
    was_right: Sequence[bool],
    is_right: Sequence[bool | None],
    *,
    previous: Sequence[float] | None = None,
    momentum: float = 0.9,
) -> list[float]:
    r"""Share of the right answers of each bin that training has turned wrong, as a running mean.

    $$\alpha_k \leftarrow m\,\alpha_k + (1 - m)\,
    \frac{|\{i \in k : \text{right before, wrong now}\}|}{|\{i \in k : \text{right before, seen}\}|}$$

    Args:
        bins: bin of each row of the old task, 0..K-1.
        was_right: right before training on the new task, per row.
        is_right: right now, per row; None = not seen since the last call.
        previous: the result of the last call, K numbers. None: the first call.
        momentum: m, in [0, 1); 0 forgets all earlier calls.

    Returns:
        One share in [0, 1] per bin. A bin of which nothing was seen keeps its share, or takes the mean of the
        others on the first call (1 if nothing was seen at all: bins then count alike).

    Raises:
        ValueError: lengths differ, no rows, a negative bin, ``momentum`` outside [0, 1), shares in
            ``previous`` that do not fit.
        TypeError: a bin that is no int.

    Source: mix-cd (2024) arXiv:2402.08096 estimate of P(collateral damage | bin)
    Basis: second-hand; the smoothing is ours, the authors' code was not to be had.
    Differs: rows that were wrong before are not counted, damaged or not.

    Example:
        >>> bins, was = [0, 0, 0, 1, 1], [True, True, False, True, True]
        >>> collateral_damage(bins, was, [False, True, False, True, None])  # 1 of 2; 0 of 1
        [0.5, 0.0]
    """
    n_bins = _bins("collateral_damage", bins, was_right)
    if len(is_right) != len(bins):
        raise ValueError(f"collateral_damage: expected {len(bins)} in is_right, got {len(is_right)}.")
    _check.between("collateral_damage", 0, 1, momentum=momentum)
    if momentum == 1:
        raise ValueError("collateral_damage: expected momentum < 1, got 1: nothing would ever change.")
    if previous is not None:
        _shares("collateral_damage", previous, n_bins)
    seen, damaged = [0] * n_bins, [0] * n_bins
    for k, was, now in zip(bins, was_right, is_right, strict=True):
        if was and now is not None:
            seen[k] += 1
            damaged[k] += not now
    fresh = [d / s if s else None for d, s in zip(damaged, seen, strict=True)]
    if previous is not None:
        return [
            old if new is None else momentum * old + (1 - momentum) * new
            for old, new in zip(previous, fresh, strict=False)
        ]
    known = [share for share in fresh if share is not None]
    middle = sum(known) / len(known) if known else 1.0
    return [middle if share is None else share for share in fresh]


def mix_cd(
    bins: Sequence[int],
    was_right: Sequence[bool],
    damage: Sequence[float] | None = None,
    *,
    floor: float = 0.01,
) -> list[float]:
    r"""mix-cd: rehearse where training does damage, a row as often as its bin is damaged.

    $w_i = \max(\alpha_{k(i)}, \varepsilon)$ for rows that were right before, 0 for the others: a bin is drawn
    with probability proportional to $\alpha_k$ times its number of right rows, and a row evenly inside it.

    Args:
        bins: bin of each row of the old task, 0..K-1.
        was_right: right before training on the new task, per row. There is nothing to protect in the others.
        damage: shares per bin from ``collateral_damage``. None: nothing known yet, all bins alike.
        floor: smallest share of a bin, so that none is lost from sight; in [0, 1].

    Returns:
        One weight per row, for ``rng.choices(rows, weights=...)``; not all 0.

    Raises:
        ValueError: lengths differ, no rows, no row that was right, a negative bin, shares outside [0, 1] or
            fewer than bins, ``floor`` outside [0, 1], weights that are all 0.
        TypeError: a bin that is no int.

    Source: mix-cd (2024) arXiv:2402.08096 sampling proportional to estimated collateral damage
    Basis: second-hand; the authors' code was not to be had.
    Differs: the floor is ours.

    Example:
        >>> mix_cd([0, 0, 1, 1, 1], [True, True, True, True, False], [0.3, 0.0])
        [0.3, 0.3, 0.01, 0.01, 0.0]
    """
    n_bins = _bins("mix_cd", bins, was_right)
    _check.between("mix_cd", 0, 1, floor=floor)
    if damage is not None:
        _shares("mix_cd", damage, n_bins)
    shares = [1.0] * n_bins if damage is None else damage
    weights = [max(shares[k], floor) if was else 0.0 for k, was in zip(bins, was_right, strict=True)]
    if not any(weights):
        raise ValueError(
            "mix_cd: expected a row to rehearse, got weights of 0 only: no row was right before, or no bin "
            "that holds one is damaged. Raise floor, or leave rehearsal out."
        )
    return weights


def _bins(fn: str, bins: Sequence[int], was_right: Sequence[bool]) -> int:
    if not len(bins) or len(bins) != len(was_right):
        raise ValueError(f"{fn}: expected rows with a bin each, got {len(bins)} and {len(was_right)}.")
    if any(isinstance(k, bool) or int(k) != k for k in bins):
        raise TypeError(
            f"{fn}: expected bins as ints, got {next(k for k in bins if int(k) != k or k is True)!r}."
        )
    if min(bins) < 0:
        raise ValueError(f"{fn}: expected bins from 0 on, got {min(bins)}.")
    return int(max(bins)) + 1


def _shares(fn: str, shares: Sequence[float], n_bins: int) -> None:
    if len(shares) < n_bins:
        raise ValueError(f"{fn}: expected a share for each of {n_bins} bins, got {len(shares)}.")
    for share in shares:
        _check.between(fn, 0, 1, share=share)
