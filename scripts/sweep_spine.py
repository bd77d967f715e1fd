"""The sweep behind notebook 00: SFT, then seven ways to go on at equal compute, over bases and seeds.

    python scripts/sweep_spine.py             all runs of both tasks -> notebooks/results/spine*.csv
    python scripts/sweep_spine.py --recheck   one arm, base and seed drawn by the date, against the table
    python scripts/sweep_spine.py --tune      the learning-rate grid on validation questions

Every arm starts from the same fine-tuned model of its base and seed. ``sft_more`` goes on with the
references alone and spends on extra steps what the others spend on sampling. All other arms take the same
number of steps on batches of as many chains.
"""

import argparse
import copy
import functools
import json
import os
import random
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotkit import lab, tokens
from cotkit.bootstrap.reject import sample_and_score
from cotkit.losses.preference import constraint_alignment
from cotkit.losses.sft import nll
from cotkit.metrics import assessment_accuracy
from cotkit.rewards.answer import accuracy
from cotkit.rewrite.pairs import ranked
from cotkit.tasks.arithmetic import countdown, reaches_target, word_problem

HERE = Path(__file__).resolve().parent.parent
RESULTS = HERE / "notebooks" / "results"
CACHE = HERE / "out" / "spine"
METRICS = ("accuracy", "assessment_train", "assessment_test", "perplexity")
CODE = (
    "scripts/sweep_spine.py",
    "cotkit/losses/preference.py::constraint_alignment",
    "cotkit/losses/sft.py::nll",
    "cotkit/rewrite/pairs.py::ranked",
    "cotkit/tasks/arithmetic.py::word_problem",
    "cotkit/tasks/arithmetic.py::countdown",
)
ARMS = (
    "sft",
    "sft_again",
    "sft_more",
    "self_training",
    "align_plain",
    "align_plain_same_lr",
    "aft_detach",
    "aft_boundary",
)
BASES = (0, 1, 2)
SEEDS = {"word_problem": (0, 1, 2, 3, 4), "countdown": (0, 1, 2)}

SETTINGS: dict[str, Any] = {
    "train_questions": 300,
    "sft_steps": 40,
    "sft_batch": 48,
    "sft_lr": 5e-4,
    "samples": 8,
    "keep": 3,
    "more_steps": 20,
    "questions_a_step": 8,
    "boundary": 0.15,
    # Of 3e-5, 1e-4 and 3e-4 for every arm: the best on 300 validation questions (the larger within one).
    "lr": dict.fromkeys(ARMS[2:], 1e-4) | {"align_plain": 3e-5},
    "max_new_tokens": 60,
    "test_questions": 400,
    "assess_questions": 80,
}
TASKS: dict[str, tuple[Any, Any]] = {
    "word_problem": (functools.partial(word_problem, steps=(3, 3)), accuracy()),
    "countdown": (
        functools.partial(countdown, numbers=3, target=None, signs="+-", operand=20),
        reaches_target,
    ),
}


def sft_loss(logps: torch.Tensor, batch: dict, denom: Any) -> torch.Tensor:
    """Negative log-likelihood of every completion token, averaged over tokens."""
    return nll(logps, batch["mask"], denom=denom)


def aft_loss(constraint: str | None, boundary: float) -> Callable:
    """Likelihood of the reference plus constraint alignment, averaged over questions (L125)."""

    def loss(logps: torch.Tensor, batch: dict, denom: Any) -> torch.Tensor:
        scores, valid = tokens.grouped(tokens.seq_logps(logps, batch["mask"], mean=True), batch["group"])
        rank, _ = tokens.grouped(batch["rank"], batch["group"])
        reference = batch["mask"] & (batch["gold"] == 1)[:, None]
        align = constraint_alignment(
            scores, rank, valid, constraint=constraint, boundary=boundary, denom=denom
        )
        return nll(logps, reference, per="sequence", denom=denom) + align

    return loss


def fine_tune(
    task: str, base: int, seed: int, settings: dict, *, again: bool = False
) -> tuple[Any, Any, list]:
    """SFT of a base checkpoint on references; ``again`` draws the rows in another order."""
    model, tokenizer = lab.load("tiny", seed=base)
    rows = lab.rows(TASKS[task][0], "train", n=settings["train_questions"], seed=seed)
    s = settings
    order = seed + 1000 * again
    lab.fit(
        model,
        tokenizer,
        rows,
        sft_loss,
        steps=s["sft_steps"],
        lr=s["sft_lr"],
        batch=s["sft_batch"],
        seed=order,
    )
    return model, tokenizer, rows


