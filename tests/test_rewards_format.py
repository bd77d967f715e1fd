"""Pins for rewards.format."""

import pickle

import pytest

from cotkit.rewards.format import tags


def one(text, **how):
    return tags(**how)(prompts=["?"], completions=[text])[0]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>a</think>\n<answer>b</answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a</think></think><answer>b</answer>", 0.0),
        ("<think>a<think>b</think></think><answer>b</answer>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</answer><think>a</think><answer>b</answer>", 0.0),
        ("x<think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think>x<answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>x", 0.0),
        ("a</think><answer>b</answer>", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_once_in_order_and_nothing_outside(text, score):
    assert one(text) == score


def test_options():
    twice = "<think>a</think><answer>b</answer><think>c</think><answer>d</answer>"
    assert one(twice, repeat=True) == 1.0
    assert one(twice.removesuffix("<answer>d</answer>"), repeat=True) == 0.0
    assert one("<think>a</think>x<answer>b</answer>", gap=True) == 1.0
    assert one("<think>a</think><answer>b</answer>", gap=True) == 0.0
    assert one("<think>a</think>x<answer>b</answer>y", gap=True) == 0.0
    assert one("<think>a</think>b", names=("think",), rest=True) == 1.0
    assert one("<think>a</think> ", names=("think",), rest=True) == 0.0
    assert one("x<think>a</think>b", names=("think",), rest=True) == 0.0
    assert one("## plan\na\n## answer\nb", names=("plan", "answer"), open="## {}", close="") == 1.0
    assert one("## answer\na\n## plan\nb", names=("plan", "answer"), open="## {}", close="") == 0.0


def test_closing_text():
    # One closing text for every block, and a block of one line whose end closes it.
    assert one("<plan>a<end><answer>b<end>", names=("plan", "answer"), close="<end>") == 1.0
    assert one("<plan>a<answer>b<end>", names=("plan", "answer"), close="<end>") == 0.0
    assert one("Answer: 4\n", names=("Answer",), open="{}: ", close="\n") == 1.0
    assert one("Answer: 4", names=("Answer",), open="{}: ", close="\n") == 0.0


def test_no_prompts():
    good, bare = "<think>a</think><answer>b</answer>", "a</think><answer>b</answer>"
    assert tags()(prompts=None, completions=[good, bare]) == [1.0, 0.0]


def test_prefilled_template():
    rest = "a</think><answer>b</answer>"
    assert one(rest, prefilled=True) == 1.0
    assert one("<think>" + rest, prefilled=True) == 0.0  # then it stands there twice
    reward = tags()
    assert reward(prompts=["2+2?<think>\n", "2+2?"], completions=[rest, "<think>" + rest]) == [1.0, 1.0]
    assert reward(prompts=["2+2?<think>\n", "2+2?"], completions=["<think>" + rest, rest]) == [0.0, 0.0]
    assert tags(prefilled=False)(prompts=["2+2?<think>"], completions=[rest]) == [0.0]


def test_chat_pickle_and_name():
    chat = [[{"role": "assistant", "content": "<think>a</think><answer>b</answer>"}]]
    reward = pickle.loads(pickle.dumps(tags()))
    assert reward(prompts=[[{"role": "user", "content": "?"}]], completions=chat, names=["a column"]) == [1.0]
    assert reward.func.__name__ == "tags"
    assert reward.score_one(chat[0]) == 1.0


@pytest.mark.errors
def test_refusals():
    with pytest.raises(TypeError, match="expected names as a list"):
        tags("think")
    with pytest.raises(ValueError, match="none twice"):
        tags(("a", "a"))
    with pytest.raises(ValueError, match="for the name"):
        tags(open="<think>")
    with pytest.raises(ValueError, match="a tag or an empty string"):
        tags(("plan", "answer"), close=" ")
    with pytest.raises(ValueError, match="expected 1 prompts, got 2"):
        tags()(prompts=["a", "b"], completions=["c"])
