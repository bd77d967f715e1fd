"""The sweep behind notebooks 05 and 06, and behind what 07 says of training: reinforcement at equal samples.

    python scripts/sweep_reinforcement.py             everything -> out/reinforcement, one file a run
    python scripts/sweep_reinforcement.py --tune      the grid of every arm on validation questions
    python scripts/sweep_reinforcement.py --part rl   one part only (may be repeated)
    python scripts/sweep_reinforcement.py --join      finished runs -> results/reinforcement_*.csv
    python scripts/sweep_reinforcement.py --recheck   one arm and run drawn by the date, against its table

Parts: "rl" (PPO, GRPO, AAPO, step rewards, best-of-n, flow networks, against SFT and rejection sampling),
"temperature" (the entropy rule, colder and hotter), "levels" (which questions to ask, and their weights),
"sparse" (questions that are almost never solved), "look" (questions that need no thought), "mix" (SFT, RL,
both in turn and both at once, on easy and hard questions), "hack" (what other rewards make of the chains).
The arms of a run go on from one model, those of "mix" from the base itself, and draw as many samples. A run
is one base checkpoint with one seed of its own. Several processes may run at once.
"""

import argparse
import copy
import functools
import json
import os
import sys
from collections.abc import Callable
from datetime import date
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotkit import lab, metrics, tokens
from cotkit.analysis.forgetting import layer_change, token_shift
from cotkit.rewards.answer import accuracy
from cotkit.rewards.length import repeated_ngrams
from cotkit.rewards.steps import equations, find_equations
from cotkit.tasks.arithmetic import reaches_target

import reinforcement_arms as arms_of  # isort: skip
from reinforcement_arms import SETTINGS  # isort: skip
from sweeping import choose_settings, rerun_one, work_through  # isort: skip

HERE = Path(__file__).resolve().parent.parent
RESULTS = HERE / "notebooks" / "results"
CACHE = HERE / "out" / "reinforcement"
METHODS, LOSSES, REWARDS = "scripts/reinforcement_methods.py::", "cotkit/losses/", "cotkit/rewards/"
CODE = [
    "scripts/sweep_reinforcement.py::one",
    "scripts/reinforcement_arms.py::on_policy",
    METHODS + "by_group",
    METHODS + "surrogate",
    LOSSES + "policy.py::grpo",
    LOSSES + "advantage.py::group",
    LOSSES + "sft.py::nll",
    "cotkit/tasks/arithmetic.py::word_problem",
]
# What else the runs of a part go through.
PART_CODE = {
    "rl": [METHODS + name for name in ("critic", "beside_reference", "best_of", "balance", "prefixes")]
    + [LOSSES + f"policy.py::{name}" for name in ("clipped_value", "reinforce")]
    + [LOSSES + f"advantage.py::{name}" for name in ("aapo", "bon", "gae", "kl_rewards", "whiten")]
    + [LOSSES + "flow.py::tb", LOSSES + "flow.py::subtb", REWARDS + "steps.py::key_steps"]
    + ["scripts/reinforcement_arms.py::validity", "cotkit/bootstrap/reject.py::rejection_sampling"],
    "temperature": [METHODS + "tempered", METHODS + "rule", LOSSES + "policy.py::entropy_temperature"],
    "levels": [METHODS + "by_difficulty", METHODS + "beside_reference", LOSSES + "advantage.py::aapo"],
    "sparse": [REWARDS + "grounding.py::episodic_memory", REWARDS + "steps.py::key_steps"]
    + [f"scripts/reinforcement_arms.py::{name}" for name in ("validity", "embed")]
    + ["cotkit/bootstrap/reject.py::rejection_sampling"],
    "look": ["scripts/reinforcement_arms.py::lookup", "scripts/reinforcement_arms.py::exactly"],
    "mix": [METHODS + name for name in ("hinted", "demonstrated", "hardest")]
    + ["scripts/reinforcement_arms.py::in_stages", LOSSES + "policy.py::srft"]
    + ["cotkit/rewrite/structure.py::reveal_steps", "cotkit/select/curriculum.py::schedule"]
    + [f"cotkit/analysis/forgetting.py::{name}" for name in ("layer_change", "token_shift")],
    "hack": [METHODS + "minding_repeats", "scripts/reinforcement_arms.py::flipped"]
    + [REWARDS + f"length.py::{name}" for name in ("cosine", "relative", "repeated_ngrams")],
}
# Base checkpoint and seed of every run.
RUNS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))
ARMS = {
    "rl": (
        "sft", "sft_more", "rft", "online_rft", "reft", "reft_no_kl", "grpo", "aapo", "step_grpo", "bon_1",
        "bon", "tb", "subtb",
    ),
    "mix": ("base", "mix_sft", "mix_rl", "sft_rl", "uft", "srft", "relift", "cycle"),
    "hack": (
        "long", "form", "cosine", "cosine_repeat", "noisy_20", "noisy_40", "relative", "relative_late",
    ),
    "levels": ("mixed", "easy", "curriculum", "weighted", "easy_aapo"),
    "sparse": ("hard", "hard_rft", "hard_memory", "hard_steps"),
    "temperature": ("temp_cold", "temp_rule", "temp_hot"),
    "look": ("look_start", "look_sft", "look_think", "look_answer"),
}  # fmt: skip
# Arms of other parts that a table shows beside its own.
BESIDE = {
    "hack": [("rl", "sft"), ("rl", "grpo")],
    "levels": [("rl", "sft"), ("sparse", "hard")],
    "sparse": [("rl", "sft")],
    "temperature": [("rl", "sft"), ("rl", "grpo")],
}
# What the grid of a part looks at, and what is watched while it trains.
OBJECTIVE = {"levels": ("easy", "accuracy", "hard"), "sparse": ("hard",)}
KS = (1, 2, 4, 8, 16)


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
    state = arms_of.start(part if part in ("mix", "look") else "story", base, seed, split)
    looked_at = OBJECTIVE.get(part, ("accuracy",))
    track: dict[str, list[float]] = {}
    if arm in arms_of.UNTRAINED:
        model, found = copy.deepcopy(state["model"]), {name: [nan] for name in arms_of.TRACKED}
        track = {name: [nan] * SETTINGS["watch_points"] for name in WATCHED} | {"early": [nan]}
    else:
        lr, knob = arms_of.chosen_for(arm) if setting is None else setting
        watch = functools.partial(watched, state, arm, looked_at, track) if split == "test" else None
        model, found = arms_of.go_on(arm, state, lr, knob, seed, watch)
    names = state["tests"] if split == "test" else looked_at
    tests = {name: right(model, state, arm, name) for name in names}
    if split != "test":
        return line | {"accuracy": [x for name in looked_at for x in tests[name]]}
    if part == "mix":  # questions of two and of four steps in turn
        tests |= {"easy": tests["accuracy"][0::2], "hard": tests["accuracy"][1::2]}
    elif "hard" in tests:
        tests["levels"] = tests["easy"] + tests["accuracy"][: SETTINGS["side_questions"]] + tests["hard"]
    return line | tests | samples(model, state, arm) | moves(model, state, arm) | found | track


