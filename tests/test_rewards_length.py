"""Pins for rewards.length."""

import math
import pickle

import pytest
import torch

from cotkit.rewards.answer import accuracy
from cotkit.rewards.length import adaptive_mode, cosine, relative, repeated_ngrams

RIGHT, WRONG = "#### 4", "#### 5"


def words(text):
    return len(text.split())


def long(text):
    return "<think>" in text


def curve(reward, lengths, text, answer="4"):
    ids = [[0] * n for n in lengths]
    n = len(lengths)
    return reward(["2+2?"] * n, [text] * n, answer=[answer] * n, completion_ids=ids)


# cosine


def test_cosine_at_its_ends_and_in_the_middle():
    bare = cosine(accuracy(), 100, exceed=None, margin=0)
    assert curve(bare, [0, 50, 100, 150], RIGHT) == pytest.approx([2.0, 1.5, 1.0, 1.0], abs=1e-12)
    assert curve(bare, [0, 50, 100, 150], WRONG) == pytest.approx([-10.0, -5.0, 0.0, 0.0], abs=1e-12)
    # A quarter of the way: v_L + (v_0 - v_L)(1 + cos 45)/2
    share = (1 + math.sqrt(0.5)) / 2
    assert curve(bare, [25], RIGHT) == pytest.approx([1 + share], abs=1e-12)
    assert curve(bare, [25], WRONG) == pytest.approx([-10 * share], abs=1e-12)


def test_cosine_near_the_limit():
    reward = cosine(accuracy(), 100)
    for text in (RIGHT, WRONG):
        assert curve(reward, [84, 85, 100, 101], text) == [-10.0] * 4
        assert curve(reward, [83], text)[0] > -1
    other = cosine(accuracy(), 100, exceed=-3.0, margin=2)
    assert curve(other, [98], RIGHT) == [-3.0]
    assert curve(other, [97], RIGHT)[0] > 1
    assert curve(reward, [50, 100], RIGHT, answer="") == [None, None]


def test_cosine_equals_the_authors():
    # eddycmu/demystify-long-cot, openrlhf/openrlhf/reward/cosine.py, CosineScaledSparseReward(-10, 0, 1, 2,
    # 120, -10, 0, ...) and (-3.5, -0.5, 0.25, 1.75, 90, -4, 0, ...)
    reward = cosine(accuracy(), 120)
    lengths = [0, 7, 31, 60, 88, 103, 104, 130]
    right = [
        2.0,
        1.9916274537819774,
        1.844177287846877,
        1.5,
        1.165434696820571,
        1.0487073578250699,
        -10.0,
        -10.0,
    ]
    wrong = [-10.0, -9.916274537819774, -8.44177287846877, -5.0, -1.6543469682057106, -0.48707357825069797]
    assert curve(reward, lengths, RIGHT) == pytest.approx(right, abs=1e-12)
    assert curve(reward, lengths[:6], WRONG) == pytest.approx(wrong, abs=1e-12)
    reward = cosine(accuracy(), 90, right=(1.75, 0.25), wrong=(-3.5, -0.5), exceed=-4.0)
    right = [1.745891421526205, 1.3974394481749037, 0.6025605518250964]
    wrong = [-3.49178284305241, -2.7948788963498075, -1.2051211036501928]
    assert curve(reward, [3, 29, 61], RIGHT) == pytest.approx(right, abs=1e-12)
    assert curve(reward, [3, 29, 61], WRONG) == pytest.approx(wrong, abs=1e-12)


def test_cosine_equals_trl_without_the_limit():
    from trl.rewards import get_cosine_scaled_reward

    theirs = get_cosine_scaled_reward(100)
    ours = cosine(accuracy(), 100, right=(1.0, 0.5), wrong=(-1.0, -0.5), exceed=None)
    ids = [[0] * n for n in (7, 31, 64, 99)]
    texts = [r"\boxed{4}", r"\boxed{5}"] * 2
    chats = [[{"role": "assistant", "content": t}] for t in texts]
    wanted = theirs(completions=chats, solution=[r"\boxed{4}"] * 4, completion_ids=ids)
    assert ours("????", texts, answer=["4"] * 4, completion_ids=ids) == pytest.approx(wanted, abs=1e-12)


