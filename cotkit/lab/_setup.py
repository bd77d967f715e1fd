"""The quiet first cell of a notebook: the same output on every machine.

Functions: ``setup`` sets seeds, threads, offline mode, loggers, warnings and the look of figures;
``show_progress`` says whether a progress bar is wanted.
"""

import logging
import os
import random
import sys
import warnings
from io import BytesIO
from typing import Any

import numpy as np
import torch

from cotkit._check import between, integers

__all__ = ["setup", "show_progress"]

GREY = "#8a8a8a"
# Okabe and Ito's palette: told apart by colour-blind readers, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6A00")

_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "WANDB_DISABLED": "true",
}
_LOGGERS = (
    "transformers",
    "datasets",
    "huggingface_hub",
    "trl",
    "peft",
    "accelerate",
    "httpx",
    "bitsandbytes",
    "bitsandbytes.backends.cpu.ops",  # speaks only on processors with AVX512-BF16
    "bitsandbytes.cextension",
    "torch.distributed.elastic",
    "matplotlib.font_manager",
)


def setup(
    seed: int = 0, *, threads: int = 1, offline: bool = True, figure_colours: int | None = None
) -> None:
    """Seed everything and silence everything: the first cell of each notebook.

    Call it before the first use of transformers, datasets or trl, which read the environment when they are
    imported. Progress bars are off where the environment variable ``CI`` is set and on for people. Variables
    that are already set win, so ``HF_HUB_OFFLINE=0`` in the shell keeps the hub reachable.

    Args:
        seed: seed of ``random``, ``numpy`` and ``torch``, >= 0.
        threads: threads of torch inside one operation, 1 to 64. One thread gives the same numbers on every
            run; two are faster on a free two-core machine.
        offline: never ask the network for models or data. Set False to load from the hub.
        figure_colours: 2 to 256: figures that Jupyter shows inline become PNGs of so many colours, a fifth to
            a third of the size, which keeps a notebook with its outputs small. 24 do for lines and bars, 128
            for colour maps. None: all colours. Outside Jupyter nothing changes.

    Returns:
        None; nothing is printed.

    Raises:
        ValueError: ``seed``, ``threads`` or ``figure_colours`` out of range.

    Source: none (plumbing)
    Basis: the traps of nbval and of bitsandbytes' logger were measured on transformers 5.23, trl 1.16.
    Differs: nothing.

    Example:
        >>> setup(seed=3)
        >>> import random
        >>> random.random() == random.Random(3).random()
        True
    """
    between("setup", 0, 2**32 - 1, seed=seed)
    between("setup", 1, 64, threads=threads)
    if figure_colours is not None:
        integers("setup", figure_colours=figure_colours)
        between("setup", 2, 256, figure_colours=figure_colours)
    _environment(offline)
    _loggers()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries that still use the global generator
    torch.manual_seed(seed)
    _figures()
    if figure_colours is not None:
        _light_figures(figure_colours)


def show_progress() -> bool:
    """Whether a progress bar is wanted: not under CI, where it would spoil the recorded output.

    Returns:
        False when the environment variable ``CI`` or ``TQDM_DISABLE`` is set to anything but 0 or empty.

    Source: none (plumbing)
    Basis: none needed.
    Differs: nothing.

    Example:
        >>> import os
        >>> os.environ["CI"] = "1"
        >>> show_progress()
        False
        >>> del os.environ["CI"]
    """
    return not any(os.environ.get(name, "") not in ("", "0", "false") for name in ("CI", "TQDM_DISABLE"))


def _environment(offline: bool) -> None:
    wanted = dict(_QUIET)
    if offline:
        wanted |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if not show_progress():
        wanted["TQDM_DISABLE"] = "1"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _loggers() -> None:
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Already imported libraries no longer read the environment.
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()


def _figures() -> None:
    """Light, readable figures; nothing happens where matplotlib is not installed."""
    try:
        import matplotlib as mpl
        from cycler import cycler
    except ImportError:
        return
    mpl.rcParams.update(
        {
            "figure.figsize": (6.4, 3.4),
            "figure.dpi": 90,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "savefig.bbox": "tight",
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "axes.prop_cycle": cycler(color=COLOURS),
        }
    )


def _light_figures(colours: int) -> None:
    """Let Jupyter show figures as PNGs with a palette; nothing happens where figures are not shown inline."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return
    if "inline" not in mpl.get_backend():
        return
    shell.run_line_magic("matplotlib", "inline")  # else its first figure would bring its own PNGs back
    formatter = shell.display_formatter.formatters["image/png"]
    formatter.for_type(Figure, lambda figure: _palette_png(figure, colours))


def _palette_png(figure: Any, colours: int) -> bytes | None:
    from IPython.core.pylabtools import print_figure
    from PIL import Image

    full = print_figure(figure, "png")
    if full is None:  # an empty figure
        return None
    page = BytesIO()
    Image.open(BytesIO(full)).convert("RGB").quantize(colours).save(page, "png", optimize=True)
    return min(full, page.getvalue(), key=len)
