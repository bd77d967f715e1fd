"""Log-probabilities from hidden states, tile by tile, and the search for a model's plain linear head.

With p = softmax(h W' / T) the gradient of log p[y] is (W[y] - p W) / T for h and (1[v = y] - p_v) h / T for
W. Forward keeps the log-sum-exp of each row. Backward computes a tile's logits again and turns them, in
place, into the gradient of the logits. A frozen head needs no second pass: p W is summed in forward already,
rescaled as the maximum of a row moves, and backward multiplies each row by a number.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from cotkit import _check

SMALL = 1 << 22  # logits with fewer entries than this are simply built
_HALF = (torch.float16, torch.bfloat16)
_AFTER_HEAD = (  # config fields of models that do something to the logits behind the head
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


def check_targets(fn: str, x: Tensor, labels: Tensor, vocabulary: int) -> None:
    """Check labels [B, T] against logits or hidden states and guess the usual mistakes."""
    _check.floating(fn, x=x)
    _check.integer(fn, labels=labels)
    if x.dim() != 3 or labels.dim() != 2:
        raise ValueError(
            f"{fn}: expected [B, T, ...] and labels [B, T], got {list(x.shape)} and {list(labels.shape)}."
        )
    if x.shape[:2] != labels.shape:
        (rows, length), (b, t) = labels.shape, x.shape[:2]
        hint = "Both must come from the same batch."
        if rows == b and length == t - 1:
            hint = "The labels look already shifted: pass them unshifted, the shift happens here, once."
        elif rows == b and length == t + 1:
            hint = "The last position looks cut off: pass all T positions, the shift happens here, once."
        elif rows == b and t > length:
            hint = (
                f"The first is longer by {t - length}: right-padded, or virtual tokens in front. Cut it to T."
            )
        raise ValueError(
            f"{fn}: expected equal B and T, got {list(x.shape)} and labels {list(labels.shape)}. {hint}"
        )
    if labels.device.type == "cpu":
        bad = (labels != -100) & ((labels < 0) | (labels >= vocabulary))
        if bool(bad.any()):
            raise ValueError(
                f"{fn}: expected labels in [0, {vocabulary}) or -100, got {int(labels[bad][0])}. "
                f"Ignored positions carry -100; other ids must be in the vocabulary."
            )


def tile_shape(device: str) -> tuple[int, int]:
    """Rows and vocabulary entries of one tile: 8 MB, about a CPU's cache; 128 MB elsewhere."""
    return (1024, 2048) if device == "cpu" else (4096, 8192)


def chunked_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, kept: Tensor, t: float
) -> Tensor:
    """Log-probs [n] of ``ids`` [n], each read from one of the kept [B, T] hidden states."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        if ids.numel() * weight.shape[0] > SMALL:
            return _Chunked.apply(hidden, weight, bias, ids, kept, t, dtype)
        h, w = hidden[kept].to(dtype), weight.to(dtype)
        wide = _wide(dtype)
        z = torch.nn.functional.linear(h.to(wide), w.to(wide), None if bias is None else bias.to(wide)) / t
        return z.gather(-1, ids[:, None])[:, 0] - z.logsumexp(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _factor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor of a product: rounded to ``dtype``, and widened where no tensor core accumulates widely."""
    x = x.to(dtype)
    return x if x.device.type == "cuda" else x.to(_wide(dtype))


