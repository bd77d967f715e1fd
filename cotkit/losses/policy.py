r"""Policy losses: make sampled tokens likelier by as much as they earned.

Conventions: ``logps [B, T]`` are log-probs in nats of the tokens that were sampled (position t belongs to
``labels[:, t]``), ``old_logps`` those under the policy that sampled them, ``ref_logps`` those of a frozen
reference; ``mask`` is True where the policy wrote the token itself: a hint, a demonstration or what a tool
returned never counts. ``advantages`` come from `losses.advantage`, one per row [B] or per token [B, T], and
are constants, as are all old, reference and value targets. K samples of one prompt are K rows:
``group(rewards).flatten()``.

Functions: `reinforce` without a ratio; `grpo` clipped ratio and KL term, with a value function's advantages
PPO; `clipped_value` the value function's loss; `srft` demonstrations and rollouts in one loss;
`entropy_temperature` the sampling temperature at which the entropy is what it should be. Entropy itself is
`tokens.entropy`, KL estimates are `tokens.kl_k3` and its like.
"""

from math import inf
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cotkit import _check
from cotkit._reduce import total
from cotkit._types import Denom, Logits, Loss, Mask, SeqWeights, TokenLogps, TokenValues, TokenWeights
from cotkit.losses.advantage import _check_tokens, _finite, _wide
from cotkit.tokens import entropy, kl_k3

__all__ = ["clipped_value", "entropy_temperature", "grpo", "reinforce", "srft"]

_MOST = 20.0  # nats of log-ratio: no policy that is 5e8 times off can be corrected for
_HALVINGS = 40


def reinforce(
    logps: TokenLogps,
    advantages: SeqWeights | TokenWeights,
    mask: Mask,
    *,
    per: str = "token",
    denom: Denom = None,
) -> Loss:
    r"""Policy gradient without a ratio: the likelihood of each token, weighted by its advantage.

    $-\frac1N\sum_{b,t} A_{bt}\,\log\pi_\theta(y_{bt})$

    The sum over tokens over the number of rows, ``denom=len(mask)``, is the gradient of the expected reward;
    a mean over tokens weighs long chains less.

    Args:
        logps: log-probs of the sampled tokens, nats, [B, T]; gradient flows.
        advantages: one per row [B] or per token [B, T]; detached. `advantage.aapo` for AAPO, `advantage.bon`
            for best-of-n.
        mask: True = the policy's token, [B, T].
        per: "token": sum over all counted tokens / denom. "sequence": token mean of each row, summed / denom.
        denom: tokens (per="token") or rows (per="sequence") of the whole accumulated batch. None: those of
            this call.

    Returns:
        Scalar; only its gradient means something. 0 with zero gradient when nothing counts.

    Raises:
        ValueError: logits or shifted labels in place of log-probs, shapes that differ, a value that counts
            is not finite, ``denom <= 0``.
        TypeError: ``mask`` is not bool, ``advantages`` are no floats.

    Source: REINFORCE (1992) Williams, Machine Learning 8
        AAPO (2025) arXiv:2505.14264 (advantages from ``aapo``, token mean)
        BoN-aware (2024) arXiv:2412.15287 (weights from ``bon``, ``denom=len(mask)``)
    Basis: authors' code of AAPO: equal to its numbers.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> logps, mask = tensor([[0.0, -1.0, -3.0]]), tensor([[False, True, True]])
        >>> reinforce(logps, tensor([0.5]), mask)  # 0.5 * (1 + 3) / 2
        tensor(1.)
    """
    _check.token_logps("reinforce", mask, logps=logps)
    _finite("reinforce", mask, logps=logps)
    terms = -_constant("reinforce", mask, advantages=advantages) * torch.where(mask, logps, 0.0)
    return total("reinforce", terms, mask, per=per, denom=denom)


