"""Pins for rewards.steps."""

# ruff: noqa: ARG001

import bisect
import math
import pickle
import time
from fractions import Fraction

import pytest
import torch

from cotkit.rewards.answer import accuracy
from cotkit.rewards.steps import (
    calculate,
    equations,
    find_equations,
    key_steps,
    quality_drop,
    rollout_values,
    step_quality,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("7-2-1", 4),
        ("8/4/2", 1),
        ("7/2", Fraction(7, 2)),
        ("2**3**2", 512),
        ("-2**2", -4),
        ("-3+5", 2),
        ("2*-3", -6),
        ("7//2", 3),
        ("1,200+$3", 1203),
        ("20%*50", 10),
        (".5*4", 2),
        ("3 x 4", 12),
        ("6 ÷ 3 − 1", 1),
        ("2^-1", Fraction(1, 2)),
        ("0.1+0.2", Fraction(3, 10)),
        ("1/0", None),
        ("0^-1", None),
        ("2+", None),
        ("(2", None),
        ("2)", None),
        ("2 3", None),
        ("a+1", None),
        ("", None),
        ("1=1", None),
        ("__import__('os')", None),
        ("9**9**9**9", None),
        ("2**64", 18446744073709551616),
        ("2**65", None),
        ("4**.5", None),  # no roots
        ("*5", None),
        ("2+*5", None),
        ("1 +\n2", 3),
        ("(" * 140 + "1" + ")" * 140, 1),
        ("9" * 300, 10**300 - 1),
        ("9" * 301, None),
        ("\0", None),
        ("\ud800", None),
        pytest.param(None, None, marks=pytest.mark.errors),
    ],
)
def test_calculate(text, value):
    assert calculate(text) == value


def test_size_of_values():
    # 9**64 has 203 bits: ten factors 2,029, eleven 2,232, of 2,048 allowed above and below the line.
    assert calculate("*".join(["9**64"] * 10)) == 9**640
    assert calculate("*".join(["9**64"] * 11)) is None
    assert calculate("1" + "/9**64" * 10) == Fraction(1, 9**640)
    assert calculate("1" + "/9**64" * 11) is None
    largest = (2**32 - 1) ** 64  # 2,048 bits, the most there is
    assert largest.bit_length() == 2048
    assert calculate("4294967295**64") == largest
    assert calculate("4294967295**64*2") is None
    assert calculate("4294967296**63") == 2**2016  # 2,017 bits, though 63 times the 33 of the base are more
    assert calculate("4294967296**64") is None
    assert calculate("1/4294967296**63") == Fraction(1, 2**2016)
    assert calculate("4294967296**-63*4294967296**63") == 1


def test_find_equations():
    def found(text):
        return [(e.left, e.right, e.holds) for e in find_equations(text)]

    assert found("48/2 = <<48/2=24>>24 and 9 * 2 = $<<9*2=18>>18") == [
        ("48/2", "24", True),
        ("9*2", "18", True),
    ]
    assert found("2*3 = 6 = 5+1 = 7") == [("2*3", "6", True), ("6", "5+1", True), ("5+1", "7", False)]
    assert found("x = 5, 5 = 5, a=b") == []
    assert found("- 3+4=7\n* 2*2=4\n+ 1+1=3") == [("3+4", "7", True), ("2*2", "4", True), ("1+1", "3", False)]
    assert found("Step 2. 3+4=7. Then 7-2=5") == [("3+4", "7", True), ("7-2", "5", True)]
    assert found("(3+4=7)") == [("3+4", "7", True)]
    assert found("-5+3=-2") == [("-5+3", "-2", True)]
    assert found("1/3=0.333 2/3=0.6666") == [("1/3", "0.333", True), ("2/3", "0.6666", True)]  # within 0.001
    assert found("1/3=0.33") == [("1/3", "0.33", False)]
    assert found("1/2=0.501 1/2=0.5009") == [("1/2", "0.501", False), ("1/2", "0.5009", True)]
    assert found("1/0=0") == [("1/0", "0", False)]
    assert found("(2+3)*4=20") == [("(2+3)*4", "20", True)]
    assert found("14=2*(3+4)") == [("14", "2*(3+4)", True)]
    assert found("Sum:\n-(5+3)=-8") == [("-(5+3)", "-8", True)]
    assert found("-$5+$3=-$2") == [("-$5+$3", "-$2", True)]
    # a leading sign after a word or punctuation, and before a bare decimal
    assert found("so -5+3=-2") == [("-5+3", "-2", True)]
    assert found("Then: -5+3=-2, -1+4=3; (-6+2=-4)") == [
        ("-5+3", "-2", True),
        ("-1+4", "3", True),
        ("-6+2", "-4", True),
    ]
    assert found("we get:-5+3=-2") == [("-5+3", "-2", True)]
    assert found("-.5+1=.5") == [("-.5+1", ".5", True)]
    assert found("so -.5-1=-1.5") == [("-.5-1", "-1.5", True)]
    assert found("- .5+1=1.5") == [(".5+1", "1.5", True)]  # a bullet
    assert found("-.x+1=1") == []
    assert found("x[1]-3+4=7") == [("3+4", "7", True)]
    assert found("n_-3+4=7") == [("3+4", "7", True)]
    assert found("grade-3+4=7") == [("3+4", "7", True)]  # a hyphen, no sign
    assert found("7=3+4 - you see") == [("7", "3+4", True)]  # a dash, no sign
    assert found("2) * 3+4=7") == [("3+4", "7", True)]  # a numbered bullet
    assert found("-5=-5") == []  # a sign alone calculates nothing
    assert found("6 apples + 1 apple = 7") == []
    text = "so 3 + 4 = 7."
    assert text[find_equations(text)[0].start : find_equations(text)[0].end] == "3 + 4 = 7"


