"""The sweep behind notebook 02: supervised losses at equal compute, in ten settings, over five bases.

    python scripts/sweep_supervised.py                  everything -> notebooks/results/supervised_*.csv
    python scripts/sweep_supervised.py --tune           the learning-rate grid on validation questions
    python scripts/sweep_supervised.py --part plain     one setting only; --join joins what is done
    python scripts/sweep_supervised.py --recheck        one number drawn by the date, against its table

Several processes may run at once: each takes the next arm that nobody has begun. A run is one base checkpoint
with one seed of its own (data, order, noise), so bases and seeds vary together and the interval over runs
holds both. Every arm is charged for what it computes (``supervised_arms.STEP_PRICE``), but for the steps that
train CAFT's heads before.
"""

import argparse
import functools
import json
import os
import random
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from cotkit import lab, tokens
from cotkit.bootstrap.reject import sample_and_score
from cotkit.rewards.answer import accuracy
from cotkit.rewrite.structure import inject_error
from cotkit.select.quality import strata
from cotkit.tasks.arithmetic import countdown, reaches_target, word_problem

import supervised_arms as arms_of  # isort: skip
from sweeping import choose_settings, rerun_one, work_through  # isort: skip

HERE = Path(__file__).resolve().parent.parent
RESULTS = HERE / "notebooks" / "results"
CACHE = HERE / "out" / "supervised"
CODE = (
    "scripts/sweep_supervised.py::one",
    "scripts/supervised_arms.py::train",
    *(
        f"cotkit/losses/sft.py::{name}"
        for name in ("nll", "iw_sft", "poft", "ift_inputs", "ift_weights", "multi_token")
    ),
    "cotkit/losses/regularize.py::adversarial",
    "cotkit/adapters/modules.py::future_logps",
    "cotkit/select/quality.py::strata",
    "cotkit/tokens/_corrupt.py::corrupt",
    "cotkit/tasks/arithmetic.py::word_problem",
    "cotkit/tasks/arithmetic.py::countdown",
)
# Base checkpoint and seed of every run.
RUNS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))
ARMS = {
    "plain": (
        "sft", "sft_again", "iw_sft", "mft_mask", "mft_random", "poft", "ift", "caft", "smart", "dft",
    ),
    "redundant": ("sft", "sft_own_rate", "mft_mask", "mft_random", "mft_source", "mft_clean"),
    "noises": ("sft", "mft_random", "neftune", "dropout", "scheduled"),
    "noisy": ("sft", "poft"),
    "graded": ("sft", "iw_sft", "iw_token", "iw_sum", "sft_q", "iw_q"),
    "twice": ("sft", "mft_second"),
    "words": ("sft", "mft_mask", "mft_random"),
    "long": ("sft", "mft_mask", "mft_random"),
    "scarce": ("sft", "smart"),
    "concepts": ("sft", "caft"),
    "countdown": ("sft", "iw_sft", "mft_mask", "ift", "caft"),
}  # fmt: skip
LRS = (2e-4, 5e-4, 1e-3)
PART_LRS = {"concepts": (5e-4, 1e-3, 2e-3)}
# Variants of an arm take its learning rate; every other arm has the whole grid.
LIKE = {"sft_again": "sft"}
# Where an arm and its control must differ in nothing else, all arms of a part have one rate.
ONE_RATE = {"redundant": 5e-4, "noises": 2e-4, "twice": 5e-4, "graded": 2e-4}
SAME_TASK = {"noises": "redundant"}  # a part that is another one at another rate
SAME_RATE = {"long": "plain"}  # a part that takes the learning rates of another
CHOSEN = HERE / "scripts" / "supervised_lr.json"
SETTINGS: dict[str, Any] = {
    "train_questions": 300,
    "steps": 48,
    "batch": 48,
    "part_steps": {"redundant": 60, "concepts": 120, "words": 100, "long": 144, "twice": 60},
    "part_batch": {
        "redundant": 32,
        "concepts": 32,
        "graded": 32,
        "noisy": 32,
        "scarce": 32,
        "countdown": 32,
        "words": 32,
    },
    "lr": json.loads(CHOSEN.read_text()) if CHOSEN.exists() else {},  # what --tune chose
    "mft_rate": 0.1,
    "mft_rate_second": 0.4,
    "tau": 3.0,
    "neftune_alpha": 100.0,
    "ift_lam": 0.2,
    "smart_radius": 0.005,
    "smart_weight": 1.0,
    "caft_heads": 4,
    "caft_head_steps": 30,
    "wrong_share": 0.3,
    "scarce_questions": 60,
    "concept_questions": 150,
    "samples": 8,
    "percentiles": [70, 80, 90],
    "test_questions": 400,
    "shift_questions": 200,
    "max_new_tokens": 72,
    "part_max_new_tokens": {"redundant": 130, "concepts": 40, "words": 60, "twice": 110},
}
STORY = functools.partial(word_problem, steps=(3, 3))
WORDY = functools.partial(word_problem, steps=(1, 1), style="verbose", operand=40)
CHECKED = functools.partial(word_problem, steps=(2, 2), style="check")
NUMBERS = functools.partial(countdown, numbers=3, target=None, signs="+-", operand=20)


