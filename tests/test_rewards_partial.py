"""Pins for the rewards of rewards.answer that give partial credit."""

import math
import pickle
import re
import time
from functools import partial

import pytest

from cotkit.rewards.answer import closeness, extract_answer, f_beta, matching, relative_error


def ask(reward, texts, gold, **columns):
    n = len(texts)
    return reward(["?"] * n, texts, answer=[gold] * n, **{k: [v] * n for k, v in columns.items()})


def absolute(answer, gold):
    try:
        return abs(float(answer) - float(gold))
    except ValueError:
        return None


# closeness


def test_relative_error():
    assert relative_error("9", "8") == 0.125
    assert relative_error("7 dollars", "-8") == 1.875  # |7 + 8| / 8
    assert relative_error("1/2", "50%") == 0.0
    assert relative_error("0", "0") == 0.0
    assert relative_error("0.1", "0") == math.inf
    assert relative_error("a", "8") is None
    assert relative_error("8", "a") is None
    assert relative_error("1e400", "1e-400") == 1e300  # finite, and far


def test_closeness_equals_the_authors():
    # tanhuajie/Reason-RFT, train/stage_rl/reward.py, math_accuracy_reward, on <answer>x</answer> and gold 8
    texts = [f"<answer>{x}</answer>" for x in ("8.3", "8.4", "9", "9.3", "9.6", "6.7", "abc")]
    wanted = [1.0, 1.0, 0.5, 0.14644660940672583, 0.0, 0.14644660940672660, 0.0]
    assert ask(closeness(), texts, "8") == pytest.approx(wanted, abs=1e-12)
    assert ask(closeness(), ["<answer>-7</answer>"], "-8") == pytest.approx([0.5])
    assert ask(closeness(), ["<answer>1</answer>"], "0") == [0.0]
    assert ask(closeness(), ["<answer>0</answer>"], "0") == [1.0]  # there the exception gives 0


def test_linear_ramp_with_a_floor():
    # CAD-Coder: 1 below 1e-5, 0 from 0.5 on, in the middle of the two 0.01 + 0.99/2 = 0.505
    reward = closeness(absolute, full=1e-5, zero=0.5, shape="linear", floor=0.01)
    texts = ["#### 2", "#### 2.000005", "#### 2.250005", "#### 2.499999999", "#### 2.5", "#### 9", "nothing"]
    assert ask(reward, texts, "2") == pytest.approx([1, 1, 0.505, 0.01, 0, 0, 0], abs=1e-6)
    # three quarters of a ramp from 1 to 3: 1 - 0.75
    assert ask(closeness(absolute, full=1.0, zero=3.0, shape="linear"), ["#### 4.5"], "2") == [0.25]
    assert ask(closeness(absolute, full=1.0, zero=3.0, floor=0.2), ["#### 4.5"], "2") == pytest.approx(
        [0.2 + 0.8 * (1 + math.cos(0.75 * math.pi)) / 2], abs=1e-12
    )


def test_closeness_without_a_gold_or_a_number():
    for gold in (None, "", "a word", "nan"):
        assert ask(closeness(), ["#### 4"], gold) == [None]
    assert ask(closeness(), ["a word", "", None, []], "4") == [0.0] * 4
    assert ask(closeness(lambda a, g: math.nan if a != g else 0.0), ["#### 5"], "4") == [0.0]
    assert ask(closeness(extract=partial(extract_answer, fmt="number")), ["she has 4"], "4") == [1.0]
    assert closeness().score_one("#### 9", "8") == pytest.approx(0.5)
    assert closeness(column="gold")(["?"], ["#### 9"], gold=["9"]) == [1.0]


# f_beta


def boxes(text):
    return [[float(x) for x in b.split(",")] for b in re.findall(r"\[([^\]]*)\]", text)]


def split(text):
    return None if "?" in text else text.split()


A, B, C, D = [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9], [2, 2, 2.5, 3]


@pytest.mark.parametrize(
    ("named", "right", "score"),
    [
        ([A, B], [A, C], 0.5),
        ([], [], 1.0),
        ([A, A], [A], 0.0),
        ([A], [], 0.0),
        ([], [A], 0.0),
        ([A, B, C], [A], 0.5),
        ([A], [A, B, D], 0.5),
        ([D, A], [A, D], 1.0),
        ([C], [A], 0.0),
    ],
)
def test_f1_equals_the_authors(named, right, score):
    # IDEA-Research/Rex-Thinker, rexthinker/scripts/reward_func.py, accuracy_reward
    text = " ".join(map(str, named))
    assert ask(f_beta(boxes), [text], " ".join(map(str, right))) == [score]
    assert ask(f_beta(boxes), [text], right) == [score]  # the gold may be a list already


