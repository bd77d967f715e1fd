r"""Learning dynamics: what one step of descent on one example does to the predictions for others.

Conventions: probabilities and log-probabilities are over a vocabulary V, in nats; ``lr`` is the step size.
Functions: `squeeze` a step away from one token in a single softmax; `entk` kernel that says how far a step on
one input moves the logits of another; `flat_grad` a loss's gradient as one vector.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cotkit import _check

__all__ = ["entk", "flat_grad", "squeeze"]


def squeeze(
    logits: Float[Tensor, "B V"],
    negative: Int[Tensor, "B"],
    *,
    positive: Int[Tensor, "B"] | None = None,
    lr: float = 1.0,
) -> Float[Tensor, "B V"]:
    r"""One step of pushing a token down in a softmax: its mass goes to the likeliest other one.

    $$z' = z + \eta\,(\pi - e_{y^-}) - \eta\,(\pi - e_{y^+}),\qquad \pi' = \mathrm{softmax}(z')$$

    without the second bracket unless ``positive`` is given. The negative part adds $\eta\,\pi_v$ to every
    other logit, most to the token that leads already: the likeliest other token always rises, unlikely ones
    fall, the more so the peakier $\pi$ is, and even where $y^-$ had hardly any mass to give. It is what
    off-policy DPO does to a model that would never have written the rejected answers.

    Args:
        logits: one softmax per row, [B, V].
        negative: token pushed down, ids, [B].
        positive: token raised in the same step (DPO's chosen one), ids, [B]. None: none. Both together shift
            mass between the two, and the pi of the two brackets cancel.
        lr: eta, step size on the logits, >= 0. A linear layer with inputs x takes lr * |x|^2.

    Returns:
        Probabilities after the step, [B, V]; ``.log()`` of them serves as logits of the next step.

    Raises:
        ValueError: shapes differ, ``lr < 0``.
        TypeError: ids that are no integers.

    Source: Learning dynamics (2024) arXiv:2407.10490 notebook squeeze_effect of the released code
    Basis: authors' code: equal to its numbers.
    Differs: the step acts on the logits themselves; the code's on a linear layer above one random input,
        which is the same with another step size.

    Example:
        >>> from torch import tensor
        >>> before = tensor([[0.6, 0.3, 0.1]])
        >>> squeeze(before.log(), tensor([2]))  # e^.6 * .6, e^.3 * .3, e^-.9 * .1, over their sum
        tensor([[0.7104, 0.2631, 0.0264]])
    """
    _check.floating("squeeze", logits=logits)
    _check.ndim("squeeze", "B V", logits=logits)
    _check.at_least("squeeze", 0, lr=lr)
    pi = logits.softmax(-1)
    step = pi - _one_hot("negative", negative, logits)
    if positive is not None:
        step = step - (pi - _one_hot("positive", positive, logits))
    return (logits + lr * step).softmax(-1)


def _one_hot(name: str, ids: Tensor, like: Tensor) -> Tensor:
    """Return rows [B, V] with a 1 at the id."""
    _check.integer("squeeze", **{name: ids})
    if ids.shape != like.shape[:1]:
        raise ValueError(
            f"squeeze: expected {name} [B] with B = {len(like)}, got {list(ids.shape)}. Pass one id per row."
        )
    return torch.zeros_like(like).scatter(1, ids.long()[:, None], 1.0)


def entk(
    forward: Callable[[dict[str, Tensor], Any], Tensor],
    params: Mapping[str, Tensor],
    x_a: Any,
    x_b: Any,
) -> Float[Tensor, "V V"]:
    r"""Empirical neural tangent kernel of the logits: how a step on one input moves those of another.

    $$K(a, b) = \nabla_\theta z(a)\,\nabla_\theta z(b)^\top$$

    A step of size $\eta$ on a loss at $b$ whose gradient in the logits is $G$ changes the log-probs at $a$ by
    $-\eta\,A\,K\,G$ up to $\eta^2$, with $A = I - \mathbf 1\,\pi(a)^\top$: for fine-tuning
    $G = \pi(b) - e_y$, for DPO $\pm\beta\,(1 - \sigma(h))$ times that.

    Args:
        forward: ``forward(params, x)`` gives the logits [V] of one input; for a module
            ``lambda p, x: torch.func.functional_call(model, p, (x,))``.
        params: parameters by name, e.g. ``dict(model.named_parameters())``.
        x_a: the input that is looked at, whatever ``forward`` takes.
        x_b: the input that is trained on.

    Returns:
        [V, V], rows for a, columns for b, without gradient. Memory: V times the parameters, twice; for tiny
        models or a few parameters.

    Raises:
        ValueError: no parameters, or ``forward`` does not give one vector.

    Source: Learning dynamics (2024) arXiv:2407.10490 Prop. 1
    Basis: paper (via its code and our notes); the number of the proposition from memory.
    Differs: nothing.

    Example:
        >>> weight = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
        >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])
        >>> entk(lambda p, x: p["w"] @ x, weight, x, y)  # a linear layer: (x . y) times the identity
        tensor([[2., 0.],
                [0., 2.]])
    """
    held = {name: p.detach() for name, p in params.items()}
    if not held:
        raise ValueError("entk: expected parameters, got none. Pass dict(model.named_parameters()).")
    kernel: Any = 0.0
    jacobian = torch.func.jacrev(forward)
    at_a, at_b = jacobian(held, x_a), jacobian(held, x_b)
    for name, p in held.items():
        if at_a[name].dim() != p.dim() + 1:
            got = list(at_a[name].shape[: at_a[name].dim() - p.dim()])
            raise ValueError(f"entk: expected logits [V] of one input, got {got}. Pick one position.")
        kernel = kernel + at_a[name].flatten(1) @ at_b[name].flatten(1).T
    return kernel


def flat_grad(loss: Tensor, params: Iterable[Tensor]) -> Float[Tensor, "P"]:
    r"""Gradient of a scalar with respect to all parameters, as one vector.

    The cosine of two of them says whether two examples pull the model the same way; the dot product times the
    step size is what a step on the one does to the loss of the other, to first order.

    Args:
        loss: a scalar with a graph; the graph is kept, so that several losses of one pass can be compared.
        params: parameters in the order of the result, e.g. ``model.parameters()``.

    Returns:
        [P], 0 where the loss does not depend on a parameter or the parameter is frozen.

    Raises:
        ValueError: ``loss`` is not a scalar or has no graph, no parameters.

    Source: Learning dynamics (2024) arXiv:2407.10490 the first-order term of its Prop. 1
    Basis: definition.
    Differs: nothing.

    Example:
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> flat_grad((w**2).sum(), [w])
        tensor([6., 8.])
    """
    listed = list(params)
    _check.is_tensor("flat_grad", loss=loss)
    if loss.dim() != 0 or not loss.requires_grad:
        raise ValueError(
            f"flat_grad: expected loss as a scalar with a graph, got shape {list(loss.shape)}, requires_grad "
            f"{loss.requires_grad}. Score the batch with grad=True and reduce it."
        )
    if not listed:
        raise ValueError("flat_grad: expected parameters, got none. Pass model.parameters().")
    trained = [p for p in listed if p.requires_grad]
    found = iter(torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True) if trained else ())
    parts = [next(found) if p.requires_grad else None for p in listed]
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(listed, parts, strict=True)
        ]
    )
