"""The index: every function and every paper, read from the source text itself.

Functions are found by parsing the files of the package, so nothing heavy is imported and nothing is listed
twice; papers come from ``papers.csv``. ``find`` searches both, ``table`` prints the index for the README.
"""

import ast
import csv
import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

_HERE = Path(__file__).parent
_SOURCE = re.compile(r"([^\s;,:][^;:]*?) \((\d{4})\) arXiv:(\d{4}\.\d{4,5})")
_FIELD = re.compile(r"^(Source|Basis|Differs):[ \t]*(.*(?:\n(?![ \t]*\n|[A-Z][A-Za-z]*:).*)*)", re.MULTILINE)
_COLUMNS = ("match", "kind", "name", "what", "source", "basis", "functions", "notebook", "status", "link")


def papers() -> list[dict[str, str]]:
    """Return the rows of ``papers.csv``."""
    with (_HERE / "papers.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def functions(package: Path = _HERE) -> list[dict[str, str]]:
    """Return one entry per public function or value type, under its canonical path, in reading order.

    What a public file lists and imports from a private one is its own: ``cotkit.lab.load``.
    """
    found = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        module = parts[:-1] if parts[-1] == "__init__" else parts
        if not module or any(part.startswith("_") for part in module) or module[0] == "notebooks":
            continue
        tree = _parse(file)
        nodes = _definitions(tree)
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2].startswith("_"):
                private = package.joinpath(
                    *str(node.module).split(".")[0 if node.level else 1 :]
                ).with_suffix(".py")
                if node.level:
                    private = file.parent / private.name
                there = _definitions(_parse(private)) if private.exists() else {}
                nodes |= {a.asname or a.name: there[a.name] for a in node.names if a.name in there}
        for name in _listed(tree) or [n for n in nodes if not n.startswith("_") and n in _definitions(tree)]:
            if name in nodes:
                found.append(
                    _entry(".".join(("cotkit", *module, name)), ast.get_docstring(nodes[name]) or "")
                )
    return found


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _definitions(tree: ast.Module) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _listed(tree: ast.Module) -> list[str] | None:
    """Return the literal ``__all__`` of a file, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and "__all__" in [
            t.id for t in node.targets if isinstance(t, ast.Name)
        ]:
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


def _entry(name: str, doc: str) -> dict[str, str]:
    fields: dict[str, list[str]] = {"Source": [], "Basis": [], "Differs": []}
    for key, text in _FIELD.findall(doc):
        fields[key].append(" ".join(text.split()))
    source = "; ".join(fields["Source"])
    return {
        "name": name,
        "what": doc.partition("\n")[0].strip(),
        "source": source,
        "arxiv": " ".join(arxiv for _, _, arxiv in _SOURCE.findall(source)),
        "basis": "; ".join(fields["Basis"]),
        "differs": "; ".join(fields["Differs"]),
    }


def _records() -> list[tuple[dict[str, str], list[tuple[int, str]]]]:
    """Return what ``find`` shows, each with the texts that it searches and their weights."""
    records = []
    short = {row["arxiv"]: row["short"] for row in papers()}
    for f in functions():
        link = f"https://arxiv.org/abs/{f['arxiv'].split()[0]}" if f["arxiv"] else ""
        known = " ".join(short.get(a, "") for a in f["arxiv"].split())
        shown = {"kind": "function", "status": "served", "link": link, "functions": "", "notebook": ""}
        shown |= {key: f[key] for key in ("name", "what", "source", "basis")}
        room, _, last = f["name"].removeprefix("cotkit.").rpartition(".")
        records.append((shown, [(8, last), (5, f"{f['source']} {known}"), (4, room), (3, f["what"])]))
    for p in papers():
        shown = {
            "kind": "paper",
            "name": p["short"],
            "what": p["title"],
            "source": f"{p['id']} ({p['year']})",
        }
        shown |= {"basis": "", "link": f"https://arxiv.org/abs/{p['arxiv']}"}
        shown |= {key: p[key] for key in ("functions", "notebook", "status")}
        keys = f"{p['id']} {p['arxiv']} {p['functions']}"
        texts = [(7, p["short"]), (4, p["title"]), (3, p["family"]), (2, p["kind"]), (6, keys)]
        records.append((shown, texts))
    return records


def _words(text: str) -> list[str]:
    """Split at what is no letter or digit and inside CamelCase, in lower case, without plural s."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text) + " " + text
    return [re.sub(r"(?<=\w{3}[^s\W])s$", "", w) for w in re.findall(r"[^\W_]+", text.lower())]


