"""Student-t and the interval of a claim: runs are seeds crossed with base checkpoints and with questions.

Private. Differences are arrays [N, Q]: one row per run (base, seed), one column per question, NaN = does not
apply.
"""

import math
import warnings
from functools import lru_cache

import numpy as np


def two_sided_p(t: float, df: float) -> float:
    """P(|T| >= |t|) for Student's t with ``df`` degrees of freedom (infinite df: the normal)."""
    if math.isinf(df):
        return math.erfc(abs(t) / math.sqrt(2))
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t))


@lru_cache(maxsize=4096)
def quantile(alpha: float, df: float) -> float:
    """The t above which |T| lies with probability ``alpha``: ``quantile(0.05, 4) = 2.776``."""
    low, high = 0.0, 2.0
    while two_sided_p(high, df) > alpha and high < 1e12:
        low, high = high, high * 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > alpha else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function by Lentz's continued fraction."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    if x >= (a + 1) / (a + b + 2):
        return 1.0 - front * _fraction(b, a, 1 - x) / b
    return front * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    result = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 + term * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + term / c
            c = c if abs(c) > tiny else tiny
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return result


def run_means(values: np.ndarray) -> np.ndarray:
    """Mean over the questions of each run, NaN left out."""
    return np.nanmean(values, axis=1)


def spread(values: np.ndarray, bases: list, seeds: list) -> list[tuple[float, float, str]]:
    """Standard errors of the grand mean with their degrees of freedom, one per factor drawn at random.

    Seeds: over the seeds' means, each averaged over the bases (where every seed met every base), df = seeds -
    1. Bases: over the bases' means, df = bases - 1. Questions: the variance that all runs share because they
    answer the same questions, estimated from products of two runs' residuals, so that the noise of single
    runs drops out; 0 where the runs answered different questions.
    """
    means = run_means(values)
    terms = []
    names_b, names_s = sorted(set(bases), key=str), sorted(set(seeds), key=str)
    at = {(b, s): m for b, s, m in zip(bases, seeds, means, strict=True)}
    crossed = len(at) == len(names_b) * len(names_s)
    if crossed or len(names_b) == 1:
        per_seed = np.array([np.mean([at[b, s] for b in names_b]) for s in names_s])
        terms.append((_standard_error(per_seed), len(per_seed) - 1.0, "seeds"))
    if len(names_b) > 1:
        per_base = np.array([np.mean([m for (b, _), m in at.items() if b == name]) for name in names_b])
        terms.append((_standard_error(per_base), len(per_base) - 1.0, "bases"))
    shared = shared_variance(values)
    if shared > 0:
        terms.append((math.sqrt(shared), math.inf, "questions"))
    return terms


def _standard_error(means: np.ndarray) -> float:
    return float(np.std(means, ddof=1) / math.sqrt(len(means)))


def shared_variance(values: np.ndarray) -> float:
    """Variance of the grand mean that comes from the choice of questions; 0 for a single question or run."""
    if min(values.shape) < 2:
        return 0.0
    residual = values - run_means(values)[:, None]
    present = ~np.isnan(residual)
    residual = np.where(present, residual, 0.0)
    k = present.sum(0)
    pairs = float((k * (k - 1)).sum())
    counted = int((k > 0).sum())
    if pairs == 0 or counted < 2:
        return 0.0
    products = float((residual.sum(0) ** 2 - (residual**2).sum(0)).sum())
    return max(0.0, products / pairs) / counted


def half_width(terms: list[tuple[float, float, str]], alpha: float) -> float:
    """Half of the interval: the wider of the seeds' and the bases' t intervals, with the questions' share.

    Taking the widest keeps the false-verdict rate at or under ``alpha`` whichever of the two varies
    (tests/test_lab_claim.py measures it); the usual sum of variances does not with three bases.
    """
    own = max((quantile(alpha, df) * se for se, df, kind in terms if kind != "questions"), default=0.0)
    questions = sum(quantile(alpha, df) * se for se, df, kind in terms if kind == "questions")
    return math.hypot(own, questions)


def p_value(distance: float, terms: list[tuple[float, float, str]]) -> float:
    """The alpha at which an interval of this spread just reaches ``distance`` from its middle."""
    distance = abs(distance)
    if not terms or half_width(terms, 0.5) == 0.0:
        return 1.0 if distance == 0 else 0.0
    random_terms = [(se, df) for se, df, kind in terms if kind != "questions"]
    if len(random_terms) == len(terms):  # no share of the questions: the exact answer
        return max(two_sided_p(distance / se, df) if se > 0 else 0.0 for se, df in random_terms)
    low, high = math.log(1e-12), 0.0
    if distance >= half_width(terms, 1e-12):
        return 1e-12
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if half_width(terms, math.exp(middle)) > distance else (low, middle)
    return math.exp((low + high) / 2)


def bootstrap(
    values: np.ndarray, *, alpha: float, draws: int = 4000, seed: int = 0
) -> tuple[float, float, np.ndarray]:
    """Percentile interval of one run's mean, its questions drawn with replacement, and the draws."""
    row = values[~np.isnan(values)]
    rng = np.random.default_rng(seed)
    means = np.array([row[rng.integers(0, len(row), len(row))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high), means


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment; see ``cotkit.lab.holm``."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def nan_mean(values: np.ndarray) -> float:
    """Mean of everything that is not NaN; NaN when nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(values))
