"""Pins for metrics."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from cotkit.metrics import (
    accuracy,
    assessment_accuracy,
    best_at_k,
    bootstrap_interval,
    flips,
    maj_at_k,
    pass_at_k,
)


def test_accuracy():
    assert accuracy([1, 0, 0, 1, 1]) == 0.6
    assert accuracy(torch.tensor([[True, False], [True, True]])) == 0.75


def test_pass_at_k():
    assert pass_at_k([[1, 0, 0, 0]], 2) == pytest.approx(0.5)  # 1 - C(3,2)/C(4,2) = 1 - 3/6; naive 0.4375
    assert pass_at_k([[0, 0, 0]], 2) == 0.0
    assert pass_at_k([[1, 0, 0]], 3) == 1.0
    assert pass_at_k([[1, 1, 0, 0, 0], [0, 0, 0, 0, 1]], 2) == pytest.approx(
        (0.7 + 0.4) / 2
    )  # 1-3/10, 1-6/10
    assert pass_at_k([[1, 0, 0, 0]] * 3, 1) == pytest.approx(0.25)


def test_pass_at_k_is_unbiased():
    c, n, k = 3, 7, 3
    row = [1] * c + [0] * (n - c)
    rng = random.Random(1)
    drawn = [any(rng.sample(row, k)) for _ in range(20000)]
    assert pass_at_k([row], k) == pytest.approx(sum(drawn) / len(drawn), abs=0.01)


def test_pass_at_k_reads_the_last_places():
    correct = np.zeros((1, 1, 16, 2))
    for place in (3, 7, 11, 15):
        correct[0, 0, place, 0] = 1
    assert pass_at_k(correct, 1, h=4, m=1) == 1.0
    assert pass_at_k(correct, 1, h=4) == 0.5
    assert pass_at_k(correct, 1) == pytest.approx(4 / 32)


def test_best_at_k_counts_all_subsets():
    correct = [[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0]]
    scores = [
        [0.3, 0.9, -1.2, 0.3, 0.1, 0.3],
        [2.0, 2.0, 2.0, -math.inf, 0.5, 0.5],
    ]  # ties of right and wrong
    for k in range(1, 7):
        picked = []
        for right, score in zip(correct, scores, strict=True):
            for subset in itertools.combinations(range(6), k):
                top = max(score[i] for i in subset)
                ties = [right[i] for i in subset if score[i] == top]
                picked.append(sum(ties) / len(ties))
        assert best_at_k(correct, scores, k) == pytest.approx(sum(picked) / len(picked), abs=1e-12)


def test_best_at_k_ends():
    correct = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    scores = torch.tensor([[0.1, 0.5, 0.9, 0.3, 0.2], [0.1, 0.5, 0.9, 0.3, 0.2]])
    assert best_at_k(correct, scores, 1) == pytest.approx(accuracy(correct))
    assert best_at_k(correct, scores, 5) == 0.5  # the top one: wrong, right
    for k in range(1, 6):
        assert best_at_k(correct, correct, k) == pytest.approx(pass_at_k(correct, k))
        assert best_at_k(correct, torch.zeros(2, 5), k) == pytest.approx(accuracy(correct))
        assert best_at_k(correct, -correct, k) <= best_at_k(correct, scores, k) <= pass_at_k(correct, k)


def test_flips():
    before, after = [1, 1, 0, 0, 0, 0, 1, 1], [1, 0, 1, 1, 1, 0, 0, 1]
    assert flips(before, after) == {"won": 3 / 8, "lost": 2 / 8, "kept": 2 / 8, "missed": 1 / 8}
    table = flips(torch.tensor([[True, False]]), np.array([[False, False]]))
    assert table == {"won": 0, "lost": 0.5, "kept": 0, "missed": 0.5}
    assert accuracy(after) - accuracy(before) == pytest.approx(3 / 8 - 2 / 8)


def test_maj_at_k():
    assert maj_at_k([["7", "8", "7.0", "8", "8"]], ["7"], 3) == 1.0
    assert maj_at_k([["7", "8", "7.0", "8", "8"]], ["7"], 5) == 0.0
    assert maj_at_k([["7", "8"]], ["7"], 2) == 0.5  # a tie
    assert maj_at_k([[None, None, "7"]], ["7"], 3) == 1.0
    assert maj_at_k([[None, None]], ["7"], 2) == 0.0
    assert maj_at_k([["a", "A"], ["b", "c"]], ["a", "x"], 2, same=lambda a, b: a == b) == 0.25


def test_assessment_accuracy():
    scores = torch.tensor([[-1.0, -2.0, -3.0, -9.0], [-1.0, -0.5, -0.7, -0.7]])
    positive = torch.tensor([[False, True, False, True], [True, False, True, False]])
    valid = torch.tensor([[True, True, True, False], [True, True, True, True]])
    # question 1: -2 against -1 (lost) and -3 (won) = 1 of 2
    # question 2: -1 against -.5 and -.7 (lost), -.7 against -.5 (lost) and -.7 (tie) = 0.5 of 4
    assert assessment_accuracy(scores, positive, valid) == pytest.approx(1.5 / 6)
    assert assessment_accuracy(scores, positive, valid, per="question") == pytest.approx(
        (1 / 2 + 0.5 / 4) / 2
    )
    assert assessment_accuracy(scores, positive) == pytest.approx((1 + 0.5) / 8)  # -9 loses twice more
    assert math.isnan(assessment_accuracy(scores, torch.ones_like(positive)))
    scores[0, 3] = math.nan  # padding
    assert assessment_accuracy(scores, positive, valid) == pytest.approx(1.5 / 6)
    assert assessment_accuracy(-scores, positive, valid) == pytest.approx(1 - 1.5 / 6)


def test_bootstrap_interval():
    rng = np.random.default_rng(3)
    values = rng.exponential(size=60)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    plain = bootstrap_interval(values, method="percentile")
    assert low > plain[0]  # skew to the right: BCa moves both ends up
    assert high > plain[1]
    assert bootstrap_interval([2.0] * 5) == (2.0, 2.0)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    pairs = np.stack([values, 2 * values], 1)
    assert bootstrap_interval(pairs, lambda x: float(x[:, 1].sum() / x[:, 0].sum())) == pytest.approx((2, 2))


def test_bootstrap_covers():
    rng = np.random.default_rng(5)
    hits = 0
    for i in range(200):
        low, high = bootstrap_interval(rng.random(80) < 0.7, n=300, seed=i)
        hits += low <= 0.7 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).exponential(size=60)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="BCa", random_state=0
    ).confidence_interval
    assert bootstrap_interval(values, n=20000) == pytest.approx((theirs.low, theirs.high), rel=0.02)


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="at least one sample"):
        accuracy([])
    with pytest.raises(ValueError, match="as 0 and 1"):
        accuracy([0.5])
    with pytest.raises(ValueError, match="from 1 to 2, got 3"):
        pass_at_k([[1, 0]], 3)
    with pytest.raises(ValueError, match="for h and m"):
        pass_at_k([[1, 0]], 1, h=2)
    with pytest.raises(ValueError, match="h to divide"):
        pass_at_k(np.ones((1, 1, 4, 1)), 1, h=3)
    with pytest.raises(ValueError, match="at least 3 samples"):
        maj_at_k([["1"]], ["1"], 3)
    with pytest.raises(ValueError, match="expected equal shapes"):
        assessment_accuracy([[1.0, 2.0]], [[True]])
    with pytest.raises(ValueError, match="without NaN"):
        assessment_accuracy([[math.nan, 2.0]], [[True, False]])
    with pytest.raises(ValueError, match="at least 2 questions"):
        bootstrap_interval([1.0])
    with pytest.raises(ValueError, match="without NaN"):
        bootstrap_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="best_at_k: expected k as an integer from 1 to 2, got 3"):
        best_at_k([[1, 0]], [[0.1, 0.2]], 3)
    with pytest.raises(ValueError, match=r"best_at_k: expected equal shapes, got correct \[1, 2\]"):
        best_at_k([[1, 0]], [[0.1, 0.2, 0.3]], 1)
    with pytest.raises(ValueError, match="best_at_k: expected scores without NaN"):
        best_at_k([[1, 0]], [[0.1, math.nan]], 1)
    with pytest.raises(ValueError, match="flips: expected equal shapes"):
        flips([1, 0], [1])
    with pytest.raises(ValueError, match="flips: expected at least one sample"):
        flips([], [])
