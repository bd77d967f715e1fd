"""Pins for rewards.answer: what counts as an answer, when two are the same, and that no text can hurt."""

import asyncio
import json
import math
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from cotkit.rewards import _verify
from cotkit.rewards.answer import accuracy, extract_answer, same_answer, score_one

DATA = Path(os.environ.get("COTKIT_DATA", Path(__file__).parents[2] / "shared" / "data")) / "gsm8k"


def ask(reward, completions, golds):
    return reward(prompts=["?"] * len(completions), completions=completions, answer=golds)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+4=7\n#### 7", "7"),
        ("3+4=7\nA: 7", "7"),
        ("A: 7\nB: 8", None),  # choices, not an answer line
        (r"so \boxed{7}", "7"),
        (r"\boxed{7} wait, no: \boxed{8}", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed 7", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{7} and then \boxed{8", None),  # cut off: the first box is not the answer
        (r"\boxed{}", None),
        ("<answer> 7 </answer>", "7"),
        ("<answer>7", None),
        ("<answer>\\boxed{7}</answer>", "7"),
        ("<answer>The answer is 7.</answer>", "7"),
        ("The answer is 7.", "7"),
        ("The answer is: $7$.", "7"),
        ("The answer is 3.5.", "3.5"),
        ("The answer is 7. Thank you.", "7"),
        ("The answer is 7\nThe answer is 8", "8"),
        (r"\boxed{7} was wrong. The answer is 8.", "8"),
        (r"The final answer is $\boxed{8}$.", "8"),
        ("**Answer:** 7", "7"),
        ("Answer:\n\n7", "7"),
        ("#### Step 1: add\n3+4=7", None),  # a heading
        ("#### 7\n#### 8", "8"),
        ("####", None),
        ("She has 7", None),
        ("7", "7"),
        ("yes", "yes"),
        ("I think seven", None),
        ("<answer>7</answer><answer>8</answer>", "8"),
        ("\\boxed{7}\\boxed{8}", "8"),
        ("#### 7 or 8", "7 or 8"),
        ("Is the answer is 7? No", "7? No"),
        ("Final Answer: The final answer is $7$. I hope it is correct.", "7"),
        ("The answer is \\(7\\).", "7"),
        ("", None),
        ("<think>3+4=7</think>7", "7"),
        ("<think>3+4=7</think>\n\n$7$.", "7"),
        (r"<think>\boxed{7}</think> I do not know", "I do not know"),
        (r"<think>\boxed{7}</think>", None),
        ("<think>3+4=7 so the answer is 7", None),
        ("<think>a</think> \\boxed{7} <think>again", None),
        ("<think>a</think>8<think>b</think>7", "7"),
        ("a</think>7", "7"),  # the template wrote <think>
        ("<think>a</think>first\nsecond", None),
        (None, None),
        (7, None),
    ],
)
def test_extract_auto(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "fmt", "answer"),
    [
        ("She has 7 of 12 apples", "number", "12"),
        ("It costs $1,234.50.", "number", "$1,234.50"),
        ("It is -3", "number", "-3"),
        ("5-3", "number", "3"),
        ("<think>7</think> none", "number", None),
        ("I pick (B) since C is out", "letter", "C"),
        ("A B (C)", "letter", "C"),
        ("no capital", "letter", None),
        (r"\boxed{7} #### 8", "boxed", "7"),
        (r"\boxed{7} #### 8", "gsm8k", "8"),
        ("The answer is 7 \\boxed{8}", "tag", None),
        ("7", "think", None),
        ("<think>a</think>one\ntwo", "think", "one\ntwo"),
        ("The answer is 7", "plain", "7"),
        ("7", "plain", None),
    ],
)
def test_extract_on_request(text, fmt, answer):
    assert extract_answer(text, fmt=fmt) == answer


