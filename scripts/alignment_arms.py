"""The arms of the alignment sweep: how each one goes on from a fine-tuned model, on equally many chains.

Functions: ``go_on`` trains an arm; ``start`` is the fine-tuned model of a run with its samples; ``squeezed``
is the experiment on off-policy pairs; ``SETTINGS`` says what all of them share.
"""

import copy
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotkit import lab, tokens
from cotkit.bootstrap.reject import sample_and_score
from cotkit.losses import preference
from cotkit.losses.sft import nll
from cotkit.rewards.answer import accuracy
from cotkit.rewards.steps import equations
from cotkit.rewrite.pairs import pairs, prefix_pairs, ranked
from cotkit.rewrite.structure import inject_error
from cotkit.tasks.arithmetic import countdown, reaches_target, word_problem

import sweep_spine as spine  # isort: skip
from supervised_arms import base_model  # isort: skip

HERE = Path(__file__).resolve().parent.parent
CHOSEN = HERE / "scripts" / "alignment_lr.json"
LRS = (3e-5, 1e-4, 3e-4)
LRS_ALONE = (1e-5, 3e-5, 6e-5, 1e-4, 2e-4, 3e-4)  # for arms without a second number to tune
SETTINGS: dict[str, Any] = {
    "train_questions": 300,
    "sft_steps": 48,
    "sft_batch": 48,
    "sft_lr": 2e-4,
    "samples": 8,
    "keep": 3,
    "more_steps": 20,
    "long_steps": 60,
    "chains_a_step": 56,
    "boundary": 0.15,
    "chosen": json.loads(CHOSEN.read_text()) if CHOSEN.exists() else {},  # what --tune chose
    "watch": [4, 9, 14, 19, 29, 39, 49, 59],
    "watch_questions": 100,
    "max_new_tokens": 60,
    "test_questions": 400,
    "shift_questions": 200,
    "assess_questions": 80,
    "squeeze_questions": 100,
    "squeeze_steps": 24,
    "squeeze_lr": 1e-4,
    "squeeze_watch": [0, 4, 8, 12, 16, 20],
    "course": [0, 3, 6, 9, 12, 18, 24, 36, 47],
}
STORY = functools.partial(word_problem, steps=(3, 3))
LARGER = functools.partial(word_problem, steps=(3, 3), operand=30)
OTHER = functools.partial(countdown, numbers=3, target=None, signs="+-", operand=20)
# The second number of an arm's grid; every other arm tries as many learning rates instead.
KNOBS: dict[str, tuple[float, float]] = {
    "aft_boundary": (0.15, 0.5),
    "aft_all_right": (0.15, 0.5),
    "rank_boundary": (0.15, 0.5),
    "rrhf_boundary": (0.15, 0.5),
    "pro_boundary": (0.15, 0.5),
    "dpo_plain": (0.1, 0.5),
    "dpo_boundary": (0.1, 0.5),
    "own_dpo": (0.1, 0.5),
    "step_dpo": (0.1, 0.5),
    "whole_dpo": (0.1, 0.5),
    "orpo_process": (0.1, 0.5),
    "discriminative": (0.3, 1.0),
}


def grid_of(arm: str) -> list[tuple[float, float]]:
    """Six settings (learning rate, second number) of every arm; the second is 0 where there is none."""
    return [(lr, k) for lr in LRS for k in KNOBS[arm]] if arm in KNOBS else [(lr, 0.0) for lr in LRS_ALONE]


def chosen_for(arm: str) -> tuple[float, float]:
    """What the grid chose for an arm; variants of an arm take its learning rate."""
    chosen = SETTINGS["chosen"]
    name = arm.split("_", 1)[1] if arm.startswith(("both_", "long_")) else arm
    if name.startswith("rate_"):
        return float(name.split("_")[2]), SETTINGS["boundary"]
    if name == "align_plain_same_lr":
        return chosen["aft_boundary"][0], 0.0
    if name.startswith("beta_"):
        return chosen["aft_boundary"][0], float(name.removeprefix("beta_"))
    lr, knob = chosen["aft_boundary" if name.startswith("size_") else name]
    return lr, knob