def test_f3_of_sorft():
    reward = f_beta(split, beta=3.0, valid_column="files")
    # precision 1/2, recall 1: 10 * 0.5 / (9 * 0.5 + 1) = 0.909; precision 1, recall 1/2: 10 * 0.5 / (9 + 0.5)
    assert ask(reward, ["a b"], "a", files="a b c") == pytest.approx([10 * 0.5 / 5.5], abs=1e-12)
    assert ask(reward, ["a"], "a b", files=["a", "b"]) == pytest.approx([10 * 0.5 / 9.5], abs=1e-12)
    assert ask(reward, ["a b", "a x", "", "a ?"], "a b", files="a b c") == [1.0, 0.0, 0.0, 0.0]
    assert ask(f_beta(split, duplicates="merge"), ["a a b"], "a b b") == [1.0]
    assert ask(f_beta(split), ["a"], None) == [None]
    assert ask(f_beta(split), ["a"], "?") == [None]
    assert ask(f_beta(split), ["a ?"], "a") == [0.0]


# matching


def triples(text):
    return re.findall(r"\b(\w+)\((\w+),\s*'?(\w+)'?\)", text)


def credit(p, t):
    if p[0] != t[0]:
        return 0.0
    return 1.0 if p == t else 0.5 if p[1] == t[1] or p[2] == t[2] else 0.25


RIGHT = "move(a, 1) turn(b, 2) paint(c, red)"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (RIGHT, 1.0),
        ("move(a, 3) turn(z, 2) paint(q, blue)", 0.41666666666666663),
        ("move(a, 1) move(a, 1)", 0.16666666666666666),
        ("turn(b, 2) turn(b, 2) turn(b, 9) move(z, 1)", 0.375),
        ("jump(a, 1)", 0.0),
        ("paint(c, red)", 0.3333333333333333),
        (RIGHT + " paint(d, red) move(e, 5)", 0.6000000000000001),
        ("nothing", 0.0),
    ],
)
def test_matching_equals_the_authors(text, score):
    # tanhuajie/Reason-RFT, train/stage_rl/reward.py, func_accuracy_reward
    assert ask(matching(triples, credit), [text], RIGHT) == pytest.approx([score], abs=1e-12)


def test_matching_takes_the_best_pair_first_and_each_once():
    def value(p, t):
        return {("a", "x"): 0.6, ("a", "y"): 0.9, ("b", "y"): 1.0, ("b", "x"): 0.5}[p, t]

    # greedy: b-y 1.0, then a-x 0.6, over two
    assert ask(matching(split, value), ["a b"], "x y") == pytest.approx([0.8])
    assert ask(matching(split, value), ["a"], "x y") == pytest.approx([0.45])  # a-y, over two
    assert ask(matching(split, value), ["", "?"], "") == [1.0, 0.0]
    assert ask(matching(split, value), [""], "x y") == [0.0]
    assert ask(matching(split, value), ["a"], "") == [0.0]
    assert ask(matching(split, value), ["a"], "?") == [None]


# all


@pytest.mark.parametrize("reward", [closeness(), f_beta(split), matching(triples, credit)])
def test_pickle_chat_and_hostile_text(reward):
    texts = ["#### 4", "", "\0\ud800", "9**9**9**9", "[" * 10**5, "f(a, 1) " * 10**4, "#### " + "9" * 10**5]
    began = time.process_time()
    scores = ask(reward, texts, "4")
    assert time.process_time() - began < 5
    assert all(0 <= s <= 1 for s in scores)
    assert ask(pickle.loads(pickle.dumps(reward)), texts, "4") == scores
    assert ask(reward, [[{"role": "assistant", "content": t}] for t in texts], "4") == scores
    assert all(math.isfinite(s) for s in ask(reward, [None, [], [{"role": "assistant"}]], "4"))
    assert reward.func.__name__ in ("closeness", "f_beta", "matching")
    assert reward([], [], answer=[]) == []


def test_many_elements_cost_little():
    many = " ".join(f"f{i}(a, 1)" for i in range(20_000))
    began = time.process_time()
    assert ask(matching(triples, credit), [many], RIGHT) == [0.0]
    assert ask(f_beta(triples), [many], "f7(a, 1)")[0] == pytest.approx(2 / 20_001)
    assert time.process_time() - began < 5


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match=r"closeness: expected full < zero, got 0\.2 and 0\.2"):
        closeness(full=0.2)
    with pytest.raises(ValueError, match="closeness: expected full >= 0, got -1"):
        closeness(full=-1)
    with pytest.raises(ValueError, match="closeness: expected shape to be one of"):
        closeness(shape="square")
    with pytest.raises(ValueError, match=r"closeness: expected floor in \[0, 1\]"):
        closeness(floor=2)
    with pytest.raises(TypeError, match="closeness: expected distance as a function"):
        closeness(0.3)
    with pytest.raises(ValueError, match="closeness: expected a column 'answer', got none"):
        closeness()(["?"], ["4"])
    with pytest.raises(ValueError, match="f_beta: expected beta > 0, got 0"):
        f_beta(split, beta=0)
    with pytest.raises(ValueError, match="f_beta: expected duplicates to be one of"):
        f_beta(split, duplicates="keep")
    with pytest.raises(ValueError, match="f_beta: expected a column 'files'"):
        ask(f_beta(split, valid_column="files"), ["a"], "a")
    with pytest.raises(TypeError, match="f_beta: expected parse as a function"):
        f_beta("split")
    with pytest.raises(TypeError, match="matching: expected score as a function"):
        matching(split, 1.0)
    with pytest.raises(ValueError, match=r"matching: expected score in \[0, 1\], got 2"):
        ask(matching(split, lambda *_: 2), ["a"], "a")
