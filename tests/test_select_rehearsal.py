"""Pins for select.rehearsal: collateral damage and the weights of mix-cd."""

import random
from collections import Counter

import pytest

from cotkit.select.rehearsal import collateral_damage, mix_cd

T, F = True, False


def test_damage_by_hand():
    bins = [0, 0, 0, 0, 1, 1, 1, 3]
    was = [T, T, T, F, T, T, T, T]
    now = [F, T, F, F, T, None, F, None]  # bin 0: 2 of 3; bin 1: 1 of 2; 2 empty, 3 unseen: their mean
    mean = (2 / 3 + 1 / 2) / 2
    assert collateral_damage(bins, was, now) == pytest.approx([2 / 3, 1 / 2, mean, mean])
    later = collateral_damage(bins, was, now, previous=[0.1, 0.7, 0.3, 0.9], momentum=0.75)
    assert later == pytest.approx([0.075 + 0.5 / 3, 0.525 + 0.125, 0.3, 0.9])
    assert collateral_damage(bins, was, now, previous=[0.1, 0.7, 0.3, 0.9], momentum=0)[:2] == [2 / 3, 1 / 2]
    assert collateral_damage(bins, was, [None] * 8) == [1.0] * 4
    assert collateral_damage([0, 1], [F, F], [F, T]) == [1.0, 1.0]  # what was wrong is no damage
    assert collateral_damage([0, 0], [T, F], [T, F]) == [0.0]


def test_equal_shares_are_even_over_what_was_right():
    bins, was = [0, 0, 0, 1, 2, 2], [T, F, T, T, T, F]
    assert mix_cd(bins, was) == [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert mix_cd(bins, was, [0.4, 0.4, 0.4]) == [0.4, 0.0, 0.4, 0.4, 0.4, 0.0]


def test_a_bin_is_drawn_by_damage_times_mass():
    bins = [0] * 30 + [1] * 10 + [2] * 60
    was = [i % 3 > 0 for i in range(30)] + [T] * 10 + [T] * 60  # 20, 10, 60 right
    weights = mix_cd(bins, was, [0.5, 0.2, 0.0], floor=0.05)
    masses = [sum(w for w, k in zip(weights, bins, strict=True) if k == b) for b in range(3)]
    assert masses == pytest.approx([10, 2, 3])  # .5 * 20, .2 * 10, .05 * 60
    drawn = Counter(bins[i] for i in random.Random(0).choices(range(100), weights=weights, k=30_000))
    assert [drawn[b] / 30_000 for b in range(3)] == pytest.approx([10 / 15, 2 / 15, 3 / 15], abs=0.01)
    assert mix_cd(bins, was, [0.5, 0.2, 0.0], floor=0)[-1] == 0


def test_rehearsal_finds_the_fragile_bin_without_a_forward_pass_of_its_own():
    rng, calls = random.Random(1), Counter()
    bins, was = [i % 4 for i in range(200)], [T] * 200
    shares = None
    for _ in range(50):
        old = rng.choices(range(200), weights=mix_cd(bins, was, shares), k=8)
        now: list[bool | None] = [None] * 200
        for i in old:
            calls["forward"] += 1
            now[i] = not (bins[i] == 2 and rng.random() < 0.8)
        shares = collateral_damage(bins, was, now, previous=shares)
    assert calls["forward"] == 400
    assert shares is not None
    assert max(range(4), key=shares.__getitem__) == 2
    assert shares[2] > 5 * max(shares[0], shares[1], shares[3])


@pytest.mark.errors
def test_refusals():
    for call, error, text in (
        (lambda: collateral_damage([], [], []), ValueError, "rows with a bin each, got 0 and 0"),
        (lambda: collateral_damage([0], [T, T], [T]), ValueError, "got 1 and 2"),
        (lambda: collateral_damage([0, 1], [T, T], [T]), ValueError, "2 in is_right, got 1"),
        (lambda: collateral_damage([-1], [T], [T]), ValueError, "bins from 0 on, got -1"),
        (lambda: collateral_damage([0.5], [T], [T]), TypeError, "bins as ints"),
        (lambda: collateral_damage([0], [T], [T], momentum=1), ValueError, "momentum < 1"),
        (
            lambda: collateral_damage([0, 1], [T, T], [T, T], previous=[0.1]),
            ValueError,
            "each of 2 bins, got 1",
        ),
        (lambda: mix_cd([0, 1], [T, T], [0.1, 1.5]), ValueError, r"share in \[0, 1\]"),
        (lambda: mix_cd([0, 1], [T, T], floor=2), ValueError, r"floor in \[0, 1\]"),
        (lambda: mix_cd([0, 1], [F, F]), ValueError, "a row to rehearse"),
        (lambda: mix_cd([0], [T], [0.0], floor=0), ValueError, "a row to rehearse"),
    ):
        with pytest.raises(error, match=text):
            call()
