"""Soups: averages of models that were fine-tuned from one start, and which of them to average."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cotkit import _check
from cotkit.merge._states import each, labelled, like, pieces, wide


def average(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    r"""Uniform soup: the (weighted) mean of models, $\sum_i w_i \theta_i / \sum_i w_i$.

    All must descend from one pre-trained model: the mean of strangers is noise. Fine-tunes of one data set
    with other settings make a soup; fine-tunes on K disjoint parts of the data make disperse-then-merge.

    Args:
        states: models with the same names, shapes and types; at least one.
        weights: one per state, >= 0, not all 0. None: equal.

    Returns:
        A state; a model alone, or several that are equal, come back bit for bit.

    Raises:
        ValueError: names, shapes, types or devices differ, a tensor is not finite, LoRA factors, no states,
            weights that do not fit.
        TypeError: no state dicts, quantised weights.

    Source: Model soups (2022) arXiv:2203.05482 uniform soup
    Source: DTM (2024) arXiv:2405.13432 the merge (weights 1/K)
    Source: POINTS (2024) arXiv:2409.04828 average soup over data mixtures
    Source: CoT Encyclopedia (2025) arXiv:2505.10185 interpolation of two formats
    Basis: authors' code for the soup: equal to its numbers, and to mergekit's ``linear``; second-hand for the
        others.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> average([{"w": tensor([1.0, 2.0])}, {"w": tensor([3.0, 6.0])}], weights=[3, 1])
        {'w': tensor([1.5000, 3.0000])}
    """
    named = labelled("average", {}, {"states": states})
    shares = _shares(len(states), weights)
    anchor = max(range(len(shares)), key=shares.__getitem__)

    def rule(_: str, xs: list[Tensor]) -> Tensor:
        made, flat = like(xs[0])
        for where, parts in pieces(xs, wide(xs[0])):
            out = parts[anchor]  # x + sum w (y - x): exact where all agree, as a sum of thirds is not
            for i, part in enumerate(parts):
                if i != anchor and shares[i]:
                    out = out.add(part - parts[anchor], alpha=shares[i])
            flat[where] = out
        return made

    return each("average", named, rule, linear=all(shares))


def _shares(n: int, weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [1 / n] * n
    if len(weights) != n:
        raise ValueError(f"average: expected one weight per state, got {len(weights)} for {n} states.")
    for w in weights:
        _check.at_least("average", 0, weights=w)
    if not sum(weights) > 0:
        raise ValueError("average: expected a weight above 0, got none.")
    return [w / sum(weights) for w in weights]


def greedy_soup(
    states: Sequence[Mapping[str, Tensor]],
    evaluate: Callable[[dict[str, Tensor]], float],
    *,
    strict: bool = False,
) -> tuple[dict[str, Tensor], list[int]]:
    r"""Greedy soup: add models from the best down, and keep each one that does not lower the score.

    Args:
        states: models as in ``average``; ``checkpoint(path)`` each, and memory holds one soup and one tensor
            of each ingredient.
        evaluate: state -> score on held-out data, larger is better; called 2N - 1 times at most.
        strict: keep a model only if the score rises.

    Returns:
        The soup, and the numbers of its ingredients in the order they went in. Its score is never below that
        of the best single model.

    Raises:
        ValueError: as in ``average``; a score that is not finite.
        TypeError: as in ``average``.

    Source: Model soups (2022) arXiv:2203.05482 Recipe 1
    Source: POINTS (2024) arXiv:2409.04828 greedy soup over data mixtures
    Basis: authors' code: equal soups and ingredients; the paper's >= from memory.
    Differs: the released code keeps a model only if the score rises (``strict=True``), and of two equal
        scores it takes the later model first, we the earlier.

    Example:
        >>> from torch import tensor
        >>> models = [{"w": tensor([x])} for x in (0.0, 4.0, 9.0)]
        >>> soup, chosen = greedy_soup(models, lambda s: -abs(float(s["w"]) - 2.5))  # 4 alone, then 0 and 4
        >>> soup, chosen
        ({'w': tensor([2.])}, [1, 0])
    """

    def score(state: dict[str, Tensor]) -> float:
        found = float(evaluate(state))
        _check.finite("greedy_soup", **{"evaluate's score": found})
        return found

    labelled("greedy_soup", {}, {"states": states})
    alone = [score(average([state])) for state in states]
    first, *others = sorted(range(len(states)), key=lambda i: -alone[i])
    chosen, best = [first], alone[first]
    soup = average([states[first]])
    for i in others:
        tried = average([states[j] for j in (*chosen, i)])
        found = score(tried)
        if found > best or (found == best and not strict):
            chosen, best, soup = [*chosen, i], found, tried
    return soup, chosen


def select_experts(
    target: Tensor | Sequence[float],
    domains: Tensor | Sequence[Sequence[float]],
    scores: Tensor | Sequence[float],
    *,
    k: int = 3,
) -> tuple[list[int], list[int]]:
    r"""SaM: which experts to merge for a new domain, by likeness of its texts and by how they do on a sample.

    Merge each list into a model of its own (``average``), let both answer and join their answers.

    Args:
        target: mean embedding of the new domain's texts, D numbers; no labels needed.
        domains: mean embedding of each expert's domain, [N, D].
        scores: score of each expert on a few texts of the new domain, larger is better; where there are no
            labels, against what most experts say.
        k: experts per list.

    Returns:
        Expert numbers: the k nearest by cosine, and the k best by score, best first; of equals the lower
        number first.

    Raises:
        ValueError: sizes that do not fit, ``k`` outside 1..N, an embedding of length 0, a value not finite.
        TypeError: ``k`` no int.

    Source: SaM (2025) arXiv:2506.22813 selection of experts
    Basis: second-hand, from the abstract; pseudo-labels and the value of k unverified.
    Differs: embeddings and scores are the caller's.

    Example:
        >>> select_experts([1.0, 0.2], [[0.0, 1.0], [3.0, 0.0], [1.0, 1.0]], [0.5, 0.1, 0.7], k=2)
        ([1, 2], [2, 0])
    """
    at, pool, found = (_numbers(x) for x in (target, domains, scores))
    if pool.dim() != 2 or at.shape != pool.shape[1:] or found.shape != pool.shape[:1]:
        raise ValueError(
            f"select_experts: expected target [D], domains [N, D], scores [N], got {list(at.shape)}, "
            f"{list(pool.shape)}, {list(found.shape)}."
        )
    _check.integers("select_experts", k=k)
    _check.between("select_experts", 1, len(pool), k=k)
    for name, x in (("target", at), ("domains", pool), ("scores", found)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"select_experts: expected finite {name}, got NaN or infinity.")
    lengths = pool.norm(dim=1)
    if not bool(at.norm() > 0) or not bool((lengths > 0).all()):
        raise ValueError("select_experts: expected embeddings, got one that is all zeros.")
    likeness = (pool / lengths[:, None]) @ at

    def best(values: Tensor) -> list[int]:
        return values.argsort(descending=True, stable=True)[:k].tolist()

    return best(likeness), best(found)


def _numbers(x: Any) -> Tensor:
    return torch.as_tensor(x).detach().double()
