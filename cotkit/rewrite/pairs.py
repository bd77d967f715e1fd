"""Rows for preference losses: scored samples of one question become ranked rows or pairs.

Conventions: a loss on candidates reads flat rows with a ``group`` number (the question), a ``rank`` (0 =
best, ties allowed) and ``gold`` (1 = the reference completion); whole groups stay in one batch. A loss on
pairs reads rows with ``prompt``, ``chosen`` and ``rejected``.
Functions: ``pairs`` chosen and rejected of one prompt's samples; ``prefix_pairs`` the same for each step of a
tree of thoughts; ``ranked`` turns what ``bootstrap.reject.sample_and_score`` returns into ranked rows.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Any

from cotkit._check import at_least, finite, integers, one_of

__all__ = ["pairs", "prefix_pairs", "ranked"]


def ranked(
    groups: Sequence[dict[str, Any]],
    *,
    threshold: float = 1.0,
    most: int | None = None,
    reference: bool = True,
    keep_one_sided: bool = True,
    rng: random.Random | None = None,
) -> list[dict[str, Any]]:
    """Flat rows of a group each: the reference, then the distinct right and wrong samples.

    Args:
        groups: rows with ``completions``, ``rewards`` and ``duplicate`` beside ``prompt`` and
            ``completion``, as ``bootstrap.reject.sample_and_score`` returns them. Samples whose reward is
            None are left out.
        threshold: a sample is right (rank 0) if its reward is at least this, else wrong (rank 1).
        most: most right and most wrong samples of a group, the reference not counted; drawn by ``rng``.
            None: all.
        reference: put the row's own ``completion`` first, as a right chain (L125 counts it among the
            positives).
        keep_one_sided: keep groups without a right or without a wrong chain (their alignment loss is 0).
        rng: draws which samples stay when there are more than ``most``.

    Returns:
        Rows in the order of ``groups`` with the group's other columns and ``completion``, ``group`` (0, 1,
        ...), ``rank`` (0 right, 1 wrong), ``gold`` (1 for the reference, else 0) and ``reward``.

    Raises:
        ValueError: a group without samples, ``most`` below 1, or ``most`` without ``rng``.

    Source: AFT (2023) arXiv:2309.02144 §3
    Basis: second-hand; that duplicates are dropped is our reading.
    Differs: the paper does not say how many samples of a group are kept; ``most`` is ours.

    Example:
        >>> group = {
        ...     "prompt": "1+1=",
        ...     "completion": "2",
        ...     "completions": ["2 ", "3", "3"],
        ...     "rewards": [1.0, 0.0, 0.0],
        ... }
        >>> rows = ranked([group | {"duplicate": [False, False, True]}])
        >>> [(r["completion"], r["rank"], r["gold"]) for r in rows]
        [('2', 0, 1), ('2 ', 0, 0), ('3', 1, 0)]
    """
    finite("ranked", threshold=threshold)
    if most is not None:
        integers("ranked", most=most)
        at_least("ranked", 1, most=most)
        if rng is None:
            raise ValueError("ranked: expected rng with most, got None. Pass random.Random(seed).")
    rows: list[dict[str, Any]] = []
    number = 0
    for i, group in enumerate(groups):
        lengths = {len(group.get(name, ())) for name in ("completions", "rewards", "duplicate")}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"ranked: expected completions, rewards and duplicate of one length > 0 in group {i}."
            )
        sides: tuple[list, list] = ([], [])
        for text, reward, again in zip(
            group["completions"], group["rewards"], group["duplicate"], strict=True
        ):
            if not again and reward is not None and not (reference and text == group["completion"]):
                sides[0 if reward >= threshold else 1].append((text, reward))
        if most is not None and rng is not None:
            sides = tuple(rng.sample(side, min(most, len(side))) for side in sides)  # type: ignore[assignment]
        if not keep_one_sided and not (sides[1] and (reference or sides[0])):
            continue
        shared = {
            k: v for k, v in group.items() if k not in ("completion", "completions", "rewards", "duplicate")
        }
        if reference:
            gold = {"completion": group["completion"], "rank": 0, "gold": 1, "reward": threshold}
            rows.append(shared | gold | {"group": number})
        for rank, side in enumerate(sides):
            for text, reward in side:
                rows.append(
                    shared | {"completion": text, "rank": rank, "gold": 0, "reward": reward, "group": number}
                )
        number += bool(reference or sides[0] or sides[1])
    return rows


def pairs(
    completions: Sequence[str],
    scores: Sequence[float | int | None],
    *,
    min_gap: float = 0.0,
    max_pairs: int | None = None,
    choose: str = "gap",
    distance: Callable[[str, str], float] | None = None,
) -> list[dict[str, Any]]:
    """Chosen and rejected completions from scored samples of one prompt.

    Every two samples whose scores differ by at least ``min_gap`` make a pair, the higher one chosen; equal
    scores and equal texts never do. ``max_pairs`` keeps the first of them: best against worst, or the most
    dissimilar. The score is what the recipe prefers: right or wrong (DPO-ST, Guardrail CoT), a judge
    (SELF-JUDGE), a process reward (SIPF), the length of the thought (ThinkPO).

    Args:
        completions: samples of one prompt.
        scores: one number each, larger is better; None leaves the sample out. True and False are 1 and 0.
        min_gap: least difference of the scores, >= 0 (SIPF's eta, iTool's 0.1).
        max_pairs: how many pairs to keep. None: all. 1 with "gap" is best against worst; DPO-ST keeps the 3
            most dissimilar.
        choose: order of the pairs. "gap": largest difference of scores first. "dissimilar": largest
            ``distance`` first. Ties keep the order of the samples.
        distance: ``distance(chosen, rejected)``, larger is less alike. None: 1 - Jaccard similarity of the
            sets of words, as white space splits them.

    Returns:
        Rows with ``chosen``, ``rejected`` and ``gap``, the difference of the scores (a weight or an offset
        for `losses.preference.dpo`); add the prompt: ``[row | pair for pair in pairs(...)]``. Empty if
        nothing differs.

    Raises:
        ValueError: lengths differ, an unknown ``choose``, ``min_gap < 0``, ``max_pairs < 1``, a score that is
            not finite.
        TypeError: a score that is no number.

    Source: DPO-ST (2024) arXiv:2407.18248 the three most dissimilar
        SIPF (2024) arXiv:2412.08393 score gap; ThinkPO (2025) arXiv:2502.13173 length as score
        Guardrail CoT (2025) arXiv:2501.13080; SELF-JUDGE (2024) arXiv:2402.11253 two samples, a judge
    Basis: authors' code (DPO-ST, ThinkPO, SELF-JUDGE); SIPF second-hand; Guardrail CoT from the abstract.
    Differs: DPO-ST splits into the tokens of its model, shuffles before it sorts, and first drops samples of
        one side that are more than 0.7 alike; pass ``distance`` and thinned samples for that.

    Example:
        >>> pairs(["4", "5", "22"], [1.0, 0.0, 0.5], max_pairs=1)
        [{'chosen': '4', 'rejected': '5', 'gap': 1.0}]
    """
    if len(completions) != len(scores):
        raise ValueError(
            f"pairs: expected one score per completion, got {len(completions)} completions and "
            f"{len(scores)} scores."
        )
    at_least("pairs", 0, min_gap=min_gap)
    one_of("pairs", ("gap", "dissimilar"), choose=choose)
    if max_pairs is not None:
        integers("pairs", max_pairs=max_pairs)
        at_least("pairs", 1, max_pairs=max_pairs)
    for score in scores:
        if score is not None:
            finite("pairs", score=float(score) if isinstance(score, bool) else score)
    drawn = zip(completions, scores, strict=True)
    samples = dict.fromkeys((text, float(score)) for text, score in drawn if score is not None)
    compared = _compared(samples, min_gap)
    if choose == "gap":
        compared.sort(key=lambda pair: pair[3] - pair[1])
    else:
        apart = distance or _words_apart
        compared.sort(key=lambda pair: -apart(pair[0], pair[2]))
    return [{"chosen": a, "rejected": b, "gap": high - low} for a, high, b, low in compared[:max_pairs]]


def _compared(samples: Iterable[tuple[str, float]], min_gap: float) -> list[tuple[str, float, str, float]]:
    """(better, its score, worse, its score) for all samples that differ in text and enough in score."""
    kept = list(samples)
    return [
        (a, high, b, low)
        for a, high in kept
        for b, low in kept
        if high > low and high - low >= min_gap and a != b
    ]


def _words_apart(a: str, b: str) -> float:
    """1 - Jaccard similarity of the sets of words; 0 for two texts without a word."""
    left, right = set(a.split()), set(b.split())
    return 1 - len(left & right) / len(left | right) if left | right else 0.0


def prefix_pairs(
    prompt: str,
    tree: Mapping[str, Any] | Sequence[tuple[Sequence[str], float | int]],
    *,
    min_gap: float = 0.0,
    min_chosen: float | None = None,
    per_node: str = "all",
    separator: str = "\n",
) -> list[dict[str, Any]]:
    """Step-wise pairs: wherever a tree of thoughts branches, the better next step against its siblings.

    The steps that lead there are part of the prompt, so the two sides of a pair differ in one thought and the
    loss sees nothing else. CPO: value 1 for a thought on a selected path, else 0. RaCT: the gold order with
    value 1 and a sampled one with 0 give one pair, at the first wrong pick.

    Args:
        prompt: what every path continues, with an opening tag if there is one.
        tree: ``{"text": step, "value": number, "children": [...]}``, nested; text and value of the root do
            not matter, a value may be None (in no pair). Or a list of (steps, value) paths: equal prefixes
            become one node, whose value is the best of the paths through it.
        min_gap: least difference of the two values, >= 0. iTool: 0.1. Equal values never make a pair.
        min_chosen: least value of the chosen step; None: any. iTool: -0.3.
        per_node: "all": every better child against every worse one (CPO). "extremes": best against worst
            child only (iTool).
        separator: written behind each step of the prefix.

    Returns:
        Rows with ``prompt``, ``chosen``, ``rejected``, ``gap`` and ``depth`` (steps in the prefix), from the
        root down. Empty if no node has children of different value.

    Raises:
        ValueError: an unknown ``per_node``, ``min_gap < 0``, a node without ``text``, a value that is not
            finite.
        TypeError: values, ``min_gap`` or ``min_chosen`` that are no numbers.

    Source: CPO (2024) arXiv:2406.09136 clean_dataset.py of the released code
        iTool (2025) arXiv:2501.09766 mcts_vllm.py of the released code, per_node="extremes"
        RaCT (2024) arXiv:2412.14405 pairs on ranking prefixes
    Basis: authors' code (CPO, iTool); RaCT reconstructed from the abstracts.
    Differs: CPO's code also drops a sibling whose text is on a selected path *elsewhere* at that depth, puts
        everything in lower case and drops near copies; iTool's drops pairs whose words overlap by more than
        0.95.

    Example:
        >>> paths = [(["3+4=7", "7*2=14"], 1.0), (["3+4=7", "7*2=15"], 0.0)]
        >>> prefix_pairs("q ", paths, separator=" ")[0]["prompt"]
        'q 3+4=7 '
        >>> [(p["chosen"], p["rejected"], p["depth"]) for p in prefix_pairs("q ", paths)]
        [('7*2=14', '7*2=15', 1)]
    """
    at_least("prefix_pairs", 0, min_gap=min_gap)
    one_of("prefix_pairs", ("all", "extremes"), per_node=per_node)
    if min_chosen is not None:
        finite("prefix_pairs", min_chosen=min_chosen)
    made: list[dict[str, Any]] = []
    waiting: list[tuple[Mapping[str, Any], list[str]]] = [
        (tree if isinstance(tree, Mapping) else _folded(tree), [])
    ]
    while waiting:  # no recursion: a chain may have more steps than Python has frames
        node, prefix = waiting.pop()
        children = list(node.get("children") or ())
        values = _values(children, prefix)
        compared = _compared(values.items(), min_gap)
        if per_node == "extremes" and compared:
            best, worst = max(values.values()), min(values.values())
            compared = [pair for pair in compared if pair[1] == best and pair[3] == worst][:1]
        start = prompt + "".join(step + separator for step in prefix)
        made += [
            {"prompt": start, "chosen": a, "rejected": b, "gap": high - low, "depth": len(prefix)}
            for a, high, b, low in compared
            if min_chosen is None or high >= min_chosen
        ]
        waiting += [(child, [*prefix, child["text"]]) for child in reversed(children)]
    return made


def _values(children: Sequence[Mapping[str, Any]], prefix: list[str]) -> dict[str, float]:
    """Value of each step that continues the prefix; of two with one text the better one."""
    values: dict[str, float] = {}
    for child in children:
        if "text" not in child:
            raise ValueError(
                f"prefix_pairs: expected text in every node, got a child of {prefix} without. "
                f'A node is {{"text": step, "value": number, "children": [...]}}.'
            )
        value = child.get("value")
        if value is not None:
            finite("prefix_pairs", value=float(value) if isinstance(value, bool) else value)
            values[child["text"]] = max(float(value), values.get(child["text"], -inf))
    return values


def _folded(paths: Sequence[tuple[Sequence[str], float | int]]) -> dict[str, Any]:
    """One tree out of (steps, value) paths; a node is worth the best path through it."""
    root: dict[str, Any] = {"text": "", "children": {}}
    for steps, value in paths:
        if isinstance(steps, str):
            raise ValueError(
                "prefix_pairs: expected the steps of a path as a list, got one string. "
                "Split it first, e.g. with Format.parse(text).steps."
            )
        finite("prefix_pairs", value=float(value) if isinstance(value, bool) else value)
        node = root
        for step in steps:
            node = node["children"].setdefault(step, {"text": step, "value": -inf, "children": {}})
            node["value"] = max(node["value"], float(value))
    waiting = [root]
    while waiting:
        node = waiting.pop()
        node["children"] = list(node["children"].values())
        waiting += node["children"]
    return root
