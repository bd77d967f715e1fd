r"""Final answers: find the one a completion gives, and say whether it is the right one.

Conventions: the answer is read after the last ``</think>`` and nowhere else; a thought that was opened and
never closed has no answer; nothing is guessed (a number that merely stands last counts only with
``fmt="number"``). ``None`` as an answer means that there is none, ``None`` as a reward that the gold cannot
be read. Hostile text (``9**9**9**9``, a megabyte of braces, NUL, lone surrogates, a number of 100,000 digits)
costs milliseconds and raises nothing; LaTeX goes to math-verify in a process that is killed when it takes
too long.
Functions: ``extract_answer`` text -> answer; ``same_answer`` two answers -> bool; ``accuracy`` the reward;
``score_one`` the same for one sample; ``closeness`` partial credit by ``relative_error`` or another distance;
``f_beta`` a set of answers; ``matching`` a list of answers with partial credit.
"""

import re
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from math import cos, inf, isfinite, pi
from numbers import Real
from typing import Any, NamedTuple

from cotkit._check import at_least, between, finite, one_of, positive
from cotkit.rewards import _verify
from cotkit.rewards._call import functions
from cotkit.rewards._marks import TAIL, any_mark, clean, last_number, marked, segment_of
from cotkit.rewards._numbers import DIGITS, LONG, Number, digits, equal, number_of, plain
from cotkit.rewards._text import column_of, text_of

__all__ = [
    "accuracy",
    "closeness",
    "extract_answer",
    "f_beta",
    "matching",
    "relative_error",
    "same_answer",
    "score_one",
]

