"""One source of versions, two commands, and a frame that says what it does."""

import importlib
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("environment")


def dry_run(*arguments: str) -> str:
    # -B: as on a fresh machine, whatever is installed here
    done = subprocess.run(
        ["make", "-n", "-B", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


# versions


def test_environment_yml_is_made_from_the_constraints(script):
    assert (ROOT / "environment.yml").read_text(encoding="utf-8") == script.environment(), "run `make index`"


def test_every_direct_dependency_is_pinned_exactly(script):
    pinned = script.pins()
    for name in script.direct():
        assert re.fullmatch(r"\d+(\.\w+)*", pinned[name]), name
        assert f"- {name}=={pinned[name]}\n" in script.environment()


def test_constraints_are_plain_pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), (
            line
        )  # no path, host, marker or build tag (+cpu)
    assert len(lines) == len(set(lines))


def test_names_are_read_from_requirements(script):
    assert script.normal("Jinja2_X.y") == "jinja2-x-y"
    assert {"trl", "torch", "math-verify", "pytest-xdist"} <= set(script.direct())


def test_installed_versions_lose_their_build_tag(script, monkeypatch):
    class Fake:
        def __init__(self, name, version):
            self.metadata, self.version = {"Name": name}, version

    found = [Fake("torch", "2.13.0+cpu"), Fake("nvidia-x", "1"), Fake("cotkit", "0"), Fake("A_b", "2")]
    monkeypatch.setattr(script.metadata, "distributions", lambda: found)
    assert script.installed() == script.HEADER + "a-b==2\ntorch==2.13.0\n"


def test_core_dependencies_are_three_and_unbounded():
    assert sorted(PROJECT["project"]["dependencies"]) == ["jaxtyping", "numpy", "torch"]
    assert set(PROJECT["project"]["optional-dependencies"]) == {"notebooks", "train", "dev"}


def test_group_for_verl_is_reserved():
    assert "verl.plugins" in PROJECT["project"]["entry-points"]


# make

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_start_and_test_do_all_the_set_up():
    for target in ("start", "test", "lab"):
        plan = dry_run(target)
        assert "-m venv" in plan
        assert re.search(r"pip install .*--no-deps +torch==[\d.]+\n", plan)  # no index named unless asked for
        assert '--editable ".[notebooks,train,dev]"' in plan
    plan = dry_run("test")
    for step in (
        "ruff format --check",
        "ruff check",
        "mypy",
        "--jaxtyping-packages=cotkit,shape_hook.check",
    ):
        assert step in plan
    assert plan.count('-m "not slow') == 2


@needs_make
def test_torch_index_concerns_torch_alone():
    plan = dry_run("start", "TORCH_INDEX=file:///wheels")
    (line,) = [line for line in plan.splitlines() if "file:///wheels" in line]
    assert line.endswith("--index-url file:///wheels torch==" + line.rpartition("==")[2])


@needs_make
def test_old_python_is_refused_with_a_remedy(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'none'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stdout
    assert "is Python 3.9.1. Try: make setup PYTHON=python3.11" in done.stdout
    assert not (tmp_path / "none").exists()


def test_ci_script_is_sound():
    file = ROOT / ".ci" / "run"
    assert file.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(file)], check=True, timeout=60)
    assert "make test" in file.read_text(encoding="utf-8")


# what every file of the repository keeps to


def test_files_name_no_machine():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    here = re.compile(
        "|".join(map(re.escape, (f"/{'root'}/", f"/{'work'}/main", f"/{'work'}/shared", f"/{'tmp'}/w/")))
    )
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if (
            file.suffix in (".py", ".md", ".toml", ".yml", ".csv", ".txt", ".ipynb", ".json", "")
            and file.is_file()
        ):
            found = here.search(file.read_text(encoding="utf-8"))
            assert found is None, f"{name} names a path of one machine: {found[0]}"


def test_licence_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
