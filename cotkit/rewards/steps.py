"""Steps of a thought: the equations it writes and whether they hold.

Conventions: numbers are exact (``int`` or ``Fraction``), nothing is evaluated by Python, sizes are bounded.
Functions: ``calculate`` an expression -> its value; ``find_equations`` text -> equations with a verdict;
``equations`` the reward, the share that holds.
"""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

from cotkit._check import finite
from cotkit.rewards._text import text_of

__all__ = ["Equation", "calculate", "equations", "find_equations"]

_LONG = 300  # characters of an expression
_BITS = 2048  # of numerator and denominator
_TEXT = 200_000  # characters of a completion that are searched

_TOKEN = re.compile(
    r"(?P<number>\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?%?|\$?\.\d+%?)"
    r"|(?P<op>\*\*|//|[-+*/×÷·−^])|(?P<x>[xX](?=\s?\(?\$?\.?\d))"
    r"|(?P<open>\()|(?P<close>\))|(?P<equal>=)|(?P<line>\n)"
    r"|(?P<other>[^\s\d.()=+\-*/×÷·−^xX$]+|\S)"
)
_SIGNS = {"×": "*", "·": "*", "x": "*", "X": "*", "÷": "/", "−": "-", "^": "**"}
_PRIORITY = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "**": 4}


class Equation(NamedTuple):
    """One written equation: its sides as they stand in the text, whether they agree, and where it stands."""

    left: str
    right: str
    holds: bool
    start: int
    end: int


def calculate(expression: str) -> int | Fraction | None:
    """Value of an arithmetic expression, exact and bounded; None for everything else.

    Args:
        expression: numbers (``1,200``, ``.5``, ``$3``, ``20%`` = 1/5), ``+ - * / // **`` or their signs × ÷ −
            ^ x, and parentheses; at most 300 characters.

    Returns:
        The value, an ``int`` when whole; None when it is no such expression, divides by zero or grows beyond
        2,048 bits (``9**9**9`` costs nothing).

    Source: RFT (2023) arXiv:2308.01825 (equations of a path are evaluated)
    Basis: second-hand
    Differs: exact fractions and a small grammar of our own instead of floats from Python's ``eval``.

    Example:
        >>> calculate("(1/3 + 1/6) * 4"), calculate("20% * 50"), calculate("7/2"), calculate("9**9**9**9")
        (2, 10, Fraction(7, 2), None)
    """
    if not isinstance(expression, str) or not expression or len(expression) > _LONG:
        return None
    tokens = [t for t in _tokens(expression) if t[0] != "line"]
    if not tokens or any(kind in ("other", "equal") for kind, *_ in tokens):
        return None
    try:
        value, at = _sum(tokens, 0, 0)
    except (ArithmeticError, ValueError, IndexError):
        return None
    if at != len(tokens):
        return None
    return int(value) if value.denominator == 1 else value


_Token = tuple[str, str, int, int]


def _tokens(text: str) -> Iterator[_Token]:
    for m in _TOKEN.finditer(text):
        kind = m.lastgroup or "other"
        yield "op" if kind == "x" else kind, m.group(), m.start(), m.end()


def _number(text: str) -> Fraction:
    bare = text.replace(",", "").replace("$", "")
    return Fraction(bare[:-1]) / 100 if bare.endswith("%") else Fraction(bare)


def _sum(tokens: list[_Token], at: int, lowest: int) -> tuple[Fraction, int]:
    """Precedence climbing from token ``at``; 300 characters bound the depth."""
    kind, text, *_ = tokens[at]
    if kind == "op" and _SIGNS.get(text, text) in "+-":
        value, at = _sum(tokens, at + 1, 3)
        value = -value if _SIGNS.get(text, text) == "-" else value
    elif kind == "open":
        value, at = _sum(tokens, at + 1, 0)
        if tokens[at][0] != "close":
            raise ValueError
        at += 1
    elif kind == "number":
        value, at = _number(text), at + 1
    else:
        raise ValueError
    while at < len(tokens) and tokens[at][0] == "op":
        sign = _SIGNS.get(tokens[at][1], tokens[at][1])
        priority = _PRIORITY[sign]
        if priority <= lowest:
            break
        other, at = _sum(tokens, at + 1, priority - (sign == "**"))
        value = _apply(value, sign, other)
    return value, at


