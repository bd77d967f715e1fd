"""The sweep behind notebook 03: AFT's story, experiment by experiment, at equal compute, over five bases.

    python scripts/sweep_alignment.py             everything -> out/alignment, one file a run
    python scripts/sweep_alignment.py --tune      the grid of every arm on validation questions
    python scripts/sweep_alignment.py --part story  one part only (may be repeated)
    python scripts/sweep_alignment.py --join      finished runs -> notebooks/results/alignment_*.csv
    python scripts/sweep_alignment.py --recheck   one arm and run drawn by the date, against its table

Parts: "story" (which feedback, which constraint, against the fair controls), "beta" (how far below a right
chain a wrong one may sink), "rate" (learning rates past the best ones), "ranking" (feedback of several
levels: AFT, RRHF, PRO, DPO, without and with a constraint), "size" (chains of a group), "both" (two tasks at
once), "long" (three times the steps), "family" (pairs of other papers, discriminative fine-tuning), "squeeze"
(off-policy DPO watched), "course" (assessment and accuracy while SFT trains), "gsm8k" (real chains). Every
arm but those of "squeeze" and "gsm8k" goes on from the same fine-tuned model of its base and seed and trains
on as many chains; ``sft_more`` spends on further steps what the others spend on sampling. A run is one base
checkpoint with one seed of its own. Several processes may run at once.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from cotkit import lab, tokens
from cotkit.rewards.answer import accuracy
from cotkit.tasks.arithmetic import reaches_target

import alignment_arms as arms_of  # isort: skip
import alignment_gsm8k as real  # isort: skip
import sweep_spine as spine  # isort: skip
from alignment_arms import SETTINGS  # isort: skip
from sweeping import choose_settings, rerun_one, work_through  # isort: skip

HERE = Path(__file__).resolve().parent.parent
RESULTS = HERE / "notebooks" / "results"
CACHE = HERE / "out" / "alignment"
LOSSES = "cotkit/losses/preference.py::"
CODE = [
    "scripts/sweep_alignment.py::one",
    LOSSES + "constraint_alignment",
    "cotkit/losses/sft.py::nll",
    "cotkit/rewrite/pairs.py::ranked",
    "cotkit/tasks/arithmetic.py::word_problem",
]
# What else the runs of a part go through.
PART_CODE = {
    "ranking": [LOSSES + name for name in ("rrhf", "pro", "dpo_ranked")],
    "family": [LOSSES + name for name in ("dpo", "orpo", "discriminative", "discriminative_log_z")]
    + ["cotkit/rewrite/pairs.py::pairs", "cotkit/rewrite/pairs.py::prefix_pairs"],
    "squeeze": [LOSSES + "dpo", "cotkit/rewrite/structure.py::inject_error"],
    "gsm8k": ["scripts/alignment_gsm8k.py::run", "cotkit/rewrite/structure.py::inject_error"],
}
# Base checkpoint and seed of every run.
RUNS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))
ARMS = {
    "course": ("sft",),
    "story": (
        "sft", "sft_more", "self_training", "align_plain", "align_plain_same_lr", "aft_detach",
        "aft_boundary", "aft_all_right",
    ),
    "long": ("long_self_training", "long_align_plain_same_lr", "long_aft_detach", "long_aft_boundary"),
    "ranking": (
        "rank_plain", "rank_boundary", "rrhf_plain", "rrhf_boundary", "pro_plain", "pro_boundary",
        "dpo_plain", "dpo_boundary",
    ),
    "both": ("both_sft", "both_self_training", "both_align_plain", "both_aft_boundary"),
    "squeeze": ("dpo", "dpo_detach", "extend"),
    "beta": ("beta_0.05", "beta_0.5", "beta_1.5"),
    "size": ("size_1", "size_2", "size_5"),
    "family": ("own_dpo", "orpo_process", "step_dpo", "whole_dpo", "vote_sft", "discriminative"),
    "rate": ("rate_plain_0.0001", "rate_boundary_0.0001"),
    "gsm8k": ("all",),
}  # fmt: skip
# Parts with fewer runs.
FEWER = {"both": RUNS[:3], "beta": RUNS[:3], "size": RUNS[:3], "gsm8k": real.RUNS}
TUNED = ("story", "ranking", "family")
# Parts whose tables also show these arms of the story.
WITH_STORY = ("beta", "ranking", "size", "family", "rate")


def one(
    part: str,
    arm: str,
    base: int,
    seed: int,
    *,
    split: str = "test",
    setting: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Train one arm once and measure it; the line of the table."""
    line: dict[str, Any] = {"arm": arm, "base": base, "seed": seed}
    if part == "squeeze":
        model, found = arms_of.squeezed(arm, base, seed, split)
        state = arms_of.start(base, seed, split)
        return line | found | {"accuracy": right(model, state, state["test"], accuracy())}
    if part == "course":
        return line | course(base, seed, split)
    state = arms_of.start(base, seed, split, part == "both")
    model, track = state["model"], dict[str, list[float]]()
    if arm not in ("sft", "both_sft"):
        watch = functools.partial(watched, state, track) if part in ("story", "long") else None
        lr, knob = arms_of.chosen_for(arm) if setting is None else setting
        model = arms_of.go_on(arm, state, lr, knob, seed, watch if split == "test" else None)
    elif part == "story":  # nothing was trained, so nothing was watched
        track = {name: [float("nan")] * 4 for name in ("watched_accuracy", "watched_perplexity")}
    line["accuracy"] = right(model, state, state["test"], accuracy())
    return line if split != "test" else line | measured(model, state, split) | track


