"""Answer reward against math-verify's parse and verify on the same texts, one process and one thread.

python benchmarks/bench_answers.py [--n 5276] [--repeats 5] [--data FOLDER] [--cpu]
FOLDER holds gsm8k/example_model_solutions.jsonl (default: COTKIT_DATA, or ../shared/data beside the
checkout). Prints the median time per text of each, the ratio, and both agreements with the labels. Texts on
which either side disagrees with the label are left out of the timing, so that both do the same work right.
"""

import argparse
import json
import logging
import os
import statistics
import time
from functools import partial
from pathlib import Path

from cotkit.rewards.answer import accuracy


def texts(folder: Path, n: int) -> list[tuple[str, str, bool]]:
    """(gold, solution, label) of n solutions, spread over the file."""
    lines = (folder / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        row = json.loads(line)
        gold = row["ground_truth"].splitlines()[-1].removeprefix("A: ")
        found += [(gold, r["solution"], r["is_correct"]) for r in row.values() if isinstance(r, dict)]
    return found[:: max(1, len(found) // n)][:n]


def theirs(gold: str, solution: str) -> bool:
    """Verdict of math-verify, gold first, without its signal-based timeouts."""
    from math_verify import parse, verify

    read = partial(parse, parsing_timeout=None)
    return verify(read(gold), read(solution), timeout_seconds=None)


def main() -> None:
    """Run and print."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--n", type=int, default=5276)
    asked.add_argument("--repeats", type=int, default=5)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    asked.add_argument("--data", type=Path, default=Path(os.environ.get("COTKIT_DATA") or beside))
    asked.add_argument(
        "--cpu", action="store_true", help="CPU time instead of wall clock, for a busy machine"
    )
    args = asked.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter
    logging.disable(logging.CRITICAL)

    data = texts(args.data, args.n)
    reward = accuracy()
    mine = reward(prompts=None, completions=[s for _, s, _ in data], answer=[g for g, _, _ in data])
    other = [theirs(g, s) for g, s, _ in data]
    for name, verdicts in (("cotkit", [m == 1.0 for m in mine]), ("math-verify", other)):
        accepts = sum(v and not label for v, (_, _, label) in zip(verdicts, data, strict=True))
        rejects = sum(label and not v for v, (_, _, label) in zip(verdicts, data, strict=True))
        print(f"{name:12s} {len(data)} texts: {accepts} false accepts, {rejects} false rejects")
    timed = [d for d, m, o in zip(data, mine, other, strict=True) if (m == 1.0) == o == d[2]]

    golds, completions = [g for g, _, _ in timed], [s for _, s, _ in timed]
    ours_s, theirs_s = [], []
    for _ in range(args.repeats):
        start = clock()
        reward(prompts=None, completions=completions, answer=golds)
        ours_s.append((clock() - start) / len(timed))
        start = clock()
        for gold, solution, _ in timed:
            theirs(gold, solution)
        theirs_s.append((clock() - start) / len(timed))
    a, b = statistics.median(ours_s), statistics.median(theirs_s)
    print(
        f"cotkit {a * 1e6:.1f} us, math-verify {b * 1e6:.1f} us per text: {b / a:.1f} times faster ", end=""
    )
    print(f"(median of {args.repeats} on {len(timed)} texts that both judge right)")


if __name__ == "__main__":
    main()
