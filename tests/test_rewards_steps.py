"""Pins for rewards.steps."""

import pickle
import time
from fractions import Fraction

import pytest

from cotkit.rewards.steps import calculate, equations, find_equations


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
