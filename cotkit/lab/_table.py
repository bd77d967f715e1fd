"""Saved sweeps: one csv row per run with its per-question results, and a json that says what made it.

A csv has the columns arm, base, seed, then one column per metric; a metric's cell holds the results of all
questions of that run in one string: ``b0110-`` for zeros and ones, ``f0.5 1 -`` for other numbers (``-`` =
does not apply). ``<name>.json`` beside it holds date, settings and a hash of the code that made it, so that
an old table is known as stale. Functions: ``save_table``, ``table``; ``Table`` is what ``table`` gives and
``claim`` takes.
"""

import ast
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Table", "save_table", "table"]

_INDEX = ("arm", "base", "seed")


class Table(NamedTuple):
    """A saved sweep: ``rows`` (DataFrame, a row per run), ``stale`` (reasons), ``info`` (json)."""

    rows: Any
    stale: list[str]
    info: dict[str, Any]


def save_table(
    path: str | Path,
    runs: Iterable[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    code: Sequence[str | Path] = (),
) -> Path:
    """Write the runs of a sweep as a small csv, and beside it a json with date, settings and code hashes.

    Args:
        path: the csv to write, e.g. ``notebooks/results/spine.csv``; its folder is made.
        runs: one mapping per run: ``arm``, ``seed``, ``base`` (optional, 0) and, per metric, a sequence with
            one number per question (NaN = does not apply) or one number for the run.
        settings: what the sweep was run with (steps, learning rate, ...); anything json can hold.
        code: files whose code made the numbers, or ``"file.py::name"`` for one function of a file and all
            that it uses there. Comments, docstrings and layout do not count.

    Returns:
        The path of the csv.

    Raises:
        ValueError: no runs, or runs without ``arm`` or ``seed``, or with different metrics.

    Source: none (plumbing)
    Basis: none needed.
    Differs: nothing.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> runs = [{"arm": "sft", "seed": 0, "accuracy": [1, 0, 1]}]
        >>> saved = save_table(Path(folder) / "toy.csv", runs, settings={"steps": 60})
        >>> saved.read_text().splitlines()
        ['arm,base,seed,accuracy', 'sft,0,0,b101']
    """
    runs = [dict(run) for run in runs]
    if not runs:
        raise ValueError("save_table: expected at least one run, got none.")
    metrics = [name for name in runs[0] if name not in _INDEX]
    lines = [",".join((*_INDEX, *metrics))]
    for run in runs:
        if "arm" not in run or "seed" not in run or set(run) - set(_INDEX) != set(metrics):
            raise ValueError(
                f"save_table: expected arm, seed and the metrics {metrics} in every run, got {sorted(run)}. "
                "Give each run every metric; write NaN where one does not apply."
            )
        cells = [str(run["arm"]), str(run.get("base", 0)), str(run["seed"])]
        if any("," in cell or '"' in cell or "\n" in cell for cell in cells):
            raise ValueError(f"save_table: expected names without comma, quote and newline, got {cells}.")
        lines.append(",".join(cells + [pack(run[name]) for name in metrics]))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    info = {
        "date": date.today().isoformat(),
        "settings": dict(settings),
        "settings_hash": _settings_hash(settings),
        "code": {str(file): code_hash(*_split(file)) for file in code},
    }
    path.with_suffix(".json").write_text(json.dumps(info, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def table(
    path: str | Path,
    *,
    code: Sequence[str | Path] | None = None,
    settings: Mapping[str, Any] | None = None,
    root: str | Path | None = None,
) -> Table:
    """Read a saved sweep and say whether it is older than the code or the settings it came from.

    Args:
        path: the csv written by ``save_table``.
        code: files (or ``"file.py::name"``) to compare with the recorded hashes; None compares every one that
            the json names.
        settings: the settings of today; None does not compare them.
        root: folder that the recorded file names start from; None: the first folder above ``path`` in which
            they exist.

    Returns:
        ``Table(rows, stale, info)``: one row per run, metrics as arrays [Q]; the reasons for staleness, empty
        when the table is fresh; the json.

    Raises:
        ValueError: no such table, or a cell that ``save_table`` did not write.

    Source: none (plumbing)
    Basis: none needed.
    Differs: nothing.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "toy.csv"
        >>> _ = save_table(path, [{"arm": "sft", "seed": 0, "accuracy": [1, 0]}], settings={"steps": 60})
        >>> table(path, settings={"steps": 90}).stale
        ['settings changed']
        >>> table(path).rows["accuracy"][0]
        array([1., 0.])
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"table: expected a saved sweep, got {path}, which is not there. Run the sweep's script first."
        )
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    for name in rows.columns:
        if name in ("base", "seed"):
            rows[name] = rows[name].map(lambda v: int(v) if v.lstrip("-").isdigit() else v)
        elif name != "arm":
            rows[name] = rows[name].map(unpack)
    note = path.with_suffix(".json")
    info = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    stale = [] if info else ["no record of code and settings"]
    recorded: dict[str, str] = info.get("code", {})
    for file in [str(f) for f in code] if code is not None else list(recorded):
        name, function = _split(file)
        now = _find(name, path, root)
        if file not in recorded:
            stale.append(f"{file} is not on record")
        elif now is None or code_hash(now, function) != recorded[file]:
            stale.append(f"{file} changed")
    if settings is not None and info and _settings_hash(settings) != info.get("settings_hash"):
        stale.append("settings changed")
    return Table(rows, stale, info)


def _find(file: str, path: Path, root: str | Path | None) -> Path | None:
    folders = [Path(root)] if root is not None else [Path(), *path.resolve().parents]
    return next((folder / file for folder in folders if (folder / file).is_file()), None)


def pack(values: Any) -> str:
    """One cell: ``b`` and 0, 1, - for flags; ``f`` and numbers with four digits otherwise."""
    numbers = np.atleast_1d(np.asarray(values, dtype=float))
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"save_table: expected one number per question, got shape {list(np.shape(values))}.")
    if all(math.isnan(x) or x in (0.0, 1.0) for x in numbers):
        return "b" + "".join("-" if math.isnan(x) else str(int(x)) for x in numbers)
    return "f" + " ".join("-" if math.isnan(x) else f"{x:.4g}" for x in numbers)


def unpack(cell: str) -> np.ndarray:
    """The numbers of one cell, float64 [Q]."""
    try:
        parts = list(cell[1:]) if cell[:1] == "b" else cell[1:].split(" ")
        if cell[:1] not in ("b", "f"):
            raise ValueError
        return np.array([math.nan if part == "-" else float(part) for part in parts])
    except ValueError:
        raise ValueError(f"table: expected a cell like 'b011-' or 'f0.5 1', got {cell[:20]!r}.") from None


def code_hash(path: str | Path, function: str = "") -> str:
    """SHA-256 of a file's code: of Python files the syntax tree without docstrings, of others the bytes.

    With ``function`` only that definition counts, and every other one of the file that it mentions, directly
    or through another. A function that is gone has the hash "missing".
    """
    data = Path(path).read_bytes()
    if Path(path).suffix != ".py":
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256()
    tree: Any = ast.parse(data)
    if function:
        parts = _used(tree, function)
        if not parts:
            return "missing"
        tree = parts
    _feed(tree, digest)
    return digest.hexdigest()


def _used(tree: ast.Module, function: str) -> list[ast.stmt]:
    """The definition of a name and, in order of the file, the definitions of all names it mentions."""
    defined: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined.update({t.id: node for t in targets if isinstance(t, ast.Name)})
    wanted, seen = [function] if function in defined else [], set[str]()
    while wanted:
        name = wanted.pop()
        seen.add(name)
        mentioned = {n.id for n in ast.walk(defined[name]) if isinstance(n, ast.Name)}
        wanted += sorted(mentioned & set(defined) - seen)
    return [node for node in tree.body if any(defined.get(name) is node for name in seen)]


def _split(file: str | Path) -> tuple[str, str]:
    """Path and function of ``"file.py::name"``."""
    path, _, function = str(file).partition("::")
    return path, function


def _feed(node: Any, digest: Any) -> None:
    """Hash a tree field by field, skipping empty fields: ``ast.dump`` differs between Python versions."""
    digest.update(type(node).__name__.encode())
    if isinstance(node, list):
        for item in node:
            _feed(item, digest)
    elif isinstance(node, ast.AST):
        for name, value in ast.iter_fields(node):
            if value is None or value == [] or name in ("kind", "type_comment", "ctx", "type_params"):
                continue
            if name == "body" and isinstance(value, list) and _is_docstring(node, value):
                value = value[1:]
            digest.update(name.encode())
            _feed(value, digest)
    else:
        digest.update(repr(node).encode())
    digest.update(b";")


def _is_docstring(node: ast.AST, body: list[Any]) -> bool:
    holders = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    first = body[0].value if isinstance(body[0], ast.Expr) else None
    return isinstance(node, holders) and isinstance(first, ast.Constant) and isinstance(first.value, str)


def _settings_hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=str).encode()).hexdigest()
