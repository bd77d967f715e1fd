"""Arithmetic with an exact chain of thought: story problems and reaching a target number.

Conventions: a task is a function ``(rng, **difficulty) -> row``; nothing else is random. A row holds
``prompt``, ``completion`` (think format), ``answer``, ``steps`` (the lines of the thought), ``states`` (the
value that each line ends in), ``paths`` (some of the other valid chains of the same question, as line
lists) and ``meta`` (difficulty).
Functions: ``word_problem`` people who hold things, many valid orders; ``countdown`` numbers to a target.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from cotkit._check import between, integers, one_of
from cotkit.tokens import FORMATS

__all__ = ["countdown", "reaches_target", "word_problem"]

_NAMES = ("Ann", "Bob", "Cem", "Dia", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea")
_ITEMS = ("apples", "books", "coins", "cards", "shells", "stamps", "beads", "pens")
_MORE = ("gets {} more", "finds {} more", "buys {} more")
_LESS = ("gives away {}", "loses {}", "sells {}")
_TWICE = ("doubles them", "gets as many again")
_ASIDE = (
    "{name} is {n} years old.",
    "{name} has {n} cousins.",
    "{name} lives at number {n}.",
    "{name} has {n} hats.",
)
_PATHS = ("parts", "interleave", "running")
_EQUATION = re.compile(r"(\d{1,9})([-+*/])(\d{1,9})=(\d{1,9})")
_STYLES = ("terse", "normal", "verbose", "check")

# A holding is (name, start, change): change > 0 more, < 0 less, None nothing, 0 means doubled.
_Holding = tuple[str, int, int | None]


def word_problem(
    rng: random.Random,
    *,
    steps: tuple[int, int] = (2, 4),
    operand: int = 20,
    style: str = "normal",
    detail: int = 3,
    path: str = "random",
    distractors: int = 0,
    answerable: float = 1.0,
    cue: float = 0.0,
    implicit: float = 0.0,
) -> dict[str, Any]:
    r"""People hold things, some of the holdings change, and the question is the total.

    The same total is reached by many chains: ``parts`` (each person's result first, then the sum),
    ``interleave`` (the running sum takes each person as soon as the result is known) and ``running`` (the
    sum of what they had at first, then the changes), each in any order of people. A problem of s steps has
    k people and s - k + 1 changes.

    Args:
        rng: source of all randomness; equal states give equal rows.
        steps: fewest and most operations of the problem, drawn uniformly; at least 1.
        operand: starting numbers are drawn from 1 to ``operand``; at least 2.
        style: wording of a line: "terse" (the equation alone), "normal" (with the name), "verbose" (a
            sentence), "check" (each equation followed by its inverse).
        detail: granularity: 1 as few equations as the order allows, 2 two operations a line, 3 one a line,
            4 the givens are restated first, 5 also sums over a ten go through that ten, 6 also every line
            is checked.
        path: "random", or one of "parts", "interleave", "running" (the order of people stays random).
        distractors: number of irrelevant facts in the story, their numbers never enter a chain.
        answerable: share of rows that can be answered; in the others one start is missing and the answer is
            "unknown".
        cue: share of rows whose story ends with somebody's wrong answer (``meta["cue"]`` holds it, else
            None).
        implicit: share of rows in which one start is given as "a dozen" (12).

    Returns:
        The row; ``answer`` is the total, or "unknown".

    Raises:
        ValueError: a number out of its range, or a style or path that does not exist.

    Source: none (plumbing)
    Basis: our own task.

    Example:
        >>> row = word_problem(random.Random(3), steps=(2, 2))
        >>> row["steps"][-1].endswith("=" + row["answer"])
        True
    """
    low, high = steps
    integers("word_problem", low=low, high=high, operand=operand, detail=detail, distractors=distractors)
    if not 1 <= low <= high:
        raise ValueError(
            f"word_problem: expected steps as (fewest, most) with 1 <= fewest <= most, got {steps}."
        )
    if high > 2 * len(_NAMES) - 1:
        raise ValueError(f"word_problem: expected at most {2 * len(_NAMES) - 1} steps, got {high}.")
    between("word_problem", 2, 10**9, operand=operand)
    between("word_problem", 1, 6, detail=detail)
    between("word_problem", 0, 20, distractors=distractors)
    between("word_problem", 0, 1, answerable=answerable, cue=cue, implicit=implicit)
    one_of("word_problem", _STYLES, style=style)
    one_of("word_problem", ("random", *_PATHS), path=path)

    holdings, item, dozen = _holdings(rng, rng.randint(low, high), operand, rng.random() < implicit)
    missing = holdings[rng.randrange(len(holdings))][0] if rng.random() >= answerable else None
    total = sum(_value(h) for h in holdings)
    wrong = total + rng.choice([-10, -2, -1, 1, 2, 10]) if rng.random() < cue else None
    prompt = _story(rng, holdings, item, dozen, missing, distractors, wrong)
    meta = {"steps": sum(h[2] is not None for h in holdings) + len(holdings) - 1, "people": len(holdings)}
    meta |= {"operand": operand, "style": style, "detail": detail, "distractors": distractors, "cue": wrong}  # type: ignore[dict-item]
    meta |= {"implicit": dozen is not None, "answerable": missing is None}
    if missing is not None:
        lines, states, answer = [f"The start of {missing} is missing."], ["unknown"], "unknown"
        return _row(prompt, lines, states, answer, [], meta | {"path": "none"})

    def chain(kind: str) -> tuple[list[str], list[str]]:
        order = rng.sample(holdings, len(holdings))
        return _write(_operations(order, kind, rng), order, style, detail)

    kind = rng.choice(_PATHS) if path == "random" else path
    lines, states = chain(kind)
    others: list[list[str]] = []
    for other in _PATHS * 2:
        alternative = chain(other)[0]
        if alternative != lines and alternative not in others:
            others.append(alternative)
    return _row(prompt, lines, states, str(total), others, meta | {"path": kind})


def _row(
    prompt: str, lines: list[str], states: list[str], answer: str, paths: list, meta: dict
) -> dict[str, Any]:
    completion = "<think>\n" + "\n".join(lines) + "\n</think>\n" + answer
    return {
        "prompt": prompt,
        "completion": completion,
        "answer": answer,
        "steps": lines,
        "states": states,
        "paths": paths,
        "meta": meta,
    }


def _value(holding: _Holding) -> int:
    _, start, change = holding
    return start if change is None else 2 * start if change == 0 else start + change


def _holdings(
    rng: random.Random, steps: int, operand: int, dozen: bool
) -> tuple[list[_Holding], str, str | None]:
    fewest = (steps + 2) // 2  # k people allow k changes, k - 1 sums: steps <= 2k - 1
    people = rng.randint(fewest, min(steps + 1, fewest + 1, len(_NAMES)))
    names = rng.sample(_NAMES, people)
    changed = set(rng.sample(range(people), steps - people + 1))
    holdings: list[_Holding] = []
    for i, name in enumerate(names):
        start, change = rng.randint(1, operand), None
        if i in changed:
            kind = rng.choice(("more", "less", "twice"))
            start = rng.randint(2, operand) if kind == "less" else start
            change = 0 if kind == "twice" else rng.randint(1, operand)
            change = -rng.randint(1, start - 1) if kind == "less" else change
        holdings.append((name, start, change))
    who = None
    if dozen:
        i = rng.randrange(people)
        who, _, change = holdings[i]
        holdings[i] = (who, 12, change if change is None or change > -12 else -rng.randint(1, 11))
    return holdings, rng.choice(_ITEMS), who


def _story(
    rng: random.Random,
    holdings: list[_Holding],
    item: str,
    dozen: str | None,
    missing: str | None,
    distractors: int,
    cue: int | None,
) -> str:
    facts = []
    for name, start, change in holdings:
        amount = "some" if name == missing else "a dozen" if name == dozen else str(start)
        said = f"{name} has {amount} {item}"
        if change is not None:
            verb = rng.choice(_TWICE if change == 0 else _MORE if change > 0 else _LESS)
            said += " and " + verb.format(abs(change))
        facts.append(said + ".")
    for _ in range(distractors):
        aside = rng.choice(_ASIDE).format(name=rng.choice(holdings)[0], n=rng.randint(2, 99))
        facts.insert(rng.randint(0, len(facts)), aside)
    question = f"How many {item} in all?"
    return " ".join(facts) + (f" A friend says {cue}." if cue is not None else "") + f" {question}\n"


# An operation is (who, left, sign, right, result); sign is "+", "-" or "*".
_Operation = tuple[str, int, str, int, int]


def _operations(order: Sequence[_Holding], kind: str, rng: random.Random) -> list[_Operation]:
    def change(holding: _Holding) -> list[_Operation]:
        name, start, delta = holding
        if delta is None:
            return []
        if delta == 0:
            return [(name, start, "*", 2, 2 * start)]
        return [(name, start, "+" if delta > 0 else "-", abs(delta), start + delta)]

    made: list[_Operation] = []
    if kind == "running":
        total = order[0][1]
        for _, start, _ in order[1:]:
            made.append(("All", total, "+", start, total + start))
            total += start
        for _, start, delta in rng.sample(list(order), len(order)):
            if delta is not None:
                step = start if delta == 0 else delta
                made.append(("All", total, "+" if step > 0 else "-", abs(step), total + step))
                total += step
        return made
    if kind == "parts":
        for holding in order:
            made += change(holding)
        order = rng.sample(list(order), len(order))
    total = 0
    for i, holding in enumerate(order):
        if kind == "interleave":
            made += change(holding)
        value = _value(holding)
        if i:
            made.append(("All", total, "+", value, total + value))
        total += value
    return made


def _write(
    operations: list[_Operation], order: Sequence[_Holding], style: str, detail: int
) -> tuple[list[str], list[str]]:
    """Lines of the thought and the value that each of them ends in."""
    lines: list[str] = []
    states: list[str] = []

    def say(who: str, equation: str) -> None:
        worded = {"terse": equation, "verbose": f"Now I work out {who}, and I get {equation}"}
        lines.append(worded.get(style, f"{who}:{equation}"))
        states.append(equation.rsplit("=", 1)[1])

    if not operations:  # one person, no change: the value is read off
        say("All", f"{_value(order[0])}={_value(order[0])}")
    if detail >= 4:
        for name, start, _ in order:
            say(name, f"{start}={start}")
    for group in _grouped(operations, detail):
        who, left, _, _, _ = group[0]
        terms = "".join(f"{sign}{right}" for _, _, sign, right, _ in group)
        sign, right, result = group[0][2], group[0][3], group[-1][4]
        if detail >= 5 and sign == "+" and left % 10 and left % 10 + right % 10 > 10 and right < 100:
            ten = 10 - left % 10
            say(who, f"{left}+{ten}={left + ten}")
            left, terms = left + ten, f"+{right - ten}"
        say(group[-1][0], f"{left}{terms}={result}")
        if style == "check" or detail == 6:
            say("Check", _inverse(group))
    return lines, states


def _grouped(operations: list[_Operation], detail: int) -> list[list[_Operation]]:
    """Runs of operations that go on one line: consecutive ones, each starting from the result before it."""
    most = {1: len(operations), 2: 2}.get(detail, 1)
    groups: list[list[_Operation]] = []
    for op in operations:
        chained = groups and op[1] == groups[-1][-1][4] and op[2] != "*" and groups[-1][-1][2] != "*"
        if chained and len(groups[-1]) < most:
            groups[-1].append(op)
        else:
            groups.append([op])
    return groups


def _inverse(group: list[_Operation]) -> str:
    start = group[0][1]
    if group[0][2] == "*":
        return f"{group[0][4]}/2={start}"
    back = "".join(f"{'-' if sign == '+' else '+'}{right}" for _, _, sign, right, _ in reversed(group))
    return f"{group[-1][4]}{back}={start}"


def countdown(
    rng: random.Random,
    *,
    numbers: int = 4,
    target: int | None = 24,
    trace: str = "solution",
    budget: int = 60,
    operand: int = 13,
    signs: str = "+-*/",
) -> dict[str, Any]:
    r"""Combine all the numbers, each once, into the target.

    Numbers are drawn until the target can be reached. Intermediate results are whole and not negative.

    Args:
        rng: source of all randomness.
        numbers: how many numbers, 2 to 6.
        target: the number to reach (the 24 game); None draws one that these numbers reach.
        trace: "solution" (the equations of one solution, drawn among all in random order of search), "dfs"
            (every move tried depth first, dead ends named) or "bfs" (every state of a level, then the
            solution).
        budget: most lines of a search trace; longer searches are drawn anew, so ``budget`` shapes the
            problems.
        operand: numbers are drawn from 1 to ``operand``.
        signs: operations that may be used, some of "+-*/".

    Returns:
        The row; ``answer`` is the target, ``meta`` holds ``numbers`` and ``target``. A right answer alone
        says
        nothing here: check the chain with ``reaches_target``.

    Raises:
        ValueError: a number out of its range, an unknown trace or sign, or no problem found in 2,000 draws.

    Source: none (plumbing)
    Basis: our own task.

    Example:
        >>> row = countdown(random.Random(1), numbers=3, target=None, signs="+-")
        >>> row["steps"][-1].split("=")[1] == row["answer"]
        True
    """
    integers("countdown", numbers=numbers, budget=budget, operand=operand)
    between("countdown", 2, 6, numbers=numbers)
    between("countdown", 2, 10**6, operand=operand)
    one_of("countdown", ("solution", "dfs", "bfs"), trace=trace)
    if not signs or set(signs) - set("+-*/"):
        raise ValueError(f"countdown: expected signs from '+-*/', got {signs!r}.")
    for _ in range(2000):
        pool = [rng.randint(1, operand) for _ in range(numbers)]
        goal = target if target is not None else _reachable(rng, pool, signs)
        found = _search(rng, pool, goal, signs)
        if found is None:
            continue
        lines = found if trace == "solution" else _trace(rng, pool, goal, signs, trace, budget)
        if lines is None:
            continue
        others = [
            p for p in (_search(rng, pool, goal, signs) for _ in range(6)) if p is not None and p != found
        ]
        prompt = "Use " + " ".join(map(str, pool)) + f" to reach {goal}.\n"
        meta = {"numbers": pool, "target": goal, "trace": trace, "signs": signs}
        states = [line.rsplit("=", 1)[1] if "=" in line else "" for line in lines]
        unique = [list(p) for p in dict.fromkeys(map(tuple, others))]
        return _row(prompt, lines, states, str(goal), unique if trace == "solution" else [], meta)
    raise ValueError(f"countdown: expected a reachable target within {budget} lines, got none in 2000 draws.")


def reaches_target(
    prompts: list,  # noqa: ARG001  rewards are called by keyword
    completions: list,
    *,
    meta: list[dict],
    **columns: Any,  # noqa: ARG001
) -> list[float | None]:
    r"""Reward of a countdown chain: 1 if its equations turn the numbers, each used once, into the target.

    Args:
        prompts: not read.
        completions: strings, or chat messages whose last content is read.
        meta: the rows' ``meta`` with ``numbers`` and ``target``.
        columns: other columns, not read.

    Returns:
        One reward per completion; a chain that is malformed, uses a number twice or not at all,
        miscalculates, or ends elsewhere (in the thought or in the final answer) gets 0.

    Raises:
        ValueError: ``completions`` and ``meta`` differ in length.

    Source: none (plumbing)
    Basis: our own task.

    Example:
        >>> reaches_target(
        ...     [""], ["<think>\n3+4=7\n7+5=12\n</think>\n12"], meta=[{"numbers": [3, 4, 5], "target": 12}]
        ... )
        [1.0]
    """
    if len(completions) != len(meta):
        raise ValueError(
            f"reaches_target: expected one meta per completion, got {len(completions)} and {len(meta)}."
        )
    texts = [c if isinstance(c, str) else str(c[-1].get("content", "")) if c else "" for c in completions]
    return [float(_replay(t, m["numbers"], m["target"])) for t, m in zip(texts, meta, strict=True)]


def _replay(text: str, numbers: list[int], target: int) -> bool:
    parts = FORMATS["think"].parse(text)
    if not parts.ok or parts.answer != str(target):
        return False
    pool = [str(n) for n in numbers]
    for line in parts.steps:
        match = _EQUATION.fullmatch(line)
        if not match:
            return False
        a, sign, b, result = match.groups()
        for used in (a, b):
            if used not in pool:
                return False
            pool.remove(used)
        if _apply(int(a), sign, int(b)) != int(result):
            return False
        pool.append(result)
    return pool == [str(target)]


def _apply(a: int, sign: str, b: int) -> int | None:
    if sign == "/":
        return a // b if b and a % b == 0 else None
    value = a + b if sign == "+" else a * b if sign == "*" else a - b
    return value if value >= 0 else None


def _moves(rng: random.Random, pool: Sequence[int], signs: str) -> list[tuple[int, int, str, int]]:
    """Every (i, j, sign, result) that joins two numbers of the pool, in random order, each equation once."""
    moves: dict[tuple[int, str, int], tuple[int, int, str, int]] = {}
    for i in range(len(pool)):
        for j in range(len(pool)):
            for sign in signs:
                if i != j:
                    value = _apply(pool[i], sign, pool[j])
                    if value is not None:
                        moves.setdefault((pool[i], sign, pool[j]), (i, j, sign, value))
    return rng.sample(list(moves.values()), len(moves))


def _join(pool: Sequence[int], move: tuple[int, int, str, int]) -> tuple[str, list[int]]:
    i, j, sign, value = move
    rest = [n for k, n in enumerate(pool) if k not in (i, j)]
    return f"{pool[i]}{sign}{pool[j]}={value}", [*rest, value]


def _reachable(rng: random.Random, pool: Sequence[int], signs: str) -> int:
    while len(pool) > 1:
        moves = _moves(rng, pool, signs)
        if not moves:
            return -1
        pool = _join(pool, moves[0])[1]
    return pool[0]


def _search(rng: random.Random, pool: Sequence[int], target: int, signs: str) -> list[str] | None:
    if len(pool) == 1:
        return [] if pool[0] == target else None
    for move in _moves(rng, pool, signs):
        line, rest = _join(pool, move)
        below = _search(rng, rest, target, signs)
        if below is not None:
            return [line, *below]
    return None


def _trace(
    rng: random.Random, pool: Sequence[int], target: int, signs: str, kind: str, budget: int
) -> list[str] | None:
    """Lines of a depth-first or breadth-first search; None when they would be more than the budget."""
    lines: list[str] = []

    def deeper(numbers: Sequence[int]) -> bool:
        if len(numbers) == 1:
            return numbers[0] == target
        for move in _moves(rng, numbers, signs):
            if len(lines) >= budget:
                return False
            line, rest = _join(numbers, move)
            lines.append(line)
            if deeper(rest):
                return True
            lines.append("back to " + " ".join(map(str, numbers)))
        return False

    if kind == "dfs":
        return lines if deeper(pool) and len(lines) <= budget else None
    level: list[tuple[list[int], list[str]]] = [(list(pool), [])]
    while level:
        following = []
        for numbers, path in level:
            for move in _moves(rng, numbers, signs):
                line, rest = _join(numbers, move)
                lines.append(line)
                if len(lines) > budget:
                    return None
                if rest == [target]:
                    return [*lines, "so", *path, line]
                following.append((rest, [*path, line]))
        level = following
    return None
