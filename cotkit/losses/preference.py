r"""Preference losses: make a good chain of thought score above a bad one.

Conventions: ``scores [B, K]`` belong to K candidate chains of each of B prompts, a score is the *mean* token
log-prob of the chain in nats (`tokens.seq_logps` with ``mean=True``, then `tokens.grouped`); ``rank [B, K]``
orders them, 0 = best, equal ranks make no pair; ``valid`` is False where K is padded; ``denom`` counts
groups. Pairs are ``chosen [B]`` and ``rejected [B]``, for `dpo` *sums* of token log-probs; there ``denom``
counts pairs. What each loss takes is said at its arguments.

``constraint`` is AFT's: pushing a worse chain down has no end, although most of its tokens are good language.
"detach" never pushes it, "boundary" pulls it up again below a boundary.

Functions, candidates: `constraint_alignment` AFT; `rrhf` hinge on ordered pairs, margin ranking; `pro` each
chain against all worse ones; `dpo_ranked` all pairs. Pairs: `dpo` margin against a reference; `simpo` no
reference; `orpo` odds ratio and likelihood. One answer against the model's samples: `discriminative` with
`discriminative_log_z`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cotkit import _check
from cotkit._reduce import check_denom
from cotkit._types import Denom, Loss, Rank, Scores, SeqLogps, SeqWeights, Valid

__all__ = [
    "constraint_alignment",
    "discriminative",
    "discriminative_log_z",
    "dpo",
    "dpo_ranked",
    "orpo",
    "pro",
    "rrhf",
    "simpo",
]


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


def pro(
    scores: Scores,
    rewards: Scores,
    valid: Valid | None = None,
    *,
    constraint: str | None = None,
    boundary: float = 0.15,
    denom: Denom = None,
) -> Loss:
    r"""Ranking loss of PRO: each chain against all worse ones, the sharper the larger the reward gap.

    $$\mathcal L = -\sum_k \log\frac{e^{s_k/T_k^k}}{e^{s_k/T_k^k} + \sum_{r_i < r_k} e^{s_i/T_k^i}},\qquad
    T_k^i = \frac{1}{r_k - r_i},\quad T_k^k = \min_i T_k^i$$

    ``"detach"`` takes every $s_i$ as a constant. ``"boundary"`` adds
    $e^{2(s^*_i - \beta)/T_k^i - s_i/T_k^i}$ to the denominator, with everything but the last $s_i$ a constant
    and $s^*_i$ the lowest better chain: at $s_i = s^*_i - \beta$ the two pushes on $s_i$ cancel in each step.

    Args:
        scores: mean token log-prob of each chain, nats, [B, K]; gradient flows.
        rewards: quality of each chain, larger is better, [B, K]; ties make no pair. Their scale is the
            sharpness: halving all gaps doubles every temperature.
        valid: True = a real candidate, [B, K]; None: all are. What the others hold does not matter.
        constraint: "boundary", "detach" or None (PRO itself).
        boundary: beta, nats per token, >= 0: how far below the lowest better chain a worse one may sink.
        denom: groups of the whole accumulated batch, one-sided ones counted. None: B.

    Returns:
        Scalar, summed over the steps of a group, mean over groups; a group with one level of reward gives 0
        with zero gradient.

    Raises:
        ValueError: shapes differ, unknown ``constraint``, ``boundary < 0``, ``denom <= 0``.
        TypeError: ``rewards`` are no floats, ``valid`` is not bool.

    Source: PRO (2023) arXiv:2306.17492 ProcessManager.compute_loss of the released code
        AFT (2023) arXiv:2309.02144 §4, the constraints
    Basis: authors' code: equal to its numbers. Which constraint AFT gave PRO: second-hand.
    Differs: the likelihood of the best chain (weight ``sft_weight * (K - 1)^2`` in the code) is not in here,
        add ``nll``. Chains may come in any order; a tied one is left out of the step, while the code, which
        wants sorted rewards, adds 1 for it. Unlike the other losses of this file it is not invariant to a
        constant added to all scores unless the gaps are equal. The boundary form is our transfer of AFT's,
        not read in the paper.

    Example:
        >>> from torch import tensor
        >>> pro(tensor([[-1.0, -1.5]]), tensor([[2.0, 0.0]]))  # log(1 + e^(2 * -0.5))
        tensor(0.3133)
    """
    _check_scores("pro", scores, valid, rewards=rewards)
    _check.one_of("pro", ("boundary", "detach", None), constraint=constraint)
    _check.at_least("pro", 0, boundary=boundary)
    check_denom("pro", denom)
    if scores.numel() == 0:
        return scores.sum()
    better, scores = _ordered(scores, -rewards, valid)
    gap = torch.where(better, (rewards[:, :, None] - rewards[:, None, :]).detach(), 0.0)  # 1 / T [B, k, i]
    s_k = gap.amax(2, keepdim=True) * scores[:, :, None]
    s_i = gap * scores[:, None, :]
    push = (s_i.detach() if constraint == "detach" else s_i) - s_k
    exponents = [push]
    if constraint == "boundary":
        floor = torch.where(better, _lowest_better(better, scores), 0.0) - boundary
        exponents.append((2 * gap * floor - s_k).detach() - s_i)
    steps = _log_one_plus_sum(better.flatten(0, 1), *[e.flatten(0, 1) for e in exponents])
    return _mean(steps.view(scores.shape).sum(1), denom)


def dpo(
    chosen: SeqLogps,
    rejected: SeqLogps,
    ref_chosen: SeqLogps,
    ref_rejected: SeqLogps,
    *,
    beta: float = 0.1,
    offset: float | SeqLogps = 0.0,
    label_smoothing: float = 0.0,
    weights: SeqWeights | None = None,
    constraint: str | None = None,
    boundary: float = 0.15,
    denom: Denom = None,
) -> Loss:
    r"""Logistic loss on the reference-relative margin, averaged over pairs.

    $$-(1-\varepsilon)\log\sigma(h) - \varepsilon\log\sigma(-h),\qquad
    h = r_w - r_l - \gamma,\quad r = \beta\,(\log\pi - \log\pi_{ref})$$

    ``"detach"`` takes $r_l$ as a constant. ``"boundary"`` is
    $\log\{1 + e^{-h} + e^{T - r_l}\}$ with the constant $T = r_w + \gamma - 2\,b$: the push on $r_l$ is
    zero at $r_l = r_w - b$ and turns there.

    Args:
        chosen: log-prob of the preferred response given its prompt, *summed* over its tokens, nats, [B];
            gradient flows.
        rejected: the same of the other response of the pair, [B]; gradient flows.
        ref_chosen: the preferred one under the frozen reference, [B]; detached.
        ref_rejected: the other one under the reference, [B]; detached.
        beta: > 0; larger stays closer to the reference. DPO: 0.1; ThinkPO 0.01, CPO's script 0.2.
        offset: gamma, nats of $r$: how far ahead the chosen one must be. A tensor [B] gives each pair its
            own, e.g. the difference of two scores (ODPO, UV-CoT); detached.
        label_smoothing: epsilon in [0, 0.5], the share of pairs believed to be swapped (conservative DPO).
        weights: factor of each pair, [B], never in the denominator; detached. None: 1.
        constraint: AFT's, on the rejected one: "boundary", "detach" or None (DPO itself).
        boundary: b, nats of $r$ (beta times a sum, *not* per token), >= 0.
        denom: pairs of the whole accumulated batch. None: B.

    Returns:
        Scalar in nats; log 2 when policy and reference agree; 0 without pairs.

    Raises:
        ValueError: shapes differ, ``beta <= 0``, smoothing outside [0, 0.5] or together with the boundary,
            unknown ``constraint``, ``boundary < 0``, ``denom <= 0``.
        TypeError: no float tensors.

    Source: DPO (2023) arXiv:2305.18290 Eq. 7
        ODPO (2024) arXiv:2402.10571 offset; UV-CoT (2025) arXiv:2504.18397 offset from scores
        DPO-ST (2024) arXiv:2407.18248; RaCT (2024) arXiv:2412.14405; ThinkPO (2025) arXiv:2502.13173
        CPO (2024) arXiv:2406.09136 on one step; Guardrail CoT (2025) arXiv:2501.13080
        SELF-JUDGE (2024) arXiv:2402.11253; Learning dynamics (2024) arXiv:2407.10490
        AFT (2023) arXiv:2309.02144 §4, the constraints
    Basis: paper; equal to TRL 1.16's sigmoid loss. RaCT's and Guardrail CoT's use from their abstracts only;
        UV-CoT's offset second-hand (its released code leaves it out). Which constraint AFT gave DPO:
        second-hand.
    Differs: the boundary form is our transfer of AFT's, not read in the paper. CPO here is the chain of
        preference optimisation, not TRL's contrastive loss of that name.

    Example:
        >>> from torch import tensor
        >>> dpo(tensor([-1.0]), tensor([-3.0]), tensor([-2.0]), tensor([-2.0]), beta=1.0)  # margin 2
        tensor(0.1269)
    """
    _check_rows("dpo", chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    _check_pairs("dpo", chosen, beta, offset, label_smoothing, weights, constraint, boundary, denom)
    r_w, r_l = beta * (chosen - ref_chosen.detach()), beta * (rejected - ref_rejected.detach())
    losses = _logistic(r_w, r_l, _constant(offset), constraint, r_w - boundary, label_smoothing)
    return _mean(losses if weights is None else losses * weights.detach(), denom)


def simpo(
    chosen: SeqLogps,
    rejected: SeqLogps,
    *,
    beta: float = 2.5,
    offset: float | SeqLogps = 0.5,
    label_smoothing: float = 0.0,
    weights: SeqWeights | None = None,
    constraint: str | None = None,
    boundary: float = 0.15,
    denom: Denom = None,
) -> Loss:
    r"""`dpo` without a reference, on *mean* log-probs and with a target margin.

    $-\log\sigma(r_w - r_l - \gamma)$ with $r = \frac{\beta}{|y|}\log\pi(y)$; the constraints as in `dpo`.

    Args:
        chosen: *mean* token log-prob of the preferred response, nats, [B]; gradient flows.
        rejected: the same of the other response of the pair, [B]; gradient flows.
        beta: > 0, sharpness. iTool's run: 2.5.
        offset: gamma, nats of $r$, a number or one per pair [B]; detached. iTool's run: 0.5. TRL's
            ``simpo_gamma`` is the same number; papers that give a ratio mean gamma / beta.
        label_smoothing: epsilon in [0, 0.5], the share of pairs believed to be swapped.
        weights: factor of each pair, [B], never in the denominator; detached. None: 1.
        constraint: AFT's, on the rejected one: "boundary", "detach" or None (SimPO itself).
        boundary: nats of $r$, >= 0: AFT's boundary, in nats per token, times ``beta``.
        denom: pairs of the whole accumulated batch. None: B.

    Returns:
        Scalar in nats; log 2 when the margin is just met; 0 without pairs.

    Raises:
        ValueError: shapes differ, ``beta <= 0``, smoothing outside [0, 0.5] or together with the boundary,
            unknown ``constraint``, ``boundary < 0``, ``denom <= 0``.
        TypeError: no float tensors.

    Source: SimPO (2024) arXiv:2405.14734 Eq. 6
        iTool (2025) arXiv:2501.09766 the run of its script
    Basis: equal to TRL 1.16's simpo loss; the paper from memory; the defaults from iTool's code.
    Differs: TRL adds ``cpo_alpha`` times a likelihood term, 1.0 by default: add ``nll`` for that. The
        constraints are our transfer of AFT's.

    Example:
        >>> from torch import tensor
        >>> simpo(tensor([-0.8]), tensor([-1.0]))  # 2.5 * 0.2 - 0.5 = 0
        tensor(0.6931)
    """
    _check_rows("simpo", chosen=chosen, rejected=rejected)
    _check_pairs("simpo", chosen, beta, offset, label_smoothing, weights, constraint, boundary, denom)
    r_w, r_l = beta * chosen, beta * rejected
    losses = _logistic(r_w, r_l, _constant(offset), constraint, r_w - boundary, label_smoothing)
    return _mean(losses if weights is None else losses * weights.detach(), denom)


def dpo_ranked(
    scores: Scores,
    rank: Rank,
    valid: Valid | None = None,
    *,
    ref_scores: Scores | None = None,
    beta: float = 0.1,
    offset: float = 0.0,
    constraint: str | None = None,
    boundary: float = 0.15,
    denom: Denom = None,
) -> Loss:
    r"""`dpo` on K ranked candidates: the mean over all ordered pairs of a group.

    $-\log\sigma(r_i - r_j - \gamma)$ for every $c_i \succ c_j$, with $r = \beta\,(s - s_{ref})$. The
    boundary of a worse candidate lies below the lowest of all better ones, as in `constraint_alignment`:
    $B_j = \min_{c_k \succ c_j} r_k - b$.

    Args:
        scores: log-prob of each response, summed (SimPO: mean) over its tokens, nats, [B, K]; gradient flows.
        rank: order of quality within the row, 0 = best, integers, [B, K]; ties make no pair.
        valid: True = a real candidate, [B, K]; None: all are. What the others hold does not matter.
        ref_scores: the same under the frozen reference, [B, K]; detached. None: no reference.
        beta: > 0; larger stays closer to the reference.
        offset: gamma, nats of $r$.
        constraint: "boundary", "detach" or None.
        boundary: b, nats of $r$, >= 0.
        denom: groups of the whole accumulated batch, one-sided ones counted. None: B.

    Returns:
        Scalar, mean over the pairs of a group, then over groups; a group without a pair gives 0 with zero
        gradient. With one pair each it is `dpo`.

    Raises:
        ValueError: shapes differ, ``beta <= 0``, unknown ``constraint``, ``boundary < 0``, ``denom <= 0``.
        TypeError: ``rank`` is not an integer tensor, ``valid`` is not bool.

    Source: DPO (2023) arXiv:2305.18290 Eq. 7, on every pair
        AFT (2023) arXiv:2309.02144 §4, DPO on ranked feedback
    Basis: second-hand: how AFT fed its ranked sets to DPO is not known; all pairs are our reading.
    Differs: the paper of DPO also has a listwise form for rankings (Plackett-Luce), which this is not. The
        boundary form is our transfer of AFT's.

    Example:
        >>> from torch import tensor
        >>> dpo_ranked(tensor([[-1.0, -3.0, -3.0]]), tensor([[0, 1, 1]]), beta=1.0)  # two margins of 2
        tensor(0.1269)
    """
    _check.candidates("dpo_ranked", scores, rank, valid)
    if ref_scores is not None:
        _check_scores("dpo_ranked", scores, None, ref_scores=ref_scores)
    _check.positive("dpo_ranked", beta=beta)
    _check.finite("dpo_ranked", offset=offset)
    _check.one_of("dpo_ranked", ("boundary", "detach", None), constraint=constraint)
    _check.at_least("dpo_ranked", 0, boundary=boundary)
    check_denom("dpo_ranked", denom)
    if scores.numel() == 0:
        return scores.sum()
    better, r = _ordered(beta * (scores if ref_scores is None else scores - ref_scores.detach()), rank, valid)
    r_i, r_j = r[:, :, None].expand_as(better), r[:, None, :].expand_as(better)
    floor = torch.where(better, _lowest_better(better, r), r_i) - boundary  # finite where there is no pair
    losses = torch.where(better, _logistic(r_i, r_j, offset, constraint, floor), 0.0).sum((1, 2))
    return _mean(losses / better.sum((1, 2)).clamp(min=1), denom)


def orpo(
    chosen_logps: SeqLogps,
    rejected_logps: SeqLogps,
    *,
    beta: float = 0.1,
    constraint: str | None = None,
    boundary: float = 0.15,
    denom: Denom = None,
) -> Loss:
    r"""Likelihood of the chosen response plus a logistic loss on the odds ratio; no reference.

    $$-\log P_w - \beta\,\log\sigma(o_w - o_l),\qquad o = \log\frac{P}{1 - P}$$

    with $\log P$ the mean token log-prob. The constraints act on $o_l$ as those of `dpo` on $r_l$.

    Args:
        chosen_logps: *mean* token log-prob of the preferred response, nats, [B]; gradient flows.
        rejected_logps: the same of the other response of the pair, [B]; gradient flows.
        beta: weight of the odds-ratio term, >= 0; 0 is plain fine-tuning. SIPF: 0.1.
        constraint: AFT's, on the rejected one: "boundary", "detach" or None (ORPO itself).
        boundary: nats of log-odds, >= 0.
        denom: pairs of the whole accumulated batch. None: B.

    Returns:
        Scalar in nats; 0 without pairs. A log-prob of 0 counts as one rounding step below (its odds are
        infinite), without gradient from the odds. Half precision is computed in float32.

    Raises:
        ValueError: shapes differ, log-probs above 0, ``beta < 0``, unknown ``constraint``, ``boundary < 0``,
            ``denom <= 0``.
        TypeError: no float tensors.

    Source: ORPO (2024) arXiv:2403.07691 Eq. 7
        SIPF (2024) arXiv:2412.08393 the loss of its rounds
    Basis: paper's equation as TRL 1.16 cites it, equal to its odds-ratio term; SIPF second-hand, with
        ORPO's own sign.
    Differs: the likelihood term is a mean of each sequence, then over pairs; TRL's counts tokens, those of
        the prompt included. The constraints are our transfer of AFT's to the log-odds.

    Example:
        >>> from torch import tensor
        >>> half, third = tensor([0.5]).log(), tensor([1 / 3]).log()
        >>> orpo(half, third, beta=1.0)  # odds 1 and 1/2: log 2 + log(1 + 1/2)
        tensor(1.0986)
    """
    _check_rows("orpo", chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    for name, x in {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}.items():
        if x.device.type == "cpu" and bool((x > 1e-3).any()):
            raise ValueError(
                f"orpo: expected {name} as log-probabilities (at most 0), got {x.max():.4g}. "
                f"These look like losses or logits; call tokens.seq_logps(logps, mask, mean=True) first."
            )
    _check.at_least("orpo", 0, beta=beta, boundary=boundary)
    _check.one_of("orpo", ("boundary", "detach", None), constraint=constraint)
    check_denom("orpo", denom)
    o_w, o_l = _log_odds(chosen_logps), _log_odds(rejected_logps)
    odds = _logistic(o_w, o_l, 0.0, constraint, o_w - boundary)
    return _mean(beta * odds.to(chosen_logps.dtype) - chosen_logps, denom)


def discriminative_log_z(
    neg: Scores,
    log_u: SeqLogps,
    valid: Valid | None = None,
    *,
    neg_ref: Scores | None = None,
    tau: float = 1.0,
    gamma: float = 0.85,
) -> SeqLogps:
    r"""Moving average of the normaliser of `discriminative`, in logs; kept by the caller for every example.

    $$u \leftarrow (1-\gamma)\,u + \gamma\,\frac1K\sum_k e^{d_k},\qquad d_k = s_k/\tau - \log P_0(y_k)$$

    The sum over all outputs is estimated by K samples of a base model $P_0$; since the loss takes the log of
    that expectation, a running average per example is used instead of the batch's own.

    Args:
        neg: scores of the sampled wrong answers under the policy: summed log-probs (without ``neg_ref``:
            mean), nats, [B, K].
        log_u: log u of each example before this step, [B]. The code starts at 0.
        valid: True = a real sample, [B, K]; None: all are.
        neg_ref: log-probs of the same samples under the base model, summed, [B, K]. None: the form without
            reference (DFT2).
        tau: temperature, > 0. The paper's: 1.0; without reference 0.3.
        gamma: share of the new estimate, in (0, 1]. The paper's: 0.85; without reference 0.9. 1 is the
            batch's own normaliser.

    Returns:
        The updated log u, [B], without gradient: store it under the example's index, and hand it to
        `discriminative`. Unchanged where there is no sample.

    Raises:
        ValueError: shapes differ, ``tau <= 0``, ``gamma`` outside (0, 1].
        TypeError: no float tensors, ``valid`` is not bool.

    Source: DFT discriminative (2025) arXiv:2502.18679 dft_loss and dft_loss_ref_free of the released code
    Basis: authors' code: equal to its numbers; the paper from memory.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> discriminative_log_z(tensor([[0.0, 0.0]]), tensor([1.0]), gamma=0.5)  # log((e + 1) / 2)
        tensor([0.6201])
    """
    _check_discriminative("discriminative_log_z", neg, neg_ref, valid, tau, log_u=log_u)
    _check.positive("discriminative_log_z", gamma=gamma)
    _check.between("discriminative_log_z", 0, 1, gamma=gamma)
    d, there = _log_ratios(neg, neg_ref, valid, tau)
    count = there.sum(1)
    estimate = torch.where(there, d, -torch.inf).logsumexp(1) - count.to(d.dtype).log()
    kept = log_u.detach() + (math.log1p(-gamma) if gamma < 1 else -math.inf)
    return torch.where(count > 0, torch.logaddexp(kept, math.log(gamma) + estimate), log_u.detach())


def discriminative(
    pos: SeqLogps,
    neg: Scores,
    log_z: SeqLogps,
    valid: Valid | None = None,
    *,
    neg_ref: Scores | None = None,
    tau: float = 1.0,
    denom: Denom = None,
) -> Loss:
    r"""Discriminative fine-tuning: the reference answer against the model's own samples, no reward.

    $$\mathcal L = -s^+ + \frac1K\sum_k \mathrm{sg}\big[e^{d_k - \log u}\big]\,s_k,\qquad
    d_k = s_k/\tau - \log P_0(y_k)$$

    It has the gradient of $-s^+ + \tau\log\sum_{y} e^{s(y)/\tau}$, the likelihood of the answer among *all*
    outputs, with the sum estimated by importance sampling; its value is not that likelihood. It is not the
    "dynamic" fine-tuning of the same initials.

    Args:
        pos: score of the reference answer, nats, [B]: the summed log-prob, or the mean without ``neg_ref``;
            gradient flows.
        neg: the same of K samples of the base model, [B, K]; gradient flows.
        log_z: log u *after* this step's update, [B], from `discriminative_log_z`; detached.
        valid: True = a real sample, [B, K]; None: all are. What the others hold does not matter.
        neg_ref: log-probs of the samples under the base model, summed, [B, K]; detached. None: DFT2.
        tau: temperature, > 0, the same as for ``log_z``. The paper's: 1.0; without reference 0.3.
        denom: groups of the whole accumulated batch, those without a sample counted. None: B.

    Returns:
        Scalar, mean over groups; a group without a sample gives 0 with zero gradient.

    Raises:
        ValueError: shapes differ, ``tau <= 0``, ``denom <= 0``.
        TypeError: no float tensors, ``valid`` is not bool.

    Source: DFT discriminative (2025) arXiv:2502.18679 dft_loss and dft_loss_ref_free of the released code
    Basis: authors' code: equal to its numbers; the paper from memory.
    Differs: K may vary. The code scores the samples under the plain prompt, though an adversarial system
        prompt made them; that is the caller's choice here.

    Example:
        >>> from torch import tensor
        >>> log_z = discriminative_log_z(tensor([[-3.0]]), tensor([0.0]), gamma=1.0)
        >>> discriminative(tensor([-1.0]), tensor([[-3.0]]), log_z)  # weight e^(-3 + 3) = 1: 1 - 3
        tensor(-2.)
    """
    _check_discriminative("discriminative", neg, neg_ref, valid, tau, pos=pos, log_z=log_z)
    check_denom("discriminative", denom)
    d, there = _log_ratios(neg, neg_ref, valid, tau)
    count = there.sum(1)
    pushes = torch.where(there, (d - log_z.detach()[:, None]).exp(), 0.0) * torch.where(there, neg, 0.0)
    losses = pushes.sum(1) / count.clamp(min=1) - torch.where(count > 0, pos, 0.0)
    return _mean(losses, denom)


def _logistic(
    up: Tensor, down: Tensor, offset: Any, constraint: str | None, bound: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Elementwise -log sigmoid(up - down - offset); the push on ``down`` turns at ``bound``."""
    if constraint == "boundary":
        push = down - up + offset
        pull = (2 * bound - up + offset).detach() - down
        return torch.stack([torch.zeros_like(push), push, pull], -1).logsumexp(-1)
    h = up - (down.detach() if constraint == "detach" else down) - offset
    losses = -(1 - smoothing) * logsigmoid(h)
    return losses - smoothing * logsigmoid(-h) if smoothing else losses


