"""Scores of predictions: how often a model is right, and how well it tells right from wrong.

Conventions: ``correct`` is a table of questions by samples, [Q, n], of 0/1 or bool (None or NaN where a
sample could not be judged is refused: drop it first); tensors, arrays and nested lists are taken alike and
results are Python floats.
Functions: ``accuracy``, ``pass_at_k`` some of k samples is right, ``best_at_k`` the best-scored of k is,
``maj_at_k`` the most frequent of k answers is, ``assessment_accuracy`` right chains score above wrong ones,
``flips`` questions won and lost between two models, ``bootstrap_interval`` over questions.
"""

from collections.abc import Callable, Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotkit._check import at_least, between, one_of

__all__ = [
    "accuracy",
    "assessment_accuracy",
    "best_at_k",
    "bootstrap_interval",
    "flips",
    "maj_at_k",
    "pass_at_k",
]


def _array(fn: str, values: Any, name: str, dims: tuple[int, ...]) -> NDArray[np.float64]:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{fn}: expected {name} as a table of numbers, got {type(values).__name__}."
        ) from error
    if array.ndim not in dims:
        wanted = " or ".join({1: "[n]", 2: "[Q, n]", 4: "[Q, n, H, m]"}[d] for d in dims)
        raise ValueError(
            f"{fn}: expected {name} {wanted}, got {list(array.shape)}. Rows must be of one length."
        )
    return array


def _correct(fn: str, values: Any, dims: tuple[int, ...]) -> NDArray[np.float64]:
    array = _array(fn, values, "correct", dims)
    if array.size == 0:
        raise ValueError(f"{fn}: expected at least one sample, got none.")
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError(
            f"{fn}: expected correct as 0 and 1, got other values. Drop or decide what has no verdict."
        )
    return array


def accuracy(correct: Any) -> float:
    """Share of right samples, every sample counted once.

    Args:
        correct: 0/1, [n] or [Q, n].

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: nothing to average, or a value other than 0 and 1.

    Source: none (plumbing)
    Basis: definition.

    Example:
        >>> accuracy([[1, 0], [1, 1]])
        0.75
    """
    return float(_correct("accuracy", correct, (1, 2)).mean())


