"""Keep the index in step: docstrings, notebooks -> papers.csv -> README.md, constraints -> environment.yml.

    python scripts/index.py            write them
    python scripts/index.py --check    say what is out of step and exit with 1

The ``Source:`` lines of docstrings decide which functions serve a paper. A notebook section belongs to it if
its text names the arXiv number or its heading the short name (both, if no function serves it); of several
the one with both, in the notebook of its claims. Verdicts are read from ``notebooks/claims.toml`` and
``CLAIMS.md``.
"""

import csv
import io
import json
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

from environment import environment

from cotkit import _index

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


def sections() -> list[tuple[str, str, str]]:
    """Return (notebook, heading, text) of every section of every notebook; the opening cell is no section."""
    found = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        heading, text = "", ""
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"][1:]:
            if cell["cell_type"] != "markdown":
                continue
            source = "".join(cell["source"])
            for line in source.splitlines():
                if re.match(r"#{1,4} ", line):
                    found.append((path.stem, heading, text))
                    heading, text = line.lstrip("# ").strip(), ""
                text += line + "\n"
        found.append((path.stem, heading, text))
    return [section for section in found if section[1]]


def claims() -> list[dict[str, str]]:
    """Return every claim of claims.toml, once per sweep, with the verdict that CLAIMS.md gives it."""
    file = NOTEBOOKS / "claims.toml"
    entries = tomllib.loads(file.read_text(encoding="utf-8")).get("claims", {}) if file.exists() else {}
    verdicts: dict[str, list[str]] = {}
    for row in tables(NOTEBOOKS / "CLAIMS.md"):
        if "verdict" in row:
            verdicts.setdefault(row["claim"], []).append(row["verdict"].partition(" (")[0])
    return [
        {
            "name": name,
            "verdict": verdict,
            **{k: str(entry.get(k, "")) for k in ("paper", "pinned", "authors", "where", "notebook")},
        }
        for name, entry in entries.items()
        for verdict in verdicts.get(name, ["not run"])
    ]


def tables(file: Path) -> list[dict[str, str]]:
    """Return the rows of all Markdown tables of a file, keyed by their lower-case headings."""
    rows, header = [], []
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line, following in zip(lines, [*lines, ""][1:], strict=True):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|"):
            header = []
        elif re.fullmatch(r"\s*\|[\s:|-]+", following):
            header = [cell.lower() for cell in cells]
        elif len(cells) == len(header) and not re.fullmatch(r"[\s:|-]+", line):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def counted(verdicts: list[str]) -> str:
    """Return "2 supported, 1 opposite": the commonest first."""
    return ", ".join(f"{n} {verdict}" for verdict, n in Counter(verdicts).most_common())


def papers() -> str:
    """Return papers.csv with the columns functions, notebook, section, status and verdict filled anew."""
    rows, parts, verdicts = _index.papers(), sections(), claims()
    serving: dict[str, list[str]] = {}
    for function in _index.functions():
        for arxiv in dict.fromkeys(function["arxiv"].split()):
            serving.setdefault(arxiv, []).append(function["name"])
    for row in rows:
        row["functions"] = "; ".join(serving.get(row["arxiv"], []))
        short = re.compile(rf"(?<![\w-]){re.escape(row['short'])}(?![\w-])")
        named = [(row["arxiv"] in text, bool(short.search(heading))) for _, heading, text in parts]
        # Without a function, citing a paper in passing is not serving it.
        enough = any if row["functions"] else all
        found = [(part, all(there)) for part, there in zip(parts, named, strict=True) if enough(there)]
        shown = [c["notebook"] for c in verdicts if row["id"] in c["paper"].split(", ")][-1:]
        # Where its claims are shown, in a section of its own, else the first one that names it.
        place = max(found, key=lambda f: (f[1], f[0][0] in shown), default=(None,))[0]
        row["notebook"], row["section"] = place[:2] if place else ("", "")
        row["status"] = {
            (True, True): "served",
            (True, False): "function",
            (False, True): "cell",
            (False, False): "not yet",
        }[bool(row["functions"]), bool(place)]
        row["verdict"] = counted([c["verdict"] for c in verdicts if row["id"] in c["paper"].split(", ")])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def verdict_counts() -> str:
    """Return the counts of the README, each kind of evidence apart."""
    found = claims()
    once = {claim["name"]: claim for claim in found}.values()
    tiny = [claim["verdict"] for claim in found if claim["where"] != "real model"]
    real = [claim["verdict"] for claim in found if claim["where"] == "real model"]
    return "\n".join(
        [
            f"{len(once)} claims are written down ([verdicts and numbers](notebooks/CLAIMS.md)):",
            "",
            f"- method pinned to its equation: {sum(bool(c['pinned']) for c in once)} of {len(once)}",
            f"- equal to the authors' numbers: {sum(bool(c['authors']) for c in once)} of {len(once)}",
            f"- judged in the tiny lab, once per task: {counted(tiny) or 'none'}",
            f"- judged on a real model: {counted(real) or 'none'}",
        ]
    )


def between(text: str, name: str, new: str) -> str:
    """Return text with what stands between the markers ``name`` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"between: expected {begin} and {end} once each. Put the markers back.")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{new}\n{end}{rest.partition(end)[2]}"


def readme() -> str:
    """Return README.md with the index table and the counts of verdicts written anew."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return between(between(text, "index", _index.table()), "claims", verdict_counts())


def main(check: bool) -> int:
    """Write or compare every generated file, in the order in which they depend on each other."""
    stale = []
    for name, make in (
        ("cotkit/papers.csv", papers),
        ("README.md", readme),
        ("environment.yml", environment),
    ):
        file, new = ROOT / name, make()
        if file.read_text(encoding="utf-8") != new:
            stale.append(name)
            if not check:
                file.write_text(new, encoding="utf-8")
    print(f"{'out of step' if check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
