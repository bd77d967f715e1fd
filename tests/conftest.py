"""What every test file may use: float64 inputs, the real data where it is there, and one thread."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def _f64(*values) -> torch.Tensor:
    """Float64 leaf with gradient; ``f64(1.0, 2.0)`` is a vector, ``f64([[1.0], [2.0]])`` what it says."""
    data = values[0] if len(values) == 1 and isinstance(values[0], list | tuple) else list(values)
    return torch.tensor(data, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def f64():
    """Return the helper that builds float64 leaves with a gradient."""
    return _f64


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder that holds ``gsm8k/``: COTKIT_DATA, or ``../shared/data`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("COTKIT_DATA") or beside)
    if not (folder / "gsm8k").is_dir():
        pytest.skip("real data not found: set COTKIT_DATA to the folder that holds gsm8k/")
    return folder


def pytest_addoption(parser):
    """Add --slow: also run what is marked slow (or name the marker with -m)."""
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    """Skip slow tests unless --slow is given or -m speaks of them; skip gpu tests without CUDA."""
    named = config.getoption("--slow") or "slow" in config.getoption("-m")
    for item in items:
        if "slow" in item.keywords and not named:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))
