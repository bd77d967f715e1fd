"""Pins for rewrite.structure."""

import copy
import json
import random

import pytest
import torch

from cotkit import lab
from cotkit.rewards.answer import extract_answer, same_answer
from cotkit.rewards.steps import find_equations
from cotkit.rewrite.structure import inject_error, reveal_steps
from cotkit.tokens import FORMATS, THOUGHT, encode, mask

GSM8K = {
    "prompt": "q",
    "completion": "2 * 8 = <<2*8=16>>16 eggs\n16 - 3 = <<16-3=13>>13 left\n5 + 5 = <<5+5=10>>10 hens\n"
    "13 * 10 = $<<13*10=130>>130\n#### 130",
    "answer": "130",
}
LAB = {
    "prompt": "q",
    "completion": "<think>\nAnn 3+4=7\nBob 9-2=7\nAll 7+7=14\n</think>\n14",
    "answer": "14",
    "steps": ["Ann 3+4=7", "Bob 9-2=7", "All 7+7=14"],
    "states": ["7", "7", "14"],
}


@pytest.mark.parametrize("row", [GSM8K, LAB])
@pytest.mark.parametrize("propagate", [True, False])
def test_exactly_one_equation_is_false(row, propagate):
    before = copy.deepcopy(row)
    for seed in range(40):
        made = inject_error(row, rng=random.Random(seed), propagate=propagate)
        assert [e.holds for e in find_equations(made["completion"])].count(False) == 1
        assert same_answer(extract_answer(made["completion"]), row["answer"]) is not propagate
        first = made["step_labels"].index(False)
        false = [e.holds for e in find_equations(made["completion"])].index(False)
        assert first == false  # one equation a line in both rows
        assert made["answer"] == row["answer"]
        assert len(made["step_labels"]) == len(find_equations(row["completion"]))
        if not propagate:
            assert made["step_labels"].count(False) == 1
            old, new = row["completion"].splitlines(), made["completion"].splitlines()
            assert sum(a != b for a, b in zip(old, new, strict=True)) == 1
    assert row == before
    assert made == inject_error(row, rng=random.Random(39), propagate=propagate)


def test_independent_steps_stay_true():
    seen = set()
    for seed in range(60):
        made = inject_error(GSM8K, rng=random.Random(seed))
        seen.add(tuple(made["step_labels"]))
        assert ("5 + 5 = <<5+5=10>>10" in made["completion"]) is made["step_labels"][2]
    assert seen == {
        (False, False, True, False),
        (True, False, True, False),
        (True, True, False, False),
        (True, True, True, False),
    }


def test_steps_follow_and_states_go():
    made = inject_error(LAB, rng=random.Random(1))
    assert made["completion"] == "<think>\n" + "\n".join(made["steps"]) + "\n</think>\n" + extract_answer(
        made["completion"]
    )
    assert "states" not in made