def test_share_of_equations():
    texts = ["1+1=2 2+2=5 3+3=6 4-1=2 1*1=1", "none"]
    assert equations(empty=-0.5)(prompts=["?"] * 2, completions=texts, empty=["a column"] * 2) == [0.6, -0.5]
    reward = pickle.loads(pickle.dumps(equations()))
    assert reward.score_one([{"role": "assistant", "content": "1+1=3"}]) == 0.0
    assert reward.func.__name__ == "equations"


def test_hostile_text():
    for text in (
        "(" * 10**5,
        "1+" * 10**5,
        "=" * 10**5,
        "1=" * 10**5,
        "9**9**9**9=1",
        "\0=\ud800",
        "-" * 10**5,
    ):
        start = time.process_time()
        find_equations(text)
        assert time.process_time() - start < 5


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="empty finite"):
        equations(empty=float("inf"))


# key_steps


SECTIONS = "### Step 1: There are 3 boxes, 6/3 = 2.\n### Step 2: Then 2 TIMES 7\n equals 14\n#### 14"


@pytest.mark.parametrize(
    ("keys", "share"),
    [
        (["6/3 = 2", ["2*7", "2 times 7"], "15", ["x", "boxes"]], 0.75),
        ([["7", "8"], "9"], 0.5),
        ([], 0.0),
        (None, 0.0),
        (["4"], 0.0),  # the authors' code finds it in 14
        (["times 7 equals"], 1.0),
        (["", " "], 0.0),
        ({"Steps": ["boxes", "9", "8"]}, 1 / 3),
        ([{"Steps": ["9", "boxes"]}, {"Steps": ["14", "boxes", "11"]}], 2 / 3),  # the best solution counts
    ],
)
def test_share_of_key_steps(keys, share):
    # jingyi0000/R1-VL, src/r1-vl/src/open_r1/grpo.py, key_step_single gives 0.75, 0.5, 0
    reward = key_steps(accuracy(), alpha=0.3)
    scores = reward(["?"], [SECTIONS], answer=["14"], key_steps=[keys])
    assert scores == pytest.approx([1 + 0.3 * share], abs=1e-12)


def test_key_steps_of_right_wrong_and_missing_answers():
    keys = [["3+4=7"], ["7*2=14"]]
    right, wrong, none = "3+4=7 #### 14", "3+4=7 7*2=14 #### 15", "3+4=7 7*2=14"
    texts = [right, wrong, none, "#### 14", "#### 15"]
    columns = {"answer": ["14"] * 5, "key_steps": [keys] * 5}
    assert key_steps(accuracy())(["?"] * 5, texts, **columns) == [1.05, 0.1, 0.0, 1.0, 0.0]
    assert key_steps(accuracy())(["?"], [right], answer=[""], key_steps=[keys]) == [None]
    # only the thought is searched, and only keys that stand alone
    inside = "<think>\n3+4=7\n</think>\n7*2=14, so the answer is 14"
    assert key_steps(accuracy())(["?"], [inside], answer=["14"], key_steps=[keys]) == [1.05]
    for text, found in (("1.7", 0), ("7.5", 0), ("7, 8", 1), ("17", 0), ("(7)", 1), ("7.", 1), ("7,000", 0)):
        reward = key_steps(accuracy(), alpha=1.0)
        assert reward(["?"], [text + " #### 1"], answer=["1"], key_steps=[["7"]]) == [1.0 + found], text


