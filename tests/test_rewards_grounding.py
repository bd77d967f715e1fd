"""Pins for rewards.grounding."""

import math
import pickle
import re
import time

import pytest
import torch

from cotkit.rewards.answer import accuracy
from cotkit.rewards.grounding import episodic_memory, iou, quotes, similarity

EXCERPT = r"\[Excerpt \d{1,6}\] `([^`]{1,2000})`"
VECTORS = {
    "q1": [1, 0, 0],
    "q2": [0, 1, 0.2],
    "q1b": [0.9, 0.1, 0],
    "s1 #### 4": [1, 2, 0],
    "s2 #### 4": [2, 1, 1],
    "f1 #### 5": [0, 1, 3],
    "f2 #### 5": [-1, 1, 1],
    "a": [1, 1, 1],
    "b": [3, 0, 1],
    "c": [0, 0, 2],
    "d": [1, 2, 0.5],
}


def numbers(text):
    found = re.findall(r"-?\d+(?:\.\d+)?", text[:1000])
    return [float(x) for x in found] if found else None


def letters(texts):
    return [[text[:1000].count(c) for c in "abcdefgh"] for text in texts]


def vectors(texts):
    """Embeddings of the pins; what follows the name only makes an answer right or wrong."""
    return torch.tensor([VECTORS.get(t, VECTORS.get(t[:1])) for t in texts], dtype=torch.float64)


def ask(reward, texts, **columns):
    return reward(["?"] * len(texts), texts, **{k: [v] * len(texts) for k, v in columns.items()})


# iou


@pytest.mark.parametrize(
    ("given", "wanted", "score"),
    [
        ([0, 0, 4, 2], [2, 0, 6, 2], 4 / 12),
        ([1, 2, 5, 7], [3, 1, 6, 5], 2 * 3 / (20 + 12 - 6)),
        ([1, 2, 5, 7], [1, 2, 5, 7], 1.0),
        ([0, 0, 1, 1], [1, 1, 2, 2], 0.0),  # a corner
        ([0, 0, 1, 1], [5, 5, 6, 6], 0.0),
        ([5, 5, 6, 6], [0, 0, 1, 1], 0.0),
        ([4, 2, 0, 0], [0, 0, 4, 2], 0.0),  # turned over
        ([2, 2, 2, 2], [0, 0, 4, 4], 0.0),  # a point
        ([1, 5], [3, 9], 2 / 8),
        ([1.5, 2], [1, 3], 0.25),
        ([1, 5], [0, 0, 4, 2], 0.0),  # an interval for a box
        ([1, 2, 3], [0, 0, 4, 2], 0.0),
        ([0, 0, 4, 2], [0, 0, 4, 0], None),  # no area
        ([0, 0, 4, 2], [0, 0, math.nan, 2], None),
        ([0, 0, 4, 2], None, None),
        ([0, 0, 4, 2], "0 0 2 2", 0.5),
    ],
)
def test_iou(given, wanted, score):
    assert ask(iou(numbers), [" ".join(map(str, given))], box=wanted) == [pytest.approx(score)]


def test_iou_is_that_of_the_authors_but_for_thin_overlaps():
    # AMAP-ML/UniVG-R1, open_r1/vlm_modules/qwen_module.py, iou: 6 by 4 shared, 24/133
    assert ask(iou(numbers), ["0 0 10 8"], box=[4, 4, 11, 15]) == [pytest.approx(24 / 133)]
    assert ask(iou(numbers), ["0 0 10 8"], box=[9, 0, 12, 8]) == [pytest.approx(8 / 96)]  # one pixel: 0 there


def test_iou_of_what_is_no_box():
    for value in (None, "box", 7, [1, 2, 3, 4, 5], ["1", "2"], [True, 2], [math.inf, 1]):
        assert ask(iou(lambda _, value=value: value), ["?"], box=[0, 3]) == [0.0]
    assert ask(iou(lambda _: torch.tensor([0.0, 1.5])), ["?"], box=torch.tensor([0.0, 3.0])) == [0.5]


# quotes


CONTEXT = (
    "Ada Lovelace, born in 1815, wrote the first program.\nIt computed Bernoulli numbers; a party followed."
)