def test_length_of_the_text_when_there_are_no_ids():
    reward = cosine(accuracy(), 10, margin=0, length=words)
    assert reward("?", ["a b c #### 4"], answer=["4"]) == pytest.approx([1.5])  # 5 words of 10
    # ids win over the function
    assert reward("?", ["a b c #### 4"], answer=["4"], completion_ids=[[]]) == [2.0]
    chat = [[{"role": "assistant", "content": "a b c #### 4"}]]
    assert reward([[{"role": "user", "content": "?"}]], chat, answer=["4"]) == pytest.approx([1.5])


# relative


def test_relative_of_two_interleaved_prompts():
    texts = [RIGHT, RIGHT, RIGHT, WRONG, RIGHT, WRONG, WRONG, RIGHT]
    prompts = ["a", "b", "a", "a", "b", "a", "b", "b"]
    lengths = [10, 2, 30, 10, 7, 30, 3, 12]
    ids = [[0] * n for n in lengths]
    columns = {"answer": ["4"] * 8, "completion_ids": ids}
    # a: 10 to 30, right .5 and -.5, wrong 0 and -.5; b: 2 to 12, 7 is half way, wrong at 3: min(0, .4)
    wanted = [0.5, 0.5, -0.5, 0.0, 0.0, -0.5, 0.0, -0.5]
    for size in (None, 4):
        assert relative(accuracy(), group_size=size)(prompts, texts, **columns) == wanted
    # the order of the completions does not matter
    order = [5, 0, 7, 3, 1, 6, 2, 4]
    moved = {name: [column[i] for i in order] for name, column in columns.items()}
    again = relative(accuracy())([prompts[i] for i in order], [texts[i] for i in order], **moved)
    assert again == [wanted[i] for i in order]


def test_relative_equals_open_r1():
    # huggingface/open-r1, src/open_r1/rewards.py, len_reward, on texts of 11, 3, 19, 7, 16 and 5 characters
    reward = relative(accuracy())
    texts = [RIGHT] * 3 + [WRONG] * 3
    ids = [[0] * n for n in (11, 3, 19, 7, 16, 5)]
    wanted = [0.0, 0.5, -0.5, 0.0, -0.3125, 0.0]
    assert reward("??????", texts, answer=["4"] * 6, completion_ids=ids) == wanted


def test_relative_limits():
    reward = relative(accuracy(), length=words)
    assert reward("??", [RIGHT, WRONG], answer=["4"] * 2) == [0.0, 0.0]  # equal lengths
    assert reward("?", [RIGHT], answer=["4"]) == [0.0]  # alone
    # what cannot be scored is not compared: the two right ones are 2 and 4 words long
    texts = [RIGHT, "a a a a a a a a #### 4", "a a #### 4"]
    assert reward("???", texts, answer=["4", None, "4"]) == [0.5, None, -0.5]
    assert reward("??", [RIGHT, "a #### 4"], answer=[None] * 2) == [None, None]
    assert reward([], [], answer=[]) == []


def test_the_same_question_twice_in_the_data():
    # two groups of two; together the lengths are 2, 4, 3, 7
    texts = [RIGHT, "a a #### 4", "a #### 4", "a a a a a #### 4"]
    reward = relative(accuracy(), group_size=2, length=words)
    assert reward("????", texts, answer=["4"] * 4) == [0.5, -0.5, 0.5, -0.5]


def test_prompts_of_messages_and_pictures():
    picture = object()
    one = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "a"}]}]
    two = [{"role": "user", "content": "b"}]
    texts = [RIGHT, RIGHT, "a #### 4", "a #### 4"]
    reward = relative(accuracy(), length=words)
    assert reward([one, two, one, two], texts, answer=["4"] * 4) == [0.5, 0.5, -0.5, -0.5]


