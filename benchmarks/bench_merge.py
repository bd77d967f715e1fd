"""Merging checkpoints on disk, side by side: cotkit's stream and mergekit.

Three synthetic Llama checkpoints of ``--gb`` each (a base and two models tuned from it, in shards) are merged
by ``linear`` (the two), ``model_stock`` and ``breadcrumbs`` (base and two). Every measurement runs in a
process of its own, in turns, and the median counts. Seconds are those of the merge, files read and written,
imports left out, beside the processor time they took; memory is the rise of the process's peak above what it
held before (mergekit maps its input files, and the mapped pages count). The bars: time at most mergekit's;
memory of cotkit at most (models + 1) of the largest tensor plus 64 MB; float32 results equal to 1e-5, but for
entries of one size at the edge of the breadcrumbs mask, which torch's sort orders by chance. Exit status 1
when one is missed.

mergekit lives in an environment of its own, whose interpreter is named:

    python -m venv mk && mk/bin/pip install mergekit
    python benchmarks/bench_merge.py --mergekit mk/bin/python [--gb 1] [--dtype bfloat16] [--repeats 3]

Without ``--mergekit`` only cotkit is measured.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONSTANT = 64  # MB beyond the tensors
METHODS = {"linear": 2, "model_stock": 3, "breadcrumbs": 3}  # and how many checkpoints it reads
ALPHA, BETA, GAMMA = 0.3, 0.85, 0.993


def peak_and_now() -> tuple[float, float]:
    """Peak and present resident memory in MB (Linux)."""
    found = dict(re.findall(r"Vm(HWM|RSS):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    return int(found["HWM"]) / 1024, int(found["RSS"]) / 1024


def make(folder: Path, gigabytes: float, dtype: str) -> None:
    """Write the three checkpoints: twelve layers and an embedding, as wide as the size asks for."""
    import torch

    from cotkit import merge

    size = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    layers, words = 12, 16_384
    # parameters: layers * 12 width^2 + 2 * words * width
    width = 64
    while (12 * layers * width**2 + 2 * words * width) * size < gigabytes * 1e9:
        width += 64
    shapes = {"model.embed_tokens.weight": (words, width)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{m}_proj.weight": (width, width) for m in "qkvo"}
        ffn = 8 * width // 3
        shapes |= {f"{at}mlp.{m}_proj.weight": (ffn, width) for m in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (width, ffn)
        shapes |= {f"{at}{m}_layernorm.weight": (width,) for m in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": words,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    numbers = {name: i for i, name in enumerate(shapes)}

    def tensor(name: str, model: int) -> torch.Tensor:
        first = torch.Generator().manual_seed(numbers[name])
        x = torch.randn(shapes[name], generator=first) * 0.02
        if model:
            own = torch.Generator().manual_seed(1000 * model + numbers[name])
            x += torch.randn(shapes[name], generator=own) * 0.002
        return x.to(getattr(torch, dtype))

    for model in range(3):
        names = {name: torch.empty(0) for name in shapes}
        state = merge.lazy(lambda one, k=model: {name: tensor(name, k) for name in one}, names)
        merge.save(state, folder / str(model), max_shard=int(gigabytes * 1e9 / 3))
        (folder / str(model) / "config.json").write_text(json.dumps(config))


def cotkit_merge(method: str, inputs: list[str], out: str) -> None:
    """Merge by cotkit."""
    from cotkit.merge import average, breadcrumbs, checkpoint, lazy, model_stock, save

    rules = {
        "linear": lambda *tuned: average(tuned),
        "model_stock": lambda base, *tuned: model_stock(base, tuned),
        "breadcrumbs": lambda base, *tuned: breadcrumbs(base, tuned, alpha=ALPHA, beta=BETA, gamma=GAMMA),
    }
    save(lazy(rules[method], *map(checkpoint, inputs)), out, like=inputs[0])


def mergekit_merge(method: str, inputs: list[str], out: str) -> None:
    """Merge by mergekit."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    own = {
        "linear": {"weight": 1.0},
        "model_stock": {},
        "breadcrumbs": {"weight": ALPHA, "density": round(GAMMA - BETA, 9), "gamma": round(1 - GAMMA, 9)},
    }[method]
    tuned = inputs if method == "linear" else inputs[1:]
    config: dict = {"merge_method": method, "models": [{"model": m, "parameters": own} for m in tuned]}
    if method != "linear":
        config["base_model"] = inputs[0]
        config["models"].insert(0, {"model": inputs[0]})
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), out, options)


