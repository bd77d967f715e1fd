"""How a chain of thought is written as text, and how such a text is taken apart again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from cotkit.tokens._encode import ANSWER, SPECIAL, THOUGHT


class Parts(NamedTuple):
    r"""What ``Format.parse`` finds: thought, steps, final answer, and whether the text is well formed.

    Source: none (plumbing)

    Example:
        >>> FORMATS["gsm8k"].parse("2+3=<<2+3=5>>5\n#### 5")
        Parts(thought='2+3=<<2+3=5>>5', steps=['2+3=<<2+3=5>>5'], answer='5', ok=True)
    """

    thought: str
    steps: list[str]
    answer: str | None
    ok: bool


@dataclass(frozen=True)
class Format:
    r"""How a chain of thought is written as text: tags around it, its steps, the mark of the answer.

    Args:
        open: tag in front of the thought; may be missing in a text, since chat templates prefill it.
        close: tag behind the thought; the text is split at its last occurrence. "" = the answer's mark ends
            the thought.
        step: what separates steps.
        answer: marks in front of the final answer; the first is written, all are read. A mark that begins
            with a line break must begin the last line. "" (only with ``close``) = everything behind the tag.
        end: what follows the answer. "}" is matched by counting braces; "." may be missing.

    Source: none (plumbing)

    Example:
        >>> Format("<think>", "</think>").parse("<think>\n2+3=5\n5*2=10\n</think>\n10").steps
        ['2+3=5', '5*2=10']
    """

    open: str = ""
    close: str = ""
    step: str = "\n"
    answer: str | tuple[str, ...] = ("",)
    end: str = ""

    def __post_init__(self) -> None:
        """Refuse a format in which nothing marks the answer."""
        if isinstance(self.answer, str):
            object.__setattr__(self, "answer", (self.answer,))
        if not self.answer or (not self.close and "" in [a.strip() for a in self.answer]):
            raise ValueError(
                "Format: expected a mark of the answer, got none. Give close= or a non-empty answer=."
            )
        if not self.step:
            raise ValueError('Format: expected a step separator, got "". Use "\\n" for one step per line.')

    def parse(self, text: str) -> Parts:
        r"""Split a completion into thought, steps and answer; nothing is guessed.

        Args:
            text: what the model wrote, with or without the opening tag.

        Returns:
            ``Parts``; ``ok=False`` and ``answer=None`` when the text does not follow the format. Then
            ``thought`` is what is there.

        Example:
            >>> FORMATS["plain"].parse("2 and 3 make 5. The answer is 5.")
            Parts(thought='2 and 3 make 5.', steps=['2 and 3 make 5.'], answer='5', ok=True)
        """
        (start, stop), answer, ok = self._locate(text)
        steps = [text[s:e] for s, e in self._steps(text, start, stop)]
        return Parts(text[start:stop], steps, text[slice(*answer)] if answer else None, ok)

    def render(self, steps: Sequence[str], answer: str) -> str:
        r"""Write steps and an answer in this format.

        Args:
            steps: the steps of the thought; may be empty.
            answer: the final answer.

        Returns:
            A text for which ``parse`` gives the same steps and answer back.

        Raises:
            TypeError: ``steps`` is one string.
            ValueError: a step or the answer holds a separator or mark, so that the text would read
            differently.

        Example:
            >>> FORMATS["think"].render(["2+3=5", "5*2=10"], "10")
            '<think>\n2+3=5\n5*2=10\n</think>\n10'
        """
        if isinstance(steps, str):
            raise TypeError("render: expected steps as a list of strings, got one string. Pass [text].")
        thought, mark = self.step.join(steps), self.answer[0]
        if self.close:
            head = f"{self.open}\n{thought}\n{self.close}\n"
        else:
            head = thought + ("" if mark.startswith("\n") or not thought else "\n")
            mark = mark if thought else mark.lstrip("\n")
        text = f"{head}{mark}{answer}{self.end}"
        back = self.parse(text)
        if not back.ok or back.steps != [s.strip() for s in steps] or back.answer != str(answer).strip():
            raise ValueError(
                f"render: expected steps and an answer free of separators and marks, got {text!r}. "
                f"It would be read back as {back}."
            )
        return text

    def spans(self, text: str) -> list[tuple[int, int, int, int]]:
        r"""Cover a completion with segments, as character ranges.

        A step's range reaches to the next step, separator included, so that the steps tile the thought.

        Args:
            text: what the model wrote.

        Returns:
            ``(start, end, segment, step)`` in order, without gaps; step is -1 outside the thought. Of a
            malformed text all but a leading opening tag is THOUGHT.

        Example:
            >>> FORMATS["gsm8k"].spans("2+3=5\n#### 5")  # THOUGHT, then SPECIAL "\n#### ", then ANSWER
            [(0, 5, 2, 0), (5, 11, 4, -1), (11, 12, 3, -1)]
        """
        (start, stop), answer, _ = self._locate(text)
        steps = self._steps(text, start, stop)
        edges = [s for s, _ in steps] + [stop]
        found = [(s, e, THOUGHT, k) for k, (s, e) in enumerate(pairwise(edges))]
        found += [(*answer, ANSWER, -1)] if answer else []
        covered, last = [], 0
        for span in [*found, (len(text), len(text), SPECIAL, -1)]:
            covered += [(last, span[0], SPECIAL, -1), span]
            last = span[1]
        return [span for span in covered if span[0] < span[1]]

    def _steps(self, text: str, start: int, stop: int) -> list[tuple[int, int]]:
        found, at = [], start
        for part in text[start:stop].split(self.step):
            s, e = _strip(text, at, at + len(part))
            found += [(s, e)] if s < e else []
            at += len(part) + len(self.step)
        return found

    def _locate(self, text: str) -> tuple[tuple[int, int], tuple[int, int] | None, bool]:
        begin, end = _strip(text, 0, len(text))
        opened = bool(self.open) and text.startswith(self.open, begin)
        begin += len(self.open) if opened else 0
        if not self.close:
            marked = self._answer(text, begin)
            if marked:
                return _strip(text, begin, marked[0]), marked[1], True
            return _strip(text, begin, end), None, False
        cut = text.rfind(self.close, begin)
        marked = self._answer(text, cut + len(self.close)) if cut >= 0 else None
        if marked and (opened or not self.open or self.open not in text[:cut]):
            return _strip(text, begin, cut), marked[1], True
        closed_only = cut >= 0 and not text[cut + len(self.close) :].strip()
        return _strip(text, begin, cut if closed_only else end), None, False

    def _answer(self, text: str, low: int) -> tuple[int, tuple[int, int]] | None:
        best = None
        for mark in self.answer:
            pattern = re.escape(mark.strip()) + r"[ \t]*"
            if mark.startswith("\n"):
                pattern = r"(?m:^)[ \t]*" + pattern
            hits = [m.span() for m in re.finditer(pattern, text[low:])] if mark.strip() else [(0, 0)]
            if hits and (best is None or hits[-1][0] > best[0]):
                best = hits[-1]
        if best is None:
            return None
        value = self._value(text, low + best[1], bare=best == (0, 0))
        return (low + best[0], value) if value and value[0] < value[1] else None

    def _value(self, text: str, s: int, *, bare: bool) -> tuple[int, int] | None:
        if self.end == "}":
            e = _closing_brace(text, s)
        elif self.end not in ("", "."):
            e = text.find(self.end, s)
        else:
            s, e = _strip(text, s, len(text))
            e -= self.end == "." and text.endswith(".", s, e)
            one_line = bare or not re.search(r"\n|[.!?]\s", text[s:e])
            return _strip(text, s, e) if one_line else None
        if e < 0 or re.search(r"\w", text[e + len(self.end) :]):
            return None
        return _strip(text, s, e)


FORMATS = {
    "think": Format("<think>", "</think>"),
    "gsm8k": Format(answer=("\n#### ", "\nA: ")),
    "boxed": Format(answer=("\\boxed{",), end="}"),
    "plain": Format(answer=("The answer is ", "the answer is "), end="."),
}


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    part = text[start:end]
    left = len(part) - len(part.lstrip())
    return (start + left, start + left + len(part.strip())) if part.strip() else (start, start)


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for m in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return start + m.start()
    return -1
