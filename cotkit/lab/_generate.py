"""Sampling in large batches, and the one metric loop."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cotkit._check import integers, positive
from cotkit.lab._setup import show_progress

if TYPE_CHECKING:
    import pandas as pd


def progress(items: Any, description: str) -> Any:
    """A progress bar over ``items``; silent under CI."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=description, disable=not show_progress(), leave=False)


Generate = Callable[[Sequence[Any], int], list[list[str]]]


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    n: int = 1,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    r"""Write ``n`` completions of every prompt; ids and truncation are kept where they matter.

    Args:
        model: a causal language model; it is put back into its mode afterwards.
        tokenizer: its tokenizer; a pad token is needed.
        prompts: strings, continued as they are, or chat messages, put through the chat template.
        n: completions of each prompt.
        temperature: 0 = greedy; above 0 sampling from the whole distribution (no top-k, no top-p).
        max_new_tokens: longest completion in tokens, the end token included.
        batch: sequences at a time; batching is what makes sampling fast.
        seed: seed of the draw; equal calls give equal texts. The global generator is left as it was.

    Returns:
        ``texts`` list of lists [P][n], without the end token, tags kept; ``ids`` [P * n, T] int64, padded
        on the right, end token included; ``mask`` [P * n, T] bool; ``truncated`` [P * n] bool, True where
        no end came.

    Raises:
        ValueError: no prompts, ``n`` or ``max_new_tokens`` below 1, a negative temperature, no pad token.

    Source: none (plumbing)

    Example:
        >>> from cotkit import lab
        >>> model, tokenizer = lab.load("tiny")
        >>> out = lab.sample(model, tokenizer, ["Use 2 3 to reach 5.\\n"], temperature=0, max_new_tokens=30)
        >>> len(out["texts"]), out["ids"].shape[0]
        (1, 1)
    """
    integers("sample", n=n, max_new_tokens=max_new_tokens, batch=batch)
    positive("sample", n=n, max_new_tokens=max_new_tokens, batch=batch)
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError("sample: expected a non-empty list of prompts, got " + repr(prompts)[:40] + ".")
    if temperature < 0:
        raise ValueError(f"sample: expected temperature >= 0 (0 = greedy), got {temperature}.")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "sample: expected a tokenizer with a pad token. Set tokenizer.pad_token = tokenizer.eos_token."
        )
    coded = [_prompt_ids(tokenizer, p) for p in prompts for _ in range(n)]
    order = sorted(range(len(coded)), key=lambda i: len(coded[i]))  # prompts of one length share a batch
    ends = _end_ids(model, tokenizer)
    training = model.training
    model.eval()
    out: dict[int, list[int]] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            block = _left_pad([coded[i] for i in chosen], tokenizer.pad_token_id, model.device)
            how: dict[str, Any] = (
                {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
                if temperature
                else {"do_sample": False}
            )
            written = model.generate(
                **block,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                **how,
            )[:, block["input_ids"].shape[1] :].tolist()
            out |= {i: _cut(ids, ends) for i, ids in zip(chosen, written, strict=True)}
    model.train(training)
    completions = [out[i] for i in range(len(coded))]
    finished = [bool(ids) and ids[-1] in ends for ids in completions]
    texts = [
        tokenizer.decode(ids[:-1] if done else ids) for ids, done in zip(completions, finished, strict=True)
    ]
    longest = max(1, max(map(len, completions)))
    ids = torch.full((len(completions), longest), tokenizer.pad_token_id)
    mask = torch.zeros(len(completions), longest, dtype=torch.bool)
    for i, row in enumerate(completions):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    nested = [texts[i : i + n] for i in range(0, len(texts), n)]
    return {
        "texts": nested,
        "ids": ids,
        "mask": mask,
        "truncated": torch.tensor([not done for done in finished]),
    }


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    return sorted({e for e in [*ends, tokenizer.eos_token_id] if e is not None})


def _left_pad(rows: list[list[int]], pad: int, device: Any) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _cut(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to the first end token, which stays."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def generator(
    model: Any,
    tokenizer: Any,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch: int = 256,
    stop: str | None = None,
    seed: int = 0,
) -> Generate:
    r"""The text view of ``sample``: a callable ``generate(prompts, n) -> list[list[str]]``.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        temperature: 0 = greedy.
        max_new_tokens: longest completion in tokens.
        batch: sequences at a time.
        stop: a text at which every completion is cut; the text itself is kept.
        seed: seed of the first call; call number i draws with ``seed + i``, so repeated calls differ.

    Returns:
        The callable; any other function of that form (vLLM, an API) takes its place.

    Raises:
        ValueError: see ``sample``; raised by the call.

    Source: none (plumbing)

    Example:
        >>> from cotkit import lab
        >>> generate = lab.generator(*lab.load("tiny"), temperature=0, max_new_tokens=30)
        >>> len(generate(["Use 2 3 to reach 5.\\n"], 2)[0])
        2
    """
    calls = [seed]

    def generate(prompts: Sequence[Any], n: int = 1) -> list[list[str]]:
        drawn = sample(
            model,
            tokenizer,
            prompts,
            n,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch=batch,
            seed=calls[0],
        )
        calls[0] += 1
        if stop is None:
            return drawn["texts"]
        return [[t.split(stop)[0] + stop if stop in t else t for t in texts] for texts in drawn["texts"]]

    return generate


def score(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    fmt: Any = "think",
    *,
    mean: bool = True,
    batch: int = 128,
) -> torch.Tensor:
    """Log-probability that a model gives to each row's completion: AFT's score of a chain.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        rows: rows with ``prompt`` and ``completion``; malformed completions (samples often are) count too.
        fmt: how a thought and its answer are written.
        mean: mean over the completion's tokens, the end token included (L125); False: their sum.
        batch: rows at a time; rows of one length share a batch.

    Returns:
        Nats (per token) [N], float32 on the CPU, without gradient.

    Raises:
        ValueError: no rows.

    Source: AFT (2023) arXiv:2309.02144 Eq. 2
    Basis: second-hand
    Differs: nothing.

    Example:
        >>> from cotkit import lab
        >>> rows = lab.rows("word_problem", "test", n=2)
        >>> lab.score(*lab.load("tiny"), rows).shape
        torch.Size([2])
    """
    from cotkit.tokens import encode, model_logps, seq_logps

    if not len(rows):
        raise ValueError("score: expected rows with prompt and completion, got none.")
    order = sorted(
        range(len(rows)), key=lambda i: len(str(rows[i]["prompt"])) + len(str(rows[i]["completion"]))
    )
    training = model.training
    model.eval()
    values = torch.empty(len(rows))
    for start in progress(range(0, len(order), batch), "score"):
        chosen = order[start : start + batch]
        block = encode([rows[i] for i in chosen], tokenizer, fmt, malformed="keep")
        block = {name: value.to(model.device) for name, value in block.items()}
        logps = model_logps(model, block)
        values[chosen] = seq_logps(logps, block["labels"] != -100, mean=mean).float().cpu()
    model.train(training)
    return values


def evaluate(
    generate: Generate,
    rows: Sequence[dict[str, Any]],
    rewards: dict[str, Callable[..., list[float | None]]],
    *,
    n: int = 1,
    chunk: int = 1024,
) -> "pd.DataFrame":
    """Write ``n`` completions of every row and score each with every reward: the only metric loop.

    Args:
        generate: callable ``(prompts, n) -> list[list[str]]``.
        rows: rows with ``prompt``; all other columns reach the rewards.
        rewards: name -> reward of TRL's form; a reward's None becomes NaN.
        n: completions of each row.
        chunk: prompts handed to ``generate`` at a time (a progress bar moves once per chunk).

    Returns:
        DataFrame with one line per completion: ``row``, ``sample``, ``completion`` and a column per reward.

    Raises:
        ValueError: no rows, no rewards, or ``generate`` returned another number of texts.

    Source: none (plumbing)

    Example:
        >>> from cotkit import lab
        >>> right = lambda prompts, completions, *, answer, **columns: [
        ...     float(c == a) for c, a in zip(completions, answer)
        ... ]
        >>> frame = lab.evaluate(
        ...     lambda prompts, n: [["4"] * n for _ in prompts],
        ...     [{"prompt": "2+2=", "answer": "4"}],
        ...     {"right": right},
        ... )
        >>> frame["right"].mean()
        np.float64(1.0)
    """
    import pandas as pd

    if not rows or not rewards:
        raise ValueError(
            f"evaluate: expected rows and rewards, got {len(rows)} rows and {len(rewards)} rewards."
        )
    lines = []
    for start in progress(range(0, len(rows), chunk), "evaluate"):
        part = rows[start : start + chunk]
        written = generate([r["prompt"] for r in part], n)
        if [len(texts) for texts in written] != [n] * len(part):
            raise ValueError(
                f"evaluate: expected {n} completions for each of {len(part)} prompts from generate."
            )
        flat = [(start + i, k, text) for i, texts in enumerate(written) for k, text in enumerate(texts)]
        columns = {
            name: [rows[i][name] for i, _, _ in flat]
            for name in part[0]
            if name not in ("prompt", "completion")
        }
        prompts, completions = [rows[i]["prompt"] for i, _, _ in flat], [text for _, _, text in flat]
        block = pd.DataFrame(flat, columns=["row", "sample", "completion"])
        for name, reward in rewards.items():
            block[name] = pd.Series(reward(prompts=prompts, completions=completions, **columns), dtype=float)
        lines.append(block)
    return pd.concat(lines, ignore_index=True)
