"""Pins for bootstrap.reject."""

import copy

import pytest

from cotkit.bootstrap.reject import _edits, rejection_sampling, sample_and_score
from cotkit.rewards.answer import accuracy

ROWS = [
    {"prompt": "3+4+5?", "completion": "3+4=7 7+5=12 #### 12", "answer": "12", "level": 1},
    {"prompt": "1+1?", "completion": "1+1=2 #### 2", "answer": "2"},
]


def writer(*texts):
    return lambda _prompts, _n: [list(t) for t in texts]


def test_groups_keep_order_columns_and_duplicates():
    before, seen = copy.deepcopy(ROWS), {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [float(c.strip()) if c.strip().isdigit() else None for c in completions]

    groups = sample_and_score(ROWS, writer(["1", "2", "1 "], ["x", "5", "x"]), reward, n=3)
    assert [g["rewards"] for g in groups] == [[1.0, 2.0, 1.0], [None, 5.0, None]]
    assert [g["duplicate"] for g in groups] == [[False, False, True], [False, False, True]]
    assert [g["completions"] for g in groups] == [["1", "2", "1 "], ["x", "5", "x"]]
    assert seen["prompts"] == ["3+4+5?"] * 3 + ["1+1?"] * 3
    assert seen["level"] == [1, 1, 1, None, None, None]
    assert "completion" not in seen
    assert groups[0]["completion"] == ROWS[0]["completion"]
    assert before == ROWS
    assert sample_and_score([], writer(), reward) == []


def sampled(made):
    return [r["completion"] for r in made if r["source"] == "sample"]


def test_distinct_by_equations():
    texts = ["3 + 4 = 7, 7+5 = 12 #### 12", "we add: 3+4=7 and 7+5=12 #### 12", "4+5=9 9+3=12 #### 12"]
    texts += ["4+5=8 8+4=12 #### 12", "3+5=8 8+4=11 #### 11"]  # a false equation; a wrong answer
    made = rejection_sampling(ROWS[:1], writer(texts), accuracy(), n=5)
    assert made[0] == ROWS[0] | {"source": "gold"}
    assert len(sampled(made)) == 2
    assert texts[2] in sampled(made)
    assert all(r["prompt"] == "3+4+5?" and r["reward"] == 1.0 for r in made[1:])


def test_farthest_of_three_paths():
    texts = ["aaaa", "b", "bbbbbbbb"]  # "b.." is one key; the longer one is farther from "aaaa" (8 against 4)
    made = rejection_sampling(
        ROWS[:1], writer(texts), lambda **_: [1.0] * 3, n=3, key=lambda t: t[0], gold=False
    )
    assert sampled(made) == ["aaaa", "bbbbbbbb"]
    near = rejection_sampling(
        ROWS[:1],
        writer(["aaaa", "bbbbbbbb", "b"]),
        lambda **_: [1.0] * 3,
        n=3,
        key=lambda t: t[0],
        gold=False,
    )
    assert sampled(near) == ["aaaa", "bbbbbbbb"]


def test_unsolved_rows_keep_their_gold_and_other_modes():
    texts = [["#### 1", "#### 1", "#### 12"], ["#### 3", "#### 4", "#### 3"]]
    made = rejection_sampling(ROWS, writer(*texts), accuracy(), n=3, keep="all")
    assert [(r["prompt"], r["source"]) for r in made] == [
        ("3+4+5?", "gold"), ("3+4+5?", "sample"), ("1+1?", "gold"),
    ]  # fmt: skip
    assert sampled(rejection_sampling(ROWS, writer(*texts), accuracy(), n=3, keep="failing")) == [
        "#### 1", "#### 3", "#### 4",
    ]  # fmt: skip
    copies = writer(["#### 12"] * 3)
    assert len(sampled(rejection_sampling(ROWS[:1], copies, accuracy(), n=3, keep="all"))) == 3
    assert len(sampled(rejection_sampling(ROWS[:1], copies, accuracy(), n=3, keep="all", per_row=2))) == 2
    assert len(sampled(rejection_sampling(ROWS[:1], copies, accuracy(), n=3))) == 1
    graded = rejection_sampling(ROWS[:1], copies, lambda **_: [0.4, 0.5, 0.6], n=3, keep="all", threshold=0.5)
    assert [r["reward"] for r in graded[1:]] == [0.5, 0.6]


def test_edit_distance():
    assert _edits("kitten", "sitting") == 3
    assert _edits("", "abc") == 3
    assert _edits("abc", "abc") == 0


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="expected 2 completions for each of 1 prompts"):
        sample_and_score(ROWS[:1], writer(["1"]), accuracy(), n=2)
    with pytest.raises(ValueError, match="expected 1 scores from reward, got 2"):
        sample_and_score(ROWS[:1], writer(["1"]), lambda **_: [1.0, 2.0], n=1)
    with pytest.raises(ValueError, match="every row with a prompt"):
        sample_and_score([{"question": "?"}], writer(["1"]), accuracy(), n=1)
    with pytest.raises(ValueError, match="n >= 1"):
        sample_and_score(ROWS, writer(), accuracy(), n=0)
    with pytest.raises(ValueError, match="expected keep to be one of"):
        rejection_sampling(ROWS, writer(), accuracy(), keep="best")
    with pytest.raises(ValueError, match="gold=False"):
        rejection_sampling([{"prompt": "?", "answer": "1"}], writer(["1"]), accuracy(), n=1)
    with pytest.raises(ValueError, match="per_row >= 1"):
        rejection_sampling(ROWS, writer(), accuracy(), per_row=0)