def setting(part: str, key: str) -> Any:
    """A setting, or what a part has in its place."""
    return SETTINGS.get(f"part_{key}", {}).get(part, SETTINGS[key])


def rate_of(part: str, arm: str) -> float:
    """The learning rate that the grid chose for an arm in a part; a twin takes its model's."""
    if part in ONE_RATE and arm != "sft_own_rate":
        return ONE_RATE[part]
    if arm == "sft_own_rate":
        arm = "sft"
    return SETTINGS["lr"][f"{SAME_RATE.get(part, part)}/{LIKE.get(arm, arm)}"]


def task_of(part: str) -> Callable:
    """The task whose questions a part asks."""
    return {
        "redundant": CHECKED,
        "countdown": NUMBERS,
        "concepts": spelled,
        "words": WORDY,
        "twice": twice,
    }.get(part, STORY)


def twice(rng: random.Random) -> dict[str, Any]:
    """A story of two steps, every line of its thought written twice: the second copy tells nothing new."""
    row = word_problem(rng, steps=(2, 2))
    steps = [line for line in row["steps"] for _ in range(2)]
    return row | {"steps": steps, "completion": tokens.FORMATS["think"].render(steps, row["answer"])}


def spelled(rng: random.Random) -> dict[str, Any]:
    """A story of one step whose answer is written out in words: a concept of several tokens."""
    row = word_problem(rng, steps=(1, 1), operand=40)
    answer = in_words(int(row["answer"]))
    return row | {"completion": row["completion"].rsplit("\n", 1)[0] + "\n" + answer, "answer": answer}


def spelled_right(prompts: list, completions: list, answer: list, **_: Any) -> list[float]:
    """1 where the text after the thought is the answer's words, letter by letter."""
    parse = tokens.FORMATS["think"].parse
    return [float(parse(c).answer == a) for _, c, a in zip(prompts, completions, answer, strict=True)]


