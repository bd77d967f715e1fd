"""Grounding: does a completion point at what is there, quote what was given, resemble what was right before.

Conventions: ``parse`` reads a completion, None = unreadable; ``embed(texts) -> [N, d]`` is any encoder of
texts (an array, a tensor or lists); ``correct`` is a reward, at least 0.5 means right, None gives None.
Functions: ``iou`` boxes and intervals; ``quotes`` excerpts of a context; ``similarity`` to a reference;
``episodic_memory`` near to what succeeded, far from what failed.
"""

import re
import string
from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cotkit._check import at_least, finite, integers, one_of
from cotkit.rewards._call import Reward, functions, prompt_text, verdicts
from cotkit.rewards._text import column_of, text_of
from cotkit.rewards.answer import extract_answer

__all__ = ["episodic_memory", "iou", "quotes", "similarity"]

Embed = Callable[[list[str]], Any]

_TEXT = 200_000  # characters of a completion that are searched
_QUOTES = 1_000  # different excerpts that are looked up


def iou(
    parse: Callable[[str], Sequence[float] | None], *, column: str = "box"
) -> Callable[..., list[float | None]]:
    """A reward for a box or an interval: its intersection with the right one over their union.

    Args:
        parse: text -> (x1, y1, x2, y2) or (start, end), or None when there is none.
        column: name of the column with the right one; text is read with ``parse``.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]`` in [0, 1], logged as ``iou``; 0 for
        what cannot be read, is turned over (x2 < x1) or of another dimension; None where the right one is
        such or has no area. It can be pickled if ``parse`` can.

    Raises:
        ValueError: when called, the column is missing or too short.
        TypeError: ``parse`` cannot be called.

    Source: UniVG-R1 (2025) arXiv:2505.14231
    Basis: authors' code
    Differs: their code gives 0 where the two overlap by one pixel or less.

    Example:
        >>> def box(text):
        ...     return [float(x) for x in text.split()]
        >>> iou(box)(["?"] * 2, ["0 0 4 2", "1 5"], box=[[2, 0, 6, 2], [3, 9]])  # 4 of 12; 2 of 8
        [0.3333333333333333, 0.25]
    """
    functions("iou", parse=parse)
    return partial(_iou, (parse, column))


def _iou(
    how: tuple[Callable[[str], Any], str], /, prompts: Any, completions: Any, **columns: Any
) -> list[float | None]:
    parse, column = how
    result: list[float | None] = []
    for completion, gold in zip(
        completions, column_of("iou", columns, column, len(completions)), strict=True
    ):
        wanted = _box(parse(gold) if isinstance(gold, str) else gold)
        given = _box(parse(text_of(completion)))
        if wanted is None or not _area(wanted):
            result.append(None)
        elif given is None or len(given) != len(wanted):
            result.append(0.0)
        else:
            shared = _area([(max(a, c), min(b, d)) for (a, b), (c, d) in zip(given, wanted, strict=True)])
            result.append(shared / (_area(given) + _area(wanted) - shared))
    return result


_iou.__name__ = "iou"  # what TRL logs; pickle goes by __qualname__


def _box(value: Any) -> list[tuple[float, float]] | None:
    """(low, high) along each axis, or None for what is no box."""
    if isinstance(value, str | bytes) or not hasattr(value, "__len__") or len(value) not in (2, 4):
        return None
    numbers = [v.item() if hasattr(v, "item") else v for v in value]
    if any(isinstance(v, bool) or not isinstance(v, Real) or not isfinite(v) for v in numbers):
        return None
    half = len(numbers) // 2
    sides = [(float(numbers[i]), float(numbers[i + half])) for i in range(half)]
    return sides if all(low <= high for low, high in sides) else None


def _area(sides: Sequence[tuple[float, float]]) -> float:
    area = 1.0
    for low, high in sides:
        area *= max(0.0, high - low)
    return area


