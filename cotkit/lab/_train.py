"""The small training loop of the notebooks; real runs hand the same rows and loss to TRL."""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cotkit._check import between, integers, one_of, positive
from cotkit.interop._rows import parts
from cotkit.lab._generate import progress
from cotkit.tokens import Format, encode, model_logps

if TYPE_CHECKING:
    import pandas as pd

Batch = dict[str, Tensor]
LossFn = Callable[[Any, Batch, Any], Tensor]
Forward = Callable[[Any, Batch], Any]


def fit(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]] | Callable[[int], Sequence[dict[str, Any]] | dict[str, Any]],
    loss: LossFn,
    *,
    steps: int,
    lr: float = 3e-4,
    batch: int = 64,
    seed: int = 0,
    fmt: Format | str = "think",
    columns: Sequence[str] = (),
    unit: str = "token",
    microbatch: int | None = None,
    prepare: Callable[[Batch, int], Batch] | None = None,
    forward: Forward | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    max_length: int | None = None,
    malformed: str = "keep",
    engine: str = "lab",
    description: str = "fit",
) -> "pd.DataFrame":
    """Train ``model`` in place: AdamW, linear warm-up, cosine to zero, clipped gradients; one seed, one run.

    Args:
        model: a causal language model (tiny, peft, 4-bit ...); parameters that need gradients are trained.
        tokenizer: its tokenizer.
        rows: prompt-completion rows, shuffled anew every epoch; or a callable ``step -> rows`` for
            on-policy work, which may also return an encoded batch (``lab.rollout``): its tensors reach
            the loss as they are, and returned again it is another epoch on the same samples. With
            ``unit="group"`` rows carry a ``group`` number, and rows of one number stay together.
        loss: ``loss(logps [B, T], batch, denom) -> scalar``; ``batch`` holds ``mask``, ``segments``,
            ``steps``, ``turns``, the ``columns`` and, for groups, ``group``.
        steps: optimiser steps.
        lr: highest learning rate.
        batch: rows, or groups, a step.
        seed: order of the rows, and dropout.
        fmt: how a thought and its answer are written.
        columns: row entries that the loss wants: a number each ([B]), or one number per token ([B, T]).
        unit: what ``denom`` counts over the batch: "token", "sequence" or "group".
        microbatch: most rows in memory with gradient: the gradient of the loss with respect to the
            log-probs is taken first, then each part of the batch is run again (exact, about a third more
            time). None: one pass.
        prepare: changes an encoded batch before the forward pass, e.g. to corrupt its inputs; gets the step
            number. An entry ``inputs_embeds`` [B, T, D] is read in place of the input ids.
        forward: ``forward(model, batch) -> out``, where a loss wants more than the log-probs of the labels
            (several heads, a penalty beside them): ``out`` takes their place in ``loss``. None:
            ``tokens.model_logps`` with its graph.
        warmup: share of the steps.
        weight_decay: of AdamW.
        clip: largest gradient norm.
        max_length: longest row in tokens.
        malformed: what ``tokens.encode`` does with a completion that does not follow ``fmt``.
        engine: "lab" is this loop; "trl" hands the same rows and loss to TRL's trainer (no ``prepare``, no
            ``forward``, no callable rows), where accumulation, checkpoints, several processes and logging
            live.
        description: name of the progress bar.

    Returns:
        DataFrame with a line per step: ``loss``, ``grad_norm`` before clipping, ``lr``, ``tokens`` read
        (padding not counted), ``seconds`` since the start.

    Raises:
        ValueError: an argument out of range, no rows, a missing column, ``forward`` with ``microbatch``, or a
            loss that is not finite.

    Source: none (plumbing)

    Example:
        >>> from cotkit import lab
        >>> from cotkit.losses.sft import nll
        >>> model, tokenizer = lab.load("tiny")
        >>> rows = lab.rows("word_problem", "train", n=8)
        >>> history = lab.fit(
        ...     model, tokenizer, rows, lambda logps, batch, denom: nll(logps, batch["mask"]), steps=2
        ... )
        >>> len(history)
        2
    """
    integers("fit", steps=steps, batch=batch, seed=seed)
    positive("fit", steps=steps, batch=batch, lr=lr, clip=clip)
    between("fit", 0, 1, warmup=warmup)
    one_of("fit", ("token", "sequence", "group"), unit=unit)
    one_of("fit", ("lab", "trl"), engine=engine)
    if not callable(rows) and not len(rows):
        raise ValueError("fit: expected rows to train on, got none.")
    if engine == "trl":
        if prepare is not None or forward is not None or callable(rows):
            raise ValueError(
                "fit: expected a list of rows, no prepare and no forward with engine='trl'. Use engine='lab'."
            )
        from cotkit.interop.trl import fit as trl_fit

        return trl_fit(
            model,
            tokenizer,
            rows,
            loss,
            steps=steps,
            lr=lr,
            batch=batch,
            seed=seed,
            fmt=fmt,
            columns=columns,
            unit=unit,
            microbatch=microbatch,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            max_length=max_length,
            malformed=malformed,
        )
    if forward is not None and microbatch is not None:
        raise ValueError("fit: expected no microbatch with forward, got both. Two passes need log-probs.")
    import pandas as pd

    def encoded(chosen: Sequence[dict[str, Any]]) -> Batch:
        return _encode(chosen, tokenizer, fmt, columns, unit, max_length, malformed)

    draw = _drawer(rows, encoded, batch, unit, random.Random(seed))
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("fit: expected parameters that need gradients, got none. Is every layer frozen?")
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    history, start, training = [], time.perf_counter(), model.training
    model.train()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for step in progress(range(steps), description):
            now = draw(step)
            now = {name: value.to(model.device) for name, value in now.items()}
            if prepare is not None:
                now = {name: value.to(model.device) for name, value in prepare(now, step).items()}
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step, steps, warmup)
            value = backward(model, now, loss, count(now, unit), microbatch=microbatch, forward=forward)
            norm = float(torch.nn.utils.clip_grad_norm_(trained, clip))
            if not math.isfinite(value) or not math.isfinite(norm):
                raise ValueError(
                    f"fit: expected a finite loss and gradient, got {value} and {norm} at step {step}."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.append(
                {
                    "step": step,
                    "loss": value,
                    "grad_norm": norm,
                    "lr": optimizer.param_groups[0]["lr"],
                    "tokens": int(now["attention_mask"].sum()),
                    "seconds": time.perf_counter() - start,
                }
            )
    model.train(training)
    return pd.DataFrame(history)


def count(batch: Batch, unit: str) -> int:
    """Tokens with a target, rows with at least one, or groups of a batch: a loss's ``denom``, at least 1."""
    if unit == "group":
        return max(1, int(batch["group"].max()) + 1)
    counted = batch["mask"].sum(1)
    return max(1, int(counted.sum() if unit == "token" else (counted > 0).sum()))


def backward(
    model: Any,
    batch: Batch,
    loss: LossFn,
    denom: Any,
    *,
    microbatch: int | None = None,
    forward: Forward | None = None,
) -> float:
    """Accumulate the gradients of one loss; in two exact passes when the rows do not fit at once."""
    rows = batch["input_ids"].shape[0]
    if microbatch is None or rows <= microbatch:
        out = model_logps(model, batch, grad=True) if forward is None else forward(model, batch)
        value = loss(out, batch, denom)
        value.backward()
        return float(value.detach())
    cuts = parts(batch, microbatch)
    read = {"input_ids", "inputs_embeds", "attention_mask", "labels"} & batch.keys()
    pieces = [{name: batch[name][part, :width] for name in read} for part, width in cuts]
    full = batch["labels"].shape[1]
    cuda = model.device.type == "cuda"
    states, logps = [], []
    for piece in pieces:
        states.append((torch.get_rng_state(), torch.cuda.get_rng_state(model.device) if cuda else None))
        found = model_logps(model, piece, grad=False)
        logps.append(pad(found, (0, full - found.shape[1])))
    scores = torch.cat(logps).detach().requires_grad_()
    value = loss(scores, batch, denom)
    (slope,) = torch.autograd.grad(value, scores)
    for piece, (part, width), (state, device_state) in zip(pieces, cuts, states, strict=True):
        torch.set_rng_state(state)  # the same dropout as in the first pass
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, model.device)
        model_logps(model, piece, grad=True).backward(slope[part, :width])
    return float(value.detach())


