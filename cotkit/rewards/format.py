"""Form of a completion: tags that open and close where they should, letters of the right script.

Conventions: a reward is 1.0 or 0.0; white space around blocks never counts. What stands inside a block is
not looked at.
Functions: ``tags`` every block once and in order; ``scripts`` no letter of a foreign script.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from cotkit._check import finite, one_of
from cotkit.rewards._text import text_of

__all__ = ["scripts", "tags"]


class _How(NamedTuple):
    names: tuple[str, ...]
    open: str
    close: str
    repeat: bool
    gap: bool
    rest: bool
    prefilled: bool | None


def tags(
    names: Sequence[str] = ("think", "answer"),
    *,
    open: str = "<{}>",
    close: str = "</{}>",
    repeat: bool = False,
    gap: bool = False,
    rest: bool = False,
    prefilled: bool | None = None,
) -> Callable[..., list[float | None]]:
    """A reward of 1 if every block occurs once, in order, nothing nested, nothing outside.

    Args:
        names: names of the blocks in their order.
        open: how a block opens, ``{}`` stands for the name.
        close: how it closes; "" for headers, whose block ends where the next one opens.
        repeat: the whole sequence may occur several times (turns of thinking and answering).
        gap: text is required between two blocks (by default none is allowed).
        rest: text is required after the last block (a bare answer after ``</think>``; by default none is
            allowed).
        prefilled: True if the chat template has already written the first opening tag, so that the
            completion has to start inside the first block; False if not; None looks at the end of a prompt
            that is text, and takes chat messages, whose template cannot be seen from here, as not prefilled.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float]``, logged as ``tags``; it can be pickled, and
        ``reward.score_one(completion)`` scores one sample (with ``prefilled`` None it is taken as False).

    Raises:
        ValueError: no names, a name twice, or ``open`` without ``{}``.
        TypeError: ``names`` is one string.

    Source: LongVILA-R1 (2025) arXiv:2507.07966; Reason-RFT (2025) arXiv:2503.20752
    Basis: second-hand
    Differs: others anchor a pattern at ``<think>``: 0 for ever when the template prefills it, 1 for two
    ``</think>``.

    Example:
        >>> good, twice = (
        ...     "<think>2+2=4</think> <answer>4</answer>",
        ...     "<think>a</think></think><answer>4</answer>",
        ... )
        >>> tags()(prompts=["2+2?"] * 2, completions=[good, twice])
        [1.0, 0.0]
        >>> tags(("think",), rest=True)(prompts=["2+2? <think>"], completions=["2+2=4</think>4"])
        [1.0]
    """
    if isinstance(names, str):
        raise TypeError(f"tags: expected names as a list, got the string {names!r}. Write ({names!r},).")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tags: expected at least one name and none twice, got {tuple(names)!r}.")
    if "{}" not in open:
        raise ValueError(f"tags: expected open to hold {{}} for the name, got {open!r}.")
    if close and "{}" not in close and len(names) > 1 and not close.strip():
        raise ValueError(f"tags: expected close as a tag or an empty string, got {close!r}.")
    how = _How(tuple(names), open, close, bool(repeat), bool(gap), bool(rest), prefilled)
    reward = partial(_tags, how)
    reward.score_one = partial(_one, how._replace(prefilled=bool(prefilled)))  # type: ignore[attr-defined]
    return reward


def _tags(how: _How, /, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    asked = list(prompts) if prompts is not None else [None] * len(completions)
    if how.prefilled is None and len(asked) != len(completions):
        raise ValueError(
            f"tags: expected {len(completions)} prompts, got {len(asked)}. Pass one per completion."
        )
    first = how.open.format(how.names[0])
    scores: list[float | None] = []
    for i, completion in enumerate(completions):
        begun = how.prefilled
        if begun is None:
            prompt = asked[i]
            begun = isinstance(prompt, str) and prompt.rstrip().endswith(first)
        scores.append(_one(how._replace(prefilled=begun), completion))
    return scores


_tags.__name__ = "tags"  # what TRL logs; pickle goes by __qualname__


@lru_cache(maxsize=64)
def _plan(names: tuple[str, ...], open: str, close: str) -> tuple[list[tuple[str, bool]], "re.Pattern[str]"]:
    """The tags of one round, each with whether it opens a block, and a pattern that finds them all."""
    plan = [(t, o) for n in names for t, o in ((open.format(n), True), (close.format(n), False)) if t]
    every = sorted({t for t, _ in plan}, key=len, reverse=True)
    return plan, re.compile("|".join(re.escape(t) for t in every))


def _one(how: _How, completion: Any) -> float:
    text = text_of(completion)
    plan, pattern = _plan(how.names, how.open, how.close)
    if how.prefilled:
        text = plan[0][0] + text
    at, end, inside = 0, 0, False
    for found in pattern.finditer(text):
        if at == len(plan) and how.repeat:
            at = 0
            between = True
        else:
            between = at > 0
        if at == len(plan) or found.group() != plan[at][0]:
            return 0.0
        opens = plan[at][1]
        if opens and not inside and bool(text[end : found.start()].strip()) != (how.gap and between):
            return 0.0
        inside = opens  # a header (no closing tag) stays open until the next one
        at, end = at + 1, found.end()
    if at != len(plan):
        return 0.0
    return float(not how.close or bool(text[end:].strip()) == how.rest)


def scripts(allowed: Sequence[str] = ("Latin",), *, mixed: float = 0.0) -> Callable[..., list[float | None]]:
    """A reward of 1 unless a letter of another script occurs anywhere: against mixing languages.

    Digits, punctuation, symbols, accents and letters that belong to no script (a mathematical bold A) are
    allowed everywhere. It says nothing about languages that share a script, and nothing is mixed in an empty
    text: add a reward for the answer.

    Args:
        allowed: scripts by their usual names: Latin, Greek, Cyrillic, Han, Hiragana, Katakana, Hangul,
            Arabic, Hebrew, Devanagari, Thai, and so on.
        mixed: reward of a text with a letter of another script.

    Returns:
        ``reward(prompts, completions, **columns) -> list[float]``, logged as ``scripts``; it can be pickled,
        and ``reward.score_one(completion)`` scores one sample.

    Raises:
        ValueError: no scripts, or one that is not known; ``mixed`` is not finite.
        TypeError: ``allowed`` is one string, ``mixed`` no number.

    Source: GreenMind (2025) arXiv:2504.16832 (a Vietnamese thought without Chinese)
    Basis: reconstructed from the abstract
    Differs: unknown; the paper's constants are not public.

    Example:
        >>> scripts()(["?"] * 3, ["Hà Nội: 2+2=4", "2+2 等于 4", "2+2=4 → да"])
        [1.0, 0.0, 0.0]
        >>> scripts(("Latin", "Han"))(["?"], ["2+2 等于 4"])
        [1.0]
    """
    if isinstance(allowed, str):
        raise TypeError(
            f"scripts: expected allowed as a list, got the string {allowed!r}. Write ({allowed!r},)."
        )
    if not allowed:
        raise ValueError("scripts: expected at least one script, got none.")
    for name in allowed:
        one_of("scripts", _SCRIPTS, script=name)
    finite("scripts", mixed=mixed)
    how = (frozenset(word for name in allowed for word in _SCRIPTS[name]), float(mixed))
    reward = partial(_scripts, how)
    reward.score_one = partial(_script_score, how)  # type: ignore[attr-defined]
    return reward


def _scripts(
    how: tuple[frozenset[str], float], /, prompts: Any, completions: Any, **columns: Any
) -> list[float | None]:
    return [_script_score(how, completion) for completion in completions]


_scripts.__name__ = "scripts"  # what TRL logs; pickle goes by __qualname__


def _script_score(how: tuple[frozenset[str], float], completion: Any) -> float:
    allowed, mixed = how
    text = text_of(completion)
    if text.isascii() and "LATIN" in allowed:
        return 1.0
    return 1.0 if all(_script(c) in allowed or not _script(c) for c in set(text)) else mixed


# A letter's script is the first word of its Unicode name, but for the words that name no script.
_SCRIPTS: dict[str, tuple[str, ...]] = {
    name: (name.upper(),)
    for name in re.findall(
        r"\w+",
        "Latin Greek Coptic Cyrillic Armenian Georgian Hebrew Arabic Syriac Thaana Devanagari Bengali "
        "Gurmukhi Gujarati Oriya Tamil Telugu Kannada Malayalam Sinhala Thai Lao Tibetan Myanmar Khmer "
        "Mongolian Ethiopic Cherokee Hangul Hiragana Katakana Bopomofo",
    )
}
_SCRIPTS["Han"] = ("CJK", "IDEOGRAPHIC")
_NO_SCRIPT = frozenset(
    re.findall(
        r"\S+",
        "MATHEMATICAL DOUBLE-STRUCK BLACK-LETTER SCRIPT MODIFIER SUPERSCRIPT SUBSCRIPT FEMININE MASCULINE "
        "MICRO OHM KELVIN ANGSTROM PLANCK EULER INFORMATION TURNED CARON ROMAN ALEF BET GIMEL DALET VERTICAL "
        "KATAKANA-HIRAGANA",
    )
)


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    """First word of a letter's script; nothing for what is no letter or belongs to no script."""
    if unicodedata.category(character)[0] != "L":
        return ""
    words = unicodedata.name(character, "UNKNOWN").split()
    if words[0] in ("FULLWIDTH", "HALFWIDTH"):
        words = words[1:]
    return "" if words[0] in _NO_SCRIPT else words[0]
