import collections
import itertools
import math
import random

import pytest

from cotkit.select.curriculum import match_distribution, schedule


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", 0.9 - 0.8 * 0.25),
        ("cosine", 0.1 + 0.8 * (1 + math.sqrt(0.5)) / 2),
        ("exponential", 0.9 * (1 / 9) ** 0.25),
        ("inverse", 1 / (0.75 / 0.9 + 0.25 / 0.1)),
        ("half-sine", 0.1 + 0.8 * math.sin(math.pi / 2 * 0.75)),
    ],
)
def test_one_value_of_each_kind(kind, expected):
    assert schedule(3, 12, 0.9, 0.1, kind=kind) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential", "inverse", "half-sine"])
@pytest.mark.parametrize(("start", "end"), [(0.9, 0.1), (0.2, 3.0), (0.4, 0.4)])
def test_ends_order_and_stay(kind, start, end):
    values = [schedule(s, 7, start, end, kind=kind) for s in range(9)]
    assert all(type(v) is float for v in values)
    assert values[0] == pytest.approx(start, abs=1e-12)
    assert values[7:] == pytest.approx([end, end], abs=1e-12)
    rising = 1 if end >= start else -1
    assert all(rising * (b - a) >= -1e-12 for a, b in itertools.pairwise(values))


def test_warm_up_and_hold_are_shares_of_the_run():
    # of 20 steps: 4 rise from 0 to .6, 6 stay, 10 fall from .6 to .2
    values = [schedule(s, 20, 0.6, 0.2, warmup=0.2, hold=0.3) for s in (0, 1, 3, 4, 9, 10, 15, 20, 25)]
    assert values == pytest.approx([0, 0.15, 0.45, 0.6, 0.6, 0.6, 0.4, 0.2, 0.2], abs=1e-12)
    assert schedule(4, 4, 0.6, 0.2, hold=1.0) == 0.2
    assert schedule(3, 4, 0.6, 0.2, hold=1.0) == 0.6


def test_caft_reversed_sine():
    # the authors' coefficient: sin((S - s) / S * pi / 2)
    for s in range(0, 11):
        assert schedule(s, 10, 1.0, 0.0, kind="half-sine") == pytest.approx(
            math.sin((10 - s) / 10 * math.pi / 2), abs=1e-12
        )


@pytest.mark.parametrize(("total", "p"), [(90, 0.4), (100, 0.15)])
def test_masked_thought_warm_up(total, p):
    for step in range(total + 1):  # the authors' line, the + 1 included
        literal = min(p, p * step / (2 / 3 * total + 1))
        assert schedule(step, 2 / 3 * total + 1, 0.0, p) == pytest.approx(literal, abs=1e-12)


def test_uft_hint_probability():
    for t in (0, 77, 300):  # .05 + .5 * .9 * (1 + cos(pi t / 300))
        expected = 0.05 + 0.45 * (1 + math.cos(math.pi * t / 300))
        assert schedule(t, 300, 0.95, 0.05, kind="cosine") == pytest.approx(expected, abs=1e-12)


# match_distribution


def histogram(levels, drawn):
    return dict(sorted(collections.Counter(levels[i] for i in drawn).items()))


LEVELS = [3, 1, 2, 5, 4, 1, 1, 2, 3, 1, 2, 4, 1, 1, 5, 2, 3, 1, 2, 4]  # 7, 5, 3, 3, 2 rows of levels 1 to 5


def test_the_drawn_histogram_is_the_wanted_one():
    # 9 rows at 5 : 4 : 3 : 2 : 1 of 15: 3, 2.4, 1.8, 1.2, .6 -> 3, 2, 2, 1, 1 (remainders .8 and .6 first)
    falling = {1: 5, 2: 4, 3: 3, 4: 2, 5: 1}
    seen = set()
    for seed in range(30):
        drawn = match_distribution(LEVELS, falling, 9, rng=random.Random(seed))
        assert drawn == sorted(set(drawn))
        assert histogram(LEVELS, drawn) == {1: 3, 2: 2, 3: 2, 4: 1, 5: 1}
        seen |= set(drawn)
    assert seen == set(range(20))  # every row has its chance
    scaled = {level: weight / 15 for level, weight in falling.items()}
    again = match_distribution(LEVELS, scaled, 9, rng=random.Random(29))
    assert again == drawn


