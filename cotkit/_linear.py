"""Log-probabilities from hidden states, tile by tile, and the search for a model's plain linear head.

With p = softmax(h W' / T) the gradient of log p[y] is (W[y] - p W) / T for h and (1[v = y] - p_v) h / T for W. Forward
keeps the log-sum-exp of each row; backward recomputes a tile's p and feeds it to two products, without ever forming a
gradient of the logits: the row's incoming gradient is folded into the [n, D] side, the target's part is a row look-up.
When the head is frozen p W is gathered in the forward pass (rescaled as the maximum moves) and backward is a product of
a row with a number.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

TOKENS, WORDS = 1024, 2048  # rows and vocabulary entries of one tile: 8 MB of float32
SMALL = 1 << 22  # logits with fewer entries than this are simply built
_HALF = (torch.float16, torch.bfloat16)
# config fields of models that do something to the logits behind the head
_AFTER_HEAD = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier",
    "logits_soft_cap", "output_multiplier_scale",
)  # fmt: skip


def chunked_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, kept: Tensor, t: float) -> Tensor:
    """Log-probs [n] of the kept labels; ``hidden`` [B, S, D] and ``labels`` [B, S] are aligned already."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    with torch.autocast(device, enabled=False):
        ids = labels[kept]
        if ids.numel() * weight.shape[0] <= SMALL:
            h = hidden[kept]
            wide = _wide(torch.promote_types(h.dtype, weight.dtype))
            z = torch.nn.functional.linear(h.to(wide), weight.to(wide), None if bias is None else bias.to(wide)) / t
            return z.gather(-1, ids[:, None])[:, 0] - z.logsumexp(-1)
        rows = kept.flatten().nonzero()[:, 0]
        return _Chunked.apply(hidden, weight, bias, rows, ids, t)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """A @ b accumulated and returned in ``wide``; tensor cores get half-precision inputs as they are."""
    if a.device.type == "cuda" and b.dtype in _HALF:
        return torch.mm(a.to(b.dtype), b, out_dtype=wide)
    return torch.mm(a.to(wide), b.to(wide))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, ids, t):
        flat = hidden.reshape(-1, hidden.shape[-1])
        wide = _wide(torch.promote_types(hidden.dtype, weight.dtype))
        n, vocabulary = rows.numel(), weight.shape[0]
        top = torch.full((n,), -torch.inf, dtype=wide, device=hidden.device)
        total, target = torch.zeros_like(top), torch.zeros_like(top)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        early = needs_hidden and not needs_weight and not needs_bias
        pull = torch.zeros(n, hidden.shape[-1], dtype=wide, device=hidden.device) if early else None
        for v in range(0, vocabulary, WORDS):
            w = weight[v : v + WORDS]
            for r in range(0, n, TOKENS):
                s = slice(r, r + TOKENS)
                z = _product(flat[rows[s]], w.t(), wide)
                if bias is not None:
                    z += bias[v : v + WORDS]
                if t != 1:
                    z /= t
                local = ids[s] - v
                here = (local >= 0) & (local < w.shape[0])
                picked = z.gather(1, local.clamp(0, w.shape[0] - 1)[:, None])[:, 0]
                target[s] = torch.where(here, picked, target[s])
                peak = torch.maximum(top[s], z.amax(1))
                shrink = (top[s] - peak).exp_()
                z.sub_(peak[:, None]).exp_()
                total[s] = total[s] * shrink + z.sum(1)
                top[s] = peak
                if early:
                    pull[s] = torch.addcmul(_product(z, w, wide), pull[s], shrink[:, None])
        log_z = top + total.log()
        if early:
            pull = (weight[ids].to(wide) - pull / total[:, None]) / t
        ctx.save_for_backward(hidden, weight, bias, rows, ids, log_z, pull)
        ctx.t = t
        return target - log_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, rows, ids, log_z, pull = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide, t = log_z.dtype, ctx.t
        out_h = out_w = out_b = None
        grad = (grad / t)[:, None]
        if pull is not None:
            out_h = _spread(pull * (grad * t), rows, hidden)
            return out_h, None, None, None, None, None
        flat = hidden.reshape(-1, hidden.shape[-1])
        n, vocabulary = rows.numel(), weight.shape[0]
        acc_h = torch.zeros(n, hidden.shape[-1], dtype=wide, device=hidden.device) if needs_hidden else None
        out_w = torch.empty_like(weight) if needs_weight else None
        out_b = torch.empty_like(bias) if needs_bias else None
        for v in range(0, vocabulary, WORDS):
            w = weight[v : v + WORDS]
            acc_w = torch.zeros(w.shape, dtype=wide, device=w.device) if needs_weight else None
            acc_b = torch.zeros(w.shape[0], dtype=wide, device=w.device) if needs_bias else None
            for r in range(0, n, TOKENS):
                s = slice(r, r + TOKENS)
                h = flat[rows[s]]
                p = _product(h, w.t(), wide)
                if bias is not None:
                    p += bias[v : v + WORDS]
                p = (p / t).sub_(log_z[s, None]).exp_()
                if needs_hidden:
                    acc_h[s] += _product(p, w, wide)
                p.mul_(-grad[s])
                here = (ids[s] >= v) & (ids[s] < v + w.shape[0])
                at = here.nonzero()[:, 0]
                p[at, ids[s][at] - v] += grad[s][at, 0]
                if needs_weight:
                    acc_w += _product(p.t(), h, wide)
                if needs_bias:
                    acc_b += p.sum(0)
            if needs_weight:
                out_w[v : v + WORDS] = acc_w
            if needs_bias:
                out_b[v : v + WORDS] = acc_b
        if needs_hidden:
            out_h = _spread((weight[ids].to(wide) - acc_h) * grad, rows, hidden)
        return out_h, out_w, out_b, None, None, None


def _spread(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    out.view(-1, like.shape[-1])[rows] = values.to(like.dtype)
    return out


def plain_head(model: Any) -> Any:
    """The model's output layer if it is a plain ``Linear`` of a floating type and nothing follows it; else None."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
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
    """Last hidden states [B, T, D] from one pass that projects one position only; None if the head is not the end."""
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
