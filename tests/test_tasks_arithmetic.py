"""Every chain is replayed by a second reader; splits, styles and difficulty knobs do what they say."""

import functools
import random
import re

import pytest

from cotkit import lab
from cotkit.tasks.arithmetic import countdown, reaches_target, word_problem
from cotkit.tokens import FORMATS

TASKS = {
    "default": word_problem,
    "terse": functools.partial(word_problem, style="terse"),
    "verbose": functools.partial(word_problem, style="verbose"),
    "check": functools.partial(word_problem, style="check"),
    **{f"detail{d}": functools.partial(word_problem, detail=d, steps=(1, 6)) for d in range(1, 7)},
    "distractors": functools.partial(word_problem, distractors=3, cue=0.5, implicit=0.5),
    "countdown": functools.partial(countdown, numbers=3, target=None, operand=20, signs="+-"),
    "game24": functools.partial(countdown, numbers=4),
    "dfs": functools.partial(countdown, numbers=3, target=None, trace="dfs"),
    "bfs": functools.partial(countdown, numbers=3, target=None, trace="bfs"),
}
EQUATION = re.compile(r"([\d+*/-]+)=(\d+)$")


def value(expression: str) -> int:
    """Left to right over whole numbers, with products first: a reader of its own, without eval."""
    total, sign = 0, 1
    for token in re.findall(r"[+-]|[^+-]+", expression):
        if token in "+-":
            sign = 1 if token == "+" else -1
            continue
        product = 1
        for i, factor in enumerate(re.split(r"([*/])", token)):
            if i == 0:
                product = int(factor)
            elif factor in "*/":
                last = factor
            elif last == "*":
                product *= int(factor)
            else:
                assert product % int(factor) == 0
                product //= int(factor)
        total += sign * product
    return total


def replay(lines):
    """Every equation of the chain holds; returns the value of the last one."""
    last = None
    for line in lines:
        match = EQUATION.search(line)
        if match:
            assert value(match[1]) == int(match[2]), line
            if "Check" not in line:
                last = match[2]
    return last


@pytest.mark.parametrize("name", TASKS)
def test_row_contract(name):
    for seed in range(20 if name == "game24" else 60):  # four numbers: a long search
        row = TASKS[name](random.Random(seed))
        assert row == TASKS[name](random.Random(seed))  # nothing but rng is random
        assert replay(row["steps"]) == row["answer"]
        assert len(row["states"]) == len(row["steps"])
        assert row["completion"] == FORMATS["think"].render(row["steps"], row["answer"])
        parts = FORMATS["think"].parse(row["completion"])
        assert parts.ok
        assert parts.steps == row["steps"]
        assert parts.answer == row["answer"]
        for path in row["paths"]:
            assert path != row["steps"]
            assert replay(path) == row["answer"]


def equations(lines):
    return tuple(EQUATION.search(line)[0] for line in lines if EQUATION.search(line))


def test_several_paths_for_most_questions():
    rng = random.Random(0)
    rows = [word_problem(rng, steps=(3, 4)) for _ in range(300)]
    several = [len({equations(p) for p in [r["steps"], *r["paths"]]}) >= 2 for r in rows]
    assert sum(several) / len(several) >= 0.8


def test_paths_are_what_their_names_say():
    rng = random.Random(3)
    for _ in range(50):
        row = word_problem(rng, steps=(3, 3), path="running")
        assert all(line.startswith("All:") for line in row["steps"])
        row = word_problem(rng, steps=(3, 3), path="parts")
        who = [line.split(":")[0] for line in row["steps"]]
        assert who == sorted(who, key="All".__eq__)  # people first, then the sum


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_number_of_operations_is_exact(steps):
    for seed in range(40):
        row = word_problem(random.Random(seed), steps=(steps, steps))
        assert row["meta"]["steps"] == steps == len(row["steps"])


def test_distractor_numbers_never_enter_the_chain():
    for seed in range(60):
        plain = word_problem(random.Random(seed), steps=(3, 3))
        row = word_problem(random.Random(seed), steps=(3, 3), distractors=3)
        people = [n for n in ("years old", "cousins", "lives at number", "hats") if n in row["prompt"]]
        assert people
        assert len(row["prompt"]) > len(plain["prompt"])
        amounts = re.findall(
            r"has (\d+) (?!cousins|hats)|(?:gets|finds|buys|away|loses|sells) (\d+)", row["prompt"]
        )
        known = {int(a or b) for a, b in amounts} | {2}
        first = EQUATION.search(row["steps"][0])[1]
        assert {int(n) for n in re.findall(r"\d+", first)} <= known