# rollout_values


def test_rollout_values():
    asked = []

    def generate(prompts, n):
        asked.append((prompts, n))
        # of four continuations as many are right as the beginning is long, but none after a 9
        return [["A" * (i < len(p) - 1 and "9" not in p) + "." for i in range(n)] for p in prompts]

    def reward(prompts, completions, answer, **columns):
        assert prompts == ["?"] * len(completions)
        assert answer == ["14"] * len(completions)
        return [None if "?" in c else float("A" in c) for c in completions]

    steps = ["a", "b", "9"]
    assert rollout_values(generate, "?", steps, reward, n=4, answer="14") == [0.25, 0.5, 0.0]
    assert asked == [(["?a", "?ab", "?ab9"], 4)]
    assert rollout_values(generate, "?", steps, reward, n=2, at=[2, 0], answer="14") == [0.0, 0.5]
    assert rollout_values(generate, "?", steps, reward, at=[], answer="14") == []
    assert len(asked) == 2
    assert rollout_values(generate, "?", ["?"], reward, n=4, answer="14") == [None]


def test_rollout_values_see_whole_completions_and_messages():
    seen = []

    def generate(prompts, n):
        return [["#### 14"] * n for _ in prompts]

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return accuracy()(prompts, completions, **columns)

    chat = [{"role": "user", "content": "?"}]
    assert rollout_values(generate, chat, ["<think>3+4=7", "</think>"], reward, n=1, answer="14") == [
        0.0,
        1.0,
    ]
    assert seen == ["<think>3+4=7#### 14", "<think>3+4=7</think>#### 14"]  # a thought left open has no answer
    assert chat == [{"role": "user", "content": "?"}]


def test_first_error_by_bisection():
    calls = []

    def generate(prompts, n):
        calls.append(prompts)
        return [["#### 5" if "9" in p else "#### 14"] * n for p in prompts]

    steps = ["1 ", "2 ", "3 ", "9 ", "5 ", "6 ", "7 ", "8 "]

    def lost(i):
        return rollout_values(generate, "?", steps, accuracy(), n=1, at=[i], answer="14") == [0.0]

    assert bisect.bisect_left(range(8), True, key=lost) == 3
    assert len(calls) <= 4  # log2(8) + 1


# quality_drop


@pytest.mark.parametrize(
    ("scores", "value"),
    [
        ([0.9, 0.85, 0.3], 0.6),  # (.85 - .3) / .85 = .65
        ([0.9, 0.64], 1.0),  # .289
        ([0.9, 0.62], 0.6),  # .311
        ([0.5, 0.34, 0.24], 0.6),  # .32, then .29
        ([0.3, 0.9], 1.0),  # a rise
        ([0.0, 0.0], 1.0),
        ([0.9], 1.0),
        ([], 1.0),
    ],
)
def test_quality_drop(scores, value):
    reward = quality_drop(lambda **_: [scores] * 3, accuracy(), gamma=0.4)
    texts = ["#### 4", "#### 5", "#### 4"]
    assert reward(["?"] * 3, texts, answer=["4", "4", None]) == pytest.approx([value, 0.0, None])


# step_quality


