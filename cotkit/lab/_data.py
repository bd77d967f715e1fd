"""Rows for the notebooks: the lab's own tasks, and GSM8K where it is to be had.

Conventions: a row is ``{"prompt": str, "completion": str, "answer": str, ...}``; prompts end with a newline.
Functions: ``rows`` gives them by name; ``has_data`` says whether real data is there.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cotkit._check import integers, one_of

__all__ = ["has_data", "rows"]

Task = Callable[[random.Random], dict[str, Any]]

_SPLITS = ("train", "validation", "test")
_GSM8K_SPLITS = ("train", "test", "model_solutions")
_GSM8K_FILES = {
    "train": "train.jsonl",
    "test": "test.jsonl",
    "model_solutions": "example_model_solutions.jsonl",
}
_SOURCES = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def rows(
    name: str | Task, split: str, *, n: int | None = None, data_dir: str | Path | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows by name: a task of ``cotkit.tasks`` made on the spot, or GSM8K from a folder or the hub.

    Tasks: "train", "validation" and "test" cannot leak into each other whatever the seeds and the difficulty,
    since the words of the prompt decide the split, their order left aside: half of all questions can only be
    train, a quarter only validation, a quarter only test. A prompt comes at most once in a call. Other
    settings than a task's own: pass the task with its keywords filled in, ``functools.partial(word_problem,
    steps=(3, 3))``.

    GSM8K ("gsm8k"): "train" (7,473), "test" (1,319), and "model_solutions": 5,276 labelled solutions of real
    models to the TEST questions, with the columns ``correct``, ``source`` and ``question``. They are there to
    check answers and to measure how a model ranks right and wrong chains. Never train on "test" or
    "model_solutions": for training take right chains from "train" and plant errors in them
    (``cotkit.rewrite.structure.inject_error``) or sample wrong ones from a model.

    Args:
        name: "gsm8k", "word_problem", "countdown", or a task ``(rng) -> row``.
        split: see above.
        n: number of rows; of GSM8K a random choice of that size in the file's order (None: all). Tasks need
            it.
        data_dir: folder that holds ``gsm8k/``; None: the environment variable ``COTKIT_DATA``, else the hub's
            ``openai/gsm8k`` through ``datasets``.
        seed: another seed, other rows of the same split.

    Returns:
        The rows; GSM8K's completions are in the "gsm8k" format.

    Raises:
        ValueError: unknown name or split, ``n`` missing or too large, or "real data not found".

    Source: none (plumbing)
    Basis: GSM8K (2021) arXiv:2110.14168 for the data; MIT licence.
    Differs: the solutions' final line is "A: n" where the data set's own is "#### n"; both are left as they
    are.

    Example:
        >>> train = rows("word_problem", "train", n=20)
        >>> test = rows("word_problem", "test", n=20)
        >>> {r["prompt"] for r in train} & {r["prompt"] for r in test}
        set()
    """
    integers("rows", seed=seed)
    if n is not None:
        integers("rows", n=n)
        if n < 1:
            raise ValueError(f"rows: expected n >= 1, got {n}.")
    if isinstance(name, str) and name == "gsm8k":
        one_of("rows", _GSM8K_SPLITS, split=split)
        return _choose(_gsm8k(split, data_dir), n, seed)
    one_of("rows", _SPLITS, split=split)
    if n is None:
        raise ValueError("rows: expected n for a task, got None. A task makes as many rows as you ask for.")
    return _make(_task(name), split, n, seed)


def has_data(name: str = "gsm8k", *, data_dir: str | Path | None = None) -> bool:
    """Whether ``rows(name, ...)`` would find its real data, so that a notebook can skip a cell with a word.

    Args:
        name: "gsm8k".
        data_dir: as in ``rows``.

    Returns:
        True where the folder, or the hub (or its cache), has the training split.

    Raises:
        ValueError: another name.

    Source: none (plumbing)
    Basis: none needed.
    Differs: nothing.

    Example:
        >>> has_data("gsm8k", data_dir="no/such/folder")
        False
    """
    one_of("has_data", ("gsm8k",), name=name)
    try:
        return bool(_gsm8k("train", data_dir, first=1))
    except ValueError:
        return False


