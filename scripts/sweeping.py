"""What the sweeps share: jobs that several processes take from one list, each leaving a file."""

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from cotkit import lab

NAMES = ("arm", "base", "seed")


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
        for each in line if isinstance(line, list) else [line]:
            means = {k: round(float(np.nanmean(v)), 3) for k, v in each.items() if k not in NAMES}
            print(name, each["arm"], means, flush=True)


def choose_settings(
    grid: dict[str, tuple], folder: Path, do: Callable, name_of: Callable[[str, str], str], chosen: Path
) -> None:
    """Run a grid ``{job: (part, arm, setting)}``, write the setting with the best accuracy of each arm.

    A setting is a learning rate, or a pair with another number. Waits for the jobs that other processes have
    begun; ``chosen`` keeps what other grids chose before.
    """
    work_through(list(grid.items()), folder, do)
    while not all((folder / f"{job}.json").exists() for job in grid):
        time.sleep(2)
    found: dict[str, dict] = {}
    for job, (part, arm, setting) in grid.items():
        line = json.loads((folder / f"{job}.json").read_text())
        found.setdefault(name_of(part, arm), {})[setting] = float(np.mean(line["accuracy"]))
    best = json.loads(chosen.read_text()) if chosen.exists() else {}
    for name, values in found.items():
        best[name] = max(values, key=lambda setting: values[setting])
        print(name, {setting: round(v, 3) for setting, v in values.items()}, "->", best[name])
    chosen.write_text(json.dumps(dict(sorted(best.items())), indent=1) + "\n")


def rerun_one(
    day: date,
    parts: list[str],
    arms: dict[str, tuple[str, ...]],
    runs: Sequence[tuple[int, int]],
    one: Callable,
    table_path: Callable[[str], Path],
    settings: dict[str, Any],
) -> int:
    """Run one arm of one part again, drawn by the date; 1 if its accuracy lies three spreads off its table.

    Only runs from a shipped base checkpoint (0 to 2) are drawn: the others would have to be trained first.
    """
    rng = random.Random(day.isoformat())
    part = rng.choice(parts)
    arm, (base, seed) = rng.choice(arms[part]), rng.choice([run for run in runs if run[0] < 3])
    rows = lab.table(table_path(part), settings=settings).rows
    means = rows[rows["arm"] == arm].assign(mean=lambda t: t["accuracy"].map(np.mean))
    recorded = float(means[means["base"] == base]["mean"].iloc[0])
    now = float(np.mean(one(part, arm, base, seed)["accuracy"]))
    n = len(rows["accuracy"].iloc[0])
    allowed = 3 * max(float(means["mean"].std()), (recorded * (1 - recorded) / n) ** 0.5)
    verdict = "agrees" if abs(now - recorded) <= allowed else "DISAGREES"
    print(
        f"{part}, {arm}, base {base}, seed {seed}: "
        f"table {recorded:.3f}, now {now:.3f}, allowed {allowed:.3f}: {verdict}"
    )
    return int(verdict == "DISAGREES")
