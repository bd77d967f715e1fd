"""Task vectors: what fine-tuning changed, scaled, added up and put back."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from cotkit import _check
from cotkit.merge._states import each, labelled, like, pieces, same_names, tensors, ties, wide


def delta(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""What fine-tuning changed: $\tau = \theta - \theta_0$, the task vector.

    Args:
        tuned: state of the fine-tuned model, theta.
        base: state it started from, theta_0: same names, shapes and types.

    Returns:
        A state with the differences, in float32 for float16 and bfloat16 models (their difference needs
        digits that they do not have); integers as in ``tuned``. Tied tensors stay tied.

    Raises:
        ValueError: names, shapes, types or devices differ, a tensor is not finite, LoRA factors.
        TypeError: no state dicts, quantised weights.

    Source: Task arithmetic (2022) arXiv:2212.04089 task vector
    Source: LT-SFT (2021) arXiv:2110.07560 the sparse difference phi
    Basis: definition.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> delta({"w": tensor([1.5, -2.0])}, {"w": tensor([1.0, 1.0])})
        {'w': tensor([ 0.5000, -3.0000])}
    """

    def rule(_: str, xs: list[Tensor]) -> Tensor:
        made, flat = like(xs[0], wide(xs[0]))
        for where, (theta, start) in pieces(xs, wide(xs[0])):
            flat[where] = theta - start
        return made

    return each("delta", labelled("delta", {"tuned": tuned, "base": base}), rule, linear=True)


def apply(
    base: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]], *, scale: float = 1.0
) -> dict[str, Tensor]:
    r"""Put task vectors on a model: $\theta_0 + \lambda \sum_i \tau_i$.

    One delta: ``scale`` in (0, 1) lies between the two models, above 1 beyond the tuned one (a shorter or a
    longer chain of thought, where the delta was trained for length), below 0 on the other side of the base.
    Several: the sum of skills, for dense or sparse deltas.

    Args:
        base: state of the common ancestor, theta_0.
        deltas: states from ``delta``, same names and shapes; any float type. None: the base.
        scale: lambda. 0 gives the base.

    Returns:
        A state in the types of ``base``.

    Raises:
        ValueError: as in ``delta``; ``scale`` not finite; the result overflows its type.
        TypeError: as in ``delta``.

    Source: Task arithmetic (2022) arXiv:2212.04089 sum of task vectors
    Source: WiSE-FT (2021) arXiv:2109.01903 interpolation of two models
    Source: CoT-Valve (2025) arXiv:2502.09601 Eq. 2 and its zero-shot MixChain (full fine-tuning)
    Source: LT-SFT (2021) arXiv:2110.07560 composition
    Basis: paper for CoT-Valve, authors' code second-hand for LT-SFT, memory for the others; definitions.
    Differs: nothing.

    Example:
        >>> from torch import tensor
        >>> base = {"w": tensor([1.0, 1.0])}
        >>> apply(base, [{"w": tensor([2.0, 0.0])}, {"w": tensor([0.0, -4.0])}], scale=0.5)
        {'w': tensor([ 2., -1.])}
    """
    _check.finite("apply", scale=scale)

    def rule(_: str, xs: list[Tensor]) -> Tensor:
        made, flat = like(xs[0])
        for where, (start, *rest) in pieces(xs, wide(xs[0])):
            out = start
            for tau in rest:
                out = out.add(tau, alpha=scale)
            flat[where] = out
        return made

    return each(
        "apply", labelled("apply", {"base": base}, {"deltas": deltas}, at_least=0), rule, one_dtype=False
    )


def lines(
    delta: Mapping[str, Tensor],
    block_of: str | Callable[[str], int | None],
    n_blocks: int,
    *,
    alpha: float,
    beta: float,
) -> dict[str, Tensor]:
    r"""LiNeS: scale a task vector by depth, little in the first layers and fully in the last.

    $$\tau'_k = \Big(\alpha + \beta\,\frac{l(k)}{L - 1}\Big)\,\tau_k$$

    with l the block (0-based) of tensor k; what lies outside the blocks (embeddings, head) gets alpha. The
    early layers hold what all tasks share: leaving them near the base keeps the other skills.

    Args:
        delta: a task vector, or a merged one (sum, TIES, ...).
        block_of: name -> number of the block, None outside; or a regular expression whose first group is the
            number, ``r"layers\.(\d+)\."``.
        n_blocks: L, number of blocks; with 1, that block gets alpha.
        alpha: factor of the first block. One task: choose it in [0, 1], on data of both tasks. Several tasks:
            ``lines_alpha``.
        beta: what the last block gets on top. One task: 1 - alpha, so that the last block is kept. Several
            tasks: the coefficient of the merge.

    Returns:
        The scaled delta, types as they came; put it on with ``apply(base, [...])``.

    Raises:
        ValueError: no name lies in a block, a number outside 0..n_blocks - 1, two tied names in different
            blocks, a tensor that is not finite, LoRA factors.
        TypeError: ``n_blocks`` no int, quantised weights.

    Source: LiNeS (2024) arXiv:2410.17146 LiNeS_scaling of the released code
    Basis: authors' code: equal to its numbers; the paper second-hand.
    Differs: the code finds blocks by the text ".l." in a name, takes the lowest l that fits (a number in the
        name of an inner module can mislead it) and divides by 0 with one block.

    Example:
        >>> from torch import tensor
        >>> tau = {f"layers.{i}.w": tensor([4.0]) for i in range(3)} | {"head": tensor([4.0])}
        >>> list(lines(tau, r"layers\.(\d+)\.", 3, alpha=0.25, beta=0.75).values())  # .25, .625, 1; head .25
        [tensor([1.]), tensor([2.5000]), tensor([4.]), tensor([1.])]
    """
    _check.integers("lines", n_blocks=n_blocks)
    _check.at_least("lines", 1, n_blocks=n_blocks)
    _check.finite("lines", alpha=alpha, beta=beta)
    block: Callable[[str], int | None] = _numbered(block_of) if isinstance(block_of, str) else block_of
    numbers = {name: block(name) for name in delta}
    for name, number in numbers.items():
        if number is not None and not 0 <= number < n_blocks:
            raise ValueError(f"lines: expected blocks 0 to {n_blocks - 1}, got {number} for {name!r}.")
    if len(numbers) > 1 and all(number is None for number in numbers.values()):
        raise ValueError(f"lines: expected names inside blocks, got none, e.g. {next(iter(numbers))!r}.")

    def factor(name: str) -> float:
        return alpha + beta * (numbers[name] or 0) / max(n_blocks - 1, 1)

    def rule(name: str, xs: list[Tensor]) -> Tensor:
        made, flat = like(xs[0])
        for where, (tau,) in pieces(xs, wide(xs[0])):
            flat[where] = factor(name) * tau
        return made

    return each("lines", labelled("lines", {"delta": delta}), rule, by_name=factor)


