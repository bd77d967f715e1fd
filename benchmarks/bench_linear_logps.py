"""Fused log-probabilities, side by side: cotkit, TRL's chunked function, full logits.

Forward and backward at the head of a 0.5B model: 2048 tokens, D = 896, V = 151,936, float32. Every
measurement runs in a process of its own, in turns (ours, theirs, ours, ...), and the median of 5 counts.
Memory is the rise of the process's peak above what it held with inputs and weights in place, gradients
included. The bar, against TRL at the tile width its trainers use: time at most 1.05 times, memory at most 1.0
times. Exit status 1 when it is missed.

Run: ``python benchmarks/bench_linear_logps.py [--quick] [--threads N]``
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

TIME_BAR, MEMORY_BAR = 1.05, 1.0
CASES = ("cotkit", "trl", "trl 4096", "full logits", "cotkit, frozen head", "trl, frozen head")
FULL = {"tokens": 2048, "width": 896, "words": 151_936, "repeats": 5}
QUICK = {"tokens": 512, "width": 128, "words": 16_384, "repeats": 3}


def peak_and_now() -> tuple[float, float]:
    """Peak and present resident memory in MB (Linux; elsewhere the peak alone is known)."""
    status = Path("/proc/self/status")
    if status.exists():
        found = dict(re.findall(r"Vm(HWM|RSS):\s+(\d+) kB", status.read_text()))
        return int(found["HWM"]) / 1024, int(found["RSS"]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return peak, peak


def forget_peak() -> None:
    """Let the peak begin at the present value, where the system allows it."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def score(case: str, hidden, weight, labels):
    """Log-probs of all labels but the first, by one of the ways that are compared."""
    if case.startswith("cotkit"):
        from cotkit.tokens import linear_logps

        return linear_logps(hidden, weight, labels)[:, 1:]
    if case.startswith("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        columns = 4096 if "4096" in case else _CHUNKED_LOGPROB_CHUNK_SIZE
        flat, ids = hidden[:, :-1].reshape(-1, hidden.shape[-1]), labels[:, 1:].reshape(-1)
        return ChunkedLogProbFunction.apply(flat, weight, None, ids, 1.0, columns, None, 1.0, ("log_probs",))[
            0
        ]
    from cotkit.tokens import token_logps

    return token_logps(hidden @ weight.t(), labels)[:, 1:]


def measure(case: str, tokens: int, width: int, words: int, threads: int) -> dict:
    """One forward and backward pass in this process."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    frozen = "frozen" in case
    generator = torch.Generator().manual_seed(0)

    def inputs(n, v):
        hidden = torch.randn(1, n + 1, width, generator=generator).requires_grad_()
        weight = (torch.randn(v, width, generator=generator) * 0.05).requires_grad_(not frozen)
        return hidden, weight, torch.randint(0, v, (1, n + 1), generator=generator)

    score(case, *inputs(64, 70_000)).sum().backward()  # warm-up: imports, thread pools, the chunked path
    hidden, weight, labels = inputs(tokens, words)
    forget_peak()
    _, before = peak_and_now()
    start = time.perf_counter()
    logps = score(case, hidden, weight, labels)
    logps.sum().backward()
    seconds = time.perf_counter() - start
    peak, _ = peak_and_now()
    grads = [x.grad.double().square().sum().sqrt().item() for x in (hidden, weight) if x.grad is not None]
    return {"seconds": seconds, "mb": peak - before, "value": logps.double().sum().item(), "grads": grads}


def main() -> int:
    """Measure, print the table, and compare with the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small head, 3 repeats: checks the script")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = dict(QUICK if args.quick else FULL)
    repeats = size.pop("repeats")
    if args.case:
        print(json.dumps(measure(args.case, **size, threads=args.threads)))
        return 0
    runs: dict[str, list[dict]] = {case: [] for case in CASES}
    command = [sys.executable, __file__, "--threads", str(args.threads), *(["--quick"] if args.quick else [])]
    for _ in range(repeats):
        for case in CASES:
            done = subprocess.run([*command, "--case", case], capture_output=True, text=True, check=True)
            runs[case].append(json.loads(done.stdout.splitlines()[-1]))
    middle = {c: {k: statistics.median(r[k] for r in runs[c]) for k in ("seconds", "mb")} for c in CASES}
    shape = f"{size['tokens']} tokens, D={size['width']}, V={size['words']}"
    print(f"{shape}, forward + backward, median of {repeats}")
    print(f"{'':22}{'seconds':>10}{'x TRL':>8}{'peak MB':>10}{'x TRL':>8}   fastest - slowest")
    for case in CASES:
        base = middle["trl, frozen head" if "frozen" in case else "trl"]
        now, times = middle[case], [r["seconds"] for r in runs[case]]
        ratios = now["seconds"] / base["seconds"], now["mb"] / base["mb"]
        row = f"{case:22}{now['seconds']:10.2f}{ratios[0]:8.2f}{now['mb']:10.0f}{ratios[1]:8.2f}"
        print(f"{row}   {min(times):.2f} - {max(times):.2f}")
    first = runs["trl"][0]
    for case in CASES:
        found = runs[case][0]
        pairs = zip([found["value"], *found["grads"]], [first["value"], *first["grads"]], strict=False)
        if any(abs(a - b) > 1e-4 * abs(b) for a, b in pairs):
            print(f"WRONG: {case} gives {found}, TRL {first}")
            return 1
    missed = []
    for ours, theirs in (("cotkit", "trl"), ("cotkit, frozen head", "trl, frozen head")):
        for key, bar in (("seconds", TIME_BAR), ("mb", MEMORY_BAR)):
            if middle[ours][key] > bar * middle[theirs][key]:
                missed.append(f"{ours}: {key} {middle[ours][key]:.2f} > {bar} x {middle[theirs][key]:.2f}")
    print("bar met" if not missed else "BAR MISSED: " + "; ".join(missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
