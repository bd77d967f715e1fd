"""Modules: small trainable parts that are hung on a model, built by a function.

Functions: ``future_heads`` heads that look further ahead than the next token (CAFT); ``future_logps`` what
they, and the model, give the labels.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cotkit import _check
from cotkit.tokens import linear_logps
from cotkit.tokens._linear import last_hidden, plain_head
from cotkit.tokens._segments import IGNORED

__all__ = ["future_heads", "future_logps"]


class _Residual(nn.Module):
    """x + SiLU(W x + b), the identity at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


def future_heads(model: Any, n: int = 4, *, residual: bool = True) -> nn.ModuleList:
    r"""Heads for the tokens behind the next one; head i reads the last hidden state and looks 1 + i ahead.

    $x + \mathrm{SiLU}(Wx + b)$ with $W = b = 0$ at first, or a copy of the model's last block; the model's
    own unembedding turns the result into log-probs, see `future_logps`. They are thrown away after training.

    To train them in ``lab.fit``, hang them on the model, ``model.future = future_heads(model)``, and
    ``del model.future`` in the end.

    Args:
        model: a causal language model of ``transformers``, or its peft wrapper (copy blocks before wrapping).
        n: heads. Authors' code: 4.
        residual: True: one linear layer each, identical to the model's own head before training. False: a
            trainable copy of the last block each.

    Returns:
        ModuleList of n modules, in the model's dtype and on its device, all parameters trainable.

    Raises:
        ValueError: ``n < 1``, no plain linear head, or no list of blocks to copy from.
        TypeError: ``n`` is no integer.

    Source: CAFT (2025) arXiv:2506.07833 add_auxiliary_heads of the released code
    Basis: authors' code; the paper from memory.
    Differs: the default is the linear head; the released runs take a block each (``residual=False``). The
        bias starts at 0 too, so that the head is the identity it is meant to be (the released one
        keeps a random bias). A block is a copy of the last one; the released code copies the last but one and
        trains the heads first, on the hidden state below it, with the model frozen.

    Example:
        >>> from cotkit import lab
        >>> model, tokenizer = lab.load("tiny")
        >>> len(future_heads(model, 2))
        2
    """
    _check.integers("future_heads", n=n)
    _check.at_least("future_heads", 1, n=n)
    head = _head("future_heads", model)
    block = _Residual(head.in_features) if residual else _last_block("future_heads", model)
    heads = nn.ModuleList(copy.deepcopy(block) for _ in range(n)).to(head.weight.device, head.weight.dtype)
    for parameter in heads.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return heads


def future_logps(
    model: Any, heads: nn.ModuleList, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "H B T"], Bool[Tensor, "H B T"]]:
    """Score the labels with the model and with every head: one pass through the model.

    Args:
        model: the model the heads were made for; gradient flows unless it is switched off.
        heads: from `future_heads`; their unembedding is the model's, detached.
        batch: from ``tokens.encode``; ``input_ids`` (or ``inputs_embeds``), ``attention_mask`` and ``labels``
            are read.

    Returns:
        ``logps`` and ``masks``, [1 + n, B, T], for `losses.sft.multi_token`: entry [i, :, t] is what the head
        that reads position t - 1 - i gave ``labels[:, t]``. ``logps[0]`` is ``tokens.model_logps``. The mask
        is False where the label is -100 and where t - 1 - i is before the row's first token; there the
        log-prob is 0.

    Raises:
        ValueError: no plain linear head, or the batch lacks ``input_ids`` or ``labels``.

    Source: CAFT (2025) arXiv:2506.07833 add_auxiliary_heads of the released code
    Basis: authors' code; the paper from memory.
    Differs: no logits [H, B, T, V] are built.

    Example:
        >>> from cotkit import lab, tokens
        >>> model, tokenizer = lab.load("tiny")
        >>> batch = tokens.encode([{"prompt": "1 + 1 =", "completion": " 2"}], tokenizer, malformed="keep")
        >>> logps, masks = future_logps(model, future_heads(model, 2), batch)
        >>> logps.shape == masks.shape == (3, *batch["labels"].shape)
        True
    """
    ids = "inputs_embeds" if "inputs_embeds" in batch else "input_ids"
    for name in (ids, "labels"):
        if name not in batch:
            raise ValueError(
                f"future_logps: expected {name} in the batch, got {sorted(batch)}. Use tokens.encode."
            )
    head = _head("future_logps", model)
    seen: dict[str, Any] = {"args": (), "named": {}}
    hooks = []
    if not all(isinstance(h, _Residual) for h in heads):
        # a copied block wants positions and attention mask just as the model gives them to the last block
        hooks.append(
            _last_block("future_logps", model).register_forward_pre_hook(
                lambda _, args, named: seen.update(args=args[1:], named=named), with_kwargs=True
            )
        )
    try:
        hidden = last_hidden(model, head, {k: batch[k] for k in (ids, "attention_mask") if k in batch})
    finally:
        for hook in hooks:
            hook.remove()
    labels = batch["labels"]
    if hidden is None or hidden.shape[:2] != labels.shape:
        raise ValueError(
            "future_logps: expected a model whose last step is a plain linear head over T positions, got "
            f"{type(model).__name__}."
        )
    labels = labels.to(hidden.device)
    there = batch.get("attention_mask", torch.ones_like(labels)).to(hidden.device).bool()
    named = {k: v for k, v in seen["named"].items() if k != "hidden_states"}
    logps = [linear_logps(hidden, head.weight, labels, bias=head.bias)]
    masks = [nn.functional.pad(labels[:, 1:] != IGNORED, (1, 0))]
    bias = None if head.bias is None else head.bias.detach()
    for i, module in enumerate(heads, 1):
        x = module(hidden) if isinstance(module, _Residual) else module(hidden, *seen["args"], **named)
        x = x[0] if isinstance(x, tuple) else x
        source = _later(there, 1 + i, False)  # is position t - 1 - i a token of the row?
        kept = (labels != IGNORED) & source
        ahead = _later(labels.masked_fill(~kept, IGNORED), -i, IGNORED)  # at t: what t - 1 is to predict
        scored = linear_logps(x, head.weight.detach(), ahead, bias=bias)
        logps.append(_later(scored, i, 0.0))
        masks.append(kept)
    return torch.stack(logps), torch.stack(masks)


def _later(x: Tensor, by: int, fill: Any) -> Tensor:
    """Move the columns to the right by a number of positions, to the left if it is negative."""
    width = x.shape[1]
    by = max(-width, min(width, by))
    gap = x.new_full((len(x), abs(by)), fill)
    return torch.cat([gap, x[:, : width - by]] if by >= 0 else [x[:, -by:], gap], 1)


def _head(fn: str, model: Any) -> nn.Linear:
    head = plain_head(model)
    if head is None:
        raise ValueError(
            f"{fn}: expected a causal language model that ends in a plain linear head, got "
            f"{type(model).__name__}. A soft-cap, a scale, a quantized or adapted head are not supported."
        )
    return head


def _last_block(fn: str, model: Any) -> nn.Module:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    depth = inner.config.get_text_config().num_hidden_layers
    lists = [m for m in inner.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(
            f"{fn}: expected a list of {depth} blocks in the model, got none. Use residual=True."
        )
    return lists[0][-1]
