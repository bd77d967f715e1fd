"""Model stock: how far from the centre the mean of a few models is, read off the angles between them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cotkit import _check
from cotkit.merge._states import each, labelled, like, pieces, same_names, tensors, ties, wide

_POLE = 1e-6  # 1 + (N - 1) cos below it: the deltas cancel, and t runs away


def cosines(
    base: Mapping[str, Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    group: Callable[[str], str | int | None] | None = None,
) -> dict[str | int, Tensor]:
    r"""Cosines of the angles between task vectors, $\frac{\tau_i \cdot \tau_j}{\|\tau_i\|\,\|\tau_j\|}$.

    Near 1: fine-tuned the same way. Near 0: the models left the base in unrelated directions, which is what
    lets task vectors be added.

    Args:
        base: state of the common ancestor.
        states: fine-tuned models, N of them.
        group: name -> what to count together (a block, the whole model: ``lambda name: "all"``); None leaves
            a tensor out. Default: each tensor by itself.

    Returns:
        Per group a matrix [N, N] in float64; 0 beside a delta that is zero. Tied tensors count once, under
        their first name.

    Raises:
        ValueError: as in ``delta``; no states.
        TypeError: as in ``delta``.

    Source: Model Stock (2024) arXiv:2403.19522 angle between fine-tuned weights
    Source: Task arithmetic (2022) arXiv:2212.04089 cosines between task vectors
    Basis: definition.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> base = {"w": tensor([1.0, 1.0])}
        >>> cosines(base, [{"w": tensor([1.0, 2.0])}, {"w": tensor([4.0, 5.0])}])["w"]  # (0, 1) and (3, 4)
        tensor([[1.0000, 0.8000],
                [0.8000, 1.0000]], dtype=torch.float64)
    """
    named = labelled("cosines", {"base": base}, {"states": states})
    sums: dict[str | int, Tensor] = {}
    shared = ties("cosines", named)
    for name in same_names("cosines", named):
        if name in shared:
            continue
        key = name if group is None else group(name)
        xs = tensors("cosines", name, named)
        if key is not None and xs[0].is_floating_point():
            gram = _gram(xs)
            sums[key] = sums[key] + gram if key in sums else gram
    return {key: _cosine(gram) for key, gram in sums.items()}


def _gram(xs: list[Tensor]) -> Tensor:
    """Inner products [N, N] of the deltas of xs[1:] from xs[0], in float64."""
    total = torch.zeros(len(xs) - 1, len(xs) - 1, dtype=torch.float64, device=xs[0].device)
    for _, (start, *parts) in pieces(xs, wide(xs[0])):
        taus = torch.stack([part - start for part in parts])
        total += (taus @ taus.T).double()
    return total


def _cosine(gram: Tensor) -> Tensor:
    size = gram.diagonal().sqrt()
    product = size[:, None] * size
    return torch.where(product > 0, gram / product.clamp(min=torch.finfo(torch.float64).tiny), 0.0).clamp(
        -1, 1
    )


def stock_ratio(cosine: float, n: int) -> float:
    r"""How much of the mean of n models to take: $t = \frac{n \cos\theta}{1 + (n - 1)\cos\theta}$.

    The point on the line from the base to the mean that is nearest to the centre of all fine-tuned models, if
    these lie on a sphere around it and their deltas meet at one angle.

    Args:
        cosine: cosine of the angle between the deltas, mean over pairs; at least -1 / (n - 1), as it always
            is.
        n: number of models, at least 2.

    Returns:
        t: 1 the mean, 0 the base; negative where the models disagree. 0 where the deltas cancel,
        cosine = -1 / (n - 1): t has a pole there.

    Raises:
        ValueError: ``n < 2``, a cosine outside its range.
        TypeError: ``n`` no int.

    Source: Model Stock (2024) arXiv:2403.19522 Eq. of the interpolation ratio, N = 2 and general N
    Basis: second-hand, and equal to mergekit's model_stock; the authors released no code.
    Differs: nothing.

    Example:
        >>> round(stock_ratio(0.5, 2), 4), stock_ratio(0.5, 3)  # 1 / 1.5; 1.5 / 2
        (0.6667, 0.75)
    """
    _check.integers("stock_ratio", n=n)
    _check.at_least("stock_ratio", 2, n=n)
    _check.between("stock_ratio", -1 / (n - 1) - 1e-9, 1 + 1e-9, cosine=cosine)
    below = 1 + (n - 1) * cosine
    return 0.0 if below < _POLE else n * cosine / below


def model_stock(
    base: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]], *, clamp: bool = False
) -> dict[str, Tensor]:
    r"""Model stock: the mean of a few models, pulled to the base by as much as their angle says.

    $$\theta = t\,\bar\theta + (1 - t)\,\theta_0,\qquad t = \frac{N\cos\theta}{1 + (N - 1)\cos\theta}$$

    per tensor, with the mean cosine over all pairs of deltas. Two models do where soups need dozens. Called
    after each epoch on models in training, it is the periodic variant.

    Args:
        base: the pre-trained state theta_0.
        states: fine-tuned models, at least two.
        clamp: take t = 0 (the base) where the deltas point apart, rather than a step away from both.

    Returns:
        A state. Where a delta is zero (a frozen tensor) its cosines count as 0.

    Raises:
        ValueError: as in ``average``; fewer than two states.
        TypeError: as in ``average``.

    Source: Model Stock (2024) arXiv:2403.19522 layer-wise merge
    Basis: second-hand; equal to mergekit's model_stock. One angle for more than two models: the mean of the
        cosines, as in mergekit; the paper takes all angles as equal.
    Differs: mergekit raises the product of two norms to at least 1e-6, so very small deltas count as
        orthogonal there; here only zero ones do.

    Example:
        >>> from torch import tensor
        >>> base, a = {"w": tensor([0.0, 0.0])}, {"w": tensor([5.0, 0.0])}
        >>> model_stock(base, [a, {"w": tensor([3.0, 4.0])}])  # cos .6, t = 1.2 / 1.6 = .75; mean (4, 2)
        {'w': tensor([3.0000, 1.5000])}
    """

    def rule(_: str, xs: list[Tensor]) -> Tensor:
        n = len(xs) - 1
        pairs = _cosine(_gram(xs)).triu(1).sum() / (n * (n - 1) / 2)
        t = stock_ratio(max(float(pairs), -1 / (n - 1)), n)
        share = (max(t, 0.0) if clamp else t) / n
        made, flat = like(xs[0])
        for where, (start, *parts) in pieces(xs, wide(xs[0])):
            out = start
            for part in parts:
                out = out.add(part - start, alpha=share)
            flat[where] = out
        return made

    named = labelled("model_stock", {"base": base}, {"states": states}, at_least=2)
    return each("model_stock", named, rule)
