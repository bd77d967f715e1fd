"""Versions: ``constraints.txt`` is the one source; this writes ``environment.yml`` (conda) from it.

python scripts/environment.py          write environment.yml
python scripts/environment.py --pin    first write constraints.txt from what is installed beside this Python
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("notebooks", "train", "dev")
HEADER = "# Tested versions of all packages of the environment. Written by `make pin`; not edited by hand.\n"


def normal(name: str) -> str:
    """Return a package name in its normal form: lower case with single dashes."""
    return re.sub(r"[-_.]+", "-", name).lower()


def direct() -> list[str]:
    """Return the names of pyproject.toml's dependencies and of all its extras, in order, each once."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for e in EXTRAS for r in project["optional-dependencies"][e])]
    return list(dict.fromkeys(normal(re.split(r"[\s\[<>=!~;]", requirement)[0]) for requirement in wanted))


def pins() -> dict[str, str]:
    """Return the versions of constraints.txt by normal name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {normal(n): v for n, _, v in (line.partition("==") for line in lines if line[:1] not in ("", "#"))}


def installed() -> str:
    """Return constraints.txt for this Python's packages: no paths, no build tags such as +cpu."""
    found = {normal(d.metadata["Name"]): d.version.partition("+")[0] for d in metadata.distributions()}
    # The CUDA libraries come with torch's own exact pins and exist on some machines only.
    leave = ("cotkit", "pip", "setuptools", "wheel", "triton")
    keep = {n: v for n, v in found.items() if n not in leave and not n.startswith(("nvidia-", "cuda-"))}
    return HEADER + "".join(f"{name}=={keep[name]}\n" for name in sorted(keep))


def environment() -> str:
    """Return environment.yml: Python from conda, everything else by pip."""
    version = pins()
    lines = [
        "# For conda users; torch from the package index is the CUDA build on Linux.",
        "# Written by `make index` from constraints.txt; not edited by hand.",
        "#   conda env create -f environment.yml && conda activate cotkit && pip install --no-deps -e .",
        "name: cotkit",
        "channels: [conda-forge]",
        "dependencies:",
        "  - python=3.11",
        "  - pip",
        "  - pip:",
        "      - --constraint constraints.txt",
        *(f"      - {name}=={version[name]}" for name in direct()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--pin" in sys.argv:
        (ROOT / "constraints.txt").write_text(installed(), encoding="utf-8")
    (ROOT / "environment.yml").write_text(environment(), encoding="utf-8")
