r"""Flow losses: sample chains in proportion to a reward instead of maximising it.

Conventions: ``log_r`` is the log of a reward above 0, nats, always detached: R need not be normalised. For
inference it is a joint log-probability, log p(thought, answer | question), and the optimum is the posterior
over thoughts. Log-probs of whole chains are *sums* over tokens. A chain is built token by token from the
left, so it can be reached in one way only and the backward probability of flow networks is 1. `tb` and
`subtb` need no samples of the current policy: a replay buffer or a warmer policy may write the chains, as
long as they are scored without its temperature.

Functions: `tb` whole chains, trajectory balance (VarGrad, mirror descent); `subtb` every stretch of a chain
whose prefixes may all end, sub-trajectory balance (detailed balance at ``max_span=1``); `trice` one
remembered right thought per question against a fresh proposal.

Composed, not offered: a reward temperature is ``log_r / schedule(...)``; steps made of a thought and an
action (GFlowVLM) are ``log_pf = action + lam * thought``.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from cotkit import _check
from cotkit._reduce import check_denom
from cotkit._types import Denom, Loss, Mask, Scores, SeqLogps, TokenLogps, TokenValues, Valid

__all__ = ["subtb", "tb", "trice"]


def tb(
    log_pf: Scores,
    log_r: Scores,
    log_z: SeqLogps | None = None,
    *,
    valid: Valid | None = None,
    denom: Denom = None,
) -> Loss:
    r"""Trajectory balance: the log-prob of a whole chain equals its log reward up to one constant per prompt.

    $$\frac1K\sum_k\big(\log Z + \log P_F(y_k) - \log R(y_k)\big)^2$$

    Without ``log_z`` the constant is the mean of $\zeta_k = \log R_k - \log P_{F,k}$ over the group, so the
    loss is the variance of $\zeta$ (VarGrad, Var-TB). Whether that mean is held fixed does not change the
    gradient: the deviations sum to 0.

    Mirror descent (Kimi) is the same with the old policy as the prior: with $\log R = \log\pi_{old} + r/\tau$
    and $\log Z = \bar r/\tau$, $\tau/2$ times this loss has the gradient of
    $-\frac1K\sum_k[\Delta_k(r_k - \bar r) - \frac\tau2\Delta_k^2]$, $\Delta = \log\pi - \log\pi_{old}$.

    Args:
        log_pf: log-prob of each of K chains of a prompt, *summed* over its tokens, the stop included, nats,
            [B, K]; gradient flows.
        log_r: log reward of each chain, nats, finite, [B, K]; detached.
        log_z: log of the sum of R over all chains of the prompt, [B]; gradient flows, so that a parameter
            learns it. None: the group's own estimate.
        valid: True = a real chain, [B, K]; None: all are. What the others hold does not matter.
        denom: groups of the whole accumulated batch. None: B.

    Returns:
        Scalar, mean over the chains of a group, then over groups; an empty group gives 0, and so does a group
        of one without ``log_z``, both with zero gradient.

    Raises:
        ValueError: shapes differ, a value that counts is not finite, ``denom <= 0``.
        TypeError: no float tensors, ``valid`` is not bool.

    Source: Trajectory balance (2022) arXiv:2201.13259; VarGrad (2020) arXiv:2010.10436
        GFlowNet-LM (2023) arXiv:2310.04363; GFlowVLM (2025) arXiv:2503.06514 TB and Var-TB
        Kimi-VL (2025) arXiv:2504.07491 policy optimisation of Kimi k1.5
    Basis: the trajectory-balance and variance forms from memory, exact on an enumerated tree; GFlowVLM's use
        second-hand; the mirror-descent gradient from memory, held against its formula.
    Differs: mirror descent's loss value by a constant, its gradient by nothing.

    Example:
        >>> from torch import tensor
        >>> log_pf, log_r = tensor([[-1.0, -3.0]]), tensor([[-2.5, -1.0]])
        >>> tb(log_pf, log_r, tensor([0.5]))  # (0.5 - 1 + 2.5)^2 = 4 and (0.5 - 3 + 1)^2 = 2.25
        tensor(3.1250)
        >>> tb(log_pf, log_r)  # zeta -1.5 and 2: 1.75 from their mean
        tensor(3.0625)
    """
    _check.floating("tb", log_pf=log_pf, log_r=log_r)
    _check.ndim("tb", "B K", log_pf=log_pf)
    _check.same_shape("tb", log_pf=log_pf, log_r=log_r)
    if valid is not None:
        _check.boolean("tb", valid=valid)
        _check.same_shape("tb", log_pf=log_pf, valid=valid)
    counted = torch.ones_like(log_pf, dtype=torch.bool) if valid is None else valid
    _finite("tb", counted, log_pf=log_pf, log_r=log_r)
    if log_z is not None:
        _check.floating("tb", log_z=log_z)
        if log_z.shape != log_pf.shape[:1]:
            raise ValueError(
                f"tb: expected log_z [B] with B = {len(log_pf)}, got {list(log_z.shape)}. "
                f"Pass one value per prompt; cotkit does not broadcast."
            )
        _finite("tb", torch.ones_like(log_z, dtype=torch.bool), log_z=log_z)
    check_denom("tb", denom)
    wide = _wide(log_pf)
    residual = torch.where(counted, log_pf.to(wide) - log_r.detach().to(wide), 0.0)
    count = counted.sum(1, keepdim=True).clamp(min=1)
    constant = -residual.sum(1, keepdim=True) / count if log_z is None else log_z.to(wide)[:, None]
    squares = torch.where(counted, constant + residual, 0.0) ** 2
    losses = squares.sum(1) / count[:, 0]
    return (losses.sum() / (max(len(losses), 1) if denom is None else denom)).to(log_pf.dtype)


def subtb(
    logps: TokenLogps,
    stop_logps: TokenLogps,
    log_r: TokenValues,
    mask: Mask,
    *,
    lam: float = 1.0,
    max_span: int | None = None,
    denom: Denom = None,
) -> Loss:
    r"""Sub-trajectory balance of a chain whose every prefix may end: no flow has to be learned.

    Let state t be the text up to and including token t, $R_t$ the reward of ending there, $e_t$ the log-prob
    of ending there. At the optimum $e_t = \log R_t - \log F_t$, so the flow $F_t$ is known and

    $$\frac{\sum_{i<j}\lambda^{j-i-1}\big(\log R_i - e_i + \sum_{t=i+1}^{j}\log p_t - \log R_j + e_j\big)^2}
    {\sum_{i<j}\lambda^{j-i-1}}$$

    over all pairs of states of a chain and all chains of the batch is 0 exactly when the policy ends in each
    state in proportion to its reward. ``max_span=1`` keeps the neighbours only: detailed balance.

    Args:
        logps: log-prob of token t given what is before it, [B, T], as `tokens.token_logps` gives it: the step
            *into* state t. Gradient flows. The first counted position of a row is not read.
        stop_logps: log-prob of the stop token *after* token t, [B, T]:
            ``logits.log_softmax(-1)[..., stop_id]``, unshifted. Gradient flows.
        log_r: log reward of ending after token t, nats, finite, [B, T]; detached. A reward of 0 must be
            clipped: the authors' code gives chains below the least length -99.
        mask: True = a state that may end, [B, T]: the last token of the prompt (the empty chain) and every
            token before the stop, not the stop itself. From a mask of the written tokens that has the stop in
            it: ``torch.nn.functional.pad(written[:, 1:], (0, 1))``. A gap ends a chain: no pair spans it.
        lam: lambda >= 0; weight of a pair by its length j - i. Authors' scripts: 1. 0: detailed balance.
        max_span: longest j - i that counts, >= 1. None: all.
        denom: sum of the weights $\lambda^{j-i-1}$ over the whole accumulated batch; with lam 1 and no
            ``max_span`` a row of n states adds n (n - 1) / 2. None: that of this call.

    Returns:
        Scalar; 0 with zero gradient when no row has two states (every chain ended at once). Memory: a few
        tensors [B, T, T].

    Raises:
        ValueError: shapes differ, a value under the mask is above 0 (log-probs) or not finite, ``lam < 0``,
            ``max_span < 1``, ``denom <= 0``.
        TypeError: ``mask`` is not bool, ``max_span`` no int.

    Source: GFlowNet-LM (2023) arXiv:2310.04363 modified_subtb_loss of the released code
        GFlowVLM (2025) arXiv:2503.06514 SubTB and DB; SubTB (2022) arXiv:2209.12782 the weights
        DAG-GFlowNet (2022) arXiv:2202.13903 the balance without flows
    Basis: authors' code (next-sentence task): equal to its numbers and gradients. GFlowVLM, which has no
        released code, second-hand.
    Differs: layout: state t and the token that leads *into* it stand in one column; the code puts the token
        that leaves a state beside it. Without a pair the code gives NaN. Its arithmetic task drops pairs one
        step later, since its rewards end behind the stop token. GFlowVLM's detailed balance sums over steps:
        multiply by their number.

    Example:
        >>> from torch import tensor
        >>> logps, stops = tensor([[0.0, -0.5]]), tensor([[-1.0, -0.2]])
        >>> log_r, states = tensor([[-2.0, -3.0]]), tensor([[True, True]])
        >>> subtb(logps, stops, log_r, states)  # (-2 + 1 - 0.5 + 3 - 0.2)^2 = 1.3^2
        tensor(1.6900)
    """
    _check.token_logps("subtb", mask, logps=logps, stop_logps=stop_logps)
    _check.floating("subtb", log_r=log_r)
    _check.same_shape("subtb", log_r=log_r, mask=mask)
    _check.at_least("subtb", 0, lam=lam)
    if max_span is not None:
        _check.integers("subtb", max_span=max_span)
        _check.at_least("subtb", 1, max_span=max_span)
    check_denom("subtb", denom)
    linked = mask & pad(mask[:, :-1], (1, 0))  # state t and the one before it both count
    _finite("subtb", linked, logps=logps)
    _finite("subtb", mask, stop_logps=stop_logps, log_r=log_r)
    wide = _wide(logps)
    flow = torch.where(mask, log_r.detach().to(wide) - stop_logps.to(wide), 0.0)  # log F at the optimum
    delta = torch.where(linked, logps.to(wide) + pad(flow[:, :-1], (1, 0)) - flow, 0.0)
    ahead = delta.cumsum(1)
    chain = (~linked).cumsum(1)  # states of one number follow each other without a gap
    place = torch.arange(mask.shape[1], device=mask.device)
    span = place[None, :] - place[:, None]  # [i, j]
    near = (span >= 1) if max_span is None else (span >= 1) & (span <= max_span)
    pairs = (chain[:, :, None] == chain[:, None, :]) & near
    weights = torch.where(pairs, lam ** (span - 1).to(wide), 0.0)
    residual = torch.where(pairs, ahead[:, None, :] - ahead[:, :, None], 0.0)
    count = weights.sum().clamp(min=1) if denom is None else denom  # a neighbour weighs 1
    return ((weights * residual**2).sum() / count).to(logps.dtype)


def trice(
    memory: Float[Tensor, "M"],
    proposal: Float[Tensor, "M"],
    memory_ok: Bool[Tensor, "M"],
    proposal_ok: Bool[Tensor, "M"],
    *,
    control_variate: bool = True,
    denom: Denom = None,
) -> Loss:
    r"""TRICE: raise a remembered right thought, lower a fresh proposal as far as it would be right anyway.

    $$-\frac1{\sum_m c'_m}\sum_m c'_m\big[\log p(z_m) - \beta_m \log p(\tilde z_m)\big],\qquad
    \beta_m = \frac{\sum_{k \ne m} c'_k \tilde c_k}{\sum_{k \ne m} c'_k}$$

    Each question keeps one thought $z_m$. A step proposes $\tilde z_m$ from the model, which does not see the
    answer, and a right proposal becomes the memory: that is a Markov chain whose limit is the posterior over
    right thoughts, so the first term climbs the marginal log-likelihood of the answer. The expected gradient
    of $\log p(\tilde z)$ is 0; subtracting it removes noise, all of it once every proposal is right.

    Args:
        memory: log-prob of the remembered thought with its answer, *summed* over its tokens, nats, [M], after
            the update: where the proposal is right it is the proposal's own. Gradient flows.
        proposal: the same of the proposed thought, [M]; gradient flows.
        memory_ok: c', True = the memory after the update leads to the right answer, [M].
        proposal_ok: True = the proposal does, [M]. Such a proposal is in the memory already.
        control_variate: False: beta 0, the basic estimator.
        denom: right memories of the whole accumulated batch. None: those of this call. beta is always
            estimated within the call: parts of a batch have other values, the same expectation. For the exact
            value take exact two-pass gradients over the whole batch.

    Returns:
        Scalar in nats; its gradient is what matters, not its value. 0 with zero gradient when no memory is
        right; a question whose memory is wrong adds nothing. One question alone has beta 0.

    Raises:
        ValueError: shapes differ, a counted log-prob is not finite, a right proposal beside a wrong memory
            (the memory was not updated), ``denom <= 0``.
        TypeError: no float tensors, masks that are not bool.

    Source: TRICE (2023) arXiv:2312.02179 gradient estimator with control variate
    Basis: memory; the expectation is exact on enumerated thoughts in the tests. No code was released.
    Differs: nothing known. Terms whose weight is near 0 are not left out: the subsampling that saves their
        backward pass is the caller's.

    Example:
        >>> from torch import tensor
        >>> ok, right = tensor([True, True, True]), tensor([True, False, True])  # beta 1/2, 1, 1/2
        >>> memory, proposal = tensor([-1.0, -2.0, -4.0]), tensor([-1.0, -3.0, -4.0])
        >>> trice(memory, proposal, ok, right)  # -(-1/2 + 1 - 2) / 3
        tensor(0.5000)
    """
    _check.floating("trice", memory=memory, proposal=proposal)
    _check.boolean("trice", memory_ok=memory_ok, proposal_ok=proposal_ok)
    _check.ndim("trice", "M", memory=memory)
    _check.same_shape("trice", memory=memory, proposal=proposal, memory_ok=memory_ok, proposal_ok=proposal_ok)
    if memory_ok.device.type == "cpu" and bool((proposal_ok & ~memory_ok).any()):
        raise ValueError(
            "trice: expected a right memory wherever the proposal is right, got a wrong one. "
            "Put right proposals into the memory first and pass its log-probs and verdicts after that."
        )
    _finite("trice", memory_ok, memory=memory, proposal=proposal)
    check_denom("trice", denom)
    wide = _wide(memory)
    right, accepted = memory_ok.to(wide), (memory_ok & proposal_ok).to(wide)
    terms = torch.where(memory_ok, memory, 0.0).to(wide)
    if control_variate:
        beta = (accepted.sum() - accepted) / (right.sum() - right).clamp(min=1)
        terms = terms - beta * torch.where(memory_ok, proposal, 0.0).to(wide)
    count = right.sum().clamp(min=1) if denom is None else denom
    return (-terms.sum() / count).to(memory.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """At least float32: differences of long sums are what counts here."""
    return torch.promote_types(x.dtype, torch.float32)


def _finite(fn: str, counted: Tensor, **tensors: Any) -> None:
    """Raise ValueError if a value that counts is infinite or NaN; looked at on the CPU only."""
    for name, x in tensors.items():
        if x.device.type != "cpu":
            continue
        bad = x.detach()[counted]
        bad = bad[~bad.isfinite()]
        if bad.numel():
            hint = "A reward of 0 has no log: clip it, log_r.clamp(min=-99)." if name == "log_r" else ""
            hint = hint or "A token of probability 0 cannot have been written: look at its scores."
            raise ValueError(f"{fn}: expected {name} finite where it counts, got {bad[0]}. {hint}")
