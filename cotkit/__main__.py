"""``python -m cotkit`` prints the index, ``find WORDS`` searches it, ``notebooks DIR`` copies notebooks."""

import shutil
import sys
from pathlib import Path

from cotkit import _index


def _find(query: str) -> str:
    """Return the hits as lines of text; needs the core only, no pandas."""
    lines = []
    for hit in _index.search(query):
        where = "; ".join(hit[key] for key in ("source", "functions", "status") if hit[key])
        lines.append(f"{hit['name']:42} {hit['what']}\n{'':42} [{hit['match']}] {where}  {hit['link']}")
    return "\n".join(lines) or f"Nothing is called {query!r}, nor nearly so."


def _notebooks(target: Path) -> str:
    """Copy the notebooks and their tables into a folder; a file that is there already is left alone."""
    places = [folder / "notebooks" for folder in Path(__file__).parents[:2]]  # of the wheel, of the checkout
    source = next((place for place in places if any(place.glob("*.ipynb"))), None)
    if source is None:
        return "No notebooks were found beside this installation of cotkit."
    copied = kept = 0
    for file in sorted(source.rglob("*")):
        if not file.is_file() or ".ipynb_checkpoints" in file.parts or "__pycache__" in file.parts:
            continue
        to = target / file.relative_to(source)
        if to.exists():
            kept += 1
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)
        copied += 1
    return f"Copied {copied} files to {target}, left {kept} that were there. Next: jupyter lab {target}"


def main(words: list[str]) -> int:
    """Run one command and return the exit status."""
    match words:
        case []:
            print(_index.table())
        case ["find", *rest] if rest:
            print(_find(" ".join(rest)))
        case ["notebooks", target]:
            print(_notebooks(Path(target)))
        case _:
            print("usage: python -m cotkit [find WORDS | notebooks DIR]", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
