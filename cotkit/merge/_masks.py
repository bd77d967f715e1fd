"""Breadcrumbs: task vectors without their smallest and without their largest entries."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from cotkit import _check
from cotkit.merge._states import PIECE, each, labelled, like, pieces, wide

_SORTED = 1 << 17  # entries up to which sorting is the cheaper way


def breadcrumbs(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    *,
    alpha: float = 0.3,
    beta: float = 0.85,
    gamma: float = 0.993,
    per: str = "tensor",
) -> dict[str, Tensor]:
    r"""Model breadcrumbs: add up task vectors of which only the middle sizes are kept.

    $$\theta_0 + \alpha \sum_i m_i \odot \tau_i,\qquad
    m_i = \big[\,q_\beta \le |\tau_i| < q_\gamma\,\big]$$

    with q the quantiles of the sizes in one tensor. The small entries are noise that adds up over many tasks,
    the largest are outliers that hurt the others. The sum is not averaged: the same three numbers are meant
    to serve any number of tasks.

    Args:
        base: state of the common ancestor.
        tuned: fine-tuned models, one per task.
        alpha: factor of the sum. Paper: 0.3.
        beta: share of the smallest entries that is dropped, in [0, 1]. Paper: 0.85 (CLIP), 0.9 (T5).
        gamma: share below the largest ones; 1 - gamma is dropped. Paper: 0.993 (CLIP), 0.99 (T5).
        per: "tensor", or "row": quantiles along the last dimension, as in the released code.

    Returns:
        A state. Of n entries the floor((1 - gamma) n) largest are dropped and the next
        floor((gamma - beta) n) kept; of equal sizes those that come first count as smaller. A tensor (or row)
        too small to keep one stays as in the base; a single number (0-d) is always kept whole.

    Raises:
        ValueError: as in ``average``; ``beta > gamma``, shares outside [0, 1], unknown ``per``.
        TypeError: as in ``average``.

    Source: Breadcrumbs (2023) arXiv:2312.06795 masks of the released TaskVectorMiddleKeep
    Basis: authors' code: equal to its numbers with per="row", where keep = gamma - beta and remove =
        1 - gamma; to mergekit's ``breadcrumbs`` with per="tensor"; the paper second-hand.
    Differs: shares are taken as the decimals they are written in, so floor does not fall one short; entries
        of one size, of which 16-bit models have many, are told apart by their place, in torch's sort by
        chance.

    Example:
        >>> from torch import arange, zeros
        >>> tuned = {"w": arange(1.0, 11.0)}  # the sizes 1 to 10: the 8 smallest and the largest go
        >>> breadcrumbs({"w": zeros(10)}, [tuned], alpha=0.5, beta=0.8, gamma=0.9)["w"]
        tensor([0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 4.5000,
                0.0000])
    """
    _check.finite("breadcrumbs", alpha=alpha)
    _check.between("breadcrumbs", 0, 1, beta=beta, gamma=gamma)
    _check.one_of("breadcrumbs", ("tensor", "row"), per=per)
    if beta > gamma:
        raise ValueError(f"breadcrumbs: expected beta <= gamma, got {beta} and {gamma}. Both count from 0.")

    def band(n: int) -> range:
        top = floor((1 - Fraction(str(gamma))) * n)
        return range(n - top - floor((Fraction(str(gamma)) - Fraction(str(beta))) * n), n - top)

    def rule(_: str, xs: list[Tensor]) -> Tensor:
        rows = per == "row" and xs[0].dim() > 0
        made, flat = like(xs[0])
        if rows:
            width = xs[0].shape[-1]
            for where, (start, *parts) in _by_rows(xs):
                kept = band(width)
                flat[where] = _sum(start, [_row_mask(part - start, kept) for part in parts], alpha).view(-1)
            return made
        kept = range(xs[0].numel()) if xs[0].dim() == 0 else band(xs[0].numel())
        masks = [_mask(x, xs[0], kept) for x in xs[1:]]
        for where, (start, *parts) in pieces(xs, wide(xs[0])):
            taus = [mask(part - start) for mask, part in zip(masks, parts, strict=True)]
            flat[where] = _sum(start, taus, alpha)
        return made

    return each("breadcrumbs", labelled("breadcrumbs", {"base": base}, {"tuned": tuned}), rule)


def _sum(start: Tensor, taus: list[Tensor], alpha: float) -> Tensor:
    for tau in taus:
        start = start.add(tau, alpha=alpha)
    return start


def _by_rows(xs: list[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Walk the tensors some whole rows at a time: where in the flat tensor, and the rows [R, n] of each."""
    width = xs[0].shape[-1]
    if not width:
        return
    rows = [x.reshape(-1, width) for x in xs]
    step = max(1, PIECE // width)
    for first in range(0, rows[0].shape[0], step):
        parts = [x[first : first + step].to(wide(x)) for x in rows]
        yield slice(first * width, first * width + parts[0].numel()), parts


def _row_mask(taus: Tensor, kept: range) -> Tensor:
    """Rows [R, n] with only the entries whose rank by size lies in ``kept``."""
    order = taus.abs().argsort(dim=-1, stable=True)[:, kept.start : kept.stop]
    return torch.zeros_like(taus).scatter(1, order, taus.gather(1, order))


def _mask(tuned: Tensor, base: Tensor, kept: range) -> Callable[[Tensor], Tensor]:
    """Return a function for the pieces of a delta, in order, that keeps the ranks in ``kept``."""
    if not kept:
        return torch.zeros_like
    if len(kept) == base.numel():
        return lambda tau: tau

    def sizes() -> Iterator[Tensor]:
        for _, (theta, start) in pieces([tuned, base], wide(base), 4):
            yield (theta - start).abs()

    found = _ranked(sizes, (kept.start, kept.stop - 1), base.numel(), wide(base), base.device)
    ranks: dict[float, int] = {}
    # Of the entries that are as large as an edge, some may lie outside: those whose rank does.
    for edge, first, count in found:
        if first < kept.start or first + count > kept.stop:
            ranks[edge] = first

    def mask(tau: Tensor) -> Tensor:
        size = tau.abs()
        keep = (size >= found[0][0]) & (size <= found[1][0])
        for edge, first in ranks.items():
            same = (size == edge).nonzero()[:, 0]
            rank = first + torch.arange(len(same), device=tau.device)
            keep[same] = (rank >= kept.start) & (rank < kept.stop)
            ranks[edge] += len(same)  # the next piece goes on from here
        return torch.where(keep, tau, 0.0)

    return mask


def _ranked(
    sizes: Callable[[], Iterator[Tensor]],
    ranks: tuple[int, int],
    n: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[float, int, int]]:
    """Return for each rank (0 the smallest) its value, how many entries are smaller, and how many equal.

    Large tensors are not sorted, which would take several times their memory: the bits of numbers >= 0 are
    ordered as the numbers are, so they are counted, 16 bits at a time.
    """
    if n <= _SORTED:
        values = torch.cat(list(sizes())).sort().values
        edges = values[list(ranks)]
        below, upto = (torch.searchsorted(values, edges, right=right).tolist() for right in (False, True))
        return [(float(v), a, b - a) for v, a, b in zip(edges, below, upto, strict=True)]
    whole = torch.int64 if dtype == torch.float64 else torch.int32
    found = {rank: (0, rank, 0, 0) for rank in ranks}  # bits so far, rank among these, smaller, equal
    for shift in range(torch.iinfo(whole).bits - 16, -1, -16):
        first = shift + 16 == torch.iinfo(whole).bits
        counts = {bits: torch.zeros(1 << 16, dtype=torch.int64, device=device) for bits, *_ in found.values()}
        for piece in sizes():
            number = piece.view(whole)
            for bits, count in counts.items():
                chosen = number if first else number[(number >> (shift + 16)) == bits]
                count += torch.bincount((chosen >> shift) & 0xFFFF, minlength=1 << 16)
        for rank, (bits, left, smaller, _) in found.items():
            sums = counts[bits].cumsum(0)
            digit = int(torch.searchsorted(sums, left, right=True))
            before = int(sums[digit - 1]) if digit else 0
            found[rank] = (bits << 16 | digit, left - before, smaller + before, int(sums[digit]) - before)
    return [
        (float(torch.tensor(bits, dtype=whole).view(dtype)), smaller, equal)
        for bits, _, smaller, equal in (found[rank] for rank in ranks)
    ]
