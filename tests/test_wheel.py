"""The wheel builds, carries what it should, and works where there is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("build")
pytest.importorskip("hatchling")


def call(*words: object, cwd: Path, timeout: int = 300, **environment: str) -> str:
    """Run a command away from the checkout and return what it printed."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "COV"))
    }
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(folder: Path) -> Path:
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def inside(folder: str, *suffixes: str) -> set[str]:
    """Return the files of a folder of the checkout that git does not ignore, as paths from the root."""
    found = (ROOT / folder).rglob("*")
    return {
        file.relative_to(ROOT).as_posix()
        for file in found
        if file.suffix in suffixes and not {"__pycache__", ".ipynb_checkpoints"} & set(file.parts)
    }


def test_wheel_holds_everything_and_imports_from_elsewhere(tmp_path):
    wheel = build(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        size = sum(entry.file_size for entry in archive.infolist() if "/checkpoints/" in entry.filename)
    assert {"cotkit/papers.csv", "cotkit/py.typed", "cotkit/__main__.py"} <= names
    assert inside("cotkit", ".py", ".csv", ".json", ".safetensors", ".jinja") <= names
    assert {
        f"cotkit/{name}" for name in inside("notebooks", ".ipynb", ".toml", ".csv", ".json", ".md")
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "benchmarks/", "out/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert size <= 8 * 2**20, "the shipped checkpoints may have 8 MB together"

    target = tmp_path / "site"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    call(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        target,
        wheel,
        cwd=elsewhere,
    )
    code = (
        "import cotkit as ck, pathlib\n"
        "assert pathlib.Path(ck.__file__).is_relative_to(pathlib.Path('../site').resolve()), ck.__file__\n"
        "[getattr(ck, room) for room in ck.__all__]\n"
        "print(len(ck._index.papers()))\n"
        "if any(pathlib.Path('../site/cotkit').glob('lab/checkpoints/*')):\n"
        "    model, tokenizer = ck.lab.load('tiny')\n"
        "    print('parameters', sum(p.numel() for p in model.parameters()))\n"
    )
    path = {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    printed = call(sys.executable, "-c", code, cwd=elsewhere, **path)
    assert printed.startswith("251")
    if any((ROOT / "cotkit" / "lab").glob("checkpoints/*")):
        assert "parameters" in printed
    assert "2309.02144" in call(sys.executable, "-m", "cotkit", "find", "AFT", cwd=elsewhere, **path)
    if inside("notebooks", ".ipynb"):
        call(sys.executable, "-m", "cotkit", "notebooks", "here", cwd=elsewhere, **path)
        copied = {file.name for file in (elsewhere / "here").glob("*.ipynb")}
        assert copied == {Path(name).name for name in inside("notebooks", ".ipynb")}


@pytest.mark.slow
def test_wheel_runs_notebook_00_in_an_empty_environment(tmp_path):
    if not (ROOT / "notebooks" / "00_start_here.ipynb").exists():
        pytest.skip("notebook 00 is not there yet")
    wheel = build(tmp_path)
    call(sys.executable, "-m", "venv", "empty", cwd=tmp_path)
    python = tmp_path / "empty" / "bin" / "python"
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (torch,) = [line for line in constraints.splitlines() if line.startswith("torch==")]
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    pip = (python, "-m", "pip", "install", "--quiet")
    call(*pip, "--no-deps", *index, torch, cwd=tmp_path, timeout=1800)
    call(*pip, "--constraint", ROOT / "constraints.txt", f"{wheel}[notebooks]", cwd=tmp_path, timeout=1800)
    call(python, "-m", "cotkit", "notebooks", "here", cwd=tmp_path)
    run = ("nbconvert", "--to", "notebook", "--execute", "--output", "done.ipynb", "00_start_here.ipynb")
    call(python, "-m", *run, cwd=tmp_path / "here", timeout=1200, OMP_NUM_THREADS="1")
    assert (tmp_path / "here" / "done.ipynb").exists()
