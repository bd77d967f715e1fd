"""Pins for rewards.judge."""

# ruff: noqa: ARG001, ARG005

import math
import pickle
import re
import time

import pytest

from cotkit.prompts import Template
from cotkit.rewards.answer import accuracy
from cotkit.rewards.combine import gated, weighted
from cotkit.rewards.judge import answer_gain, crowd, downstream, first_number, pairwise, rubric


def marks(prompts, n):
    """Marks by the number that stands in the prompt: m, m + 10, ..."""
    found = [re.findall(r"\d+", p)[-1:] for p in prompts]
    return [[f"Mark: {int(m[0]) + 10 * i}" if m else "no idea" for i in range(n)] for m in found]


def ask(reward, texts, **columns):
    return reward(["2+2?"] * len(texts), texts, **{k: [v] * len(texts) for k, v in columns.items()})


# first_number and rubric


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Rating: [[85]]", 85.0),
        ("8.5/10", 8.5),
        ("about -3, or 4", -3.0),
        (".5", 0.5),
        ("7.", 7.0),
        ("v2 is 6", 6.0),
        ("", None),
        ("none", None),
        ("9" * 400, None),
        ("x" * 20_000 + "5", None),
    ],
)
def test_first_number(text, number):
    assert first_number(text) == number


def test_rubric():
    reward = rubric(marks, "{prompt} {text}", scale=100.0, n=3)
    # (40 + 50 + 60) / 3 = 50; (85 + 95) / 2, for 105 is beyond the scale; nothing to be read
    assert ask(reward, ["40", "85", "200"]) == [0.5, 0.9, None]
    assert ask(rubric(lambda p, n: [["-0.5", "word"]] * len(p), "{text}", n=2), ["a"]) == [-0.5]
    assert ask(
        rubric(lambda p, n: [["yes", "no"]] * len(p), "{text}", n=2, parse=lambda t: t == "yes"), ["a"]
    ) == [0.5]


def test_what_the_judge_is_asked():
    seen = []

    def judge(prompts, n):
        seen.extend(prompts)
        return [["1"] * n for _ in prompts]

    ask(rubric(judge, "{prompt}|{text}|{answer}"), ["{answer} {text}", "b"], answer="4")
    assert seen == ["2+2?|{answer} {text}|4", "2+2?|b|4"]  # braces of a completion stay what they are
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+2?"}]
    rubric(judge, Template("mine", "{prompt}/{text}", "judge"))(
        [chat], [[{"role": "assistant", "content": "4"}]]
    )
    assert seen[-1] == "Be kind.\n2+2?/4"
    rubric(judge, "ul2_mode_s")(["2+2?"], ["4"])
    assert seen[-1] == "[S2S] 2+2?"


# pairwise


def table(prompt, a, b):
    return {("x", "y"): 0.9, ("y", "x"): 0.3, ("x", "z"): None, ("z", "x"): 0.2, ("y", "z"): None}.get((a, b))


def test_pairwise_asks_in_both_orders():
    judge = pairwise(table)
    assert judge("?", "x", "y") == pytest.approx(0.8)  # (.9 + 1 - .3) / 2
    assert judge("?", "y", "x") == pytest.approx(0.2)
    assert judge("?", "x", "z") == pytest.approx(0.8)  # only the second order can be read
    assert judge("?", "y", "z") == 0.5  # neither
    assert pairwise(lambda *_: 1.0)("?", "a", "b") == 0.5  # whoever comes first
    assert pairwise(lambda *_: 0.0)("?", "a", "b") == 0.5
    assert pairwise(table, swap=False)("?", "x", "y") == 0.9
    assert pickle.loads(pickle.dumps(judge))("?", "x", "y") == judge("?", "x", "y")


def test_pairwise_prefers_what_the_authors_choose():
    # oddqueue/self-judge, src/self_judge/utils.py, get_batch_judgments: mean of P(A | a first) and
    # P(B | b first) against the mean of the other two; here both are normalised over the two letters.
    for p, q in ((0.7, 0.4), (0.7, 0.8), (0.2, 0.1), (0.35, 0.9)):
        theirs_a, theirs_b = (p + (1 - q)) / 2, ((1 - p) + q) / 2
        ours = pairwise(lambda _, first, __, p=p, q=q: p if first == "a" else q)("?", "a", "b")
        assert ours - 0.5 == pytest.approx((theirs_a - theirs_b) / 2, abs=1e-12)


# crowd