def _add_product(acc: Tensor, a: Tensor, b: Tensor, *, keep: bool = True) -> None:
    """Acc (or 0) + a @ b, accumulated in the type of ``acc``."""
    if b.dtype == acc.dtype:
        acc.addmm_(a, b, beta=int(keep))
    else:
        product = torch.mm(a.to(b.dtype), b, out_dtype=acc.dtype)
        acc.copy_(acc + product if keep else product)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, kept, t, dtype):
        h, wide = _factor(hidden[kept], dtype), _wide(dtype)
        top = h.new_full(h.shape[:1], -torch.inf, dtype=wide)
        total, target = torch.zeros_like(top), torch.zeros_like(top)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        early = needs_hidden and not needs_weight and not needs_bias
        pull = torch.zeros(h.shape, dtype=wide, device=h.device) if early else None  # p W
        for w, v, s, z in _tiles(h, weight, bias, t, dtype):
            local = ids[s] - v
            here = (local >= 0) & (local < w.shape[0])
            picked = z.gather(1, local.clamp(0, w.shape[0] - 1)[:, None])[:, 0]
            target[s] = torch.where(here, picked, target[s])
            peak = torch.maximum(top[s], z.amax(1))
            shrink = (top[s] - peak).exp_()
            z.sub_(peak[:, None]).exp_()
            total[s] = total[s] * shrink + z.sum(1)
            top[s] = peak
            if pull is not None:
                _add_product(pull[s].mul_(shrink[:, None]), z, w)
        log_z = top + total.log()
        if pull is not None:
            pull = pull.div_(-total[:, None]).add_(weight[ids]).div_(t)
            ctx.save_for_backward(kept, pull)
        else:
            ctx.save_for_backward(kept, None, hidden, weight, bias, ids, log_z)
        ctx.t, ctx.dtype, ctx.shape, ctx.given = t, dtype, hidden.shape, hidden.dtype
        return target - log_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kept, pull, *saved = ctx.saved_tensors
        if pull is not None:
            return _spread(pull * grad[:, None], kept, ctx), None, None, None, None, None, None
        hidden, weight, bias, ids, log_z = saved
        dtype, t, grad = ctx.dtype, ctx.t, (grad / ctx.t)[:, None]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        h, wide = _factor(hidden[kept], dtype), log_z.dtype
        out_h = torch.zeros(h.shape, dtype=wide, device=h.device) if needs_hidden else None
        out_w = torch.empty_like(weight) if needs_weight else None
        if out_w is not None and not h.shape[0]:
            out_w.zero_()  # no tile will write it
        out_b = torch.zeros(bias.shape, dtype=wide, device=h.device) if needs_bias else None
        for w, v, s, z in _tiles(h, weight, bias, t, dtype):
            p = z.sub_(log_z[s, None]).exp_()
            p.mul_(-grad[s])
            at = ((ids[s] >= v) & (ids[s] < v + w.shape[0])).nonzero()[:, 0]
            p[at, ids[s][at] - v] += grad[s][at, 0]
            if out_h is not None:
                _add_product(out_h[s], p, w)
            if out_w is not None:
                first, last = s.start == 0, s.stop >= h.shape[0]
                part = out_w[v : v + w.shape[0]]
                if first:
                    acc = part if part.dtype == wide else torch.empty(w.shape, dtype=wide, device=w.device)
                _add_product(acc, p.t(), h[s], keep=not first)
                if last and acc is not part:
                    part.copy_(acc)
            if out_b is not None:
                out_b[v : v + w.shape[0]] += p.sum(0)
        out_h = None if out_h is None else _spread(out_h, kept, ctx)
        return out_h, out_w, None if out_b is None else out_b.to(bias.dtype), None, None, None, None


def _tiles(h: Tensor, weight: Tensor, bias: Tensor | None, t: float, dtype: torch.dtype):
    """Yield (weight rows, their first number, slice of h, logits of the tile, which may be overwritten)."""
    rows, columns = tile_shape(h.device.type)
    wide = _wide(dtype)
    room = torch.empty(min(rows, h.shape[0]) * min(columns, weight.shape[0]), dtype=wide, device=h.device)
    for v in range(0, weight.shape[0], columns):
        w = _factor(weight[v : v + columns], dtype)
        for r in range(0, h.shape[0], rows):
            s = slice(r, r + rows)
            z = room[: h[s].shape[0] * w.shape[0]].view(-1, w.shape[0])
            _add_product(z, h[s], w.t(), keep=False)
            if bias is not None:
                z += bias[v : v + columns]
            if t != 1:
                z /= t
            yield w, v, s, z


def _spread(values: Tensor, kept: Tensor, ctx: Any) -> Tensor:
    """Put the kept rows back into the shape of the hidden states, 0 elsewhere."""
    out = torch.zeros(ctx.shape, dtype=ctx.given, device=values.device)
    out[kept] = values.to(ctx.given)
    return out


def plain_head(model: Any) -> Any:
    """The model's output layer if it is a plain floating ``Linear`` that nothing follows; else None."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _AFTER_HEAD):
        return None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not torch.nn.Linear or not head.weight.is_floating_point():
        return None
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return head if "logits_to_keep" in inspect.signature(inner.forward).parameters else None


def last_hidden(model: Any, head: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """Last hidden states [B, T, D] of a pass that projects one position; None if the head is not the end."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen: dict[str, Any] = {}
    hooks = [
        inner.base_model.register_forward_hook(lambda _m, _i, out: seen.update(hidden=out[0])),
        head.register_forward_hook(lambda _m, args, out: seen.update(given=args[0], made=out)),
    ]
    try:
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not {"hidden", "given", "made"} <= seen.keys() or logits.shape[1] != 1:
        return None
    with torch.no_grad():  # nothing may happen between the body and the head, or behind the head
        before = torch.equal(seen["given"], seen["hidden"][:, -1:])
        after = torch.allclose(logits.to(seen["made"].dtype), seen["made"], equal_nan=True)
    return seen["hidden"] if before and after else None
