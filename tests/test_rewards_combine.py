"""Pins for rewards.combine."""

# ruff: noqa: ARG001

import math
import pickle

import pytest

from cotkit.rewards.answer import accuracy
from cotkit.rewards.combine import gated, weighted
from cotkit.rewards.format import tags
from cotkit.rewards.length import relative

GOOD, BARE, BAD = (
    "<think>2+2</think><answer>4</answer>",
    "<answer>4</answer>",
    "<think>2</think><answer>5</answer>",
)


def first(prompts, completions, **columns):
    return [0.5, -3.0, None, None]


def second(prompts, completions, **columns):
    return [2.0, None, 7.0, None]


def ones(prompts, completions, **columns):
    return [1] * len(completions)


def empty(prompts, completions, **columns):
    return []


def endless(prompts, completions, **columns):
    return [math.inf] * len(completions)


def unknown(prompts, completions, **columns):
    return [math.nan] * len(completions)


def length(text):
    return len(text.split())


def test_weighted_sum_leaves_out_what_cannot_be_scored():
    reward = weighted([first, second], [0.9, -0.1])
    # .9*.5 - .1*2 = .25; .9*-3 = -2.7; -.1*7 = -.7; nothing known
    assert reward("????", "abcd") == pytest.approx([0.25, -2.7, -0.7, None])
    assert weighted([first, second])("????", "abcd") == [2.5, -3.0, 7.0, None]
    assert weighted([unknown, first])("????", "abcd") == [0.5, -3.0, None, None]  # NaN is TRL's None
    assert weighted([weighted([first], [2.0]), second], [1.0, 3.0])("????", "abcd") == [7.0, -6.0, 21.0, None]


def test_the_recipe_of_rex_thinker():
    # Overall 0.9 of F1 plus 0.1 of the format: 0.9 + 0.1, 0.9 alone, 0.1 alone.
    reward = weighted([accuracy(), tags()], [0.9, 0.1])
    assert reward("???", [GOOD, BARE, BAD], answer=["4"] * 3) == pytest.approx([1.0, 0.9, 0.1])
    assert reward("?", [GOOD], answer=[None]) == [0.1]


def test_gate():
    # RAIF: right 2, wrong -1.5, and -2 for a broken form whatever the answer
    reward = gated(accuracy(right=2.0, wrong=-1.5), tags(), closed=-2.0)
    assert reward("???", [GOOD, BARE, BAD], answer=["4"] * 3) == [2.0, -2.0, -1.5]
    assert reward("?", [GOOD], answer=[None]) == [None]
    assert reward("?", [BARE], answer=[None]) == [-2.0]  # closed: not scored at all
    assert gated(ones, first)("????", "abcd") == [1.0, 0.0, None, None]  # -3 closes, None stays None
    assert gated(unknown, first)("????", "abcd", closed="a column") == [None, 0.0, None, None]


def test_closed_completions_are_not_scored():
    seen = []

    def costly(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [5.0] * len(completions)

    gate = tags()
    columns = {"answer": ["a", "b", "c"], "trainer_state": "state"}
    assert gated(costly, gate)(["x", "y", "z"], [GOOD, BARE, BAD], **columns) == [5.0, 0.0, 5.0]
    assert seen == [(["x", "z"], [GOOD, BAD], {"answer": ["a", "c"], "trainer_state": "state"})]
    assert gated(costly, gate)(["y"], [BARE]) == [0.0]
    assert len(seen) == 1
    assert gated(costly, gate)(None, [GOOD]) == [5.0]
    assert seen[-1][0] is None


def test_a_group_stays_whole_behind_a_gate():
    texts = ["#### 4 a b", "<think>c</think><answer>4</answer>", "#### 4"]  # 4, 1 and 2 words
    reward = gated(relative(accuracy(), length=length), tags(names=("think",), rest=True), closed=-9.0)
    assert reward.grouped
    assert reward("???", texts, answer=["4"] * 3) == [-9.0, 0.5, -9.0]  # the shortest of three, not of one
    assert weighted([accuracy(), reward]).grouped
    assert gated(accuracy(), weighted([reward])).grouped
    assert not weighted([accuracy()]).grouped
    assert not gated(accuracy(), tags()).grouped


def test_pickle_and_names():
    for reward, name in ((weighted([accuracy(), tags()]), "weighted"), (gated(accuracy(), tags()), "gated")):
        back = pickle.loads(pickle.dumps(reward))
        assert back("??", [GOOD, BARE], answer=["4"] * 2) == reward("??", [GOOD, BARE], answer=["4"] * 2)
        assert reward.func.__name__ == name
        assert back.grouped is False
        assert reward([], [], answer=[]) == []
        chat = [[{"role": "assistant", "content": GOOD}]]
        assert reward([[{"role": "user", "content": "?"}]], chat, answer=["4"]) == reward(
            "?", [GOOD], answer=["4"]
        )


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="weighted: expected at least one reward, got none"):
        weighted([])
    with pytest.raises(ValueError, match="weighted: expected 1 weights, got 2"):
        weighted([first], [1.0, 2.0])
    with pytest.raises(TypeError, match=r"weighted: expected rewards\[0\] as a function, got str"):
        weighted(["accuracy"])
    with pytest.raises(ValueError, match=r"weighted: expected weights\[0\] finite"):
        weighted([first], [math.inf])
    with pytest.raises(ValueError, match="weighted: expected 1 rewards, got 0 from empty"):
        weighted([empty])("?", ["a"])
    with pytest.raises(ValueError, match="gated: expected finite rewards or None, got inf from endless"):
        gated(endless, tags())("?", [GOOD])
    with pytest.raises(TypeError, match="gated: expected gate as a function, got float"):
        gated(first, 0.5)
    with pytest.raises(ValueError, match="gated: expected closed finite"):
        gated(first, second, closed=math.nan)
