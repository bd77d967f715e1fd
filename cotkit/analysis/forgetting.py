r"""Forgetting: what fine-tuning changed, in the weights, in the words, and as a law over runs.

Conventions: ``base`` is the model before, ``tuned`` the one after; B rows, T tokens, V vocabulary, D hidden.
Logits are unshifted, as the model returns them; losses are in nats per token.
Functions: `token_shift` how the base ranks what the tuned model says; `layer_change` how far each layer
moved; `tuning_contribution` share of fine-tuning in one answer, `steer_tuning` more or less of it;
`forgetting_law`, `fit_forgetting_law` how forgetting grows with trained parameters and steps.

Composed, not offered: forgetting itself is the base's cross-entropy on general text, with the base's own
distribution as target: ``tokens.kl(base_logits, tuned_logits)[mask].mean()``, plus
``tokens.entropy(base_logits)[mask].mean()`` where the paper's cross-entropy is meant rather than its excess.
It falls in a line with the fine-tuning loss: ``numpy.polyfit(losses, forgetting, 1)``.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cotkit import _check
from cotkit._types import Logits, Mask, TokenIds
from cotkit.merge._states import labelled, pieces, same_names, tensors, ties

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "fit_forgetting_law",
    "forgetting_law",
    "layer_change",
    "steer_tuning",
    "token_shift",
    "tuning_contribution",
]


def token_shift(base_logits: Logits, tuned_ids: TokenIds, mask: Mask) -> Int[Tensor, "B T"]:
    r"""Rank that the base model gives to each token of the tuned model's answer.

    $r_t = 1 + |\{v : z_{t-1, v} > z_{t-1, y_t}\}|$

    Decode greedily with the tuned model, run the base over prompt and answer. Rank 1: unshifted, the base
    would have said it too; 2 or 3: marginal; above 3: shifted. Where the shifts lie along the answer tells
    style (its opening words) from content.

    Args:
        base_logits: of the base on the tuned model's text, unshifted, [B, T, V].
        tuned_ids: the text, [B, T].
        mask: True = token of the answer, [B, T]; position 0 has nothing before it that could predict it.

    Returns:
        Ranks from 1 (ties to the best), [B, T]; 0 where nothing counts. Shares:
        ``(ranks[ranks > 0] > 3).double().mean()``.

    Raises:
        ValueError: shapes differ; ids outside the vocabulary or logits that are NaN under the mask (CPU).
        TypeError: a mask that is not bool, ids that are no integers.

    Source: LIT (2024) arXiv:2402.05119 analysis of token distribution shifts
    Basis: memory and notes; the limits 1 and 3 second-hand, from the analysis that introduced them.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> logits = tensor([[[0.1, 0.7, 0.2], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
        >>> token_shift(logits, tensor([[0, 1, 2]]), tensor([[False, True, True]]))  # .7 leads; 0 is last
        tensor([[0, 1, 3]])
    """
    _check.ndim("token_shift", "B T V", base_logits=base_logits)
    _check.ndim("token_shift", "B T", tuned_ids=tuned_ids, mask=mask)
    _check.floating("token_shift", base_logits=base_logits)
    _check.integer("token_shift", tuned_ids=tuned_ids)
    _check.boolean("token_shift", mask=mask)
    if not base_logits.shape[:2] == tuned_ids.shape == mask.shape:
        raise ValueError(
            f"token_shift: expected one [B, T], got base_logits {list(base_logits.shape)}, tuned_ids "
            f"{list(tuned_ids.shape)}, mask {list(mask.shape)}. Pass the logits of every position, unshifted."
        )
    counts = mask[:, 1:]
    words = base_logits.shape[-1]
    if mask.device.type == "cpu":
        asked = tuned_ids[:, 1:][counts]
        if bool(((asked < 0) | (asked >= words)).any()):
            raise ValueError(f"token_shift: expected ids in [0, {words}) where they count, got others.")
        if bool(base_logits[:, :-1][counts].isnan().any()):
            raise ValueError("token_shift: expected logits without NaN, got NaN where they count.")
    before, ids = base_logits[:, :-1], tuned_ids[:, 1:].long().clamp(0, words - 1)
    ranks = 1 + (before > before.gather(-1, ids[..., None])).sum(-1)
    return torch.nn.functional.pad(torch.where(counts, ranks, 0), (1, 0))


def layer_change(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, group: str | None = None
) -> "DataFrame":
    r"""How far training moved each group of weights: $\|W' - W\|_F$ and $\|W' - W\|_F / \|W\|_F$.

    Args:
        before: state before training, a copy: ``{n: w.clone() for n, w in model.state_dict().items()}``, or
            ``merge.checkpoint(path)``, which reads one tensor at a time.
        after: state after it, same names, shapes and types.
        group: regular expression searched in the names; names without a match are left out. Its named groups
            become columns, ``r"layers\.(?P<layer>\d+)\..*?(?P<module>\w+)_proj"`` for layer by module;
            unnamed ones, joined by "/", or else what it matched, the column "group". None: each tensor.

    Returns:
        DataFrame: the columns of the group (text), ``change`` and ``norm`` (of the weights before),
        ``relative`` = change / norm, NaN where all weights were 0 before; in the order of the names. Norms
        are sums over all tensors of the group, in float64. Tied tensors count once, under their first name,
        integers not at all.

    Raises:
        ValueError: names, shapes or types differ, a tensor is not finite, no name matches, ``before`` shares
            its memory with ``after`` (training has changed both).
        TypeError: no states.

    Source: Massive SFT (2025) arXiv:2506.14681 weight change per layer
    Source: Scalpel vs. Hammer (2025) arXiv:2507.10616 weight change per layer and module
    Basis: second-hand; the exact norm of both unverified.
    Differs: nothing known.

    Example:
        >>> from torch import tensor
        >>> old = {f"layers.{i}.w": tensor([3.0, 4.0]) for i in range(2)}
        >>> new = {"layers.0.w": tensor([3.0, 4.0]), "layers.1.w": tensor([3.0, 3.0])}
        >>> layer_change(old, new, group=r"layers\.(?P<layer>\d+)\.")  # no change; 1 of 5
          layer  change  norm  relative
        0     0     0.0   5.0       0.0
        1     1     1.0   5.0       0.2
    """
    from pandas import DataFrame

    states = labelled("layer_change", {"before": before, "after": after})
    pattern = re.compile(".*" if group is None else group)
    columns = list(pattern.groupindex) or ["group"]
    names, shared = same_names("layer_change", states), ties("layer_change", states)
    sums: dict[tuple[str, ...], list[float]] = {}
    for name in names:
        found = pattern.search(name)
        if found is None or name in shared:
            continue
        old, new = tensors("layer_change", name, states)
        if not old.is_floating_point():
            continue
        if old.numel() and old.data_ptr() == new.data_ptr():
            raise ValueError(
                f"layer_change: expected weights before as a copy, got {name!r} in the memory of after. "
                f"Clone the state before training."
            )
        key = tuple(found.groupdict().values()) or ("/".join(found.groups()) or found[0],)
        moved, size = sums.setdefault(key, [0.0, 0.0])
        for _, (a, b) in pieces([old, new], torch.float64):
            moved += float((b - a).square().sum())
            size += float(a.square().sum())
        sums[key] = [moved, size]
    if not sums:
        raise ValueError(f"layer_change: expected names that match {group!r}, got none of {len(names)}.")
    return DataFrame(
        [
            (*key, moved**0.5, size**0.5, (moved / size) ** 0.5 if size else math.nan)
            for key, (moved, size) in sums.items()
        ],
        columns=[*columns, "change", "norm", "relative"],
    )


def tuning_contribution(
    base_blocks: Sequence[Callable[[Tensor], Tensor]],
    tuned_blocks: Sequence[Callable[[Tensor], Tensor]],
    hidden: Tensor,
    *,
    last: int | Tensor = -1,
) -> Tensor:
    r"""TuCo: the share that fine-tuning has in what the model computes for one prompt.

    Follow the tuned model; at each layer split its update of the residual stream into what the base's layer
    would add there and the rest, and add both up over the layers:

    $$\mathrm{TuCo} = \frac{\|\sum_l f_l\|_1}{\|\sum_l p_l\|_1 + \|\sum_l f_l\|_1},\qquad
    p_l = \mathrm{PT}_l(x_l),\; f_l = \mathrm{FT}_l(x_l) - p_l,\; x_{l+1} = x_l + p_l + f_l$$

    Args:
        base_blocks: per layer of the base, hidden [B, T, D] -> what it adds, block(x) - x; with LoRA, the
            model with its adapter off.
        tuned_blocks: the same of the tuned model.
        hidden: x_0, the tuned model's embeddings of the prompts, [B, T, D].
        last: position of the last token: one number, or [B] for rows that are padded on the right.

    Returns:
        [B], in [0, 1]: 0 both models do the same, 1 the base adds nothing; 0 where neither adds anything.

    Raises:
        ValueError: layers that differ in number, no layers, shapes that do not fit, ``last`` outside T.

    Source: TuCo (2025) arXiv:2506.23423 Definition 4.3, Algorithm 1
    Basis: paper.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> up, both = (lambda x: x * 0 + tensor([1.0, 0.0])), (lambda x: x * 0 + tensor([1.0, 3.0]))
        >>> tuning_contribution([up], [both], tensor([[[0.0, 0.0]]]))  # |(0, 3)| / (|(1, 0)| + |(0, 3)|)
        tensor([0.7500])
    """
    _check_blocks("tuning_contribution", base_blocks, tuned_blocks, hidden)
    at = torch.as_tensor(last, device=hidden.device)
    if at.dim() > 1 or (at.dim() == 1 and len(at) != len(hidden)):
        raise ValueError(f"tuning_contribution: expected last as a number or [B], got {list(at.shape)}.")
    width = hidden.shape[1]
    if at.device.type == "cpu" and not bool(((at >= -width) & (at < width)).all()):
        raise ValueError(f"tuning_contribution: expected last among {width} tokens, got {at.tolist()}.")
    rows, at = torch.arange(len(hidden), device=hidden.device), (at % width).expand(len(hidden))
    x, base, rest = hidden, 0.0 * hidden[rows, at], 0.0 * hidden[rows, at]
    for p, f in _split(base_blocks, tuned_blocks):
        added = p(x)
        change = f(x) - added
        base, rest = base + added[rows, at], rest + change[rows, at]
        x = x + added + change
    above, below = rest.abs().sum(-1), base.abs().sum(-1) + rest.abs().sum(-1)
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)


def steer_tuning(
    base_blocks: Sequence[Callable[[Tensor], Tensor]],
    tuned_blocks: Sequence[Callable[[Tensor], Tensor]],
    hidden: Tensor,
    *,
    alpha: float = 1.0,
) -> Tensor:
    r"""Turn fine-tuning up or down at run time: $x_{l+1} = x_l + p_l + \alpha f_l$.

    Args:
        base_blocks: as in ``tuning_contribution``.
        tuned_blocks: as there.
        hidden: x_0, [B, T, D].
        alpha: 1 the tuned model, 0 the base's layers; above 1 more tuned than trained. Paper: 0.75 to 1.25.

    Returns:
        [B, T, D] after the last layer, for the tuned model's final norm and head.

    Raises:
        ValueError: layers that differ in number, no layers, shapes that do not fit.

    Source: TuCo (2025) arXiv:2506.23423 scaling of the fine-tuning component
    Basis: paper.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> up, both = (lambda x: x * 0 + tensor([1.0, 0.0])), (lambda x: x * 0 + tensor([1.0, 3.0]))
        >>> steer_tuning([up], [both], tensor([[[0.0, 0.0]]]), alpha=0.5)
        tensor([[[1.0000, 1.5000]]])
    """
    _check_blocks("steer_tuning", base_blocks, tuned_blocks, hidden)
    _check.finite("steer_tuning", alpha=alpha)
    x = hidden
    for p, f in _split(base_blocks, tuned_blocks):
        added = p(x)
        x = x + added + alpha * (f(x) - added)
    return x


def _split(base: Sequence[Any], tuned: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(base, tuned, strict=True))


def _check_blocks(fn: str, base: Sequence[Any], tuned: Sequence[Any], hidden: Tensor) -> None:
    _check.ndim(fn, "B T D", hidden=hidden)
    _check.floating(fn, hidden=hidden)
    if not len(base) or len(base) != len(tuned):
        raise ValueError(
            f"{fn}: expected as many base_blocks as tuned_blocks, got {len(base)}, {len(tuned)}."
        )


def forgetting_law(
    parameters: float | Sequence[float] | np.ndarray,
    steps: float | Sequence[float] | np.ndarray,
    *,
    a: float,
    alpha: float,
    b: float,
    beta: float,
    rho: float,
    s: float,
) -> np.ndarray:
    r"""Shifted power law of forgetting in trained parameters P and steps N.

    $$L_f(P, N) = s - \Big[\Big(\frac aP\Big)^\alpha + \Big(\frac bN\Big)^\beta\Big]^\rho$$

    It grows in both and levels off at s: fewer parameters or fewer steps only move along the same curve.

    Args:
        parameters: P > 0, trained parameters; a number, or one per point.
        steps: N > 0, update steps, likewise.
        a: scale of P, > 0.
        alpha: exponent of P.
        b: scale of N, > 0.
        beta: exponent of N.
        rho: outer exponent.
        s: forgetting at the end of all growth, nats.

    Returns:
        Forgetting in nats, float64, in the shape that ``parameters`` and ``steps`` have together.

    Raises:
        ValueError: a value that is not above 0 where it must be.

    Source: Forgetting laws (2024) arXiv:2401.05605 joint law
    Basis: memory: the shifted power law, increasing in both, is the abstract's; how the exponents are nested
        is not verified.
    Differs: the factor in front of the bracket is left out, since a and b absorb it.

    Example:
        >>> law = {"a": 4.0, "alpha": 0.5, "b": 9.0, "beta": 0.5, "rho": 1.0, "s": 3.0}
        >>> forgetting_law(16, [36, 9], **law).tolist()  # 3 - 1/2 - 1/2; 3 - 1/2 - 1
        [2.0, 1.5]
    """
    _check.positive("forgetting_law", a=a, b=b)
    _check.finite("forgetting_law", alpha=alpha, beta=beta, rho=rho, s=s)
    p, n = _points("forgetting_law", parameters, steps)
    return np.asarray(s - ((a / p) ** alpha + (b / n) ** beta) ** rho)


def fit_forgetting_law(
    parameters: Sequence[float] | np.ndarray,
    steps: Sequence[float] | np.ndarray,
    forgetting: Sequence[float] | np.ndarray,
) -> dict[str, float]:
    r"""Fit the shifted power law to runs: least squares, the same result every time.

    The scale and s are solved for exactly at each trial of the four other numbers, which a damped
    Gauss-Newton search improves from a grid of starts.

    Args:
        parameters: trained parameters P of each point, > 0; two different ones at least.
        steps: update steps N of each point, > 0; two different ones at least.
        forgetting: measured forgetting, nats; at least seven points for six constants. For the fine-tuning
            loss, which falls, fit its negative.

    Returns:
        ``{"a", "alpha", "b", "beta", "rho", "s"}`` for ``forgetting_law``. The exponents are only as certain
        as the range of P and N is wide: judge by the fit to points that were left out, not by them.

    Raises:
        ValueError: lengths differ, too few points or values, a value that is not finite, forgetting that
            falls with P and N everywhere.

    Source: Forgetting laws (2024) arXiv:2401.05605 fit of the joint law
    Basis: memory for the form (see ``forgetting_law``); how the authors fitted is not known.
    Differs: nothing known.

    Example:
        >>> p, n = [1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 16.0, 16.0], [1.0, 9.0, 81.0, 1.0, 9.0, 81.0, 1.0, 9.0]
        >>> values = forgetting_law(p, n, a=1.0, alpha=0.5, b=1.0, beta=0.5, rho=1.0, s=3.0)
        >>> law = fit_forgetting_law(p, n, values)
        >>> bool(abs(forgetting_law(p, n, **law) - values).max() < 1e-6)
        True
    """
    fn = "fit_forgetting_law"
    p, n = _points(fn, parameters, steps)
    y = np.asarray(forgetting, dtype=float)
    if y.ndim != 1 or not p.shape == n.shape == y.shape or not np.isfinite(y).all():
        raise ValueError(
            f"{fn}: expected one finite forgetting per point, got parameters {list(p.shape)}, steps "
            f"{list(n.shape)}, forgetting {list(y.shape)}."
        )
    if len(y) < 7 or len(set(p)) < 2 or len(set(n)) < 2:
        raise ValueError(f"{fn}: expected seven points or more, of several P and N, got {len(y)}.")
    log_p, log_n = np.log(p), np.log(n)
    mid_p, mid_n = log_p.mean(), log_n.mean()
    x = np.stack([log_p - mid_p, log_n - mid_n])

    def solve(theta: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Residuals, and the logarithm of the scale and s that make them smallest."""
        alpha, beta, rho = np.exp(theta[:3])
        power = rho * np.logaddexp(-alpha * x[0], theta[3] - beta * x[1])
        g = np.exp(power - power.max())
        centred, size = g - g.mean(), y - y.mean()
        scale = max(-(centred @ size) / max(centred @ centred, 1e-300), 0.0)
        log_scale = float(np.log(scale) - power.max()) if scale else -math.inf
        return size + scale * centred, log_scale, float(y.mean() + scale * g.mean())

    def residuals(theta: np.ndarray) -> np.ndarray:
        return solve(theta)[0]

    starts = (_descend(residuals, np.log(np.array(start))) for start in product(*_STARTS))
    best = min(starts, key=lambda theta: float(np.square(residuals(theta)).sum()))
    _, log_scale, s = solve(best)
    if log_scale == -math.inf:
        raise ValueError(f"{fn}: expected forgetting that grows with P or N, got none. Is its sign right?")
    alpha, beta, rho = (float(v) for v in np.exp(best[:3]))
    return {
        "a": float(np.exp(mid_p + log_scale / rho / alpha)),
        "alpha": alpha,
        "b": float(np.exp(mid_n + (best[3] + log_scale / rho) / beta)),
        "beta": beta,
        "rho": rho,
        "s": s,
    }


_STARTS = ((0.2, 0.8), (0.2, 0.8), (0.5, 1.5), (0.3, 3.0))  # alpha, beta, rho, weight of N against P
_WIDEST = np.array([3.0, 3.0, 3.0, 12.0])  # how far the logarithms of the four may go


def _descend(residuals: Callable[[np.ndarray], np.ndarray], theta: np.ndarray) -> np.ndarray:
    """Levenberg-Marquardt with differences for the derivatives."""
    r, damping = residuals(theta), 1e-2
    for _ in range(200):
        steps = 1e-6 * np.eye(len(theta))
        slope = np.stack([(residuals(theta + h) - residuals(theta - h)) / 2e-6 for h in steps], 1)
        normal, pull = slope.T @ slope, slope.T @ r
        while damping < 1e12:
            lift = damping * (normal.diagonal().max() + 1e-30)
            move = np.linalg.solve(normal + lift * np.eye(len(theta)), pull)
            tried = np.clip(theta - move, -_WIDEST, _WIDEST)
            found = residuals(tried)
            if found @ found < r @ r:
                break
            damping *= 4
        else:
            return theta
        gained = 1 - (found @ found) / (r @ r)
        theta, r, damping = tried, found, max(damping / 8, 1e-14)
        if gained < 1e-12:
            break
    return theta


def _points(fn: str, parameters: Any, steps: Any) -> tuple[np.ndarray, np.ndarray]:
    p, n = np.asarray(parameters, dtype=float), np.asarray(steps, dtype=float)
    for name, v in (("parameters", p), ("steps", n)):
        if not v.size or not np.isfinite(v).all() or not (v > 0).all():
            raise ValueError(f"{fn}: expected finite {name} > 0, got {v.tolist()}.")
    return p, n