def test_equal_remainders_go_to_the_lower_level():
    assert histogram(LEVELS, match_distribution(LEVELS, {2: 1, 1: 1}, 5, rng=random.Random(0))) == {
        1: 3,
        2: 2,
    }
    # thirds in floats: 3 rows at .1 each are 1, 1, 1
    drawn = match_distribution(LEVELS, {1: 0.1, 2: 0.1, 3: 0.1}, 3, rng=random.Random(0))
    assert histogram(LEVELS, drawn) == {1: 1, 2: 1, 3: 1}


def test_a_level_with_too_few_rows_borrows_from_the_nearest():
    def spill(weights, k):
        return histogram(LEVELS, match_distribution(LEVELS, weights, k, rng=random.Random(1)))

    assert spill({4: 1, 5: 3}, 4) == {4: 2, 5: 2}  # 1 and 3 wanted, 2 rows of level 5
    assert spill({1: 1, 2: 0, 3: 2, 4: 1}, 8) == {1: 2, 3: 3, 4: 3}  # 2, 4, 2 wanted; 2 is never drawn from
    assert spill({2: 1, 3: 4, 4: 1}, 6) == {2: 2, 3: 3, 4: 1}  # 1, 4, 1: levels 2 and 4 equally near
    assert spill({3: 1, 1: 1e-6}, 5) == {1: 2, 3: 3}
    assert spill(dict.fromkeys(range(1, 6), 1), 20) == {1: 7, 2: 5, 3: 3, 4: 3, 5: 2}
    assert spill({1: 1}, 0) == {}
    # level 3 has no row; that of level 4 is its own, so the lower of what is left and near comes in
    levels = [1, 1, 1, 4, 6, 6, 6]
    drawn = match_distribution(levels, {1: 1, 3: 1, 4: 1, 6: 1}, 4, rng=random.Random(2))
    assert histogram(levels, drawn) == {1: 2, 4: 1, 6: 1}


@pytest.mark.errors
def test_refusals_of_match_distribution():
    rng = random.Random(0)
    with pytest.raises(
        ValueError, match="expected k of at most 2 rows in the levels of the distribution, got 3"
    ):
        match_distribution(LEVELS, {5: 1, 4: 0}, 3, rng=rng)
    with pytest.raises(ValueError, match="expected a weight above 0, got none"):
        match_distribution(LEVELS, {1: 0}, 1, rng=rng)
    with pytest.raises(ValueError, match="weight of level 1 >= 0, got -1"):
        match_distribution(LEVELS, {1: -1}, 1, rng=rng)
    with pytest.raises(ValueError, match="k >= 0, got -2"):
        match_distribution(LEVELS, {1: 1}, -2, rng=rng)
    with pytest.raises(TypeError, match="k as an int, got float"):
        match_distribution(LEVELS, {1: 1}, 2.0, rng=rng)
    with pytest.raises(TypeError, match=r"levels as whole numbers, got 0\.5 in row 1"):
        match_distribution([1, 0.5], {1: 1}, 1, rng=rng)
    with pytest.raises(TypeError, match=r"random\.Random"):
        match_distribution(LEVELS, {1: 1}, 1, rng=0)


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="schedule: expected kind to be one of"):
        schedule(0, 1, 0.0, 1.0, kind="sine")
    with pytest.raises(ValueError, match="total > 0"):
        schedule(0, 0, 0.0, 1.0)
    with pytest.raises(ValueError, match="step >= 0"):
        schedule(-1, 3, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"warmup \+ hold in \[0, 1\], got 1.1"):
        schedule(1, 3, 0.0, 1.0, warmup=0.6, hold=0.5)
    for kind in ("exponential", "inverse"):
        with pytest.raises(ValueError, match=r"end > 0, got 0\.0"):
            schedule(1, 3, 1.0, 0.0, kind=kind)
    with pytest.raises(ValueError, match="start finite"):
        schedule(1, 3, math.inf, 1.0)