def right(model: Any, state: dict, arm: str, name: str, n: int | None = None) -> list[float]:
    """Which of a test's questions one greedy completion each gets right."""
    rows, longest = arms_of.asked(arm, state["tests"][name][:n]), SETTINGS["max_new_tokens"]
    greedy = lab.generator(model, state["tokenizer"], temperature=0, max_new_tokens=longest)
    reward = reaches_target if name == "other" else accuracy()
    return lab.evaluate(greedy, rows, {"right": reward})["right"].tolist()


def drawn_by(model: Any, state: dict, arm: str, n: int, temperature: float = 1.0) -> dict[str, Any]:
    """``n`` completions of some test questions."""
    rows = arms_of.asked(arm, state["tests"]["accuracy"][: SETTINGS["sample_questions"]])
    how = {"temperature": temperature, "max_new_tokens": SETTINGS["max_new_tokens"], "seed": 7}
    return lab.rollout(model, state["tokenizer"], rows, accuracy(), n, old_logps=False, **how)


def samples(model: Any, state: dict, arm: str) -> dict[str, list[float]]:
    """What many samples of a question say: right ones, different right ones, form, length, entropy, drift."""
    n = SETTINGS["draws"]
    drawn = drawn_by(model, state, arm, n)
    good, flat = drawn["rewards"].numpy(), [text for texts in drawn["texts"] for text in texts]
    whole = [(arms_of.CLOSED if arm == "look_answer" else "") + text for text in flat]
    ways = [tuple(f"{e.left}={e.right}" for e in find_equations(text)) for text in flat]
    held = np.array(equations()([None] * len(flat), flat), float).reshape(good.shape)
    ids = [row[kept].tolist() for row, kept in zip(drawn["input_ids"], drawn["mask"], strict=True)]
    entropy, drift = spread_and_drift(model, state["model"], drawn)
    size, form = SETTINGS["ngram"], tokens.FORMATS["think"]
    single = {
        "format": [float(form.parse(text).ok) for text in whole],
        "length": [len(x) for x in ids],
        "repeated": [float(np.mean(repeated_ngrams(x, n=size, penalty=1.0))) if x else 0.0 for x in ids],
        "entropy": entropy,
        "kl": drift,
    }
    found = {name: np.reshape(values, good.shape).mean(1).tolist() for name, values in single.items()}
    right_ways = [
        len({ways[i * n + k] for k in range(n) if good[i, k] == 1})
        for i in range(SETTINGS["sample_questions"])
    ]
    return found | {
        "sampled": good.mean(1).tolist(),
        "pass_4": [metrics.pass_at_k(row[None], min(4, n)) for row in good],
        "pass_16": good.max(1).tolist(),
        "paths": [float(count) for count in right_ways],
        "pass_curve": [metrics.pass_at_k(good, k) for k in KS if k <= n],
        "best_curve": [metrics.best_at_k(good, held, k) for k in KS if k <= n],
    }