def _numbered(pattern: str) -> Callable[[str], int | None]:
    if re.compile(pattern).groups < 1:
        raise ValueError(f"lines: expected a group for the number in block_of, got {pattern!r}.")

    def block(name: str) -> int | None:
        found = re.search(pattern, name)
        return None if found is None else int(found[1])

    return block


def lines_alpha(deltas: Sequence[Mapping[str, Tensor]], merged: Mapping[str, Tensor]) -> float:
    r"""The first block's factor for LiNeS of several tasks.

    $$\alpha = \frac{\|\sum_i \tau_i\|_1}{N\,\|\tau\|_1}$$

    It gives the first layers the size they have in the mean of the N tasks, however the merge scales its
    result: 1/N for the plain sum, 1 for the mean.

    Args:
        deltas: the task vectors tau_i.
        merged: the merged one, tau: their sum, or what TIES and the like made of them.

    Returns:
        alpha, for ``lines``.

    Raises:
        ValueError: as in ``delta``; ``merged`` is zero.
        TypeError: as in ``delta``.

    Source: LiNeS (2024) arXiv:2410.17146 norms of create_task_vector in the released code
    Basis: authors' code: equal to its numbers; the paper's formula second-hand, without its norm.
    Differs: nothing; the 1-norm is the code's.

    Example:
        >>> from torch import tensor
        >>> a, b = {"w": tensor([3.0, -1.0])}, {"w": tensor([1.0, 1.0])}
        >>> lines_alpha([a, b], {"w": tensor([4.0, -4.0])})  # (|4| + |0|) / 2 / 8
        0.25
    """
    states = labelled("lines_alpha", {"merged": merged}, {"deltas": deltas})
    summed = whole = 0.0
    shared = ties("lines_alpha", states)
    for name in same_names("lines_alpha", states):
        if name in shared:
            continue
        xs = tensors("lines_alpha", name, states, one_dtype=False)
        if xs[0].is_floating_point():
            for _, (made, *taus) in pieces(xs, wide(xs[0])):
                summed += float(sum(taus[1:], taus[0]).abs().double().sum())
                whole += float(made.abs().double().sum())
    if whole == 0:
        raise ValueError("lines_alpha: expected a merged update, got zeros only. Is it a delta of the base?")
    return summed / len(deltas) / whole


def reset(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    r"""Put some tensors of a fine-tuned model back to where they started.

    With the names of a random half of the matrices of every layer it is half-reset, which gives back a part
    of what the base knew and costs a part of the new skill.

    Args:
        tuned: state of the fine-tuned model.
        base: state it started from.
        names: tensors that take their value from ``base``, integers too. On files, tensor by tensor:
            ``lazy(lambda t, b: reset(t, b, names & t.keys()), ...)`` with a set.

    Returns:
        A state.

    Raises:
        ValueError: a name that is not there, one of two tied names without the other; as in ``delta``.
        TypeError: as in ``delta``.

    Source: HFT (2024) arXiv:2404.18466 half-reset (pilot study)
    Basis: second-hand; no released code.
    Differs: the draw is the caller's: which half, and of which matrices.

    Example:
        >>> from torch import tensor
        >>> tuned, base = {"q": tensor([1.0]), "k": tensor([2.0])}, {"q": tensor([0.0]), "k": tensor([0.5])}
        >>> reset(tuned, base, ["k"])
        {'q': tensor([1.]), 'k': tensor([0.5000])}
    """
    if isinstance(names, str):
        raise TypeError("reset: expected names as a list of names, got one text. Pass [name].")
    chosen = set(names)
    for name in sorted(chosen):
        if name not in tuned:
            raise ValueError(f"reset: expected names of tensors, got {name!r}, which is none of them.")
    made = each(
        "reset",
        labelled("reset", {"tuned": tuned, "base": base}),
        lambda name, xs: xs[name in chosen].clone(),
        by_name=chosen.__contains__,
    )
    return {
        name: base[name].detach().clone() if name in chosen and not x.is_floating_point() else x
        for name, x in made.items()
    }