def test_crowd():
    asked, seen = [], []

    def critique(prompt, candidate, other):
        asked.append((prompt, candidate, other))
        verdict = {"a1": "[[B]]", "a2": "[[A]]", "a3": "[[ B ]]", "b1": "[[B]]", "b2": "[[C]]", "b3": ""}
        return f"{candidate} against {other}. Not [[A]], rather {verdict[candidate + other]}"

    def judge(prompt, a, b):
        seen.append(prompt)
        return 0.75

    def others(prompt):
        return ["1", "2", "3"]

    def critiques(**how):
        assert crowd(judge, critique, others, **how)("?", "a", "b") == 0.75
        return re.findall(r"^[ab]: (\w+ against \w+)", seen[-1], re.MULTILINE)

    # losing: a1, a3 and b1; the one without a verdict of its own ends in [[A]]
    assert critiques() == ["a against 1", "b against 1", "a against 3"]
    assert len(asked) == 6
    assert "[[" not in seen[-1]
    assert seen[-1].startswith("?\n\n")
    assert critiques(k=2) == ["a against 1", "b against 1"]
    assert critiques(k=1) == ["a against 1"]
    assert critiques(keep="winning") == ["a against 2", "b against 3"]
    assert len(critiques(keep="all")) == 6
    asked.clear()
    assert critiques(k=0) == []
    assert seen[-1] == "?"
    assert asked == []
    assert crowd(judge, lambda *_: "no verdict", others)("?", "a", "b") == 0.75
    assert seen[-1] == "?"  # nothing kept: the bare judge
    assert pairwise(crowd(judge, critique, others, template="{critiques} {prompt}"))("?", "a", "b") == 0.5


# downstream


def pupil(prompts, n):
    """Right as often as the advice says."""
    shares = [int((re.findall(r"(\d) of", p) or [0])[0]) for p in prompts]
    return [["#### 4" if i < k else "#### 5" for i in range(n)] for k in shares]


ADVICE = "{prompt} Advice: {text}"


def test_downstream_is_the_share_of_right_solutions():
    reward = downstream(pupil, ADVICE, accuracy())
    assert ask(reward, ["6 of 8", "8 of 8", "none"], answer="4") == [0.75, 1.0, 0.0]
    # graded rewards may be averaged: 2 of 4 at 1, the others at -1
    assert ask(downstream(pupil, ADVICE, accuracy(wrong=-1.0), n=4), ["2 of"], answer="4") == [0.0]
    assert ask(downstream(pupil, ADVICE, accuracy()), ["6 of 8"], answer="") == [None]
    assert downstream(pupil, ADVICE, accuracy(), n=2)("??", ["1 of", "1 of"], answer=["4", "5"]) == [0.5, 0.5]


def test_downstream_hands_on_the_row():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [1.0] * len(completions)

    columns = {"answer": ["4", "5"], "trainer_state": "state", "completion_ids": [[1], [2]]}
    downstream(pupil, ADVICE, reward, n=2)(["x", "y"], ["1 of", "2 of"], **columns)
    assert seen == {
        "answer": ["4", "4", "5", "5"],
        "trainer_state": "state",
        "prompts": ["x", "x", "y", "y"],
        "completions": ["#### 4", "#### 5", "#### 4", "#### 4"],
    }


def test_refcritic():
    # Verdict right 1, plus the share of right refinements where the critique says wrong: 1 + 3/4
    called = []

    def policy(prompts, n):
        called.append((len(prompts), n))
        return [["#### 4"] * 3 + ["#### 5"]] * len(prompts)

    def says_wrong(prompts, completions, **columns):
        return [float("wrong" in c) for c in completions]

    def verdict(prompts, completions, verdict, **columns):
        return [float(v in c) for c, v in zip(completions, verdict, strict=True)]

    total = weighted([verdict, gated(downstream(policy, ADVICE, accuracy(), n=4), says_wrong)])
    texts = ["wrong: step 2", "correct", "wrong: step 1"]
    assert total("???", texts, answer=["4"] * 3, verdict=["wrong", "wrong", "correct"]) == [1.75, 0.0, 0.75]
    assert called == [(2, 4)]  # once, and not for the second


# answer_gain


def half_tanh(x):
    return math.tanh(x) / 2


def score(prompts, completions, **columns):
    return [{"k": 1.0, "l": 0.25, "m": -2.0}.get(c) for c in completions]


def alone(prompts, completions, **columns):
    return [-1.0] * len(completions)


def test_answer_gain():
    assert ask(answer_gain(score, alone), ["k", "l", "m", "?"]) == [2.0, 1.25, -1.0, None]
    assert ask(answer_gain(score, "s0"), ["k"], s0=0.75) == [0.25]
    assert ask(answer_gain(score, "s0"), ["k"], s0=None) == [None]
    # Crystal: margins 1 and -1 give tanh(1); equal ones 0
    crystal = answer_gain(score, alone, squash=half_tanh)
    assert ask(crystal, ["k", "l"]) == pytest.approx(
        [math.tanh(1), (math.tanh(0.25) + math.tanh(1)) / 2], abs=1e-12
    )
    assert ask(answer_gain(alone, alone, squash=half_tanh), ["k"]) == [0.0]
    assert all(abs(s) < 1 for s in ask(crystal, ["k", "l", "m"]))
    # a constant added to both margins' baselines moves every reward of a group alike
    shifted = ask(answer_gain(score, "s0"), ["k", "l"], s0=5.0)
    assert shifted[0] - shifted[1] == pytest.approx(0.75)