def _score(words: list[str], texts: list[tuple[int, str]]) -> tuple[int, int]:
    """Return how many of the words are found, and how well: a whole word counts 2, the beginning of one 1."""
    split = [(weight, set(_words(text))) for weight, text in texts]
    best = []
    for word in words:
        whole = [2 * weight for weight, there in split if word in there]
        begun = [weight for weight, there in split if word[2:] and any(t.startswith(word) for t in there)]
        best.append(max(whole + begun, default=0))
    return sum(b > 0 for b in best), sum(best)


def find(query: str = "") -> "DataFrame":
    """Search functions and papers by name, paper, room, family or any word of their one-line summaries.

    Rows that hold all words of the query come first; if none does, those that hold some of them; if there are
    none either, the words that look most alike. The column ``match`` tells "all", "some" or "nearest".

    Args:
        query: Words such as "valve", "length", "masked thought", or an arXiv number; empty lists everything.

    Returns:
        DataFrame with columns match, kind ("function" or "paper"), name, what, source, basis, functions,
        notebook, status and link, best first; at most 25 rows unless the query is empty.

    Raises:
        TypeError: ``query`` is not a string.

    Source: none (plumbing)
    Basis: none
    Differs: nothing

    Example:
        >>> find("masked thought")["name"].isin(["MFT"]).any().item()
        True
    """
    if not isinstance(query, str):
        raise TypeError(
            f"find: expected query as a string, got {type(query).__name__}. Pass words: find('length')."
        )
    from pandas import DataFrame

    return DataFrame(search(query), columns=list(_COLUMNS))


def search(query: str, most: int = 25) -> list[dict[str, str]]:
    """Return what ``find`` shows as a list of dicts, without pandas."""
    records, words = _records(), list(dict.fromkeys(_words(query.lower())))
    if not words:
        return [{"match": "all", **shown} for shown, _ in records]
    scored = [(*_score(words, texts), shown) for shown, texts in records]
    top = max(count for count, _, _ in scored)
    if top == 0:
        known = {word for _, texts in records for _, text in texts for word in _words(text)}
        near = [close for word in words for close in difflib.get_close_matches(word, known, 2, 0.7)]
        return [{**hit, "match": "nearest"} for hit in search(" ".join(near))[:8]] if near else []
    match = "all" if top == len(words) else "some"
    ranked = sorted((row for row in scored if row[0] == top), key=lambda row: -row[1])
    return [{"match": match, **shown} for _, _, shown in ranked][:most]


def table() -> str:
    """Return the index as Markdown: counts, the papers that are served, then the others by family."""
    rows = papers()
    served = [r for r in rows if r["status"] != "not yet"]
    waiting = [r for r in rows if r["status"] == "not yet"]
    lines = [
        f"{len(rows)} papers: {sum(r['status'] in ('served', 'cell') for r in rows)} served, "
        f"{sum(r['status'] == 'function' for r in rows)} in part, {len(waiting)} not yet.",
        "",
        "| paper | year | idea | functions | notebook | status |",
        "|---|---|---|---|---|---|",
    ]
    for r in served:
        names = "<br>".join(f"`{n.removeprefix('cotkit.')}`" for n in r["functions"].split("; ") if n)
        place = f"[{r['notebook']}](notebooks/{r['notebook']}.ipynb) {r['section']}" if r["notebook"] else ""
        lines.append(f"| {_paper(r)} | {r['year']} | {r['title']} | {names} | {place} | {_status(r)} |")
    lines += ["", "<details><summary>Not yet</summary>", "", "| family | papers |", "|---|---|"]
    for family in sorted({r["family"] for r in waiting}):
        lines.append(f"| {family} | {', '.join(_paper(r) for r in waiting if r['family'] == family)} |")
    return "\n".join([*lines, "", "</details>"])


def _paper(row: dict[str, str]) -> str:
    return f"[{row['short']}](https://arxiv.org/abs/{row['arxiv']})"


def _status(row: dict[str, str]) -> str:
    return f"{row['status']}; {row['verdict']}" if row["verdict"] else row["status"]
