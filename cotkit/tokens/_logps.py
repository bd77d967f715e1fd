"""How likely a model finds tokens: log-probabilities, their sums per row, entropies and divergences."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cotkit import _check
from cotkit._types import (
    HeadBias,
    HeadWeight,
    Hidden,
    Logits,
    Mask,
    SeqLogps,
    TokenIds,
    TokenLogps,
    TokenValues,
)
from cotkit.tokens._linear import check_targets, chunked_logps, last_hidden, plain_head
from cotkit.tokens._segments import IGNORED


def token_logps(
    logits: Logits, labels: TokenIds, *, temperature: float = 1.0, shift: bool = True
) -> TokenLogps:
    r"""Log-probability of every label under the model's logits. The one place where the shift happens.

    $\log \mathrm{softmax}(z_{t-1} / T)[y_t]$

    Args:
        logits: as the model returns them, unshifted, [B, T, V]; gradient flows.
        labels: ids, unshifted, -100 = ignored, [B, T].
        temperature: > 0; the logits are divided by it.
        shift: False for bidirectional models, whose position t predicts label t.

    Returns:
        Nats [B, T]; exactly 0, with zero gradient, where the label is -100 and (with the shift) at position
        0. Half-precision logits are read in float32, and so is the result.

    Raises:
        ValueError: shapes differ (with a word on labels shifted before the call), an id outside the
            vocabulary, ``temperature <= 0``.

    Source: none (plumbing)

    Example:
        >>> token_logps(torch.zeros(1, 2, 4), torch.tensor([[3, 1]]))  # log 1/4 at position 1
        tensor([[ 0.0000, -1.3863]])
    """
    check_targets("token_logps", logits, labels, logits.shape[-1])
    _check.positive("token_logps", temperature=temperature)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != IGNORED
    rows = logits[kept]
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    rows = rows / temperature
    chosen = rows.gather(-1, labels[kept][:, None])[:, 0] - rows.logsumexp(-1)
    found = chosen.new_zeros(kept.shape).masked_scatter(kept, chosen)
    return torch.nn.functional.pad(found, (1, 0)) if shift else found


def linear_logps(
    hidden: Hidden,
    weight: HeadWeight,
    labels: TokenIds,
    *,
    bias: HeadBias | None = None,
    temperature: float = 1.0,
) -> TokenLogps:
    r"""``token_logps(hidden @ weight.T + bias, labels)``, values and gradients, without the logits [B, T, V].

    Works through the vocabulary in tiles that fit the cache, on target positions only; the gradient of a
    frozen head is not computed, and then the backward pass needs no matrix product at all.

    Args:
        hidden: last hidden states, unshifted, [B, T, D]; gradient flows.
        weight: output embedding [V, D]; gradient flows if it is asked for.
        labels: ids, unshifted, -100 = ignored, [B, T].
        bias: [V] or None.
        temperature: > 0; the logits are divided by it.

    Returns:
        Nats [B, T], as ``token_logps``; float32 for half-precision inputs, accumulated in float32.

    Raises:
        ValueError: shapes differ, an id outside the vocabulary, ``temperature <= 0``.

    Source: none (plumbing)

    Example:
        >>> linear_logps(torch.zeros(1, 2, 3), torch.ones(4, 3), torch.tensor([[3, 1]]))
        tensor([[ 0.0000, -1.3863]])
    """
    _check.ndim("linear_logps", "V D", weight=weight)
    check_targets("linear_logps", hidden, labels, weight.shape[0])
    _check.positive("linear_logps", temperature=temperature)
    if hidden.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}" + (
            f", bias {list(bias.shape)}" if bias is not None else ""
        )
        raise ValueError(
            f"linear_logps: expected one D and one V, got {shapes}. weight is [V, D], as in lm_head."
        )
    kept = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))  # the position that predicts a target
    chosen = chunked_logps(hidden, weight, bias, labels.roll(-1, 1)[kept], kept, float(temperature))
    return chosen.new_zeros(kept.shape).masked_scatter(kept, chosen).roll(1, 1)


def model_logps(model: Any, batch: Mapping[str, Tensor], *, grad: bool = False) -> TokenLogps:
    """Score an encoded batch with one forward pass: reference scores, perplexity, probes.

    The logits [B, T, V] are not built where the model's last step is a plain linear head (also under peft,
    with a 4-bit body or tied embeddings). A soft-cap, a logit scale, a quantized or adapted head are seen and
    scored from the logits.

    Args:
        model: a causal language model of ``transformers``, or its peft wrapper. Dropout stays as the model's
            mode says.
        batch: from ``encode``; ``input_ids``, ``attention_mask`` and ``labels`` are read. If there
            is ``inputs_embeds`` [B, T, D] the model gets that instead of ``input_ids``; gradient flows.
        grad: keep the graph.

    Returns:
        Nats [B, T], as ``token_logps``.

    Raises:
        ValueError: the batch lacks ``labels``, or both ``input_ids`` and ``inputs_embeds``; the
            embeddings are not [B, T, D].

    Source: none (plumbing)

    Example:
        >>> model_logps(model, encode(rows, tokenizer)).shape  # doctest: +SKIP
        torch.Size([8, 120])
    """
    given = "inputs_embeds" if "inputs_embeds" in batch else "input_ids"
    for name in (given, "labels"):
        if name not in batch:
            raise ValueError(
                f"model_logps: expected {name} in the batch, got {sorted(batch)}. Use tokens.encode."
            )
    if given == "inputs_embeds":
        _check.floating("model_logps", inputs_embeds=batch[given])
        if batch[given].dim() != 3 or batch[given].shape[:2] != batch["labels"].shape:
            raise ValueError(
                f"model_logps: expected inputs_embeds [B, T, D] with the labels' B and T, got "
                f"{list(batch[given].shape)} and labels {list(batch['labels'].shape)}. One vector per label."
            )
    inputs = {k: batch[k] for k in (given, "attention_mask") if k in batch}
    labels = batch["labels"]
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        head = plain_head(model)
        if head is not None:
            hidden = last_hidden(model, head, inputs)
            if hidden is not None and hidden.shape[:2] == labels.shape:
                return linear_logps(hidden, head.weight, labels.to(hidden.device), bias=head.bias)
        logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] :]
        return token_logps(logits, labels.to(logits.device))


def seq_logps(
    logps: TokenLogps, mask: Mask, *, weights: TokenValues | None = None, mean: bool = False
) -> SeqLogps:
    r"""Log-probability of each row: sum, or mean, of its counted tokens.

    Args:
        logps: nats [B, T]; gradient flows.
        mask: True = counts.
        weights: factors [B, T] of the terms (thought against action, position); not part of the mean's count;
            detached.
        mean: divide by the number of counted tokens. AFT and length-normalised scores want the mean, DPO the
            sum.

    Returns:
        Nats (mean: nats per token) [B]; 0 with zero gradient for a row without counted tokens.

    Raises:
        ValueError: shapes differ; logits or shifted labels in place of log-probs.
        TypeError: the mask is not bool.

    Source: AFT (2023) arXiv:2309.02144 Eq. 2 (mean)
    Basis: second-hand
    Differs: nothing

    Example:
        >>> logps, counted = torch.tensor([[0.0, -1.0, -3.0]]), torch.tensor([[False, True, True]])
        >>> seq_logps(logps, counted), seq_logps(logps, counted, mean=True)
        (tensor([-4.]), tensor([-2.]))
    """
    _check.token_logps("seq_logps", mask, logps=logps)
    if weights is not None:
        _check.same_shape("seq_logps", logps=logps, weights=weights)
        logps = logps * weights.detach()
    summed = torch.where(mask, logps, 0.0).sum(1)
    return summed / mask.sum(1).clamp(min=1) if mean else summed


def grouped(
    values: Float[Tensor, "N"] | Int[Tensor, "N"], group: Int[Tensor, "N"]
) -> tuple[Tensor, Bool[Tensor, "B K"]]:
    """Gather the flat rows of several prompts into one line per prompt.

    Args:
        values: one value per row, [N]; gradient flows.
        group: number of the prompt each row belongs to, [N]; any integers, in any order.

    Returns:
        Padded values [B, K], groups and members in the order of their first appearance, 0 where there is
        none, and ``valid`` [B, K], True where there is one.

    Raises:
        ValueError: shapes differ.
        TypeError: ``group`` is not an integer tensor.

    Source: none (plumbing)

    Example:
        >>> grouped(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 4, 7]))
        (tensor([[1., 3.],
                [2., 0.]]), tensor([[ True,  True],
                [ True, False]]))
    """
    _check.ndim("grouped", "N", values=values, group=group)
    _check.same_shape("grouped", values=values, group=group)
    _check.integer("grouped", group=group)
    same = group[:, None] == group[None, :]
    n = group.shape[0]
    at = torch.arange(n, device=group.device)
    first = torch.where(same, at, n).amin(1) if n else at  # where each row's group begins
    line = torch.isin(at, first).cumsum(0)[first] - 1
    place = (same & (at[None, :] < at[:, None])).sum(1)
    shape = (int(line.max()) + 1, int(place.max()) + 1) if n else (0, 0)
    valid = torch.zeros(shape, dtype=torch.bool, device=group.device)
    valid[line, place] = True
    return values.new_zeros(shape).index_put((line, place), values), valid


def entropy(logits: Logits, *, temperature: float = 1.0) -> TokenValues:
    r"""Entropy of every next-token distribution, $-\sum_v p_v \log p_v$ with $p = \mathrm{softmax}(z / T)$.

    Args:
        logits: [B, T, V], not shifted; gradient flows. -inf = impossible.
        temperature: > 0.

    Returns:
        Nats [B, T], between 0 and log V; position t belongs to the distribution read at t, the one of token t
        + 1.

    Raises:
        ValueError: ``temperature <= 0``, not [B, T, V].

    Source: none (plumbing)

    Example:
        >>> entropy(torch.zeros(1, 1, 4))  # log 4
        tensor([[1.3863]])
    """
    _check.ndim("entropy", "B T V", logits=logits)
    _check.floating("entropy", logits=logits)
    _check.positive("entropy", temperature=temperature)
    logp = _log_softmax(logits, temperature)
    return -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)


def kl(p_logits: Logits, q_logits: Logits, *, temperature: float = 1.0) -> TokenValues:
    r"""Exact divergence KL(p || q) $= \sum_v p_v (\log p_v - \log q_v)$ at every position.

    Args:
        p_logits: [B, T, V]; gradient flows.
        q_logits: [B, T, V]; gradient flows. Detach the side that must stay fixed.
        temperature: > 0, for both. No T^2 is applied.

    Returns:
        Nats [B, T], at least 0; 0 log 0 = 0.

    Raises:
        ValueError: shapes differ, ``temperature <= 0``.

    Source: none (plumbing)

    Example:
        >>> kl(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]]]))
        tensor([[0.]])
    """
    _check.same_shape("kl", p_logits=p_logits, q_logits=q_logits)
    _check.ndim("kl", "B T V", p_logits=p_logits)
    _check.floating("kl", p_logits=p_logits, q_logits=q_logits)
    _check.positive("kl", temperature=temperature)
    logp, logq = _log_softmax(p_logits, temperature), _log_softmax(q_logits, temperature)
    return torch.where(logp == -torch.inf, 0.0, logp.exp() * (logp - logq)).sum(-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return (wide / temperature).log_softmax(-1)


def kl_k2(logps: TokenLogps, ref_logps: TokenLogps) -> TokenValues:
    r"""Squared estimate of KL(policy || ref) on the policy's own samples.

    $\tfrac12 (\log\pi - \log\pi_{ref})^2$

    Args:
        logps: policy, nats [B, T]; gradient flows. On policy its expected gradient is that of the exact
            divergence.
        ref_logps: reference, nats [B, T]; detached.

    Returns:
        Nats [B, T], at least 0; biased as a value.

    Raises:
        ValueError: shapes differ.

    Source: none (Schulman's note on approximating KL, 2020: k2)
    Basis: memory
    Differs: nothing

    Example:
        >>> kl_k2(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]))
        tensor([[2.]])
    """
    _check.same_shape("kl_k2", logps=logps, ref_logps=ref_logps)
    _check.floating("kl_k2", logps=logps, ref_logps=ref_logps)
    return (logps - ref_logps.detach()).square() / 2


def kl_k3(logps: TokenLogps, ref_logps: TokenLogps) -> TokenValues:
    r"""Unbiased, non-negative estimate of KL(policy || ref) on the policy's own samples (GRPO's KL term).

    $e^{d} - d - 1$ with $d = \log\pi_{ref} - \log\pi$.

    Args:
        logps: policy, nats [B, T]; gradient flows.
        ref_logps: reference, nats [B, T]; detached.

    Returns:
        Nats [B, T], at least 0; its mean over samples of the policy is the exact divergence.

    Raises:
        ValueError: shapes differ.

    Source: GRPO (2024) arXiv:2402.03300 Eq. 4
    Basis: memory
    Differs: nothing

    Example:
        >>> kl_k3(torch.tensor([[-2.0]]), torch.tensor([[-1.0]]))  # e - 1 - 1
        tensor([[0.7183]])
    """
    _check.same_shape("kl_k3", logps=logps, ref_logps=ref_logps)
    _check.floating("kl_k3", logps=logps, ref_logps=ref_logps)
    d = ref_logps.detach() - logps
    return torch.expm1(d) - d
