"""Run notebooks without a browser.

    python scripts/notebook.py start               run 00 into out/ and print its final table
    python scripts/notebook.py run [FILES]         run in place (all, if none are named) and keep the outputs

A notebook runs in its own folder, as in JupyterLab, so relative paths mean the same.
"""

import base64
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"


def execute(path: Path) -> NotebookNode:
    """Run all cells of a notebook, with a line on the screen whenever a section begins."""
    book = nbformat.read(path, as_version=4)
    start = time.monotonic()

    def announce(cell: NotebookNode, cell_index: int) -> None:  # noqa: ARG001  the names are nbclient's
        heading = re.search(r"^#+ (.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if heading:
            print(f"  {time.monotonic() - start:5.0f} s  {heading[1]}", flush=True)

    client = NotebookClient(
        book,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # newer kernels warn about TCP on every start
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=announce,
    )
    client.execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
    book.metadata.pop("widgets", None)  # GitHub shows no widgets, and their state is large
    book.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata.language_info = {"name": "python"}
    print(f"  {time.monotonic() - start:5.0f} s  done", flush=True)
    return book


def figures(book: NotebookNode, folder: Path) -> list[Path]:
    """Write every PNG of a notebook into a folder and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("figure_*.png"):
        old.unlink()
    written = []
    for cell in book.cells:
        for output in cell.get("outputs", []):
            image = output.get("data", {}).get("image/png")
            if image:
                written.append(folder / f"figure_{len(written) + 1:02d}.png")
                written[-1].write_bytes(base64.b64decode(image))
    return written


def last_table(book: NotebookNode) -> str:
    """Return the text of the last table (a cell tagged ``summary`` wins over the last output of HTML)."""
    text = ""
    for cell in book.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            tagged = "summary" in cell.metadata.get("tags", [])
            if "text/plain" in data and ("text/html" in data or tagged):
                text = data["text/plain"]
                if tagged:
                    return text
    return text


def start() -> int:
    """Run notebook 00 into out/ and say what came out and where it is."""
    source = ROOT / "notebooks" / "00_start_here.ipynb"
    if not source.exists():
        print("notebooks/00_start_here.ipynb is not there.", file=sys.stderr)
        return 1
    print(f"Running {source.relative_to(ROOT)} (a few minutes):")
    try:
        book = execute(source)
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    target = OUT / source.name
    OUT.mkdir(exist_ok=True)
    nbformat.write(book, target)
    drawn = figures(book, OUT / "figures")
    print(f"\n{last_table(book)}\n")
    print(f"Executed notebook: {target.relative_to(ROOT)}")
    print(f"Figures:           {(OUT / 'figures').relative_to(ROOT)}/ ({len(drawn)} PNG files)")
    print("Next:              make lab    (opens JupyterLab on notebooks/)")
    return 0


def run(names: list[str]) -> int:
    """Run notebooks in place; stop at the first that fails, leaving its file as it was."""
    for path in [Path(n).resolve() for n in names] or sorted((ROOT / "notebooks").glob("*.ipynb")):
        print(path.name, flush=True)
        try:
            nbformat.write(execute(path), path)
        except CellExecutionError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["start"]:
            sys.exit(start())
        case ["run", *files]:
            sys.exit(run(files))
        case _:
            sys.exit("usage: python scripts/notebook.py start | run [FILES]")