def test_step_quality_by_a_slow_loop():
    draw = torch.Generator().manual_seed(0)
    steps, response, negatives = (torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (4, 3, 6))
    question = torch.randn(5, generator=draw, dtype=torch.float64)
    quality = torch.tensor([0.9, 0.2, 0.55, 0.7], dtype=torch.float64)

    def cos(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    wanted, before = [], question
    for step, judged in zip(steps, quality.tolist(), strict=True):
        align = max(cos(step, a) for a in response)
        below = sum(math.exp(cos(before, s) / 0.3) for s in negatives)
        three = [align, judged, math.log(math.exp(cos(before, step) / 0.3) / below)]
        weights = [math.exp(x) for x in three]
        wanted.append(sum(w * x for w, x in zip(weights, three, strict=True)) / sum(weights))
        before = step
    steps.requires_grad_(True)
    got = step_quality(question, steps, response, quality, negatives, tau=0.3)
    assert got.tolist() == pytest.approx(wanted, abs=1e-12)
    assert not got.requires_grad
    assert step_quality(question, steps[:0], response, quality[:0], negatives).shape == (0,)


# all


def scores_of_steps(prompts, completions, **columns):
    return [[0.9, 0.1]] * len(completions)


@pytest.mark.parametrize("reward", [key_steps(accuracy()), quality_drop(scores_of_steps, accuracy())])
def test_pickle_chat_and_hostile_completions(reward):
    texts = ["#### 4", "", "\0\ud800", "9**9**9**9", "7 " * 10**5, "<think>" * 10**4, "a" * 10**6]
    n = len(texts)
    columns = {"answer": ["4"] * n, "key_steps": [["7", "a" * 200, "(", "9**9"]] * n}
    began = time.process_time()
    scores = reward(["?"] * n, texts, **columns)
    assert time.process_time() - began < 5
    assert all(math.isfinite(s) for s in scores)
    assert pickle.loads(pickle.dumps(reward))(["?"] * n, texts, **columns) == scores
    assert reward(["?"] * n, [[{"role": "assistant", "content": t}] for t in texts], **columns) == scores
    columns = {"answer": ["4"] * 3, "key_steps": [["7"]] * 3}
    assert reward(["?"] * 3, [None, [], [{"role": "assistant", "content": None}]], **columns) == [0.0] * 3
    assert reward([], [], answer=[], key_steps=[]) == []
    assert reward.func.__name__ in ("key_steps", "quality_drop")


@pytest.mark.errors
def test_refusals_of_steps():
    def generate(prompts, n):
        return [["a"] * n for _ in prompts][1:]

    with pytest.raises(ValueError, match="key_steps: expected a column 'key_steps', got answer"):
        key_steps(accuracy())(["?"], ["4"], answer=["4"])
    with pytest.raises(TypeError, match="key_steps: expected correct as a function"):
        key_steps(1.0)
    with pytest.raises(ValueError, match="key_steps: expected alpha finite"):
        key_steps(accuracy(), alpha=math.inf)
    with pytest.raises(TypeError, match="rollout_values: expected steps as a list of texts"):
        rollout_values(generate, "?", "1+1=2", accuracy())
    with pytest.raises(ValueError, match="rollout_values: expected n >= 1"):
        rollout_values(generate, "?", ["1"], accuracy(), n=0)
    with pytest.raises(ValueError, match=r"rollout_values: expected at in \[0, 0\], got \[1, -1\]"):
        rollout_values(generate, "?", ["1"], accuracy(), at=[0, 1, -1])
    with pytest.raises(ValueError, match="rollout_values: expected 1 lists of 2 texts from generate"):
        rollout_values(generate, "?", ["1"], accuracy(), n=2, answer="4")
    with pytest.raises(ValueError, match="quality_drop: expected rho >= 0"):
        quality_drop(scores_of_steps, accuracy(), rho=-1)
    with pytest.raises(ValueError, match="quality_drop: expected scores of 1 completions, got 0"):
        quality_drop(lambda **_: [], accuracy())(["?"], ["4"], answer=["4"])
    with pytest.raises(TypeError, match="quality_drop: expected step_scores as a function"):
        quality_drop([0.9], accuracy())
    one, two = torch.ones(1, 3), torch.ones(2, 4)
    with pytest.raises(ValueError, match="step_quality: expected one width D"):
        step_quality(one[0], one, two, one[:, 0], one)
    with pytest.raises(ValueError, match="step_quality: expected one width D and as many qualities"):
        step_quality(one[0], one, one, two[0], one)
    with pytest.raises(ValueError, match="step_quality: expected at least one step in response"):
        step_quality(one[0], one, one[:0], one[:, 0], one)
    with pytest.raises(ValueError, match="step_quality: expected tau > 0"):
        step_quality(one[0], one, one, one[:, 0], one, tau=0)
    with pytest.raises(TypeError, match="step_quality: expected steps as a float tensor"):
        step_quality(one[0], one.long(), one, one[:, 0], one)
    with pytest.raises(ValueError, match=r"step_quality: expected question \[D\]"):
        step_quality(one, one, one, one[:, 0], one)
