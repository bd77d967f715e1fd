"""What the sweeps share: jobs that several processes take from one list, each leaving a file."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np


def work_through(jobs: list[tuple], folder: Path, do: Callable) -> None:
    """Do every job ``(name, arguments)`` that nobody has done or begun; each leaves a json file.

    A process that dies leaves its ``.begun`` file: delete it and start again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, job in jobs:
        done, begun = folder / f"{name}.json", folder / f"{name}.begun"
        if done.exists():
            continue
        try:
            os.close(os.open(begun, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        try:
            line = do(*job)
            done.with_suffix(".tmp").write_text(json.dumps(line))
            done.with_suffix(".tmp").replace(done)
        finally:
            begun.unlink()
        means = {
            k: round(float(np.nanmean(v)), 3) for k, v in line.items() if k not in ("arm", "base", "seed")
        }
        print(name, means, flush=True)
