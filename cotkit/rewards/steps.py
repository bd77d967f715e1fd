"""Steps of a thought: the equations it writes, the steps it should contain, and what each step is worth.

Conventions: numbers are exact (``int`` or ``Fraction``), nothing is evaluated by Python, sizes are bounded.
``correct`` is a reward; at least 0.5 means right, None gives None.
Functions: ``calculate`` an expression -> its value; ``find_equations`` text -> equations with a verdict;
``equations`` the reward, the share that holds; ``key_steps`` a reward for steps a solution needs;
``rollout_values`` how often each beginning of a thought ends well; ``quality_drop`` a reward that minds a
sudden fall of the steps' scores; ``step_quality`` three judgements of each step in one.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cotkit._check import at_least, finite, floating, integers, ndim, positive
from cotkit.rewards._call import Reward, functions, verdicts
from cotkit.rewards._text import column_of, text_of
from cotkit.rewards.answer import extract_answer

__all__ = [
    "Equation",
    "calculate",
    "equations",
    "find_equations",
    "key_steps",
    "quality_drop",
    "rollout_values",
    "step_quality",
]

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
        kind, sign, start, end = token
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
            # a sign starts an expression only when it is glued to a number and no bullet or hyphen
            glued = re.match(r"\.?\d|\$|\(", text[end : end + 2]) is not None
            if sign in "+-−" and glued and not _hyphen(text, start, previous):
                side.append(token)
        elif kind in ("number", "open") and side and side[-1][0] in ("number", "close"):
            close()  # two numbers side by side: a new expression begins
            side = [token]
        else:
            side.append(token)
        previous = kind
    close()
    return found


def _hyphen(text: str, start: int, previous: str) -> bool:
    """Whether a sign joins the word (or the closing bracket) right before it with what follows."""
    return previous == "other" and (text[start - 1].isalnum() or text[start - 1] in "_]}")


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


class _KeySteps(NamedTuple):
    correct: Reward
    alpha: float
    column: str
    extract: Callable[[Any], str | None]


def key_steps(
    correct: Reward,
    *,
    alpha: float = 0.1,
    column: str = "key_steps",
    extract: Callable[[Any], str | None] = extract_answer,
) -> Callable[..., list[float | None]]:
    r"""A reward for the answer and, a little, for the key steps that the thought contains.

    $1 + \alpha k$ if right, $\alpha k$ if wrong but answered, 0 without an answer; k is the share of key
    steps found.

    Args:
        correct: the reward that says which answers are right.
        alpha: what all key steps together are worth.
        column: name of the column with each row's key steps: a list whose items are a text, or a list of
            texts that say the same; or a dict {"Steps": that list}; or a list of such dicts, one for each
            reference solution, of which the best counts. None or an empty list gives k = 0.
        extract: completion -> answer or None.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``, logged as ``key_steps``; None where
        ``correct`` is None. It can be pickled if ``correct`` can.

    Raises:
        ValueError: ``alpha`` not finite; when called, the column is missing or too short.
        TypeError: ``correct`` or ``extract`` cannot be called, ``alpha`` is no number.

    Source: R1-VL (2025) arXiv:2503.12937 (StepRAR); MME-CoT (2025) arXiv:2502.09621 (k is its recall, the
        best over reference solutions)
    Basis: authors' code
    Differs: their code finds "4" in "14" and pays for key steps without an answer; here a key step must stand
        alone, in the thought (before ``</think>``, or in all of a text that has no such tag).

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> keys = [["6/3 = 2", "6 divided by 3 is 2"], "2*7 = 14"]
        >>> texts = ["6/3 = 2, so #### 14", "2*7 = 14 and 6 divided by 3 is 2, #### 3", "6/3 = 2"]
        >>> key_steps(accuracy())(["?"] * 3, texts, answer=["14"] * 3, key_steps=[keys] * 3)
        [1.05, 0.1, 0.0]
    """
    functions("key_steps", correct=correct, extract=extract)
    finite("key_steps", alpha=alpha)
    return partial(_key_steps, _KeySteps(correct, alpha, column, extract))


def _key_steps(how: _KeySteps, /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    wanted = column_of("key_steps", columns, how.column, len(completions))
    good = verdicts("key_steps", how.correct, prompts, completions, columns)
    result: list[float | None] = []
    for completion, keys, ok in zip(completions, wanted, good, strict=True):
        if ok is None:
            result.append(None)
        elif not ok and how.extract(completion) is None:
            result.append(0.0)
        else:
            result.append(float(ok) + how.alpha * _share_found(text_of(completion), keys))
    return result


_key_steps.__name__ = "key_steps"  # what TRL logs; pickle goes by __qualname__


def _share_found(text: str, keys: Any) -> float:
    closed = text.rfind("</think>")
    thought = _even(text[: closed if closed >= 0 else len(text)][:_TEXT])
    solutions = keys if keys and isinstance(keys, list) and isinstance(keys[0], dict) else [keys]
    return max(_found(thought, s.get("Steps") if isinstance(s, dict) else s) for s in solutions)


def _found(thought: str, keys: Any) -> float:
    variants = [[key] if isinstance(key, str) else list(key) for key in keys or ()]
    return sum(any(_stands(v, thought) for v in group) for group in variants) / max(1, len(variants))


def _even(text: str) -> str:
    return " ".join(text.casefold().split())


def _stands(key: str, thought: str) -> bool:
    """Whether a key step stands in the text and is no part of a longer number or word."""
    key = _even(key)
    if not key or key not in thought:
        return False
    before = r"(?<!\w)(?<!\d[.,])" if re.match(r"\w", key) else ""
    after = r"(?!\w|[.,]\d)" if re.search(r"\w$", key) else ""
    return re.search(before + re.escape(key) + after, thought) is not None


def rollout_values(
    generate: Callable[[Sequence[Any], int], list[list[str]]],
    prompt: Any,
    steps: Sequence[str],
    reward: Reward,
    *,
    n: int = 16,
    at: Sequence[int] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""Value of each beginning of a thought: the share of ``n`` continuations of it that end well.

    A step after which the value falls to 0 is where the thought went wrong. Values are estimates: with few
    continuations they are not monotone, and a search by bisection may be misled.

    Args:
        generate: ``(prompts, n) -> list[list[str]]``; called once, with all beginnings.
        prompt: text, or chat messages (the beginning is then the assistant's own last message).
        steps: pieces of text that one after the other make the completion, separators and tags included.
        reward: scores completions, each a beginning with its continuation; at least 0.5 is a success.
        n: continuations of each beginning.
        at: which steps to end at, counted from 0 and included; None = each.
        columns: values of the row that ``reward`` needs, one each (``answer="14"``).

    Returns:
        One share in [0, 1] for each of ``at``; None where no continuation could be scored.

    Raises:
        ValueError: ``n`` below 1, ``at`` outside the steps, ``generate`` returns another number of texts.
        TypeError: ``steps`` is one string, ``generate`` or ``reward`` cannot be called, ``n`` is no int.

    Source: SIPF (2024) arXiv:2412.08393 (a step is good if more than delta succeed); URSA (2025)
        arXiv:2501.04686 (bisection for the first step without success)
    Basis: second-hand
    Differs: nothing.

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> def generate(prompts, n):  # goes on rightly unless it has read a 9
        ...     return [["#### 5" if "9" in p else "#### 14"] * n for p in prompts]
        >>> rollout_values(generate, "2*(3+4)?", ["3+4=7\n", "7*2=9\n"], accuracy(), n=2, answer="14")
        [1.0, 0.0]
    """
    functions("rollout_values", generate=generate, reward=reward)
    if isinstance(steps, str):
        raise TypeError("rollout_values: expected steps as a list of texts, got one string. Pass [text].")
    integers("rollout_values", n=n)
    at_least("rollout_values", 1, n=n)
    ends = list(range(len(steps))) if at is None else list(at)
    outside = [i for i in ends if not 0 <= i < len(steps)]
    if outside:
        raise ValueError(f"rollout_values: expected at in [0, {len(steps) - 1}], got {outside}.")
    if not ends:
        return []
    begun = ["".join(steps[: i + 1]) for i in ends]
    written = generate([_go_on(prompt, text) for text in begun], n)
    if [len(w) for w in written] != [n] * len(ends):
        raise ValueError(f"rollout_values: expected {len(ends)} lists of {n} texts from generate.")
    texts = [text + more for text, several in zip(begun, written, strict=True) for more in several]
    row = {name: [value] * len(texts) for name, value in columns.items()}
    good = verdicts("rollout_values", reward, [prompt] * len(texts), texts, row)
    values: list[float | None] = []
    for k in range(len(ends)):
        known = [ok for ok in good[k * n : (k + 1) * n] if ok is not None]
        values.append(sum(known) / len(known) if known else None)
    return values