@functools.lru_cache(maxsize=2)
def start(base: int, seed: int, split: str, both: bool = False) -> dict[str, Any]:
    """The fine-tuned model of a run, its samples on the training questions, and what it is measured on."""
    s = SETTINGS
    model, tokenizer = base_model(base)
    n = s["train_questions"] // (1 + both)
    tasks = [(STORY, accuracy())] + [(OTHER, reaches_target)] * both
    parts = [lab.rows(task, "train", n=n, seed=seed) for task, _ in tasks]
    rows = [row for part in parts for row in part]
    how = {"steps": s["sft_steps"], "lr": s["sft_lr"], "batch": s["sft_batch"], "seed": seed}
    lab.fit(model, tokenizer, rows, spine.sft_loss, **how)
    groups = []
    for part, (_, reward) in zip(parts, tasks, strict=True):
        groups += draw(model, tokenizer, part, seed, reward)
    test = lab.rows(STORY, split, n=s["test_questions"], seed=0)
    held_out = draw(model, tokenizer, test[: s["assess_questions"]], seed + 500, accuracy())
    return {
        "model": model,
        "tokenizer": tokenizer,
        "rows": rows,
        "groups": groups,
        "test": test,
        "seen": ranked(groups[: s["assess_questions"]], reference=False),
        "unseen": ranked(held_out, reference=False),
    }


def draw(model: Any, tokenizer: Any, rows: list[dict], seed: int, reward: Callable) -> list[dict]:
    """Samples of every row, scored."""
    generate = lab.generator(model, tokenizer, max_new_tokens=SETTINGS["max_new_tokens"], seed=seed)
    return sample_and_score(rows, generate, reward, n=SETTINGS["samples"])


def go_on(arm: str, state: dict, lr: float, knob: float, seed: int, watch: Callable | None = None) -> Any:
    """Train one arm from the fine-tuned model; returns the new model."""
    s, model, tokenizer = SETTINGS, copy.deepcopy(state["model"]), state["tokenizer"]
    steps = s["long_steps"] if arm.startswith("long_") else s["more_steps"]
    how: dict[str, Any] = {"lr": lr, "seed": seed, "description": arm, "steps": steps}
    how["prepare"] = watch(model) if watch else None
    arm = arm.removeprefix("both_").removeprefix("long_")
    if arm.startswith("rate_"):
        arm = {"plain": "align_plain", "boundary": "aft_boundary"}[arm.split("_")[1]]
    rows = chains(arm, state, seed)
    if arm == "sft_more":
        spent = sum(len(tokenizer(t)["input_ids"]) for g in state["groups"] for t in g["completions"])
        size = tokens.encode(rows, tokenizer)["attention_mask"].sum(1).float().mean().item()
        how["steps"] += round(spent / (3 * s["chains_a_step"] * size))  # writing is a third of training
    if "group" not in rows[0] or arm in ("self_training", "vote_sft"):
        lab.fit(model, tokenizer, rows, spine.sft_loss, batch=s["chains_a_step"], **how)
        return model
    batch = max(1, round(s["chains_a_step"] * len({row["group"] for row in rows}) / len(rows)))
    columns = [name for name in ("rank", "gold", "quality", "ref", "question") if name in rows[0]]
    loss = group_loss(arm, knob, len(state["groups"]))
    lab.fit(model, tokenizer, rows, loss, batch=batch, unit="group", columns=columns, **how)
    return model


def chains(arm: str, state: dict, seed: int) -> list[dict]:
    """The rows an arm trains on: groups of ranked chains, pairs, right chains alone, or the references."""
    if arm == "sft_more":
        return state["rows"]
    most = int(arm.removeprefix("size_")) if arm.startswith("size_") else SETTINGS["keep"]
    flat = ranked(state["groups"], most=most, rng=random.Random(seed))
    if arm == "self_training":
        return [row for row in flat if row["rank"] == 0]
    if arm == "vote_sft":
        return [row for row in voted(state["groups"]) if row["rank"] == 0]
    if arm == "discriminative":
        return [row | {"question": row["group"]} for row in flat]
    if arm in ("own_dpo", "whole_dpo", "step_dpo", "orpo_process"):
        return with_ref(state, paired(arm, state["groups"]))
    return with_ref(state, graded(flat)) if arm.startswith(("rank", "rrhf", "pro", "dpo")) else flat


def graded(flat: list[dict]) -> list[dict]:
    """Feedback of several levels: right or wrong first, then the share of equations that hold."""
    texts = [row["completion"] for row in flat]
    shares = equations()([row["prompt"] for row in flat], texts)
    quality = [(row["rank"] == 0) + 0.5 * (share or 0.0) for row, share in zip(flat, shares, strict=True)]
    levels: dict[int, set[float]] = {}
    for row, q in zip(flat, quality, strict=True):
        levels.setdefault(row["group"], set()).add(q)
    order = {group: sorted(found, reverse=True) for group, found in levels.items()}
    return [
        row | {"quality": q, "rank": order[row["group"]].index(q)}
        for row, q in zip(flat, quality, strict=True)
    ]