def right(model: Any, state: dict, rows: list[dict], reward: Callable) -> list[float]:
    """The reward of one greedy completion per row."""
    greedy = lab.generator(
        model, state["tokenizer"], temperature=0, max_new_tokens=SETTINGS["max_new_tokens"]
    )
    return lab.evaluate(greedy, rows, {"right": reward})["right"].tolist()


def measured(model: Any, state: dict, split: str) -> dict[str, Any]:
    """Everything about a trained model but its accuracy."""
    s, tokenizer = SETTINGS, state["tokenizer"]
    greedy = lab.generator(model, tokenizer, temperature=0, max_new_tokens=s["max_new_tokens"])
    written = [texts[0] for texts in greedy([row["prompt"] for row in state["test"]], 1)]
    other, larger = (
        lab.rows(task, split, n=s["shift_questions"], seed=0) for task in (arms_of.OTHER, arms_of.LARGER)
    )
    return {
        "assessment_train": spine.assess(model, tokenizer, state["seen"]),
        "assessment_test": spine.assess(model, tokenizer, state["unseen"]),
        "perplexity": spine.reference_perplexity(model, tokenizer, state["test"][: s["assess_questions"]]),
        "larger_numbers": right(model, state, larger, accuracy()),
        "other_task": right(model, state, other, reaches_target),
        "answered": float(np.mean([tokens.FORMATS["think"].parse(text).ok for text in written])),
        "length": float(np.mean([len(tokenizer(text)["input_ids"]) for text in written])),
    }


def watched(state: dict, track: dict[str, list[float]], model: Any) -> Callable:
    """A ``prepare`` that keeps accuracy and perplexity on a few questions while an arm trains."""
    s = SETTINGS
    few = state["test"][: s["watch_questions"]]
    track |= {"watched_accuracy": [], "watched_perplexity": []}

    def prepare(batch: dict, step: int) -> dict:
        if step in s["watch"]:
            track["watched_accuracy"].append(float(np.mean(right(model, state, few, accuracy()))))
            track["watched_perplexity"].append(spine.reference_perplexity(model, state["tokenizer"], few))
            model.train()
        return batch

    return prepare