def in_words(number: int) -> str:
    """A number below 100 in English words."""
    small = (  # noqa: SIM905
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen"
    ).split()
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
    if number < 20:
        return small[number]
    return tens[number // 10 - 2] + ("-" + small[number % 10] if number % 10 else "")


def data(part: str, base: int, seed: int, arm: str) -> list[dict]:
    """The training rows of a run."""
    n = SETTINGS[
        {"scarce": "scarce_questions", "concepts": "concept_questions", "words": "scarce_questions"}.get(
            part, "train_questions"
        )
    ]
    rows = lab.rows(task_of(part), "train", n=n, seed=seed)
    if part == "noisy":
        rng = random.Random(f"noisy/{seed}")
        wrong = set(rng.sample(range(n), round(SETTINGS["wrong_share"] * n)))
        rows = [
            (inject_error(row, rng=rng) if i in wrong else row) | {"wrong": int(i in wrong)}
            for i, row in enumerate(rows)
        ]
    if part == "graded":
        pool = own_samples(base, seed, rows)
        scores = [quality(row["completion"]) if row["right"] else 0.0 for row in pool]
        if arm.endswith("_q"):
            return [pool[i] for i in strata(scores, SETTINGS["percentiles"])]
        return [row for row in pool if row["right"]]
    return rows


@functools.lru_cache(maxsize=1)
def _pool(base: int, seed: int, prompts: tuple) -> list[dict]:
    model, tokenizer = arms_of.base_model(base)
    rows = [{"prompt": p, "answer": a} for p, a in prompts]
    generate = lab.generator(model, tokenizer, max_new_tokens=SETTINGS["max_new_tokens"], seed=seed)
    groups = sample_and_score(rows, generate, accuracy(), n=SETTINGS["samples"])
    return [
        {"prompt": g["prompt"], "answer": g["answer"], "completion": text, "right": bool(reward)}
        for g in groups
        for text, reward in zip(g["completions"], g["rewards"], strict=True)
    ]


def own_samples(base: int, seed: int, rows: list[dict]) -> list[dict]:
    """Samples of the base model for the questions of ``rows``, each with whether it is right."""
    return _pool(base, seed, tuple((row["prompt"], row["answer"]) for row in rows))


def quality(completion: str) -> float:
    """Graded quality of a right chain in (0, 1]: the share of its lines that keep the running total."""
    lines = tokens.FORMATS["think"].parse(completion).steps
    running = sum(line.startswith("All") for line in lines) / max(1, len(lines))
    return 0.3 + 0.6 * running + 0.1 / (1 + len(completion) / 100)


def one(part: str, arm: str, base: int, seed: int, *, split: str = "test", lr: float | None = None) -> dict:
    """Train one arm once and measure it; the line of the table."""
    lr = rate_of(part, arm) if lr is None else lr
    part = SAME_TASK.get(part, part)
    rows = data(part, base, seed, arm)
    kind = {"sft_q": "sft", "sft_own_rate": "sft"}.get(arm, arm)
    model, tokenizer = arms_of.train(
        kind, base, rows, steps=setting(part, "steps"), lr=lr, batch=setting(part, "batch"), seed=seed,
        settings=SETTINGS,
    )  # fmt: skip
    line = {"arm": arm, "base": base, "seed": seed}
    return line | measure(part, model, tokenizer, rows, split, base)


def clean_above_wrong(rows: list[dict], scores: torch.Tensor) -> float:
    """Share of (clean, falsified) pairs of training chains whose clean one has the higher score."""
    wrong = torch.tensor([row["wrong"] for row in rows]) == 1
    return float((scores[~wrong][:, None] > scores[wrong][None]).double().mean())


def measure(part: str, model: Any, tokenizer: Any, rows: list[dict], split: str, base: int) -> dict:
    """All metrics of a part for a trained model."""
    greedy = lab.generator(model, tokenizer, temperature=0, max_new_tokens=setting(part, "max_new_tokens"))
    reward = {"countdown": reaches_target, "concepts": spelled_right}.get(part, accuracy())

    def right(asked: list[dict]) -> list[float]:
        return lab.evaluate(greedy, asked, {"right": reward})["right"].tolist()

    n = SETTINGS["test_questions"] if split == "test" else SETTINGS["shift_questions"]
    test = lab.rows(task_of(part), split, n=n, seed=0)
    found: dict[str, Any] = {"accuracy": right(test)}
    if split != "test":
        return found
    if part in ("plain", "redundant"):
        kinds = {"plain": ({"steps": (4, 4)}, STORY), "redundant": ({"steps": (3, 3)}, CHECKED)}
        longer, task = kinds[part]
        many = SETTINGS["shift_questions"]
        found["more_steps"] = right(lab.rows(functools.partial(task, **longer), split, n=many, seed=0))
        aside = functools.partial(task, distractors=2)
        found["distractors"] = right(lab.rows(aside, split, n=many, seed=0))
    found["reference_nll"] = (-lab.score(model, tokenizer, test[:200])).tolist()
    if part in ("redundant", "words", "long", "twice"):
        found["recovered"] = recovered(model, tokenizer, test[:100], second=part == "twice")
    if part == "noisy":
        found["clean_above_wrong"] = clean_above_wrong(rows, lab.score(model, tokenizer, rows))
        others = [lab.score(arms_of.base_model((base + k) % 5)[0], tokenizer, rows) for k in (1, 2)]
        found["clean_above_wrong_others"] = clean_above_wrong(rows, torch.stack(others).mean(0))
    if part == "graded":
        texts = [t[0] for t in greedy([row["prompt"] for row in test], 1)]
        values = [quality(t) for t in texts]
        found["quality"] = [v * r for v, r in zip(values, found["accuracy"], strict=True)]
    if part == "scarce":
        found["train_accuracy"] = right(rows)
        found["sensitivity"] = sensitivity(model, tokenizer, test[:100])
    return found


def recovered(model: Any, tokenizer: Any, rows: list[dict], *, second: bool) -> float:
    """Teacher-forced greedy accuracy with the masking rate's share of the chain masked, over that without.

    Where only second copies of lines were masked in training, only those are masked here.
    """
    batch = tokens.encode(rows, tokenizer)
    where = batch["labels"] != -100
    rate = SETTINGS["mft_rate_second" if second else "mft_rate"]
    masked = where & (batch["steps"] % 2 == 1) if second else where
    generator = torch.Generator().manual_seed(0)
    noisy, _ = tokens.corrupt(
        batch["input_ids"], masked, rate, mask_id=tokenizer.mask_token_id, generator=generator
    )
    hits = []
    for ids in (noisy, batch["input_ids"]):
        with torch.no_grad():
            guess = model(ids, attention_mask=batch["attention_mask"]).logits.argmax(-1).roll(1, 1)
        hits.append(float((guess == batch["labels"])[where].double().mean()))
    return hits[0] / hits[1]


def sensitivity(model: Any, tokenizer: Any, rows: list[dict]) -> list[float]:
    """Share of each reference chain's greedy tokens that noise of half the embeddings' size changes."""
    batch = tokens.encode(rows, tokenizer)
    mask = batch["labels"] != -100
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        noise = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
        noise = 0.5 * float(embeds.pow(2).mean().sqrt()) * noise
        clean, noisy = (
            model(inputs_embeds=e, attention_mask=batch["attention_mask"]).logits.argmax(-1).roll(1, 1)
            for e in (embeds, embeds + noise)
        )
    return ((clean != noisy) & mask).sum(1).div(mask.sum(1)).tolist()


def tune(parts: list[str]) -> None:
    """The same grid of learning rates for every arm, on validation questions, with a seed of its own."""
    grid = {
        f"{part}-{arm}-{lr}": (part, arm, lr)
        for part in parts
        for arm in ARMS[part]
        for lr in PART_LRS.get(part, LRS)
        if arm not in LIKE
    }

    def do(part: str, arm: str, lr: float) -> dict:
        return one(part, arm, 1, 101, split="validation", lr=lr)

    choose_settings(grid, CACHE / "tune", do, lambda part, arm: f"{part}/{arm}", CHOSEN)


def table_path(part: str) -> Path:
    """Where the table of a part lies."""
    return RESULTS / f"supervised_{part}.csv"


def join(parts: list[str]) -> None:
    """All runs of each part into its table; a part that lacks some is named and left out."""
    for part in parts:
        paths = [CACHE / f"{part}-{arm}-{b}-{s}.json" for b, s in RUNS for arm in ARMS[part]]
        missing = sum(not path.exists() for path in paths)
        if missing:
            print(f"{part}: {missing} of {len(paths)} runs missing")
            continue
        lines = [json.loads(path.read_text()) for path in paths]
        lab.save_table(table_path(part), lines, settings=SETTINGS, code=CODE)


def main() -> None:
    """Run the sweep, the grid, or the check of one number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=ARMS, action="append", help="one setting only (may be repeated)")
    parser.add_argument("--run", type=int, choices=range(len(RUNS)), help="one run only")
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
        runs = RUNS if arguments.run is None else RUNS[arguments.run : arguments.run + 1]
        jobs = [
            (f"{part}-{arm}-{b}-{s}", (part, arm, b, s))
            for b, s in runs
            for part in parts
            for arm in ARMS[part]
        ]
        work_through(jobs, CACHE, one)
        if arguments.run is None:
            join(parts)


if __name__ == "__main__":
    main()
