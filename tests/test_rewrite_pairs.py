"""Pins for rewrite.pairs: chosen and rejected from samples and from trees."""

import copy
import math

import pytest

from cotkit.rewrite.pairs import pairs, prefix_pairs


def sides(made):
    return [(p["chosen"], p["rejected"]) for p in made]


# Samples of one prompt


def test_pairs_by_gap():
    made = pairs(["a", "b", "c", "d"], [0.2, 0.9, None, 0.5])
    assert sides(made) == [("b", "a"), ("b", "d"), ("d", "a")]
    assert [p["gap"] for p in made] == pytest.approx([0.7, 0.4, 0.3])
    assert sides(pairs(["a", "b", "d"], [0.2, 0.9, 0.5], max_pairs=1)) == [("b", "a")]  # best against worst
    assert sides(pairs(["a", "b", "d"], [0.25, 1.0, 0.5], min_gap=0.5)) == [("b", "a"), ("b", "d")]  # >=


def test_equal_scores_and_equal_texts_make_no_pair():
    assert pairs(["a", "b"], [1.0, 1.0]) == []
    assert pairs(["a", "a"], [1.0, 0.0]) == []
    assert pairs([], []) == []
    assert pairs(["a", "b"], [None, 0.0]) == []
    assert pairs(["a", "b"], [1.0, 0.0], min_gap=1.01) == []  # eta above 1: none (SIPF)


def test_a_sample_drawn_twice_makes_one_pair():
    assert sides(pairs(["a", "b", "b", "a"], [True, False, False, True])) == [("a", "b")]


def test_the_three_most_dissimilar():
    """Jaccard of word sets with "1 2 3 4": 2/6, 0, 3/5, 1/7; the lowest three in that order."""
    texts = ["1 2 3 4", "1 2 5 6", "7", "1 2 3 9", "4 5 6 7"]
    made = pairs(texts, [1.0, 0.0, 0.0, 0.0, 0.0], max_pairs=3, choose="dissimilar")
    assert [p["rejected"] for p in made] == ["7", "4 5 6 7", "1 2 5 6"]
    near = pairs(
        texts,
        [1.0, 0.0, 0.0, 0.0, 0.0],
        max_pairs=1,
        choose="dissimilar",
        distance=lambda a, b: a[:4] == b[:4],
    )
    assert near[0]["rejected"] == "1 2 5 6"  # first of two with a common beginning
    assert pairs(["", " "], [1.0, 0.0], choose="dissimilar")[0]["gap"] == 1.0


def test_length_as_the_score():
    texts = ["a longer chain of thought", "short", "a long chain"]
    made = pairs(texts, [len(t.split()) for t in texts])
    assert all(len(p["chosen"]) > len(p["rejected"]) for p in made)
    assert len(made) == 3


@pytest.mark.errors
def test_pairs_refusals():
    with pytest.raises(ValueError, match="expected one score per completion, got 2 completions and 1 scores"):
        pairs(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="choose to be one of 'gap', 'dissimilar', got 'best'"):
        pairs(["a"], [1.0], choose="best")
    with pytest.raises(ValueError, match="min_gap >= 0"):
        pairs(["a"], [1.0], min_gap=-1)
    with pytest.raises(ValueError, match="max_pairs >= 1"):
        pairs(["a"], [1.0], max_pairs=0)
    with pytest.raises(TypeError, match="max_pairs as an int"):
        pairs(["a"], [1.0], max_pairs=1.5)
    with pytest.raises(ValueError, match="score finite, got nan"):
        pairs(["a"], [math.nan])
    with pytest.raises(TypeError, match="score as a number, got str"):
        pairs(["a"], ["1"])


# Steps of a tree


TREE = {
    "text": "root",
    "children": [
        {"text": "a", "value": 1, "children": [
            {"text": "aa", "value": 1},
            {"text": "ab", "value": 0},
            {"text": "ac", "value": 1},
            {"text": "ad", "value": 0},
        ]},
        {"text": "b", "value": 0, "children": [{"text": "ba", "value": 0}, {"text": "bb", "value": 0}]},
        {"text": "c", "value": None, "children": [{"text": "ca", "value": 1}, {"text": "cb", "value": 0}]},
    ],
}  # fmt: skip


