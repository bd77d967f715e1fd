"""What the sweeps share: jobs that several processes take from one list, each leaving a file."""

import json
import os
import time
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


def choose_rates(
    grid: dict[str, tuple], folder: Path, do: Callable, name_of: Callable[[str, str], str], chosen: Path
) -> None:
    """Run a grid ``{job: (part, arm, learning rate)}`` and write the rate with the best accuracy of each arm.

    Waits for the jobs that other processes have begun; ``chosen`` keeps what other grids chose before.
    """
    work_through(list(grid.items()), folder, do)
    while not all((folder / f"{job}.json").exists() for job in grid):
        time.sleep(2)
    found: dict[str, dict[float, float]] = {}
    for job, (part, arm, lr) in grid.items():
        line = json.loads((folder / f"{job}.json").read_text())
        found.setdefault(name_of(part, arm), {})[lr] = float(np.mean(line["accuracy"]))
    best = json.loads(chosen.read_text()) if chosen.exists() else {}
    for name, values in found.items():
        best[name] = max(values, key=lambda lr: values[lr])
        print(name, {lr: round(v, 3) for lr, v in values.items()}, "->", best[name])
    chosen.write_text(json.dumps(dict(sorted(best.items())), indent=1) + "\n")