def with_ref(state: dict, rows: list[dict]) -> list[dict]:
    """The summed log-prob of each chain under the fine-tuned model, the frozen reference."""
    sums = lab.score(state["model"], state["tokenizer"], rows, mean=False).tolist()
    return [row | {"ref": ref} for row, ref in zip(rows, sums, strict=True)]


def voted(groups: list[dict]) -> list[dict]:
    """Samples ranked by whether they end in the most frequent answer: no label is looked at."""
    again = []
    for g in groups:
        read = [tokens.FORMATS["think"].parse(text) for text in g["completions"]]
        answers = [p.answer for p in read if p.ok]
        vote = max(answers, key=answers.count) if answers else None
        again.append(g | {"rewards": [float(p.ok and p.answer == vote) for p in read]})
    return ranked(again, most=SETTINGS["keep"], reference=False, rng=random.Random(0))


def paired(arm: str, groups: list[dict]) -> list[dict]:
    """Pairs as groups of two rows: rank 0 the chosen, rank 1 the rejected one."""
    made: list[dict] = []
    share, read = equations(), tokens.FORMATS["think"].parse
    for g in groups:
        texts, prompt = g["completions"], g["prompt"]
        if arm == "own_dpo":  # right against wrong, the most dissimilar
            found = pairs(texts, g["rewards"], max_pairs=3, choose="dissimilar")
        elif arm == "orpo_process":  # by the share of equations that hold
            found = pairs(texts, [share.score_one(t) for t in texts], min_gap=0.3, max_pairs=3)
        else:  # by the vote, whole chains or single thoughts
            answers = [read(t).answer for t in texts if read(t).ok]
            vote = max(answers, key=answers.count) if answers else None
            value = [float(read(t).answer == vote) if read(t).ok else 0.0 for t in texts]
            if arm == "whole_dpo":
                found = pairs(texts, value, max_pairs=3)
            else:
                paths = [(read(t).steps, v) for t, v in zip(texts, value, strict=True) if read(t).ok]
                found = prefix_pairs(prompt + "<think>\n", paths) if paths else []
        made += [{"prompt": prompt} | pair for pair in found]
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "group": i, "rank": k, "gold": 0}
        for i, pair in enumerate(made)
        for k, side in enumerate(("chosen", "rejected"))
    ]


def group_loss(arm: str, knob: float, groups: int) -> Callable:
    """The loss of an arm on groups: the likelihood of the reference, if it has one, plus its ranking term."""
    family = arm.split("_")[0]
    constraint = "detach" if arm == "aft_detach" else None
    if arm.endswith("_boundary") or family in ("beta", "size") or arm == "aft_all_right":
        constraint = "boundary"
    boundary = knob if constraint == "boundary" and family != "dpo" else SETTINGS["boundary"]
    log_u = torch.zeros(groups)  # discriminative fine-tuning's running normaliser of every question

    def loss(logps: torch.Tensor, batch: dict, denom: Any) -> torch.Tensor:
        how: dict[str, Any] = {"constraint": constraint, "boundary": boundary, "denom": denom}
        sums = tokens.seq_logps(logps, batch["mask"])
        means, valid = tokens.grouped(tokens.seq_logps(logps, batch["mask"], mean=True), batch["group"])
        rank, _ = tokens.grouped(batch["rank"], batch["group"])
        if arm == "discriminative":
            return _discriminative(means, valid, batch, log_u, knob, denom)
        if arm == "orpo_process":
            return preference.orpo(*means.T, beta=knob, denom=denom)
        if arm in ("own_dpo", "whole_dpo", "step_dpo"):
            if arm == "step_dpo":  # a thought is no finished completion: its end token does not count
                sums = tokens.seq_logps(logps, tokens.mask(batch["segments"], tokens.THOUGHT))
            now, ref = (tokens.grouped(x, batch["group"])[0].T for x in (sums, batch["ref"].float()))
            return preference.dpo(*now, *ref, beta=knob, denom=denom)
        liked = batch["gold"] == 1 if arm != "aft_all_right" else batch["rank"] == 0
        count = liked.sum() if arm == "aft_all_right" else denom
        likelihood = nll(logps, batch["mask"] & liked[:, None], per="sequence", denom=count)
        if family == "rrhf":
            return likelihood + preference.rrhf(means, rank, valid, **how)
        if family == "pro":
            quality, _ = tokens.grouped(batch["quality"].float(), batch["group"])
            return likelihood + preference.pro(means, quality, valid, **how)
        if family == "dpo":
            sums, ref = (tokens.grouped(x, batch["group"])[0] for x in (sums, batch["ref"].float()))
            ranking = preference.dpo_ranked(sums, rank, valid, ref_scores=ref, beta=knob, **how)
            return likelihood + ranking
        return likelihood + preference.constraint_alignment(means, rank, valid, **how)

    return loss


