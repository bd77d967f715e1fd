"""Length of a completion: pay for short right answers, for thinking longer where it fails, never for padding.

Conventions: lengths are in tokens, those of ``completion_ids`` where they are handed over (TRL does), else by
``length``, a function of the text; characters are never counted in silence. ``correct`` is a reward; at least
0.5 means right, None gives None. Rewards that compare the completions of one prompt are marked
(``reward.grouped``) and need whole groups: in TRL ``per_device_train_batch_size`` has to be a multiple of
``num_generations``; pass ``group_size=num_generations`` and a group that was split is refused.
Functions: ``cosine`` of the length; ``relative`` to the group; ``adaptive_mode`` short or long thought;
``repeated_ngrams`` a penalty for each token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import cos, pi
from typing import Any, NamedTuple

from torch import Tensor

from cotkit._check import at_least, finite, integers, positive
from cotkit.rewards._call import Reward, functions, groups, lengths, verdicts
from cotkit.rewards._text import text_of

__all__ = ["adaptive_mode", "cosine", "relative", "repeated_ngrams"]

Length = Callable[[str], int] | None


class _Cosine(NamedTuple):
    correct: Reward
    max_length: float
    right: tuple[float, float]
    wrong: tuple[float, float]
    exceed: float | None
    margin: float
    length: Length


def cosine(
    correct: Reward,
    max_length: int,
    *,
    right: tuple[float, float] = (2.0, 1.0),
    wrong: tuple[float, float] = (-10.0, 0.0),
    exceed: float | None = -10.0,
    margin: int = 16,
    length: Callable[[str], int] | None = None,
) -> Reward:
    r"""A reward that falls with the length of a right answer and rises with that of a wrong one.

    $v_L + \tfrac12 (v_0 - v_L)\,(1 + \cos(\pi L / L_{max}))$ with $(v_0, v_L)$ = ``right`` or ``wrong``;
    ``exceed`` for $L + margin \ge L_{max}$, right or wrong.

    Args:
        correct: the reward that says which answers are right.
        max_length: $L_{max}$, the limit of generation, in tokens.
        right: values of a right answer at length 0 and at the limit.
        wrong: the same for a wrong one: a short guess is punished most.
        exceed: what an answer gets that runs into the limit; None = no such rule.
        margin: tokens before the limit from which on ``exceed`` holds.
        length: text -> tokens, where no ``completion_ids`` come.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``, logged as ``cosine``; None where
        ``correct`` is None. It can be pickled if ``correct`` can.

    Raises:
        ValueError: ``max_length`` is not above 0, ``margin`` below 0, a value not finite; when called, there
            are neither ``completion_ids`` nor ``length``.
        TypeError: ``correct`` cannot be called, a value is no number.

    Source: Demystify-LongCoT (2025) arXiv:2502.03373 App. C.1; AAPO (2025) arXiv:2505.14264 (its length
        reward)
    Basis: authors' code
    Differs: their optional penalty for repetition in wrong answers is not here (``repeated_ngrams`` is their
        better one); without ``exceed`` a length above the limit counts as the limit. TRL's
        ``get_cosine_scaled_reward`` has no rule for the limit.

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> texts, ids = ["#### 4", "#### 5", "#### 4"], [[0] * 50, [0] * 50, [0] * 84]
        >>> cosine(accuracy(), 100)(["2+2?"] * 3, texts, answer=["4"] * 3, completion_ids=ids)
        [1.5, -5.0, -10.0]
    """
    functions("cosine", correct=correct, **({} if length is None else {"length": length}))
    positive("cosine", max_length=max_length)
    at_least("cosine", 0, margin=margin)
    for name, pair in (("right", right), ("wrong", wrong)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"cosine: expected {name} as a pair (at 0, at the limit), got {pair!r}.")
        finite("cosine", **{f"{name}[{i}]": value for i, value in enumerate(pair)})
    if exceed is not None:
        finite("cosine", exceed=exceed)
    return partial(
        _cosine,
        _Cosine(correct, max_length, (right[0], right[1]), (wrong[0], wrong[1]), exceed, margin, length),
    )


def _cosine(how: _Cosine, /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    tokens = lengths("cosine", completions, columns, how.length)
    good = verdicts("cosine", how.correct, prompts, completions, columns)
    return [_on_curve(how, n, ok) for n, ok in zip(tokens, good, strict=True)]


_cosine.__name__ = "cosine"  # what TRL logs; pickle goes by __qualname__


def _on_curve(how: _Cosine, tokens: int, ok: bool | None) -> float | None:
    if ok is None:
        return None
    if how.exceed is not None and tokens + how.margin >= how.max_length:
        return float(how.exceed)
    start, end = how.right if ok else how.wrong
    return end + 0.5 * (start - end) * (1 + cos(pi * min(1.0, tokens / how.max_length)))


def relative(
    correct: Reward, *, group_size: int | None = None, length: Callable[[str], int] | None = None
) -> Reward:
    r"""A group-relative reward: the shortest completion of a prompt gets 0.5, the longest -0.5.

    $\lambda_i = \tfrac12 - (L_i - L_{min}) / (L_{max} - L_{min})$ if right, $\min(0, \lambda_i)$ if wrong,
    over the completions of one prompt; 0 if all have one length. To be added to a reward for the answer,
    with a weight that is 0 early in training.

    Args:
        correct: the reward that says which answers are right.
        group_size: completions of a prompt (TRL's ``num_generations``); None = as many as there are, and
            every prompt equally often.
        length: text -> tokens, where no ``completion_ids`` come.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``, logged as ``relative``, marked
        ``reward.grouped = True``; prompts may come in any order. None where ``correct`` is None: such a
        completion is not compared. A completion alone in its group gets 0. It can be pickled if ``correct``
        can.

    Raises:
        ValueError: ``group_size`` below 1; when called, a group is not whole, or there are neither
            ``completion_ids`` nor ``length``.
        TypeError: ``correct`` cannot be called, ``group_size`` is no int.

    Source: Kimi-VL (2025) arXiv:2504.07491 (the length reward of Kimi k1.5)
    Basis: memory; the numbers of open-r1's ``len_reward``
    Differs: open-r1 counts characters and takes an answer that cannot be verified as right.

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> texts, ids = ["#### 4", "#### 4", "#### 5"], [[0] * 10, [0] * 30, [0] * 15]
        >>> relative(accuracy())(["2+2?"] * 3, texts, answer=["4"] * 3, completion_ids=ids)
        [0.5, -0.5, 0.0]
    """
    functions("relative", correct=correct, **({} if length is None else {"length": length}))
    _group_size("relative", group_size)
    reward = partial(_relative, (correct, group_size, length))
    reward.grouped = True  # type: ignore[attr-defined]
    return reward


def _relative(
    how: tuple[Reward, int | None, Length], /, prompts: Any, completions: Any, **columns: Any
) -> list[float | None]:
    correct, size, length = how
    together = groups("relative", prompts, len(completions), size)
    tokens = lengths("relative", completions, columns, length)
    good = verdicts("relative", correct, prompts, completions, columns)
    result: list[float | None] = [None] * len(completions)
    for group in together:
        known = [i for i in group if good[i] is not None]
        low = min((tokens[i] for i in known), default=0)
        high = max((tokens[i] for i in known), default=0)
        for i in known:
            share = 0.5 - (tokens[i] - low) / (high - low) if high > low else 0.0
            result[i] = share if good[i] else min(0.0, share)
    return result


_relative.__name__ = "relative"  # what TRL logs; pickle goes by __qualname__


def adaptive_mode(
    correct: Reward,
    is_long: Callable[[str], bool],
    *,
    tau: float = 0.5,
    bonus: float = 0.5,
    group_size: int | None = None,
) -> Reward:
    r"""A group-relative reward for thinking long only where a short thought fails. RECONSTRUCTED.

    Right answers get 1. If the share of right answers among the short completions of a prompt is at least
    ``tau``, its right short ones get ``1 + bonus``; if it is below and that of the long ones is not, its
    right long ones do.

    Args:
        correct: the reward that says which answers are right.
        is_long: text -> whether it was written in the long mode (by its mode tag, say).
        tau: share of right answers, in [0, 1], from which on a mode is good enough.
        bonus: what the preferred mode is paid on top.
        group_size: completions of a prompt (TRL's ``num_generations``); None = as many as there are, and
            every prompt equally often.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``, logged as ``adaptive_mode``, marked
        ``reward.grouped = True``. 0 for a wrong answer, None where ``correct`` is None. Where a mode is
        missing in a group nobody gets a bonus. It can be pickled if its parts can.

    Raises:
        ValueError: ``tau`` outside [0, 1], ``bonus`` not finite, ``group_size`` below 1; when called, a group
            is not whole.
        TypeError: ``correct`` or ``is_long`` cannot be called, a value is no number.

    Source: Adaptive-Deep-Reasoning (2025) arXiv:2505.20101; Hunyuan-TurboS (2025) arXiv:2505.15431 (the
        same idea)
    Basis: reconstructed
    Differs: the papers' rules are not public; thresholds and bonus are ours.

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> texts = ["#### 4", "<think>2+2=4</think>4"]
        >>> reward = adaptive_mode(accuracy(), lambda text: "<think>" in text)
        >>> reward(["2+2?"] * 2, texts, answer=["4"] * 2)
        [1.5, 1.0]
    """
    functions("adaptive_mode", correct=correct, is_long=is_long)
    finite("adaptive_mode", tau=tau, bonus=bonus)
    if not 0 <= tau <= 1:
        raise ValueError(f"adaptive_mode: expected tau in [0, 1], got {tau}.")
    _group_size("adaptive_mode", group_size)
    reward = partial(_adaptive_mode, (correct, is_long, tau, bonus, group_size))
    reward.grouped = True  # type: ignore[attr-defined]
    return reward


def _adaptive_mode(
    how: tuple[Reward, Callable[[str], bool], float, float, int | None],
    /,
    prompts: Any,
    completions: Any,
    **columns: Any,
) -> list[float | None]:
    correct, is_long, tau, bonus, size = how
    together = groups("adaptive_mode", prompts, len(completions), size)
    good = verdicts("adaptive_mode", correct, prompts, completions, columns)
    long = [bool(is_long(text_of(c))) for c in completions]
    result: list[float | None] = [None if ok is None else float(ok) for ok in good]
    for group in together:
        known = [i for i in group if good[i] is not None]
        right = {mode: [bool(good[i]) for i in known if long[i] is mode] for mode in (False, True)}
        if not right[False] or not right[True]:
            continue
        share = {mode: sum(found) / len(found) for mode, found in right.items()}
        if max(share.values()) < tau:
            continue
        preferred = share[False] < tau
        for i in known:
            if good[i] and long[i] is preferred:
                result[i] = 1.0 + bonus
    return result


_adaptive_mode.__name__ = "adaptive_mode"  # what TRL logs; pickle goes by __qualname__


def _group_size(fn: str, size: int | None) -> None:
    if size is not None:
        integers(fn, group_size=size)
        at_least(fn, 1, group_size=size)


def repeated_ngrams(ids: Sequence[int] | Tensor, n: int = 40, penalty: float = -0.05) -> list[float]:
    """A penalty for each token of an n-gram that was there before: a reward per token, not per completion.

    Meant for a discount of its own, below 1, so that it is felt where the repetition is.

    Args:
        ids: tokens of one completion, [T].
        n: tokens of an n-gram.
        penalty: what each token of a repeated n-gram gets.

    Returns:
        One value per token, [T]: ``penalty`` on all n tokens of every n-gram that occurred earlier, also
        where the two overlap; 0.0 elsewhere. A completion of fewer than n tokens has no n-gram.

    Raises:
        ValueError: ``n`` below 1, ``penalty`` not finite, ``ids`` of more than one dimension.
        TypeError: ``n`` is no int, ``penalty`` no number.

    Source: Demystify-LongCoT (2025) arXiv:2502.03373 §4.5
    Basis: authors' code
    Differs: nothing (their default, which marks every repeated n-gram; a penalty above 0 is not refused).

    Example:
        >>> repeated_ngrams([7, 8, 9, 7, 8, 5], n=2)
        [0.0, 0.0, 0.0, -0.05, -0.05, 0.0]
    """
    integers("repeated_ngrams", n=n)
    at_least("repeated_ngrams", 1, n=n)
    finite("repeated_ngrams", penalty=penalty)
    if isinstance(ids, Tensor):
        if ids.dim() != 1:
            raise ValueError(
                f"repeated_ngrams: expected ids [T], got {list(ids.shape)}. Pass one completion."
            )
        ids = ids.tolist()
    values = [0.0] * len(ids)
    seen: set[tuple[int, ...]] = set()
    marked = 0  # tokens before this one have their value
    for start in range(len(ids) - n + 1):
        gram = tuple(ids[start : start + n])
        if gram in seen:
            for i in range(max(start, marked), start + n):
                values[i] = float(penalty)
            marked = start + n
        seen.add(gram)
    return values
