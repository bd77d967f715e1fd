"""Pins for select.difficulty."""

import copy
import math

import pytest

from cotkit.rewards.answer import accuracy
from cotkit.select.difficulty import pass_rate, tiers

ROWS = [
    {"prompt": "1+1=", "answer": "2"},
    {"prompt": "2+3=", "answer": "5"},
    {"prompt": "9*9=", "answer": "81"},
]


def writes(table):
    """A model that knows a list of texts per prompt, and writes down what it was asked."""
    asked = []

    def generate(prompts, n):
        asked.append((list(prompts), n))
        return [table[p][:n] for p in prompts]

    return generate, asked


def test_share_of_right_samples():
    generate, asked = writes({"1+1=": ["2", "2", "3", "2", "2"], "2+3=": ["6"] * 5, "9*9=": ["81"] * 5})
    before = copy.deepcopy(ROWS)
    assert pass_rate(ROWS, generate, accuracy(), n=5) == [0.8, 0.0, 1.0]  # copies count each time
    assert asked == [(["1+1=", "2+3=", "9*9="], 5)]  # one call for all
    assert before == ROWS
    assert [5 - round(5 * r) + 1 for r in (0.8, 0.0, 1.0)] == [2, 6, 1]  # AlphaMed's levels
    assert pass_rate([], generate, accuracy()) == []


def test_rewards_at_or_below_0_do_not_pass_and_none_is_left_out():
    scores = [0.1, 0.0, None, -1.0, math.nan, None, None, None, 2.0, 2.0, -0.5, 0.5]

    def reward(prompts, completions, **columns):
        assert len(prompts) == len(completions) == 12
        assert columns == {"answer": ["2"] * 4 + ["5"] * 4 + ["81"] * 4}
        return scores

    generate, _ = writes({row["prompt"]: list("abcd") for row in ROWS})
    assert pass_rate(ROWS, generate, reward, n=4) == [pytest.approx(1 / 3), None, 0.75]


def test_several_ways_to_ask():
    table = {"Q: 1+1=": ["2", "0"], "1+1=?": ["0", "0"], "Q: 2+3=": ["5", "5"], "2+3=?": ["5", "0"]}
    generate, asked = writes(table)
    ways = [lambda row: "Q: " + row["prompt"], lambda row: row["prompt"] + "?"]
    assert pass_rate(ROWS[:2], generate, accuracy(), n=2, prompts=ways) == [0.25, 0.75]
    assert asked == [(list(table), 2)]


def test_bins_hold_their_upper_edge():
    edges = (0, 0.25, 0.5, 0.75, 0.875, 1)
    rates = [0.0, 0.01, 0.25, 0.26, 0.5, 0.75, 7 / 8, 0.9, 1.0]
    assert tiers(rates, edges) == [0, 1, 1, 2, 2, 3, 4, 5, 6]
    assert tiers([0.0, 1e-9, 0.5, 1 - 1e-9, 1.0]) == [0, 1, 1, 1, 2]
    assert tiers([0.0, 0.3, 0.7, 1.0], edges=(0.5,)) == [0, 0, 1, 1]  # no bins of their own unless named
    assert tiers([0.2, 0.0, 1.0], edges=(0.0,)) == [1, 0, 1]
    assert tiers([]) == []


def test_dynamic_sampling_and_the_hardest():
    rates = [0.0, 0.3, 1.0, 0.9, 0.0]
    assert [i for i, r in enumerate(rates) if 0 < r < 1] == [i for i, t in enumerate(tiers(rates)) if t == 1]
    assert [i for i, t in enumerate(tiers(rates)) if t == 0] == [0, 4]


@pytest.mark.errors
def test_refusals():
    unused, _ = writes({})
    with pytest.raises(ValueError, match="pass_rate: expected a way to ask, got none"):
        pass_rate(ROWS, unused, accuracy(), prompts=[])
    with pytest.raises(ValueError, match="n >= 1, got 0"):
        pass_rate(ROWS, unused, accuracy(), n=0)
    with pytest.raises(ValueError, match="tiers: expected ascending edges"):
        tiers([0.5], edges=(0.5, 0.2))
    with pytest.raises(ValueError, match="tiers: expected ascending edges"):
        tiers([0.5], edges=())
    with pytest.raises(ValueError, match=r"tiers: expected edges in \[0, 1\], got 2"):
        tiers([0.5], edges=(0, 2))
    with pytest.raises(ValueError, match=r"tiers: expected rates in \[0, 1\], got 1.5"):
        tiers([1.5])
    with pytest.raises(ValueError, match="tiers: expected rates finite"):
        tiers([math.nan])
    with pytest.raises(TypeError, match="tiers: expected rates as a number, got NoneType"):
        tiers([None])
