r"""Regularisers: a second term beside the likelihood that keeps the model smooth, to be added with a factor.

Conventions: ``logits [B, T, V]`` are unshifted, as the model returns them; ``mask [B, T]`` marks *label*
positions, as in `tokens.token_logps`: where ``mask[:, t]`` is True the distribution read is the one at t - 1,
which predicts token t, so ``mask[:, 0]`` reads nothing. Divergences are in nats.

Functions: `adversarial` smoothness around the input embeddings (SMART, SiFT); `localized_balance` experts
share the work within a kind of data, and split it between kinds (LoRAMoE).

Composed, not offered: the proximal half of SMART keeps the model near a copy of itself, which is
`distill.kl` in both directions,
``kl(student, teacher, mask) + kl(student, teacher, mask, reverse=True)``, with the previous
iterate as the teacher, or (momentum, MBPP) an average of the iterates,
``torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))``.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cotkit import _check
from cotkit._reduce import check_denom, total
from cotkit._types import Denom, Hidden, Logits, Loss, Mask

__all__ = ["adversarial", "localized_balance"]


def adversarial(
    forward: Callable[[Tensor], Tensor],
    embeds: Hidden,
    logits: Logits,
    mask: Mask,
    *,
    eps: float = 1e-5,
    sigma: float = 1e-5,
    eta: float = 1e-3,
    steps: int = 1,
    scale_invariant: bool = False,
    generator: torch.Generator | None = None,
    denom: Denom = None,
) -> Loss:
    r"""Smoothness-inducing adversarial regulariser: the worst change of the prediction near the input.

    $$R_s = \frac1N \sum_t \max_{\|\delta\|_\infty \le \epsilon}
    \mathrm{KL}(p \,\|\, \tilde p)_t + \mathrm{KL}(\tilde p \,\|\, p)_t$$
    with $p$ the prediction at the embeddings $x$ and $\tilde p$ the one at $x + \delta$. The maximum is
    sought from $\delta \sim N(0, \sigma^2)$ by ``steps`` times
    $\delta \leftarrow \mathrm{clip}_{\pm\epsilon}\big(\delta + \eta\, g / \|g\|_\infty\big)$, where g is the
    gradient of the sum with p held fixed and the norm is taken per token.

    Add it to the likelihood: ``nll(logps, mask) + adversarial(...)``. It costs ``steps + 1`` forward and
    backward passes. Dropout in ``forward`` would be measured too: draw it once, or switch it off.

    Args:
        forward: from embeddings [B, T, D] to logits [B, T, V], with the batch's attention mask:
            ``lambda x: model(inputs_embeds=x, attention_mask=attention_mask).logits``.
        embeds: input embeddings x, ``model.get_input_embeddings()(input_ids)``, [B, T, D]; gradient flows.
        logits: ``forward(embeds)``, which the likelihood needs anyway, [B, T, V]; gradient flows.
        mask: True = label position, [B, T]; read one position before. Only these rows of the vocabulary
            enter the divergence, so memory beyond ``forward`` is a few tensors [N, V].
        eps: > 0; largest change of one coordinate of an embedding. Paper: 1e-5, which is lost in bfloat16
            (its numbers near 0.1 lie 5e-4 apart); the released code perturbs by about 1 (see Differs).
            Choose it beside the size of your embeddings.
        sigma: >= 0; standard deviation of the first perturbation. Paper: 1e-5. 0 starts at the minimum of
            the divergence, where the gradient is 0: there the result is 0.
        eta: >= 0; step of the ascent. Paper: 1e-3. Far above ``eps`` (as there) a step ends in a corner of
            the box wherever the gradient is not small.
        steps: >= 0; the paper takes 1. 0: random noise in place of the worst direction.
        scale_invariant: the perturbation is added to the layer-normalised embedding, so ``eps``, ``sigma``
            and ``eta`` count in standard deviations of each token's embedding (Vega v1).
        generator: source of the first perturbation.
        denom: label positions of the whole accumulated batch. None: those of this call.

    Returns:
        Scalar, nats per label position, at least 0; gradient reaches the model through both predictions, not
        through the perturbation. 0 with zero gradient when nothing counts.

    Raises:
        ValueError: shapes differ, also those of ``forward``'s result; ``eps <= 0``, ``sigma < 0``, ...
        TypeError: ``mask`` is not bool, ``steps`` no int.

    Source: SMART (2019) arXiv:1911.03437 Alg. 1
    Source: Vega v1 (2023) arXiv:2302.09268 (adversarial fine-tuning, ``scale_invariant``)
    Basis: authors' code for the symmetric divergence and the direction of the ascent (equal numbers); the
        box and the constants from memory of the paper; Vega v1 reconstructed from the abstract.
    Differs: the released code does not project: it divides noise + eta * g by its largest coordinate per
        token, so the perturbation is about 1 whatever ``eps`` is. It climbs on another divergence, built from
        log-odds (the same direction for two classes), and it detaches the target of each of the two
        divergences: the same value, but half of our gradient for a small perturbation.

    Example:
        >>> from torch import tensor
        >>> x = tensor([[[0.0], [0.0]]])
        >>> sharp = lambda x: torch.cat([x, -x], -1)  # two words, logits x and -x
        >>> # logits +-0.5 against 0: (sigmoid(1) - 1/2) * 1
        >>> adversarial(sharp, x, sharp(x), tensor([[False, True]]), eps=0.5, eta=1.0)
        tensor(0.2311)
    """
    _check.ndim("adversarial", "B T D", embeds=embeds)
    _check_logits("adversarial", embeds, logits, mask)
    _check.positive("adversarial", eps=eps)
    _check.at_least("adversarial", 0, sigma=sigma, eta=eta, steps=steps)
    _check.integers("adversarial", steps=steps)
    check_denom("adversarial", denom)
    kept = mask[:, 1:]
    scale = embeds.detach().std(-1, correction=0, keepdim=True) if scale_invariant else 1.0
    clean, x = logits[:, :-1][kept], embeds.detach()

    def divergence(p: Tensor, inputs: Tensor) -> Tensor:
        perturbed = forward(inputs)
        if perturbed.shape != logits.shape:
            raise ValueError(
                f"adversarial: expected forward to return {list(logits.shape)} like logits, got "
                f"{list(perturbed.shape)}. Return the model's .logits, all positions."
            )
        return _symmetric_kl(p, perturbed[:, :-1][kept])

    device = embeds.device if generator is None else generator.device
    noise = torch.randn(embeds.shape, generator=generator, device=device, dtype=embeds.dtype)
    delta = sigma * noise.to(embeds.device)
    with torch.enable_grad():
        for _ in range(steps):
            delta.requires_grad_()
            (g,) = torch.autograd.grad(divergence(clean.detach(), x + scale * delta).sum(), delta)
            largest = g.abs().amax(-1, keepdim=True)
            direction = torch.where(largest > 0, g / largest, 0.0)
            delta = (delta.detach() + eta * direction).clamp(-eps, eps)
    delta = delta.clamp(-eps, eps)
    terms = divergence(clean, embeds + scale * delta)
    values = torch.nn.functional.pad(terms.new_zeros(kept.shape).masked_scatter(kept, terms), (1, 0))
    return total("adversarial", values, mask, denom=denom)


def localized_balance(
    gate: Float[Tensor, "B T N"],
    mask: Mask,
    sample_type: Int[Tensor, "B"],
    expert_type: Int[Tensor, "N"],
    *,
    delta: float = 0.1,
    squared: bool = False,
) -> Loss:
    r"""Localised balancing: experts share the work evenly, but for a bias between kinds of data.

    $$L = \frac{\mathrm{Var}(Z)}{\mathrm{Mean}(Z)}, \quad
    Z_{nm} = (1 \pm \delta) \sum_t g_{mtn}$$
    over all experts n and rows m, with + where the kind of the expert is the kind of the row.

    The loss is least where Z is constant, so an expert of the row's own kind then gets (1 - delta) / (1 +
    delta) times the gate of another one: taken as it stands the formula sends the rows to the experts of
    the *other* kind. Kinds are names; the experts specialise either way. With ``delta < 0`` they do so
    under their own name.

    Args:
        gate: gates of one layer, [B, T, N], that add up to 1 over the N experts; gradient flows. From
            ``adapters.experts.gates``; take the mean over layers.
        mask: True = the token counts, [B, T]. A row that counts nothing is left out.
        sample_type: kind of each row, integers [B] (world knowledge or another task).
        expert_type: kind of each expert, integers [N].
        delta: in [-1, 1]. 0: the plain balance of all experts. 0.1: from memory, not checked.
        squared: divide by the squared mean, the squared coefficient of variation, as the released code does.

    Returns:
        Scalar >= 0, in tokens (``squared``: without unit); 0 with zero gradient when nothing counts. Add it
        with a factor; 0.1 from memory.

    Raises:
        ValueError: shapes do not fit, ``delta`` outside [-1, 1], or a gate that counts is NaN or infinite.
        TypeError: ``mask`` is not bool, a kind no integer.

    Source: LoRAMoE (2023) arXiv:2312.09979
    Basis: authors' code, run (equal numbers for ``squared`` without padding); the paper's own form from
        memory.
    Differs: the released code divides by the squared mean (``squared``) and counts the gates of padding
        too. The variance is that of a sample, divided by B N - 1, in both.

    Example:
        >>> from torch import tensor
        >>> gate = tensor([[[0.75, 0.25]]])  # Z = (0.75, 0.25): Var 0.125, Mean 0.5
        >>> localized_balance(gate, tensor([[True]]), tensor([0]), tensor([0, 1]), delta=0.0)
        tensor(0.2500)
    """
    _check.ndim("localized_balance", "B T N", gate=gate)
    _check.ndim("localized_balance", "B T", mask=mask)
    _check.floating("localized_balance", gate=gate)
    _check.boolean("localized_balance", mask=mask)
    _check.integer("localized_balance", sample_type=sample_type, expert_type=expert_type)
    _check.between("localized_balance", -1, 1, delta=delta)
    rows, width, experts = gate.shape
    if mask.shape != (rows, width) or sample_type.shape != (rows,) or expert_type.shape != (experts,):
        raise ValueError(
            f"localized_balance: expected mask {[rows, width]}, sample_type {[rows]} and expert_type "
            f"{[experts]}, got {list(mask.shape)}, {list(sample_type.shape)} and {list(expert_type.shape)}."
        )
    kept = torch.where(mask[..., None], gate, 0.0)
    if gate.device.type == "cpu" and not bool(torch.isfinite(kept.detach()).all()):
        raise ValueError("localized_balance: expected finite gates, got NaN or infinity under the mask.")
    same = sample_type[:, None] == expert_type
    z = _wide(kept).sum(1) * torch.where(same, 1.0 + delta, 1.0 - delta)
    counted = mask.any(1)[:, None]
    n = (counted.sum() * experts).to(z.dtype)
    mean = z.sum() / n.clamp(min=1)  # rows that count nothing are 0 in z
    variance = torch.where(counted, (z - mean).square(), 0.0).sum() / (n - 1).clamp(min=1)
    below = mean.square() if squared else mean
    nothing = below == 0
    return torch.where(nothing, 0.0, variance / torch.where(nothing, 1.0, below)).to(gate.dtype)


def _symmetric_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) of each row [N, V], as a sum of terms >= 0, which rounding does not swamp."""
    logp, logq = (_wide(z).log_softmax(-1) for z in (p_logits, q_logits))
    both = (logp == -torch.inf) & (logq == -torch.inf)
    return ((logp.exp() - logq.exp()) * torch.where(both, 0.0, logp - logq)).sum(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _check_logits(fn: str, embeds: Tensor, logits: Tensor, mask: Tensor) -> None:
    _check.ndim(fn, "B T V", logits=logits)
    _check.ndim(fn, "B T", mask=mask)
    _check.floating(fn, embeds=embeds, logits=logits)
    _check.boolean(fn, mask=mask)
    if not embeds.shape[:2] == logits.shape[:2] == mask.shape:
        raise ValueError(
            f"{fn}: expected one [B, T], got embeds {list(embeds.shape)}, logits {list(logits.shape)}, "
            f"mask {list(mask.shape)}. Pass logits and mask unshifted."
        )
