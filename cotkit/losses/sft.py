r"""Supervised losses: make given tokens likelier, each with its own weight.

Conventions: ``logps [B, T]`` are log-probabilities in nats, position t belongs to ``labels[:, t]``
(`tokens.token_logps` shifts once, so ``logps[:, 0]`` is 0); ``mask`` is True where a token counts. Every loss
is $-\sum w\,\log p$ over one count, and ``denom`` is that count over the whole accumulated batch.

Functions, parent first: `nll` plain fine-tuning; `iw_weights` importance of a sequence or a token; `iw_sft`
importance-weighted fine-tuning. Masked thought (MFT) is `nll` of a model that read ``tokens.corrupt``'s ids.
"""

import torch

from cotkit import _check
from cotkit._reduce import total
from cotkit._types import Denom, Loss, Mask, SeqWeights, TokenLogps, TokenWeights

__all__ = ["iw_sft", "iw_weights", "nll"]


def nll(
    logps: TokenLogps,
    mask: Mask,
    *,
    weights: TokenWeights | SeqWeights | None = None,
    per: str = "token",
    denom: Denom = None,
) -> Loss:
    r"""Weighted negative log-likelihood, the parent of every supervised loss.

    $-\frac{1}{N}\sum_{b,t} w_{bt}\,\log p_\theta(y_{bt})$

    Args:
        logps: log-probs of the labels, nats, [B, T]; gradient flows.
        mask: True = the token counts, [B, T].
        weights: one factor per token [B, T] or per row [B]; not normalised, gradient flows if it has one.
            None: 1 everywhere.
        per: "token": sum over all counted tokens / denom. "sequence": token mean of each row, summed / denom,
            so a short chain counts as much as a long one.
        denom: tokens (per="token") or rows (per="sequence") of the whole accumulated batch, so that splitting
            a batch changes nothing. None: those of this call.

    Returns:
        Scalar in nats; 0 with zero gradient when nothing counts.

    Raises:
        ValueError: logits, shifted or positive ``logps``, shapes that differ, ``denom <= 0``.
        TypeError: ``mask`` is not bool.

    Source: none (plumbing)
    Basis: definition of the cross-entropy.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> nll(tensor([[0.0, -1.0, -3.0]]), tensor([[False, True, True]]))  # (1 + 3) / 2
        tensor(2.)
    """
    _check.token_logps("nll", mask, logps=logps)
    terms = -logps
    if weights is not None:
        _check.floating("nll", weights=weights)
        w = weights[:, None].expand_as(logps) if weights.shape == logps.shape[:1] else weights
        _check.same_shape("nll", logps=logps, weights=w)
        terms = torch.where(mask, w, 0.0) * torch.where(mask, terms, 0.0)  # 0 * NaN would leak into gradients
    return total("nll", terms, mask, per=per, denom=denom)


def iw_weights(
    q_logps: TokenLogps,
    ref_logps: TokenLogps,
    mask: Mask,
    *,
    level: str = "sequence",
    temperature: float = 1.0,
    clip: tuple[float, float] = (0.0, 16.0),
) -> SeqWeights | TokenWeights:
    r"""Importance of the data under q against the policy that wrote it, smoothed and clipped.

    $w(\tau) = \mathrm{clip}\big(\exp\big[\frac{\alpha}{|\tau|}\sum_t \log\frac{q_t}{\pi_{ref,t}}\big]\big)$
    for a sequence, $w_t = \mathrm{clip}\big(\exp\big[\alpha\log\frac{q_t}{\pi_{ref,t}}\big]\big)$ for a
    token, where clip is to [lowest, highest].

    Args:
        q_logps: log-probs under q (the policy itself, or a lagged or averaged copy), nats, [B, T].
        ref_logps: log-probs under the policy that generated the data, nats, [B, T]. Where that policy is
            unknown the paper's language-model run takes the model before fine-tuning, which is an
            approximation.
        mask: True = response token, [B, T]; the prompt does not enter the ratio.
        level: "sequence": one weight per row from the length-averaged log-ratio. "token": one per token.
        temperature: alpha, sharpness of the ratio; 0 gives 1 everywhere: plain fine-tuning.
        clip: lowest and highest weight. Authors' code: (0, 16) per sequence, (0.2, 1.8) per token.

    Returns:
        Weights without gradient: [B] for "sequence", [B, T] for "token". What is not counted weighs 1.

    Raises:
        ValueError: shapes differ, unknown ``level``, ``clip`` not a rising pair.
        TypeError: ``mask`` is not bool.

    Source: iw-SFT (2025) arXiv:2507.12856 IwSFTLoss of the released code
    Basis: authors' code, both repositories; the paper's equations second-hand.
    Differs: the length average is the released code's smoothing, not the true ratio of sequence
        probabilities. The temperature acts on tokens too, as in the control-task code (the language-model
        code has none there).

    Example:
        >>> from torch import tensor
        >>> q, ref = tensor([[0.0, -1.0, -2.0]]), tensor([[0.0, -1.5, -2.5]])
        >>> iw_weights(q, ref, tensor([[False, True, True]]))  # exp(0.5)
        tensor([1.6487])
    """
    _check.token_logps("iw_weights", mask, q_logps=q_logps, ref_logps=ref_logps)
    _check.one_of("iw_weights", ("sequence", "token"), level=level)
    _check.finite("iw_weights", temperature=temperature)
    _check.interval("iw_weights", clip=clip)
    log_ratio = torch.where(mask, q_logps.detach() - ref_logps.detach(), 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1) / mask.sum(1).clamp(min=1)
    return (temperature * log_ratio).exp().clamp(*clip)


