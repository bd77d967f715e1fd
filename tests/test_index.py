"""papers.csv, docstrings, notebooks, the README's table and find() say the same."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cotkit
from cotkit import __main__ as cli
from cotkit import _index

ROOT = Path(__file__).resolve().parent.parent
PAPERS = _index.papers()
FUNCTIONS = _index.functions()


def names(query: str) -> list[str]:
    return [hit["name"] for hit in _index.search(query)]


def resolve(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


# papers.csv


def test_all_papers_have_a_row():
    assert len(PAPERS) == 251
    for column in ("id", "arxiv"):
        assert len({row[column] for row in PAPERS}) == 251
    for row in PAPERS:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", row["arxiv"]), row
        assert re.fullmatch(r"L\d+|S0[abc]", row["id"]), row
        assert 2018 <= int(row["year"]) <= 2026, row
        assert row["status"] in ("served", "function", "cell", "not yet"), row
        assert all(row[column] for column in ("short", "title", "family", "kind")), row
        assert (row["status"] in ("served", "function")) == bool(row["functions"]), row


def test_every_generated_file_is_in_step():
    done = subprocess.run(
        [sys.executable, "scripts/index.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nRun `make index` and commit what changes."


@pytest.mark.parametrize("row", [row for row in PAPERS if row["functions"]], ids=lambda row: row["id"])
def test_functions_of_a_row_exist_and_cite_it(row):
    for path in row["functions"].split("; "):
        assert row["arxiv"] in (resolve(path).__doc__ or ""), path


@pytest.mark.parametrize("row", [row for row in PAPERS if row["notebook"]], ids=lambda row: row["id"])
def test_notebook_section_of_a_row_exists(row):
    book = json.loads((ROOT / "notebooks" / f"{row['notebook']}.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown")
    assert re.search(rf"^#+ {re.escape(row['section'])}$", text, re.MULTILINE)


def test_flagships_are_served():
    by_id = {row["id"]: row for row in PAPERS}
    assert "cotkit.tokens.corrupt" in by_id["L117"]["functions"]
    assert "cotkit.losses.preference.constraint_alignment" in by_id["L125"]["functions"]
    assert "cotkit.losses.sft.iw_sft" in by_id["L347"]["functions"]


# docstrings


@pytest.mark.parametrize("entry", FUNCTIONS, ids=lambda entry: entry["name"])
def test_every_public_name_resolves_and_is_described(entry):
    assert resolve(entry["name"]) is not None
    assert len(entry["what"]) > 10
    if entry["name"].rpartition(".")[2][0].islower():
        assert entry["source"], (
            f"{entry['name']} has no Source: line; plumbing says 'Source: none (plumbing)'."
        )
    if "arXiv" in entry["source"]:
        assert entry["arxiv"], f"{entry['name']}: write 'Source: Short (year) arXiv:0000.00000 Eq. n'."


def test_parsing_a_small_package(tmp_path):
    (tmp_path / "rooms").mkdir()
    (tmp_path / "_hidden.py").write_text("def no(): pass\n")
    (tmp_path / "rooms" / "__init__.py").write_text('from cotkit.rooms._a import load\n__all__ = ["load"]\n')
    (tmp_path / "rooms" / "_a.py").write_text('def load():\n    """Load it."""\ndef helper(): pass\n')
    doc = (
        'def f():\n    r"""Do one thing.\n\n    Source: One (2023) arXiv:2301.00001 Eq. 1, 2\n'
        "    Two more (2024) arXiv:2401.00002 §3\n    Basis: memory.\n\n"
        '    Example:\n        >>> 1\n        1\n    """\n'
    )
    (tmp_path / "tools.py").write_text('__all__ = ["f"]\n' + doc + "def g(): pass\n")
    load, f = _index.functions(tmp_path)
    assert (load["name"], load["what"], load["source"]) == ("cotkit.rooms.load", "Load it.", "")
    assert f["name"] == "cotkit.tools.f"
    assert f["arxiv"] == "2301.00001 2401.00002"
    assert f["basis"] == "memory."
    assert f["source"].endswith("§3")


# the package


def test_the_package_file_is_short_and_lists_the_rooms():
    assert len((ROOT / "cotkit" / "__init__.py").read_text().splitlines()) < 30
    assert {"find", "tokens", "losses", "lab", "interop"} <= set(dir(cotkit))
    assert cotkit.losses.preference.constraint_alignment is resolve(
        "cotkit.losses.preference.constraint_alignment"
    )
    with pytest.raises(AttributeError, match="no room 'looses'; the rooms are"):
        cotkit.looses  # noqa: B018


