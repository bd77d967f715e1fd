"""What a policy-gradient step trains on: the very tokens that were sampled, and what they earned."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isinf, nan
from typing import Any

import torch
from torch import Tensor

from cotkit._check import integers, one_of, positive
from cotkit.lab._generate import _prompt_ids, sample
from cotkit.tokens import FORMATS, Format, model_logps
from cotkit.tokens._encode import PAD, PROMPT, SPECIAL
from cotkit.tokens._segments import IGNORED

_WINDOW = 8  # tokens that are enough to know how the next one is written

Reward = Callable[..., list[float | None]]


def rollout(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    reward: Reward,
    n: int = 8,
    *,
    fmt: Format | str = "think",
    old_logps: bool = True,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    r"""Sample ``n`` completions of every row and score them: one on-policy batch for ``lab.fit``.

    Nothing is decoded and encoded again: the ids that are trained on are the ids that were drawn, an end
    token is a target where the model wrote one, and a completion that ran into the limit has none. As
    everywhere ``labels`` is not shifted, ``mask`` = ``labels != -100``, padding is on the right.

    A callable ``rows`` of ``lab.fit`` may return this batch; returning the same one again is another inner
    epoch on it. What the loss needs besides is put into it by hand::

        batch["advantages"] = advantage.group(batch["rewards"]).flatten()
        batch["ref_logps"] = tokens.model_logps(reference, batch)

    Args:
        model: the policy; it is put back into its mode afterwards.
        tokenizer: its tokenizer; a pad token is needed.
        rows: rows with a ``prompt``, a string or chat messages; the other columns reach the reward.
        reward: reward of TRL's form. It gets ``prompts``, ``completions`` (texts without the end token, or a
            list with one assistant message each where prompts are messages), ``completion_ids`` (with it) and
            the columns, all repeated ``n`` times.
        n: completions of each row, TRL's ``num_generations``.
        fmt: how a thought and its answer are written; it decides ``segments`` and ``steps``, nothing else.
        old_logps: score the tokens under the sampling policy, with one more forward pass. A loop that makes
            one step per batch does without: there the old log-probs are ``logps.detach()``.
        temperature: of sampling. The log-probs are those at temperature 1; with another one the samples
            are off-policy, and the surrogate's ratio does not correct that.
        max_new_tokens: longest completion in tokens, the end token included.
        batch: sequences at a time, in sampling and in scoring.
        seed: of the draw. Equal seeds draw equally, so give every step its own.

    Returns:
        With N = P * n rows, those of one prompt next to each other: ``input_ids``, ``attention_mask``,
        ``labels``, ``mask``, ``segments``, ``steps`` [N, T] (a single turn: no ``turns``), ``group`` [N] the
        number of the prompt, ``truncated`` [N] True where no end came, ``rewards`` [P, n] float32 with NaN
        for a reward's None, ``old_logps`` [N, T] nats without gradient in evaluation mode; all on the model's
        device. ``texts`` [P][n] is for the reader.

    Raises:
        ValueError: no rows, a row without prompt, a prompt without tokens, ``reward`` returned another number
            of values or an infinite one.
        TypeError: ``reward`` cannot be called.

    Source: none (plumbing)

    Example:
        >>> from cotkit import lab
        >>> from cotkit.rewards.answer import accuracy
        >>> rows = lab.rows("word_problem", "train", n=2)
        >>> drawn = lab.rollout(*lab.load("tiny"), rows, accuracy(), n=4, max_new_tokens=40)
        >>> drawn["rewards"].shape, drawn["group"].tolist()
        (torch.Size([2, 4]), [0, 0, 0, 0, 1, 1, 1, 1])
    """
    integers("rollout", n=n)
    positive("rollout", n=n)
    if not callable(reward):
        raise TypeError(f"rollout: expected reward as a function, got {type(reward).__name__}.")
    one_of("rollout", FORMATS, **({"fmt": fmt} if isinstance(fmt, str) else {}))
    bare = next((i for i, row in enumerate(rows) if "prompt" not in row), None)
    if not len(rows) or bare is not None:
        got = "none" if bare is None else f"{sorted(rows[bare])} in row {bare}"
        raise ValueError(f"rollout: expected rows with a prompt, got {got}.")
    prompts = [row["prompt"] for row in rows]
    fronts = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    if not all(fronts):
        raise ValueError("rollout: expected prompts of at least one token, got one of none.")
    drawn = sample(
        model,
        tokenizer,
        prompts,
        n,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch=batch,
        seed=seed,
    )
    written = [ids[kept].tolist() for ids, kept in zip(drawn["ids"], drawn["mask"], strict=True)]
    made = _block(tokenizer, fronts, written, drawn, FORMATS[fmt] if isinstance(fmt, str) else fmt)
    made = {name: value.to(model.device) for name, value in made.items()}
    made["rewards"] = _scores(rows, reward, n, drawn["texts"], written).to(model.device)
    if old_logps:
        made["old_logps"] = _frozen_logps(model, made, batch)
    return {**made, "texts": drawn["texts"]}


def _block(
    tokenizer: Any, fronts: list[list[int]], written: list[list[int]], drawn: dict[str, Any], fmt: Format
) -> dict[str, Tensor]:
    """Prompt and completion of every sample, padded on the right, with the codes of their tokens."""
    count = len(fronts)
    n = len(written) // count
    texts = [text for group in drawn["texts"] for text in group]
    marks = codes(tokenizer, [fronts[i // n] for i in range(len(written))], texts, written, fmt)
    width = max(len(fronts[i // n]) + len(ids) for i, ids in enumerate(written))
    shape = (len(written), width)
    block = {
        "input_ids": torch.full(shape, tokenizer.pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
        "segments": torch.full(shape, PAD, dtype=torch.int8),
        "steps": torch.full(shape, -1),
    }
    for i, ids in enumerate(written):
        front = fronts[i // n]
        begin, end = len(front), len(front) + len(ids)
        block["input_ids"][i, :end] = torch.tensor(front + ids)
        block["attention_mask"][i, :end] = 1
        block["labels"][i, begin:end] = torch.tensor(ids)
        block["segments"][i, :begin] = PROMPT
        block["segments"][i, begin:end] = torch.tensor([segment for segment, _ in marks[i]], dtype=torch.int8)
        block["steps"][i, begin:end] = torch.tensor([step for _, step in marks[i]])
    group = torch.arange(count).repeat_interleave(n)
    mask = block["labels"] != IGNORED
    return {**block, "mask": mask, "group": group, "truncated": drawn["truncated"]}


def codes(
    tokenizer: Any, fronts: list[list[int]], texts: list[str], written: list[list[int]], fmt: Format
) -> list[list[tuple[int, int]]]:
    """Segment and step of every sampled token; ``texts`` are the ids ``written``, without an end token."""
    spelled = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    heads: dict[tuple[int, ...], str] = {}
    found = []
    for i, (front, text, ids) in enumerate(zip(fronts, texts, written, strict=True)):
        usual, offsets = spelled["input_ids"][i], spelled["offset_mapping"][i]
        if ids[: len(usual)] == usual and len(ids) - len(usual) <= 1:
            starts = [start for start, _ in offsets]
        else:  # the model spelled the text in other tokens than the tokenizer would
            starts = _starts(tokenizer, text, ids)
        head = heads.setdefault(tuple(front), tokenizer.decode(front))
        # thinking switched off: the prompt ends with a closed thought, and the completion is the answer
        closed = fmt.open + fmt.close if fmt.close and head.rstrip().endswith(fmt.close) else ""
        found.append(_codes(closed, text, starts, len(ids), fmt))
    return found


def _codes(closed: str, text: str, starts: list[int], length: int, fmt: Format) -> list[tuple[int, int]]:
    """A token has the code of its first visible character; an end token is SPECIAL."""
    marks: list[tuple[int, int]] = []
    for start, end, segment, step in fmt.spans(closed + text):
        marks += [(segment, step)] * (end - start)
    marks = marks[len(closed) :]
    found = []
    for start, end in pairwise([*starts, len(text)]):
        at = next((i for i in range(start, end) if not text[i].isspace()), min(start, len(text) - 1))
        found.append(marks[at] if start < len(text) else (SPECIAL, -1))
    return [*found, *[(SPECIAL, -1)] * (length - len(found))]


def _starts(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """The character at which each token begins, read off what decoding it adds."""
    at, starts = 0, []
    for t, token in enumerate(ids):
        starts.append(min(max(at, 0), len(text)))
        before = ids[max(0, t - _WINDOW) : t]
        at += len(tokenizer.decode([*before, token])) - len(tokenizer.decode(before))
    return starts


def _scores(
    rows: Sequence[dict[str, Any]], reward: Reward, n: int, texts: list[list[str]], written: list[list[int]]
) -> Tensor:
    names = dict.fromkeys(k for row in rows for k in row if k not in ("prompt", "completion"))
    columns = {k: [row.get(k) for row in rows for _ in range(n)] for k in names}
    completions: list[Any] = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, group in zip(rows, texts, strict=True)
        for text in group
    ]
    given = list(
        reward(
            prompts=[row["prompt"] for row in rows for _ in range(n)],
            completions=completions,
            **{**columns, "completion_ids": written},
        )
    )
    if len(given) != len(completions):
        raise ValueError(
            f"rollout: expected {len(completions)} rewards, got {len(given)}. Return one per completion."
        )
    scores = [nan if score is None else float(score) for score in given]
    if any(isinf(score) for score in scores):
        raise ValueError("rollout: expected finite rewards or None, got an infinite one.")
    return torch.tensor(scores).view(len(rows), n)


def _frozen_logps(model: Any, made: dict[str, Tensor], batch: int) -> Tensor:
    """Log-probs under the policy that sampled: no dropout, no gradient."""
    training = model.training
    model.eval()
    parts = []
    for start in range(0, len(made["labels"]), batch):
        piece = {
            name: made[name][start : start + batch] for name in ("input_ids", "attention_mask", "labels")
        }
        parts.append(model_logps(model, piece))
    model.train(training)
    return torch.cat(parts)
