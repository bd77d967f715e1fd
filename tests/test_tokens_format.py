from itertools import pairwise

import pytest

from cotkit.tokens import ANSWER, FORMATS, SPECIAL, THOUGHT, Format, Parts

THINK, GSM8K, BOXED, PLAIN = (FORMATS[name] for name in ("think", "gsm8k", "boxed", "plain"))


@pytest.mark.parametrize("name", FORMATS)
def test_parse_is_the_inverse_of_render(name):
    for steps, answer in ([["2+3=5", "5*2=10"], "10"], [["one step."], "-3"], [[], "7"]):
        text = FORMATS[name].render(steps, answer)
        assert FORMATS[name].parse(text) == Parts("\n".join(steps), steps, answer, True)


def test_render_writes_the_known_layouts():
    assert THINK.render(["a", "b"], "c") == "<think>\na\nb\n</think>\nc"
    assert GSM8K.render(["a", "b"], "7") == "a\nb\n#### 7"
    assert BOXED.render(["a"], "7") == "a\n\\boxed{7}"
    assert PLAIN.render(["a"], "7") == "a\nThe answer is 7."


@pytest.mark.parametrize(
    ("name", "text", "thought", "answer"),
    [
        ("think", "<think>\nx\n</think>\n7", "x", "7"),
        ("think", "x\n</think>\n7", "x", "7"),  # opening tag prefilled by the template
        ("think", "  <think>x</think>7\n", "x", "7"),
        ("think", "<think>\n\n</think>\n7", "", "7"),
        ("think", "<think>a</think>b<think>c</think>d", "a</think>b<think>c", "d"),  # the last closing tag
        ("think", "<think>x</think>\nSo it is\n\n\\boxed{7}.", "x", "So it is\n\n\\boxed{7}."),
        ("gsm8k", "16-3=<<16-3=13>>13\n#### 13", "16-3=<<16-3=13>>13", "13"),
        ("gsm8k", "x\n\nA: $1,800 ", "x", "$1,800"),
        ("gsm8k", "A: first\nx\nA: 1/5", "A: first\nx", "1/5"),
        ("gsm8k", "#### 5", "", "5"),
        ("boxed", "so $x=\\boxed{\\frac{1}{2}}$.", "so $x=", "\\frac{1}{2}"),
        ("boxed", "\\boxed{7} no: \\boxed{8}", "\\boxed{7} no:", "8"),
        ("boxed", "x \\boxed{\\{1\\}}", "x", "\\{1\\}"),
        ("plain", "2+3=5. The answer is 5.", "2+3=5.", "5"),
        ("plain", "2+3=5, so the answer is $5.50", "2+3=5, so", "$5.50"),
    ],
)
def test_parse_well_formed(name, text, thought, answer):
    parts = FORMATS[name].parse(text)
    assert (parts.thought, parts.answer, parts.ok) == (thought, answer, True)


@pytest.mark.parametrize(
    ("name", "text", "thought"),
    [
        ("think", "<think>\nx\ny", "x\ny"),  # cut off while thinking
        ("think", "<think>\nx\n</think>\n ", "x"),  # cut off before the answer
        ("think", "Sure! <think>x</think>7", "Sure! <think>x</think>7"),
        ("think", "7", "7"),
        ("think", "", ""),
        ("gsm8k", "x\nso 13", "x\nso 13"),
        ("gsm8k", "x #### 13", "x #### 13"),  # the mark does not begin its line
        ("gsm8k", "#### 13\nx", "#### 13\nx"),
        ("gsm8k", "x\n#### ", "x\n####"),
        ("boxed", "x \\boxed{7", "x \\boxed{7"),
        ("boxed", "\\boxed{7} and more", "\\boxed{7} and more"),
        ("boxed", "x \\boxed{}", "x \\boxed{}"),
        ("plain", "The answer is 5. But wait", "The answer is 5. But wait"),
        ("plain", "The answer is 5\nx", "The answer is 5\nx"),
        ("plain", "five", "five"),
    ],
)
def test_malformed_is_reported_and_not_guessed(name, text, thought):
    parts = FORMATS[name].parse(text)
    assert (parts.thought, parts.answer, parts.ok) == (thought, None, False)


def test_steps_and_spans_cover_the_text():
    text = "<think>\n 2+3=5 \n\n5*2=10\n</think>\n 10\n"
    assert THINK.parse(text).steps == ["2+3=5", "5*2=10"]
    spans = THINK.spans(text)
    assert [(text[s:e], part, step) for s, e, part, step in spans] == [
        ("<think>\n ", SPECIAL, -1),
        ("2+3=5 \n\n", THOUGHT, 0),
        ("5*2=10", THOUGHT, 1),
        ("\n</think>\n ", SPECIAL, -1),
        ("10", ANSWER, -1),
        ("\n", SPECIAL, -1),
    ]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "text", ["", " ", "x", "<think>", "</think>", "\\boxed{", "A: 1", "The answer is 3.", "\0"]
)
def test_spans_never_leave_gaps(name, text):
    edges = [(s, e) for s, e, _, _ in FORMATS[name].spans(text)]
    assert "".join(text[s:e] for s, e in edges) == text
    assert all(a[1] == b[0] for a, b in pairwise(edges))


def test_a_format_of_ones_own():
    fmt = Format("<reasoning>", "</reasoning>", " ; ", "<answer>", "</answer>")
    text = fmt.render(["a", "b"], "7")
    assert text == "<reasoning>\na ; b\n</reasoning>\n<answer>7</answer>"
    assert fmt.parse(text) == Parts("a ; b", ["a", "b"], "7", True)
    assert not fmt.parse("<reasoning>\na\n</reasoning>\n7").ok
    assert not fmt.parse("<reasoning>\na\n</reasoning>\n<answer>7").ok


def test_hostile_text_is_quick():
    for name in FORMATS:
        for text in (
            "\\boxed{" + "{" * 10**5,
            "A: " * 10**5,
            "<think>" * 10**5,
            "#### 1\n" * 10**4,
            "\ud800",
        ):
            FORMATS[name].parse(text)


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="expected a mark of the answer"):
        Format()
    with pytest.raises(ValueError, match="step separator"):
        Format("<think>", "</think>", "")
    with pytest.raises(TypeError, match=r"list of strings.*Pass \[text\]"):
        THINK.render("a", "7")
    with pytest.raises(ValueError, match="free of separators and marks"):
        THINK.render(["a\nb"], "7")
    with pytest.raises(ValueError, match="read back"):
        GSM8K.render(["a"], "")
