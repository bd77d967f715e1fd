"""Judge every claim of notebooks/claims.toml on its saved sweep, and write notebooks/CLAIMS.md.

    python scripts/claims_md.py            judges, writes notebooks/CLAIMS.md and notebooks/results/claims.csv
    python scripts/claims_md.py --check    judges only; fails when a claim recorded as supported comes out
    opposite

An entry's ``table`` is one sweep or a list of them (one per task); a claim is judged on each. The p-values of
all judgements are corrected together (Holm): a verdict that does not survive at 5 % is taken down by a step.
"""

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Any

from cotkit import lab
from cotkit.lab._claim import load_claims

HERE = Path(__file__).resolve().parent.parent
NOTEBOOKS = HERE / "notebooks"
ALPHA = 0.05
UNJUDGED = ("not run here", "not testable here", "stale")

Judged = tuple[str, dict[str, Any], str, lab.Claim]


def tables(entry: dict[str, Any]) -> list[str]:
    """The sweeps that an entry names."""
    named = entry.get("table", [])
    return [named] if isinstance(named, str) else list(named)


def judge(claims: Path) -> list[Judged]:
    """(name, entry, table, verdict) for every entry and sweep; a sweep that is missing is "not run here"."""
    entries, folder = load_claims(claims)
    out = []
    for name, entry in entries.items():
        for path in tables(entry) or [""]:
            there = path and (folder / path).is_file()
            results = lab.table(folder / path, root=HERE) if there else None
            out.append((name, entry, path, lab.claim(name, results, claims=entries)))
    return out


def corrected(found: list[lab.Claim]) -> list[tuple[float, str]]:
    """Holm's p and the verdict that is left, for every claim; unjudged ones keep theirs and do not count."""
    at = [i for i, c in enumerate(found) if not c.verdict.startswith(UNJUDGED)]
    zero = lab.holm([found[i].p_smallest if found[i].form == "within" else found[i].p for i in at])
    smallest = lab.holm([found[i].p_smallest for i in at])
    out: list[tuple[float, str]] = [(math.nan, c.verdict) for c in found]
    for i, p, p_smallest in zip(at, zero, smallest, strict=True):
        out[i] = (p, after_holm(found[i].verdict, p, p_smallest, found[i].form))
    return out


def after_holm(verdict: str, p: float, p_smallest: float, form: str) -> str:
    """What is left of a verdict: supported needs both p-values, the others the one against 0."""
    word, _, label = verdict.partition(" (")
    if word == "supported" and p_smallest > ALPHA:
        word = "inconclusive" if form == "within" else "right direction"
    if word in ("right direction", "opposite") and p > ALPHA:
        word = "inconclusive"
    return word + (f" ({label}" if label else "")


def calibration(claims: Path) -> list[str]:
    """The measured false-verdict rate of an arm against its twin, one line per sweep of [aa]."""
    import tomllib

    entry = tomllib.loads(claims.read_text(encoding="utf-8")).get("aa", {})
    lines = []
    for path in tables(entry):
        if not (claims.parent / path).is_file():
            lines.append(f"- `{path}`: not run yet")
            continue
        sweep = lab.table(claims.parent / path, root=HERE)
        share, n = lab.false_verdicts(sweep, entry["arm"], entry["twin"], entry["metric"])
        stale = ", table stale" if sweep.stale else ""
        lines.append(
            f"- `{path}`: {entry['arm']} against {entry['twin']} ({entry['metric']}): {share:.1%} false "
            f"verdicts in {n} null cases (5 % allowed{stale})"
            + ("; with so few runs one case and its mirror image are already more" if 2 / n > 0.05 else "")
        )
    return lines


