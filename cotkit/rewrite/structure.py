"""Changes to the structure of a chain of thought: its steps and the equations in them.

Conventions: a row has ``completion`` (text) with a chain and a final answer; the row is never changed, a new
one comes back. The ``answer`` column stays the right answer of the question, since it is what a completion is
judged by.
Functions: ``inject_error`` plants a false equation; ``reveal_steps`` moves the first steps into the prompt.
"""

import random
import re
from fractions import Fraction
from typing import Any, NamedTuple

from cotkit._check import at_least, between, integers, one_of
from cotkit.rewards.answer import extract_answer, same_answer
from cotkit.rewards.steps import Equation, _tokens, calculate, find_equations
from cotkit.tokens import FORMATS, Format
from cotkit.tokens._encode import THOUGHT

__all__ = ["inject_error", "reveal_steps"]

_PLACES = 4  # decimals of a recomputed result


def inject_error(row: dict[str, Any], *, rng: random.Random, propagate: bool = True) -> dict[str, Any]:
    r"""A copy of the row with one false equation in its chain.

    Args:
        row: with ``completion``: a chain of equations (``<<a+b=c>>`` as in GSM8K or plain ``a+b=c``) that
            ends in a final answer, in any of the forms that ``extract_answer`` reads.
        rng: draws the equation and the size of the error.
        propagate: True: later equations that used the value are worked out again with the false one, and the
            final answer follows (dynamic noise). False: the result is false where it stands and nowhere else,
            the chain goes on with the true value and the final answer stays right (static noise).

    Returns:
        The row with a new ``completion`` and ``step_labels``: one bool per step (line of the thought that is
        not empty), False where the line states the false value or something that follows from it. ``steps``
        is renewed if it is there, ``states`` is left out. With ``propagate`` the new final answer is never
        the same as the old one.

    Raises:
        ValueError: nothing to falsify: no equation that holds or, with ``propagate``, none that the answer
            hangs on.
        TypeError: ``completion`` is no text, or ``rng`` no ``random.Random``.

    Source: TInt (2024) arXiv:2402.04004 (static and dynamic noise)
    Basis: reconstructed
    Differs: the paper noises digits of its own traced integers; here one equation of a text is falsified.
        Which later numbers come from it is told by their value; results that stand nowhere else go first.

    Example:
        >>> row = {"completion": "2 * 8 = <<2*8=16>>16\n16 - 3 = <<16-3=13>>13\n#### 13"}
        >>> print(inject_error(row, rng=random.Random(2))["completion"])
        2 * 8 = <<2*8=17>>17
        17 - 3 = <<17-3=14>>14
        #### 14
    """
    text = row.get("completion")
    if not isinstance(text, str):
        raise TypeError(
            f"inject_error: expected completion as text, got {type(text).__name__}. Render messages first."
        )
    if not isinstance(rng, random.Random):
        raise TypeError(f"inject_error: expected rng as a random.Random, got {type(rng).__name__}.")
    chain = _chain(text)
    if chain is None:
        raise ValueError("inject_error: expected equations and a final answer, got none. Leave this row out.")
    for nice in (True, False):
        for target in _order(chain, row, rng, propagate):
            for delta in _deltas(chain.values[target], rng):
                edits = _edits(chain, target, chain.values[target] + delta, propagate, nice)
                if edits is not None and _follows(chain, target, edits, row, propagate):
                    return _new_row(row, chain, edits)
    hangs = " that the final answer hangs on" if propagate else ""
    raise ValueError(f"inject_error: expected an equation that holds{hangs}, got none. Leave this row out.")


