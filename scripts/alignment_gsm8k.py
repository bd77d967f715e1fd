"""The alignment sweep on real text: GSM8K chains against planted errors and against own samples.

The tiny model is fine-tuned on chains of the train split. It goes on with the references alone, or with
alignment against the same chains with planted errors, or against what it samples itself. It is measured on
labelled solutions of four real systems to test questions, which are never trained on: the share of (right,
wrong) pairs of a question in the right order, and how well the mean scores of the four systems follow the
order of their accuracies. Its own answers are almost all wrong at this size, so nothing else is said.
"""

import copy
import random
from typing import Any

import numpy as np
import torch

from cotkit import lab, tokens
from cotkit.bootstrap.reject import sample_and_score
from cotkit.metrics import assessment_accuracy
from cotkit.rewards.answer import accuracy
from cotkit.rewrite.pairs import ranked
from cotkit.rewrite.structure import inject_error

import sweep_spine as spine  # isort: skip

RUNS = ((0, 0), (1, 1), (2, 2))
ARMS = ("sft", "sft_more", "align_plain", "aft_boundary", "own_boundary")
SETTINGS: dict[str, Any] = {
    "questions": 300,
    "max_length": 320,
    "max_new_tokens": 160,
    "sft_steps": 60,
    "sft_batch": 16,
    "sft_lr": 1e-3,
    "wrong": 2,
    "more_steps": 20,
    "questions_a_step": 8,
    "lr": 3e-4,
    "boundary": 0.15,
    "test_questions": 200,
}


def falsified(gold: list[dict], seed: int) -> list[dict]:
    """Groups of each chain and its copies with planted errors, as flat rows."""
    rng, out = random.Random(seed), []
    for number, row in enumerate(gold):
        out.append(row | {"group": number, "rank": 0, "gold": 1})
        try:
            wrong = [inject_error(row, rng=rng)["completion"] for _ in range(SETTINGS["wrong"])]
        except ValueError:  # nothing in this chain that can be falsified
            continue
        out += [
            {**row, "completion": text, "group": number, "rank": 1, "gold": 0}
            for text in dict.fromkeys(wrong)
        ]
    return out


def solutions() -> list[dict]:
    """Labelled solutions in the form of the training chains: the last line is '#### n' as there."""
    rows = lab.rows("gsm8k", "model_solutions")
    few = set(list(dict.fromkeys(row["question"] for row in rows))[: SETTINGS["test_questions"]])
    return [
        row | {"completion": row["completion"].replace("\nA: ", "\n#### ")}
        for row in rows
        if row["question"] in few
    ]


def judge(model: Any, tokenizer: Any, rows: list[dict]) -> dict[str, Any]:
    """Pairs in the right order per question, and the rank correlation over the four systems."""
    scores = lab.score(model, tokenizer, rows, "gsm8k", batch=64)
    number = {q: i for i, q in enumerate(dict.fromkeys(row["question"] for row in rows))}
    group = torch.tensor([number[row["question"]] for row in rows])
    padded, valid = tokens.grouped(scores, group)
    label, _ = tokens.grouped(torch.tensor([float(row["correct"]) for row in rows]), group)
    pairs = zip(padded, label == 1, valid, strict=True)
    by_source = {
        s: [i for i, row in enumerate(rows) if row["source"] == s] for s in {r["source"] for r in rows}
    }
    score = [float(scores[at].mean()) for at in by_source.values()]
    skill = [float(np.mean([rows[i]["correct"] for i in at])) for at in by_source.values()]
    order = np.corrcoef(np.argsort(np.argsort(score)), np.argsort(np.argsort(skill)))[0, 1]
    return {
        "assessment": [assessment_accuracy(*(x[None] for x in q)) for q in pairs],
        "systems": float(order),
        "right_logp": float(scores[[bool(row["correct"]) for row in rows]].mean()),
    }


def run(base: int, seed: int) -> list[dict]:
    """All arms of one base and seed."""
    s = SETTINGS
    start, tokenizer = lab.load("tiny", seed=base)
    gold = lab.rows("gsm8k", "train", n=s["questions"], seed=seed)
    gold = [row for row in gold if len(tokenizer(row["prompt"])["input_ids"]) < s["max_length"] - 20]
    how = {"fmt": "gsm8k", "max_length": s["max_length"], "seed": seed}
    first = {"steps": s["sft_steps"], "batch": s["sft_batch"], "lr": s["sft_lr"]}
    lab.fit(start, tokenizer, gold, spine.sft_loss, **first, **how)
    generate = lab.generator(start, tokenizer, max_new_tokens=s["max_new_tokens"], seed=seed)
    drawn = sample_and_score(gold, generate, accuracy(), n=s["wrong"])
    own = ranked(drawn, most=s["wrong"], rng=random.Random(seed))
    planted, test, out = falsified(gold, seed), solutions(), []
    for arm in ARMS:
        model = start if arm == "sft" else copy.deepcopy(start)
        chains = s["questions_a_step"] * (1 + s["wrong"])
        go = {"lr": s["lr"], "steps": s["more_steps"]}
        if arm == "sft_more":  # twice the steps: what one arm spends on samples, and more
            go["steps"] *= 2
            lab.fit(model, tokenizer, gold, spine.sft_loss, batch=chains, **go, **how)
        elif arm != "sft":
            constraint = {"plain": None, "detach": "detach", "boundary": "boundary"}[arm.split("_")[1]]
            group = {"unit": "group", "columns": ("rank", "gold"), "batch": s["questions_a_step"]}
            rows = own if arm.startswith("own") else planted
            lab.fit(model, tokenizer, rows, spine.aft_loss(constraint, s["boundary"]), **group, **go, **how)
        out.append({"arm": arm, "base": base, "seed": seed} | judge(model, tokenizer, test))
    return out
