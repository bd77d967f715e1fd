"""The sweep behind notebook 03: AFT's story, experiment by experiment, at equal compute, over five bases.

    python scripts/sweep_alignment.py             everything -> notebooks/results/alignment_*.csv
    python scripts/sweep_alignment.py --tune      the learning-rate grid on validation questions
    python scripts/sweep_alignment.py --part story  one part only; --join joins what is done

Parts: "story" (which feedback, which constraint, against the fair controls), "beta" (how far below a wrong
chain may sink), "ranking" (feedback of several levels: AFT, RRHF, PRO, DPO, without and with a constraint),
"size" (chains of a group). Every arm goes on from the same fine-tuned model of its base and seed and trains
on as many chains; ``sft_more`` spends on further steps what the others spend on sampling. Several processes
may run at once. A run is one base checkpoint with one seed of its own.
"""

import argparse
import copy
import functools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotkit import lab, tokens
from cotkit.bootstrap.reject import sample_and_score
from cotkit.losses.preference import constraint_alignment, dpo_ranked, pro, rrhf
from cotkit.losses.sft import nll
from cotkit.rewards.answer import accuracy
from cotkit.rewards.steps import equations
from cotkit.rewrite.pairs import ranked
from cotkit.tasks.arithmetic import countdown, reaches_target, word_problem

import supervised_arms as arms_of  # isort: skip
import sweep_spine as spine  # isort: skip
from sweeping import choose_rates, work_through  # isort: skip

HERE = Path(__file__).resolve().parent.parent
RESULTS = HERE / "notebooks" / "results"
CACHE = HERE / "out" / "alignment"
CODE = (
    "scripts/sweep_alignment.py::one",
    "cotkit/losses/preference.py::constraint_alignment",
    "cotkit/losses/preference.py::rrhf",
    "cotkit/losses/preference.py::pro",
    "cotkit/losses/preference.py::dpo_ranked",
    "cotkit/losses/sft.py::nll",
    "cotkit/rewrite/pairs.py::ranked",
    "cotkit/tasks/arithmetic.py::word_problem",
)
# Base checkpoint and seed of every run.
RUNS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))
ARMS = {
    "story": (
        "sft", "sft_more", "self_training", "align_plain", "align_plain_same_lr", "aft_detach",
        "aft_boundary", "aft_all_right",
    ),
    "ranking": (
        "rank_plain", "rank_boundary", "rrhf_plain", "rrhf_boundary", "pro_plain", "pro_boundary",
        "dpo_plain", "dpo_boundary",
    ),
    "beta": ("beta_0.05", "beta_0.3", "beta_0.6", "beta_1.2"),
    "size": ("size_1", "size_2", "size_5"),
}  # fmt: skip
LRS = (3e-5, 1e-4, 3e-4)
CHOSEN = HERE / "scripts" / "alignment_lr.json"
SETTINGS: dict[str, Any] = {
    "train_questions": 300,
    "sft_steps": 48,
    "sft_batch": 48,
    "sft_lr": 2e-4,
    "samples": 8,
    "keep": 3,
    "more_steps": 20,
    "chains_a_step": 56,
    "boundary": 0.15,
    "lr": json.loads(CHOSEN.read_text()) if CHOSEN.exists() else {},
    "watch": [4, 9, 14, 19],
    "watch_questions": 100,
    "max_new_tokens": 60,
    "test_questions": 400,
    "assess_questions": 80,
    "other_questions": 200,
}
STORY = functools.partial(word_problem, steps=(3, 3))
OTHER = functools.partial(countdown, numbers=3, target=None, signs="+-", operand=20)


def rate_of(arm: str) -> float:
    """The learning rate that the grid chose; variants of AFT's boundary take its own."""
    if arm.startswith(("beta_", "size_")) or arm == "align_plain_same_lr":
        arm = "aft_boundary"
    return SETTINGS["lr"][arm]


@functools.lru_cache(maxsize=1)
def start(base: int, seed: int, split: str) -> dict[str, Any]:
    """The fine-tuned model of a run, its samples on the training questions, and what it is measured on."""
    s = SETTINGS
    model, tokenizer = arms_of.base_model(base)
    rows = lab.rows(STORY, "train", n=s["train_questions"], seed=seed)
    lab.fit(
        model,
        tokenizer,
        rows,
        spine.sft_loss,
        steps=s["sft_steps"],
        lr=s["sft_lr"],
        batch=s["sft_batch"],
        seed=seed,
    )
    groups = draw(model, tokenizer, rows, seed)
    test = lab.rows(STORY, split, n=s["test_questions"], seed=0)
    held_out = draw(model, tokenizer, test[: s["assess_questions"]], seed + 500)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "rows": rows,
        "groups": groups,
        "test": test,
        "seen": ranked(groups[: s["assess_questions"]], reference=False),
        "unseen": ranked(held_out, reference=False),
    }