@torch.no_grad()
def spread_and_drift(model: Any, before: Any, drawn: dict, size: int = 128) -> tuple[list, list]:
    """Of each sample, means over its tokens: entropy, and KL(model || before), in nats."""
    entropy, drift = [], []
    for i in range(0, len(drawn["mask"]), size):
        inputs = {name: drawn[name][i : i + size] for name in ("input_ids", "attention_mask")}
        counted = drawn["mask"][i : i + size, 1:]
        now, then = model(**inputs).logits[:, :-1], before(**inputs).logits[:, :-1]
        for values, kept in ((tokens.entropy(now), entropy), (tokens.kl(now, then), drift)):
            kept += ((values * counted).sum(1) / counted.sum(1).clamp(min=1)).tolist()
    return entropy, drift


@torch.no_grad()
def moves(model: Any, state: dict, arm: str) -> dict[str, list[float]]:
    """Scalpel or hammer: greedy tokens that the start would not have said, and the way of the weights."""
    drawn = drawn_by(model, state, arm, 1, temperature=0)
    logits = state["model"](drawn["input_ids"], attention_mask=drawn["attention_mask"]).logits
    ranks = token_shift(logits, drawn["input_ids"], drawn["mask"])
    counts = drawn["mask"].sum(1).clamp(min=1)
    change = layer_change(state["model"].state_dict(), model.state_dict())
    way = float((change["change"] ** 2).sum() / (change["norm"] ** 2).sum()) ** 0.5
    return {
        "moved": ((ranks > 1).sum(1) / counts).tolist(),
        "shifted": ((ranks > 3).sum(1) / counts).tolist(),
        "weights": [way],
    }


WATCHED = ("watched_accuracy", "watched_entropy", "watched_kl", "watched_length")


def watched(
    state: dict, arm: str, names: tuple[str, ...], track: dict, model: Any, total: int, offset: int
) -> Callable:
    """A ``prepare`` that looks at a few questions at equal distances while an arm trains.

    ``early`` is the area under the learning curve: a question's share of the looks at which it was right.
    """
    s = SETTINGS
    at = {round(total * k / (s["watch_points"] + 1)) for k in range(1, s["watch_points"] + 1)}
    for name in (*WATCHED, "early"):
        track.setdefault(name, [])
    share = s["watch_questions"] // len(names)

    def prepare(batch: dict, step: int) -> dict:
        if step + offset in at:
            now = [x for name in names for x in right(model, state, arm, name, share)]
            drawn = drawn_by(model, state, arm, 1)
            entropy, drift = spread_and_drift(model, state["model"], drawn)
            seen = len(track["watched_accuracy"])
            before = track["early"] or [0.0] * len(now)
            track["early"] = [(old * seen + new) / (seen + 1) for old, new in zip(before, now, strict=True)]
            track["watched_accuracy"].append(float(np.mean(now)))
            track["watched_entropy"].append(float(np.mean(entropy)))
            track["watched_kl"].append(float(np.mean(drift)))
            track["watched_length"].append(float(drawn["mask"].sum(1).float().mean()))
            model.train()
        return batch

    return prepare


def tune(parts: list[str]) -> None:
    """As many settings for every arm, on validation questions, with a seed of its own."""
    fixed = (*arms_of.UNTRAINED, *arms_of.VARIANTS)
    grid = {
        f"{arm}-{lr}-{knob}": (part, arm, (lr, knob))
        for part in parts
        for arm in ARMS[part]
        if arm not in fixed
        for lr, knob in arms_of.grid_of(arm)
    }

    def do(part: str, arm: str, setting: tuple[float, float]) -> dict:
        return one(part, arm, 1, 101, split="validation", setting=setting)

    choose_settings(grid, CACHE / "tune", do, lambda _, arm: arm, arms_of.CHOSEN)


def table_path(part: str) -> Path:
    """Where the table of a part lies."""
    return RESULTS / f"reinforcement_{part}.csv"


def join(parts: list[str]) -> None:
    """All finished runs of each part into its table; some show arms of other parts beside their own."""
    for part in parts:
        own = BESIDE.get(part, []) + [(part, arm) for arm in ARMS[part]]
        lines = [
            json.loads((CACHE / f"{home}-{arm}-{b}-{s}.json").read_text())
            for b, s in RUNS
            for home, arm in own
        ]
        lab.save_table(table_path(part), lines, settings=SETTINGS, code=CODE + PART_CODE[part])


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
        sys.exit(rerun_one(date.today(), parts, ARMS, RUNS, one, table_path, SETTINGS))
    if arguments.tune:
        tune(parts)
    elif arguments.join:
        join(parts)
    else:
        jobs = [
            (f"{part}-{arm}-{b}-{s}", (part, arm, b, s))
            for b, s in RUNS
            for part in parts
            for arm in ARMS[part]
        ]
        work_through(jobs, CACHE, one)


if __name__ == "__main__":
    main()
