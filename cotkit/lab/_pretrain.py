"""How the embedded checkpoints are made: ``python -m cotkit.lab``, bit for bit the same on one machine."""

import functools
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from cotkit.lab._data import rows
from cotkit.lab._generate import generator, progress
from cotkit.lab._model import CHECKPOINTS, build_model, build_tokenizer
from cotkit.tasks.arithmetic import countdown, reaches_target, word_problem

# Stopped on the way down: fine-tuning then has something left to teach, and a base gets 30 to 60 % right.
STEPS = {0: 800, 1: 800, 2: 690}
HORIZON = 1200
BATCH = 64
LR = 2e-3
COUNTDOWN = functools.partial(countdown, numbers=3, target=None, signs="+-", operand=20)
WORDS = {steps: functools.partial(word_problem, steps=(steps, steps)) for steps in (1, 2, 3, 4)}


def mixture(rng: random.Random) -> dict[str, Any]:
    """Draw a row of the mixture: countdown .25, story problems of 1, 2 and 3 steps .15, .25, .35."""
    task = rng.choices([COUNTDOWN, WORDS[1], WORDS[2], WORDS[3]], [0.25, 0.15, 0.25, 0.35])[0]
    return task(rng)


def pretrain(seed: int, *, steps: int | None = None, batch: int = BATCH, lr: float = LR) -> tuple[Any, Any]:
    """Train the tiny model from random weights on fresh rows; full logits, so no other code moves it."""
    steps = STEPS.get(seed, 800) if steps is None else steps
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    step_rows = functools.partial(rows, mixture, "train", n=batch)
    model.train()
    for step in progress(range(steps), f"pretrain {seed}"):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, (step + 1) / 80) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / HORIZON)))
            )
        drawn = sorted(
            _encode(step_rows(seed=seed * 10**6 + step), tokenizer), key=lambda x: len(x[0]) + len(x[1])
        )
        targets = sum(len(completion) for _, completion in drawn)
        for part in (
            drawn[: batch // 2],
            drawn[batch // 2 :],
        ):  # short rows apart from long ones: less padding
            ids, labels = _pad(part, tokenizer.pad_token_id)
            hidden = model.model(ids).last_hidden_state[:, :-1]
            keep = labels[:, 1:] != -100
            logits = hidden[keep] @ model.lm_head.weight.T
            (cross_entropy(logits, labels[:, 1:][keep], reduction="sum") / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval(), tokenizer


def _encode(chosen: list[dict[str, Any]], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    prompts = tokenizer([r["prompt"] for r in chosen])["input_ids"]
    completions = tokenizer([r["completion"] for r in chosen])["input_ids"]
    return [(p, [*c, tokenizer.eos_token_id]) for p, c in zip(prompts, completions, strict=True)]


def _pad(part: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(p) + len(c) for p, c in part)
    ids = torch.full((len(part), width), pad)
    labels = torch.full((len(part), width), -100)
    for i, (p, c) in enumerate(part):
        ids[i, : len(p) + len(c)] = torch.tensor(p + c)
        labels[i, len(p) : len(p) + len(c)] = torch.tensor(c)
    return ids, labels


def scores(model: Any, tokenizer: Any, n: int = 500) -> dict[str, float]:
    """Greedy accuracy on test questions of each kind, as fractions."""
    from cotkit.rewards.answer import accuracy

    generate = generator(model, tokenizer, temperature=0, max_new_tokens=64)
    measured = {}
    kinds = {f"word_problem, {k} steps": (WORDS[k], accuracy()) for k in WORDS}
    for name, (task, reward) in {**kinds, "countdown": (COUNTDOWN, reaches_target)}.items():
        drawn = rows(task, "test", n=n, seed=0)
        texts = [t[0] for t in generate([r["prompt"] for r in drawn], 1)]
        columns = {"answer": [r["answer"] for r in drawn], "meta": [r["meta"] for r in drawn]}
        got = reward(prompts=[r["prompt"] for r in drawn], completions=texts, **columns)
        measured[name] = sum(x or 0.0 for x in got) / n
    return measured


def make(
    folder: str | Path = CHECKPOINTS, *, seeds: Sequence[int] = tuple(STEPS), steps: int | None = None
) -> dict[str, Any]:
    """Write the tokenizer, a half-precision checkpoint per seed and their scores."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for seed in seeds:
        start = time.perf_counter()
        model, tokenizer = pretrain(seed, steps=steps)
        tokenizer.save_pretrained(folder)
        seconds = time.perf_counter() - start
        weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
        save_file(weights, folder / f"tiny-{seed}.safetensors")
        (folder / f"tiny-{seed}.safetensors").chmod(0o644)
        model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        report[str(seed)] = {
            "steps": STEPS.get(seed, 800) if steps is None else steps,
            "seconds": round(seconds),
            **scores(model, tokenizer),
        }
        (folder / f"scores-{seed}.json").write_text(
            json.dumps(report[str(seed)], indent=1) + "\n", encoding="utf-8"
        )
    return report