def draw(model: Any, tokenizer: Any, rows: list[dict], seed: int) -> list[dict]:
    """Samples of every row, scored."""
    generate = lab.generator(model, tokenizer, max_new_tokens=SETTINGS["max_new_tokens"], seed=seed)
    return sample_and_score(rows, generate, accuracy(), n=SETTINGS["samples"])


def group_loss(arm: str) -> Callable:
    """Likelihood of the reference (or of every right chain) plus the ranking term of an arm."""
    constraint = "boundary" if "boundary" in arm or arm.startswith(("beta", "size", "aft_all")) else None
    constraint = "detach" if arm == "aft_detach" else constraint
    beta = float(arm.removeprefix("beta_")) if arm.startswith("beta_") else SETTINGS["boundary"]

    def loss(logps: torch.Tensor, batch: dict, denom: Any) -> torch.Tensor:
        means, valid = tokens.grouped(tokens.seq_logps(logps, batch["mask"], mean=True), batch["group"])
        rank, _ = tokens.grouped(batch["rank"], batch["group"])
        liked = batch["gold"] == 1 if arm != "aft_all_right" else batch["rank"] == 0
        count = liked.sum() if arm == "aft_all_right" else denom
        likelihood = nll(logps, batch["mask"] & liked[:, None], per="sequence", denom=count)
        how = {"constraint": constraint, "boundary": beta, "denom": denom}
        if arm.startswith("rrhf"):
            return likelihood + rrhf(means, rank, valid, **how)
        if arm.startswith("pro"):
            quality, _ = tokens.grouped(batch["quality"].float(), batch["group"])
            return likelihood + pro(means, quality, valid, **how)
        if arm.startswith("dpo"):
            sums, _ = tokens.grouped(tokens.seq_logps(logps, batch["mask"]), batch["group"])
            ref, _ = tokens.grouped(batch["ref"].float(), batch["group"])
            return likelihood + dpo_ranked(sums, rank, valid, ref_scores=ref, **how)
        return likelihood + constraint_alignment(means, rank, valid, **how)

    return loss


def chains(arm: str, state: dict, seed: int) -> list[dict]:
    """The rows an arm trains on: groups of ranked chains, right chains alone, or the references."""
    most = int(arm.removeprefix("size_")) if arm.startswith("size_") else SETTINGS["keep"]
    flat = ranked(state["groups"], most=most, rng=random.Random(seed))
    if arm == "self_training":
        return [row for row in flat if row["rank"] == 0]
    if arm.startswith(("rank", "rrhf", "pro", "dpo")):
        return graded(flat, state)
    return flat


def graded(flat: list[dict], state: dict) -> list[dict]:
    """Feedback of several levels: right or wrong first, then the share of equations that hold."""
    texts = [row["completion"] for row in flat]
    shares = equations()([row["prompt"] for row in flat], texts)
    quality = [(row["rank"] == 0) + 0.5 * share for row, share in zip(flat, shares, strict=True)]
    ref = lab.score(state["model"], state["tokenizer"], flat, mean=False)
    levels: dict[int, list[float]] = {}
    for row, q in zip(flat, quality, strict=True):
        levels.setdefault(row["group"], []).append(q)
    order = {group: sorted(set(found), reverse=True) for group, found in levels.items()}
    return [
        row | {"quality": q, "rank": order[row["group"]].index(q), "ref": float(r)}
        for row, q, r in zip(flat, quality, ref, strict=True)
    ]


def go_on(arm: str, state: dict, lr: float, seed: int, watch: Callable) -> Any:
    """Train one arm from the fine-tuned model; returns the new model."""
    s, model, tokenizer = SETTINGS, copy.deepcopy(state["model"]), state["tokenizer"]
    rows = chains(arm, state, seed)
    how: dict[str, Any] = {"lr": lr, "seed": seed, "description": arm, "steps": s["more_steps"]}
    if arm in ("sft_more", "self_training"):
        if arm == "sft_more":
            rows = state["rows"]
            spent = sum(len(tokenizer(t)["input_ids"]) for g in state["groups"] for t in g["completions"])
            size = tokens.encode(rows, tokenizer)["attention_mask"].sum(1).float().mean().item()
            how["steps"] += round(spent / (3 * s["chains_a_step"] * size))  # writing is a third of training
        lab.fit(model, tokenizer, rows, spine.sft_loss, batch=s["chains_a_step"], **how)
        return model
    batch = max(1, round(s["chains_a_step"] * len({row["group"] for row in rows}) / len(rows)))
    columns = ["rank", "gold", *(["quality", "ref"] if "quality" in rows[0] else [])]
    lab.fit(
        model, tokenizer, rows, group_loss(arm), batch=batch, unit="group", columns=columns,
        prepare=watch(model), **how,
    )  # fmt: skip
    return model