def reveal_steps(
    row: dict[str, Any], p: float, *, segments: int = 5, rng: random.Random, fmt: str | Format = "think"
) -> dict[str, Any]:
    r"""A copy of the row whose prompt gives away the first steps of the solution.

    The n steps of the thought are cut into $N = \min(\text{segments}, n)$ segments at $\mathrm{round}(jn/N)$,
    and the first $l \sim \mathrm{Binomial}(N, p)$ of them move to the end of the prompt. With p falling to 0
    over the run the model first finishes solutions, then solves whole questions:
    ``p = schedule(t, 300, 0.95, 0.05, kind="cosine") if t <= 300 else 0.0``.

    The moved text is a target too in UFT: score ``{"prompt": question, "completion": hint + written}`` and
    add ``0.001 * nll(logps, hinted)`` to the policy loss on the written tokens, with
    ``hinted = mask(segments, THOUGHT) & (steps < hint_steps[:, None])``.

    Args:
        row: with ``prompt`` and ``completion`` as text, the completion in ``fmt``. Call it once per question:
            all rollouts see the same hint.
        p: chance of each segment, in [0, 1]. 0: no hint; 1: the whole thought, never the answer. A p drawn
            uniformly, ``rng.random()``, makes l uniform on 0 to N (the baseline R3).
        segments: most segments, >= 1. Paper: 5.
        rng: draws l.
        fmt: format that tells the steps, name or ``Format``.

    Returns:
        The row with ``prompt + completion`` as before, cut elsewhere, and three more columns: ``hint``, the
        text that moved (the opening tag comes along with the first step), ``hint_steps``, the number of its
        steps, and ``revealed``, their share in [0, 1]. ``steps`` and ``states``, where there is one for each
        step, keep what is left. A thought without steps is left as it is.

    Raises:
        ValueError: a completion that is not in ``fmt``, ``p`` outside [0, 1], ``segments < 1``.
        TypeError: ``prompt`` or ``completion`` is no text, ``rng`` no ``random.Random``.

    Source: UFT (2025) arXiv:2505.16984 RLHFDataset.__getitem__ of the released code
    Basis: authors' code: the same cuts and the same draw.
    Differs: the authors' steps are a column of the data; here they are read from the completion. After the
        last hint step of the run the code sets l to 0 itself.

    Example:
        >>> row = {"prompt": "2+3+4+1?", "completion": "<think>\n2+3=5\n5+4=9\n9+1=10\n</think>\n10"}
        >>> made = reveal_steps(row, 0.5, rng=random.Random(1))
        >>> made["hint"], made["completion"], round(made["revealed"], 3)
        ('<think>\n2+3=5\n', '5+4=9\n9+1=10\n</think>\n10', 0.333)
    """
    for name in ("prompt", "completion"):
        if not isinstance(row.get(name), str):
            kind = type(row.get(name)).__name__
            raise TypeError(f"reveal_steps: expected {name} as text, got {kind}. Render messages first.")
    if not isinstance(rng, random.Random):
        raise TypeError(f"reveal_steps: expected rng as a random.Random, got {type(rng).__name__}.")
    between("reveal_steps", 0, 1, p=p)
    integers("reveal_steps", segments=segments)
    at_least("reveal_steps", 1, segments=segments)
    if not isinstance(fmt, Format):
        one_of("reveal_steps", tuple(FORMATS), fmt=fmt)
        fmt = FORMATS[fmt]
    text = row["completion"]
    if not fmt.parse(text).ok:
        raise ValueError(
            "reveal_steps: expected a completion in the format, got another. Leave this row out."
        )
    steps = [(start, end) for start, end, segment, _ in fmt.spans(text) if segment == THOUGHT]
    n = len(steps)
    parts = min(segments, n)
    drawn = sum(rng.random() < p for _ in range(parts))
    shown = round(drawn / parts * n) if drawn else 0
    cut = steps[shown - 1][1] if shown else 0
    made = {**row, "prompt": row["prompt"] + text[:cut], "completion": text[cut:]}
    for name in ("steps", "states"):
        if isinstance(row.get(name), list) and len(row[name]) == n:
            made[name] = row[name][shown:]
    return made | {"hint": text[:cut], "hint_steps": shown, "revealed": shown / max(n, 1)}


class _Number(NamedTuple):
    start: int
    end: int
    value: Fraction


class _Chain(NamedTuple):
    text: str
    lines: list[tuple[int, int]]  # the steps
    equations: list[Equation]  # those whose right side is one number
    values: list[Fraction]  # their results
    numbers: list[_Number]
    answer: str


def _chain(text: str) -> _Chain | None:
    answer = extract_answer(text)
    if answer is None:
        return None
    begin, end = text.find("<think>") + len("<think>"), text.rfind("</think>")
    if end < 0:
        begin, end = 0, max(text.rfind(answer), 0)
    begin = begin if text.startswith("<think>", begin - len("<think>")) else 0
    equations = [e for e in find_equations(text[:end]) if e.start >= begin and _single(e.right) is not None]
    lines = [(begin + m.start(), begin + m.end()) for m in re.finditer(r"[^\n]*\S[^\n]*", text[begin:end])]
    if lines and "</think>" not in text and not any(e.start >= lines[-1][0] for e in equations):
        lines = lines[:-1]  # the marker of the answer
    numbers = []
    for kind, token, start, stop in _tokens(text):
        if kind == "number":
            start, stop = start + token.startswith("$"), stop - token.endswith("%")
            numbers.append(_Number(start, stop, Fraction(text[start:stop].replace(",", ""))))
    values = [_single(e.right) or Fraction(0) for e in equations]
    return _Chain(text, lines, equations, values, numbers, answer) if equations else None


def _single(text: str) -> Fraction | None:
    """Value of one number, with sign and $; None for an expression."""
    bare = text.replace("$", "").replace(",", "").strip()
    return Fraction(bare) if re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+)", bare) else None