def _discriminative(
    means: torch.Tensor, valid: torch.Tensor, batch: dict, log_u: torch.Tensor, tau: float, denom: Any
) -> torch.Tensor:
    """The reference against all samples of its question, right or wrong (DFT2: mean scores, no reference)."""
    question, _ = tokens.grouped(batch["question"], batch["group"])
    at, neg, there = question[:, 0], means[:, 1:], valid[:, 1:]
    log_u[at] = preference.discriminative_log_z(neg, log_u[at], valid=there, tau=tau, gamma=0.9)
    return preference.discriminative(means[:, 0], neg, log_u[at], there, tau=tau, denom=denom)


def squeezed(arm: str, base: int, seed: int, split: str) -> tuple[Any, dict[str, list[float]]]:
    """Off-policy DPO: the reference against the same chain with a planted error, watched over training.

    ``dpo`` and ``dpo_detach`` start from SFT on the references, ``extend`` from SFT on both sides of the
    pairs for as many steps.
    """
    s, state = SETTINGS, start(base, seed, split)
    tokenizer = state["tokenizer"]
    gold = state["rows"][: s["squeeze_questions"]]
    wrong = [inject_error(row, rng=random.Random(seed * 1000 + i)) for i, row in enumerate(gold)]
    both = [
        {"prompt": row["prompt"], "completion": side["completion"], "group": i, "rank": k}
        for i, row in enumerate(gold)
        for k, side in enumerate((row, wrong[i]))
    ]
    if arm == "extend":
        model, _ = base_model(base)
        steps = {"steps": s["sft_steps"], "lr": s["sft_lr"], "batch": s["sft_batch"], "seed": seed}
        rest = state["rows"][s["squeeze_questions"] :]
        lab.fit(model, tokenizer, both + rest, spine.sft_loss, **steps)
    else:
        model = copy.deepcopy(state["model"])
    pairs_ = with_ref({"model": model, "tokenizer": tokenizer}, both)
    track: dict[str, list[float]] = {"chosen": [], "rejected": [], "argmax": []}
    first: dict[str, np.ndarray] = {}

    def look() -> dict[str, np.ndarray]:
        sides = (gold[:60], wrong[:60])
        found = {
            n: lab.score(model, tokenizer, r).numpy()
            for n, r in zip(("chosen", "rejected"), sides, strict=True)
        }
        return found | {"argmax": favourite(model, tokenizer, gold[:60])}

    def watch(batch: dict, step: int) -> dict:
        if step in s["squeeze_watch"]:
            found = look()
            first.update({} if first else found)
            for name, values in found.items():
                track[name].append(float(values.mean()))
            model.train()
        return batch

    def loss(logps: torch.Tensor, batch: dict, denom: Any) -> torch.Tensor:
        constraint = "detach" if arm == "dpo_detach" else None
        sums = tokens.seq_logps(logps, batch["mask"])
        now, ref = (tokens.grouped(x, batch["group"])[0].T for x in (sums, batch["ref"].float()))
        return preference.dpo(*now, *ref, beta=0.1, constraint=constraint, denom=denom)

    lab.fit(
        model, tokenizer, pairs_, loss, steps=s["squeeze_steps"], lr=s["squeeze_lr"], seed=seed, unit="group",
        batch=s["chains_a_step"] // 2, columns=("rank", "ref"), prepare=watch, description=arm,
    )  # fmt: skip
    last = look()
    changes: dict[str, list[float]] = {f"{n}_change": (last[n] - first[n]).tolist() for n in track}
    changes["rejected_before"] = first["rejected"].tolist()
    return model, changes | {n: [*values, float(last[n].mean())] for n, values in track.items()}


@torch.no_grad()
def favourite(model: Any, tokenizer: Any, rows: list[dict]) -> np.ndarray:
    """Mean log-prob of the likeliest token along each completion."""
    batch = tokens.encode(rows, tokenizer)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    best = logits.log_softmax(-1).amax(-1)[:, :-1]
    there = batch["labels"][:, 1:] != -100
    return ((best * there).sum(1) / there.sum(1)).numpy()
