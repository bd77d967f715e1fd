r"""Prompts: questions put into words by templates, which are data (``prompts.csv``).

Conventions: a template is text with ``{name}`` where a column of the row goes; ``{{`` and ``}}`` are braces.
``writer`` says who answers the filled prompt: a "solver" must not see the gold, a "teacher" or a "judge" may.
Every text in the table is our own wording of a paper's idea.

Functions: `templates` the table; `apply` fills one of them, or a text of your own; `Template` a line of the
table.
"""

import csv
import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cotkit._check import one_of

__all__ = ["Template", "apply", "templates"]

_GOLD = ("answer", "completion", "gold", "label", "rationale", "solution", "states", "steps", "target")
_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


class Template(NamedTuple):
    r"""A line of the table: a text with fields, and who is to answer it.

    Args:
        name: how `apply` finds it.
        text: the words, with ``{field}`` where a column goes.
        writer: "solver", "teacher" or "judge".
        source: the paper whose idea it words.

    Source: none (plumbing)

    Example:
        >>> Template("hint", "{prompt} The answer is {answer}. Why?", "teacher").fields
        ('prompt', 'answer')
    """

    name: str
    text: str
    writer: str = "solver"
    source: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns the text needs, in order of appearance."""
        return tuple(dict.fromkeys(m[1] for m in _FIELD.finditer(self.text) if m[1]))


def templates(prefix: str = "") -> dict[str, Template]:
    """Return the table of templates by name, or the part of it that begins with ``prefix``.

    Args:
        prefix: "learn" gives the ten learning strategies of Contextual FT.

    Returns:
        Templates by name, in the order of the file.

    Raises:
        ValueError: no name begins with ``prefix``.

    Source: none (plumbing)

    Example:
        >>> len(templates("learn")), templates()["ul2_mode_s"].text
        (10, '[S2S] {prompt}')
    """
    found = {name: template for name, template in _table().items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"templates: expected the beginning of a name, got {prefix!r}. {_near(prefix)}")
    return found


def apply(
    template: str | Template,
    row: Mapping[str, Any],
    *,
    fields: Mapping[str, Any] | None = None,
    demos: Sequence[Mapping[str, Any]] = (),
    chat: bool = False,
) -> str | list[dict[str, str]]:
    r"""Fill a template with the columns of a row.

    Args:
        template: a name of the table, a text of your own (anything that is not a single word; "" is the empty
            prompt), or a ``Template``. A text of your own is for a solver.
        row: columns; text and numbers can be filled in.
        fields: values that are not columns, or stand for one (``{"language": "French"}``).
        demos: solved rows to show first, each filled in the same way and followed by its ``completion``.
        chat: True: a list of messages, the demonstrations as turns of their own.

    Returns:
        The prompt: a string, demonstrations apart by an empty line, or messages that end with the user's.

    Raises:
        ValueError: an unknown name; a field that neither the row nor ``fields`` has; an entry of ``fields``
            that the template does not use; a gold column (answer, completion, ...) in a solver's template; a
            demonstration of the very question.
        TypeError: a value that is neither text nor a number.

    Source: none (plumbing)

    Example:
        >>> apply("{prompt} Think in {language}.", {"prompt": "2+3?"}, fields={"language": "French"})
        '2+3? Think in French.'
    """
    found = _find(template)
    one_of("apply", ("solver", "teacher", "judge"), writer=found.writer)
    gold = [name for name in found.fields if name in _GOLD]
    if found.writer == "solver" and gold:
        raise ValueError(
            f"apply: expected no gold column in a solver's template, got {gold} in {found.name!r}. "
            f'Who may see it is a teacher: Template(name, text, writer="teacher").'
        )
    extra = dict(fields or {})
    unused = sorted(set(extra) - set(found.fields))
    if unused:
        raise ValueError(
            f"apply: expected fields of the template {sorted(found.fields)}, got {unused}. Remove or rename."
        )
    question = _filled(found, {**row, **extra})
    shown = [(_filled(found, {**demo, **extra}), _completion(demo)) for demo in demos]
    if found.fields and any(asked == question for asked, _ in shown):
        raise ValueError(
            "apply: expected demonstrations of other questions, got the very question, solved. "
            "Take the row out of demos."
        )
    if not chat:
        return "".join(f"{asked}{solved}\n\n" for asked, solved in shown) + question
    turns = [(("user", asked), ("assistant", solved)) for asked, solved in shown]
    said = [message for turn in turns for message in turn]
    return [{"role": role, "content": content} for role, content in [*said, ("user", question)]]


@cache
def _table() -> dict[str, Template]:
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    return {r["name"]: Template(r["name"], r["text"], r["writer"], r["source"]) for r in lines}


def _find(template: Any) -> Template:
    if isinstance(template, Template):
        return template
    if not isinstance(template, str):
        raise TypeError(f"apply: expected template as a name or a text, got {type(template).__name__}.")
    if template in _table():
        return _table()[template]
    if re.fullmatch(r"\w+", template):
        raise ValueError(
            f"apply: expected a name of prompts.templates() or a text, got {template!r}. {_near(template)}"
        )
    return Template("text", template)


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, _table(), n=3, cutoff=0.4) or list(_table())[:3]
    return f"Names are {', '.join(near)}, ..."


def _filled(template: Template, values: Mapping[str, Any]) -> str:
    def put(match: re.Match) -> str:
        name = match[1]
        if not name:
            return match[0][0]
        if values.get(name) is None:
            raise ValueError(
                f"apply: expected column {name!r} for template {template.name!r}, got {sorted(values)}. "
                f"Pass it in fields=, or double the braces if they are meant."
            )
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError(
                f"apply: expected {name} as text or a number, got {type(value).__name__}. Render it first."
            )
        return str(value)

    return _FIELD.sub(put, template.text)


def _completion(demo: Mapping[str, Any]) -> str:
    text = demo.get("completion")
    if not isinstance(text, str):
        raise TypeError(f"apply: expected completion of a demo as text, got {type(text).__name__}.")
    return text
