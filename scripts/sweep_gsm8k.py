"""The sweep behind the real-data section of notebook 00: GSM8K chains ranked before and after alignment.

    python scripts/sweep_gsm8k.py             all runs -> notebooks/results/gsm8k.csv (needs COTKIT_DATA)
    python scripts/sweep_gsm8k.py --part 0 2  runs 0, 2, 4 ... only; --join writes the table afterwards

The tiny model is fine-tuned on chains of the train split, then goes on with the references alone, or with
alignment against the same chains with planted errors (two a question). It is measured on the 5,276 labelled
solutions of real models to the test questions, which are never trained on: the share of (right, wrong) pairs
of a question in the right order. Its own answers are almost all wrong at this size, so nothing else is said.
"""

import argparse
import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import torch

from cotkit import lab, tokens
from cotkit.metrics import assessment_accuracy
from cotkit.rewrite.structure import inject_error

import sweep_spine as spine  # isort: skip

HERE = Path(__file__).resolve().parent.parent
TABLE = HERE / "notebooks" / "results" / "gsm8k.csv"
CACHE = HERE / "out" / "gsm8k"
CODE = (
    "scripts/sweep_gsm8k.py",
    "cotkit/losses/preference.py::constraint_alignment",
    "cotkit/rewrite/structure.py::inject_error",
)
ARMS = ("sft", "sft_more", "align_plain", "aft_detach", "aft_boundary")
BASES, SEEDS = (0,), (0,)
SETTINGS: dict[str, Any] = {
    "questions": 600,
    "max_length": 320,
    "sft_steps": 60,
    "sft_batch": 16,
    "sft_lr": 1e-3,
    "wrong": 2,
    "more_steps": 20,
    "questions_a_step": 8,
    "lr": 3e-4,
    "boundary": 0.15,
}


def training_rows(seed: int, settings: dict) -> list[dict]:
    """Groups of the reference and its falsified copies, as flat rows."""
    rng = random.Random(seed)
    out: list[dict] = []
    number = 0
    for row in lab.rows("gsm8k", "train", n=settings["questions"], seed=seed):
        try:
            wrong = [inject_error(row, rng=rng) for _ in range(settings["wrong"])]
        except ValueError:  # nothing in this chain that can be falsified
            continue
        out.append(row | {"group": number, "rank": 0, "gold": 1})
        distinct = {w["completion"]: w for w in wrong}
        out += [{**row, "completion": text, "group": number, "rank": 1, "gold": 0} for text in distinct]
        number += 1
    return out


def solutions(n: int | None = None) -> list[dict]:
    """The labelled solutions in the form of the training chains: the last line is '#### n' as there."""
    rows = lab.rows("gsm8k", "model_solutions", n=n)
    return [row | {"completion": row["completion"].replace("\nA: ", "\n#### ")} for row in rows]


def assess(model: Any, tokenizer: Any, rows: list[dict]) -> list[float]:
    """Share of ordered pairs per question, by mean log-probability; NaN where there is no pair."""
    scores = lab.score(model, tokenizer, rows, "gsm8k", batch=64)
    group = torch.tensor([row["question"] for row in rows])
    padded, valid = tokens.grouped(scores, group)
    right, _ = tokens.grouped(torch.tensor([float(row["correct"]) for row in rows]), group)
    return [assessment_accuracy(*(x[None] for x in q)) for q in zip(padded, right == 1, valid, strict=True)]


def run(base: int, seed: int, settings: dict, *, n: int | None = None) -> list[dict]:
    """All arms of one base and seed."""
    s = settings
    start, tokenizer = lab.load("tiny", seed=base)
    flat = training_rows(seed, s)
    gold = [row for row in flat if row["gold"]]
    how = {"fmt": "gsm8k", "max_length": s["max_length"], "seed": seed}
    lab.fit(
        start,
        tokenizer,
        gold,
        spine.sft_loss,
        steps=s["sft_steps"],
        batch=s["sft_batch"],
        lr=s["sft_lr"],
        **how,
    )
    test = solutions(n)
    out = []
    for arm in ARMS:
        model = start if arm == "sft" else copy.deepcopy(start)
        if arm == "sft_more":  # as many chains in a step as the arms with wrong chains have
            chains = s["questions_a_step"] * (1 + s["wrong"])
            lab.fit(
                model, tokenizer, gold, spine.sft_loss, steps=s["more_steps"], batch=chains, lr=s["lr"], **how
            )
        elif arm != "sft":
            constraint = {"align_plain": None, "aft_detach": "detach", "aft_boundary": "boundary"}[arm]
            loss = spine.aft_loss(constraint, s["boundary"])
            group = {"unit": "group", "columns": ("rank", "gold"), "batch": s["questions_a_step"]}
            lab.fit(model, tokenizer, flat, loss, steps=s["more_steps"], lr=s["lr"], **group, **how)
        fluency = float(lab.score(model, tokenizer, [r for r in test if r["correct"]][:300], "gsm8k").mean())
        found = assess(model, tokenizer, test)
        out.append({"arm": arm, "base": base, "seed": seed, "assessment": found, "right_logp": fluency})
    return out


def main() -> None:
    """Run everything, or a part of it, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, nargs=2, metavar=("I", "N"))
    parser.add_argument("--join", action="store_true")
    arguments = parser.parse_args()
    lab.setup(0)
    os.chdir(HERE)
    work = [(base, seed) for seed in SEEDS for base in BASES]
    mine = work[arguments.part[0] :: arguments.part[1]] if arguments.part else work
    CACHE.mkdir(parents=True, exist_ok=True)
    for base, seed in [] if arguments.join else mine:
        done = CACHE / f"{base}-{seed}.json"
        if not done.exists():
            runs = run(base, seed, SETTINGS)
            done.with_suffix(".tmp").write_text(json.dumps(runs))
            done.with_suffix(".tmp").replace(done)
            spine.show(runs, ("assessment", "right_logp"))
    if arguments.join or not arguments.part:
        finished = [json.loads((CACHE / f"{base}-{seed}.json").read_text()) for base, seed in work]
        lab.save_table(TABLE, [r for runs in finished for r in runs], settings=SETTINGS, code=CODE)


if __name__ == "__main__":
    main()