def test_crystal_reward_by_hand():
    # The formula of liujch1998/crystal, scripts/model/reward.py, reward_shape 4, by hand: half tanh of the
    # gold logit minus the largest other one, with the knowledge and without. Logits (2, .5, 1.2) and
    # (.3, .9, -1), gold the first
    with_it, without = 2 - 1.2, 0.3 - 0.9
    gain = answer_gain(lambda *_, **__: [with_it], lambda *_, **__: [without], squash=half_tanh)
    assert gain(["?"], ["k"]) == pytest.approx([0.5 * math.tanh(0.8) - 0.5 * math.tanh(-0.6)], abs=1e-12)


# all


def says_half(prompts, n):
    return [["0.5"] * n for _ in prompts]


@pytest.mark.parametrize(
    "reward",
    [
        rubric(says_half, "{text}"),
        downstream(pupil, ADVICE, accuracy()),
        answer_gain(alone, "s0", squash=half_tanh),
    ],
)
def test_pickle_chat_and_hostile_text(reward):
    texts = ["a", "", "\0\ud800", "{answer} {} {{", "9" * 10**5, "{" * 10**5, "[[A]] 100 of 100"]
    began = time.process_time()
    scores = ask(reward, texts, answer="4", s0=0.5)
    assert time.process_time() - began < 5
    assert all(s is None or math.isfinite(s) for s in scores)
    assert ask(pickle.loads(pickle.dumps(reward)), texts, answer="4", s0=0.5) == scores
    assert ask(reward, [[{"role": "assistant", "content": t}] for t in texts], answer="4", s0=0.5) == scores
    ask(reward, [None, [], [{"role": "assistant", "content": None}]], answer="4", s0=0.5)
    assert reward([], [], answer=[], s0=[]) == []
    assert reward.func.__name__ in ("rubric", "downstream", "answer_gain")


@pytest.mark.errors
def test_refusals():
    with pytest.raises(TypeError, match="rubric: expected generate as a function"):
        rubric("judge", "{text} a")
    with pytest.raises(ValueError, match="rubric: expected scale > 0"):
        rubric(marks, "{text} a", scale=0)
    with pytest.raises(ValueError, match="rubric: expected n >= 1"):
        rubric(marks, "{text} a", n=0)
    with pytest.raises(
        ValueError, match=r"apply: expected a name of prompts\.templates\(\) or a text, got 'markk'"
    ):
        rubric(marks, "markk")
    with pytest.raises(TypeError, match="apply: expected template as a name or a text"):
        rubric(marks, 3)
    with pytest.raises(ValueError, match="apply: expected column 'level'"):
        ask(rubric(marks, "{text} {level}"), ["a"])
    with pytest.raises(ValueError, match="rubric: expected 1 lists of 2 texts from generate"):
        ask(rubric(lambda p, n: [["1"]], "{text} a", n=2), ["a"])
    with pytest.raises(ValueError, match="apply: expected no gold column in a solver's template, got"):
        downstream(pupil, "{prompt} {text} {answer}", accuracy())
    with pytest.raises(ValueError, match="downstream: expected 2 prompts, got 1"):
        downstream(pupil, ADVICE, accuracy())(["?"], ["a", "b"], answer=["4", "4"])
    with pytest.raises(TypeError, match="pairwise: expected compare as a function"):
        pairwise(0.5)
    with pytest.raises(ValueError, match="pairwise: expected probabilities from compare, got 1"):
        pairwise(lambda *_: 1.5)("?", "a", "b")
    with pytest.raises(ValueError, match="crowd: expected k >= 0"):
        crowd(table, table, table, k=-1)
    with pytest.raises(ValueError, match="crowd: expected keep to be one of"):
        crowd(table, table, table, keep="balanced")
    with pytest.raises(ValueError, match=r"crowd: expected template with \{prompt\} and \{critiques\}"):
        crowd(table, table, table, template="{prompt} only")
    with pytest.raises(TypeError, match="answer_gain: expected baseline as a function, got NoneType"):
        answer_gain(alone, None)
    with pytest.raises(ValueError, match="answer_gain: expected a column 's0'"):
        answer_gain(alone, "s0")(["?"], ["a"])
    with pytest.raises(TypeError, match="answer_gain: expected s0 as a number, got str"):
        ask(answer_gain(alone, "s0"), ["a"], s0="much")
