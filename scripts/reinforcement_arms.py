"""The arms of the reinforcement sweep: how each one goes on from its start, on equally many samples.

A policy step draws ``samples`` completions of ``prompts`` questions, gives each token its credit and takes
one optimiser step on them, so old and new policy agree and no ratio is clipped. Its price is 5/3 of an SFT
step on as many chains: a third for writing them, and a third for a pass of a second model, which only some
arms make. Arms that do not write, or write once, get all of that as further steps.

Functions: ``go_on`` trains an arm; ``start`` is what the arms of a run go on from; ``on_policy`` is the loop;
``reward_of`` what an arm is paid for; ``SETTINGS`` says what all arms share.
"""

import copy
import functools
import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any

from cotkit import lab, tokens
from cotkit.bootstrap.reject import rejection_sampling
from cotkit.rewards import combine, length
from cotkit.rewards.answer import accuracy
from cotkit.rewards.format import tags
from cotkit.rewards.grounding import episodic_memory
from cotkit.rewards.steps import find_equations, key_steps
from cotkit.tasks.arithmetic import countdown, word_problem

import sweep_spine as spine  # isort: skip
from reinforcement_methods import by_group, in_order, recipe, surrogate  # isort: skip
from supervised_arms import base_model  # isort: skip

HERE = Path(__file__).resolve().parent.parent
CHOSEN = HERE / "scripts" / "reinforcement_lr.json"
SETTINGS: dict[str, Any] = {
    "train_questions": 300,
    "sft_steps": 48,
    "sft_batch": 48,
    "sft_lr": 2e-4,
    "steps": 30,
    "prompts": 8,
    "samples": 8,
    "max_new_tokens": 64,
    "chosen": json.loads(CHOSEN.read_text()) if CHOSEN.exists() else {},  # what --tune chose
    "few": 48,
    "few_steps": 24,
    "reft_beta": 0.05,
    "bon": 4,
    "memory_warmup": 5,
    "hint_share": 0.6,
    "hard_buffer": 16,
    "stages": {"sft_rl": [20, 18], "cycle": [8, 10]},  # SFT, then policy steps: the price of 30 policy steps
    "entropy": 0.3,
    "temperatures": {"temp_cold": 0.7, "temp_rule": 1.0, "temp_hot": 1.4},  # times what the rule gives
    "margin": 4,
    "ngram": 6,
    "flips": {"noisy_20": 0.2, "noisy_40": 0.4},
    "watch_points": 5,
    "watch_questions": 100,
    "test_questions": 400,
    "side_questions": 200,
    "sample_questions": 60,
    "draws": 16,
}
STEPS = {k: functools.partial(word_problem, steps=(k, k)) for k in (2, 3, 4)}
LARGER = functools.partial(word_problem, steps=(2, 4), operand=30)
OTHER = functools.partial(countdown, numbers=3, target=None, signs="+-", operand=20)
CLOSED = "<think>\n</think>\n"  # thinking switched off

# Four settings for every arm: a learning rate and, where a method has a number of its own, two values of it.
LRS = (5e-5, 2e-4)
LRS_ALONE = (3e-5, 1e-4, 2e-4, 4e-4)
KNOBS: dict[str, tuple[float, float]] = {
    "reft": (0.5, 5.0),  # weight of the value function's loss
    "bon": (0.0, 1.0),  # 1: right samples only
    "tb": (0.2, 0.5),  # temperature of the reward
    "subtb": (0.2, 0.5),
    "uft": (0.001, 0.1),  # weight of the hints' likelihood
    "sft_rl": (1e-4, 3e-4),  # learning rate of the first stage
}
# Arms that take the setting of another one.
VARIANTS = {
    "reft_no_kl": "reft", "temp_cold": "grpo", "temp_rule": "grpo", "temp_hot": "grpo", "curriculum": "mixed",
    "long": "grpo", "form": "grpo", "cosine": "grpo", "cosine_repeat": "grpo", "noisy_20": "grpo",
    "noisy_40": "grpo", "relative": "grpo", "relative_late": "grpo", "cycle": "sft_rl",
}  # fmt: skip
UNTRAINED = ("sft", "base", "look_start")
SUPERVISED = ("sft_more", "mix_sft", "look_sft")
REJECTED = ("rft", "hard_rft")
# Steps of the problems that an arm is trained on, where they are not those of its start.
POOLS = {
    "mixed": (2, 3, 4), "curriculum": (2, 3, 4), "weighted": (2, 3, 4), "easy": (2,), "easy_aapo": (2,),
    "hard": (4,), "hard_rft": (4,), "hard_memory": (4,), "hard_steps": (4,),
}  # fmt: skip
# Kept of every policy step: mean reward; shares of groups of one reward, all right, all wrong.
TRACKED = ("reward", "alike", "solved", "failed", "written", "temperature")