def test_most_of_gsm8k_train(data_dir):
    lines = (data_dir / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rng = random.Random(4)
    done = 0
    for line in rng.sample(lines, 300):
        row = json.loads(line)
        row = {
            "prompt": row["question"],
            "completion": row["answer"],
            "answer": extract_answer(row["answer"]),
        }
        try:
            made = inject_error(row, rng=rng)
        except ValueError:
            continue
        done += 1
        answer = extract_answer(made["completion"])
        assert answer is not None
        assert not same_answer(answer, row["answer"])
    assert done >= 270  # 94.9 % of all 7,473


# reveal_steps


class Scripted(random.Random):
    """Gives the listed numbers."""

    def __init__(self, *values):
        super().__init__(0)
        self.values = iter(values)

    def random(self):
        return next(self.values)


def chain(n):
    lines = [f"{i}+1={i + 1}" for i in range(n)]
    text = FORMATS["think"].render(lines, str(n))
    return {"prompt": "q? ", "completion": text, "steps": lines, "states": [str(i + 1) for i in range(n)]}


# separation of liumy2010/UFT, verl/utils/dataset/rl_dataset.py, __getitem__, for hints of so many steps
CUTS = {
    1: [0, 1],
    3: [0, 1, 2, 3],
    5: [0, 1, 2, 3, 4, 5],
    7: [0, 1, 3, 4, 6, 7],
    8: [0, 2, 3, 5, 6, 8],
    12: [0, 2, 5, 7, 10, 12],
}


@pytest.mark.parametrize("n", CUTS)
def test_hints_are_cut_where_the_authors_cut(n):
    row = chain(n)
    for drawn, shown in enumerate(CUTS[n]):
        rng = Scripted(*[0.29] * drawn, *[0.31] * (len(CUTS[n]) - 1 - drawn))
        made = reveal_steps(row, 0.3, rng=rng)
        assert made["hint_steps"] == shown
        assert made["revealed"] == pytest.approx(shown / n, abs=1e-12)
        assert made["prompt"] == row["prompt"] + made["hint"]
        assert made["prompt"] + made["completion"] == row["prompt"] + row["completion"]
        assert FORMATS["think"].parse(made["completion"]).steps == row["steps"][shown:] == made["steps"]
        assert made["states"] == row["states"][shown:]
        assert FORMATS["think"].parse(made["completion"]).answer == str(n)
        hint = ["<think>", *row["steps"][:shown]] if shown else []
        assert made["hint"].split() == hint


def test_the_share_of_the_hint_is_p_on_average():
    rng, row = random.Random(3), chain(10)
    for p in (0.05, 0.3, 0.95):
        shares = [reveal_steps(row, p, rng=rng)["revealed"] for _ in range(3000)]
        assert sum(shares) / 3000 == pytest.approx(p, abs=0.02)
        # Binomial(5, p) / 5: variance p (1 - p) / 5
        spread = sum((s - p) ** 2 for s in shares) / 3000
        assert spread == pytest.approx(p * (1 - p) / 5, rel=0.15)
    uniform = [reveal_steps(row, rng.random(), rng=rng)["hint_steps"] for _ in range(6000)]
    assert all(uniform.count(k) / 6000 == pytest.approx(1 / 6, abs=0.02) for k in (0, 2, 4, 6, 8, 10))


def test_ends_of_p_and_other_formats():
    row = chain(4)
    before = copy.deepcopy(row)
    none, whole = (reveal_steps(row, p, rng=random.Random(0)) for p in (0, 1))
    assert row == before
    assert none == {**row, "hint": "", "hint_steps": 0, "revealed": 0.0}
    assert whole["completion"] == "\n</think>\n4"
    assert whole["hint"] == "<think>\n0+1=1\n1+1=2\n2+1=3\n3+1=4"
    made = reveal_steps(GSM8K, 1, rng=random.Random(0), fmt="gsm8k")
    assert made["completion"] == "\n#### 130"
    assert made["hint_steps"] == 4
    two = reveal_steps(chain(7), 0.5, segments=2, rng=Scripted(0.1, 0.9))
    assert two["hint_steps"] == 4  # round(3.5) to the even number
    empty = {"prompt": "q", "completion": "<think>\n\n</think>\n7"}
    assert reveal_steps(empty, 1, rng=random.Random(0))["hint"] == ""


def test_hinted_tokens_by_their_step_numbers():
    """UFT's loss: the hint is a target too, the rest is what the policy wrote."""
    _, tokenizer = lab.load("tiny")
    row = chain(5)
    made = reveal_steps(row, 0.5, rng=Scripted(0.1, 0.1, 0.9, 0.9, 0.9))
    written = "2+1=3\n3+1=9\n</think>\n9"  # in place of made["completion"]
    batch = encode([{"prompt": row["prompt"], "completion": made["hint"] + written}], tokenizer)
    thought = mask(batch["segments"], THOUGHT)
    hinted = thought & (batch["steps"] < torch.tensor([made["hint_steps"]])[:, None])
    assert tokenizer.decode(batch["input_ids"][hinted]).split() == row["steps"][:2]
    assert tokenizer.decode(batch["input_ids"][thought & ~hinted]).split() == ["2+1=3", "3+1=9"]


@pytest.mark.errors
def test_refusals():
    for text in ("", "no sums\n#### 3", "3+4=8\n#### 8", "3+4=7"):
        with pytest.raises(ValueError, match="Leave this row out"):
            inject_error({"completion": text}, rng=random.Random(0))
    with pytest.raises(ValueError, match="that the final answer hangs on"):
        inject_error({"completion": "3+4=7\n#### 12"}, rng=random.Random(0))
    with pytest.raises(TypeError, match="completion as text"):
        inject_error({"completion": [{"role": "assistant", "content": "3+4=7"}]}, rng=random.Random(0))
    with pytest.raises(TypeError, match=r"random\.Random"):
        inject_error(GSM8K, rng=0)


@pytest.mark.errors
def test_refusals_of_reveal_steps():
    rng = random.Random(0)
    with pytest.raises(TypeError, match="reveal_steps: expected prompt as text, got list"):
        reveal_steps({"prompt": [], "completion": ""}, 0.5, rng=rng)
    with pytest.raises(TypeError, match="reveal_steps: expected completion as text, got NoneType"):
        reveal_steps({"prompt": "q"}, 0.5, rng=rng)
    with pytest.raises(TypeError, match=r"random\.Random"):
        reveal_steps(chain(2), 0.5, rng=0)
    with pytest.raises(ValueError, match=r"reveal_steps: expected p in \[0, 1\], got 1.5"):
        reveal_steps(chain(2), 1.5, rng=rng)
    with pytest.raises(ValueError, match="reveal_steps: expected segments >= 1, got 0"):
        reveal_steps(chain(2), 0.5, segments=0, rng=rng)
    with pytest.raises(ValueError, match="Leave this row out"):
        reveal_steps({"prompt": "q", "completion": "no tags"}, 0.5, rng=rng)
    with pytest.raises(ValueError, match="reveal_steps: expected fmt to be one of"):
        reveal_steps(chain(2), 0.5, rng=rng, fmt="thinking")