def _go_on(prompt: Any, begun: str) -> Any:
    return prompt + begun if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": begun}]


class _Drop(NamedTuple):
    step_scores: Callable[..., Sequence[Sequence[float]]]
    correct: Reward
    rho: float
    gamma: float


def quality_drop(
    step_scores: Callable[..., Sequence[Sequence[float]]],
    correct: Reward,
    *,
    rho: float = 0.3,
    gamma: float = 0.5,
) -> Callable[..., list[float | None]]:
    r"""A reward for right answers, less where the score of a step falls suddenly. RECONSTRUCTED.

    1 if right; $1 - \gamma$ if right and $\max_j (s_j - s_{j+1}) / s_j > \rho$; 0 if wrong. Scores are not
    added
    to the reward: a policy that is paid for them writes few and safe steps.

    Args:
        step_scores: called like a reward, ``(prompts, completions, **columns)``, it gives a list of scores
            for each completion, one per step, at least 0 (a process reward model).
        correct: the reward that says which answers are right.
        rho: a relative fall of more than this is a drop.
        gamma: what a drop costs.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``, logged as ``quality_drop``; None
        where ``correct`` is None. Fewer than two steps cannot drop, and from a score of 0 nothing falls. It
        can be pickled if its parts can.

    Raises:
        ValueError: ``rho`` below 0, ``gamma`` not finite; when called, ``step_scores`` gives another number
            of lists.
        TypeError: ``step_scores`` or ``correct`` cannot be called, a value is no number.

    Source: URSA (2025) arXiv:2501.04686 (PS-GRPO)
    Basis: second-hand; the relative form of the fall is reconstructed
    Differs: unknown.

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> model = lambda prompts, completions, **columns: [[0.9, 0.85, 0.3], [0.9, 0.8, 0.7], [0.9, 0.1]]
        >>> texts = ["#### 4", "#### 4", "#### 5"]
        >>> quality_drop(model, accuracy())(["?"] * 3, texts, answer=["4"] * 3)
        [0.5, 1.0, 0.0]
    """
    functions("quality_drop", step_scores=step_scores, correct=correct)
    at_least("quality_drop", 0, rho=rho)
    finite("quality_drop", gamma=gamma)
    return partial(_quality_drop, _Drop(step_scores, correct, rho, gamma))


