r"""Final answers: find the one a completion gives, and say whether it is the right one.

Conventions: the answer is read after the last ``</think>`` and nowhere else; a thought that was opened and
never closed has no answer; nothing is guessed (a number that merely stands last counts only with
``fmt="number"``). ``None`` as an answer means that there is none, ``None`` as a reward that the gold cannot
be read. Hostile text (``9**9**9**9``, a megabyte of braces, NUL, lone surrogates, a number of 100,000 digits)
costs milliseconds and raises nothing; LaTeX goes to math-verify in a process that is killed when it takes
too long.
Functions: ``extract_answer`` text -> answer; ``same_answer`` two answers -> bool; ``accuracy`` the reward;
``score_one`` the same for one sample.
"""

import re
from collections.abc import Callable
from functools import partial
from math import isfinite
from numbers import Real
from typing import Any

from cotkit._check import at_least, finite, one_of
from cotkit.rewards import _verify
from cotkit.rewards._numbers import DIGITS, LONG, Number, digits, equal, number_of, plain
from cotkit.rewards._text import column_of, text_of

__all__ = ["accuracy", "extract_answer", "same_answer", "score_one"]

_FORMATS = ("auto", "think", "gsm8k", "boxed", "plain", "tag", "number", "letter")
_TAIL = 20_000  # characters: a final answer stands at the end

