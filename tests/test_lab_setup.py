"""setup: what it seeds, silences and sets; run in fresh processes, since it changes the whole one."""

import json
import os
import subprocess
import sys

import pytest

from cotkit.lab._setup import setup, show_progress


def fresh(code, **environment):
    """Run code in a new process; its last line printed is json. Returns that and the standard error."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TQDM", "TRANSFORMERS", "CI"))
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=inherited | environment, check=True
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


CODE = """
import json, os, random, warnings
from cotkit.lab._setup import setup
setup(seed=7)
import numpy, torch
first = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]
setup(seed=7, threads=2)
again = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]
setup(seed=8)
other = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]
warnings.warn("not shown")
names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRL_EXPERIMENTAL_SILENCE",
         "TQDM_DISABLE", "TRANSFORMERS_VERBOSITY")
print(json.dumps([first == again, all(a != b for a, b in zip(first, other)),
                  {n: os.environ.get(n) for n in names}, torch.get_num_threads()]))
"""


def test_seeds_environment_and_silence():
    (same, differs, environment, threads), errors = fresh(CODE, CI="1")
    assert same
    assert differs
    assert threads == 1
    assert environment == {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    assert errors == ""


def test_bars_for_people_and_what_is_set_wins():
    (_, _, environment, _), _ = fresh(CODE, HF_HUB_OFFLINE="0")
    assert environment["TQDM_DISABLE"] is None
    assert environment["HF_HUB_OFFLINE"] == "0"


def test_libraries_that_are_already_there_are_silenced_too():
    code = """
import json, logging
import datasets, transformers
from cotkit.lab._setup import setup
setup()
log = logging.getLogger("bitsandbytes.backends.cpu.ops")
log.warning("the trap")
transformers.logging.get_logger("transformers.x").warning("and another")
datasets.logging.get_logger("datasets.x").warning("and a third")
print(json.dumps([transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()]))
"""
    (bar, disabled), errors = fresh(code)
    assert not bar
    assert disabled
    assert errors == ""


def test_figures_are_light_and_colour_blind_safe():
    code = """
import json
from cotkit.lab._setup import setup
setup()
import matplotlib as mpl
print(json.dumps([mpl.rcParams["figure.facecolor"], mpl.rcParams["axes.prop_cycle"].by_key()["color"][0]]))
"""
    assert fresh(code)[0] == ["white", "#0072B2"]


JUPYTER = """
import base64, io, json, os
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
InteractiveShell.enable_gui = lambda *_: None  # a kernel has one of its own
shell = InteractiveShell.instance()
from cotkit.lab._setup import setup

def shown(colours):
    setup(figure_colours=colours)
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4, 2))
    png = shell.display_formatter.formatters["image/png"]
    empty = png(figure)
    figure.add_subplot().imshow([[i * j for i in range(40)] for j in range(40)])
    page = png(figure)
    page = base64.b64decode(page) if isinstance(page, str) else page
    image = Image.open(io.BytesIO(page)) if page else None
    return [empty, page and [len(page), image.mode, len(image.getcolors(2**24)), image.size]]

print(json.dumps([shown(None), shown(24), shown(8)]))
"""


def test_light_figures_in_jupyter():
    inline = "module://matplotlib_inline.backend_inline"
    (_, light, lighter), errors = fresh(JUPYTER, MPLBACKEND=inline)
    assert errors == ""
    assert light[0] is lighter[0] is None  # an empty figure shows nothing, as without
    assert light[1][1] == lighter[1][1] == "P"
    assert 8 < light[1][2] <= 24
    assert lighter[1][2] <= 8
    assert light[1][3] == lighter[1][3]
    assert lighter[1][0] < light[1][0]
    (plain, other, _), errors = fresh(JUPYTER, MPLBACKEND="agg")  # figures are not shown inline
    assert errors == ""
    assert plain == other == [None, None]


@pytest.mark.parametrize(
    ("value", "wanted"), [("1", False), ("true", False), ("0", True), ("", True), ("false", True)]
)
def test_progress_follows_ci(monkeypatch, value, wanted):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("CI", value)
    assert show_progress() is wanted


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="expected seed in"):
        setup(seed=-1)
    with pytest.raises(ValueError, match="expected threads in"):
        setup(threads=0)
    for colours in (1, 257):
        with pytest.raises(ValueError, match=r"expected figure_colours in \[2, 256\]"):
            setup(figure_colours=colours)
    with pytest.raises(TypeError, match="expected figure_colours as an int, got float"):
        setup(figure_colours=24.0)
