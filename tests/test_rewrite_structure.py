"""Pins for rewrite.structure."""

import copy
import json
import random

import pytest

from cotkit.rewards.answer import extract_answer, same_answer
from cotkit.rewards.steps import find_equations
from cotkit.rewrite.structure import inject_error

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