def _constant(offset: Any) -> Any:
    """Return the offset, without its gradient where it has one."""
    return offset.detach() if isinstance(offset, Tensor) else offset


def _log_odds(logps: Tensor) -> Tensor:
    """Return log(P / (1 - P)) from log P, finite at P = 1; half precision in float32."""
    x = logps.to(torch.promote_types(logps.dtype, torch.float32))
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return x - (-x.expm1()).log()


def _log_ratios(neg: Tensor, ref: Tensor | None, valid: Tensor | None, tau: float) -> tuple[Tensor, Tensor]:
    """Return s / tau - log P0 [B, K] without gradient, and where there is a sample."""
    d = neg.detach() / tau - (0.0 if ref is None else ref.detach())
    return d, torch.ones_like(d, dtype=torch.bool) if valid is None else valid


def _check_scores(fn: str, scores: Tensor, valid: Tensor | None, **others: Tensor) -> None:
    """Check scores [B, K], what goes with each candidate, and the padding of K."""
    _check.floating(fn, scores=scores, **others)
    _check.ndim(fn, "B K", scores=scores)
    _check.same_shape(fn, scores=scores, **others)
    if valid is not None:
        _check.boolean(fn, valid=valid)
        _check.same_shape(fn, scores=scores, valid=valid)