def iw_sft(
    logps: TokenLogps,
    ref_logps: TokenLogps,
    mask: Mask,
    *,
    q_logps: TokenLogps | None = None,
    level: str = "sequence",
    temperature: float = 1.0,
    clip: tuple[float, float] = (0.0, 16.0),
    denom: Denom = None,
) -> Loss:
    r"""Importance-weighted fine-tuning: a bound on the RL objective that stays tight as the policy moves.

    Fine-tuning on curated data maximises $E_{\pi_{ref}}[R\,(1 + \log p_\theta - \log \pi_{ref})]$, a lower
    bound of the expected reward that is tight only at $p_\theta = \pi_{ref}$. With any q in between the bound
    becomes $E_{D^+}\big[\frac{q(\tau)}{\pi_{ref}(\tau)} \log p_\theta(\tau)\big]$, tight at $q = p_\theta$.
    The loss is $-\frac{1}{N}\sum_b w_b \sum_t \log p_\theta(y_{bt})$ with $w$ from `iw_weights`.

    Args:
        logps: log-probs of the labels under the trained policy, nats, [B, T]; gradient flows.
        ref_logps: log-probs under the policy that wrote the data (or before fine-tuning), nats, [B, T].
        mask: True = response token, [B, T].
        q_logps: log-probs under q, nats, [B, T]. None: the trained policy itself, as in the authors'
            language-model run; their control tasks take a running average of it.
        level: "sequence" or "token", see `iw_weights`.
        temperature: sharpness of the ratio; 0 is plain fine-tuning.
        clip: lowest and highest weight.
        denom: tokens of the whole accumulated batch, *not* the sum of the weights. None: tokens of this call.

    Returns:
        Scalar in nats; equals `nll` while q and the reference agree; 0 with zero gradient when nothing
        counts.

    Raises:
        ValueError: as `nll` and `iw_weights`.
        TypeError: ``mask`` is not bool.

    Source: iw-SFT (2025) arXiv:2507.12856 IwSFTLoss of the released code
    Basis: authors' code: equal to its numbers row by row; the paper's equations second-hand.
    Differs: rows may share a batch; the released broadcast is right for one row per call only. Nothing falls
        back to the unweighted loss when no token count is given.

    Example:
        >>> from torch import tensor
        >>> logps, ref = tensor([[0.0, -1.0, -2.0]]), tensor([[0.0, -1.5, -2.5]])
        >>> iw_sft(logps, ref, tensor([[False, True, True]]))  # exp(0.5) * (1 + 2) / 2
        tensor(2.4731)
    """
    _check.token_logps("iw_sft", mask, logps=logps, ref_logps=ref_logps)
    q = logps if q_logps is None else q_logps
    weights = iw_weights(q, ref_logps, mask, level=level, temperature=temperature, clip=clip)
    return nll(logps, mask, weights=weights, denom=denom)
