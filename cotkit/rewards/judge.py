"""Judges: another model's opinion of a completion, or what it makes of it, as a reward.

Conventions: ``generate(prompts, n) -> list[list[str]]`` writes; a ``judge(prompt, a, b)`` gives the
probability that a is better, in [0, 1]. A ``template`` is a name of ``prompts.templates()``, a
``Template``, or a text with ``{prompt}``, ``{text}`` (what is judged) and ``{column}`` for the columns of
the data. A completion can try to
talk a judge round: keep a reward that cannot be talked to beside it.
Functions: ``rubric`` a model's mark, read by ``first_number``; ``pairwise`` a judge without position bias;
``crowd`` a judge that has seen how others fare; ``downstream`` how well another model does with the text;
``answer_gain`` how much likelier the thought makes the gold answer.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

from cotkit import prompts as _prompts
from cotkit._check import at_least, finite, integers, one_of, positive
from cotkit.prompts import Template
from cotkit.rewards._call import Reward, functions, prompt_text, scores
from cotkit.rewards._text import column_of, text_of

__all__ = ["answer_gain", "crowd", "downstream", "first_number", "pairwise", "rubric"]

Generate = Callable[[Sequence[Any], int], list[list[str]]]
Judge = Callable[[Any, str, str], float]


def first_number(text: str) -> float | None:
    """The first number of a text: how a judge's mark is read unless you say otherwise.

    Args:
        text: what the judge wrote.

    Returns:
        The number, or None if there is none or it has more than 15 digits.

    Source: none (plumbing)

    Example:
        >>> first_number("Rating: [[85]] of 100"), first_number("8.5/10"), first_number("very good")
        (85.0, 8.5, None)
    """
    found = re.search(r"(?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)", text[:10_000])
    return float(found[0]) if found and len(found[0]) <= 17 else None


class _Rubric(NamedTuple):
    generate: Generate
    template: Template
    parse: Callable[[str], float | None]
    scale: float
    n: int


def rubric(
    generate: Callable[[Sequence[Any], int], list[list[str]]],
    template: str | Template,
    *,
    parse: Callable[[str], float | None] = first_number,
    scale: float = 1.0,
    n: int = 1,
) -> Reward:
    """A reward that is the mark a model gives: the mean of ``n`` marks, divided by the highest.

    Args:
        generate: ``(prompts, n) -> list[list[str]]``, the judge; called once.
        template: what it is asked, with ``{text}`` for the completion; it may name the gold.
        parse: what the judge wrote -> mark or None.
        scale: > 0; the highest mark (100 for marks of 1 to 100).
        n: marks of each completion.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]`` in [-1, 1], logged as ``rubric``. A
        mark that cannot be read, or lies beyond ``scale``, is left out; None where none is left. It can be
        pickled if ``generate`` and ``parse`` can.

    Raises:
        ValueError: ``scale`` not above 0, ``n`` below 1, a single word that is no name of a template; when
            called, the template needs a column that is not there, ``generate`` returns another number of
            texts.
        TypeError: ``generate`` or ``parse`` cannot be called.

    Source: LongRePS (2025) arXiv:2502.20790 (marks of 1 to 100)
    Basis: authors' code
    Differs: there only full marks are kept; here the mark is the reward.

    Example:
        >>> def strict(prompts, n):
        ...     return [["Mark: 90" if "because" in p else "Mark: 20"] * n for p in prompts]
        >>> reward = rubric(strict, "Mark this answer to {prompt} from 0 to 100: {text}", scale=100)
        >>> reward(["Why?"] * 2, ["because", "no"])
        [0.9, 0.2]
    """
    functions("rubric", generate=generate, parse=parse)
    positive("rubric", scale=scale)
    _count("rubric", n)
    return partial(_rubric, _Rubric(generate, _template(template, "judge"), parse, scale, n))


def _rubric(how: _Rubric, /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    asked = _filled("rubric", how.template, prompts, completions, columns)
    result: list[float | None] = []
    for written in _write("rubric", how.generate, asked, how.n):
        marks = [how.parse(text) for text in written]
        known = [m for m in marks if m is not None and isfinite(m) and abs(m) <= how.scale]
        result.append(sum(known) / len(known) / how.scale if known else None)
    return result


_rubric.__name__ = "rubric"  # what TRL logs; pickle goes by __qualname__


def _count(fn: str, n: int) -> None:
    integers(fn, n=n)
    at_least(fn, 1, n=n)


def _template(template: Any, writer: str) -> Template:
    if isinstance(template, str) and re.search(r"\W", template):
        template = Template("text", template, writer)
    elif not isinstance(template, Template):
        if template not in _prompts.templates():
            _prompts.apply(template, {})  # refuses it, and names the nearest
        template = _prompts.templates()[template]
    _prompts.apply(template, dict.fromkeys(template.fields, "?"))  # a solver that would see the gold
    return template


def _filled(
    fn: str, template: Template, prompts: Any, completions: Sequence[Any], columns: dict[str, Any]
) -> list[Any]:
    """The template filled for each completion."""
    n = len(completions)
    asked = [prompt_text(p) for p in prompts] if prompts is not None else [""] * n
    if len(asked) != n:
        raise ValueError(f"{fn}: expected {n} prompts, got {len(asked)}. Pass one per completion.")
    used = [name for name in template.fields if name in columns]
    values = {name: column_of(fn, columns, name, n) for name in used}
    rows = [
        {**{name: values[name][i] for name in used}, "prompt": asked[i], "text": text_of(completions[i])}
        for i in range(n)
    ]
    return [_prompts.apply(template, row) for row in rows]


def _write(fn: str, generate: Generate, asked: list[Any], n: int) -> list[list[str]]:
    if not asked:
        return []
    written = generate(asked, n)
    if [len(w) for w in written] != [n] * len(asked):
        raise ValueError(f"{fn}: expected {len(asked)} lists of {n} texts from generate.")
    return written


def pairwise(compare: Callable[[Any, str, str], float | None], *, swap: bool = True) -> Judge:
    """A judge that asks in both orders, so that liking the first answer decides nothing.

    Args:
        compare: (prompt, first, second) -> probability that the first is better, or None when it cannot be
            read.
        swap: False asks in the given order only.

    Returns:
        ``judge(prompt, a, b)``: probability that a is better, the mean over the two orders; 0.5 when neither
        can be read, as for a ``compare`` that always prefers the first. It can be pickled if ``compare`` can.

    Raises:
        ValueError: when called, ``compare`` leaves [0, 1].
        TypeError: ``compare`` cannot be called.

    Source: SELF-JUDGE (2024) arXiv:2402.11253
    Basis: authors' code
    Differs: theirs scores a and b apart, each by the probability of its letter over the whole vocabulary;
        for a ``compare`` normalised over the two letters the order of a and b is the same.

    Example:
        >>> likes_first_and_long = lambda prompt, a, b: 0.6 + 0.3 * (len(a) > len(b))
        >>> judge = pairwise(likes_first_and_long)
        >>> round(judge("?", "long", "no"), 3), round(judge("?", "no", "long"), 3), judge("?", "no", "no")
        (0.65, 0.35, 0.5)
    """
    functions("pairwise", compare=compare)
    return partial(_pairwise, (compare, bool(swap)))


def _pairwise(how: tuple[Callable[..., float | None], bool], /, prompt: Any, a: str, b: str) -> float:
    compare, swap = how
    first = compare(prompt, a, b)
    second = compare(prompt, b, a) if swap else None
    known = [p for p in (first, None if second is None else 1 - second) if p is not None]
    if not all(0 <= p <= 1 for p in known):
        raise ValueError(f"pairwise: expected probabilities from compare, got {first} and {second}.")
    return sum(known) / len(known) if known else 0.5


_pairwise.__name__ = "pairwise"

_REFERENCES = "{prompt}\n\nRemarks on earlier comparisons, for reference only:\n{critiques}"
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")


class _Crowd(NamedTuple):
    judge: Judge
    critique: Callable[[Any, str, str], str]
    others: Callable[[Any], Sequence[str]]
    k: int
    keep: str
    template: str


def crowd(
    judge: Callable[[Any, str, str], float],
    critique: Callable[[Any, str, str], str],
    others: Callable[[Any], Sequence[str]],
    *,
    k: int = 16,
    keep: str = "losing",
    template: str = _REFERENCES,
) -> Judge:
    """A judge that first sees both answers criticised beside those of others.

    Each of the two is compared with every answer of the crowd; of those critiques the ones in which it loses
    (they say more) are kept, their verdicts are struck out, and ``judge`` decides with them in front of it.

    Args:
        judge: (prompt, a, b) -> probability that a is better; the prompt it gets is text, with the critiques.
        critique: (prompt, candidate, other) -> a critique that ends in ``[[A]]`` if the candidate is better,
            ``[[B]]`` if the other is.
        others: prompt -> answers of the crowd.
        k: at most so many critiques are shown, half of them for each of the two as far as there are; 0 = the
            bare ``judge``, and the crowd is not asked.
        keep: "losing" those in which the candidate loses, "winning" those in which it wins, "all".
        template: how the prompt and the critiques are put together, ``{prompt}`` and ``{critiques}``.

    Returns:
        ``judge(prompt, a, b)``. Critiques without a verdict, or with a tie ``[[C]]``, are dropped unless
        ``keep`` is "all". It can be pickled if its parts can. Wrap it in ``pairwise`` to ask in both orders.

    Raises:
        ValueError: ``k`` below 0, another ``keep``, a template without its two fields.
        TypeError: a part cannot be called, ``k`` is no int.

    Source: CCE (2025) arXiv:2502.12501
    Basis: authors' code (the selection; our template)
    Differs: theirs draws the critiques at random and lets a model rewrite them without the verdict; here they
        keep the crowd's order, a and b in turn, and ``[[A]]`` and ``[[B]]`` are struck out.

    Example:
        >>> judge = lambda prompt, a, b: 0.9 if "b: no reason" in prompt else 0.5
        >>> critique = lambda prompt, answer, other: "fine [[A]]" if "so" in answer else "no reason [[B]]"
        >>> crowd(judge, critique, lambda prompt: ["an answer"])("?", "7, so 14", "14")
        0.9
    """
    functions("crowd", judge=judge, critique=critique, others=others)
    integers("crowd", k=k)
    at_least("crowd", 0, k=k)
    one_of("crowd", ("losing", "winning", "all"), keep=keep)
    if set(Template("crowd", template).fields) != {"prompt", "critiques"}:
        raise ValueError(f"crowd: expected template with {{prompt}} and {{critiques}}, got {template!r}.")
    return partial(_crowd, _Crowd(judge, critique, others, k, keep, template))


def _crowd(how: _Crowd, /, prompt: Any, a: str, b: str) -> float:
    crowd_ = list(how.others(prompt)) if how.k else []
    both = [_kept(how, prompt, name, answer, crowd_) for name, answer in (("a", a), ("b", b))]
    turns = max(map(len, both))
    shown = [kept[i] for i in range(turns) for kept in both if i < len(kept)][: how.k]
    if not shown:
        return how.judge(prompt, a, b)
    row = {"prompt": prompt_text(prompt), "critiques": "\n".join(shown)}
    return how.judge(_prompts.apply(Template("crowd", how.template, "judge"), row), a, b)


_crowd.__name__ = "crowd"


def _kept(how: _Crowd, prompt: Any, name: str, answer: str, crowd_: Sequence[str]) -> list[str]:
    kept = []
    for other in crowd_:
        text = how.critique(prompt, answer, other)
        verdicts = _VERDICT.findall(text)
        wanted = {"losing": "B", "winning": "A"}.get(how.keep)
        if wanted is None or verdicts[-1:] == [wanted]:
            kept.append(f"{name}: {' '.join(_VERDICT.sub(' ', text).split())}")
    return kept


class _Downstream(NamedTuple):
    generate: Generate
    template: Template
    reward: Reward
    n: int


def downstream(
    generate: Callable[[Sequence[Any], int], list[list[str]]],
    template: str | Template,
    reward: Reward,
    *,
    n: int = 8,
) -> Reward:
    """A reward for a text by what it is good for: the mean reward of another model that is given it.

    A critique is worth the share of revisions that it makes right, a strategy the share of its solutions.
    Where it should count only sometimes, put it behind ``combine.gated``, which does not call it elsewhere.

    Args:
        generate: ``(prompts, n) -> list[list[str]]``, the other model (not the one that is trained); called
            once.
        template: what it is asked, with ``{text}`` for the completion and no gold: a text of your own is for
            a solver.
        reward: scores what the other model writes; it gets the row's columns.
        n: how often it writes.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``, logged as ``downstream``: means
        over what could be scored, None where nothing could. It can be pickled if its parts can.

    Raises:
        ValueError: ``n`` below 1, a gold column in the template; when called, the template needs a column
            that is not there, ``generate`` returns another number of texts.
        TypeError: ``generate`` or ``reward`` cannot be called.

    Source: RefCritic (2025) arXiv:2507.15024 (a critique, by refinements); ReasonFlux-PRM (2025)
        arXiv:2506.18896 (a strategy, by solutions); MultiCritique (2024) arXiv:2410.15287 (a critique, by
        the quality of revisions)
    Basis: second-hand
    Differs: nothing.

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> def pupil(prompts, n):
        ...     return [["#### 14", "#### 14" if "step 2" in p else "#### 9"] * (n // 2) for p in prompts]
        >>> reward = downstream(pupil, "{prompt} Advice: {text}", accuracy(), n=4)
        >>> reward(["2*(3+4)?"] * 2, ["look at step 2", "well done"], answer=["14"] * 2)
        [1.0, 0.5]
    """
    functions("downstream", generate=generate, reward=reward)
    _count("downstream", n)
    return partial(_downstream, _Downstream(generate, _template(template, "solver"), reward, n))


def _downstream(how: _Downstream, /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    asked = _filled("downstream", how.template, prompts, completions, columns)
    written = _write("downstream", how.generate, asked, how.n)
    many = range(len(completions) * how.n)
    row = {
        name: [value[i // how.n] for i in many]
        if isinstance(value, list | tuple) and len(value) == len(completions)
        else value
        for name, value in columns.items()
        if name != "completion_ids"  # they belong to the text that was judged
    }
    questions = None if prompts is None else [prompts[i // how.n] for i in many]
    given = scores("downstream", how.reward, questions, [t for texts in written for t in texts], row)
    result: list[float | None] = []
    for i in range(len(completions)):
        known = [s for s in given[i * how.n : (i + 1) * how.n] if s is not None]
        result.append(sum(known) / len(known) if known else None)
    return result


_downstream.__name__ = "downstream"  # what TRL logs; pickle goes by __qualname__


class _Gain(NamedTuple):
    score: Reward
    baseline: Reward | str
    squash: Callable[[float], float] | None


def answer_gain(
    score: Reward,
    baseline: Reward | str,
    *,
    squash: Callable[[float], float] | None = None,
) -> Reward:
    r"""A reward for a thought by how much it helps the gold answer: with it against without it.

    $g(s(\text{thought})) - g(s_0)$, where s is a log-probability of the gold answer, or its margin over the
    other choices. A constant to the gradient.

    Args:
        score: a reward, ``(prompts, completions, **columns)``: s of the gold answer given the thought.
        baseline: $s_0$: a reward of the same form (the score without the thought, or with that of a frozen
            model), or the name of a column that holds it.
        squash: g, applied to both; None = they are subtracted as they are. Crystal's is tanh(s) / 2.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float | None]``, logged as ``answer_gain``, in the
        unit of ``score`` (nats, or what ``squash`` makes of it); None where either is None. It can be pickled
        if its parts can.

    Raises:
        ValueError: when called, the column is missing or too short, a part returns another number of scores.
        TypeError: ``score`` or ``squash`` cannot be called, ``baseline`` is neither a function nor a name.

    Source: Markovian (2024) arXiv:2404.18988 (mean log-probability of the answer; the baseline is a frozen
        model's own thought); Crystal (2023) arXiv:2310.04921 (tanh of half the choice margins)
    Basis: authors' code
    Differs: Crystal's later scaling to mean 0 and deviation 1 is left to the trainer.

    Example:
        >>> def margin(prompts, completions, **columns):  # of the gold choice over the best other one
        ...     return [1.0 if "rain" in c else -1.0 for c in completions]
        >>> from math import tanh
        >>> gain = answer_gain(margin, "alone", squash=lambda s: tanh(s) / 2)
        >>> [round(r, 4) for r in gain(["?"] * 2, ["rain is wet", "no idea"], alone=[-1.0, -1.0])]
        [0.7616, 0.0]
    """
    functions("answer_gain", score=score, **({} if squash is None else {"squash": squash}))
    if not isinstance(baseline, str):
        functions("answer_gain", baseline=baseline)
    return partial(_answer_gain, _Gain(score, baseline, squash))


def _answer_gain(how: _Gain, /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    with_it = scores("answer_gain", how.score, prompts, completions, columns)
    without: list[float | None]
    if isinstance(how.baseline, str):
        without = column_of("answer_gain", columns, how.baseline, len(completions))
        finite("answer_gain", **{how.baseline: next((s for s in without if s is not None), 0.0)})
    else:
        without = scores("answer_gain", how.baseline, prompts, completions, columns)
    g = how.squash or float
    return [None if a is None or b is None else g(a) - g(b) for a, b in zip(with_it, without, strict=True)]


_answer_gain.__name__ = "answer_gain"  # what TRL logs; pickle goes by __qualname__