def test_extract_from_messages():
    said = [{"role": "user", "content": "#### 3"}, {"role": "assistant", "content": "#### 4"}]
    assert extract_answer(said) == "4"
    assert extract_answer([*said, {"role": "user", "content": "#### 5"}]) == "4"
    parts = [
        {"role": "assistant", "content": [{"type": "text", "text": "#### "}, {"type": "text", "text": "6"}]}
    ]
    assert extract_answer(parts) == "6"
    assert extract_answer([{"role": "assistant", "content": None, "tool_calls": []}]) is None
    assert extract_answer([]) is None


@pytest.mark.errors
def test_extract_refuses_an_unknown_format():
    with pytest.raises(ValueError, match="expected fmt to be one of"):
        extract_answer("7", fmt="xml")


SAME = [
    ("7", "7.0"), ("7", "07"), ("1,234.", "1234"), ("$1,234.00", "1234"), ("1e3", "1000"), ("-5", "−5"),
    ("50%", "0.5"), ("50%", "1/2"), ("1/3", "0.333333"), ("2/4", "1/2"), ("1 1/2", "1.5"), (".5", "1/2"),
    ("18 dollars", "18"), ("$18", "18 dollars"), ("5 km/h", "5"), ("12 apples", "12"),
    ("1.8 million", "1800000"),
    ("90°", "90"), ("(A)", "a"), ("A.", "A"), ("B) 12 apples", "B"), ("Yes.", "yes"), ("(-3)", "(-3)"),
    ("1, 2", "2, 1"), ("{1, 2}", "{2,1}"), ("(1, 2)", "(1.0, 2)"), ("201.89999999999998", "201.9"),
    (r"\frac{1}{2}", "0.5"), (r"\dfrac12", "1/2"), (r"-\frac{3}{4}", "-0.75"), (r"1\frac{1}{2}", "1.5"),
    (r"\text{Monday}", "Monday"), (r"12\%", "12%"), (r"\$5", "5"), (r"1{,}000", "1000"), (r"1\,000", "1000"),
    (r"90^\circ", "90"), ("７", "7"), (18, "18"), (18.0, "18"), ("0", "0.0"), ("-0", "0"),
    ("7" * 400, "7" * 400),
    ("$7$ dollars", "7"), ("option (B)", "B"), ("A) yes", "A"), ("14/2", "7"),
    ("000" + "7" * 400, "7" * 400), ("+7", "7"),
]  # fmt: skip
DIFFERENT = [
    ("7", "8"), ("7", "-7"), ("1", "1.0001"), ("1/3", "0.333"), ("50%", "50"), ("0.5%", "0.5"),
    ("10000000", "10000001"),
    ("12345678.5", "12345678"), ("0.0000001", "0"), ("0.0000001", "0.0000002"), ("1e-20", "2e-20"),
    ("12", "1"),
    ("1", "12"), ("1,23", "123"), ("1.234", "1,234"), ("5 km", "5 m"), ("$5", "5 cents"), ("5 million", "5"),
    ("7 or 8", "7"), ("7 or 8", "8"), ("not 7", "7"), ("7!", "5040"), ("about 7", "7"), ("7?", "7"),
    ("7 and 8", "7"),
    ("A", "B"), ("(A)", "B"), ("A) 7", "B"), ("yes", "no"), ("(1, 2)", "(2, 1)"), ("[1, 2]", "(1, 2)"),
    ("1, 2", "1"),
    ("1, 1, 2", "1, 2, 2"), ("9**9**9**9", "9"), ("1e999999999", "1e999999998"), ("", ""), (" ", "7"),
    ("7", ""),
    ("12_8", "12"), ("3x", "3"), ("7" * 400, "7" * 399 + "8"), ("1/0", "1"), ("inf", "1"), ("nan", "1"),
    ("5²", "52"),
    ("5 2", "52"), ("1-2", "12"), ("½", "12"), ("0.1.2", "0.12"), ("12:30", "12"), ("2021-05", "2021"),
    ("7%", "7"),
    ("A) yes B) no", "A"), ("A or B", "A"), ("8=7", "7"), ("1=2=3=7", "7"), ("x=8=7", "7"), ("x>7", "7"),
    ("x = 7 or x = 8", "7"), (r"x = 7 \text{ or } x = 8", "7"), (r"7 \neq 8", "7"), (r"7 \approx 8", "7"),
    (r"\le 7", "7"), ("1, 2, 3, 7", "7"), ("7, 7", "7"), ("7 7", "7"), ("x=5", "y=5"), ("[1,2]", "[1,2)"),
    ("2 hours 30 minutes", "2"), ("3:2", "3/2"), ("$7", "7%"), ("7 + 1", "7"), ("7\n8", "7"), ("-7", "- -7"),
    ("seven", "7"), ("3/4/5", "3/4"), ("--7", "7"), ("5 less", "5"), ("5 dozen", "5"), ("6 half", "6"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same(a, b):
    assert same_answer(a, b)
    assert same_answer(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert not same_answer(a, b)
    assert not same_answer(b, a)


def test_nothing_is_the_same_as_nothing():
    for nothing in (None, "", "   ", True, float("nan"), float("inf"), [], {}, object(), 10**1000):
        assert not same_answer(nothing, nothing)
        assert not same_answer(nothing, "1")


def test_tolerance_and_percent():
    assert same_answer("1.0001", "1", tol=1e-3)
    assert not same_answer("1001", "1000", tol=0.5)  # integers are exact whatever the tolerance
    assert same_answer("100.0000009", "100")  # absolute above 1: 9e-7 <= 1e-6
    assert not same_answer("100.000002", "100")  # 2e-6, though 2e-8 of the value
    assert same_answer("0.010000009", "0.01")  # relative below 1: 9e-9 <= 1e-8
    assert not same_answer("0.01000002", "0.01")
    assert same_answer("50%", "50", percent=True)
    assert same_answer("50", "50%", percent=True)
    assert same_answer("50%", "0.5", percent=True)
    assert not same_answer("50%", "5", percent=True)


@pytest.mark.errors
def test_same_refuses_a_negative_tolerance():
    with pytest.raises(ValueError, match="tol >= 0"):
        same_answer("1", "1", tol=-1.0)


def test_numbers_against_fractions_at_random():
    import random
    from fractions import Fraction

    rng = random.Random(7)
    for _ in range(300):
        a, b = rng.randint(-9999, 9999), rng.randint(1, 99)
        value = Fraction(a, b)
        assert same_answer(f"{a}/{b}", f"{value.numerator}/{value.denominator}")
        assert not same_answer(f"{a}/{b}", f"{a + 1}/{b}")
        assert same_answer(f"{a:,}", str(a))
        assert same_answer(f"{a}.{b:02d}", f"{a}.{b:02d}00")
        assert not same_answer(f"{a}.{b:02d}", f"{a}.{b:02d}1")


# --- the reward


def test_four_values_all_different():
    reward = accuracy(right=1.0, wrong=0.1, missing=-0.5, abstain=(is_abstention, 0.25))
    done = ["#### 7", "#### 8", "She has many", "I do not know", "<think>#### 7", r"\boxed{I do not know}"]
    assert ask(reward, done, ["7"] * 6) == [1.0, 0.1, -0.5, 0.25, -0.5, 0.25]
    # a question that cannot be answered: declining is right there
    assert ask(reward, ["<think>x</think>I do not know"], ["i do not know"]) == [1.0]


def is_abstention(text: str) -> bool:
    return "do not know" in text


def test_gold_zero_and_numbers_as_gold():
    assert ask(accuracy(), ["#### 0", "#### 0", "#### 0.0", "#### 1"], ["0", 0, 0.0, 0]) == [
        1.0,
        1.0,
        1.0,
        0.0,
    ]


def test_none_when_the_gold_cannot_be_read():
    golds = [None, "", "  ", float("nan"), "nan", [], True, "\\boxed{}"]
    assert ask(accuracy(), ["#### 7"] * 8, golds) == [None] * 8
    assert ask(accuracy(), ["\\boxed{yes}", "\\boxed{(A)}"], ["yes", "A"]) == [
        1.0,
        1.0,
    ]  # text golds can be read


def test_gold_may_be_a_whole_solution():
    assert ask(accuracy(), ["#### 7", "A: 8"], ["3+4=7\n#### 7", "3+4=7\nA: 7"]) == [1.0, 0.0]


def test_text_and_chat_agree():
    texts = ["#### 7", "The answer is 8.", "hm, well", "<think>7</think>\\boxed{7}"]
    chat = [[{"role": "assistant", "content": t}] for t in texts]
    assert ask(accuracy(missing=-1.0), texts, ["7"] * 4) == ask(accuracy(missing=-1.0), chat, ["7"] * 4)
    assert ask(accuracy(missing=-1.0), texts, ["7"] * 4) == [1.0, 0.0, -1.0, 1.0]


def test_columns_cannot_overwrite_options():
    columns = {name: ["x"] for name in ("right", "wrong", "same", "extract", "column", "how", "one")}
    reward = accuracy(right=3.0)
    assert reward(prompts=["?"], completions=["#### 7"], answer=["7"], trainer_state=None, **columns) == [3.0]


def test_pickle_name_and_one_sample():
    reward = pickle.loads(pickle.dumps(accuracy(wrong=0.1, extract=partial(extract_answer, fmt="number"))))
    assert ask(reward, ["it is 7", "it is 8"], ["7", "7"]) == [1.0, 0.1]
    assert reward.score_one("it is 7", "7") == 1.0
    assert reward.func.__name__ == "accuracy"
    assert score_one("it is 7", "7") == 0.0  # a bare last number only on request


def test_inputs_unchanged_and_order_irrelevant():
    done, gold = ["#### 7", "#### 8"], ["7", "7"]
    assert ask(accuracy(), done, gold) == ask(accuracy(), done[::-1], gold)[::-1]
    assert done == ["#### 7", "#### 8"]


@pytest.mark.errors
def test_accuracy_refusals():
    with pytest.raises(ValueError, match="expected a column 'answer', got none"):
        accuracy()(prompts=["?"], completions=["7"])
    with pytest.raises(ValueError, match="expected 1 values in column 'answer', got 2"):
        accuracy()(prompts=["?"], completions=["7"], answer=["7", "8"])
    with pytest.raises(ValueError, match="wrong finite"):
        accuracy(wrong=math.inf)
    with pytest.raises(TypeError, match="expected same as a function"):
        accuracy(same="exact")


# --- hostile text

HOSTILE = {
    "tower": "9**9**9**9",
    "braces": "{" * 10**6,
    "boxes": "\\boxed{" * 150_000,
    "deep box": "\\boxed{" + "{" * 10**6,
    "nul": "\0",
    "surrogate": "\ud800",
    "digits": "7" * 10**5,
    "huge exponent": "1e999999999",
    "tiny exponent": "1e-999999999",
    "parentheses": "(" * 300 + "1" + ")" * 300,
    "many parentheses": "(" * 10**5,
    "white space": " " * 10**6,
    "lines": "\n" * 10**6,
    "says": "answer is " * 10**5,
    "spaced": "answer" + " " * 10**6 + "is 7",
    "thoughts": "<think>" * 10**5,
    "closed": "</think>" * 10**5,
    "tags": "<answer>" * 10**5,
    "hashes": "#" * 10**6,
    "commas": "1," * 10**5,
    "thousands": "1,000" * 10**4,
    "dollars": "$" * 10**5,
    "backslashes": "\\" * 10**6,
    "fractions": "\\frac{" * 10**5,
    "units": "1" + " a" * 450,
    "numbers": "1 " * 450,
    "minus": "-" * 900,
    "sum": "1+" * 200 + "1",
    "zero": "1/0",
    "foreign digits": "٣²",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("frame", ["{}", "#### {}", "<think>x</think>{}", "\\boxed{{{}", "The answer is {}"])
def test_hostile_text_is_harmless(name, frame):
    text = frame.format(HOSTILE[name])
    before = _verify.alive()
    spent = []
    for _ in range(3):  # the machine may be busy
        start = time.process_time()
        for fmt in ("auto", "think", "gsm8k", "boxed", "plain", "tag", "number", "letter"):
            extract_answer(text, fmt=fmt)
        same_answer(text, "7")
        same_answer("7", text)
        same_answer(text, text + " ")
        ask(accuracy(), [text, "#### 7"], ["7", text])
        spent.append(time.process_time() - start)
        if spent[-1] < 0.13:
            break
    if before == _verify.alive():  # no worker was started for it
        assert min(spent) < 0.13  # 13 calls, 10 ms each
    assert not same_answer(text, "12345")


# --- LaTeX and the worker

needs_math_verify = pytest.mark.skipif(not _verify._installed(), reason="math-verify is not installed")


@needs_math_verify
@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        (r"x^2+2x+1", r"(x+1)^2", True),
        (r"x=7", "7", True),
        (r"\infty", r"-\infty", False),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
        (r"\frac{24}{2}", "12", True),
        (r"2^{10}", "1024", True),
        (r"\frac{1}{2}x", r"\frac{x}{3}", False),
        (r"\sqrt{2}", r"\sqrt{3}", False),
        (r"\pm 3", "3", False),
        (r"2^{100}", r"2^{100}+1", False),
        (r"10^{-10}", r"2 \cdot 10^{-10}", False),
        (r"12_{8}", "12", False),
    ],
)
def test_latex(a, b, same):
    assert same_answer(a, b) is same


@needs_math_verify
def test_late_worker_is_killed_and_started_again():
    assert same_answer(r"\sqrt{4}", r"\sqrt{2}^{2}")
    first = _verify.alive()
    start = time.monotonic()
    assert _verify.verify(r"9^{9^{9^{9}}}", r"\sqrt{10^{10^{10^{10}}}}", 1e-6, 1.0) in (False, None)
    assert time.monotonic() - start < 60
    assert same_answer(r"\sqrt{9}", r"\sqrt{3}^{2}")
    second = _verify.alive()
    assert first is not None
    assert second is not None
    if first != second:
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)  # killed and waited for: no zombie


@needs_math_verify
def test_worker_from_threads_and_asyncio():
    pairs = [(rf"\sqrt{{{n * n}}}", rf"\frac{{{2 * n}}}{{2}}") for n in range(2, 8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda p: same_answer(*p), pairs)) == [True] * 6

    async def many():
        return await asyncio.gather(*(asyncio.to_thread(same_answer, a, b) for a, b in pairs))

    assert asyncio.run(many()) == [True] * 6
    assert threading.current_thread() is threading.main_thread()


@needs_math_verify
def test_gold_that_is_no_latex_gives_none():
    assert ask(accuracy(), [r"\boxed{\frac{}{}}", r"\boxed{7}"], [r"\frac{}{}"] * 2) == [None, None]


# --- real solutions


def solutions():
    path = DATA / "example_model_solutions.jsonl"
    if not path.exists():
        pytest.skip("no GSM8K model solutions: set COTKIT_DATA to the folder that holds gsm8k/")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        (
            kind,
            row["ground_truth"].splitlines()[-1].removeprefix("A: "),
            row[kind]["solution"],
            row[kind]["is_correct"],
        )
        for row in rows
        for kind in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    ]


def test_all_5276_labels():
    data = solutions()
    scores = ask(accuracy(), [d[2] for d in data], [d[1] for d in data])
    false_accepts = [d for d, s in zip(data, scores, strict=True) if s == 1.0 and not d[3]]
    false_rejects = [d for d, s in zip(data, scores, strict=True) if s != 1.0 and d[3]]
    assert len(data) == 5276
    assert (len(false_accepts), len(false_rejects)) == (0, 0)
    assert (
        sum(extract_answer(d[2]) is None for d in data) == 10
    )  # cut off before their answer; all labelled wrong