def one(part: str, arm: str, base: int, seed: int, *, split: str = "test", lr: float | None = None) -> dict:
    """Train one arm once and measure it; the line of the table."""
    s, state = SETTINGS, start(base, seed, split)
    tokenizer, test = state["tokenizer"], state["test"]
    track: dict[str, list[float]] = {"watched_accuracy": [], "watched_perplexity": []}

    def right(model: Any, rows: list[dict], reward: Callable) -> list[float]:
        greedy = lab.generator(model, tokenizer, temperature=0, max_new_tokens=s["max_new_tokens"])
        return lab.evaluate(greedy, rows, {"right": reward})["right"].tolist()

    def watch(model: Any) -> Callable:
        def prepare(batch: dict, step: int) -> dict:
            if step in s["watch"] and part == "story" and split == "test":
                few = test[: s["watch_questions"]]
                track["watched_accuracy"].append(float(np.mean(right(model, few, accuracy()))))
                track["watched_perplexity"].append(spine.reference_perplexity(model, tokenizer, few))
                model.train()
            return batch

        return prepare

    if arm == "sft":
        model = state["model"]
    else:
        model = go_on(arm, state, rate_of(arm) if lr is None else lr, seed, watch)
    line: dict[str, Any] = {
        "arm": arm,
        "base": base,
        "seed": seed,
        "accuracy": right(model, test, accuracy()),
    }
    if split != "test":
        return line
    line["assessment_train"] = spine.assess(model, tokenizer, state["seen"])
    line["assessment_test"] = spine.assess(model, tokenizer, state["unseen"])
    line["perplexity"] = spine.reference_perplexity(model, tokenizer, test[: s["assess_questions"]])
    other = lab.rows(OTHER, split, n=s["other_questions"], seed=0)
    line["other_task"] = right(model, other, reaches_target)
    empty = [float("nan")] * len(s["watch"])
    return line | {name: values or empty for name, values in track.items()}


def tune(parts: list[str]) -> None:
    """The same grid of learning rates for every arm, on validation questions, with a seed of its own."""
    arms = [arm for part in parts if part in ("story", "ranking") for arm in ARMS[part]]
    arms = [arm for arm in arms if arm not in ("sft", "align_plain_same_lr")]
    grid = {f"{arm}-{lr}": ("tune", arm, lr) for arm in arms for lr in LRS}

    def do(part: str, arm: str, lr: float) -> dict:
        return one(part, arm, 1, 101, split="validation", lr=lr)

    choose_rates(grid, CACHE / "tune", do, lambda _, arm: arm, CHOSEN)


def join(parts: list[str]) -> None:
    """All finished runs of each part into its table; the later parts carry the story's lines they need."""
    for part in parts:
        arms = ARMS[part] if part == "story" else (*ARMS[part], "sft", "self_training", "aft_boundary")
        lines = []
        for b, s in RUNS:
            for arm in arms:
                home = part if arm in ARMS[part] else "story"
                lines.append(json.loads((CACHE / f"{home}-{arm}-{b}-{s}.json").read_text()))
        lab.save_table(RESULTS / f"alignment_{part}.csv", lines, settings=SETTINGS, code=CODE)


def main() -> None:
    """Run the sweep or the grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=ARMS, action="append", help="one part only (may be repeated)")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--join", action="store_true", help="join finished runs into the tables")
    arguments = parser.parse_args()
    lab.setup(0)
    os.chdir(HERE)  # the table names its code from here
    parts = arguments.part or list(ARMS)
    if arguments.tune:
        tune(parts)
    elif arguments.join:
        join(parts)
    else:
        work_through(
            [(f"{p}-{arm}-{b}-{s}", (p, arm, b, s)) for b, s in RUNS for p in parts for arm in ARMS[p]],
            CACHE,
            one,
        )


if __name__ == "__main__":
    main()