def test_selected_steps_against_the_others_of_their_node():
    before = copy.deepcopy(TREE)
    made = prefix_pairs("q: ", TREE)
    assert before == TREE
    assert [(p["prompt"], p["chosen"], p["rejected"], p["depth"]) for p in made] == [
        ("q: ", "a", "b", 0),
        ("q: a\n", "aa", "ab", 1),
        ("q: a\n", "aa", "ad", 1),
        ("q: a\n", "ac", "ab", 1),
        ("q: a\n", "ac", "ad", 1),
        ("q: c\n", "ca", "cb", 1),
    ]
    assert prefix_pairs("", {"children": [{"text": "x", "value": 1, "children": []}]}) == []
    assert prefix_pairs("", {}) == []


def test_number_of_pairs_is_that_of_selected_times_unselected_siblings():
    paths = [
        (["a", "b", "c"], 1.0), (["a", "b", "d"], 0.0), (["a", "e", "f"], 0.0), (["a", "b", "g"], 1.0),
        (["h", "b", "d"], 0.0), (["a", "b"], 0.0),
    ]  # fmt: skip
    made = prefix_pairs("", paths, separator="|")
    # root: a against h; behind a: b against e; behind a|b: c and g against d
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in made] == [
        ("", "a", "h"),
        ("a|", "b", "e"),
        ("a|b|", "c", "d"),
        ("a|b|", "g", "d"),
    ]
    selected = {tuple(steps[: n + 1]) for steps, value in paths if value for n in range(len(steps))}
    for p in made:
        prefix = tuple(p["prompt"].split("|")[:-1])
        assert (*prefix, p["chosen"]) in selected
        assert (*prefix, p["rejected"]) not in selected


def test_first_wrong_pick_of_a_ranking():
    gold, sampled = ["[3]", "[1]", "[2]"], ["[3]", "[2]", "[1]"]
    made = prefix_pairs("", [(gold, 1.0), (sampled, 0.0)], separator=" ")
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in made] == [("[3] ", "[1]", "[2]")]
    assert prefix_pairs("", [(gold, 1.0), (gold, 0.0)]) == []


def test_extremes_of_a_node():
    children = [{"text": t, "value": v} for t, v in [("x", 0.2), ("y", 0.7), ("z", -0.5), ("w", 0.7)]]
    made = prefix_pairs("", {"children": children}, per_node="extremes", min_gap=0.1, min_chosen=-0.3)
    assert sides(made) == [("y", "z")]
    assert made[0]["gap"] == pytest.approx(1.2)
    close = [{"text": "x", "value": 0.5}, {"text": "y", "value": 0.45}]
    assert prefix_pairs("", {"children": close}, per_node="extremes", min_gap=0.1) == []
    low = [{"text": "x", "value": -0.4}, {"text": "y", "value": -0.9}]
    assert prefix_pairs("", {"children": low}, min_chosen=-0.3) == []
    assert len(prefix_pairs("", {"children": low}, min_chosen=-0.4)) == 1


def test_a_step_written_twice_counts_as_its_best():
    children = [{"text": t, "value": v} for t, v in [("x", 0), ("y", 1), ("x", 1), ("z", 0)]]
    assert sides(prefix_pairs("", {"children": children})) == [("x", "z"), ("y", "z")]


def test_a_deep_chain():
    steps = [str(i) for i in range(3000)]
    made = prefix_pairs("", [(steps, 1.0), ([*steps[:-1], "x"], 0.0)])
    assert [(p["depth"], p["rejected"]) for p in made] == [(2999, "x")]


@pytest.mark.errors
def test_prefix_pairs_refusals():
    with pytest.raises(ValueError, match="per_node to be one of 'all', 'extremes', got 'best'"):
        prefix_pairs("", {}, per_node="best")
    with pytest.raises(ValueError, match="expected text in every node"):
        prefix_pairs("", {"children": [{"value": 1}]})
    with pytest.raises(ValueError, match="steps of a path as a list, got one string"):
        prefix_pairs("", [("abc", 1.0)])
    with pytest.raises(ValueError, match="value finite"):
        prefix_pairs("", [(["a"], math.inf)])
    with pytest.raises(TypeError, match="value as a number, got str"):
        prefix_pairs("", {"children": [{"text": "a", "value": "1"}]})
    with pytest.raises(ValueError, match="min_gap >= 0"):
        prefix_pairs("", {}, min_gap=-0.1)
    with pytest.raises(ValueError, match="min_chosen finite"):
        prefix_pairs("", {}, min_chosen=math.nan)
