"""Where a text states its final answer: the marks of the usual formats, and what stands behind them."""

import re
from collections.abc import Callable

from cotkit.rewards._numbers import LONG, number_of

TAIL = 20_000  # characters: a final answer stands at the end

_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])")
_SAYS = re.compile(r"\banswer(?:\*{1,2})?[ \t]{0,3}(?:is|:|=)[ \t]{0,3}:?(?:\*{1,2})?", re.I)
_TAG = re.compile(r"<answer>", re.I)
_END_TAG = re.compile(r"</answer>", re.I)
_SENTENCE = re.compile(r"[.!](?=\s)")
_LAST_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?|\.\d+")


def last_number(text: str) -> str | None:
    found = None
    for found in _LAST_NUMBER.finditer(text):  # noqa: B007  the last one is wanted
        pass
    if found is None:
        return None
    before = re.search(r"(?:(?<![\w)])[-−])?[$€£¥]?$", text[max(0, found.start() - 3) : found.start()])
    return (before.group() if before else "") + found.group()


def segment_of(text: str) -> tuple[str | None, bool]:
    """What follows the last closed thought (None when one is still open), and whether there was one."""
    closed = text.rfind("</think>")
    if text.rfind("<think>") > closed:
        return None, True
    return (text, False) if closed < 0 else (text[closed + len("</think>") :], True)


def marked(segment: str, fmt: str, thought: bool, depth: int) -> str | None:
    found = [mark for kind, find in _MARKERS if fmt in ("auto", kind) for mark in find(segment)]
    if not found:
        return _bare(segment, thought) if fmt == "auto" else None
    outer = [m for m in found if not any(o[0] <= m[0] and m[1] <= o[1] and o is not m for o in found)]
    payload = max(outer)[2]
    if payload is None:
        return None
    inner = marked(payload, fmt, True, depth - 1) if depth and fmt == "auto" and any_mark(payload) else None
    return inner or clean(payload)


def any_mark(text: str) -> bool:
    return any(find(text) for _, find in _MARKERS)


def _bare(segment: str, thought: bool) -> str | None:
    line = segment.strip()
    if not line or "\n" in line or len(line) > LONG:
        return None
    if thought or not re.search(r"\s", line) or number_of(line) is not None:
        return clean(line)
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
    if not payload or (number_of(clean(payload) or "") is None and text[end:].strip()):
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


def clean(text: str) -> str | None:
    text = text.strip().strip("*").strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > len(left + right) and text.startswith(left) and text.endswith((right, right + ".")):
            text = text.removesuffix(".")[len(left) : -len(right)].strip()
    text = text.removesuffix(".").removesuffix("**").strip()
    return text or None