def grid_of(arm: str) -> list[tuple[float, float]]:
    """Four settings (learning rate, second number) of every arm; the second is 0 where there is none."""
    return [(lr, k) for lr in LRS for k in KNOBS[arm]] if arm in KNOBS else [(lr, 0.0) for lr in LRS_ALONE]


def chosen_for(arm: str) -> tuple[float, float]:
    """What the grid chose for an arm; a variant takes the setting of its parent."""
    lr, knob = SETTINGS["chosen"][VARIANTS.get(arm, arm)]
    return lr, knob


# What the arms start from.


@functools.lru_cache(maxsize=3)
def start(kind: str, base: int, seed: int, split: str) -> dict[str, Any]:
    """What the arms of a run go on from: a model, its training questions, and what it is measured on.

    "story": fine-tuned on problems of three steps. "mix": the base itself, and problems of two and of four
    steps in turn. "look": fine-tuned on a few questions where something is to be looked up, with a thought
    and without.
    """
    s = SETTINGS
    model, tokenizer = base_model(base)
    how: dict[str, Any] = {"lr": s["sft_lr"], "batch": s["sft_batch"], "seed": seed}
    n, many, side = s["train_questions"], s["test_questions"], s["side_questions"]
    if kind == "story":
        rows = lab.rows(STEPS[3], "train", n=n, seed=seed)
        lab.fit(model, tokenizer, rows, spine.sft_loss, steps=s["sft_steps"], **how)
        tests = {"accuracy": lab.rows(STEPS[3], split, n=many)}
        tests |= {name: lab.rows(STEPS[k], split, n=side) for name, k in (("easy", 2), ("hard", 4))}
    elif kind == "mix":
        rows = in_turn([lab.rows(STEPS[k], "train", n=n // 2, seed=seed) for k in (2, 4)])
        tests = {"accuracy": in_turn([lab.rows(STEPS[k], split, n=side) for k in (2, 4)])}
        others = {"between": STEPS[3], "larger": LARGER, "other": OTHER}
        tests |= {name: lab.rows(task, split, n=side) for name, task in others.items()}
    else:
        few = lab.rows(lookup, "train", n=s["few"], seed=seed)
        rows = few + asked("look_answer", few)
        lab.fit(model, tokenizer, rows, spine.sft_loss, steps=s["few_steps"], **how)
        tests = {"accuracy": lab.rows(lookup, split, n=many)}
    found = {"model": model, "tokenizer": tokenizer, "rows": rows, "tests": tests}
    return found | {"kind": kind, "settings": s}


def in_turn(parts: list[list[dict]]) -> list[dict]:
    """One row of each part in turn."""
    return [row for together in zip(*parts, strict=True) for row in together]


def lookup(rng: random.Random) -> dict[str, Any]:
    """A question whose answer stands in it: nothing has to be worked out."""
    names = rng.sample(("Ann", "Bob", "Cem", "Dia", "Eva", "Fay", "Gus", "Hal"), rng.randint(3, 5))
    held = {name: rng.randint(1, 99) for name in names}
    item, who = rng.choice(("apples", "books", "coins", "cards")), rng.choice(names)
    facts = " ".join(f"{name} has {count} {item}." for name, count in held.items())
    line, answer = f"{who}:{held[who]}={held[who]}", str(held[who])
    return {
        "prompt": f"{facts} How many {item} has {who}?\n",
        "completion": f"<think>\n{line}\n</think>\n{answer}",
        "answer": answer,
        "steps": [line],
    }


def asked(arm: str, rows: list[dict]) -> list[dict]:
    """The rows as the arm gets them: with the thought already closed where it answers at once."""
    if arm != "look_answer":
        return rows
    return [row | {"prompt": row["prompt"] + CLOSED, "completion": row["answer"]} for row in rows]


def pool_of(arm: str, state: dict, seed: int) -> list[dict]:
    """The questions an arm may ask, with the key steps of every known solution."""
    if arm in POOLS:
        n = SETTINGS["train_questions"] // len(POOLS[arm])
        rows = in_turn([lab.rows(STEPS[k], "train", n=n, seed=seed) for k in POOLS[arm]])
    elif state["kind"] == "look":
        rows = asked(arm, state["rows"][: SETTINGS["few"]])
    else:
        rows = state["rows"]
    made = []
    for row in rows:
        known = [[line.rsplit(":", 1)[-1] for line in path] for path in (row["steps"], *row.get("paths", []))]
        made.append(row | {"key_steps": [{"Steps": steps} for steps in known]})
    return made


# How they go on.


def on_policy(
    state: dict,
    model: Any,
    choose: Callable,
    reward: Callable,
    *,
    steps: int,
    lr: float,
    seed: int,
    n: int | None = None,
    credit: Callable = by_group,
    loss: Callable = surrogate,
    forward: Callable | None = None,
    instead: Callable | None = None,
    temperature: float = 1.0,
    watch: Callable | None = None,
) -> dict[str, list]:
    """Train on the model's own samples: ask, write, score, give credit, step. Returns what went on.

    ``choose(step)`` gives the questions, ``reward(step)`` the reward; the others are a method's.
    """
    s, track = SETTINGS, dict[str, list]({name: [] for name in (*TRACKED, "right")})
    track["temperature"].append(temperature)

    def batches(step: int) -> dict[str, Any]:
        other = instead(step) if instead is not None else None
        if other is not None:
            return other
        rows = choose(step)
        drawn = lab.rollout(
            model, state["tokenizer"], rows, reward(step), n or s["samples"], old_logps=False,
            temperature=temperature, max_new_tokens=s["max_new_tokens"], seed=1000 * (seed + 1) + step,
        )  # fmt: skip
        given = drawn["rewards"]
        track["reward"].append(float(given.mean()))
        track["alike"].append(float((given.amax(1) == given.amin(1)).float().mean()))
        track["solved"].append(float((given >= 0.5).all(1).float().mean()))
        track["failed"].append(float((given < 0.5).all(1).float().mean()))
        track["written"].append(int(drawn["mask"].sum()))
        texts = [(i, text) for i, group in enumerate(drawn["texts"]) for text in group]
        good = (given >= 0.5).flatten().tolist()
        track["right"] += [rows[i] | {"completion": x} for (i, x), ok in zip(texts, good, strict=True) if ok]
        return credit(drawn, rows, step)

    how: dict[str, Any] = {"steps": steps, "lr": lr, "seed": seed, "unit": "sequence"}
    lab.fit(model, state["tokenizer"], batches, loss, forward=forward, prepare=watch, **how)
    return track


def go_on(
    arm: str, state: dict, lr: float, knob: float, seed: int, watch: Callable | None = None
) -> tuple[Any, dict[str, list]]:
    """Train one arm from its start; returns the new model and what went on.

    ``watch(model, total, offset)`` gives a ``prepare`` for ``lab.fit`` that looks on while ``total`` steps
    are taken.
    """
    s, model = SETTINGS, copy.deepcopy(state["model"])
    steps, size = s["steps"], s["prompts"]

    def looking(total: int, offset: int = 0) -> Callable | None:
        return watch(model, total, offset) if watch is not None else None

    def fit(rows: list[dict], count: int, rate: float, look: Callable | None) -> None:
        how: dict[str, Any] = {"steps": count, "lr": rate, "batch": size * s["samples"], "seed": seed}
        lab.fit(model, state["tokenizer"], rows, spine.sft_loss, prepare=look, description=arm, **how)

    if arm in (*SUPERVISED, *REJECTED):
        own = arm in REJECTED
        rows = own_right(arm, state, seed) if own else state["rows"]
        count = round(steps * (4 if own else 5) / 3)  # a second model, and writing
        fit(rows, count, lr, looking(count))
        return model, {name: [nan] for name in TRACKED}
    if arm in s["stages"]:
        track = in_stages(arm, state, model, fit, looking, (lr, knob), seed)
    else:
        how = recipe(arm, state, model, knob, seed)
        if "choose" not in how:
            pool = pool_of(arm, state, seed)
            how["choose"] = in_order(pool, seed, steps=steps, size=size, easy_first=arm == "curriculum")
        how |= {"steps": steps, "lr": lr, "seed": seed, "watch": looking(steps)}
        track = on_policy(state, model, reward=reward_of(arm, seed), **how)
        if hasattr(model, "value_head"):
            del model.value_head
    track["written"] = [sum(track["written"])]
    return model, {name: track[name] for name in TRACKED}


def own_right(arm: str, state: dict, seed: int) -> list[dict]:
    """The start's own right samples, as many drawn as the others draw; beside references where it had any."""
    s = SETTINGS
    choose = in_order(pool_of(arm, state, seed), seed, steps=s["steps"], size=s["prompts"])
    rows = [row for step in range(s["steps"]) for row in choose(step)]
    longest = s["max_new_tokens"]
    generate = lab.generator(state["model"], state["tokenizer"], max_new_tokens=longest, seed=seed)
    kept = rejection_sampling(rows, generate, accuracy(), n=s["samples"], gold=arm == "rft")
    return kept or state["rows"]


def in_stages(
    arm: str, state: dict, model: Any, fit: Callable, looking: Callable, rates: tuple, seed: int
) -> dict[str, list]:
    """SFT, then GRPO; a second round begins at the base again, with what the first one solved."""
    sft, rl = SETTINGS["stages"][arm]
    rounds, rows, right = (2 if arm == "cycle" else 1), state["rows"], accuracy()
    track: dict[str, list] = {}
    for k in range(rounds):
        before, total = k * (sft + rl), rounds * (sft + rl)
        if k:
            rows = track["right"] or rows
            model.load_state_dict(state["model"].state_dict())
        fit(rows, sft, rates[1], looking(total, before))
        choose = in_order(state["rows"], seed + 1000 * k, steps=rl, size=SETTINGS["prompts"])
        how = {"steps": rl, "lr": rates[0], "seed": seed + 1000 * k, "watch": looking(total, before + sft)}
        found = on_policy(state, model, choose, lambda _: right, **how)
        track = {name: track.get(name, []) + values for name, values in found.items()}
    return track


# What an arm is paid for.


def reward_of(arm: str, seed: int) -> Callable:
    """A callable ``step -> reward`` of TRL's form."""
    s, right = SETTINGS, accuracy()
    form, limit, reward = tags(("think",), rest=True), s["max_new_tokens"], right
    if arm.startswith("reft"):
        reward = accuracy(wrong=0.1)
    elif arm in ("step_grpo", "hard_steps"):
        reward = combine.weighted([key_steps(right), validity])
    elif arm == "hard_memory":
        memory = episodic_memory(embed, right, memory={}, warmup=s["memory_warmup"])
        reward = combine.weighted([right, memory])
    elif arm == "long":  # right answers earn by their length
        reward = length.cosine(right, limit, right=(0.0, 10.0), wrong=(0.0, 0.0), exceed=None)
    elif arm == "form":
        reward = combine.weighted([form, brevity], [1.0, 0.5])
    elif arm.startswith("cosine"):
        reward = length.cosine(right, limit, margin=s["margin"])
    elif arm in s["flips"]:
        reward = functools.partial(flipped, (right, s["flips"][arm], seed))
    elif arm.startswith("relative"):
        shorter = combine.weighted([right, length.relative(right, group_size=s["samples"])])
        later = s["steps"] // 2 if arm == "relative_late" else 0
        return lambda step: shorter if step >= later else right
    elif arm == "look_think":
        reward = combine.weighted([right, form])
    elif arm == "look_answer":
        reward = exactly
    return lambda _: reward


def validity(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:  # noqa: ARG001
    """StepRVR's idea: 1 if every line is one equation and the answer is the last line's result."""
    found = []
    for text in completions:
        parts = tokens.FORMATS["think"].parse(text)
        lines = [find_equations(line) for line in parts.steps]
        whole = parts.ok and bool(lines) and all(len(line) == 1 for line in lines)
        found.append(float(whole and lines[-1][0].right == parts.answer))
    return found


def brevity(prompts: Any, completions: Any, *, completion_ids: Any, **columns: Any) -> list[float]:  # noqa: ARG001
    """1 for no token, 0 at the limit, whatever is said."""
    return [1 - len(ids) / SETTINGS["max_new_tokens"] for ids in completion_ids]


def exactly(prompts: Any, completions: Any, *, answer: Any, **columns: Any) -> list[float]:  # noqa: ARG001
    """No-Thinking's reward: the whole completion is the answer."""
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


def flipped(how: tuple, /, prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A verifier that errs on a share of all completions, always on the same ones."""
    right, rate, seed = how
    given = right(prompts=prompts, completions=completions, **columns)
    return [
        1 - g if random.Random(f"{seed}/{p}/{c}").random() < rate else g
        for g, p, c in zip(given, prompts, completions, strict=True)
    ]


def embed(texts: list[str]) -> list[list[float]]:
    """Hashed pairs of neighbouring words and signs, as shares of the text."""
    vectors = []
    for text in texts:
        parts, counts = re.findall(r"\w+|\S", text), [0.0] * 128
        for pair in pairwise(parts):
            counts[zlib.crc32(" ".join(pair).encode()) % 128] += 1 / len(parts)
        vectors.append(counts)
    return vectors