def _apply(a: Fraction, sign: str, b: Fraction) -> Fraction:
    if sign == "**":
        if b.denominator != 1 or abs(b) > 64:
            raise ValueError
        if abs(int(b)) * max(a.numerator.bit_length(), a.denominator.bit_length()) > _BITS:
            raise ValueError
        result = Fraction(a) ** int(b)
    elif sign == "//":
        result = Fraction(a // b)
    else:
        result = a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > _BITS:
        raise ValueError
    return result


def find_equations(text: str) -> list[Equation]:
    r"""Every ``left = right`` of a text in which at least one side calculates something, in reading order.

    ``<<48/2=24>>`` counts once (the plain ``48/2 = <<`` before it has no right side). A chain ``2*3 = 6 =
    5+1`` gives an equation for each sign =. Words end an expression: ``3 apples + 4 apples = 7`` is not seen.

    Args:
        text: any text; the first 200,000 characters are read.

    Returns:
        Equations with ``left`` and ``right`` as written, ``holds`` (\|left - right\| < 0.001, False when a
        side has no value, such as 1/0) and the positions ``start`` and ``end`` in the text.

    Source: RFT (2023) arXiv:2308.01825 (a path is kept if each of its equations holds, and is known by them)
    Basis: second-hand
    Differs: also reads equations outside ``<<>>``.

    Example:
        >>> [(e.left, e.right, e.holds) for e in find_equations("48/2 = <<48/2=24>>24, then 24 + 48 = 71.")]
        [('48/2', '24', True), ('24 + 48', '71', False)]
    """
    found: list[Equation] = []
    text = text[:_TEXT]
    left: list[_Token] | None = None  # the side before the last sign =
    side: list[_Token] = []
    previous = "line"

    def close() -> None:
        nonlocal left
        if left is not None:
            equation = _equation(text, left, _trim(side, last=True))
            if equation is not None:
                found.append(equation)
        left = None

    for token in _tokens(text):
        kind, sign, _, end = token
        if kind == "equal":
            middle = _trim(side, last=False)
            equation = _equation(text, left, middle) if left is not None else None
            if equation is not None:
                found.append(equation)
            left, side = middle or None, []
        elif kind in ("other", "line"):
            close()
            side = []
        elif kind == "op" and not side and left is None:
            # a sign starts an expression only when it is glued to a number and no word, bullet or hyphen
            glued = text[end : end + 1].isdigit() or text[end : end + 2].startswith(("$", "("))
            if sign in "+-−" and glued and previous != "other":
                side.append(token)
        elif kind in ("number", "open") and side and side[-1][0] in ("number", "close"):
            close()  # two numbers side by side: a new expression begins
            side = [token]
        else:
            side.append(token)
        previous = kind
    close()
    return found


def _trim(side: list[_Token], last: bool) -> list[_Token]:
    """The part of a side that is an expression: brackets paired, no sign left over at the open end."""
    if not last:  # a left side ends at the sign =, so what is left over stands in front
        depth, first = 0, len(side)
        for i in range(len(side) - 1, -1, -1):
            depth += {"close": 1, "open": -1}.get(side[i][0], 0)
            if depth < 0:
                break
            if depth == 0:
                first = i
        side = side[first:]
        while side and side[0][0] == "op" and side[0][1] not in "+-−":
            side = side[1:]
        return side
    depth, stop = 0, 0
    for i, token in enumerate(side):
        depth += {"open": 1, "close": -1}.get(token[0], 0)
        if depth < 0:
            break
        if depth == 0:
            stop = i + 1
    side = side[:stop]
    while side and side[-1][0] == "op":
        side = side[:-1]
    return side


def _equation(text: str, left: list[_Token], right: list[_Token]) -> Equation | None:
    if not left or not right:
        return None
    if not any(t[0] == "op" for t in left[1:]) and not any(t[0] == "op" for t in right[1:]):
        return None
    a, b = text[left[0][2] : left[-1][3]], text[right[0][2] : right[-1][3]]
    x, y = calculate(a), calculate(b)
    holds = x is not None and y is not None and abs(Fraction(x) - y) < Fraction(1, 1000)
    return Equation(a, b, holds, left[0][2], right[-1][3])


def equations(*, empty: float = 0.0) -> Callable[..., list[float | None]]:
    """A reward: the share of a completion's equations that hold.

    Args:
        empty: reward of a completion that writes no equation.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float]`` in [0, 1], logged as ``equations``; it can
        be pickled, and ``reward.score_one(completion)`` scores one sample.

    Raises:
        ValueError: ``empty`` is not finite.
        TypeError: ``empty`` is no number.

    Source: RFT (2023) arXiv:2308.01825 (1 for the paths that its filter keeps)
    Basis: second-hand
    Differs: a share instead of all or nothing.

    Example:
        >>> equations()(prompts=["?", "?"], completions=["1+1=2 and 2+2=5", "no sums"])
        [0.5, 0.0]
    """
    finite("equations", empty=empty)
    reward = partial(_equations, (empty,))
    reward.score_one = partial(_share, empty)  # type: ignore[attr-defined]
    return reward


def _equations(how: tuple[float], /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    return [_share(how[0], completion) for completion in completions]


_equations.__name__ = "equations"  # what TRL logs; pickle goes by __qualname__


def _share(empty: float, completion: Any) -> float:
    found = find_equations(text_of(completion))
    return sum(e.holds for e in found) / len(found) if found else empty