@pytest.mark.errors
def test_a_split_group_is_refused():
    texts = [RIGHT, "a #### 4", "a a #### 4"]
    with pytest.raises(ValueError, match="relative: expected every prompt equally often, got 1 to 2 times"):
        relative(accuracy(), length=words)("aab", texts, answer=["4"] * 3)
    with pytest.raises(ValueError, match="relative: expected each prompt 4 times, got 3"):
        relative(accuracy(), group_size=4, length=words)("aaa", texts, answer=["4"] * 3)
    with pytest.raises(ValueError, match="adaptive_mode: expected each prompt 2 times, got 1"):
        adaptive_mode(accuracy(), long, group_size=2)("a", [RIGHT], answer=["4"])
    with pytest.raises(ValueError, match="relative: expected 2 prompts, got 1"):
        relative(accuracy(), length=words)("a", [RIGHT] * 2, answer=["4"] * 2)
    with pytest.raises(ValueError, match="relative: expected 2 prompts, got 0"):
        relative(accuracy(), length=words)(None, [RIGHT] * 2, answer=["4"] * 2)


# adaptive_mode


S, L = RIGHT, "<think>2+2=4</think>4"
NO_S, NO_L = WRONG, "<think>2+2=5</think>5"


@pytest.mark.parametrize(
    ("texts", "scores"),
    [
        ([S, S, L, L], [1.5, 1.5, 1.0, 1.0]),  # short is good enough
        ([S, NO_S, L, L], [1.5, 0.0, 1.0, 1.0]),  # just
        ([NO_S, NO_S, L, L], [0.0, 0.0, 1.5, 1.5]),  # only the long ones succeed
        ([NO_S, NO_S, NO_L, L], [0.0, 0.0, 0.0, 1.5]),
        ([S, NO_S, NO_S, NO_L, L], [1.0, 0.0, 0.0, 0.0, 1.5]),  # a third of the short, half of the long
        ([NO_S, NO_S, NO_L, NO_L, NO_L, L], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]),  # neither
        ([S, NO_S, NO_S, NO_L], [1.0, 0.0, 0.0, 0.0]),
        ([S, S], [1.0, 1.0]),  # one mode alone
        ([L, NO_L], [1.0, 0.0]),
    ],
)
def test_mode_that_is_good_enough_is_paid(texts, scores):
    n = len(texts)
    assert adaptive_mode(accuracy(), long)("?" * n, texts, answer=["4"] * n) == scores


def test_mode_of_each_prompt_apart():
    reward = adaptive_mode(accuracy(), long, tau=1.0, bonus=0.25)
    scores = reward("abab", [S, NO_S, L, L], answer=["4"] * 4)
    assert scores == [1.25, 0.0, 1.0, 1.25]
    assert reward("aaa", [NO_S, S, L], answer=["4", None, "4"]) == [0.0, None, 1.25]


# repeated_ngrams


def test_repeated_ngrams_equal_the_authors():
    # eddycmu/demystify-long-cot, openrlhf/openrlhf/reward/repetition.py, RepetitionDensePenalty(n, p, False)
    ids = [3, 5, 7, 3, 5, 7, 3, 5, 9, 3, 5]
    assert repeated_ngrams(ids, 2, -0.05) == [0, 0, 0, -0.05, -0.05, -0.05, -0.05, -0.05, 0, -0.05, -0.05]
    assert repeated_ngrams(ids, 3, -0.25) == [0, 0, 0, -0.25, -0.25, -0.25, -0.25, -0.25, 0, 0, 0]
    assert repeated_ngrams([4, 4, 4, 4, 4, 2], 2, -0.5) == [0, -0.5, -0.5, -0.5, -0.5, 0]


