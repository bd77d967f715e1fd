"""Faithfulness: what a model's next token depends on, found by changing what it reads.

Conventions: the model is a callable that gives its greedy tokens; distances are in tokens.
Functions: `token_dependency` changes one input token at a time and watches the tokens behind it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cotkit import _check

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["token_dependency"]


def token_dependency(
    next_token: Callable[[Tensor], Tensor],
    ids: Sequence[int] | Tensor,
    positions: Sequence[int] | Tensor,
    replacement: int | Sequence[int] | Tensor,
    *,
    targets: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> "DataFrame":
    r"""Does the greedy token at t change when the input at i < t is replaced? One line per pair (i, t).

    $\mathrm{changed}(i, t) = [\arg\max p(\cdot \mid w_{<t}) \ne \arg\max p(\cdot \mid \tilde w^{(i)}_{<t})]$

    The rate by distance is ``frame.groupby("distance")["changed"].mean()``; lines of several texts may be put
    under each other. Pass the tokens of the question as ``positions`` to see how much an answer hangs on it.

    Args:
        next_token: ids [N, T] -> greedy ids [N, T]; position t of its result is the token that the model
            would write behind position t, as in ``model(input_ids=x).logits.argmax(-1)``. Called once, with
            the clean text in row 0; it may split the rows as memory demands.
        ids: the text, T tokens.
        positions: inputs that are replaced, one at a time.
        replacement: id to write instead (a mask token), or several, of which one that differs from the
            token is drawn for each position (the digits, the vocabulary).
        targets: positions of the tokens that are watched; None: all. Those not behind i are left out.
        generator: draws the replacements.

    Returns:
        DataFrame with ``distance`` (t - i, at least 1), ``changed`` (bool) and ``position`` (i), in the order
        of ``positions``, then of t; empty when no target stands behind a position.

    Raises:
        ValueError: no positions, a position outside the text, no replacement that differs from a token, a
            result of another shape.

    Source: MFT (2024) arXiv:2403.02178 (analysis of dependencies)
    Basis: second-hand; the authors released no code for this analysis.
    Differs: one token is replaced at a time and any token may be watched; to look at numbers only, pass their
        positions as ``positions`` and ``targets``.

    Example:
        >>> def copies_two_back(ids):  # behind position t it writes the token of t - 1
        ...     return ids.roll(1, 1)
        >>> frame = token_dependency(copies_two_back, [5, 6, 7, 8], [1], 0)
        >>> list(zip(frame["distance"], frame["changed"]))
        [(1, False), (2, True)]
    """
    text = torch.as_tensor(ids)
    _check.ndim("token_dependency", "T", ids=text)
    _check.integer("token_dependency", ids=text)
    length = text.shape[0]
    places, watched = (
        [int(p) for p in positions],
        range(length) if targets is None else [int(t) for t in targets],
    )
    if not places:
        raise ValueError("token_dependency: expected at least one position, got none. Name the inputs.")
    for name, given in (("positions", places), ("targets", watched)):
        if any(not 0 <= p < length for p in given):
            raise ValueError(
                f"token_dependency: expected {name} in [0, {length}), got {min(given)} to {max(given)}."
            )
    candidates = torch.as_tensor(replacement).reshape(-1).to(text)
    rows = text.repeat(len(places) + 1, 1)
    for row, place in zip(rows[1:], places, strict=True):
        others = candidates[candidates != text[place]]
        if not len(others):
            raise ValueError(
                f"token_dependency: expected a replacement that differs from the token at {place} "
                f"({int(text[place])}), got none. Pass more candidates or leave that position out."
            )
        device = "cpu" if generator is None else generator.device
        row[place] = others[int(torch.randint(len(others), (), generator=generator, device=device))]
    found = next_token(rows)
    _check.is_tensor("token_dependency", next_token=found)
    if found.shape != rows.shape:
        raise ValueError(
            f"token_dependency: expected next_token to return {list(rows.shape)}, got {list(found.shape)}. "
            f"It gives one greedy id per position: logits.argmax(-1)."
        )
    differs = (found[1:] != found[:1]).cpu()
    pairs = [(k, i, t) for k, i in enumerate(places) for t in watched if t > i]

    from pandas import DataFrame

    return DataFrame(
        {
            "distance": [t - i for _, i, t in pairs],
            "changed": [bool(differs[k, t - 1]) for k, _, t in pairs],  # token t is written behind t - 1
            "position": [i for _, i, _ in pairs],
        }
    ).astype({"distance": int, "changed": bool, "position": int})