def go_on(
    arm: str, start: Any, tokenizer: Any, rows: list, groups: list, spent: int, seed: int, settings: dict
) -> Any:
    """Train one arm from the fine-tuned model; returns the new model."""
    s, model = settings, copy.deepcopy(start)
    how: dict[str, Any] = {"lr": s["lr"][arm], "seed": seed, "description": arm}
    flat = ranked(groups, most=s["keep"], rng=random.Random(seed))
    chains = s["questions_a_step"] * round(len(flat) / len(groups))  # chains in a step of the group arms
    if arm == "sft_more":
        sizes = tokens.encode(rows, tokenizer)["attention_mask"].sum(1).float()
        extra = round(spent / (chains * sizes.mean().item()))
        lab.fit(model, tokenizer, rows, sft_loss, steps=s["more_steps"] + extra, batch=chains, **how)
    elif arm == "self_training":
        right = [row for row in flat if row["rank"] == 0]
        lab.fit(model, tokenizer, right, sft_loss, steps=s["more_steps"], batch=chains, **how)
    else:
        constraint = {"aft_detach": "detach", "aft_boundary": "boundary"}.get(arm)
        lab.fit(
            model,
            tokenizer,
            flat,
            aft_loss(constraint, s["boundary"]),
            steps=s["more_steps"],
            batch=s["questions_a_step"],
            unit="group",
            columns=("rank", "gold"),
            **how,
        )
    return model


def draw(model: Any, tokenizer: Any, rows: list, task: str, seed: int, settings: dict) -> list[dict]:
    """Samples of every row, scored."""
    generate = lab.generator(model, tokenizer, max_new_tokens=settings["max_new_tokens"], seed=seed)
    return sample_and_score(rows, generate, TASKS[task][1], n=settings["samples"])


def assess(model: Any, tokenizer: Any, flat: list[dict]) -> list[float]:
    """Share of (right, wrong) pairs in the right order, per question; NaN where a question has no pair."""
    group = torch.tensor([row["group"] for row in flat])
    scores, valid = tokens.grouped(lab.score(model, tokenizer, flat), group)
    rank, _ = tokens.grouped(torch.tensor([row["rank"] for row in flat]), group)
    return [assessment_accuracy(*(x[None] for x in q)) for q in zip(scores, rank == 0, valid, strict=True)]


def run(
    task: str, base: int, seed: int, settings: dict, *, arms: tuple[str, ...] = ARMS, split: str = "test"
) -> list[dict]:
    """All arms of one base and seed; one mapping per arm with its metrics per question."""
    s = settings
    start, tokenizer, rows = fine_tune(task, base, seed, s)
    groups = draw(start, tokenizer, rows, task, seed, s)
    spent = int(sum(len(tokenizer(t)["input_ids"]) for g in groups for t in g["completions"]))
    test = lab.rows(TASKS[task][0], split, n=s["test_questions"], seed=0)
    held_out = draw(start, tokenizer, test[: s["assess_questions"]], task, seed + 500, s)
    seen = ranked(groups[: s["assess_questions"]], reference=False)
    unseen = ranked(held_out, reference=False)
    out = []
    for arm in arms:
        if arm == "sft":
            model = start
        elif arm == "sft_again":
            model, _, _ = fine_tune(task, base, seed, s, again=True)
        else:
            model = go_on(arm, start, tokenizer, rows, groups, spent, seed, s)
        greedy = lab.generator(model, tokenizer, temperature=0, max_new_tokens=s["max_new_tokens"])
        right = lab.evaluate(greedy, test, {"right": TASKS[task][1]})["right"]
        out.append(
            {
                "arm": arm,
                "base": base,
                "seed": seed,
                "accuracy": right.tolist(),
                "assessment_train": assess(model, tokenizer, seen),
                "assessment_test": assess(model, tokenizer, unseen),
                "perplexity": reference_perplexity(model, tokenizer, test[: s["assess_questions"]]),
            }
        )
    return out