def test_unanswerable_cue_and_dozen():
    row = word_problem(random.Random(1), answerable=0.0)
    assert row["answer"] == "unknown"
    assert "some" in row["prompt"]
    assert row["meta"]["answerable"] is False
    row = word_problem(random.Random(1), cue=1.0)
    assert f"A friend says {row['meta']['cue']}." in row["prompt"]
    assert str(row["meta"]["cue"]) != row["answer"]
    row = word_problem(random.Random(1), implicit=1.0)
    assert "a dozen" in row["prompt"]
    assert row["meta"]["implicit"]
    assert replay(row["steps"]) == row["answer"]


def test_detail_grows():
    lengths = [
        sum(len(word_problem(random.Random(s), steps=(4, 4), detail=d)["steps"]) for s in range(50))
        for d in range(1, 7)
    ]
    assert lengths[0] < lengths[1] < lengths[2] < lengths[3] < lengths[4] < lengths[5]


@pytest.mark.parametrize("name", ["default", "distractors", "countdown", "dfs"])
def test_splits_cannot_leak(name):
    seen = {}
    for split in ("train", "validation", "test"):
        for seed in (0, 1):
            for row in lab.rows(TASKS[name], split, n=200, seed=seed):
                assert seen.setdefault(row["prompt"], split) == split


def test_reaches_target_by_hand():
    meta = {"numbers": [3, 4, 5], "target": 12}

    def score(lines, answer="12"):
        return reaches_target([""], [FORMATS["think"].render(lines, answer)], meta=[meta])[0]

    assert score(["3+4=7", "7+5=12"]) == 1
    assert score(["5+3=8", "8+4=12"]) == 1
    assert score(["3+4=7", "7+5=12"], "13") == 0  # the answer is not the target
    assert score(["3*4=12"]) == 0  # the 5 is left over
    assert score(["3+4=8", "8+5=13"], "13") == 0  # miscalculated
    assert score(["3+3=6", "6+6=12"]) == 0  # numbers used twice
    assert score(["3+4=7", "7+5=12", "12+0=12"]) == 0  # a zero out of nowhere
    assert score(["4/3=1", "1+5=6"], "6") == 0  # not whole
    assert score(["well, 3+4=7", "7+5=12"]) == 0  # words
    assert reaches_target(["", ""], ["", "<think>\n</think>\n12"], meta=[meta, meta]) == [0, 0]
    chat = [{"role": "assistant", "content": "<think>\n3+4=7\n7+5=12\n</think>\n12"}]
    assert reaches_target([""], [chat], meta=[meta]) == [1.0]


def test_reaches_target_accepts_every_solution():
    rng = random.Random(5)
    rows = [countdown(rng, numbers=4) for _ in range(20)]
    texts = [FORMATS["think"].render(p, r["answer"]) for r in rows for p in [r["steps"], *r["paths"]]]
    metas = [r["meta"] for r in rows for _ in [0, *r["paths"]]]
    assert reaches_target(texts, texts, meta=metas) == [1.0] * len(texts)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: word_problem(random.Random(), steps=(0, 2)), "expected steps as"),
        (lambda: word_problem(random.Random(), steps=(3, 2)), "expected steps as"),
        (lambda: word_problem(random.Random(), steps=(1, 24)), "expected at most 23 steps"),
        (lambda: word_problem(random.Random(), operand=1), "operand"),
        (lambda: word_problem(random.Random(), detail=7), "detail"),
        (lambda: word_problem(random.Random(), style="loud"), "style"),
        (lambda: word_problem(random.Random(), path="shortest"), "path"),
        (lambda: word_problem(random.Random(), answerable=1.5), "answerable"),
        (lambda: countdown(random.Random(), numbers=7), "numbers"),
        (lambda: countdown(random.Random(), signs="+%"), "signs"),
        (lambda: countdown(random.Random(), trace="a*"), "trace"),
        (lambda: countdown(random.Random(), numbers=2, target=10**6), "reachable"),
        (lambda: reaches_target([], ["x"], meta=[]), "one meta per completion"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