def measure(engine: str, method: str, inputs: list[str], out: str) -> dict:
    """One merge in this process."""
    run = {"cotkit": cotkit_merge, "mergekit": mergekit_merge}[engine]
    if engine == "cotkit":
        import cotkit.merge  # noqa: F401  imports are not measured
    else:
        import mergekit.merge  # noqa: F401
        import transformers

        transformers.logging.set_verbosity_error()
    Path("/proc/self/clear_refs").write_text("5")
    _, before = peak_and_now()
    start, busy = time.perf_counter(), time.process_time()
    run(method, inputs, out)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {"seconds": seconds, "cpu": busy, "mb": peak_and_now()[0] - before}


def differing(a: Path, b: Path) -> float:
    """Share of the entries of two checkpoints that differ by more than 1e-5 of themselves (1e-7 near 0)."""
    from cotkit.merge import checkpoint

    mine, theirs = checkpoint(a), checkpoint(b)
    if set(mine) != set(theirs):
        return 1.0
    count = apart = 0
    for name in mine:
        x, y = mine[name].double(), theirs[name].double()
        apart += int(((x - y).abs() > 1e-7 + 1e-5 * y.abs()).sum())
        count += x.numel()
    return apart / count


def main() -> int:
    """Measure, print the table, and compare with the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", help="interpreter of an environment with mergekit")
    parser.add_argument("--gb", type=float, default=1.0, help="size of one checkpoint")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the checkpoints go; a temporary folder by default")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        engine, method, out, *inputs = args.case
        print(json.dumps(measure(engine, method, inputs, out)))
        return 0
    engines = {"cotkit": sys.executable} | ({"mergekit": args.mergekit} if args.mergekit else {})
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        make(folder, args.gb, args.dtype)
        return compare(folder, engines, args)
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, engines: dict[str, str], args: argparse.Namespace) -> int:
    """Run all methods by all engines in turns and judge."""
    from cotkit.merge import checkpoint

    state = checkpoint(folder / "0")
    sizes = [state[name].numel() * state[name].element_size() / 2**20 for name in state]
    print(f"{len(sizes)} tensors, {sum(sizes):.0f} MB each checkpoint, largest tensor {max(sizes):.0f} MB")
    print(f"{args.dtype}, median of {args.repeats}")
    print(f"{'':26}{'seconds':>9}{'cpu':>9}{'peak MB':>9}{'bar MB':>8}   fastest - slowest")
    missed = []
    for method, models in METHODS.items():
        inputs = [str(folder / str(k)) for k in ((1, 2) if models == 2 else (0, 1, 2))]
        runs: dict[str, list[dict]] = {engine: [] for engine in engines}
        for _ in range(args.repeats):
            for engine, python in engines.items():
                out = folder / f"{engine}-out"
                shutil.rmtree(out, ignore_errors=True)
                case = [python, __file__, "--case", engine, method, str(out), *inputs]
                done = subprocess.run(case, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{engine} {method} failed:\n{done.stderr[-2000:]}")
                runs[engine].append(json.loads(done.stdout.splitlines()[-1]))
        middle = {e: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for e, rs in runs.items()}
        bar = (models + 1) * max(sizes) + CONSTANT
        for engine, now in middle.items():
            times = [r["seconds"] for r in runs[engine]]
            row = f"{method:14}{engine:12}{now['seconds']:9.2f}{now['cpu']:9.2f}{now['mb']:9.0f}"
            row += f"{bar:8.0f}" if engine == "cotkit" else " " * 8
            print(f"{row}   {min(times):.2f} - {max(times):.2f}", flush=True)
        if middle["cotkit"]["mb"] > bar:
            missed.append(f"{method}: {middle['cotkit']['mb']:.0f} MB > {bar:.0f}")
        if "mergekit" in engines:
            if middle["cotkit"]["seconds"] > middle["mergekit"]["seconds"]:
                missed.append(f"{method}: {middle['cotkit']['seconds']:.2f} s > mergekit's")
            apart = differing(folder / "cotkit-out", folder / "mergekit-out")
            print(f"{method:14}share of entries that differ: {apart:.1e}")
            if args.dtype == "float32" and apart > (1e-5 if method == "breadcrumbs" else 0):
                missed.append(f"{method}: {apart:.1e} of the results differ")
    print("bars met" if not missed else "BAR MISSED: " + "; ".join(missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