def quotes(
    pattern: str, *, column: str = "context", require: bool = True
) -> Callable[..., list[float | None]]:
    r"""A reward for quoting truly: the share of a completion's excerpts that occur in the context.

    Compared are words in lower case without punctuation and articles, from word to word, so that "art" does
    not occur in "party". An excerpt counts once, however often it is repeated; one without words does not
    occur.

    Args:
        pattern: a regular expression that finds excerpts; its first group is the excerpt, or all of it if it
            has none. Give repetitions a bound: the text it searches was written by a model.
        column: name of the column with the contexts.
        require: a completion without excerpts gets 0; False = it gets 1.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]`` in [0, 1], logged as ``quotes``;
        None where the context is no text. Of more than 1,000 different excerpts the rest do not count as
        found. It can be pickled.

    Raises:
        ValueError: ``pattern`` is no regular expression; when called, the column is missing or too short.
        TypeError: ``pattern`` is no text.

    Source: LongRePS (2025) arXiv:2502.20790; RAFT-CoT (2024) arXiv:2407.15569 (``##begin_quote##``);
        WiNGPT-3.0 (2025) arXiv:2505.17387 (ids of facts)
    Basis: authors' code (LongRePS), second-hand
    Differs: theirs is 1 if every excerpt occurs, as a part of a word too, and the released filter only
        counts; a share, and no excerpt gives 0.

    Example:
        >>> context = "Ada wrote the first program. It computed Bernoulli numbers."
        >>> texts = ["[Ada wrote first program] so 1843", "[Ada wrote] and [Bob wrote]", "I just know"]
        >>> quotes(r"\[([^\]]{1,500})\]")(["?"] * 3, texts, context=[context] * 3)
        [1.0, 0.5, 0.0]
    """
    if not isinstance(pattern, str):
        raise TypeError(f"quotes: expected pattern as text, got {type(pattern).__name__}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"quotes: expected a regular expression, got {pattern!r}: {error}.") from None
    return partial(_quotes, (pattern, column, bool(require)))


def _quotes(
    how: tuple[str, str, bool], /, prompts: Any, completions: Any, **columns: Any
) -> list[float | None]:
    pattern, column, require = how
    contexts = column_of("quotes", columns, column, len(completions))
    normal: dict[str, str] = {}
    result: list[float | None] = []
    for completion, context in zip(completions, contexts, strict=True):
        if not isinstance(context, str):
            result.append(None)
            continue
        if context not in normal:
            normal[context] = f" {_normal(context)} "
        found = re.finditer(pattern, text_of(completion)[:_TEXT])
        excerpts = list(dict.fromkeys(_normal((m[1] if m.re.groups else m[0]) or "") for m in found))
        true = sum(bool(e) and f" {e} " in normal[context] for e in excerpts[:_QUOTES])
        result.append(true / len(excerpts) if excerpts else float(not require))
    return result


_quotes.__name__ = "quotes"  # what TRL logs; pickle goes by __qualname__
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’„«»–—…")


def _normal(text: str) -> str:
    words = text.casefold().translate(_NO_PUNCTUATION).split()
    return " ".join(w for w in words if w not in ("a", "an", "the"))


def similarity(
    embed: Callable[[list[str]], Any], *, part: str = "answer", column: str = "answer"
) -> Callable[..., list[float | None]]:
    r"""A reward for meaning the same as a reference: $\max(0, \cos)$ of their embeddings.

    Args:
        embed: texts -> [N, d], one call for all of them.
        part: "answer" the final answer, "thought" what stands before ``</think>``, "all" the whole text.
        column: name of the column with the references (their whole text is embedded).

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]`` in [0, 1], logged as
        ``similarity``; 0 where the part is missing, None where there is no reference. It can be pickled if
        ``embed`` can.

    Raises:
        ValueError: another ``part``; when called, the column is missing or too short, or ``embed`` does not
            give one finite vector for each text.
        TypeError: ``embed`` cannot be called.

    Source: GreenMind (2025) arXiv:2504.16832; MindOmni (2025) arXiv:2505.13031 (a cosine with a reference)
    Basis: reconstructed from the abstract (GreenMind), second-hand
    Differs: unknown.

    Example:
        >>> def embed(texts):  # how often which letter
        ...     return [[text.count(c) for c in "abc"] for text in texts]
        >>> reward = similarity(embed, part="all")
        >>> reward(["?"] * 3, ["aaabbbb", "cc", ""], answer=["b", "b", "b"])
        [0.8, 0.0, 0.0]
    """
    functions("similarity", embed=embed)
    one_of("similarity", ("answer", "thought", "all"), part=part)
    return partial(_similarity, (embed, part, column))


def _similarity(
    how: tuple[Embed, str, str], /, prompts: Any, completions: Any, **columns: Any
) -> list[float | None]:
    embed, part, column = how
    references = column_of("similarity", columns, column, len(completions))
    pairs = []
    result: list[float | None] = [0.0] * len(completions)
    for i, (completion, reference) in enumerate(zip(completions, references, strict=True)):
        given = _part(text_of(completion), part)
        if not isinstance(reference, str) or not reference.strip():
            result[i] = None
        elif given:
            pairs.append((i, given, reference))
    if pairs:
        texts = list(dict.fromkeys(t for _, *both in pairs for t in both))
        vectors = dict(zip(texts, _vectors("similarity", embed, texts), strict=True))
        for i, given, reference in pairs:
            result[i] = max(0.0, _cosine(vectors[given], vectors[reference]))
    return result


_similarity.__name__ = "similarity"  # what TRL logs; pickle goes by __qualname__


def _part(text: str, part: str) -> str:
    if part == "answer":
        return extract_answer(text) or ""
    if part == "thought":
        head, closed, _ = text.rpartition("</think>")
        return head.replace("<think>", "", 1).strip() if closed else ""
    return text.strip()


def _vectors(fn: str, embed: Embed, texts: list[str]) -> Tensor:
    given = embed(texts)
    vectors = (given.detach() if isinstance(given, Tensor) else torch.as_tensor(given)).to(
        "cpu", torch.float64
    )
    if vectors.dim() != 2 or len(vectors) != len(texts) or not bool(vectors.isfinite().all()):
        raise ValueError(
            f"{fn}: expected one finite vector for each of {len(texts)} texts, "
            f"got {list(vectors.shape)} from embed."
        )
    return vectors


def _cosine(a: Tensor, b: Tensor) -> float:
    size = float(a.norm() * b.norm())
    return min(1.0, float(a @ b) / size) if size > 0 else 0.0


class _Episodes(NamedTuple):
    embed: Embed
    correct: Reward
    memory: dict[str, Any]
    exploit: float
    explore: float
    k: int
    window: int
    warmup: int
    capacity: int


def episodic_memory(
    embed: Callable[[list[str]], Any],
    correct: Reward,
    *,
    memory: dict[str, Any],
    exploit: float = 1.0,
    explore: float = 1.0,
    k: int = 1,
    window: int = 100,
    warmup: int = 50,
    capacity: int = 100,
) -> Callable[..., list[float | None]]:
    r"""A reward for being near what succeeded and far from what failed: all-wrong groups still learn.

    $\beta_s\,N\big(-\lVert e - c \rVert\big) + \beta_e\,N\big(1 - \max_b \cos(e, b)\big)$: e embeds the
    completion, c is the mean of the successes stored for the k nearest questions, b runs over the failures
    stored for them, and N scales to [0, 1] by the least and the greatest of the last ``window`` values.

    Args:
        embed: texts -> [N, d], one call for prompts and completions.
        correct: the reward that says which answers are right (a success is stored) or wrong (a failure is).
        memory: a dict of the caller's, empty at first; what is remembered is in it, and nowhere else.
        exploit: $\beta_s$, weight of the closeness to successes.
        explore: $\beta_e$, weight of the distance from failures; 0 gives Memory-R.
        k: how many of the nearest stored questions are read.
        window: how many of the latest values are compared; at least those of one call are.
        warmup: calls during which ``explore`` counts as 0.
        capacity: completions kept for each question, the oldest leave.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``, logged as ``episodic_memory``, in
        [0, exploit + explore]; None where ``correct`` is None, and such a completion is not stored. Without
        a stored success the first term is 0, without a stored failure the second is ``explore``; values that
        are all alike give 0. The order of a call's completions does not matter. Pickled, it takes a copy of
        ``memory`` along: every process remembers by itself.

    Raises:
        ValueError: ``k``, ``window`` or ``capacity`` below 1, ``warmup`` below 0, a weight not finite; when
            called, ``embed`` does not give one finite vector for each text.
        TypeError: ``memory`` is no dict, ``embed`` or ``correct`` cannot be called, a value is no number.

    Source: Memory-R+ (2025) arXiv:2504.02273
    Basis: authors' code
    Differs: a call is scored against what was stored before it and then written; theirs writes each
        completion before it scores it, so that every failure is its own nearest one and gets 0. Theirs
        takes the prompt of a call's first completion for all, and gives the bare distance where all values
        are alike.

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> def embed(texts):
        ...     return [[text.count(c) for c in "+-#?"] for text in texts]
        >>> memory = {}
        >>> reward = episodic_memory(embed, accuracy(), memory=memory, explore=0.0)
        >>> reward(["1?"], ["1+1 #### 2"], answer=["2"])  # nothing stored yet
        [0.0]
        >>> reward(
        ...     ["1?"] * 2, ["1+1 #### 3", "1-1-1 #### 3"], answer=["2"] * 2
        ... )  # like the success, unlike it
        [1.0, 0.0]
    """
    functions("episodic_memory", embed=embed, correct=correct)
    if not isinstance(memory, dict):
        raise TypeError(
            f"episodic_memory: expected memory as a dict, got {type(memory).__name__}. Pass {{}}."
        )
    finite("episodic_memory", exploit=exploit, explore=explore)
    integers("episodic_memory", k=k, window=window, warmup=warmup, capacity=capacity)
    at_least("episodic_memory", 1, k=k, window=window, capacity=capacity)
    at_least("episodic_memory", 0, warmup=warmup)
    how = _Episodes(embed, correct, memory, exploit, explore, k, window, warmup, capacity)
    return partial(_episodic_memory, how)


def _episodic_memory(how: _Episodes, /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    n = len(completions)
    asked = [prompt_text(p) for p in prompts] if prompts is not None else []
    if len(asked) != n:
        raise ValueError(f"episodic_memory: expected {n} prompts, got {len(asked)}. Pass one per completion.")
    good = verdicts("episodic_memory", how.correct, prompts, completions, columns)
    known = [i for i in range(n) if good[i] is not None]
    result: list[float | None] = [None] * n
    if not known:
        return result
    said = [text_of(c) for c in completions]
    texts = list(dict.fromkeys([asked[i] for i in known] + [said[i] for i in known]))
    vectors = dict(zip(texts, _vectors("episodic_memory", how.embed, texts), strict=True))
    near: dict[int, float] = {}
    new: dict[int, float] = {}
    nearest = {
        kind: _nearest(how, kind, {asked[i] for i in known}, vectors) for kind in ("success", "failure")
    }
    for i in known:
        e, wins, losses = vectors[said[i]], nearest["success"][asked[i]], nearest["failure"][asked[i]]
        if wins is not None:
            near[i] = -float((e - wins.mean(0)).norm())
        if losses is not None:
            new[i] = 1 - max(_cosine(e, b) for b in losses)
    calls = how.memory["calls"] = how.memory.get("calls", 0) + 1
    closeness, novelty = _scaled(how, "near", near), _scaled(how, "new", new)
    explore = how.explore if calls > how.warmup else 0.0
    for i in known:
        result[i] = how.exploit * closeness.get(i, 0.0) + explore * novelty.get(i, 1.0)
        stored = how.memory.setdefault("success" if good[i] else "failure", {})
        entry = stored.setdefault(asked[i], {"question": vectors[asked[i]], "said": []})
        entry["said"] = [*entry["said"], vectors[said[i]]][-how.capacity :]
    return result


_episodic_memory.__name__ = "episodic_memory"  # what TRL logs; pickle goes by __qualname__


def _nearest(
    how: _Episodes, kind: str, asked: set[str], vectors: dict[str, Tensor]
) -> dict[str, Tensor | None]:
    """What is stored for the k nearest questions of each prompt, [M, d]; None where there is nothing."""
    stored = list(how.memory.get(kind, {}).values())
    if not stored:
        return dict.fromkeys(asked)
    keys = torch.nn.functional.normalize(torch.stack([s["question"] for s in stored]), dim=-1)
    found: dict[str, Tensor | None] = {}
    for prompt in asked:
        close = (keys @ vectors[prompt]).topk(min(how.k, len(stored))).indices.tolist()
        found[prompt] = torch.stack([v for j in close for v in stored[j]["said"]])
    return found


def _scaled(how: _Episodes, kind: str, raw: dict[int, float]) -> dict[int, float]:
    """Min-max of the values of this call among the last ``window`` of the memory."""
    past = [*how.memory.get(kind, []), *raw.values()][-max(how.window, len(raw)) :]
    how.memory[kind] = past
    low, high = min(past, default=0.0), max(past, default=0.0)
    return {i: (value - low) / (high - low) if high > low else 0.0 for i, value in raw.items()}
