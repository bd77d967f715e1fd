r"""Supervised losses: make given tokens likelier, each with its own weight.

Conventions: ``logps [B, T]`` are log-probabilities in nats, position t belongs to ``labels[:, t]``
(`tokens.token_logps` shifts once, so ``logps[:, 0]`` is 0); ``mask`` is True where a token counts. Every loss
is $-\sum w\,\log p$ over one count, and ``denom`` is that count over the whole accumulated batch.

Functions, parent first: `nll` plain fine-tuning; `iw_weights` importance of a sequence or a token; `iw_sft`
importance-weighted fine-tuning; `poft` fine-tuning that competes with aligned models; `ift_inputs` half
gold, half guessed inputs and `ift_weights` what a token means for the rest (IFT); `multi_token` several
tokens ahead. Masked thought (MFT) is `nll` of a model that read ``tokens.corrupt``'s ids.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from cotkit import _check
from cotkit._reduce import check_denom, total
from cotkit._types import (
    Denom,
    HeadWeight,
    Hidden,
    Loss,
    Mask,
    SeqLogps,
    SeqWeights,
    TokenIds,
    TokenLogps,
    TokenValues,
    TokenWeights,
)

__all__ = ["ift_inputs", "ift_weights", "iw_sft", "iw_weights", "multi_token", "nll", "poft"]


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
    length_scale: bool = True,
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
        length_scale: average the log-ratio over the row's tokens, as the released code does. False: sum it,
            the true ratio of sequence probabilities $q(\tau)/\pi_{ref}(\tau)$. Tokens do not care.

    Returns:
        Weights without gradient: [B] for "sequence", [B, T] for "token". What is not counted weighs 1.

    Raises:
        ValueError: shapes differ, a log-prob under the mask that is not finite, unknown ``level``, ``clip``
            not a rising pair.
        TypeError: ``mask`` is not bool.

    Source: iw-SFT (2025) arXiv:2507.12856 IwSFTLoss of the released code
    Basis: authors' code, both repositories; the paper's equations second-hand.
    Differs: the length average is the released code's smoothing; ``length_scale=False`` is the paper's ratio.
        The temperature acts on tokens too, as in the control-task code (the language-model code has none
        there). The weights are not divided by their sum, which that code does by default: with
        ``nll(logps, mask, weights=w / w.sum() * len(w), per="sequence")`` they are.

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
    _possible("iw_weights", mask, q_logps=q_logps, ref_logps=ref_logps)
    log_ratio = torch.where(mask, q_logps.detach() - ref_logps.detach(), 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1)
        if length_scale:
            log_ratio = log_ratio / mask.sum(1).clamp(min=1)
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
    length_scale: bool = True,
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
            language-model run; their control tasks take a running average of it, which is
            ``torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))`` after
            every step. The reference itself gives plain fine-tuning.
        level: "sequence" or "token", see `iw_weights`.
        temperature: sharpness of the ratio; 0 is plain fine-tuning.
        clip: lowest and highest weight.
        length_scale: average the log-ratio over the row's tokens; False sums it, the paper's true ratio.
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
    weights = iw_weights(
        q, ref_logps, mask, level=level, temperature=temperature, clip=clip, length_scale=length_scale
    )
    return nll(logps, mask, weights=weights, denom=denom)


def poft(
    scores: SeqLogps,
    ref_scores: SeqLogps | Float[Tensor, "M B"],
    *,
    beta: float = 1.0,
    gamma: float = 0.0,
    denom: Denom = None,
) -> Loss:
    r"""Preference-oriented fine-tuning: the trained model is to like the data more than aligned models do.

    $-\log\sigma\big(\beta(s_\theta - \frac1M\sum_m s_m) + \gamma\big)$, $s$ = mean log-prob per token

    The gradient is that of the mean log-prob times $\beta\,\sigma(\beta(\bar s - s_\theta) - \gamma)$: rows
    that aligned models find likely teach more, what the model has already learned better teaches less.

    Args:
        scores: mean log-prob of each row under the trained model, nats per token, [B]; gradient flows
            (`tokens.seq_logps` with ``mean=True``).
        ref_scores: the same under the aligned models, each with its own tokenizer, detached: [M, B], or
            [B] of one model or already averaged.
        beta: > 0, sharpness. Paper: 1.
        gamma: margin in units of ``beta * nats``. Paper: 0.
        denom: rows of the whole accumulated batch. None: B.

    Returns:
        Scalar, mean over rows; log 2 where both sides agree; 0 with zero gradient without rows.

    Raises:
        ValueError: shapes differ, no aligned model, ``beta <= 0``, ``denom <= 0``.
        TypeError: a tensor is not floating.

    Source: PoFT (2024) arXiv:2412.12865
    Basis: second-hand: the paper's equation from a detailed summary; equal to the authors' code.
    Differs: ``logsigmoid`` in place of log(sigmoid), which underflows. Which tokens a score counts is the
        caller's mask: the released trainer counts the prompt's too, its stored scores the replies' only.

    Example:
        >>> from torch import tensor
        >>> poft(tensor([-1.0]), tensor([[-2.5], [-1.5]]))  # log(1 + e^-1)
        tensor(0.3133)
    """
    _check.floating("poft", scores=scores, ref_scores=ref_scores)
    _check.ndim("poft", "B", scores=scores)
    if ref_scores.dim() == 2:
        if len(ref_scores) == 0:
            raise ValueError(
                "poft: expected the scores of at least one aligned model, got none. Pass [M, B]."
            )
        ref_scores = ref_scores.mean(0)  # inside the sigmoid
    _check.same_shape("poft", scores=scores, ref_scores=ref_scores)
    _check.positive("poft", beta=beta)
    _check.finite("poft", gamma=gamma)
    check_denom("poft", denom)
    losses = -logsigmoid(beta * (scores - ref_scores.detach()) + gamma)
    return losses.sum() / (max(1, len(losses)) if denom is None else denom)


def ift_inputs(
    embeds: Hidden, embedding: HeadWeight, greedy_ids: TokenIds, mask: Mask, *, lam: float = 0.2
) -> Hidden:
    r"""Temporal residual of IFT: the model reads its gold inputs mixed with what it would have written.

    $\hat e_t = (1-\lambda)\,e(y_t) + \lambda\,e(\arg\max p(\cdot|y_{<t}))$ on response tokens

    Run the model on the result (``inputs_embeds``) with the ordinary labels, see `ift_weights`. In
    ``lab.fit`` this is ``prepare``: put it into the batch as ``inputs_embeds``.

    Args:
        embeds: input embeddings of the gold ids as the model looks them up, [B, T, D].
        embedding: the table they come from, [V, D].
        greedy_ids: ``logits.argmax(-1)`` of a pass without gradient over the gold ids, *unshifted*: what
            stands at position t is the guess for t+1; the shift happens here, [B, T].
        mask: True = response token, [B, T]; the prompt is read as it is.
        lam: share of the guess, in [0, 1]; 0 is teacher forcing. Authors' configuration: 0.2.

    Returns:
        Embeddings without gradient, [B, T, D].

    Raises:
        ValueError: shapes differ, ``lam`` outside [0, 1].
        TypeError: ``mask`` is not bool, ``greedy_ids`` are not integers.

    Source: IFT (2024) arXiv:2405.11870 temporal residual connection
    Basis: authors' code: equal to its numbers; the paper second-hand.
    Differs: nothing: in the released trainer both look-ups go through a frozen copy of the table, so no
        gradient reaches the input embeddings.

    Example:
        >>> from torch import tensor
        >>> table = tensor([[0.0], [1.0], [5.0]])
        >>> ids, greedy, mask = tensor([[0, 1]]), tensor([[2, 0]]), tensor([[False, True]])
        >>> ift_inputs(table[ids], table, greedy, mask)  # 0.8 * 1 + 0.2 * 5
        tensor([[[0.0000],
                 [1.8000]]])
    """
    _check.ndim("ift_inputs", "B T D", embeds=embeds)
    _check.ndim("ift_inputs", "V D", embedding=embedding)
    _check.floating("ift_inputs", embeds=embeds, embedding=embedding)
    _check.boolean("ift_inputs", mask=mask)
    _check.integer("ift_inputs", greedy_ids=greedy_ids)
    _check.same_shape("ift_inputs", greedy_ids=greedy_ids, mask=mask)
    _check.between("ift_inputs", 0, 1, lam=lam)
    if embeds.shape[:2] != mask.shape or embeds.shape[2] != embedding.shape[1]:
        raise ValueError(
            f"ift_inputs: expected one B, T and one D, got embeds {list(embeds.shape)}, "
            f"mask {list(mask.shape)}, embedding {list(embedding.shape)}. "
            f"embeds = embedding[input_ids], all T positions of them."
        )
    gold, guess = embeds.detach(), embedding.detach()[greedy_ids.roll(1, 1)]
    mixed = mask & (torch.arange(mask.shape[1], device=mask.device) > 0)  # nothing was guessed for position 0
    return torch.where(mixed[..., None], (1 - lam) * gold + lam * guess, gold)


def ift_weights(
    token_nll: TokenValues, mask: Mask, *, gamma: float = 0.95, future: bool = True
) -> TokenWeights:
    r"""Relation propagation of IFT: a token weighs what depends on it.

    Released code: $w_t = N\,\frac{\sum_{i\ge t}\gamma^{i-t}\,l_i}{\sum_s\sum_{i\ge s}\gamma^{i-s}\,l_i}$, the
    discounted loss still to come, so early tokens weigh more. Paper: $w_t = \sum_{n\le t}\gamma^{t-n} =
    \frac{1-\gamma^{t}}{1-\gamma}$ for the t-th token, so *late* tokens weigh more.

    The loss is ``nll(logps, mask, weights=ift_weights(-logps, mask), per="sequence")``.

    Args:
        token_nll: loss of each token l, nats, [B, T]; gradient flows, as in the released code, whose loss is
            quadratic in l. Pass ``-logps.detach()`` for weights that are constants.
        mask: True = response token, [B, T].
        gamma: discount per token, in [0, 1]; 0 gives 1 on every response token. Authors' configuration:
            0.95.
        future: True = the released code, False = the paper, whose weights do not read ``token_nll``.

    Returns:
        Weights [B, T], 0 outside the mask; with ``future`` they add up to the number N of response tokens of
        the row (1 each where every loss is 0).

    Raises:
        ValueError: shapes differ, ``gamma`` outside [0, 1].
        TypeError: ``mask`` is not bool.

    Source: IFT (2024) arXiv:2405.11870 dynamic relation propagation
    Basis: authors' code (future=True): equal to its numbers and gradients; the paper's form second-hand.
    Differs: a row without any loss weighs 1 per token; the released code divides by zero there.

    Example:
        >>> from torch import tensor
        >>> mask = tensor([[False, True, True, True]])
        >>> ift_weights(tensor([[0.0, 0.0, 3.0, 0.0]]), mask, gamma=0.5)  # (1.5, 3, 0) * 3 / 4.5
        tensor([[0., 1., 2., 0.]])
        >>> ift_weights(tensor([[0.0, 0.0, 3.0, 0.0]]), mask, gamma=0.5, future=False)
        tensor([[0.0000, 1.0000, 1.5000, 1.7500]])
    """
    _check.ndim("ift_weights", "B T", token_nll=token_nll)
    _check.floating("ift_weights", token_nll=token_nll)
    _check.boolean("ift_weights", mask=mask)
    _check.same_shape("ift_weights", token_nll=token_nll, mask=mask)
    _check.between("ift_weights", 0, 1, gamma=gamma)
    ones = mask.to(token_nll.dtype)
    if not future:
        return ones * _discounted(ones.flip(1), gamma).flip(1)
    if gamma == 0:
        return ones
    ahead = ones * _discounted(torch.where(mask, token_nll, 0.0), gamma)
    summed, count = ahead.sum(1, keepdim=True), mask.sum(1, keepdim=True)
    known = summed != 0
    return torch.where(known, ahead * count / torch.where(known, summed, 1.0), ones)


def _discounted(values: Tensor, gamma: float) -> Tensor:
    """Sum over i >= t of gamma^(i-t) values[:, i], by doubling the span: log2(T) steps."""
    for k in range((values.shape[1] - 1).bit_length()):
        span = 1 << k
        values = values + gamma**span * pad(values[:, span:], (0, span))
    return values


def multi_token(
    logps: Float[Tensor, "H B T"],
    masks: Bool[Tensor, "H B T"],
    *,
    alpha: float = 0.01,
    decay: float = 0.8,
    denom: Denom = None,
) -> Loss:
    r"""Concept-aware fine-tuning: predict the next token and, with small weight, the ones behind it.

    $CE_0 + \alpha\sum_{i\ge1}\delta^i\,CE_i$, each a mean over its own targets

    Args:
        logps: log-probs of the labels, nats, [H, B, T]; ``logps[i, :, t]`` is what head i, which looks 1 + i
            tokens ahead, gave ``labels[:, t]``; head 0 is the model's own (`adapters.modules.future_logps`).
            Gradient flows.
        masks: True = the head has this target, [H, B, T].
        alpha: weight of the further heads, >= 0; 0 is plain fine-tuning. Authors' code: 0.01 times
            ``select.curriculum.schedule(step, total, 1, 0, kind="half-sine")``.
        decay: factor per token ahead; head 1 has it once. Authors' code: 0.8.
        denom: None: each head's own number of targets in this call. Tokens of the whole accumulated batch,
            for every head: the same number wherever the prompts have at least H tokens. One count per head:
            a tensor [H], ``masks.sum((1, 2))`` of the whole batch.

    Returns:
        Scalar in nats; a head without target adds 0.

    Raises:
        ValueError: shapes differ, logits in place of log-probs, a log-prob under its mask that is not finite,
            ``alpha < 0``, ``decay < 0``, ``denom <= 0``.
        TypeError: ``masks`` is not bool.

    Source: CAFT (2025) arXiv:2506.07833 add_caft_loss of the released code
    Basis: authors' code: equal to its numbers; the paper from memory.
    Differs: takes log-probs of the targets, so no logits [H, B, T, V]; a head without target gives 0, the
        released code NaN.

    Example:
        >>> from torch import tensor
        >>> logps = tensor([[[0.0, -1.0, -2.0]], [[0.0, 0.0, -3.0]]])
        >>> multi_token(logps, logps != 0, alpha=0.1, decay=0.5)  # 1.5 + 0.1 * 0.5 * 3
        tensor(1.6500)
    """
    _check.ndim("multi_token", "H B T", logps=logps, masks=masks)
    _check.same_shape("multi_token", logps=logps, masks=masks)
    _check.at_least("multi_token", 0, alpha=alpha, decay=decay)
    heads = len(logps)
    denoms = list(denom) if isinstance(denom, Tensor) and denom.dim() == 1 else [denom] * heads
    if heads == 0 or len(denoms) != heads:
        raise ValueError(
            f"multi_token: expected one head or more and one denom or one each, got {heads} heads and "
            f"{len(denoms)} counts. Head 0 is the model's own."
        )
    losses = [nll(x, m, denom=d) for x, m, d in zip(logps, masks, denoms, strict=True)]
    _possible("multi_token", masks, logps=logps)
    return losses[0] + alpha * sum(decay**i * loss for i, loss in enumerate(losses[1:], 1))


def _possible(fn: str, mask: Tensor, **logps: Tensor) -> None:
    """Refuse -inf and NaN that count, on the CPU: a difference or a weight of 0 would turn them into NaN."""
    for name, x in logps.items():
        if x.device.type != "cpu":
            continue
        counted = x.detach()[mask]
        if not bool(counted.isfinite().all()):
            raise ValueError(
                f"{fn}: expected {name} finite under the mask, got {counted[~counted.isfinite()][0]:.4g}. "
                f"A token that counts must be possible; leave the others out of the mask."
            )
