r"""Preference losses: make a good chain of thought score above a bad one.

Conventions: ``scores [B, K]`` belong to K candidate chains of each of B prompts, a score is the *mean* token
log-prob of the chain in nats (`tokens.seq_logps` with ``mean=True``, then `tokens.grouped`); ``rank [B, K]``
orders them, 0 = best, equal ranks make no pair; ``valid`` is False where K is padded. ``denom`` counts
groups.

Functions: `constraint_alignment` AFT, alignment that does not push bad chains down without bound; `rrhf`
hinge on ordered pairs, margin ranking.
"""

import torch
from torch import Tensor

from cotkit import _check
from cotkit._reduce import check_denom
from cotkit._types import Denom, Loss, Rank, Scores, Valid

__all__ = ["constraint_alignment", "rrhf"]


def constraint_alignment(
    scores: Scores,
    rank: Rank,
    valid: Valid | None = None,
    *,
    constraint: str | None = "boundary",
    boundary: float = 0.15,
    denom: Denom = None,
) -> Loss:
    r"""Constraint alignment loss of AFT: right chains score above wrong ones, wrong ones stay language.

    $$\mathcal L = \log\Big\{1 + \sum_{c_i \succ c_j}\big[e^{s_j - s_i} + e^{T_{ij} - s_j}\big]\Big\},\qquad
    T_{ij} = 2 s^*_j - 2\beta - s_i,\quad s^*_j = \min_{c_k \succ c_j} s_k$$

    The first term alone (``constraint=None``) pushes a worse chain down for ever, although most of its tokens
    are good language. The second pulls it up again once it falls below the boundary $B_j = s^*_j - \beta$: at
    $s_j = B_j$ the two pushes cancel. ``"detach"`` instead takes $s_j$ as a constant, so only better chains
    are pushed, up.

    This is $\mathcal L_A$ only. The method adds the likelihood of the reference chain:
    ``nll(logps, reference_mask) + constraint_alignment(scores, rank)``.

    Args:
        scores: mean token log-prob of each chain, nats, [B, K]; gradient flows. The mean is the caller's
            duty: sums give other numbers, favour short chains and make ``boundary`` meaningless.
        rank: order of quality within the row, 0 = best, integers, [B, K]; ties make no pair. Right and wrong
            chains are two ranks: ``(~correct).long()``.
        valid: True = a real candidate, [B, K]; None: all are. What the others hold does not matter.
        constraint: "boundary", "detach" or None (no constraint, the paper's ablation).
        boundary: the paper's beta, nats per token, >= 0: how far below the lowest better chain a worse one
            may sink. The paper tunes it on a development set; 0.15 is from memory.
        denom: groups of the whole accumulated batch, one-sided ones counted. None: B.

    Returns:
        Scalar, mean over groups; a group without a pair (all right, all wrong, empty) gives 0 with zero
        gradient.

    Raises:
        ValueError: shapes differ, unknown ``constraint``, ``boundary < 0``, ``denom <= 0``.
        TypeError: ``rank`` is not an integer tensor, ``valid`` is not bool.

    Source: AFT (2023) arXiv:2309.02144 Eq. 6
    Basis: second-hand: score, alignment loss, both constraints, B and T confirmed by a detailed summary; the
        ranking form and the default boundary from memory; no code was released.
    Differs: T is a constant, as the paper's argument about the gradient of $s_j$ needs; were it not, the
        second term would pull better chains down.

    Example:
        >>> from torch import tensor
        >>> right, wrong = [-1.0, -2.0], [-1.5]
        >>> scores, rank = tensor([right + wrong]), tensor([[0, 0, 1]])
        >>> constraint_alignment(scores, rank, constraint=None)  # log(1 + e^-0.5 + e^0.5)
        tensor(1.1803)
    """
    _check.candidates("constraint_alignment", scores, rank, valid)
    _check.one_of("constraint_alignment", ("boundary", "detach", None), constraint=constraint)
    _check.at_least("constraint_alignment", 0, boundary=boundary)
    check_denom("constraint_alignment", denom)
    if scores.numel() == 0:
        return scores.sum()
    better = rank[:, :, None] < rank[:, None, :]  # [B, i, j]: c_i is better than c_j
    if valid is not None:
        better = better & valid[:, :, None] & valid[:, None, :]
        scores = torch.where(valid, scores, 0.0)
    s_i, s_j = scores[:, :, None], scores[:, None, :]
    if constraint == "boundary":
        lowest_better = torch.where(better, s_i, torch.inf).amin(1, keepdim=True)  # s*_j
        t_ij = (2 * lowest_better - 2 * boundary - s_i).detach()
        losses = _log_one_plus_sum(better, s_j - s_i, t_ij - s_j)
    elif constraint == "detach":
        losses = _log_one_plus_sum(better, s_j.detach() - s_i)
    else:
        losses = _log_one_plus_sum(better, s_j - s_i)  # Eq. 6
    return losses.sum() / (len(losses) if denom is None else denom)