_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])")
_SAYS = re.compile(r"\banswer(?:\*{1,2})?[ \t]{0,3}(?:is|:|=)[ \t]{0,3}:?(?:\*{1,2})?", re.I)
_TAG = re.compile(r"<answer>", re.I)
_END_TAG = re.compile(r"</answer>", re.I)
_SENTENCE = re.compile(r"[.!](?=\s)")
_LETTER = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?(?![A-Za-z0-9'’])")
_LAST_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?|\.\d+")


def extract_answer(completion: Any, fmt: Any = "auto") -> str | None:
    r"""The final answer that a completion states, as text, or None; never a guess.

    Only what follows the last ``</think>`` is read. There the marker that stands last wins: ``\boxed{n}``,
    ``#### n``, a last line ``A: n``, ``<answer>n</answer>``, "the answer is n" / "Answer: n". Without a
    marker the answer is the text itself if it is one line after a closed thought, or one bare number or word
    with no thought. A marker with nothing behind it, or with its bracket not closed, gives None, though an
    earlier one may be whole.

    Args:
        completion: text, or chat messages (the last assistant message is read).
        fmt: "auto" as above; or one marker alone: "think" all that follows the thought (which must be
            closed), "gsm8k" ``#### n`` or a last line ``A: n``, "boxed", "plain" "the answer is n", "tag"
            ``<answer>``; or on request "number" the last number, "letter" the last capital that stands
            alone. A ``tokens.Format`` is asked for its own ``parse(text).answer``.

    Returns:
        The answer without its marker, spaces, ``$`` signs, bold marks and final full stop; None when there
        is none.

    Raises:
        ValueError: a ``fmt`` that does not exist.

    Source: none (plumbing)
    Basis: conventions of GSM8K (``####``), its published model solutions (``A:``), MATH (``\boxed``) and R1
    (tags).
    Differs: other graders fall back to the last number of the text, and read boxes inside the thought.

    Example:
        >>> extract_answer(r"<think>7? \boxed{7}</think> So \boxed{7}, no: \boxed{8}.")
        '8'
        >>> extract_answer("<think>it is 7, so the answer is 7") is None  # the thought was cut off
        True
        >>> extract_answer("She has 7.", fmt="number")
        '7'
    """
    text = text_of(completion)
    if not isinstance(fmt, str):
        return fmt.parse(text).answer
    one_of("extract_answer", _FORMATS, fmt=fmt)
    segment, thought = _segment(text)
    if segment is None or (fmt == "think" and not thought):
        return None
    segment = segment[-_TAIL:]
    if fmt == "number":
        return _last_number(segment)
    if fmt == "letter":
        letters = _LETTER.findall(segment)
        return letters[-1] if letters else None
    if fmt == "think":
        return _clean(segment)
    return _marked(segment, fmt, thought, 3)


def _last_number(text: str) -> str | None:
    found = None
    for found in _LAST_NUMBER.finditer(text):  # noqa: B007  the last one is wanted
        pass
    if found is None:
        return None
    before = re.search(r"(?:(?<![\w)])[-−])?[$€£¥]?$", text[max(0, found.start() - 3) : found.start()])
    return (before.group() if before else "") + found.group()


def _segment(text: str) -> tuple[str | None, bool]:
    """What follows the last closed thought (None when one is still open), and whether there was one."""
    closed = text.rfind("</think>")
    if text.rfind("<think>") > closed:
        return None, True
    return (text, False) if closed < 0 else (text[closed + len("</think>") :], True)


def _marked(segment: str, fmt: str, thought: bool, depth: int) -> str | None:
    found = [mark for kind, find in _MARKERS if fmt in ("auto", kind) for mark in find(segment)]
    if not found:
        return _bare(segment, thought) if fmt == "auto" else None
    outer = [m for m in found if not any(o[0] <= m[0] and m[1] <= o[1] and o is not m for o in found)]
    payload = max(outer)[2]
    if payload is None:
        return None
    inner = _marked(payload, fmt, True, depth - 1) if depth and fmt == "auto" and _any_mark(payload) else None
    return inner or _clean(payload)


def _any_mark(text: str) -> bool:
    return any(find(text) for _, find in _MARKERS)


def _bare(segment: str, thought: bool) -> str | None:
    line = segment.strip()
    if not line or "\n" in line or len(line) > LONG:
        return None
    if thought or not re.search(r"\s", line) or number_of(line) is not None:
        return _clean(line)
    return None


# Each finder gives at most one (start, end, payload); a payload of None is a marker that was not completed.
_Mark = tuple[int, int, str | None]


def _find_box(text: str) -> list[_Mark]:
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    mark = _BOX.match(text, at) if at >= 0 else None
    if mark is None:
        return []
    start = mark.end()
    while start < len(text) and text[start] in " \t":
        start += 1
    if start == len(text) or text[start] != "{":
        end = min((i for i in (text.find(c, start) for c in "$\n ") if i >= 0), default=len(text))
        return [(at, end, text[start:end])]
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return [(at, start + brace.end(), text[start + 1 : start + brace.start()])]
    return [(at, len(text), None)]


def _find_hashes(text: str) -> list[_Mark]:
    at = text.rfind("####")
    if at < 0:
        return []
    end = text.find("\n", at)
    end = len(text) if end < 0 else end
    payload = text[at + 4 : end].strip(" \t#")
    # a heading ("#### Step 2: the sum") is no answer unless nothing follows it
    if not payload or (number_of(_clean(payload) or "") is None and text[end:].strip()):
        return [] if text[end:].strip() else [(at, end, None)]
    return [(at, end, payload)]


def _find_last_line(text: str) -> list[_Mark]:
    stripped = text.rstrip()
    start = stripped.rfind("\n") + 1
    return [(start, len(stripped), stripped[start + 2 :])] if stripped.startswith("A:", start) else []


def _find_tag(text: str) -> list[_Mark]:
    if not _may_say(text):
        return []
    opened = list(_TAG.finditer(text))
    if not opened:
        return []
    closed = _END_TAG.search(text, opened[-1].end())
    if closed is None:
        return [(opened[-1].start(), len(text), None)]
    return [(opened[-1].start(), closed.end(), text[opened[-1].end() : closed.start()])]


def _may_say(text: str) -> bool:
    return "answer" in text or "Answer" in text or "ANSWER" in text  # much faster than a pattern that fails


def _find_says(text: str) -> list[_Mark]:
    if not _may_say(text):
        return []
    mark = None
    for mark in _SAYS.finditer(text):  # noqa: B007  the last one is wanted
        pass
    if mark is None:
        return []
    start = mark.end()
    while start < len(text) and text[start] in " \t\n":
        start += 1
    end = text.find("\n", start)
    end = len(text) if end < 0 else end
    stop = _SENTENCE.search(text, start, end)
    payload = text[start : stop.start() if stop else end]
    return [(mark.start(), end, payload or None)]


_MARKERS: tuple[tuple[str, Callable[[str], list[_Mark]]], ...] = (
    ("boxed", _find_box),
    ("gsm8k", _find_hashes),
    ("gsm8k", _find_last_line),
    ("tag", _find_tag),
    ("plain", _find_says),
)


def _clean(text: str) -> str | None:
    text = text.strip().strip("*").strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > len(left + right) and text.startswith(left) and text.endswith((right, right + ".")):
            text = text.removesuffix(".")[len(left) : -len(right)].strip()
    text = text.removesuffix(".").removesuffix("**").strip()
    return text or None


def same_answer(a: Any, b: Any, *, tol: float = 1e-6, percent: bool = False) -> bool:
    r"""Whether two answers mean the same.

    Equal text; else equal numbers (thousands separators, currency, units, fractions, mixed numbers, percent,
    all in exact arithmetic); else equal lists or sets of such; else, if both look like mathematics,
    math-verify says.

    Args:
        a: the answer given; anything that is neither text nor number is the same as nothing.
        b: the right answer; math-verify is not symmetric, so the order matters for LaTeX.
        tol: a decimal may differ by ``tol``, absolute above 1 and relative below (1/3 and 0.333333 agree,
            0.333 does not). Integers and fractions must be equal. At least 0.
        percent: True also lets 50% agree with 50. By default it agrees with 0.5 and 1/2 alone.

    Returns:
        True or False. A unit that only one side names is ignored (18 and 18 dollars), two different units
        are not. Words are compared without regard to case, a choice (B) without its brackets.

    Raises:
        ValueError: ``tol`` below 0.

    Source: none (plumbing)
    Basis: our own rules, held against math-verify 0.9 and the labels of 5,276 GSM8K solutions.
    Differs: math-verify rounds to six decimals, so that two tiny numbers are equal, and reads number bases
    as factors.

    Example:
        >>> same_answer("$1,234.00", "1234"), same_answer("50%", "1/2"), same_answer("1.0001", "1")
        (True, True, False)
        >>> same_answer("(b)", "B"), same_answer("9**9**9**9", "1")
        (True, False)
    """
    at_least("same_answer", 0, tol=tol)
    x, y = _string(a), _string(b)
    if x is None or y is None:
        return False
    if x == y:
        return True
    if len(x) > LONG or len(y) > LONG:
        return digits(x) is not None and digits(x) == digits(y)
    x, y = plain(x), plain(y)
    return bool(x and y) and (x == y or _same(x, y, tol, percent))


def _same(x: str, y: str, tol: float, percent: bool) -> bool:
    p, q = number_of(x, is_plain=True), number_of(y, is_plain=True)
    if p is not None and q is not None:
        return equal(p, q, tol, percent)
    if p is None and q is None:
        if digits(x) is not None or digits(y) is not None:
            return digits(x) == digits(y)
        u, v = _words(x), _words(y)
        if u is not None and u == v:
            return True
    if _choice(x, y):
        return True
    xs, ys = _items(x), _items(y)
    if xs is not None and ys is not None and _both_numbers(xs[1], ys[1]):
        return _same_items(xs, ys, tol, percent)
    return (
        _worth_a_look(x, p)
        and _worth_a_look(y, q)
        and (_latex(x) or _latex(y))
        and _by_worker(x, y, tol) is True
    )


def _string(value: Any) -> str | None:
    """Text of an answer; None for None, NaN, infinities, truth values and all that is no answer."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if value.bit_length() > 3 * DIGITS if isinstance(value, int) else not isfinite(value):
        return None
    return str(value)


_EDGES = " \t\"'`*.,;:!"
_CHOICE = re.compile(r"(?:[Oo]ption |[Cc]hoice )?[(\[]?([A-Za-z])[)\]]?[.:]?")
_LABELLED = re.compile(r"(?<!\w)[(\[]?([A-Z])[)\].:]\s+\S")


def _words(text: str) -> str | None:
    """Words in lower case without quotes and final punctuation; mathematics (None) keeps its case."""
    choice = _CHOICE.fullmatch(text)
    if choice:
        return choice[1].casefold()
    bare = text.strip(_EDGES)
    return bare.casefold() if bare and not re.search(r"[\\^_{}=+*/<>\d]", bare) else None


def _choice(x: str, y: str) -> bool:
    """Whether the one is the letter of a choice and the other that letter with the text of the choice."""
    for short, long in ((x, y), (y, x)):
        one, labels = _CHOICE.fullmatch(short), _LABELLED.findall(long)
        if one and len(labels) == 1 and _LABELLED.match(long) and one[1].upper() == labels[0]:
            return True
    return False


def _items(text: str) -> tuple[str, list[str]] | None:
    """Opening bracket and items of a list of at most 50 without inner brackets."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    kind = text[:1] if text[:1] and text[:1] in "([{" else ""
    if kind and text[-1:] != {"(": ")", "[": "]", "{": "}"}[kind]:
        return None
    inside = text[1:-1] if kind else text
    items = [i.strip() for i in re.split(r",(?!\d{3}(?!\d))|;|\sand\s", inside)]
    if not 2 <= len(items) + bool(kind) <= 51 or re.search(r"[()\[\]{}]", inside):
        return None
    return kind, items


def _both_numbers(xs: list[str], ys: list[str]) -> bool:
    return all(number_of(i) is not None for i in (*xs, *ys))


def _same_items(xs: tuple[str, list[str]], ys: tuple[str, list[str]], tol: float, percent: bool) -> bool:
    (kind, left), (other, right) = xs, ys
    if len(left) != len(right) or (kind != other and not {kind, other} <= {"", "{"}):
        return False
    if kind in "([" and kind:  # points and intervals keep their order, sets and bare lists do not
        return all(_same(i, j, tol, percent) for i, j in zip(left, right, strict=True))
    rest = list(right)
    for i in left:
        match = next((j for j in rest if _same(i, j, tol, percent)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


_BASE = re.compile(r"\d\s?_\s?\{?\d")
_POWER_OF_TEN = re.compile(r"\d[eE][-+]?\d")  # one that number_of refused as too large
_RELATION = re.compile(r"[=<>≤≥≠≈]|\\(?:leq?|geq?|neq?|lt|gt|approx|sim|equiv|cong|in)(?![a-zA-Z])")
_NAMED = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z]\))?\s?(?:=|\\in(?![a-zA-Z]))\s?")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_FUNCTIONS = frozenset(
    re.findall(r"\w+", "sqrt sin cos tan log exp arcsin arccos arctan max min gcd lcm mod inf infty infinity")
)


def _latex(text: str) -> bool:
    return bool(re.search(r"[\\^_{}]|[A-Za-z]\s?[-+*/=<>]|[-+*/=<>]\s?[A-Za-z]|\d[A-Za-z(]", text))


def _worth_a_look(text: str, number: Number | None) -> bool:
    """Whether a text may be mathematics: no prose, no number base, no tower of powers, not too deep."""
    if number is not None:
        return True
    if (
        _BASE.search(text)
        or _POWER_OF_TEN.search(text)
        or "**" in text
        or text.count("{") > 60
        or text.count("(") > 60
    ):
        return False
    if text.count("{") != text.count("}") or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in text):
        return False
    words = _WORD.findall(_COMMAND.sub(" ", text))
    return len(text) <= 400 and all(w in _FUNCTIONS for w in words)


def _by_worker(x: str, y: str, tol: float) -> bool | None:
    if ("\\pm" in x) != ("\\pm" in y):  # math-verify takes a for plus or minus a
        return False
    if bool(_RELATION.search(x)) != bool(_RELATION.search(y)):  # and 8 = 7 or 8 > 7 for 7
        named = _NAMED.match(x) or _NAMED.match(y)
        if named is None:
            return False
        x, y = (x[named.end() :], y) if _NAMED.match(x) else (x, y[named.end() :])
        if _RELATION.search(x) or _RELATION.search(y):
            return False
        return _same(x, y, tol, percent=False)
    return _verify.verify(y, x, tol)


def score_one(
    completion: Any,
    gold: Any,
    *,
    extract: Callable[[Any], str | None] = extract_answer,
    same: Callable[[Any, Any], bool | None] = same_answer,
    right: float = 1.0,
    wrong: float = 0.0,
    missing: float = 0.0,
    abstain: tuple[Callable[[str], bool], float] | None = None,
) -> float | None:
    """The answer reward of one sample; ``accuracy`` maps it over a batch.

    Args:
        completion: text or chat messages.
        gold: the right answer: a number, or text that is the answer or (as in GSM8K) ends in a marked one.
        extract: completion -> answer or None.
        same: (answer, gold) -> bool, or None when the gold cannot be read.
        right: reward of a right answer.
        wrong: reward of an answer that is not right.
        missing: reward when there is no answer.
        abstain: (is_abstention, value): an answer, or an answer segment without a marked answer, that is not
            right and for which ``is_abstention(text)`` holds gets ``value``.

    Returns:
        One of the four values, or None when the gold cannot be read: it is empty, no text and no finite
        number, or LaTeX that math-verify does not parse.

    Source: none (plumbing)
    Basis: our own rules.

    Example:
        >>> (
        ...     score_one("#### 1,234", "1234"),
        ...     score_one("no idea", "1234", missing=-1.0),
        ...     score_one("#### 3", ""),
        ... )
        (1.0, -1.0, None)
    """
    wanted = _gold(gold)
    if wanted is None or (same is same_answer and not _readable(wanted)):
        return None
    answer = extract(completion)
    if answer is not None:
        verdict = same(answer, wanted)
        if verdict is None:
            return None
        if verdict:
            return right
    if abstain is not None:
        said = answer if answer is not None else (_segment(text_of(completion))[0] or "").strip()
        if said and abstain[0](said):
            return abstain[1]
    return missing if answer is None else wrong


def _gold(value: Any) -> str | None:
    text = _string(value)
    if text is None or text.casefold() in ("nan", "none", "null"):
        return None
    return extract_answer(text) if _any_mark(text[-_TAIL:]) else text


def _readable(gold: str) -> bool:
    if len(gold) > LONG or not ("\\" in gold or "^" in gold or "{" in gold):
        return True
    text = plain(gold)
    if number_of(text, is_plain=True) is not None or not _latex(text) or _items(text) is not None:
        return True
    return _BASE.search(text) is not None or _verify.verify(text, text, 1e-6) is not None


def accuracy(
    *,
    extract: Callable[[Any], str | None] = extract_answer,
    same: Callable[[Any, Any], bool | None] = same_answer,
    column: str = "answer",
    right: float = 1.0,
    wrong: float = 0.0,
    missing: float = 0.0,
    abstain: tuple[Callable[[str], bool], float] | None = None,
) -> Callable[..., list[float | None]]:
    """A reward that compares each completion's final answer with the right one.

    Args:
        extract: completion -> answer or None; ``partial(extract_answer, fmt="number")`` for bare numbers.
        same: (answer, gold) -> bool; ``partial(same_answer, percent=True)`` lets 50% agree with 50.
        column: name of the column with the right answers.
        right: reward of a right answer.
        wrong: reward of an answer that is not right.
        missing: reward when there is no answer.
        abstain: (is_abstention, value) for completions that decline; a right answer is never an abstention.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``; None where the gold cannot be
        read. It can be pickled, is logged as ``accuracy``, and ``reward.score_one(completion, gold)`` scores
        one sample.

    Raises:
        ValueError: a value is not finite; when called, the column is missing or too short.
        TypeError: a value is no number, ``extract`` or ``same`` cannot be called.

    Source: ReFT (2024) arXiv:2401.08967 (with ``wrong=0.1``: partial credit for a number that is there but
    wrong)
    Basis: second-hand
    Differs: a gold that cannot be read gives None, which TRL leaves out of the group, instead of 0 or 1.

    Example:
        >>> reward = accuracy(wrong=0.1, missing=0.0)
        >>> reward(prompts=["2+2?"] * 3, completions=["Answer: 4", "Answer: 5", "no idea"], answer=["4"] * 3)
        [1.0, 0.1, 0.0]
    """
    finite("accuracy", right=right, wrong=wrong, missing=missing)
    for name, function in (("extract", extract), ("same", same)):
        if not callable(function):
            raise TypeError(f"accuracy: expected {name} as a function, got {type(function).__name__}.")
    if abstain is not None:
        finite("accuracy", **{"abstain[1]": abstain[1]})
    one = partial(
        score_one, extract=extract, same=same, right=right, wrong=wrong, missing=missing, abstain=abstain
    )
    reward = partial(_accuracy, (one, column))
    reward.score_one = one  # type: ignore[attr-defined]  # verl scores one sample at a time
    return reward


def _accuracy(
    how: tuple[Callable[..., float | None], str], /, prompts: Any, completions: Any, **columns: Any
) -> list[float | None]:
    # ``how`` is positional-only: TRL passes every column of the data set by name, and none can overwrite it
    one, column = how
    golds = column_of("accuracy", columns, column, len(completions))
    return [one(completion, gold) for completion, gold in zip(completions, golds, strict=True)]


_accuracy.__name__ = "accuracy"  # what TRL logs; pickle goes by __qualname__