def grpo(
    logps: TokenLogps,
    old_logps: TokenLogps,
    advantages: SeqWeights | TokenWeights,
    mask: Mask,
    *,
    ref_logps: TokenLogps | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    weights: SeqWeights | TokenWeights | None = None,
    per: str = "sequence",
    denom: Denom = None,
) -> Loss:
    r"""Clipped surrogate of PPO and GRPO: follow the advantage, but not far from the policy that sampled.

    $$-\frac1N\sum_{b,t} w_{bt}\min\big(\rho_{bt}A_{bt},\ \mathrm{clip}(\rho_{bt},\ 1-\epsilon,\
    1+\epsilon_{high})\,A_{bt}\big) + \frac\beta N\sum_{b,t}\big(e^{d_{bt}} - d_{bt} - 1\big),\qquad
    \rho = \frac{\pi_\theta}{\pi_{old}},\quad d = \log\frac{\pi_{ref}}{\pi_\theta}$$

    One loss, many names:

    - GRPO: advantages from `advantage.group`, ``per="sequence"``; TRL's "grpo". On-policy (R1-VL, one step
      per batch): ``old_logps=logps.detach()``.
    - PPO (ReFT, Crystal): advantages from `advantage.gae`, ``beta=0``, the KL inside `advantage.kl_rewards`,
      plus ``5 * clipped_value(...)`` (5 is ReFT's).
    - DAPO, "bnpo": ``per="token"``, DAPO with ``epsilon_high=0.28``; AceReason leaves cut-off samples out
      with ``mask & ~truncated[:, None]``.
    - Dr. GRPO: ``group(scale=False)``, ``per="token"``, ``denom=rows * longest`` (TRL's "dr_grpo"). ReLIFT's
      code: that with ``epsilon=inf``, ``denom=longest``; its demonstrations of the hardest questions are a
      step of their own, ``nll(...) - 1e-4 * mean entropy``.
    - UFT: ``grpo(..., per="token", beta=0.001) + 0.001 * nll(logps, hint_mask)``, the hint not in ``mask``.
    - RAIF: ``weights=better_than_direct(...).flatten().float()``, plus ``nll`` of expert chains.
    - Difficulty weights (UniVG-R1): ``weights=torch.exp(1 - quality)`` with the mean quality of each prompt's
      samples, repeated for them; also ``(1.05 - quality) ** 2`` and ``-torch.log(0.02 + quality)``.
    - RL4VLM: an environment step as one action, ``logps [B, 1]`` the sum of its action's log-probs and 0.2 to
      0.5 times its thought's (`tokens.seq_logps` with ``weights``), ``epsilon=0.1``.
    - UniGRPO, diffusion: one `tokens.corrupt`, all log-probs on the same noisy ids
      (``token_logps(shift=False)``), ``mask`` the noised tokens of the response.

    Args:
        logps: log-probs of the sampled tokens, nats, [B, T]; gradient flows.
        old_logps: the same under the policy that sampled, with its weights frozen, [B, T]; detached.
        advantages: one per row [B] or per token [B, T]; detached.
        mask: True = the policy's token, [B, T].
        ref_logps: the same under the reference, [B, T]; detached. Needed where ``beta`` > 0.
        beta: price of the KL term (`tokens.kl_k3`), >= 0. DeepSeekMath, R1-VL: 0.04; RAIF, UFT: 0.001. Its
            value is that of KL(policy || ref), its gradient on-policy that of KL(ref || policy).
        epsilon: the ratio may fall to 1 - epsilon; ``math.inf``: no clipping.
        epsilon_high: it may rise to 1 + epsilon_high. None: ``epsilon``.
        weights: factors [B] or [B, T] of the surrogate, never of the KL term nor of the count; detached.
        per: "sequence": token mean of each row, summed / denom. "token": sum over all counted tokens / denom.
        denom: rows (per="sequence") or tokens (per="token") of the whole accumulated batch. None: those of
            this call, rows without a counted token left out.

    Returns:
        Scalar; 0 with zero gradient when nothing counts. A log-ratio counts as 20 nats at most, so that none
        overflows.

    Raises:
        ValueError: logits or shifted labels in place of log-probs, shapes that differ, a value that counts
            is not finite, ``beta`` without ``ref_logps``, a negative ``beta`` or ``epsilon``, ``denom <= 0``.
        TypeError: ``mask`` is not bool, ``advantages`` or ``weights`` are no floats.

    Source: GRPO (2024) arXiv:2402.03300 Eq. 3; PPO (2017) arXiv:1707.06347 Eq. 7
        DAPO (2025) arXiv:2503.14476; Dr. GRPO (2025) arXiv:2503.20783
        ReFT (2024) arXiv:2401.08967; Crystal (2023) arXiv:2310.04921; RL4VLM (2024) arXiv:2405.10292
        StepGRPO (2025) arXiv:2503.12937; UniVG-R1 (2025) arXiv:2505.14231; RAIF (2025) arXiv:2506.01413
        UFT (2025) arXiv:2505.16984; ReLIFT (2025) arXiv:2506.07527; UniGRPO (2025) arXiv:2505.15809
        AceReason-1.1 (2025) arXiv:2506.13284
    Basis: authors' code of ReFT, R1-VL, UniVG-R1, RAIF, UFT, ReLIFT, RL4VLM, UniGRPO's successor and TRL 1.16
        ("grpo", "bnpo", "dapo", "dr_grpo"): equal to their numbers; the equation numbers from memory.
    Differs: TRL's "grpo" counts rows without a token (``denom=B`` here). RAIF sets the ratio of a dropped
        sample to 1: the value differs by the mean of their advantages, the gradient by nothing. RL4VLM falls
        back to the clipped branch alone when any ratio of the batch exceeds 10. UniGRPO's code sums its KL
        term, against the sampling policy, over tokens. The bound of 20 nats is ours.

    Example:
        >>> from torch import tensor
        >>> old, new = tensor([[0.0, -2.0, -1.0]]), tensor([[0.0, -1.0, -2.0]])
        >>> grpo(new, old, tensor([1.0]), tensor([[False, True, True]]))  # (1.2 + exp(-1)) / 2
        tensor(-0.7839)
    """
    _check.token_logps("grpo", mask, logps=logps, old_logps=old_logps)
    _check.at_least("grpo", 0, beta=beta)
    _check_epsilon("grpo", epsilon=epsilon, epsilon_high=epsilon if epsilon_high is None else epsilon_high)
    _finite("grpo", mask, logps=logps, old_logps=old_logps)
    a = _constant("grpo", mask, advantages=advantages)
    ratio = torch.where(mask, logps - old_logps.detach(), 0.0).clamp(max=_MOST).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    terms = -torch.min(ratio * a, clipped * a)
    if weights is not None:
        terms = terms * _constant("grpo", mask, weights=weights)
    if beta:
        if ref_logps is None:
            raise ValueError(f"grpo: expected ref_logps with beta {beta}, got None. Score the reference.")
        _check.token_logps("grpo", mask, ref_logps=ref_logps)
        _finite("grpo", mask, ref_logps=ref_logps)
        terms = terms + beta * kl_k3(torch.where(mask, logps, 0.0), torch.where(mask, ref_logps, 0.0))
    return total("grpo", terms, mask, per=per, denom=denom)