def _quality_drop(how: _Drop, /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    good = verdicts("quality_drop", how.correct, prompts, completions, columns)
    scored = list(how.step_scores(prompts=prompts, completions=completions, **columns))
    if len(scored) != len(completions):
        raise ValueError(
            f"quality_drop: expected scores of {len(completions)} completions, got {len(scored)}."
        )
    return [
        None if ok is None else float(ok) * (1.0 - how.gamma * _falls(steps, how.rho))
        for ok, steps in zip(good, scored, strict=True)
    ]


_quality_drop.__name__ = "quality_drop"  # what TRL logs; pickle goes by __qualname__


def _falls(scores: Sequence[float], rho: float) -> bool:
    return any(a > 0 and (a - b) / a > rho for a, b in pairwise(scores))


def step_quality(
    question: Tensor,
    steps: Tensor,
    response: Tensor,
    quality: Tensor,
    negatives: Tensor,
    *,
    tau: float = 0.1,
) -> Tensor:
    r"""Three judgements of each step in one: does the answer use it, is it good, does it follow.

    $r_t = \sum_k w_t^k r_t^k$ with $w_t = \mathrm{softmax}(r_t^1, r_t^2, r_t^3)$: alignment
    $\max_j \cos(s_t, a_j)$, quality of a judge, and coherence
    $\log\big(e^{\cos(s_{t-1}, s_t)/\tau} / \sum_{s'} e^{\cos(s_{t-1}, s')/\tau}\big)$ over the negatives.
    All are constants.

    Args:
        question: embedding of the question, [D]: what comes before the first step.
        steps: embeddings of the steps of the thought, [T, D].
        response: embeddings of the steps of the final response, [R, D].
        quality: a judge's score of each step, [T], in [0, 1].
        negatives: embeddings of steps of other thoughts, [N, D].
        tau: > 0; the temperature of the comparison with the negatives.

    Returns:
        The target for a process reward model, [T]; where the three agree it is their common value.

    Raises:
        ValueError: the shapes do not fit, no step in ``response`` or ``negatives``, ``tau`` not above 0.
        TypeError: no float tensors.

    Source: ReasonFlux-PRM (2025) arXiv:2506.18896
    Basis: second-hand (the released code trains and applies the model, this target is not in it)
    Differs: unknown.

    Example:
        >>> one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> step_quality(
        ...     one, one[None], one[None], torch.tensor([1.0]), two[None], tau=1.0
        ... )  # all three are 1
        tensor([1.])
    """
    floating(
        "step_quality",
        question=question,
        steps=steps,
        response=response,
        quality=quality,
        negatives=negatives,
    )
    ndim("step_quality", "D", question=question)
    ndim("step_quality", "T D", steps=steps)
    ndim("step_quality", "R D", response=response)
    ndim("step_quality", "N D", negatives=negatives)
    ndim("step_quality", "T", quality=quality)
    positive("step_quality", tau=tau)
    width = {t.shape[-1] for t in (question, steps, response, negatives)}
    if len(width) > 1 or quality.shape[0] != steps.shape[0]:
        raise ValueError(
            f"step_quality: expected one width D and as many qualities as steps, got widths {sorted(width)}, "
            f"{quality.shape[0]} qualities, {steps.shape[0]} steps."
        )
    if not len(response) or not len(negatives):
        raise ValueError("step_quality: expected at least one step in response and in negatives, got none.")
    q, s, a, others = (
        torch.nn.functional.normalize(t.detach(), dim=-1) for t in (question, steps, response, negatives)
    )
    before = torch.cat([q[None], s])[:-1]  # s_{t-1}
    alignment = (s @ a.T).amax(-1)
    coherence = (before * s).sum(-1) / tau - (before @ others.T / tau).logsumexp(-1)
    scores = torch.stack([alignment, quality.detach(), coherence], -1)
    return (scores.softmax(-1) * scores).sum(-1)