def _log_one_plus_sum(pairs: Tensor, *exponents: Tensor) -> Tensor:
    """Per group [B]: log(1 + sum of exp over the pairs), without overflow."""
    kept = [torch.where(pairs, e, -torch.inf).flatten(1) for e in exponents]
    one = kept[0].new_zeros(len(pairs), 1)  # log 1
    return torch.cat([one, *kept], 1).logsumexp(1)


def rrhf(
    scores: Scores,
    rank: Rank,
    valid: Valid | None = None,
    *,
    margin: float = 0.0,
    constraint: str | None = None,
    boundary: float = 0.15,
    denom: Denom = None,
) -> Loss:
    r"""Ranking loss of RRHF: a pair in the right order costs nothing, a wrong one its score gap.

    $$\mathcal L = \sum_{c_i \succ c_j} \max(0,\; m + s_j - s_i)$$

    With a margin $m$ this is the margin ranking loss (MLM ranking: one gold candidate, the others rank 1).
    ``"detach"`` takes $s_j$ as a constant. ``"boundary"`` adds $\max(0,\; B_j - s_j)$ to each pair, with
    $B_j = \min_{c_k \succ c_j} s_k - \beta$ a constant: below it a worse chain is pulled up again.

    Args:
        scores: mean token log-prob of each chain, nats, [B, K]; gradient flows.
        rank: order of quality within the row, 0 = best, integers, [B, K]; ties make no pair.
        valid: True = a real candidate, [B, K]; None: all are. What the others hold does not matter.
        margin: m, nats per token, >= 0. RRHF: 0; MLM ranking: 0.5, from memory.
        constraint: "boundary", "detach" or None (RRHF itself).
        boundary: beta, nats per token, >= ``margin``: how far below the lowest better chain a worse one may
            sink. Read only with ``constraint="boundary"``.
        denom: groups of the whole accumulated batch, one-sided ones counted. None: B. The mean over pairs
            instead of the sum: the number of pairs, B * (K - 1) for one gold candidate each.

    Returns:
        Scalar, sum over pairs, mean over groups; 0 with zero gradient for a group without a pair and for one
        in order.

    Raises:
        ValueError: shapes differ, unknown ``constraint``, a negative ``margin`` or ``boundary``, a boundary
            nearer than the margin, ``denom <= 0``.
        TypeError: ``rank`` is not an integer tensor, ``valid`` is not bool.

    Source: RRHF (2023) arXiv:2304.05302 rrhf_loss of the released code
        MLM ranking (2020) arXiv:2004.14074 margin ranking loss
        AFT (2023) arXiv:2309.02144 §4, the constraints
    Basis: authors' code for RRHF: equal to its numbers. The margin form from memory. Which constraint AFT
        gave RRHF: second-hand.
    Differs: the likelihood of the best chain is not in here, add ``nll``; the released score divides by
        length to the power ``length_penalty`` (1 in its script: the mean). The boundary form is our transfer
        of AFT's, not read in the paper.

    Example:
        >>> from torch import tensor
        >>> rrhf(tensor([[1.0, 0.8]]), tensor([[0, 1]]), margin=0.5)  # 0.5 - (1 - 0.8)
        tensor(0.3000)
    """
    _check.candidates("rrhf", scores, rank, valid)
    _check.one_of("rrhf", ("boundary", "detach", None), constraint=constraint)
    _check.at_least("rrhf", 0, margin=margin, boundary=boundary)
    if constraint == "boundary" and boundary < margin:
        raise ValueError(
            f"rrhf: expected boundary >= margin, got {boundary} < {margin}. "
            f"Nearer, the margin pushes down what the boundary pulls up; take a larger boundary."
        )
    check_denom("rrhf", denom)
    if scores.numel() == 0:
        return scores.sum()
    better, scores = _ordered(scores, rank, valid)
    s_i, s_j = scores[:, :, None], scores[:, None, :]
    losses = torch.relu(margin + (s_j.detach() if constraint == "detach" else s_j) - s_i)
    if constraint == "boundary":
        losses = losses + torch.relu((_lowest_better(better, scores) - boundary).detach() - s_j)
    return _mean(torch.where(better, losses, 0.0).sum((1, 2)), denom)


def _ordered(scores: Tensor, rank: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pairs [B, i, j] in which c_i is better than c_j, and the scores with 0 where there is no candidate."""
    better = rank[:, :, None] < rank[:, None, :]
    if valid is None:
        return better, scores
    return better & valid[:, :, None] & valid[:, None, :], torch.where(valid, scores, 0.0)


def _lowest_better(better: Tensor, scores: Tensor) -> Tensor:
    """Score [B, 1, j] of the lowest chain better than c_j; infinite where there is none."""
    return torch.where(better, scores[:, :, None], torch.inf).amin(1, keepdim=True)


def _mean(losses: Tensor, denom: Denom) -> Tensor:
    """Sum of one loss per group or pair over their count."""
    return losses.sum() / (max(len(losses), 1) if denom is None else denom)