def pass_at_k(correct: Any, k: int, *, h: int | None = None, m: int | None = None) -> float:
    r"""Chance that at least one of k samples of a question is right, averaged over questions, without bias.

    $1 - \\binom{n-c}{k} / \\binom{n}{k}$ for a question with c right ones among n samples.

    Args:
        correct: 0/1, [Q, n]; or [Q, n, H, M] with M answers read off at H places along each sample.
        k: 1 to the number of samples a question has.
        h: with [Q, n, H, M]: read at h places only, evenly spaced and the last one among them (H must be a
            multiple).
        m: with [Q, n, H, M]: use the first m answers of each place.

    Returns:
        A fraction in [0, 1]; with [Q, n, H, M] all n h m answers of a question are its samples.

    Raises:
        ValueError: k out of range, h or m that do not fit or come without four dimensions.

    Source: Fractured Sampling (2025) arXiv:2505.12992 (h, m); the estimator is that of Codex (2021)
    arXiv:2107.03374
    Basis: second-hand
    Differs: nothing

    Example:
        >>> pass_at_k([[1, 0, 0, 0]], 2)  # 1 - C(3,2)/C(4,2); the naive 1 - (3/4)^2 is 0.4375
        0.5
    """
    array = _correct("pass_at_k", correct, (2, 4))
    if array.ndim == 2:
        if h is not None or m is not None:
            raise ValueError(
                f"pass_at_k: expected correct [Q, n, H, m] for h and m, got {list(array.shape)}."
            )
    else:
        places, answers = array.shape[2:]
        h, m = places if h is None else h, answers if m is None else m
        between("pass_at_k", 1, places, h=h)
        between("pass_at_k", 1, answers, m=m)
        if places % h:
            raise ValueError(f"pass_at_k: expected h to divide the {places} places, got {h}.")
        array = array[:, :, places // h - 1 :: places // h, :m].reshape(len(array), -1)
    n = array.shape[1]
    if not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(
            f"pass_at_k: expected k as an integer from 1 to {n}, got {k!r}. Draw at least k samples."
        )
    missed = [comb(n - int(c), k) / comb(n, k) for c in array.sum(1)]
    return float(1 - np.mean(missed))


def best_at_k(correct: Any, scores: Any, k: int) -> float:
    r"""Chance that best-of-k is right: of k samples the one with the highest score, without bias.

    The samples of a question in order of score: the best of k drawn without replacement lies in a group of m
    equal scores above b lower ones with probability $[\binom{b+m}{k} - \binom bk] / \binom nk$, and is then
    any of the m.

    Args:
        correct: 0/1, [Q, n].
        scores: a verifier's or reward model's score, or a log-prob, of each sample, [Q, n]; higher = picked.
        k: 1 to n. ``[best_at_k(correct, scores, k) for k in range(1, n + 1)]`` is the whole curve.

    Returns:
        A fraction in [0, 1]: the accuracy at k = 1, `pass_at_k` when the scores are the verdicts themselves.
        Equal scores share the verdict.

    Raises:
        ValueError: shapes differ, k out of range, a score that is NaN.

    Source: BoN-aware (2024) arXiv:2412.15287 best-of-N with a verifier
    Basis: definition
    Differs: the paper draws N samples anew; here all n are used, so a curve needs one set of samples.

    Example:
        >>> best_at_k([[1, 0, 0]], [[0.7, 0.9, 0.1]], 2)  # of 3 pairs the right one wins one: with the third
        0.3333333333333333
    """
    array = _correct("best_at_k", correct, (2,))
    ranked = _array("best_at_k", scores, "scores", (2,))
    if ranked.shape != array.shape:
        raise ValueError(
            f"best_at_k: expected equal shapes, got correct {list(array.shape)}, scores {list(ranked.shape)}."
        )
    if np.isnan(ranked).any():
        raise ValueError("best_at_k: expected scores without NaN, got NaN. Give unscored samples -inf.")
    n = array.shape[1]
    if not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(
            f"best_at_k: expected k as an integer from 1 to {n}, got {k!r}. Draw at least k samples."
        )
    chances = []
    for right, row in zip(array, ranked, strict=True):
        for score in np.unique(row):
            group, below = row == score, int((row < score).sum())
            ways = comb(below + int(group.sum()), k) - comb(below, k)
            chances.append(ways / comb(n, k) * float(right[group].mean()))
    return float(np.sum(chances) / len(array))


def maj_at_k(
    answers: Sequence[Sequence[Any]],
    gold: Sequence[Any],
    k: int,
    *,
    same: Callable[[Any, Any], bool] | None = None,
) -> float:
    """Share of questions whose most frequent answer among the first k samples is right.

    Args:
        answers: per question its extracted answers in sampling order; None = no answer, it has no vote.
        gold: the right answer of each question.
        k: how many samples vote, at least 1; every question needs that many.
        same: (answer, gold) -> bool; None takes ``rewards.answer.same_answer``. It also decides which answers
            are one.

    Returns:
        A fraction in [0, 1]. Answers with equally many votes share the verdict: 1/2 if one of two is right,
        so that the order of samples cannot matter. No answer at all counts as wrong.

    Raises:
        ValueError: lengths differ, no questions, or a question with fewer than k samples.

    Source: Self-Consistency (2022) arXiv:2203.11171
    Basis: memory
    Differs: ties are shared instead of going to the answer seen first.

    Example:
        >>> maj_at_k([["7", "7.0", "8"], ["1", "2", None]], ["7", "2"], 3)  # right; a tie
        0.75
    """
    agree: Callable[[Any, Any], bool] = _same if same is None else same
    at_least("maj_at_k", 1, k=k)
    if len(answers) != len(gold) or not len(gold):
        raise ValueError(
            f"maj_at_k: expected as many questions as gold answers, got {len(answers)}, {len(gold)}."
        )
    scores = []
    for given, right in zip(answers, gold, strict=True):
        if len(given) < k:
            raise ValueError(f"maj_at_k: expected at least {k} samples per question, got {len(given)}.")
        clusters: list[list[Any]] = []
        for answer in given[:k]:
            if answer is None:
                continue
            mine = next((c for c in clusters if c[0] == answer or agree(answer, c[0])), None)
            if mine is None:
                clusters.append([answer])
            else:
                mine.append(answer)
        most = max((len(c) for c in clusters), default=0)
        best = [c for c in clusters if len(c) == most]
        scores.append(sum(bool(agree(c[0], right)) for c in best) / len(best) if best else 0.0)
    return float(np.mean(scores))


def _same(answer: Any, gold: Any) -> bool:
    from cotkit.rewards.answer import same_answer

    return same_answer(answer, gold)


def assessment_accuracy(scores: Any, positive: Any, valid: Any = None, *, per: str = "pair") -> float:
    """Share of (right chain, wrong chain) pairs of a question in which the right one scores higher.

    Args:
        scores: score of each chain, [Q, K], mean token log-prob in the paper; higher = the model prefers it.
        positive: bool, True = the chain is right, [Q, K].
        valid: bool, False = padding, [Q, K]; None: all count.
        per: "pair" counts every pair alike; "question" takes the share inside each question, then their mean.

    Returns:
        A fraction in [0, 1], 0.5 for a model that cannot tell; equal scores count one half. Questions without
        a right or without a wrong chain have no pair; NaN when there is no pair at all.

    Raises:
        ValueError: shapes differ, ``per`` unknown, or a valid score is NaN.

    Source: AFT (2023) arXiv:2309.02144 (its pilot experiment)
    Basis: second-hand
    Differs: the paper does not say what a tie counts; here one half, so that constant scores give 0.5.

    Example:
        >>> assessment_accuracy([[-1.0, -2.0, -3.0]], [[False, True, False]])  # above one, below one
        0.5
    """
    one_of("assessment_accuracy", ("pair", "question"), per=per)
    s = _array("assessment_accuracy", scores, "scores", (2,))
    p = _array("assessment_accuracy", positive, "positive", (2,)) > 0
    v = np.ones(s.shape, bool) if valid is None else _array("assessment_accuracy", valid, "valid", (2,)) > 0
    if not s.shape == p.shape == v.shape:
        raise ValueError(
            f"assessment_accuracy: expected equal shapes, got scores {list(s.shape)}, "
            f"positive {list(p.shape)}, valid {list(v.shape)}. "
            "Pad every question to K chains and mark the padding in valid."
        )
    if np.isnan(s[v]).any():
        raise ValueError("assessment_accuracy: expected scores without NaN, got NaN. Mark padding in valid.")
    pairs = (p & v)[:, :, None] & (~p & v)[:, None, :]
    a, b = s[:, :, None], s[:, None, :]
    won, count = (((a > b) + 0.5 * (a == b)) * pairs).sum((1, 2)), pairs.sum((1, 2))
    if not count.any():
        return float("nan")
    return float(won.sum() / count.sum() if per == "pair" else (won[count > 0] / count[count > 0]).mean())


def flips(before: Any, after: Any) -> dict[str, float]:
    """What became of each question between two models: won, lost, right both times, wrong both times.

    Args:
        before: 0/1, [n] or [Q, n]: verdicts on the first model.
        after: the same questions in the same order, verdicts on the second.

    Returns:
        Shares that add up to 1: ``won`` (wrong, then right), ``lost`` (right, then wrong), ``kept`` (right
        twice), ``missed`` (wrong twice). The change of accuracy is won - lost.

    Raises:
        ValueError: shapes differ, nothing to count, a value other than 0 and 1.

    Source: Crystal (2023) arXiv:2310.04921 (answers set right and spoilt by stated knowledge)
    Basis: second-hand
    Differs: nothing

    Example:
        >>> flips([1, 1, 0, 0, 0], [1, 0, 1, 1, 0])
        {'won': 0.4, 'lost': 0.2, 'kept': 0.2, 'missed': 0.2}
    """
    a, b = _correct("flips", before, (1, 2)), _correct("flips", after, (1, 2))
    if a.shape != b.shape:
        raise ValueError(
            f"flips: expected equal shapes, got before {list(a.shape)}, after {list(b.shape)}. "
            "Judge the same questions in the same order."
        )
    pairs = {"won": (0, 1), "lost": (1, 0), "kept": (1, 1), "missed": (0, 0)}
    return {name: float(((a == x) & (b == y)).mean()) for name, (x, y) in pairs.items()}


def bootstrap_interval(
    values: Any,
    statistic: Callable[[NDArray[np.float64]], float] | None = None,
    *,
    level: float = 0.95,
    n: int = 2000,
    method: str = "bca",
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of a statistic over questions.

    For questions only: with many of them and one run. Not for means over a few seeds, where such an interval
    is far too narrow (at three seeds it leaves out 0 in 14 to 28 % of null cases); ``lab.claim`` has a t
    interval for those.

    Args:
        values: one number per question, [Q], or one row, [Q, ...]; questions are drawn with replacement, rows
            whole. For two arms on the same questions pass their differences.
        statistic: values of a resample -> number; None takes the mean.
        level: coverage, in (0, 1).
        n: number of resamples, at least 100.
        method: "bca" corrects bias and skew, "percentile" takes the plain quantiles.
        seed: of the resampling.

    Returns:
        (low, high). Equal ends if every resample gives the same number.

    Raises:
        ValueError: fewer than 2 questions, NaN among the values, or an option out of range.

    Source: none (plumbing)
    Basis: Efron's BCa interval, held against scipy.stats.bootstrap in the tests where scipy is installed.
    Differs: nothing

    Example:
        >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
        >>> round(low, 1), round(high, 1)
        (0.4, 0.6)
    """
    one_of("bootstrap_interval", ("bca", "percentile"), method=method)
    between("bootstrap_interval", 0, 1, level=level)
    at_least("bootstrap_interval", 100, n=n)
    data = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    if data.ndim < 1 or len(data) < 2 or not 0 < level < 1:
        raise ValueError(
            f"bootstrap_interval: expected at least 2 questions, level in (0, 1), got {data.shape}, {level}."
        )
    if np.isnan(data).any():
        raise ValueError(
            "bootstrap_interval: expected values without NaN, got NaN. Drop questions without a verdict."
        )
    of = statistic or (lambda x: float(x.mean()))
    draw, size = np.random.default_rng(seed), len(data)
    drawn = np.array([of(data[draw.integers(0, size, size)]) for _ in range(n)])
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca" and drawn.min() < drawn.max():
        tails = _bca(drawn, of(data), np.array([of(np.delete(data, i, 0)) for i in range(size)]), tails)
    low, high = np.quantile(drawn, tails)
    return float(low), float(high)


def _bca(
    drawn: NDArray[np.float64], whole: float, without: NDArray[np.float64], tails: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Tails of the BCa interval; ``without`` holds the statistic of the data without each question."""
    from statistics import NormalDist

    normal = NormalDist()
    share = ((drawn < whole).mean() + (drawn <= whole).mean()) / 2  # ties count half
    bias = normal.inv_cdf(min(max(float(share), 1 / (2 * len(drawn))), 1 - 1 / (2 * len(drawn))))
    apart = without.mean() - without
    spread = float((apart**2).sum())
    skew = float((apart**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    z = [bias + normal.inv_cdf(float(t)) for t in tails]
    return np.array([normal.cdf(bias + x / (1 - skew * x)) for x in z])