def _order(chain: _Chain, row: dict[str, Any], rng: random.Random, propagate: bool) -> list[int]:
    """True equations with a result above 0, in random order; last those whose result stands before them."""
    able = [i for i, e in enumerate(chain.equations) if e.holds and chain.values[i] > 0]
    prompt = row.get("prompt")
    given = {_single(t[1]) for t in _tokens(prompt) if t[0] == "number"} if isinstance(prompt, str) else set()

    def doubtful(i: int) -> bool:
        earlier = (n.value for n in chain.numbers if n.start < chain.equations[i].start)
        return propagate and (chain.values[i] in given or chain.values[i] in earlier)

    return sorted(rng.sample(able, len(able)), key=doubtful)


def _deltas(value: Fraction, rng: random.Random) -> list[Fraction]:
    """Errors to try, in random order: slips in one of the last digits written."""
    unit = Fraction(1, 10 ** _places(value))
    sizes = [s for s in (1, 2, 3, 4, 10, 20, 100) if s < 4 or s * unit * 5 <= value]
    deltas = [sign * size * unit for size in sizes for sign in (1, -1) if value + sign * size * unit > 0]
    return rng.sample(deltas, len(deltas))


def _places(value: Fraction) -> int:
    return next((n for n in range(_PLACES) if (value * 10**n).denominator == 1), _PLACES)


def _show(value: Fraction, like: str) -> str:
    """A number without its sign, with thousands commas where the one it replaces has or could have some."""
    scaled = round(abs(value) * 10 ** (places := _places(value)))
    whole, part = divmod(scaled, 10**places)
    shown = f"{whole:,}" if "," in like else str(whole)
    return f"{shown}.{part:0{places}d}" if places else shown


_Edit = tuple[int, int, str]


def _edits(chain: _Chain, target: int, wrong: Fraction, propagate: bool, nice: bool) -> list[_Edit] | None:
    """Replacements that make one equation false and, if asked, let the rest follow; None if they get odd."""
    text, edits = chain.text, list[_Edit]()
    changed: dict[Fraction, Fraction] = {}  # value that stood there -> value that stands there now
    results = {e.end: i for i, e in enumerate(chain.equations)}
    begin = chain.equations[target].end - len(chain.equations[target].right)
    for number in (n for n in chain.numbers if n.start >= begin):
        i = results.get(number.end)
        if i is None:
            copied = text[: number.start].endswith(">>") and number.value == chain.values[target]
            if not propagate and not (copied and number.start - 2 == chain.equations[target].end):
                continue
            if number.value in changed:
                new = changed[number.value]
                edits.append((number.start, number.end, _show(new, text[number.start : number.end])))
            continue
        if i != target and not propagate:
            continue
        equation, old = chain.equations[i], chain.values[i]
        value = calculate(_apply(text, edits, equation.start, equation.start + len(equation.left)))
        before = calculate(equation.left)
        if value is None or before is None:
            return None
        if i == target:
            new = wrong
        elif value == before:
            new = old
        else:
            new = Fraction(round(Fraction(value) * 10**_PLACES), 10**_PLACES)
            if (new < 0) != (old < 0) or new == 0 or (nice and _places(new) > _places(old)):
                return None
        changed.pop(abs(old), None)
        if new != old:
            changed[abs(old)] = abs(new)
            edits.append((number.start, number.end, _show(new, text[number.start : number.end])))
    return edits


def _apply(text: str, edits: list[_Edit], start: int = 0, end: int | None = None) -> str:
    """The part of the text from ``start`` to ``end`` with the replacements that lie in it."""
    end = len(text) if end is None else end
    parts, at = [], start
    for first, last, new in edits:
        if start <= first and last <= end:
            parts += [text[at:first], new]
            at = last
    return "".join([*parts, text[at:end]])


def _follows(chain: _Chain, target: int, edits: list[_Edit], row: dict[str, Any], propagate: bool) -> bool:
    """Whether exactly one equation became false and the final answer did what it should."""
    text = _apply(chain.text, edits)
    made = _chain(text)
    if made is None or len(made.equations) != len(chain.equations):
        return False
    pairs = list(zip(chain.equations, made.equations, strict=True))
    if pairs[target][1].holds or any(
        a.holds and not b.holds for i, (a, b) in enumerate(pairs) if i != target
    ):
        return False
    gold = row.get("answer", chain.answer)
    if propagate:
        return not same_answer(made.answer, chain.answer) and not same_answer(made.answer, gold)
    return made.answer == chain.answer


def _new_row(row: dict[str, Any], chain: _Chain, edits: list[_Edit]) -> dict[str, Any]:
    labels = [not any(a <= start < b for start, _, _ in edits) for a, b in chain.lines]
    made = {k: v for k, v in row.items() if k != "states"}
    made |= {"completion": _apply(chain.text, edits), "step_labels": labels}
    if "steps" in row:
        made["steps"] = [_apply(chain.text, edits, a, b) for a, b in chain.lines]
    return made
