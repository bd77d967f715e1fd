"""Text of a completion, whatever form it came in."""

from typing import Any


def text_of(completion: Any) -> str:
    """Text of a string, of the last assistant message, or of a message made of parts; else nothing."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list | tuple) and completion:
        spoken = [m for m in completion if isinstance(m, dict) and m.get("role", "assistant") == "assistant"]
        return _content(spoken[-1]) if spoken else ""
    if isinstance(completion, dict):
        return _content(completion)
    return ""


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list | tuple):
        return "".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    return content if isinstance(content, str) else ""


def column_of(fn: str, columns: dict[str, Any], name: str, n: int) -> list[Any]:
    """The named column as a list of ``n`` values, or a ValueError that says which columns there are."""
    if name not in columns:
        there = ", ".join(sorted(columns)) or "none"
        raise ValueError(
            f"{fn}: expected a column {name!r}, got {there}. Add it to the rows or pass column=."
        )
    values = list(columns[name])
    if len(values) != n:
        raise ValueError(
            f"{fn}: expected {n} values in column {name!r}, got {len(values)}. Pass one per completion."
        )
    return values