@pytest.mark.parametrize(
    ("text", "share", "authors"),
    [
        ("[Excerpt 1] `born in 1815` [Excerpt 2] `Wrote a first program!`", 1.0, True),
        ("[Excerpt 1] `born in 1816`", 0.0, False),
        ("[Excerpt 1] `It computed the Bernoulli  numbers` [Excerpt 2] `a dance followed`", 0.5, False),
        ("none", 0.0, True),  # theirs takes it; ours on request
        ("[Excerpt 3] `art followed`", 0.0, False),
        ("[Excerpt 3] `arty followed`", 0.0, False),
    ],
)
def test_quotes(text, share, authors):
    # lemon-prog123/LongRePS, evaltoolkits/utils.py, verify_fact_list on what extract_fact_list finds
    assert ask(quotes(EXCERPT), [text], context=CONTEXT) == [share]
    assert (ask(quotes(EXCERPT, require=False), [text], context=CONTEXT) == [1.0]) is authors


def test_quotes_count_once_and_need_words():
    text = "[Excerpt 1] `born in 1815` " * 9 + "[Excerpt 2] `born in 1816`"
    assert ask(quotes(EXCERPT), [text], context=CONTEXT) == [0.5]
    assert ask(quotes(EXCERPT), ["[Excerpt 1] `...` [Excerpt 2] ` the `"], context=CONTEXT) == [0.0]
    assert ask(quotes(EXCERPT), ["x"], context=None) == [None]
    assert ask(quotes(r"\[F\d+\]"), ["[F1] so [F12]"], context="F12: fever, F3: cough") == [0.5]  # no group
    assert quotes("a", column="page")(["?"], ["a"], page=["A"]) == [0.0]  # an article
    many = " ".join(f"`w{i}`" for i in range(3000))
    assert ask(quotes("`([^`]{1,9})`"), [many], context=many) == [pytest.approx(1 / 3)]


# similarity


def test_similarity():
    reward = similarity(letters, part="all")
    # (3,4) with (0,1): 4/5; (1,1) with (1,1): 1; (0,0,2) with (0,1): 0
    assert ask(reward, ["aaabbbb", "bb", "cc"], answer="b") == pytest.approx([0.8, 1.0, 0.0])
    assert ask(reward, ["xyz", "", None], answer="b") == [0.0, 0.0, 0.0]  # zero vector, nothing, nothing
    assert ask(reward, ["b"], answer="") == [None]
    assert ask(reward, ["b"], answer=None) == [None]
    negative = similarity(lambda texts: [[-1.0 if "no" in t else 1.0] for t in texts], part="all")
    assert ask(negative, ["no", "yes"], answer="yes") == [0.0, 1.0]


def test_similarity_of_a_part():
    text = "<think>\naaa\n</think>\n<answer>b</answer>"
    for part, wanted in (("answer", "b"), ("thought", "a"), ("thought", "ac")):
        score = ask(similarity(letters, part=part), [text], answer=wanted)
        assert score == pytest.approx([1.0 if len(wanted) == 1 else math.sqrt(0.5)])
    assert ask(similarity(letters), ["<think>b"], answer="b") == [0.0]  # never closed
    assert ask(similarity(letters, part="thought"), ["a", "<think>a"], answer="a") == [0.0, 0.0]


def test_one_call_of_the_encoder():
    calls = []

    def embed(texts):
        calls.append(texts)
        return torch.ones(len(texts), 2, requires_grad=True)

    assert ask(similarity(embed, part="all"), ["a", "b", "a"], answer="b") == pytest.approx([1.0] * 3)
    assert calls == [["a", "b"]]
    assert ask(similarity(embed), ["nothing here"], answer="b") == [0.0]
    assert len(calls) == 1


# episodic_memory


def filled(**how):
    """A memory that holds two successes of q1, one of q2 and two failures of q1, with empty windows."""
    memory = {}
    reward = episodic_memory(vectors, accuracy(), memory=memory, **{"warmup": 0, **how})
    for prompt, text in [("q1", "s1 #### 4"), ("q1", "s2 #### 4"), ("q2", "s2 #### 4")]:
        reward([prompt], [text], answer=["4"])
    for text in ("f1 #### 5", "f2 #### 5"):
        reward(["q1"], [text], answer=["4"])
    memory["near"], memory["new"] = [], []
    return memory, reward


ORDER = [("q1", "a"), ("q1", "b"), ("q1", "c"), ("q2", "d"), ("q1b", "a"), ("q2", "c")]