def test_rooms_import_torch_and_nothing_heavy():
    code = (
        "import sys, cotkit\n"
        "for room in cotkit.__all__: getattr(cotkit, room)\n"
        "heavy = {'transformers', 'peft', 'trl', 'matplotlib', 'pandas', 'datasets', 'math_verify'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# find


def test_find_by_word_short_name_family_and_number():
    assert "CoT-Valve" in names("valve")
    assert names("AFT")[0] == "AFT"
    assert "cotkit.losses.preference.constraint_alignment" in names("AFT")
    assert names("masked thought")[0] == "MFT"
    assert {"QFFT", "CoT-Valve"} <= set(names("length"))
    assert names("2309.02144")[:1] == ["AFT"]
    assert names("L347") == ["iw-SFT"]
    assert names("constraint_alignment")[0] == "cotkit.losses.preference.constraint_alignment"


def test_find_says_how_well_it_matched():
    assert {hit["match"] for hit in _index.search("valve")} == {"all"}
    some = _index.search("valve xylophone")
    assert {hit["match"] for hit in some} == {"some"}
    near = _index.search("maskd thougt")
    assert {hit["match"] for hit in near} == {"nearest"}
    assert near[0]["name"] == "MFT"
    assert _index.search("qqqqzzzz") == []


def test_find_returns_a_table_with_links():
    pytest.importorskip("pandas")
    table = cotkit.find("iw-SFT")
    assert list(table.columns)[:4] == ["match", "kind", "name", "what"]
    assert table["link"].iloc[0] == "https://arxiv.org/abs/2507.12856"
    assert len(cotkit.find()) == len(PAPERS) + len(_index.functions())
    assert cotkit.find("qqqqzzzz").empty


@pytest.mark.errors
def test_find_refuses_what_is_no_text():
    with pytest.raises(TypeError, match=r"find: expected query as a string, got int\."):
        cotkit.find(3)


# command line


def test_command_line_prints_the_readme_table(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_command_line_find_and_usage(capsys):
    assert cli.main(["find", "masked", "thought"]) == 0
    assert "2403.02178" in capsys.readouterr().out
    assert cli.main(["nonsense"]) == 2
    assert "usage" in capsys.readouterr().err


def test_command_line_copies_notebooks_and_keeps_what_is_there(tmp_path, capsys):
    if not list((ROOT / "notebooks").glob("*.ipynb")):
        pytest.skip("no notebooks yet")
    assert cli.main(["notebooks", str(tmp_path / "nb")]) == 0
    copied = {file.name for file in (tmp_path / "nb").glob("*.ipynb")}
    assert copied == {file.name for file in (ROOT / "notebooks").glob("*.ipynb")}
    one = tmp_path / "nb" / sorted(copied)[0]
    one.write_text("mine")
    assert cli.main(["notebooks", str(tmp_path / "nb")]) == 0
    assert one.read_text() == "mine"
    assert "Copied 0 files" in capsys.readouterr().out.splitlines()[-1]


# the script behind `make index`


def test_claims_are_read_with_their_verdicts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("index")
    monkeypatch.setattr(script, "NOTEBOOKS", tmp_path)
    assert script.claims() == []
    (tmp_path / "claims.toml").write_text(
        '[claims.a]\npaper = "L125"\npinned = "tests/t.py"\n[claims.b]\npaper = "L125"\n'
        '[claims.c]\npaper = "L3"\nwhere = "real model"\n'
    )
    assert script.verdict_counts().splitlines()[-2:] == [
        "- judged in the tiny lab, once per task: 2 not run",
        "- judged on a real model: 1 not run",
    ]
    (tmp_path / "CLAIMS.md").write_text(
        "# t\n\n| claim | b |\n|---|---|\n| a | 2 |\n\n| Claim | n | Verdict |\n|:--|--:|---|\n"
        "| a | 5 | supported (was: more) |\n| a | 7 | opposite |\n| b | 1 | supported |\n"
    )
    assert [(c["name"], c["verdict"]) for c in script.claims()] == [
        ("a", "supported"), ("a", "opposite"), ("b", "supported"), ("c", "not run")
    ]  # fmt: skip
    counts = script.verdict_counts().splitlines()
    assert counts[0].startswith("3 claims are written down")
    assert counts[2] == "- method pinned to its equation: 1 of 3"
    assert counts[4] == "- judged in the tiny lab, once per task: 2 supported, 1 opposite"
    assert counts[5] == "- judged on a real model: 1 not run"


def test_generated_parts_stand_between_markers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("index")
    assert script.between("a <!-- x:begin --> old <!-- x:end --> b", "x", "new") == (
        "a <!-- x:begin -->\nnew\n<!-- x:end --> b"
    )
    with pytest.raises(ValueError, match="Put the markers back"):
        script.between("nothing here", "x", "new")


# the README


def test_readme_examples_run():
    pytest.importorskip("pandas")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    before, _, last = blocks[2].strip().rpartition("\n")
    call, _, result = last.partition("  # ")
    code = "\n".join(
        [
            *blocks[:2],
            "assert loss.item() > 0 and scores.grad[0, 0] < 0  # descent raises the right chain",
            before,
            f"assert {call} == {result}",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