def test_repeated_ngrams_limits():
    assert repeated_ngrams(list(range(90))) == [0.0] * 90
    assert repeated_ngrams([], 2) == []
    assert repeated_ngrams([1, 1], 3) == [0.0, 0.0]
    assert repeated_ngrams(list(range(40)) * 2) == [0.0] * 40 + [-0.05] * 40
    assert repeated_ngrams([6, 6], 1, -2.0) == [0.0, -2.0]
    ids = [1, 2, 1, 2]
    assert repeated_ngrams(torch.tensor(ids), 2) == repeated_ngrams(ids, 2) == [0.0, 0.0, -0.05, -0.05]
    assert len(repeated_ngrams([7] * 20_000)) == 20_000


# all


@pytest.mark.parametrize(
    "reward", [cosine(accuracy(), 50), relative(accuracy()), adaptive_mode(accuracy(), long)]
)
def test_pickle_chat_and_hostile_text(reward):
    texts = [RIGHT, WRONG, "", "\0\ud800", "9**9**9**9", "{" * 10**5, "####" * 10**4, "\\boxed{" * 10**4]
    n = len(texts)
    columns = {"answer": ["4"] * n, "completion_ids": [[0] * i for i in range(n)]}
    scores = reward(["?"] * n, texts, **columns)
    assert all(s is None or math.isfinite(s) for s in scores)
    assert pickle.loads(pickle.dumps(reward))(["?"] * n, texts, **columns) == scores
    chats = [[{"role": "assistant", "content": t}] for t in texts]
    assert reward([[{"role": "user", "content": "?"}]] * n, chats, **columns) == scores
    nothing = [None, [], [{"role": "assistant", "content": None}]]
    columns = {"answer": ["4"] * 3, "completion_ids": [[]] * 3}
    assert all(math.isfinite(s) for s in reward(["?"] * 3, nothing, **columns))
    assert reward.func.__name__ in ("cosine", "relative", "adaptive_mode")
    assert getattr(reward, "grouped", False) is (reward.func.__name__ != "cosine")


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match=r"cosine: expected completion_ids or length=, got neither"):
        cosine(accuracy(), 10)("?", [RIGHT], answer=["4"])
    with pytest.raises(ValueError, match="relative: expected completion_ids or length=, got neither"):
        relative(accuracy())("?", [RIGHT], answer=["4"])
    with pytest.raises(ValueError, match="cosine: expected 1 completion_ids, got 2"):
        cosine(accuracy(), 10)("?", [RIGHT], answer=["4"], completion_ids=[[0], [0]])
    with pytest.raises(ValueError, match="cosine: expected max_length > 0, got 0"):
        cosine(accuracy(), 0)
    with pytest.raises(ValueError, match="cosine: expected margin >= 0"):
        cosine(accuracy(), 10, margin=-1)
    with pytest.raises(TypeError, match="cosine: expected right as a pair"):
        cosine(accuracy(), 10, right=2.0)
    with pytest.raises(ValueError, match=r"cosine: expected wrong\[1\] finite"):
        cosine(accuracy(), 10, wrong=(0.0, math.nan))
    with pytest.raises(TypeError, match="cosine: expected correct as a function, got str"):
        cosine("accuracy", 10)
    with pytest.raises(TypeError, match="relative: expected length as a function"):
        relative(accuracy(), length=3)
    with pytest.raises(ValueError, match="relative: expected group_size >= 1, got 0"):
        relative(accuracy(), group_size=0)
    with pytest.raises(TypeError, match="relative: expected group_size as an int, got float"):
        relative(accuracy(), group_size=2.0)
    with pytest.raises(ValueError, match=r"adaptive_mode: expected tau in \[0, 1\], got 1.5"):
        adaptive_mode(accuracy(), long, tau=1.5)
    with pytest.raises(ValueError, match="repeated_ngrams: expected n >= 1, got 0"):
        repeated_ngrams([1], 0)
    with pytest.raises(ValueError, match=r"repeated_ngrams: expected ids \[T\], got \[1, 2\]"):
        repeated_ngrams(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="repeated_ngrams: expected penalty finite"):
        repeated_ngrams([1], 1, math.inf)
