"""The rules that notebooks keep to (they are executed by nbval, in `make notebook-tests`)."""

import ast
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
FILES = sorted(FOLDER.glob("*.ipynb"))
pytestmark = pytest.mark.skipif(not FILES, reason="no notebooks yet")
every = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def python(cell: dict) -> str:
    """Return the code without shell and magic lines, which are no Python."""
    return re.sub(r"^[ \t]*[%!].*$", "", source(cell), flags=re.MULTILINE)


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def texts(value: object) -> str:
    """Return all text in an output, images left out."""
    if isinstance(value, dict):
        return "\n".join(texts(v) for k, v in value.items() if not str(k).startswith("image/"))
    if isinstance(value, list):
        return "".join(texts(v) for v in value)
    return value if isinstance(value, str) else ""


def test_names_are_numbered_in_reading_order():
    """One notebook a number, with a letter for a second part; a family to come leaves its number free."""
    numbers = [path.stem.partition("_")[0] for path in FILES]
    assert numbers == sorted(set(numbers))
    assert all(re.fullmatch(r"\d\d[b-z]?", number) for number in numbers)


@every
def test_size(path):
    assert len(read(path)["cells"]) <= 100
    assert path.stat().st_size <= 300_000


@every
def test_code_cells_are_short(path):
    for cell in cells(path, "code"):
        lines = source(cell).splitlines()
        assert len(lines) <= 15, source(cell)
        assert max(map(len, lines), default=0) <= 88, source(cell)


@every
def test_definitions_are_short(path):
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(python(cell))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.end_lineno - node.lineno < 5, f"{node.name}: move it to the library or the lab"


@every
def test_opening(path):
    first = source(read(path)["cells"][0])
    assert read(path)["cells"][0]["cell_type"] == "markdown"
    assert first.startswith("# ")
    assert len(first.splitlines()) > 2, "say what one will learn"


@every
def test_one_cell_is_tagged_parameters(path):
    tagged = [cell for cell in cells(path, "code") if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    body = ast.parse(source(tagged[0])).body
    assert all(isinstance(line, ast.Assign) for line in body), (
        "only NAME = value lines, so that others can be put in"
    )


@every
def test_seeds_are_set_by_the_lab(path):
    code = "\n".join(source(cell) for cell in cells(path, "code"))
    assert re.search(r"\blab\.setup\(", code)


@every
def test_a_claim_is_judged_by_the_lab(path):
    prose = "\n".join(source(cell) for cell in cells(path, "markdown"))
    code = "\n".join(source(cell) for cell in cells(path, "code"))
    if path.stem == "00_start_here" or re.search(r"^#+ .*\bclaim|^\**Claim\b", prose, re.MULTILINE):
        assert re.search(r"\blab\.claim\w*\(", code)


@every
def test_all_cells_were_run_in_order(path):
    run = [cell["execution_count"] for cell in cells(path, "code") if source(cell).strip()]
    assert run == list(range(1, len(run) + 1)), "run it with `make notebooks`"


@every
def test_outputs_are_clean(path):
    assert outputs(path), "outputs are committed"
    for output in outputs(path):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", f"a warning or a progress bar was kept: {texts(output)[:300]}"
        found = re.search(
            r"(?<![\w.])/(home|root|work|tmp|Users|usr|opt|mnt|var)/\S*|[A-Z]:\\\\\w+", texts(output)
        )
        assert found is None, f"a path of one machine: {found[0]}"


@every
def test_metadata_is_small_and_names_the_usual_kernel(path):
    meta = read(path)["metadata"]
    assert meta["kernelspec"]["name"] == "python3"
    assert "widgets" not in meta
    for cell in cells(path, "code"):
        assert "execution" not in cell["metadata"]


@every
def test_links_between_notebooks_lead_somewhere(path):
    prose = "\n".join(source(cell) for cell in cells(path, "markdown"))
    for target in re.findall(r"\]\((?!https?:|#|attachment:)([^)#\s]+)[^)]*\)", prose):
        assert (FOLDER / target).exists(), target