def clipped_value(
    values: TokenValues,
    old_values: TokenValues,
    returns: TokenValues,
    mask: Mask,
    *,
    epsilon: float = 0.2,
    per: str = "sequence",
    denom: Denom = None,
) -> Loss:
    r"""Squared error of the value function, whichever is worse: as it is, or held near its old value.

    $\tfrac12\max\big((V - R)^2,\ (\mathrm{clip}(V,\ V_{old} - \epsilon,\ V_{old} + \epsilon) - R)^2\big)$

    Args:
        values: V of the trained value function, [B, T]; gradient flows.
        old_values: V when the batch was sampled, [B, T]; detached.
        returns: targets, ``gae(rewards, old_values, mask) + old_values``, [B, T]; detached.
        mask: True = the policy's token, [B, T].
        epsilon: how far V may move, in units of reward; ``math.inf``: anywhere, the plain squared error.
            RL4VLM: 0.1.
        per: "sequence" (ReFT): token mean of each row, summed / denom. "token" (Crystal).
        denom: rows or tokens of the whole accumulated batch. None: those of this call.

    Returns:
        Scalar, reward squared; 0 with zero gradient when nothing counts.

    Raises:
        ValueError: shapes differ, a value that counts is not finite, ``epsilon < 0``, ``denom <= 0``.
        TypeError: a tensor is no float tensor, ``mask`` is not bool.

    Source: ReFT (2024) arXiv:2401.08967; Crystal (2023) arXiv:2310.04921; RL4VLM (2024) arXiv:2405.10292
    Basis: authors' code of ReFT, RL4VLM and verl: equal to their numbers.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> x, mask = tensor([[0.0, 1.0]]), tensor([[False, True]])
        >>> clipped_value(x, 0 * x, 2 * x, mask)  # (0.2 - 2)^2 / 2, worse than (1 - 2)^2 / 2
        tensor(1.6200)
    """
    _check_tokens("clipped_value", mask, values=values, old_values=old_values, returns=returns)
    _check_epsilon("clipped_value", epsilon=epsilon)
    v = torch.where(mask, values, 0.0)
    old, target = (torch.where(mask, x.detach(), 0.0) for x in (old_values, returns))
    near = old + (v - old).clamp(-epsilon, epsilon)
    terms = torch.max((v - target).square(), (near - target).square()) / 2
    return total("clipped_value", terms, mask, per=per, denom=denom)