def course(base: int, seed: int, split: str) -> dict[str, Any]:
    """SFT once more, stopped on its way: accuracy, and assessment of what the finished model wrote."""
    s, state = SETTINGS, arms_of.start(base, seed, split)
    model, tokenizer = arms_of.base_model(base)
    track: dict[str, list[float]] = {"accuracy": [], "assessment_train": [], "assessment_test": []}

    def look() -> None:
        track["accuracy"].append(float(np.mean(right(model, state, state["test"], accuracy()))))
        for name, chains in (("assessment_train", "seen"), ("assessment_test", "unseen")):
            track[name].append(float(np.nanmean(spine.assess(model, tokenizer, state[chains]))))
        model.train()

    def prepare(batch: dict, step: int) -> dict:
        if step in s["course"]:
            look()
        return batch

    how = {"steps": s["sft_steps"], "lr": s["sft_lr"], "batch": s["sft_batch"], "seed": seed}
    lab.fit(model, tokenizer, state["rows"], spine.sft_loss, prepare=prepare, **how)
    look()
    together = float(np.corrcoef(track["accuracy"], track["assessment_train"])[0, 1])
    new = float(np.corrcoef(track["accuracy"], track["assessment_test"])[0, 1])
    return track | {"correlation": together, "correlation_new": new}


def tune(parts: list[str]) -> None:
    """As many settings for every arm, on validation questions, with a seed of its own."""
    arms = [arm for part in parts if part in TUNED for arm in ARMS[part]]
    arms = [arm for arm in arms if arm not in ("sft", "align_plain_same_lr")]
    grid = {
        f"{arm}-{lr}-{knob}": ("tune", arm, (lr, knob)) for arm in arms for lr, knob in arms_of.grid_of(arm)
    }

    def do(part: str, arm: str, setting: tuple[float, float]) -> dict:
        return one(part, arm, 1, 101, split="validation", setting=setting)

    choose_settings(grid, CACHE / "tune", do, lambda _, arm: arm, arms_of.CHOSEN)


def run_job(part: str, arm: str, base: int, seed: int) -> Any:
    """One run of the sweep."""
    return real.run(base, seed) if part == "gsm8k" else one(part, arm, base, seed)


def table_path(part: str) -> Path:
    """Where the table of a part lies."""
    return RESULTS / f"alignment_{part}.csv"


def settings_of(part: str) -> dict[str, Any]:
    """The settings that the table of a part depends on."""
    return real.SETTINGS if part == "gsm8k" else SETTINGS


def join(parts: list[str]) -> None:
    """All finished runs of each part into its table; some carry lines of the story beside their own."""
    for part in parts:
        own = [(part, arm) for arm in ARMS[part]]
        if part in WITH_STORY:
            own += [("story", arm) for arm in ("sft", "sft_more", "self_training", "aft_boundary")]
        lines = []
        for b, s in FEWER.get(part, RUNS):
            for home, arm in own:
                found = json.loads((CACHE / f"{home}-{arm}-{b}-{s}.json").read_text())
                lines += found if isinstance(found, list) else [found]
        kept = set.intersection(*(set(line) for line in lines))  # the base model itself was not watched
        lines = [{name: value for name, value in line.items() if name in kept} for line in lines]
        code = CODE + PART_CODE.get(part, []) if part != "gsm8k" else [*CODE[1:2], *PART_CODE[part]]
        lab.save_table(table_path(part), lines, settings=settings_of(part), code=code)


def main() -> None:
    """Run the sweep, the grid, or the check of one number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=ARMS, action="append", help="one part only (may be repeated)")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--join", action="store_true", help="join finished runs into the tables")
    parser.add_argument("--recheck", action="store_true")
    arguments = parser.parse_args()
    lab.setup(0)
    os.chdir(HERE)  # the table names its code from here
    parts = arguments.part or list(ARMS)
    if arguments.recheck:
        drawn = [part for part in parts if part not in ("gsm8k", "course")]
        sys.exit(rerun_one(date.today(), drawn, ARMS, RUNS, one, table_path, SETTINGS))
    if arguments.tune:
        tune(parts)
    elif arguments.join:
        join(parts)
    else:
        jobs = [
            (f"{part}-{arm}-{b}-{s}", (part, arm, b, s))
            for b, s in RUNS
            for part in parts
            if (b, s) in FEWER.get(part, RUNS)
            for arm in ARMS[part]
        ]
        work_through(jobs, CACHE, run_job)


if __name__ == "__main__":
    main()
