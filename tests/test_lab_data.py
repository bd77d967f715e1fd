"""rows: splits that cannot leak, GSM8K from a folder, and a clear word where it is missing."""

import functools
import json
import os
import random
from pathlib import Path

import pytest

from cotkit.lab._data import has_data, rows, split_of

SHARED = Path(os.environ.get("COTKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def tiny_task(rng):
    """A task with 8,000 questions: many coincide between seeds."""
    a, b, c = rng.randrange(20), rng.randrange(20), rng.randrange(20)
    return {"prompt": f"{a} and {b} and {c}?\n", "completion": f"{a + b + c}", "answer": f"{a + b + c}"}


def test_splits_cannot_leak_whatever_the_seeds():
    prompts = {
        split: {r["prompt"] for seed in (0, 1, 2) for r in rows(tiny_task, split, n=300, seed=seed)}
        for split in ("train", "validation", "test")
    }
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]
    # nor does a question in another order of its words
    reordered = {tuple(sorted(p.split())) for p in prompts["train"]}
    assert not reordered & {tuple(sorted(p.split())) for p in prompts["test"]}


def test_a_quarter_a_quarter_and_a_half():
    rng = random.Random(0)
    found = [split_of(f"{rng.random()} apples") for _ in range(4000)]
    assert found.count("train") / 4000 == pytest.approx(0.5, abs=0.03)
    assert found.count("test") / 4000 == pytest.approx(0.25, abs=0.03)


def test_the_split_of_a_prompt_never_changes():
    # pinned: another value would turn the training questions of shipped models into test questions
    assert [split_of(f"Ann has {k} coins.") for k in range(6)] == PINNED
    assert split_of("Ann has 3 coins.") == split_of("coins has ANN\n3")
    assert split_of([{"role": "user", "content": "x"}]) in ("train", "validation", "test")


PINNED = ["test", "validation", "train", "train", "test", "test"]


def test_rows_are_reproducible_distinct_and_seeded():
    first = rows(tiny_task, "test", n=50, seed=4)
    assert rows(tiny_task, "test", n=50, seed=4) == first
    assert rows(tiny_task, "test", n=50, seed=5) != first
    assert rows(tiny_task, "test", n=20, seed=4) == first[:20]
    assert len({r["prompt"] for r in first}) == 50


def test_tasks_by_name_and_with_keywords():
    from cotkit.tasks.arithmetic import word_problem

    named = rows("word_problem", "train", n=5)
    assert {"prompt", "completion", "answer", "paths", "steps"} <= set(named[0])
    three = rows(functools.partial(word_problem, steps=(3, 3)), "train", n=5)
    assert {r["meta"]["steps"] for r in three} == {3}


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    gsm8k = tmp_path / "gsm8k"
    line = {"question": "How many?", "answer": "1000+234=<<1000+234=1234>>1234\n#### 1,234"}
    write(gsm8k / "train.jsonl", [line | {"question": f"Q{i}?"} for i in range(5)])
    write(gsm8k / "test.jsonl", [line])
    solution = {"question": "How many?", "ground_truth": "It is 2.\nA: 2"}
    for k, source in enumerate(("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")):
        solution[source] = {"is_correct": k % 2 == 0, "solution": f"So\nA: {2 + k % 2}"}
    write(gsm8k / "example_model_solutions.jsonl", [solution, solution | {"question": "Again?"}])
    return tmp_path


def test_gsm8k_from_a_folder(folder, monkeypatch):
    assert rows("gsm8k", "test", data_dir=folder) == [
        {
            "prompt": "How many?\n",
            "completion": "1000+234=<<1000+234=1234>>1234\n#### 1,234",
            "answer": "1234",
        }
    ]
    chosen = rows("gsm8k", "train", n=3, data_dir=folder, seed=1)
    assert chosen == rows("gsm8k", "train", n=3, data_dir=folder, seed=1)
    everything = rows("gsm8k", "train", data_dir=folder)
    assert [r["prompt"] for r in everything] == [f"Q{i}?\n" for i in range(5)]
    assert chosen == [r for r in everything if r in chosen]
    assert has_data("gsm8k", data_dir=folder)
    monkeypatch.setenv("COTKIT_DATA", str(folder))
    assert rows("gsm8k", "train") == everything


def test_model_solutions_are_one_row_per_source(folder):
    found = rows("gsm8k", "model_solutions", data_dir=folder)
    assert len(found) == 8
    assert found[1] == {
        "prompt": "How many?\n",
        "completion": "So\nA: 3",
        "answer": "2",
        "correct": False,
        "source": "6b_verification",
        "question": 0,
    }
    assert [r["question"] for r in found] == [0] * 4 + [1] * 4
    assert "never train" in rows.__doc__.lower()


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="real data not found: GSM8K")
def test_real_gsm8k():
    assert len(rows("gsm8k", "train", data_dir=SHARED)) == 7473
    test = rows("gsm8k", "test", data_dir=SHARED)
    assert len(test) == 1319
    solutions = rows("gsm8k", "model_solutions", data_dir=SHARED)
    assert len(solutions) == 5276
    assert {r["prompt"] for r in solutions} == {r["prompt"] for r in test}
    # the label's own answer is the test split's
    answers = {r["prompt"]: r["answer"] for r in test}
    assert all(answers[r["prompt"]] == r["answer"] for r in solutions)
    assert all(r["answer"].lstrip("-").replace(".", "").isdigit() for r in test)


@pytest.mark.errors
def test_missing_data_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("COTKIT_DATA", raising=False)
    with pytest.raises(ValueError, match="real data not found"):
        rows("gsm8k", "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="real data not found"):
        rows("gsm8k", "model_solutions")
    assert not has_data("gsm8k", data_dir=tmp_path)

    import datasets

    def unreachable(*_args, **_keywords):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="got ConnectionError: real data not found"):
        rows("gsm8k", "test")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_a, **_k: [{"question": "Q?", "answer": "x\n#### 7"}]
    )
    assert rows("gsm8k", "test")[0]["answer"] == "7"
    assert has_data()


@pytest.mark.errors
@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("gsm8k", "validation"), {}, "expected split to be one of"),
        (("word_problem", "model_solutions"), {"n": 3}, "expected split to be one of"),
        (("word_problem", "train"), {}, "expected n for a task"),
        (("word_problem", "train"), {"n": 0}, "expected n >= 1"),
        (("sudoku", "train"), {"n": 1}, "got 'sudoku'"),
        ((lambda _rng: {"prompt": "same\n"}, split_of("same\n")), {"n": 2}, "2 different questions, got 1"),
    ],
)
def test_refusals(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        rows(*arguments, **keywords)


@pytest.mark.errors
def test_too_many_rows(folder):
    with pytest.raises(ValueError, match="n of at most 5, got 6"):
        rows("gsm8k", "train", n=6, data_dir=folder)
    with pytest.raises(ValueError, match="expected name to be one of"):
        has_data("imagenet")
