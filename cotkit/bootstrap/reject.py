"""Sampling and sorting: let a model write several completions for each row, score them, keep what passes.

Conventions: ``generate(prompts, n) -> list[list[str]]`` writes, ``reward(prompts, completions, **columns)``
scores; rows are plain dicts, never changed, and every other column travels along.
Functions: ``sample_and_score`` rows -> groups, the raw material; ``rejection_sampling`` rows -> rows to train
on.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from cotkit._check import finite, integers, one_of
from cotkit.rewards.steps import find_equations

__all__ = ["rejection_sampling", "sample_and_score"]

_Generate = Callable[[list[Any], int], list[list[str]]]
_Reward = Callable[..., list[float | None]]


def sample_and_score(
    rows: Sequence[dict[str, Any]], generate: _Generate, reward: _Reward, *, n: int = 8
) -> list[dict[str, Any]]:
    """For every row n completions with their scores; text that was already sampled for the row is marked.

    Args:
        rows: rows with a ``prompt``.
        generate: (prompts, n) -> n completions for each prompt.
        reward: gets ``prompts``, ``completions`` and every column of the rows but ``prompt`` and
            ``completion``, each repeated n times, in one call (a column that a row lacks is None there).
        n: completions of each row, at least 1.

    Returns:
        The rows in their order with ``completions`` (n texts), ``rewards`` (n numbers, None = cannot be
        scored) and ``duplicate`` (n flags, True from the second time on that a text, without white space
        around it, occurs).

    Raises:
        ValueError: a row without prompt, or ``generate`` or ``reward`` returned another number of values.
        TypeError: ``n`` is no integer.

    Source: AFT (2023) arXiv:2309.02144 (its groups of right and wrong samples)
    Basis: second-hand
    Differs: nothing

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> rows = [{"prompt": "1+1=", "answer": "2"}]
        >>> group = sample_and_score(rows, lambda prompts, n: [["2", "3", "2 "]], accuracy(), n=3)[0]
        >>> group["rewards"], group["duplicate"]
        ([1.0, 0.0, 1.0], [False, False, True])
    """
    integers("sample_and_score", n=n)
    if n < 1:
        raise ValueError(f"sample_and_score: expected n >= 1, got {n}.")
    for i, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(
                f"sample_and_score: expected every row with a prompt, got {sorted(row)} in row {i}."
            )
    if not rows:
        return []
    prompts = [row["prompt"] for row in rows]
    written = generate(prompts, n)
    counts = [len(w) for w in written]
    if counts != [n] * len(rows):
        raise ValueError(
            f"sample_and_score: expected {n} completions for each of {len(rows)} prompts from generate, "
            f"got {len(written)} lists of {sorted(set(counts))}. Return one list per prompt."
        )
    names = dict.fromkeys(k for row in rows for k in row if k not in ("prompt", "completion"))
    columns = {k: [row.get(k) for row in rows for _ in range(n)] for k in names}
    flat = [text for texts in written for text in texts]
    scores = list(reward(prompts=[p for p in prompts for _ in range(n)], completions=flat, **columns))
    if len(scores) != len(flat):
        raise ValueError(
            f"sample_and_score: expected {len(flat)} scores from reward, got {len(scores)}. "
            f"Return one for each completion."
        )
    groups = []
    for i, (row, texts) in enumerate(zip(rows, written, strict=True)):
        bare = [text.strip() for text in texts]
        duplicate = [text in bare[:j] for j, text in enumerate(bare)]
        scored = scores[i * n : (i + 1) * n]
        groups.append({**row, "completions": list(texts), "rewards": scored, "duplicate": duplicate})
    return groups


def rejection_sampling(
    rows: Sequence[dict[str, Any]],
    generate: _Generate,
    reward: _Reward,
    *,
    n: int = 100,
    threshold: float = 1.0,
    key: Callable[[str], Hashable] | None = None,
    keep: str = "distinct",
    per_row: int | None = None,
    gold: bool = True,
) -> list[dict[str, Any]]:
    """Rows to train on: the model's own completions that pass, one for each way of solving the row.

    Args:
        rows: rows with ``prompt`` and, if ``gold``, ``completion``.
        generate: (prompts, n) -> n completions for each prompt.
        reward: as for ``sample_and_score``.
        n: completions sampled for each row. Paper: 100.
        threshold: a sample passes if its reward is at least this.
        key: completion -> what makes two samples the same way. None takes the paper's: the equations in their
            order, spaces left out; then a sample with an equation that does not hold is dropped, however
            right its answer.
        keep: "distinct" one sample of each key: of two, the one farther in edit distance from those kept so
            far of the row (the first stays when they are equally far); "all" every sample that passes, copies
            included; "failing" every sample that does not (None rewards are neither), copies left out.
        per_row: at most so many samples of a row, in the order in which their keys appeared; None: no limit.
        gold: put the row itself first, so that unsolved rows stay in the data. It has no part in the
            comparison.

    Returns:
        For each row: the row itself with ``source`` "gold" if asked, then its samples as rows with
        ``completion`` replaced, ``source`` "sample" and ``reward``.

    Raises:
        ValueError: ``keep`` unknown, numbers out of range, no ``completion`` with ``gold``, or a generate or
            reward that returns another number of values.
        TypeError: a number of another type.

    Source: RFT (2023) arXiv:2308.01825
    Basis: second-hand
    Differs: with ``per_row`` the cut comes after the choice among equal keys.

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> row = {"prompt": "3+4+5?", "completion": "3+4=7, 7+5=12 #### 12", "answer": "12"}
        >>> texts = [
        ...     "3 + 4 = 7, 7 + 5 = 12 #### 12",
        ...     "4+5=9, 9+3=12 #### 12",
        ...     "4+5=8, 8+4=12 #### 12",
        ...     "#### 11",
        ... ]
        >>> [
        ...     r["completion"]
        ...     for r in rejection_sampling([row], lambda p, n: [texts], accuracy(), n=4, gold=False)
        ... ]
        ['3 + 4 = 7, 7 + 5 = 12 #### 12', '4+5=9, 9+3=12 #### 12']
    """
    finite("rejection_sampling", threshold=threshold)
    one_of("rejection_sampling", ("distinct", "all", "failing"), keep=keep)
    if per_row is not None:
        integers("rejection_sampling", per_row=per_row)
        if per_row < 1:
            raise ValueError(f"rejection_sampling: expected per_row >= 1 or None, got {per_row}.")
    for i, row in enumerate(rows):
        if gold and "completion" not in row:
            raise ValueError(
                f"rejection_sampling: expected a completion in row {i}, got {sorted(row)}. "
                f"Pass gold=False where there is none."
            )
    made: list[dict[str, Any]] = []
    for row, group in zip(rows, sample_and_score(rows, generate, reward, n=n), strict=True):
        if gold:
            made.append({**row, "source": "gold"})
        judged = zip(group["completions"], group["rewards"], group["duplicate"], strict=True)
        scored = [(text, score, again) for text, score, again in judged if score is not None]
        if keep == "failing":
            kept = [(text, score) for text, score, again in scored if score < threshold and not again]
        else:
            kept = [(text, score) for text, score, _ in scored if score >= threshold]
        if keep == "distinct":
            kept = _distinct(kept, key)
        for text, score in kept[:per_row]:
            made.append({**row, "completion": text, "source": "sample", "reward": score})
    return made


def _distinct(
    samples: list[tuple[str, float]], key: Callable[[str], Hashable] | None
) -> list[tuple[str, float]]:
    kept: dict[Hashable, tuple[str, float]] = {}
    for text, score in samples:
        if key is None:
            equations = find_equations(text)
            if not all(e.holds for e in equations):
                continue
            name: Hashable = tuple(f"{e.left}={e.right}".replace(" ", "") for e in equations)
        else:
            name = key(text)
        others = [other for k, (other, _) in kept.items() if k != name]
        if name not in kept or _far(text, others) > _far(kept[name][0], others):
            kept[name] = (text, score)
    return list(kept.values())


def _far(text: str, others: list[str]) -> int:
    return sum(_edits(text, other) for other in others)


def _edits(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]