def split_of(prompt: Any) -> str:
    """The only split that a prompt can be in: decided by its words, their order left aside."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    bag = " ".join(sorted(re.findall(r"\w+", text.casefold())))
    quarter = hashlib.sha256(bag.encode()).digest()[0] % 4
    return ("train", "train", "validation", "test")[quarter]


def _task(name: str | Task) -> Task:
    if callable(name):
        return name
    from cotkit.tasks import arithmetic

    tasks: dict[str, Task] = {"word_problem": arithmetic.word_problem, "countdown": arithmetic.countdown}
    if name not in tasks:
        raise ValueError(
            f"rows: expected 'gsm8k' or one of {sorted(tasks)}, got {name!r}. Or pass a task as a function."
        )
    return tasks[name]


def _make(task: Task, split: str, n: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"{split}/{seed}")
    made: dict[Any, dict[str, Any]] = {}
    for _ in range(1000 + 100 * n):
        row = task(rng)
        prompt = row["prompt"]
        key = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
        if split_of(prompt) == split and key not in made:
            made[key] = row
            if len(made) == n:
                return list(made.values())
    raise ValueError(
        f"rows: expected {n} different questions, got {len(made)}. The task has too few of them."
    )


def _choose(items: list[dict[str, Any]], n: int | None, seed: int) -> list[dict[str, Any]]:
    if n is None:
        return items
    if n > len(items):
        raise ValueError(f"rows: expected n of at most {len(items)}, got {n}.")
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), n))]


def _gsm8k(split: str, data_dir: str | Path | None, *, first: int | None = None) -> list[dict[str, Any]]:
    folder = data_dir if data_dir is not None else os.environ.get("COTKIT_DATA")
    path = Path(folder, "gsm8k", _GSM8K_FILES[split]) if folder else None
    if path is not None and path.is_file():
        with path.open(encoding="utf-8") as file:
            lines = [
                json.loads(line) for line, _ in zip(file, range(first or 10**9), strict=False) if line.strip()
            ]
    elif data_dir is not None or split == "model_solutions":
        raise ValueError(
            f"rows: expected {path or 'COTKIT_DATA'} with GSM8K's {split}, got nothing: real data not found. "
            f"Set COTKIT_DATA to the folder that holds gsm8k/{_GSM8K_FILES[split]}."
        )
    else:
        lines = _hub(split)
    if split == "model_solutions":
        return [row for number, line in enumerate(lines) for row in _solutions(line, number)]
    return [
        {
            "prompt": line["question"] + "\n",
            "completion": line["answer"],
            "answer": _last_number(line["answer"], "####"),
        }
        for line in lines
    ]


def _hub(split: str) -> list[dict[str, Any]]:
    problem: Exception
    try:
        from datasets import load_dataset

        return [dict(line) for line in load_dataset("openai/gsm8k", "main", split=split)]
    except Exception as error:  # no network, no cache, no datasets: one clear message for all
        problem = error
    raise ValueError(
        f"rows: expected GSM8K in $COTKIT_DATA/gsm8k or on the hub, got {type(problem).__name__}: real data "
        "not found. Set COTKIT_DATA, or allow the hub with lab.setup(offline=False)."
    ) from problem


def _solutions(line: dict[str, Any], number: int) -> list[dict[str, Any]]:
    gold = _last_number(line["ground_truth"], "A:")
    return [
        {
            "prompt": line["question"] + "\n",
            "completion": line[source]["solution"],
            "answer": gold,
            "correct": bool(line[source]["is_correct"]),
            "source": source,
            "question": number,
        }
        for source in _SOURCES
    ]


def _last_number(text: str, mark: str) -> str:
    """What stands behind the last mark, thousands separators taken out."""
    return text.rpartition(mark)[2].strip().replace(",", "")
