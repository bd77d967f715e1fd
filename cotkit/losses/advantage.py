r"""Advantages: how much better than expected a sample, a step or a token was.

Conventions: ``rewards [B, K]`` are one number for each of K samples of each of B prompts; a reward that is
NaN (a reward function's None) or not ``valid`` leaves the statistics of the others alone and gets 0. What
belongs to tokens is [B, T] with ``mask``; masked positions are stepped over, as if they were not there, and
get 0. Everything is returned without gradient; `losses.policy` takes one advantage per row, ``group(...)``
flattened, or one per token. What whitens or compares needs the whole batch or group: compute it before the
batch is split.

Functions, one number per sample: `group` GRPO's z-score (Dr. GRPO, leave-one-out); `aapo` with a margin over
the reference model; `bon` for best-of-n; `better_than_direct` which samples to keep (RAIF). One per token:
`discounted` returns; `gae` with a value function; `kl_rewards` a score and the KL penalty on tokens; `whiten`
mean 0, variance 1; `spread` one number per step or turn to its tokens.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cotkit import _check
from cotkit._types import Mask, Scores, SeqWeights, TokenLogps, TokenValues, Valid

__all__ = [
    "aapo",
    "better_than_direct",
    "bon",
    "discounted",
    "gae",
    "group",
    "kl_rewards",
    "spread",
    "whiten",
]


def group(
    rewards: Scores,
    valid: Valid | None = None,
    *,
    scale: bool = True,
    unbiased: bool = True,
    eps: float = 1e-4,
) -> Scores:
    r"""Group-relative advantage of GRPO: the reward in standard deviations above its prompt's mean.

    $A_k = \frac{r_k - \bar r}{\mathrm{std}(r) + \epsilon}$

    Compositions. Leave-one-out (RLOO), $r_k$ minus the mean of the others, is ``group(r, scale=False)`` times
    $K/(K-1)$. Demonstrations in the group (SRFT): ``group(torch.cat([r, r_demo], 1))``, cut apart again.
    Rewards of K samples at S turns [B, K, S], each turn against the same turn of the others (Chain-of-Edits):
    ``group(r.movedim(2, 1).flatten(0, 1))``, put back and handed to `spread`. Prompts that teach (dynamic
    sampling): ``rewards.std(1) > 0``; the hardest ones (ReLIFT): ``(rewards <= 0).all(1)``.

    Args:
        rewards: one per sample, [B, K]; NaN = not scorable.
        valid: True = a real sample, [B, K]; None: all are.
        scale: divide by the standard deviation. False: Dr. GRPO.
        unbiased: standard deviation over K - 1 (torch and TRL), else over K.
        eps: added to the standard deviation, >= 0. TRL: 1e-4; others 1e-8, 1e-9 (RAIF), 1e-6 (verl).

    Returns:
        Advantages [B, K]; exactly 0 for a group of one and where all rewards are equal.

    Raises:
        ValueError: shapes differ, an infinite reward, ``eps < 0``.
        TypeError: ``rewards`` are no floats, ``valid`` is not bool.

    Source: GRPO (2024) arXiv:2402.03300 §4.1
        Dr. GRPO (2025) arXiv:2503.20783 (``scale=False``)
        RLOO (2024) arXiv:2402.14740 (leave-one-out)
        ReLIFT (2025) arXiv:2506.07527, Chain-of-Edits (2025) arXiv:2507.05065, SRFT (2025) arXiv:2506.19767
    Basis: authors' code of R1-VL, AAPO and TRL 1.16: equal to their numbers.
    Differs: equal rewards give 0 exactly; elsewhere the rounding of their mean is divided by the rounding of
        their standard deviation, which is not small when ``eps`` is.

    Example:
        >>> group(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), eps=0)  # 0.5 / sqrt(4 * 0.25 / 3)
        tensor([[ 0.8660, -0.8660, -0.8660,  0.8660]])
    """
    kept = _scorable("group", rewards, valid)
    _check.at_least("group", 0, eps=eps)
    if rewards.numel() == 0:
        return torch.zeros_like(rewards)
    r = _wide(torch.where(kept, rewards.detach(), 0.0))
    n = kept.sum(1, keepdim=True)
    centered = torch.where(kept, r - r.sum(1, keepdim=True) / n, 0.0)
    if scale:
        squares = centered.square().sum(1, keepdim=True)
        centered = centered / ((squares / (n - int(unbiased))).sqrt() + eps)
    highest = torch.where(kept, r, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(kept, r, torch.inf).amin(1, keepdim=True)
    return torch.where(highest > lowest, centered, 0.0).to(rewards.dtype)  # NaN of a lone sample included


def aapo(rewards: Scores, ref_rewards: Scores, *, low: float = -0.2, high: float = 0.28) -> Scores:
    r"""Advantage with momentum (AAPO): group-relative, plus the clipped margin over a reference sample.

    $A_k = \frac{r_k - \bar r}{\mathrm{std}(r) + 10^{-4}} + \mathrm{clip}(r_k - r^{ref}_k,\ low,\ high)$

    Where all samples of a prompt are right the first part is 0; the second still rewards being better than
    the reference was. The method's loss has no ratio, no clip and no KL: ``reinforce(logps, aapo(r,
    r_ref).flatten(), mask)``.

    Args:
        rewards: of K samples of the policy, [B, K]; NaN = not scorable.
        ref_rewards: of K samples of the frozen reference model for the same prompts, paired as they come,
            [B, K]; NaN: no margin for that pair.
        low: lowest margin, <= 0. Authors' code: -0.2.
        high: highest margin, >= 0. Authors' code: 0.28.

    Returns:
        Advantages [B, K].

    Raises:
        ValueError: shapes differ, an infinite reward, ``low > 0`` or ``high < 0``.
        TypeError: rewards are no floats.

    Source: AAPO (2025) arXiv:2505.14264
    Basis: authors' code: equal to its numbers.
    Differs: the released 1.5B trainer scores the prompt in place of the reference's completion, so its margin
        is taken to a constant; the other trainer, and this function, do what the paper says. A "momentum" it
        is not: the reference is fixed.

    Example:
        >>> aapo(torch.ones(1, 3), torch.tensor([[0.0, 1.0, 0.9]]))  # all right: only the margin is left
        tensor([[0.2800, 0.0000, 0.1000]])
    """
    _check.same_shape("aapo", rewards=rewards, ref_rewards=ref_rewards)
    _check.at_least("aapo", 0, high=high)
    _check.finite("aapo", low=low)
    if low > 0:
        raise ValueError(f"aapo: expected low <= 0, got {low}. It bounds the margin from below.")
    both = _scorable("aapo", rewards, None) & _scorable("aapo", ref_rewards, None)
    margin = torch.where(both, rewards.detach() - ref_rewards.detach(), 0.0)
    return group(rewards) + margin.clamp(low, high)


def bon(
    rewards: Scores,
    n: int,
    valid: Valid | None = None,
    *,
    p_fail: SeqWeights | None = None,
    samples_from: str = "policy",
    positive_only: bool = True,
    unbiased: bool = False,
    clip: float | None = None,
) -> Scores:
    r"""Weights that make a policy gradient climb pass@n, the chance that the best of n samples is right.

    With p the chance that one sample of the policy fails, $\nabla(1 - p^n) = n\,p^{n-1}(1-p)\,
    E_{y\sim\pi|R=1}[\nabla\log\pi(y)]$. Weights of right / wrong samples whose expectation is this gradient:

    - of the policy, ``positive_only``: $n\,p^{n-1}$ / 0; else with the mean as baseline, less noisy,
      $n\,p^{n-1}(R - (1-p))$;
    - of best-of-n, ``positive_only``: $\frac{n\,p^{n-1}(1-p)}{1-p^n}$ / 0; else $\frac{n\,p^{n-1}}{1-p^n}$ /
      $+\frac{n\,p}{1-p}$.

    Hard prompts weigh more than easy ones, which keeps the policy from collapsing on one way to answer. It
    is a gradient of *sequence* log-probs: ``reinforce(logps, bon(r, n).flatten(), mask, denom=len(mask))``.

    Args:
        rewards: 1 right, 0 wrong, [B, K]; NaN = not scorable. Judge other rewards first:
            ``(r > 0.5).float()``.
        n: samples at inference, >= 1; 1 is plain REINFORCE. The paper: 32 for mathematics, 16 for code.
        valid: True = a real sample, [B, K]; None: all are.
        p_fail: p where it is known or remembered from earlier steps, in [0, 1], [B]. None: estimated for each
            sample from the others of its group, so that no sample sets its own weight; where these come from
            best-of-n, the n-th root of their failure rate. A lone sample has no others: p = 0.
        samples_from: "policy", or "bon": each of the K is the verifier's choice among n draws of its own.
        positive_only: wrong samples get 0. False: see above.
        unbiased: in place of the estimate to the power n - 1, its unbiased estimator $\binom{f}{n-1} /
            \binom{K-1}{n-1}$ with f failures among the others: the expected gradient is exact, and noisier.
            Only for samples of the policy, n <= K and no ``p_fail``; 0 where fewer than n are scorable.
        clip: largest absolute weight. None: no limit.

    Returns:
        Weights [B, K], to be used as advantages; not centred. Finite everywhere: where 1 - p divides, it
        counts as 1/K at least.

    Raises:
        ValueError: a reward other than 0 and 1, ``p_fail`` outside [0, 1], ``n < 1``, ``clip <= 0``, unknown
            ``samples_from``, shapes that differ, ``unbiased`` where it cannot be.
        TypeError: ``rewards`` are no floats, ``n`` is no int.

    Source: BoN-aware (2024) arXiv:2412.15287 BoN-RLB, BoN-RLBP
    Basis: second-hand for the weights under best-of-n; those for samples of the policy derived here. All
        four checked against finite differences of $1 - p^n$ and in exact expectation.
    Differs: the weight of wrong best-of-n samples has a plus sign; with the minus of some implementations the
        step points the same way but is (1 + p) / (1 - p) times too long.

    Example:
        >>> bon(torch.tensor([[1.0, 0.0, 0.0]]), 3)  # both others failed: 3 * 1^2
        tensor([[3., 0., 0.]])
    """
    kept = _scorable("bon", rewards, valid)
    _check.integers("bon", n=n)
    _check.at_least("bon", 1, n=n)
    _check.one_of("bon", ("policy", "bon"), samples_from=samples_from)
    if clip is not None:
        _check.positive("bon", clip=clip)
    right = _wide(torch.where(kept, rewards.detach(), 0.0))
    if rewards.device.type == "cpu" and bool(((right != 0) & (right != 1)).any()):
        raise ValueError(
            "bon: expected rewards 1 (right) or 0 (wrong), got others. Judge them first: (r > 0.5).float()."
        )
    wrong = kept * (1 - right)
    others = (kept.sum(1, keepdim=True) - 1).clamp(min=1)
    failed = wrong.sum(1, keepdim=True) - wrong
    if p_fail is None:
        p = failed / others
        p = p ** (1 / n) if samples_from == "bon" else p
    else:
        _check_p_fail(p_fail, rewards)
        p = _wide(p_fail.detach())[:, None].expand_as(right)
    power = p ** (n - 1)
    if unbiased:
        if samples_from != "policy" or p_fail is not None or n > rewards.shape[1]:
            raise ValueError(
                f"bon: expected samples of the policy, no p_fail and n <= K with unbiased=True, got n {n}, "
                f"K {rewards.shape[1]}, samples_from {samples_from!r}. Leave unbiased out."
            )
        drawn = torch.arange(n - 1, device=rewards.device)
        chances = (failed[..., None] - drawn) / (others[..., None] - drawn).clamp(min=1)
        power = chances.prod(-1)
    if samples_from == "policy":
        weights = n * power * (right if positive_only else right - (1 - p) * kept)
    else:
        gain = n * power / sum(p**i for i in range(n))  # the sum is (1 - p^n) / (1 - p)
        success = (1 - p).clamp(min=1 / max(1, rewards.shape[1]))
        weights = gain * right if positive_only else (gain * right + n * p * wrong) / success
    return (weights if clip is None else weights.clamp(-clip, clip)).to(rewards.dtype)


def better_than_direct(
    thought: Scores, direct: Float[Tensor, "B M"], format_ok: Valid | None = None, *, group: bool = False
) -> Valid:
    r"""Which chains of thought earn their place: those not beaten by an answer without thought (RAIF).

    A sample is kept if its score reaches the best direct answer to its prompt. ``group=True`` asks whether
    thinking lost the prompt as a whole: all samples are dropped iff the best of them scores below the worst
    direct answer and they do not all score alike. Combine both with ``&``.

    What is dropped must leave the policy alone, but stays in the mean: ``grpo(..., weights=keep.flatten()
    .float())``, whose KL term, as in the method, still holds dropped samples near the reference. The method
    adds ``nll`` of expert chains with weight 1.

    Args:
        thought: scores of K samples with a thought, [B, K]. The authors compare plain numbers of constraints
            met per sample, rewards per group.
        direct: scores of M answers to the same prompts without thought, [B, M]; M = 0 keeps everything.
        format_ok: False = the format is broken, [B, K]; such a sample is kept, so that it is punished. None:
            all follow it.
        group: the test of the group in place of the sample's.

    Returns:
        True = keep, bool [B, K].

    Raises:
        ValueError: shapes differ, a score that is not finite.
        TypeError: scores are no floats, ``format_ok`` is not bool.

    Source: RAIF (2025) arXiv:2506.01413 superior-CoT filter
    Basis: authors' code: the group test equal to its replay buffer's; the paper's strict inequality per
        sample from memory.
    Differs: per sample >= as in the code. The code has one direct score per sample test (several here: the
        best), and its group test drops samples of broken format with the rest: leave ``format_ok`` out.

    Example:
        >>> score, direct = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0]])
        >>> better_than_direct(score, direct), better_than_direct(score, direct, group=True)
        (tensor([[ True, False]]), tensor([[True, True]]))
    """
    _check.floating("better_than_direct", thought=thought, direct=direct)
    _check.ndim("better_than_direct", "B K", thought=thought)
    _check.ndim("better_than_direct", "B M", direct=direct)
    if thought.shape[0] != direct.shape[0]:
        raise ValueError(
            f"better_than_direct: expected thought [B, K] and direct [B, M] of one B, got "
            f"{list(thought.shape)} and {list(direct.shape)}. Pass one row of each per prompt."
        )
    _finite("better_than_direct", None, thought=thought, direct=direct)
    if format_ok is not None:
        _check.boolean("better_than_direct", format_ok=format_ok)
        _check.same_shape("better_than_direct", thought=thought, format_ok=format_ok)
    if thought.numel() == 0 or direct.numel() == 0:
        return torch.ones_like(thought, dtype=torch.bool)
    if group:
        best, worst = thought.amax(1, keepdim=True), thought.amin(1, keepdim=True)
        keep = ~((best < direct.amin(1, keepdim=True)) & (best != worst)).expand_as(thought)
    else:
        keep = thought >= direct.amax(1, keepdim=True)
    return keep if format_ok is None else keep | ~format_ok


def discounted(rewards: TokenValues, mask: Mask, *, gamma: float = 1.0) -> TokenValues:
    r"""Return of every token: its reward and, discounted, all that follow.

    $G_t = r_t + \gamma\,G_{t+1}$

    Rewards that should reach back differently far get a discount each (Demystifying long CoT: correctness 1,
    the penalty of a repetition 0.99), with the values as baseline:
    ``discounted(right, mask) + discounted(repeated, mask, gamma=0.99) - values``.

    Args:
        rewards: one per token, [B, T].
        mask: True = the policy's token, [B, T]; others are stepped over and cost no discount.
        gamma: discount in [0, 1].

    Returns:
        Returns without gradient, [B, T]; 0 where nothing counts.

    Raises:
        ValueError: shapes differ, a reward that counts is not finite, ``gamma`` outside [0, 1].
        TypeError: ``rewards`` are no floats, ``mask`` is not bool.

    Source: Demystifying long CoT (2025) arXiv:2502.03373 multi-gamma returns
        ReFT (2024) arXiv:2401.08967 (``gae`` with no value function and lambda 1)
    Basis: authors' code: equal to its numbers for two discounts.
    Differs: nothing.

    Example:
        >>> rewards, mask = torch.tensor([[0.0, -1.0, 2.0]]), torch.tensor([[True, True, True]])
        >>> discounted(rewards, mask, gamma=0.5)  # 2; -1 + 1; 0 + 0
        tensor([[0., 0., 2.]])
    """
    _check_tokens("discounted", mask, rewards=rewards)
    _check.between("discounted", 0, 1, gamma=gamma)
    return _lambda_return(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def gae(
    rewards: TokenValues, values: TokenValues, mask: Mask, *, gamma: float = 1.0, lam: float = 0.95
) -> TokenValues:
    r"""Generalised advantage estimation: what came after a token against what the value function expected.

    $\delta_t = r_t + \gamma V_{t+1} - V_t,\qquad A_t = \delta_t + \gamma\lambda\,A_{t+1}$

    ``lam=1`` is the return minus the value, ``lam=0`` the one-step error. The value function's targets are
    ``gae(...) + values``; `whiten` the advantages, not the targets. PPO of ReFT and Crystal: `kl_rewards`,
    then this, then ``policy.grpo(beta=0)`` and ``policy.clipped_value``.

    Args:
        rewards: one per token, [B, T].
        values: V before the token is written, [B, T], at the position of the token, as ``logps`` are; a value
            head read at position t - 1 speaks of token t.
        mask: True = the policy's token, [B, T]; others are stepped over, so V_{t+1} is that of the next token
            which counts.
        gamma: discount in [0, 1]. ReFT: 1.
        lam: lambda in [0, 1]. ReFT: 0.95.

    Returns:
        Advantages without gradient, [B, T]; 0 where nothing counts. Behind the last token V is 0: a cut-off
        chain is treated as one that ended.

    Raises:
        ValueError: shapes differ, something that counts is not finite, ``gamma`` or ``lam`` outside [0, 1].
        TypeError: ``rewards`` or ``values`` are no floats, ``mask`` is not bool.

    Source: GAE (2015) arXiv:1506.02438 Eq. 16
        ReFT (2024) arXiv:2401.08967; Crystal (2023) arXiv:2310.04921; RL4VLM (2024) arXiv:2405.10292
    Basis: authors' code: equal to the numbers of ReFT and Crystal.
    Differs: nothing.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> gae(rewards, values, torch.tensor([[True, True]]), lam=0.5)  # 0.75; -0.25 + 0.5 * 0.75
        tensor([[0.1250, 0.7500]])
    """
    _check_tokens("gae", mask, rewards=rewards, values=values)
    _check.between("gae", 0, 1, gamma=gamma, lam=lam)
    return _lambda_return(rewards, values, mask, gamma, lam)


def kl_rewards(
    score: SeqWeights, logps: TokenLogps, ref_logps: TokenLogps, mask: Mask, *, beta: float
) -> TokenValues:
    r"""Rewards per token of PPO: the chain's score on its last token, a KL penalty on every one.

    $r_t = s\,[t = T] - \beta\,(\log\pi_{old}(y_t) - \log\pi_{ref}(y_t))$

    Args:
        score: reward of each chain, [B].
        logps: under the policy that sampled, nats, [B, T].
        ref_logps: under the reference, usually the model after SFT, nats, [B, T].
        mask: True = the policy's token, [B, T].
        beta: price of a nat, >= 0. ReFT: 0.05 for chains in language, 0.01 for programs; Crystal: 0.2.

    Returns:
        Rewards without gradient, [B, T]; their sum over a row estimates s - beta * KL(policy || ref). 0 where
        nothing counts; a row without a counted token loses its score.

    Raises:
        ValueError: shapes differ, logits in place of log-probs, a value that counts is not finite, ``beta <
            0``.
        TypeError: ``mask`` is not bool, ``score`` is no float tensor.

    Source: ReFT (2024) arXiv:2401.08967; Crystal (2023) arXiv:2310.04921
    Basis: authors' code: equal to the numbers of both.
    Differs: nothing.

    Example:
        >>> logps, ref = torch.tensor([[0.0, -1.0, -2.0]]), torch.tensor([[0.0, -1.5, -1.0]])
        >>> mask = torch.tensor([[False, True, True]])
        >>> kl_rewards(torch.tensor([1.0]), logps, ref, mask, beta=0.1)  # -0.1 * 0.5; 1 + 0.1 * 1
        tensor([[ 0.0000, -0.0500,  1.1000]])
    """
    _check.token_logps("kl_rewards", mask, logps=logps, ref_logps=ref_logps)
    _check.floating("kl_rewards", score=score)
    if score.shape != mask.shape[:1]:
        raise ValueError(
            f"kl_rewards: expected score [B] with B {mask.shape[0]}, got {list(score.shape)}. "
            f"Flatten rewards [B, K] as the rows are."
        )
    _check.at_least("kl_rewards", 0, beta=beta)
    _finite("kl_rewards", mask, logps=logps, ref_logps=ref_logps)
    _finite("kl_rewards", mask.any(1), score=score)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    penalty = beta * (logps.detach() - ref_logps.detach())
    rewards = torch.where(last, score.detach()[:, None], 0.0) - torch.where(mask, penalty, 0.0)
    return rewards.to(logps.dtype)


def whiten(x: TokenValues, mask: Mask, *, center: bool = True, eps: float = 1e-8) -> TokenValues:
    r"""Scale to variance 1 over all counted tokens, and to mean 0.

    $\frac{x - \bar x}{\sqrt{\mathrm{var}(x) + \epsilon}}$, plus $\bar x$ again without ``center``

    Args:
        x: advantages, or rewards, [B, T] (one column for one number per row).
        mask: True = counts, [B, T].
        center: take the mean away, as for advantages. False keeps it (Crystal's rewards).
        eps: added to the variance, > 0.

    Returns:
        Whitened values without gradient, [B, T]; 0 where nothing counts, and for a single counted token.

    Raises:
        ValueError: shapes differ, a value that counts is not finite, ``eps <= 0``.
        TypeError: ``x`` is no float tensor, ``mask`` is not bool.

    Source: ReFT (2024) arXiv:2401.08967; RL4VLM (2024) arXiv:2405.10292
        Crystal (2023) arXiv:2310.04921 (rewards with ``center=False``)
    Basis: authors' code: equal to the numbers of ReFT's, with the variance over N - 1.
    Differs: RL4VLM divides by std + 1e-5. Crystal's code puts the standard deviation where the variance
        belongs, so it divides by the root of it.

    Example:
        >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))  # +-1 / sqrt(2)
        tensor([[-0.7071,  0.7071,  0.0000]])
    """
    _check_tokens("whiten", mask, x=x)
    _check.positive("whiten", eps=eps)
    kept = _wide(torch.where(mask, x.detach(), 0.0))
    n = mask.sum()
    mean = kept.sum() / n
    centered = torch.where(mask, kept - mean, 0.0)
    scaled = centered * (centered.square().sum() / (n - 1).clamp(min=1) + eps).rsqrt()
    return torch.where(mask, scaled if center else scaled + mean, 0.0).to(x.dtype)


def spread(values: Float[Tensor, "B S"], index: Int[Tensor, "B T"]) -> TokenValues:
    r"""One number per step or turn, given to each of its tokens.

    Turns credit for steps, turns or sentences into the advantages [B, T] that `losses.policy` and TRL's
    ``GRPOTrainer`` take. Step rewards [B, K, S] of K samples, each step against the same step of the others,
    with what it leads to:

    >>> r = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])  # one prompt, two samples, two steps
    >>> z = group(r.movedim(2, 1).flatten(0, 1)).unflatten(0, (1, 2)).movedim(1, 2).flatten(0, 1)
    >>> to_go = discounted(z, torch.ones_like(z).bool())
    >>> spread(to_go, torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, -1]]))
    tensor([[ 0.0000,  0.7070,  0.7070,  0.0000],
            [ 0.0000, -0.7070,  0.0000,  0.0000]])

    (R1-VL itself adds its step rewards up to one number per chain: `group` alone.)

    Args:
        values: one per step, [B, S].
        index: number of the step or turn each token belongs to, from 0; negative: none, [B, T]. ``steps`` and
            ``turns`` of `tokens.encode` are such.

    Returns:
        Values without gradient, [B, T]; 0 where the index is negative.

    Raises:
        ValueError: B differs, an index of S or more, a value in use that is not finite.
        TypeError: ``values`` are no floats, ``index`` is no integer tensor.

    Source: Chain-of-Edits (2025) arXiv:2507.05065; StepGRPO (2025) arXiv:2503.12937
    Basis: second-hand: whether Chain-of-Edits credits a turn with later ones is not said; here it is the
        caller's ``discounted``.
    Differs: nothing.

    Example:
        >>> spread(torch.tensor([[0.5, -2.0]]), torch.tensor([[-1, 0, 0, 1]]))
        tensor([[ 0.0000,  0.5000,  0.5000, -2.0000]])
    """
    _check.floating("spread", values=values)
    _check.integer("spread", index=index)
    _check.ndim("spread", "B S", values=values)
    _check.ndim("spread", "B T", index=index)
    if values.shape[0] != index.shape[0]:
        raise ValueError(
            f"spread: expected values [B, S] and index [B, T] of one B, got {list(values.shape)} and "
            f"{list(index.shape)}. Pass one line of values per row."
        )
    if index.device.type == "cpu" and bool((index >= values.shape[1]).any()):
        raise ValueError(
            f"spread: expected an index below S = {values.shape[1]}, got {int(index.max())}. "
            f"Steps are counted from 0."
        )
    there = index >= 0
    if values.shape[1] == 0:
        return values.new_zeros(index.shape)
    taken = values.detach().gather(1, index.long().clamp(min=0))
    _finite("spread", there, values=taken)
    return torch.where(there, taken, 0.0)


def _lambda_return(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Return the recursion of `gae`, over counted tokens only, from the last one back."""
    r, v = (_wide(torch.where(mask, x.detach(), 0.0)) for x in (rewards, values))
    out = torch.zeros_like(r)
    advantage = value = r.new_zeros(r.shape[0])  # of the next token that counts
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * value - v[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        value = torch.where(mask[:, t], v[:, t], value)
        out[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return out.to(rewards.dtype)


def _wide(x: Tensor) -> Tensor:
    """Half precision in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scorable(fn: str, rewards: Tensor, valid: Tensor | None) -> Tensor:
    """Check rewards [B, K] and return where there is one: valid and not NaN."""
    _check.floating(fn, rewards=rewards)
    _check.ndim(fn, "B K", rewards=rewards)
    kept = ~rewards.isnan()
    if valid is not None:
        _check.boolean(fn, valid=valid)
        _check.same_shape(fn, rewards=rewards, valid=valid)
        kept = kept & valid
    _finite(fn, kept, rewards=rewards)
    return kept


def _check_tokens(fn: str, mask: Tensor, **tensors: Tensor) -> None:
    """Check floats [B, T] against their mask."""
    _check.boolean(fn, mask=mask)
    _check.floating(fn, **tensors)
    _check.ndim(fn, "B T", mask=mask, **tensors)
    _check.same_shape(fn, mask=mask, **tensors)
    _finite(fn, mask, **tensors)


def _check_p_fail(p_fail: Tensor, rewards: Tensor) -> None:
    """Check one failure rate per prompt."""
    _check.floating("bon", p_fail=p_fail)
    if p_fail.shape != rewards.shape[:1]:
        raise ValueError(
            f"bon: expected p_fail [B] with B {rewards.shape[0]}, got {list(p_fail.shape)}. One per prompt."
        )
    if p_fail.device.type == "cpu" and not bool(((p_fail >= 0) & (p_fail <= 1)).all()):
        raise ValueError("bon: expected p_fail in [0, 1], got a value outside. It is the chance to fail.")


def _finite(fn: str, mask: Tensor | None, **tensors: Tensor) -> None:
    """Raise ValueError, on the CPU, for a value that counts and is infinite or NaN."""
    for name, x in tensors.items():
        if x.device.type != "cpu":
            continue
        bad = ~x.isfinite() if mask is None else ~x.isfinite() & mask
        if bool(bad.any()):
            raise ValueError(
                f"{fn}: expected {name} finite where it counts, got {x[bad][0]:.4g}. "
                f"Leave such an entry out with the mask, or find where it comes from."
            )
