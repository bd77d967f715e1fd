r"""Distillation: learn a whole distribution over the next token, or a label mixed with one.

Conventions: ``logits [B, T, V]`` are unshifted, as the model returns them; ``mask [B, T]`` marks *label*
positions, as in `tokens.token_logps`: where ``mask[:, t]`` is True the distribution compared is the one at
t - 1, which predicts token t, so ``mask[:, 0]`` compares nothing. The teacher is detached. Student and
teacher may read different prompts; then cut both to the part they share first (see `kl`).

Functions: `kl` a divergence from a teacher (xDistill, the proximal term of SMART); `mixed_label`
cross-entropy against a softened label. On-policy distillation is TRL's.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cotkit import _check, tokens
from cotkit._reduce import check_denom, total
from cotkit._types import Denom, Logits, Loss, Mask

__all__ = ["kl", "mixed_label"]

_IGNORED = -100


def kl(
    student: Logits,
    teacher: Logits,
    mask: Mask,
    *,
    reverse: bool = False,
    temperature: float = 1.0,
    denom: Denom = None,
) -> Loss:
    r"""Divergence of the student from a fixed teacher, averaged over label positions.

    $\frac1N \sum_t \mathrm{KL}(p_{teacher} \,\|\, p_{student})_{t-1}$, with ``reverse`` the other way round.

    xCoT's cross-lingual distillation has the same answer read behind two prompts: the teacher is the model
    itself behind the question in the strong language, the student behind the weak one. Rows of different
    prompt length are brought into line by keeping, of each, the part from one position before the answer on:
    ``kl(weak[:, -n:], strong[:, -n:], mask[:, -n:])`` for one row with an answer of n - 1 tokens.

    Args:
        student: logits, unshifted, [B, T, V]; gradient flows.
        teacher: logits at the same positions, [B, T, V]; detached.
        mask: True = label position, [B, T]; read one position before. Only these rows enter.
        reverse: KL(student || teacher), which seeks one mode of the teacher; both added are the Bregman
            divergence of SMART.
        temperature: > 0, for both; no T^2 is applied, multiply by it to keep the gradient's size.
        denom: label positions of the whole accumulated batch. None: those of this call.

    Returns:
        Scalar, nats per label position, at least 0; 0 with zero gradient when nothing counts.

    Raises:
        ValueError: shapes differ, ``temperature <= 0``, ``denom <= 0``.
        TypeError: ``mask`` is not bool.

    Source: xCoT (2024) arXiv:2401.07037 (xDistill)
    Source: SMART (2019) arXiv:1911.03437 Alg. 1 (proximal term: both directions added)
    Basis: second-hand for xCoT (no code was released); SMART's term from memory, its released code has none.
    Differs: xCoT writes the cross-entropy $-\sum_v p_{teacher} \log p_{student}$: larger by the teacher's
        entropy, with the same gradient.

    Example:
        >>> from torch import tensor
        >>> student, teacher = tensor([[[0.0, 0.0], [0.0, 0.0]]]), tensor([[[1.0986, 0.0], [0.0, 0.0]]])
        >>> kl(student, teacher, tensor([[False, True]]))  # (3/4) ln(3/2) + (1/4) ln(1/2)
        tensor(0.1308)
    """
    _check.same_shape("kl", student=student, teacher=teacher)
    _check.ndim("kl", "B T V", student=student)
    _check.ndim("kl", "B T", mask=mask)
    _check.floating("kl", student=student, teacher=teacher)
    _check.boolean("kl", mask=mask)
    _check.positive("kl", temperature=temperature)
    check_denom("kl", denom)
    if student.shape[:2] != mask.shape:
        raise ValueError(
            f"kl: expected one [B, T], got student {list(student.shape)}, mask {list(mask.shape)}. "
            f"Pass logits and mask unshifted."
        )
    kept = mask[:, 1:]
    p, q = (logits[:, :-1][kept][None] for logits in (teacher.detach(), student))
    terms = tokens.kl(*((q, p) if reverse else (p, q)), temperature=temperature)[0]
    values = torch.nn.functional.pad(terms.new_zeros(kept.shape).masked_scatter(kept, terms), (1, 0))
    return total("kl", values, mask, denom=denom)


def mixed_label(
    logits: Float[Tensor, "N V"],
    labels: Int[Tensor, "N"],
    q: Float[Tensor, "N V"],
    *,
    alpha: float | Float[Tensor, "N"],
    denom: Denom = None,
) -> Loss:
    r"""Cross-entropy against the label mixed with a second distribution.

    $-\frac1N \sum_n \sum_v \big[(1 - \alpha)\,1_{v = y} + \alpha\, q_v\big] \log \mathrm{softmax}(z)_v$
    with q held fixed.

    q says where the softness comes from: uniform is label smoothing, a teacher's probabilities (alpha = 1)
    soft cross-entropy, the model's own prediction self-calibration:
    ``q = (logits / temperature).softmax(-1)``.

    Args:
        logits: one row per decision, V classes or words, [N, V]; gradient flows. For tokens take the label
            positions, shifted once: ``logits[:, :-1][mask[:, 1:]]`` with ``input_ids[:, 1:][mask[:, 1:]]``.
        labels: class of each row, [N]; -100: the row is left out.
        q: probabilities, [N, V]; detached.
        alpha: share of q in [0, 1], one number or one per row [N].
        denom: rows of the whole accumulated batch. None: those of this call whose label is not -100.

    Returns:
        Scalar in nats; 0 with zero gradient when no row counts. ``alpha=0`` is the plain cross-entropy.

    Raises:
        ValueError: shapes differ, a label outside the classes, ``alpha`` outside [0, 1], rows of q that are
            no distribution; a row whose loss is not finite, since its logits are not or its target asks for a
            class with logit -inf (a class with logit -inf that the target leaves at 0 is fine).

    Source: Vega v1 (2023) arXiv:2302.09268 (self-calibrated fine-tuning)
    Basis: reconstructed: the abstract names self-calibration without an equation; the mixture is our reading.
    Differs: not known.

    Example:
        >>> from torch import tensor
        >>> mixed_label(tensor([[1.0, 0.0]]), tensor([1]), tensor([[0.5, 0.5]]), alpha=0.5)  # 1.3133 - 1/4
        tensor(1.0633)
    """
    _check.ndim("mixed_label", "N V", logits=logits)
    _check.ndim("mixed_label", "N", labels=labels)
    _check.same_shape("mixed_label", logits=logits, q=q)
    _check.floating("mixed_label", logits=logits, q=q)
    _check.integer("mixed_label", labels=labels)
    check_denom("mixed_label", denom)
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"mixed_label: expected labels [N] for logits [N, V], got {list(labels.shape)} for "
            f"{list(logits.shape)}. For tokens pass the label positions only, shifted once."
        )
    kept = labels != _IGNORED
    share = _share(alpha, kept)
    _check_targets(labels, q, kept)
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    logp = torch.where(kept[:, None], wide, 0.0).log_softmax(-1)
    gold = logp.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    target = torch.where(kept[:, None], q.detach(), 0.0)
    gold = torch.where(kept & (share != 1), gold, 0.0)  # a share of 0 asks for nothing: no 0 * -inf
    soft = torch.where((target == 0) | (kept & (share == 0))[:, None], 0.0, target * logp).sum(-1)
    losses = torch.where(kept, -((1 - share) * gold + share * soft), 0.0)
    if losses.device.type == "cpu" and not bool(losses.detach().isfinite().all()):
        raise ValueError(
            f"mixed_label: expected a finite loss in every row, got {losses[~losses.isfinite()][0]:.4g}. Its "
            f"logits are not finite, or its label or q asks for a class whose logit is -inf."
        )
    return losses.sum() / (kept.sum().clamp(min=1) if denom is None else denom)


def _share(alpha: float | Tensor, kept: Tensor) -> float | Tensor:
    if not isinstance(alpha, Tensor):
        _check.between("mixed_label", 0, 1, alpha=alpha)
        return alpha
    _check.floating("mixed_label", alpha=alpha)
    if alpha.shape != kept.shape:
        raise ValueError(
            f"mixed_label: expected alpha as a number or [N], got {list(alpha.shape)}. Pass one per row."
        )
    if alpha.device.type == "cpu" and not bool(((alpha >= 0) & (alpha <= 1)).all()):
        raise ValueError(f"mixed_label: expected alpha in [0, 1], got {alpha.tolist()}. It is a share.")
    return alpha.detach()


def _check_targets(labels: Tensor, q: Tensor, kept: Tensor) -> None:
    if labels.device.type != "cpu" or not bool(kept.any()):
        return
    labels, q = labels[kept], q.detach()[kept]
    if not bool(((labels >= 0) & (labels < q.shape[1])).all()):
        raise ValueError(
            f"mixed_label: expected labels in [0, {q.shape[1]}), got {labels.tolist()}. "
            f"Use -100 for rows to leave out."
        )
    if not bool((q >= 0).all()) or bool(((q.sum(-1) - 1).abs() > 0.01).any()):
        raise ValueError(
            "mixed_label: expected q as probabilities that sum to 1, got other numbers. "
            "These look like logits; apply softmax(-1)."
        )