def test_exploit_equals_the_authors():
    # thaihungle/Memory-R, rewards/ir_knn_st.py, FastKNNMemory(history_size=4).novelty_score_mean, one
    # minus it as in run_gsm8k.py. The first is the bare distance there (nothing to compare with), 0 here.
    _, reward = filled(explore=0.0, window=4)
    scores = [reward([q], [v + " #### 5"], answer=["4"])[0] for q, v in ORDER]
    assert scores == pytest.approx([0.0, 0.0, 0.0, 0.63397455, 1.0, 0.08578634], abs=1e-6)


def test_explore_equals_the_authors():
    # the same, novelty_score_max; right answers are not stored among the failures
    _, reward = filled(exploit=0.0, window=4)
    scores = [reward([q], [v + " #### 4"], answer=["4"])[0] for q, v in ORDER]
    assert scores == pytest.approx([0.0, 1.0, 0.0, 0.71781933, 0.3366613, 0.0], abs=1e-6)


def test_one_group_by_hand():
    memory, reward = filled(exploit=2.0, explore=0.5)
    before = {kind: len(memory[kind]["q1"]["said"]) for kind in ("success", "failure")}
    scores = reward(["q1"] * 3, ["a #### 4", "b #### 5", "c #### 5"], answer=["4", "4", "4"])
    center = [1.5, 1.5, 0.5]
    near = [-math.dist(VECTORS[t], center) for t in "abc"]

    def cos(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    new = [1 - max(cos(VECTORS[t], VECTORS[f]) for f in ("f1 #### 5", "f2 #### 5")) for t in "abc"]
    wanted = [
        2 * (x - min(near)) / (max(near) - min(near)) + 0.5 * (y - min(new)) / (max(new) - min(new))
        for x, y in zip(near, new, strict=True)
    ]
    assert scores == pytest.approx(wanted, abs=1e-12)
    # written after they were scored: one more success, two more failures
    assert len(memory["success"]["q1"]["said"]) == before["success"] + 1
    assert len(memory["failure"]["q1"]["said"]) == before["failure"] + 2
    # the order within a call does not matter
    _, again = filled(exploit=2.0, explore=0.5)
    turned = again(["q1"] * 3, ["c #### 5", "b #### 5", "a #### 4"], answer=["4", "4", "4"])
    assert turned[::-1] == pytest.approx(scores, abs=1e-12)


def test_an_all_wrong_group_is_told_apart():
    memory, reward = filled()
    del memory["failure"]
    scores = reward(["q1"] * 2, ["a #### 5", "c #### 5"], answer=["4"] * 2)
    assert scores[0] > scores[1]
    again = reward(["q1"] * 2, ["c #### 5", "b #### 5"], answer=["4"] * 2)  # c is stored as a failure by now
    assert again[1] > again[0]


def test_memory_starts_empty_and_is_bounded():
    memory = {}
    reward = episodic_memory(vectors, accuracy(), memory=memory, warmup=2, capacity=3, window=5)
    assert reward(["q1"], ["a #### 5"], answer=["4"]) == [0.0]
    assert reward(["q1"], ["b #### 5"], answer=["4"]) == [0.0]  # still warming up
    # no success yet, and further from the failures than before
    assert reward(["q1"], ["d #### 4"], answer=["4"])[0] in (0.0, 1.0)
    for text in ("a", "b", "c", "d", "a", "b"):
        reward(["q1"], [text + " #### 5"], answer=["4"])
    assert memory["calls"] == 9
    assert len(memory["failure"]["q1"]["said"]) == 3
    assert memory["failure"]["q1"]["said"][-1].tolist() == VECTORS["b"]
    assert len(memory["near"]) == len(memory["new"]) == 5
    assert episodic_memory(vectors, accuracy(), memory={}, warmup=0)(["q1"], ["a #### 5"], answer=["4"]) == [
        1.0
    ]


def test_what_cannot_be_scored_is_not_stored():
    memory = {}
    reward = episodic_memory(vectors, accuracy(), memory=memory)
    assert reward(["q1"] * 2, ["a #### 5", "b #### 5"], answer=[None, "4"]) == [None, 0.0]
    assert len(memory["failure"]["q1"]["said"]) == 1
    assert reward(["q1"], ["a #### 5"], answer=[None]) == [None]
    assert memory["calls"] == 1


def test_the_nearest_questions_are_read():
    memory = {}
    reward = episodic_memory(vectors, accuracy(), memory=memory, explore=0.0)
    reward(["q1"], ["a #### 4"], answer=["4"])
    reward(["q2"], ["c #### 4"], answer=["4"])
    memory["near"] = [-9.0]
    reward(["q1b"], ["a #### 5"], answer=["4"])
    assert memory["near"][-1] == pytest.approx(0.0)  # q1 is nearest, and a is its only success
    both = episodic_memory(vectors, accuracy(), memory=memory, explore=0.0, k=2)
    both(["q1b"], ["a #### 5"], answer=["4"])
    assert memory["near"][-1] == pytest.approx(-math.dist(VECTORS["a"], [0.5, 0.5, 1.5]))


# all


@pytest.mark.parametrize(
    "reward",
    [
        iou(numbers),
        quotes(EXCERPT),
        similarity(letters),
        episodic_memory(letters, accuracy(), memory={}),
    ],
)
def test_pickle_chat_and_hostile_text(reward):
    texts = ["#### 4", "", "\0\ud800", "9**9**9**9", "`" * 10**5, "[Excerpt 1] `" * 10**4, "a" * 10**6]
    columns = {"answer": "4", "box": [0, 3], "context": "a b " * 1000}
    began = time.process_time()
    scores = ask(reward, texts, **columns)
    assert time.process_time() - began < 5
    assert all(s is None or math.isfinite(s) for s in scores)
    if reward.func.__name__ != "episodic_memory":
        assert ask(pickle.loads(pickle.dumps(reward)), texts, **columns) == scores
        assert ask(reward, [[{"role": "assistant", "content": t}] for t in texts], **columns) == scores
    ask(reward, [None, [], [{"role": "assistant", "content": None}]], **columns)
    assert reward([], [], answer=[], box=[], context=[]) == []
    assert reward.func.__name__ in ("iou", "quotes", "similarity", "episodic_memory")


def test_a_pickled_memory_is_a_copy():
    memory = {}
    reward = episodic_memory(letters, accuracy(), memory=memory)
    other = pickle.loads(pickle.dumps(reward))
    other(["?"], ["a #### 4"], answer=["4"])
    assert memory == {}


@pytest.mark.errors
def test_refusals():
    with pytest.raises(TypeError, match="iou: expected parse as a function"):
        iou(None)
    with pytest.raises(ValueError, match="iou: expected a column 'box'"):
        iou(numbers)(["?"], ["1 2"])
    with pytest.raises(ValueError, match="quotes: expected a regular expression, got '\\['"):
        quotes("[")
    with pytest.raises(TypeError, match="quotes: expected pattern as text"):
        quotes(re.compile("a"))
    with pytest.raises(ValueError, match="similarity: expected part to be one of"):
        similarity(letters, part="mind")
    with pytest.raises(
        ValueError, match=r"similarity: expected one finite vector for each of 2 texts, got \[1, 2\]"
    ):
        ask(similarity(lambda _: [[1.0, 2.0]], part="all"), ["a"], answer="b")
    with pytest.raises(ValueError, match="similarity: expected one finite vector"):
        ask(similarity(lambda t: [[math.nan]] * len(t), part="all"), ["a"], answer="b")
    with pytest.raises(TypeError, match="episodic_memory: expected memory as a dict, got list"):
        episodic_memory(letters, accuracy(), memory=[])
    with pytest.raises(ValueError, match="episodic_memory: expected window >= 1"):
        episodic_memory(letters, accuracy(), memory={}, window=0)
    with pytest.raises(ValueError, match="episodic_memory: expected warmup >= 0"):
        episodic_memory(letters, accuracy(), memory={}, warmup=-1)
    with pytest.raises(TypeError, match="episodic_memory: expected k as an int"):
        episodic_memory(letters, accuracy(), memory={}, k=1.0)
    with pytest.raises(ValueError, match="episodic_memory: expected explore finite"):
        episodic_memory(letters, accuracy(), memory={}, explore=math.inf)
    with pytest.raises(ValueError, match="episodic_memory: expected 1 prompts, got 0"):
        episodic_memory(letters, accuracy(), memory={})(None, ["a"], answer=["4"])
