"""Plain numbers in text: their exact value and unit, and when two of them are equal."""

import re
from fractions import Fraction
from typing import NamedTuple

LONG = 1_000  # characters: longer answers are compared as text only
DIGITS = 300  # digits: longer numbers are compared as text only
_EXPONENT = 400  # 1e400 is a number, 1e999999999 a text


class Number(NamedTuple):
    value: Fraction
    rounded: bool  # written as a decimal, so its last digit may be rounded
    unit: str  # "" when none


_HEAD = re.compile(
    r"([-+]?)\s?(US\$|[$€£¥₹])?\s?([-+]?)(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d*)?(?:[eE]([-+]?\d{1,6})(?!\w))?"
)
_OVER = re.compile(r"\s?/\s?(\d+)")
_MIXED = re.compile(r"\s(\d+)/(\d+)")
_UNIT = re.compile(r"\s?(?:[^\W\d_]+|[°$€£¥₹])(?:(?:[ -]|\s?/\s?)[^\W\d_]+){0,3}(?:\^?[23]|[²³])?\.?")
_NOT_UNITS = frozenset(
    re.findall(
        r"\w+",
        "or and but not no if because since so plus minus than half third quarter over divided squared cubed "
        "dozen hundred by to out of less more negative point remainder r x y z n e i pi is are was",
    )
)
_TIMES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CURRENCY = {
    "$": "dollar",
    "us$": "dollar",
    "€": "euro",
    "£": "pound",
    "¥": "yen",
    "₹": "rupee",
    "°": "degree",
}
_SAME_CHARACTER = str.maketrans(
    "−–‒﹣－　\xa0\u2009\u202f⁄０１２３４５６７８９．，％＄", "-----    /0123456789.,%$"
)
_LATEX_WORDS = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox|rm|operatorname)\s?\{([^{}]{0,200})\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s?(?:\{\s?(\d+)\s?\}|(\d))\s?(?:\{\s?(\d+)\s?\}|(\d))")
_LATEX_SPACE = re.compile(r"\\[,!;: ]|\\q?quad(?![a-zA-Z])|\\(?:left|right)(?![a-zA-Z])|~")


def plain(text: str) -> str:
    """Undo typesetting that changes no value: odd signs and spaces, units in text, simple fractions."""
    if not text.isascii():
        text = text.translate(_SAME_CHARACTER)
    if text.count("$") == 2:  # $7$ dollars
        text = re.sub(r"(?<!\\)\$([^$]+)(?<!\\)\$", r"\1", text)
    if "\\" in text or "{" in text:
        text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
        text = text.replace("^\\circ", "°").replace("^{\\circ}", "°")
        text = _LATEX_WORDS.sub(r" \1 ", text)
        text = re.sub(r"(?<=\d)\\[,!;:](?=\d{3})", ",", text)
        text = _LATEX_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
        text = _LATEX_SPACE.sub(" ", text)
    return " ".join(text.split())


def number_of(text: str, is_plain: bool = False) -> Number | None:
    """The value of a plain number with its unit, exactly; None for everything else."""
    if len(text) > LONG:
        return None
    if not is_plain:
        text = plain(text)
    head = _HEAD.match(text)
    if head is None:
        return None
    sign, currency, inner, whole, part, power = head.groups()
    whole = (whole or "").replace(",", "")
    part = (part or "")[1:]
    if not (whole or part) or (sign and inner) or len(whole) + len(part) > DIGITS:
        return None
    if power is not None and abs(int(power)) > _EXPONENT:
        return None
    value = Fraction(int(whole + part), 10 ** len(part))
    if power is not None:
        value *= Fraction(10) ** int(power)
    rounded, rest = bool(part) or power is not None, text[head.end() :]
    exact = not part and power is None
    over = _OVER.match(rest) if exact else None
    mixed = _MIXED.match(rest) if exact else None
    for match in (over, mixed):
        if match is not None:
            below = match[match.lastindex or 1]
            if len(below) > DIGITS or len(match[1]) > DIGITS or int(below) == 0:
                return None
            rest = rest[match.end() :]
    if over is not None:
        value /= int(over[1])
    elif mixed is not None:
        value += Fraction(int(mixed[1]), int(mixed[2]))
    if "-" in (sign, inner):
        value = -value
    unit = _CURRENCY.get(currency.lower(), "") if currency else ""
    rest = rest.rstrip(" .") if not rest.strip(" .") else rest
    return _with_unit(value, rounded, unit, rest) if rest else Number(value, rounded, unit)


def _with_unit(value: Fraction, rounded: bool, unit: str, rest: str) -> Number | None:
    """Read a percent sign, a word such as million, and the unit, if that is all there is."""
    bare = rest.strip().rstrip(".").casefold()
    if bare in ("%", "percent", "per cent"):
        return None if unit else Number(value / 100, rounded, "%")
    first, _, after = bare.partition(" ")
    if first in _TIMES:
        value, bare = value * _TIMES[first], after.strip()
    if not bare:
        return Number(value, rounded, unit)
    if unit or len(bare) > 60 or _UNIT.fullmatch(bare) is None:
        return None
    words = re.split(r"[^\w°$€£¥₹]+", bare)
    if any(w in _NOT_UNITS or w in _TIMES for w in words):
        return None
    if len(words[0]) == 1 and words[0].isalpha() and words[0] not in "mglshkw":
        return None  # 2a is a product
    return Number(value, rounded, _CURRENCY.get(bare, bare.rstrip("s")))


def equal(p: Number, q: Number, tol: float, percent: bool) -> bool:
    a, b = p.value, q.value
    if "%" in (p.unit, q.unit):
        if p.unit != q.unit and "" not in (p.unit, q.unit):
            return False
        if percent and p.unit != q.unit:  # 50% may also be the bare number 50
            scaled = (
                (p._replace(value=100 * a, unit=""), q) if p.unit else (p, q._replace(value=100 * b, unit=""))
            )
            if equal(*scaled, tol=tol, percent=False):
                return True
    elif p.unit and q.unit and p.unit != q.unit:
        return False
    if a == b:
        return True
    if not (p.rounded or q.rounded):
        return False
    return abs(a - b) <= Fraction(str(tol)) * min(Fraction(1), max(abs(a), abs(b)))


def digits(text: str) -> str | None:
    """An integer too long for arithmetic, without sign +, commas and leading zeros."""
    bare = text.strip().removeprefix("+")
    sign, bare = ("-", bare[1:]) if bare.startswith("-") else ("", bare)
    bare = bare.replace(",", "") if re.match(r"\d{1,3},\d{3}", bare) else bare
    return sign + (bare.lstrip("0") or "0") if bare.isascii() and bare.isdigit() else None