def page(judged: list[Judged], aa: list[str]) -> str:
    """CLAIMS.md as text."""
    found = [c for _, _, _, c in judged]
    after = corrected(found)
    lines = [
        "# Claims",
        "",
        "Made by `scripts/claims_md.py` from `claims.toml` and the saved sweeps; not edited by hand.",
        "Verdicts are explained at the head of `claims.toml`. The tiny lab has a model of 0.9 million",
        "parameters and made-up tasks: *supported* here says that the effect shows there, not that the paper",
        "is right at its own scale.",
        "",
        "## The test itself: an arm against its twin",
        "",
        *(aa or ["- no twin arm named"]),
        "",
        "## Verdicts",
        "",
        "| claim | paper | pinned to the equation | equal to authors' numbers | tiny lab | real model |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in {n: e for n, e, _, _ in judged}.items():
        here = [
            f"{v}{task(path)}" for (n, _, path, _), (_, v) in zip(judged, after, strict=True) if n == name
        ]
        real = entry.get("where", "tiny lab") == "real model"
        words = "<br>".join(here)
        lines.append(
            f"| **{name}**: {entry['sentence']} | {entry['paper']} | {code(entry.get('pinned', ''))} "
            f"| {code(entry.get('authors', ''))} | {'' if real else words} | {words if real else 'not run'} |"
        )
    lines += [
        "",
        "## Numbers",
        "",
        "Effects are arm minus control; n counts runs x questions (a run is one base with one seed); where",
        "Holm's correction changed",
        "the verdict, the one before stands in brackets.",
        "",
        "| claim | sweep | arm | control | effect [95 %] | matters from | error removed | paper | n "
        "| sign holds | p (Holm) | verdict | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, _, path, c), (p, verdict) in zip(judged, after, strict=True):
        cells = c.cells()
        before = "" if verdict == c.verdict else f" ({c.verdict})"
        lines.append(
            "| "
            + " | ".join(
                [
                    name,
                    path,
                    cells["arm"],
                    cells.get("control", ""),
                    cells.get("effect [95 %]", ""),
                    cells["matters from"],
                    cells.get("error removed", ""),
                    cells.get("paper", ""),
                    f"{c.runs} ({c.bases} bases) x {c.questions}" if c.runs else "none",
                    cells.get("sign holds", ""),
                    "" if math.isnan(p) else f"{p:.2g}",
                    verdict + before,
                    "; ".join(x for x in (c.note, entry_note(judged, name)) if x),
                ]
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def entry_note(judged: list[Judged], name: str) -> str:
    """The note of the entry itself."""
    return next(str(e.get("note", "")) for n, e, _, _ in judged if n == name)


def task(path: str) -> str:
    """The sweep's name in brackets."""
    return f" ({Path(path).stem})" if path else ""


def code(text: str) -> str:
    """Text as code, or "no"."""
    return f"`{text}`" if text else "no"


def recorded(record: Path) -> dict[tuple[str, str], str]:
    """Verdicts of the last run, by claim and sweep."""
    if not record.is_file():
        return {}
    with record.open(encoding="utf-8", newline="") as file:
        return {(line["claim"], line["table"]): line["verdict"] for line in csv.DictReader(file)}


def write_record(record: Path, judged: list[Judged]) -> None:
    """Claim, sweep, effect, interval, p-values and verdict of every judgement as a small csv."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["claim", "table", "effect", "low", "high", "df", "p", "p_smallest", "verdict"])
        for name, _, path, c in judged:
            numbers = [f"{x:.6g}" for x in (c.effect, c.low, c.high, c.df, c.p, c.p_smallest)]
            writer.writerow([name, path, *numbers, c.verdict])


def turned(judged: list[Judged], before: dict[tuple[str, str], str]) -> list[str]:
    """Claims recorded as supported that now come out opposite."""
    return [
        f"{name} on {path}: recorded as {before[name, path]}, now {c.verdict}"
        for name, _, path, c in judged
        if before.get((name, path), "").startswith("supported") and c.verdict.startswith("opposite")
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="judge only; fail when a supported claim turned")
    parser.add_argument("--claims", type=Path, default=NOTEBOOKS / "claims.toml")
    options = parser.parse_args(arguments)
    folder = options.claims.parent
    judged = judge(options.claims)
    wrong = turned(judged, recorded(folder / "results" / "claims.csv"))
    for _, _, path, c in judged:
        print(f"{c}{task(path)}")
    if wrong:
        print("\n".join(["", "recorded as supported, now opposite:", *wrong]))
    if options.check or wrong:
        return 1 if wrong else 0
    (folder / "CLAIMS.md").write_text(page(judged, calibration(options.claims)), encoding="utf-8")
    write_record(folder / "results" / "claims.csv", judged)
    return 0


if __name__ == "__main__":
    sys.exit(main())