def srft(
    demo_logps: TokenLogps,
    demo_mask: Mask,
    demo_advantages: SeqWeights,
    roll_logps: Float[Tensor, "N S"],
    roll_mask: Bool[Tensor, "N S"],
    correct: Bool[Tensor, "N"],
    demo_entropy: TokenValues | SeqWeights | Float[Tensor, ""] | float,
    roll_entropy: Float[Tensor, "N S"] | Float[Tensor, "N"] | Float[Tensor, ""] | float,
    *,
    w_sft: float = 0.5,
    w_rl: float = 0.1,
    per: str = "token",
    denom: tuple[Denom, Denom, Denom] = (None, None, None),
) -> Loss:
    r"""Fine-tuning and reinforcement in one loss (SRFT), the entropy deciding how much of each.

    $$w_{sft}e^{-H_d}\,E_{demo}[-\log\pi] - E_{demo}[A\,\pi] +
    w_{rl}e^{H_r}\,E_{right}[-\log\pi] + E_{wrong}[\log\pi]$$

    An unsure policy imitates less and learns more from its own right answers. The second term treats the
    demonstrations as samples of a policy with probability 1, so its ratio is $\pi$ itself, unclipped: the
    gradient is that of fine-tuning times $A\,\pi$. No KL term, no old policy.

    Args:
        demo_logps: log-probs of demonstrations, nats, [B, T]; gradient flows.
        demo_mask: True = response token, [B, T].
        demo_advantages: of each demonstration within its prompt's samples and demonstrations, [B]:
            ``group(torch.cat([r, r_demo], 1))[:, K:].flatten()``; detached.
        roll_logps: log-probs of the policy's own samples, nats, [N, S]; gradient flows.
        roll_mask: True = the policy's token, [N, S].
        correct: True = right answer, [N].
        demo_entropy: the policy's entropy on the demonstrations (`tokens.entropy`), nats: one number, one per
            row [B] or per token [B, T], shifted as ``demo_logps`` are; detached.
        roll_entropy: the same on its samples: a number, [N] or [N, S].
        w_sft: weight of imitation at entropy 0, >= 0.
        w_rl: weight of right samples at entropy 0, >= 0; that of wrong ones is 1.
        per: "token": each mean over its own tokens. "sequence": token mean of each row, then mean over rows.
        denom: what demonstrations, right and wrong samples are divided by: tokens or rows of the whole
            accumulated batch. None: those of this call.

    Returns:
        Scalar; a side without rows (no demonstration, none right, none wrong) adds 0 with zero gradient.

    Raises:
        ValueError: logits or shifted labels in place of log-probs, shapes that differ, a value that counts
            is not finite, a negative weight, ``denom`` not three counts > 0.
        TypeError: a mask or ``correct`` is not bool, ``demo_advantages`` are no floats.

    Source: SRFT (2025) arXiv:2506.19767
    Basis: second-hand: the four terms from public notes that quote the equations; how each expectation is
        averaged over tokens is our reading.
    Differs: by those notes the released code has exp(+H) on the imitation side, and puts p / (p + 0.1) in
        place of p in the second term. The paper derives the last two terms with rewards 1 and -1, which
        divides both by all samples; here each is a mean of its own.

    Example:
        >>> from torch import tensor
        >>> x, m = tensor([[0.0, -1.0]]), tensor([[False, True]])
        >>> srft(x, m, tensor([2.0]), x, m, tensor([True]), 0.0, 0.0)  # 0.5 - 2 exp(-1) + 0.1
        tensor(-0.1358)
    """
    _check.token_logps("srft", demo_mask, demo_logps=demo_logps)
    _check.token_logps("srft", roll_mask, roll_logps=roll_logps)
    _check.boolean("srft", correct=correct)
    _check.at_least("srft", 0, w_sft=w_sft, w_rl=w_rl)
    if correct.shape != roll_mask.shape[:1]:
        raise ValueError(
            f"srft: expected correct [N] with N {roll_mask.shape[0]}, got {list(correct.shape)}. One per row."
        )
    if not isinstance(denom, tuple) or len(denom) != 3:
        raise ValueError(
            f"srft: expected denom as (demonstrations, right, wrong), got {denom!r}. A count or None each."
        )
    _finite("srft", demo_mask, demo_logps=demo_logps)
    _finite("srft", roll_mask, roll_logps=roll_logps)
    a = _constant("srft", demo_mask, demo_advantages=demo_advantages)
    demo, roll = torch.where(demo_mask, demo_logps, 0.0), torch.where(roll_mask, roll_logps, 0.0)
    imitate = w_sft * torch.exp(-_entropy("demo_entropy", demo_entropy, demo_mask, demo))
    exploit = w_rl * torch.exp(_entropy("roll_entropy", roll_entropy, roll_mask, roll))
    right, wrong = roll_mask & correct[:, None], roll_mask & ~correct[:, None]
    return (
        total("srft", -imitate * demo - a * demo.exp(), demo_mask, per=per, denom=denom[0])
        + total("srft", -exploit * roll, right, per=per, denom=denom[1])
        + total("srft", roll, wrong, per=per, denom=denom[2])
    )