def _schedule(step: int, steps: int, warmup: float) -> float:
    rising = warmup * steps
    if step + 1 <= rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def _encode(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    fmt: Format | str,
    columns: Sequence[str],
    unit: str,
    max_length: int | None,
    malformed: str,
) -> Batch:
    block = encode(rows, tokenizer, fmt, max_length=max_length, malformed=malformed)
    block["mask"] = block["labels"] != -100
    width = block["input_ids"].shape[1]
    for name in (*columns, *(["group"] if unit == "group" and "group" not in columns else [])):
        missing = next((i for i, row in enumerate(rows) if name not in row), None)
        if missing is not None:
            raise ValueError(f"fit: expected column {name!r} in every row, got none in row {missing}.")
        block[name] = _column([row[name] for row in rows], width)
    return block


def _column(values: list[Any], width: int) -> Tensor:
    if all(
        isinstance(v, list | tuple | Tensor) and not (isinstance(v, Tensor) and v.dim() == 0) for v in values
    ):
        padded = torch.zeros(len(values), width)
        for i, v in enumerate(values):
            row = torch.as_tensor(v, dtype=torch.float32)[:width]
            padded[i, : len(row)] = row
        return padded
    return torch.tensor(values)


def _drawer(
    rows: Any, encoded: Callable[[Sequence[dict]], Batch], batch: int, unit: str, rng: random.Random
) -> Callable[[int], Batch]:
    """A callable ``step -> batch``: shuffled epochs over encoded rows (whole groups), or a fresh batch."""
    if callable(rows):

        def fresh(step: int) -> Batch:
            given = rows(step)
            return _renumber(_ready(given) if isinstance(given, Mapping) else _trim(encoded(list(given))))

        return fresh
    block = encoded(rows)
    if unit == "group":
        members: dict[Any, list[int]] = {}
        for i, number in enumerate(block["group"].tolist()):
            members.setdefault(number, []).append(i)
        items = list(members.values())
    else:
        items = [[i] for i in range(len(rows))]
    queue: list[list[int]] = []

    def draw(_: int) -> Batch:
        chosen: list[list[int]] = []
        while len(chosen) < batch:
            if not queue:
                queue.extend(rng.sample(items, len(items)))
            chosen.append(queue.pop())
        index = torch.tensor([i for item in chosen for i in item])
        taken = {name: value[index] for name, value in block.items()}
        if "group" in taken:  # a group drawn twice in one step counts twice
            taken["group"] = torch.tensor([k for k, item in enumerate(chosen) for _ in item])
        return _trim(taken)

    return draw


def _ready(batch: Mapping[str, Any]) -> Batch:
    """A batch that came encoded: its tensors (texts are for the reader), with the mask of its labels."""
    missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in batch]
    if missing:
        raise ValueError(
            f"fit: expected an encoded batch from rows(step), got one without {', '.join(missing)}. "
            f"Use lab.rollout or tokens.encode, or return a list of rows."
        )
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return {"mask": tensors["labels"] != -100, **tensors}


def _trim(batch: Batch) -> Batch:
    width = int(batch["attention_mask"].sum(1).max())
    full = batch["input_ids"].shape[1]
    return {n: v[:, :width] if v.dim() == 2 and v.shape[1] == full else v for n, v in batch.items()}


def _renumber(batch: Batch) -> Batch:
    if "group" in batch:
        order = {g: k for k, g in enumerate(dict.fromkeys(batch["group"].tolist()))}
        batch["group"] = torch.tensor([order[g] for g in batch["group"].tolist()])
    return batch
