"""Make the embedded checkpoints again: ``python -m cotkit.lab [FOLDER] [--seeds 0 1 2]``."""

import argparse
import json

from cotkit.lab._model import CHECKPOINTS
from cotkit.lab._pretrain import STEPS, make
from cotkit.lab._setup import setup

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m cotkit.lab", description=__doc__)
    parser.add_argument("folder", nargs="?", default=CHECKPOINTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--steps", type=int, help="default: what the shipped checkpoints took")
    arguments = parser.parse_args()
    setup(0)
    print(json.dumps(make(arguments.folder, seeds=tuple(arguments.seeds), steps=arguments.steps), indent=1))
