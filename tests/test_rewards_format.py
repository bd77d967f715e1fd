"""Pins for rewards.format."""

import pickle

import pytest

from cotkit.rewards.format import scripts, tags


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


# scripts


@pytest.mark.parametrize(
    ("text", "allowed", "score"),
    [
        ("Hà Nội, 2+2=4 × π? no: pi", ("Latin",), 0.0),  # a Greek letter
        ("Hà Nội, 2+2=4 × pi", ("Latin",), 1.0),
        ("Ha\u0300 No\u0323i", ("Latin",), 1.0),  # accents apart
        ("<think>x</think> 答案", ("Latin",), 0.0),
        ("<think>一</think> a", ("Latin",), 0.0),  # one character, in the thought
        ("答案 42", ("Han",), 1.0),
        ("答案 a", ("Han",), 0.0),
        ("答案 a", ("Latin", "Han"), 1.0),
        ("ответ", ("Latin",), 0.0),
        ("Вес", ("Cyrillic",), 1.0),
        ("ひらカタ漢ー々", ("Hiragana", "Katakana", "Han"), 1.0),
        ("ひら", ("Katakana",), 0.0),
        ("ｆｕｌｌ ﾊﾝ", ("Latin",), 0.0),
        ("ｆｕｌｌ", ("Latin",), 1.0),
        ("한국어", ("Hangul",), 1.0),
        ("ไทย", ("Latin",), 0.0),
        ("١٢٣ ４ ½ € — “” 😀 𝐀 ℝ µ ª ℹ", ("Latin",), 1.0),  # digits, signs, letters of no script
        ("", ("Latin",), 1.0),
        ("\0\ud800", ("Latin",), 1.0),
        (None, ("Latin",), 1.0),
        ("ascii", ("Han",), 0.0),
    ],
)
def test_letters_of_another_script(text, allowed, score):
    assert scripts(allowed)(["?"], [text]) == [score]


def test_scripts_pickle_chat_and_value():
    reward = pickle.loads(pickle.dumps(scripts(mixed=-0.5)))
    assert reward(["?"] * 2, ["a", "a да"], allowed=["a column"] * 2) == [1.0, -0.5]
    assert reward(["?"], [[{"role": "assistant", "content": "да"}]]) == [-0.5]
    assert reward.score_one("да") == -0.5
    assert reward.func.__name__ == "scripts"
    assert reward(["?"], ["d" + "да" * 10**6]) == [-0.5]


@pytest.mark.errors
def test_scripts_refusals():
    with pytest.raises(TypeError, match="scripts: expected allowed as a list, got the string 'Latin'"):
        scripts("Latin")
    with pytest.raises(ValueError, match="scripts: expected at least one script"):
        scripts(())
    with pytest.raises(ValueError, match="scripts: expected script to be one of 'Latin', 'Greek'"):
        scripts(("Latn",))
    with pytest.raises(ValueError, match="scripts: expected mixed finite"):
        scripts(mixed=float("nan"))