def reference_perplexity(model: Any, tokenizer: Any, rows: list) -> float:
    """Perplexity of the reference chains, per token, averaged over chains."""
    return float(lab.score(model, tokenizer, rows).neg().exp().mean())


def main() -> None:
    """Run the whole sweep, the learning-rate grid, or the check of one number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, help="one task only")
    parser.add_argument("--part", type=int, nargs=2, metavar=("I", "N"), help="runs I, I+N, I+2N ... only")
    parser.add_argument("--base", type=int, choices=BASES, help="one base only")
    parser.add_argument("--join", action="store_true", help="join finished runs into the tables")
    parser.add_argument("--recheck", action="store_true")
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    lab.setup(0)
    os.chdir(HERE)  # the table names its code from here
    tasks = [arguments.task] if arguments.task else list(TASKS)
    if arguments.recheck:
        sys.exit(recheck(date.today()))
    if arguments.tune:
        tune(tasks)
        return
    for task in tasks:
        work = [(base, seed) for base in BASES for seed in SEEDS[task]]
        if arguments.base is not None:
            work = [(base, seed) for base, seed in work if base == arguments.base]
        if arguments.part:
            work = work[arguments.part[0] :: arguments.part[1]]
        if not arguments.join:
            for base, seed in work:
                done = CACHE / f"{task}-{base}-{seed}.json"
                if not done.exists():
                    CACHE.mkdir(parents=True, exist_ok=True)
                    runs = run(task, base, seed, SETTINGS)
                    done.with_suffix(".tmp").write_text(json.dumps(runs))
                    done.with_suffix(".tmp").replace(done)
                    show(runs)
        if arguments.join or (arguments.part is None and arguments.base is None):
            join(task)


def show(runs: list[dict], metrics: tuple[str, ...] = METRICS) -> None:
    """Print one line per arm."""
    for r in runs:
        means = {m: float(np.nanmean(r[m])) for m in metrics}
        print(r["base"], r["seed"], f"{r['arm']:14s}", {m: round(v, 3) for m, v in means.items()}, flush=True)


def join(task: str) -> None:
    """All finished runs of a task into its table."""
    done = [CACHE / f"{task}-{base}-{seed}.json" for base in BASES for seed in SEEDS[task]]
    runs = [r for path in done for r in json.loads(path.read_text())]
    lab.save_table(table_path(task), runs, settings=SETTINGS, code=CODE)


def table_path(task: str) -> Path:
    """Where the table of a task lies."""
    return RESULTS / ("spine.csv" if task == "word_problem" else f"spine_{task}.csv")


def tune(tasks: list[str]) -> None:
    """The same grid of learning rates for every arm, on validation questions and seeds of their own."""
    for task in tasks:
        for lr in (3e-5, 1e-4, 3e-4):
            for base, seed in ((1, 101),):
                settings = SETTINGS | {"lr": dict.fromkeys(ARMS[2:], lr)}
                print("lr", lr, flush=True)
                show(run(task, base, seed, settings, split="validation"))


def recheck(day: date) -> int:
    """Run one arm, base and seed again, drawn by the date; 1 if it lies three spreads off."""
    rng = random.Random(day.isoformat())
    task, arm = rng.choice(list(TASKS)), rng.choice(ARMS)
    base, seed = rng.choice(BASES), rng.choice(SEEDS[task])
    rows = lab.table(table_path(task), settings=SETTINGS).rows
    means = rows[rows["arm"] == arm].assign(mean=lambda t: t["accuracy"].map(np.mean))
    recorded = float(means[(means["base"] == base) & (means["seed"] == seed)]["mean"].iloc[0])
    spread = float(means.groupby("base")["mean"].std().mean())
    now = float(np.mean(run(task, base, seed, SETTINGS, arms=(arm,))[0]["accuracy"]))
    allowed = 3 * max(spread, (recorded * (1 - recorded) / SETTINGS["test_questions"]) ** 0.5)
    verdict = "agrees" if abs(now - recorded) <= allowed else "DISAGREES"
    print(
        f"{task}, {arm}, base {base}, seed {seed}: "
        f"table {recorded:.3f}, now {now:.3f}, allowed {allowed:.3f}: {verdict}"
    )
    return int(verdict == "DISAGREES")


if __name__ == "__main__":
    main()