def entropy_temperature(
    logits: Logits, mask: Mask, *, target: float = 0.3, low: float = 0.1, high: float = 2.0
) -> Float[Tensor, ""]:
    r"""Sampling temperature at which the mean entropy of the next token is ``target`` (AceReason's rule).

    $T:\quad \frac1N\sum_{b,t} H\big(\mathrm{softmax}(z_{bt} / T)\big) = \text{target}$

    Colder, samples are too alike to learn from; hotter, rewards are low at first and training collapses
    later. The entropy at a given temperature is ``tokens.entropy(logits, temperature=T)``.

    Args:
        logits: of the policy on its own samples, unshifted, as the model returns them, [B, T, V]; detached.
            -inf = impossible.
        mask: True = a token that the policy wrote, [B, T]; read is the distribution one position before, as
            in `distill.kl`.
        target: nats per token, > 0.
        low: lowest temperature, > 0.
        high: highest temperature, > ``low``.

    Returns:
        Temperature, 0-d, found by bisection; ``low`` or ``high`` where the target is out of reach, and
        ``high`` when nothing counts.

    Raises:
        ValueError: shapes differ, logits that count are NaN or all impossible, numbers out of order.
        TypeError: ``mask`` is not bool, ``logits`` are no floats.

    Source: AceReason-1.1 (2025) arXiv:2506.13284
    Basis: second-hand: the paper shows trajectories and the value 0.3, no formula; that mean entropy over
        response tokens is meant is our reading, and so is finding T from logits in place of by trial. No
        code was released.
    Differs: the paper keeps one temperature for a run; the ends 0.1 and 2 are ours.

    Example:
        >>> logits, mask = torch.tensor([[[1.648, 0.0], [9.0, 9.0]]]), torch.tensor([[False, True]])
        >>> entropy_temperature(logits, mask, target=0.5623).round(decimals=2)  # 1.648 is 1.5 log 3: 3/4, 1/4
        tensor(1.5000)
    """
    _check.floating("entropy_temperature", logits=logits)
    _check.ndim("entropy_temperature", "B T V", logits=logits)
    _check.boolean("entropy_temperature", mask=mask)
    if mask.shape != logits.shape[:2]:
        raise ValueError(
            f"entropy_temperature: expected mask [B, T] with the B and T of logits, got {list(mask.shape)} "
            f"and {list(logits.shape)}. Both unshifted, of equal length."
        )
    _check.positive("entropy_temperature", target=target, low=low, high=high)
    if not low < high:
        raise ValueError(f"entropy_temperature: expected low < high, got {low} and {high}.")
    counted, rows = mask[:, 1:], _wide(logits.detach()[:, :-1])
    _finite("entropy_temperature", counted, logits=rows.logsumexp(-1))
    cold, hot = rows.new_tensor(low), rows.new_tensor(high)
    for _ in range(_HALVINGS):
        middle = (cold + hot) / 2
        # Where nothing counts the mean is NaN, which is never above the target.
        flat = torch.where(counted, entropy(rows / middle), 0.0).sum() / counted.sum() > target
        cold, hot = torch.where(flat, cold, middle), torch.where(flat, middle, hot)
    return ((cold + hot) / 2).to(logits.dtype)


def _constant(fn: str, mask: Tensor, **one: Tensor) -> Tensor:
    """One number per row [B] or token [B, T], without gradient; 0 where nothing counts."""
    ((name, x),) = one.items()
    _check.floating(fn, **one)
    wide = x.detach()[:, None].expand_as(mask) if x.shape == mask.shape[:1] else x.detach()
    _check.same_shape(fn, mask=mask, **{name: wide})
    _finite(fn, mask, **{name: wide})
    return torch.where(mask, wide, 0.0)


def _entropy(name: str, value: Any, mask: Tensor, like: Tensor) -> Tensor:
    """Check an entropy, a number or one per row or token; it comes back [B, T]."""
    x = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return _constant("srft", mask, **{name: x.expand(mask.shape) if x.dim() == 0 else x})


def _check_epsilon(fn: str, **numbers: Any) -> None:
    """Raise unless every clip range is 0 or more; infinity, which is no clipping, is one."""
    for name, value in numbers.items():
        if value != inf:
            _check.at_least(fn, 0, **{name: value})