_FORMATS = ("auto", "think", "gsm8k", "boxed", "plain", "tag", "number", "letter")
_LETTER = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?(?![A-Za-z0-9'’])")


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
    segment, thought = segment_of(text)
    if segment is None or (fmt == "think" and not thought):
        return None
    segment = segment[-TAIL:]
    if fmt == "number":
        return last_number(segment)
    if fmt == "letter":
        letters = _LETTER.findall(segment)
        return letters[-1] if letters else None
    if fmt == "think":
        return clean(segment)
    return marked(segment, fmt, thought, 3)


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
        said = answer if answer is not None else (segment_of(text_of(completion))[0] or "").strip()
        if said and abstain[0](said):
            return abstain[1]
    return missing if answer is None else wrong


def _gold(value: Any) -> str | None:
    text = _string(value)
    if text is None or text.casefold() in ("nan", "none", "null"):
        return None
    return extract_answer(text) if any_mark(text[-TAIL:]) else text


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


def relative_error(answer: str, gold: str) -> float | None:
    """How far a number is from the right one, as a share of the right one.

    Args:
        answer: text of a number, with or without a unit.
        gold: text of the right number.

    Returns:
        Their difference divided by ``gold``, without sign, a fraction; for a gold of 0 it is 0 when equal and
        infinite otherwise. None if either is no plain number.

    Source: none (plumbing)

    Example:
        >>> relative_error("$9.00", "8"), relative_error("0", "0"), relative_error("1", "0")
        (0.125, 0.0, inf)
    """
    a, b = number_of(answer), number_of(gold)
    if a is None or b is None:
        return None
    if a.value == b.value:
        return 0.0
    if not b.value:
        return inf
    share = abs((a.value - b.value) / b.value)
    return float(share) if share < _FAR else float(_FAR)


_FAR = 10**300  # more does not fit into a float


class _Closeness(NamedTuple):
    distance: Callable[[str, str], float | None]
    full: float
    zero: float
    shape: str
    floor: float
    column: str
    extract: Callable[[Any], str | None]


def closeness(
    distance: Callable[[str, str], float | None] = relative_error,
    *,
    full: float = 0.05,
    zero: float = 0.20,
    shape: str = "cosine",
    floor: float = 0.0,
    column: str = "answer",
    extract: Callable[[Any], str | None] = extract_answer,
) -> Callable[..., list[float | None]]:
    r"""A reward for answers that are nearly right: 1 up to a distance, 0 from another one on, a ramp between.

    $f + (1 - f)\,\tfrac12(1 + \cos \pi u)$ or $f + (1 - f)(1 - u)$ with $u = (d - full) / (zero - full)$.

    Args:
        distance: (answer, gold) -> how far, or None when the answer cannot be compared.
        full: up to this distance the reward is 1.
        zero: from this distance on it is 0.
        shape: of the ramp, "cosine" or "linear".
        floor: f, what the ramp falls to just before ``zero``, in [0, 1].
        column: name of the column with the right answers.
        extract: completion -> answer or None; with a ``distance`` between things that a program draws, the
            program.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]`` in [0, 1], logged as ``closeness``;
        0 for an answer that is missing or cannot be compared, None where the gold cannot be compared with
        itself. It can be pickled if ``distance`` can; ``reward.score_one(completion, gold)`` scores one
        sample.

    Raises:
        ValueError: not 0 <= full < zero, ``floor`` outside [0, 1], another ``shape``; when called, the column
            is missing or too short.
        TypeError: ``distance`` or ``extract`` cannot be called, a value is no number.

    Source: Reason-RFT (2025) arXiv:2503.20752 (cosine ramp, relative error); CAD-Coder (2025)
        arXiv:2505.19713 (linear ramp from 1e-5 to 0.5 with floor 0.01, Chamfer distance)
    Basis: authors' code (Reason-RFT), second-hand (CAD-Coder)
    Differs: Reason-RFT's code divides by the gold, so that the right answer 0 gets 0; here it gets 1.

    Example:
        >>> texts = ["#### 104", "#### 112.5", "#### 121", "no idea"]
        >>> [round(r, 6) for r in closeness()(["?"] * 4, texts, answer=["100"] * 4)]
        [1.0, 0.5, 0.0, 0.0]
    """
    functions("closeness", distance=distance, extract=extract)
    at_least("closeness", 0, full=full)
    finite("closeness", zero=zero)
    if zero <= full:
        raise ValueError(f"closeness: expected full < zero, got {full} and {zero}.")
    one_of("closeness", ("cosine", "linear"), shape=shape)
    between("closeness", 0, 1, floor=floor)
    how = _Closeness(distance, full, zero, shape, floor, column, extract)
    reward = partial(_closeness, how)
    reward.score_one = partial(_near, how)  # type: ignore[attr-defined]
    return reward


def _closeness(how: _Closeness, /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    golds = column_of("closeness", columns, how.column, len(completions))
    return [_near(how, completion, gold) for completion, gold in zip(completions, golds, strict=True)]


_closeness.__name__ = "closeness"  # what TRL logs; pickle goes by __qualname__


def _near(how: _Closeness, completion: Any, gold: Any) -> float | None:
    wanted = _gold(gold)
    if wanted is None or how.distance(wanted, wanted) is None:
        return None
    answer = how.extract(completion)
    far = None if answer is None else how.distance(answer, wanted)
    if far is None or not far < how.zero:  # NaN is far
        return 0.0
    if far <= how.full:
        return 1.0
    u = (far - how.full) / (how.zero - how.full)
    return how.floor + (1 - how.floor) * (0.5 * (1 + cos(pi * u)) if how.shape == "cosine" else 1 - u)


class _FBeta(NamedTuple):
    parse: Callable[[str], Iterable[Any] | None]
    beta: float
    column: str
    valid_column: str | None
    duplicates: str


def f_beta(
    parse: Callable[[str], Iterable[Any] | None],
    *,
    beta: float = 1.0,
    column: str = "answer",
    valid_column: str | None = None,
    duplicates: str = "zero",
) -> Callable[..., list[float | None]]:
    r"""A reward for a set of answers: F-beta of what is named and what is right.

    $(1+\beta^2)\,p\,r / (\beta^2 p + r)$ with precision p and recall r.

    Args:
        parse: text -> the elements it names, or None when it cannot be read. Golds that are text are read
            with it as well. Elements are compared by equality; lists count as tuples.
        beta: > 0; above 1 recall weighs more than precision.
        column: name of the column with the right elements.
        valid_column: name of a column with the elements that exist at all; one that does not exist gives 0.
        duplicates: "zero": an element named twice gives 0; "merge": it counts once.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]`` in [0, 1], logged as ``f_beta``; 1
        when nothing is right and nothing is named, 0 when the text cannot be read, None when the gold cannot.
        It can be pickled if ``parse`` can.

    Raises:
        ValueError: ``beta`` not above 0, ``duplicates`` another word; when called, a column is missing or too
            short.
        TypeError: ``parse`` cannot be called, ``beta`` is no number.

    Source: Rex-Thinker (2025) arXiv:2506.04034 (beta 1); SoRFT (2025) arXiv:2502.20127 (beta 3, what does
        not exist gives 0)
    Basis: authors' code (Rex-Thinker), second-hand (SoRFT)
    Differs: nothing.

    Example:
        >>> reward = f_beta(str.split)
        >>> reward(["?"] * 3, ["a b", "a a", "a c"], answer=["a c"] * 3)
        [0.5, 0.0, 1.0]
    """
    functions("f_beta", parse=parse)
    positive("f_beta", beta=beta)
    one_of("f_beta", ("zero", "merge"), duplicates=duplicates)
    return partial(_f_beta, _FBeta(parse, beta, column, valid_column, duplicates))


def _f_beta(how: _FBeta, /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    n = len(completions)
    golds = column_of("f_beta", columns, how.column, n)
    exist = [None] * n if how.valid_column is None else column_of("f_beta", columns, how.valid_column, n)
    return [_f(how, *sample) for sample in zip(completions, golds, exist, strict=True)]


_f_beta.__name__ = "f_beta"  # what TRL logs; pickle goes by __qualname__


def _elements(parse: Callable[[str], Iterable[Any] | None], given: Any) -> list[Hashable] | None:
    found = parse(given) if isinstance(given, str) else given
    return None if found is None else [tuple(i) if isinstance(i, list) else i for i in found]


def _f(how: _FBeta, completion: Any, gold: Any, exist: Any) -> float | None:
    wanted = _elements(how.parse, gold)
    if wanted is None:
        return None
    named = _elements(how.parse, text_of(completion))
    if named is None or (how.duplicates == "zero" and len(set(named)) < len(named)):
        return 0.0
    if exist is not None and not set(named) <= set(_elements(how.parse, exist) or ()):
        return 0.0
    if not wanted and not named:
        return 1.0
    hits = len(set(named) & set(wanted))
    # the same as with precision hits / named and recall hits / wanted, and 0 when there is no hit
    square = how.beta**2
    return (1 + square) * hits / (len(set(named)) + square * len(set(wanted)))


def matching(
    parse: Callable[[str], Iterable[Any] | None],
    score: Callable[[Any, Any], float],
    *,
    column: str = "answer",
) -> Callable[..., list[float | None]]:
    r"""A reward for a list of answers in which an element may be partly right.

    $\frac{u}{\max(|P|, |T|)} \sum_{(p,t)} s(p, t)$ over pairs matched greedily, each element once, the best
    first; u is the share of distinct elements among those named.

    Args:
        parse: text -> the elements it names, or None when it cannot be read. Golds that are text are read
            with it as well.
        score: (named, right) -> credit in [0, 1]; 0 never matches.
        column: name of the column with the right elements.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]`` in [0, 1], logged as ``matching``; 1
        when nothing is right and nothing is named, 0 when the text cannot be read, None when the gold cannot.
        Of more than 1,000 different elements only the first 1,000 can earn credit. It can be pickled if
        ``parse`` and ``score`` can.

    Raises:
        ValueError: when called, the column is missing or too short, or ``score`` leaves [0, 1].
        TypeError: ``parse`` or ``score`` cannot be called.

    Source: Reason-RFT (2025) arXiv:2503.20752 (triples: 1 whole, 0.5 function and one argument, 0.25
        function)
    Basis: authors' code
    Differs: their code gives 0 when nothing is right and nothing is named, and matches elements of equal
        credit in the order of a Python set, which changes from run to run; here they are matched in reading
        order.

    Example:
        >>> half = lambda p, t: (p == t) / 2 + (p[0] == t[0]) / 2
        >>> matching(str.split, half)(["?"] * 2, ["a1 b2", "a1 b9 b9"], answer=["a1 b2"] * 2)
        [1.0, 0.5]
    """
    functions("matching", parse=parse, score=score)
    return partial(_matching, (parse, score, column))


def _matching(
    how: tuple[Callable[[str], Iterable[Any] | None], Callable[[Any, Any], float], str],
    /,
    prompts: Any,
    completions: Any,
    **columns: Any,
) -> list[float | None]:
    parse, score, column = how
    golds = [_elements(parse, g) for g in column_of("matching", columns, column, len(completions))]
    named = [_elements(parse, text_of(c)) for c in completions]
    return [None if t is None else _matched(p, t, score) for p, t in zip(named, golds, strict=True)]


_matching.__name__ = "matching"  # what TRL logs; pickle goes by __qualname__
_PAIRED = 1_000


def _matched(
    named: list[Hashable] | None, right: list[Hashable], score: Callable[[Any, Any], float]
) -> float:
    if not named or not right:
        return float(named is not None and not named and not right)
    left, wanted = list(dict.fromkeys(named)), list(dict.fromkeys(right))
    pairs = [
        (score(p, t), i, j) for i, p in enumerate(left[:_PAIRED]) for j, t in enumerate(wanted[:_PAIRED])
    ]
    worst = next((s for s, *_ in pairs if not 0 <= s <= 1), None)
    if worst is not None:
        raise ValueError(f"matching: expected score in [0, 1], got {worst}.")
    total, free, open_ = 0.0, set(range(len(left))), set(range(len(wanted)))
    for s, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if i in free and j in open_:
            total += s
            free.remove(i)
            open_.remove(j)
    return total * len(left) / len(named) / max(len(left), len(wanted))