def _check_rows(fn: str, **rows: Tensor) -> None:
    """Check that all are float vectors [B] of one length."""
    _check.floating(fn, **rows)
    _check.ndim(fn, "B", **rows)
    _check.same_shape(fn, **rows)


def _check_pairs(
    fn: str,
    chosen: Tensor,
    beta: Any,
    offset: Any,
    label_smoothing: Any,
    weights: Tensor | None,
    constraint: Any,
    boundary: Any,
    denom: Any,
) -> None:
    """Check what the logistic losses on pairs have in common."""
    _check.positive(fn, beta=beta)
    if isinstance(offset, Tensor):
        _check_rows(fn, chosen=chosen, offset=offset)
    else:
        _check.finite(fn, offset=offset)
    if weights is not None:
        _check_rows(fn, chosen=chosen, weights=weights)
    _check.between(fn, 0, 0.5, label_smoothing=label_smoothing)
    _check.one_of(fn, ("boundary", "detach", None), constraint=constraint)
    _check.at_least(fn, 0, boundary=boundary)
    if constraint == "boundary" and label_smoothing:
        raise ValueError(
            f"{fn}: expected label_smoothing 0 with the boundary, got {label_smoothing}. "
            f"A swapped label would move the point where the push turns."
        )
    check_denom(fn, denom)


def _check_discriminative(
    fn: str, neg: Tensor, neg_ref: Tensor | None, valid: Tensor | None, tau: float, **rows: Tensor
) -> None:
    """Check samples [B, K] and what there is one of per example [B]."""
    _check_scores(fn, neg, valid, **({} if neg_ref is None else {"neg_ref": neg_ref}))
    _check_rows(fn, **rows)
    for name, row in rows.items():
        if len(row) != len(neg):
            raise ValueError(
                f"{fn}: expected {name} [B] and neg [B, K] of one B, got {list(row.shape)} and "
                f"{list(neg.shape)}. Pass one row of samples per example."
            )
    _check.positive(fn, tau=tau)


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
