"""A GRPO step of the lab beside one of TRL's GRPOTrainer: the same model, prompts, lengths and arithmetic.

Both sample 8 completions of each of 8 prompts with the tiny model, all of them as long as allowed, score them
with the same reward, take group advantages and make ``epochs`` AdamW steps on the batch with the clipped
surrogate, clipped gradients and no KL. TRL is configured fairly: float32, CPU, no checkpointing, one
micro-batch, no logging, saving or progress bar; it computes old log-probs only where it needs them, and so
does the lab. Every measurement runs in a process of its own, in turns (ours, theirs, ours, ...), after
warm-up, and the median of 5 counts. The bar: at most 1.0 times TRL's wall time per batch. Exit status 1 when
it is missed.

Run: ``python benchmarks/bench_grpo_step.py [--quick] [--threads N] [--epochs 1 2]``
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise

BAR = 1.0
PROMPTS, GENERATIONS, WARM, MEASURED = 8, 8, 2, 3
LR = 1e-4


def clock() -> tuple[float, float]:
    """Wall time, and processor time for machines that do other things as well."""
    return time.perf_counter(), time.process_time()


def per_batch(marks: list[tuple[float, float]], epochs: int) -> dict[str, float]:
    """Median time of a batch: from the end of one to the end of the next, the warm-up left out."""
    ends = marks[WARM * epochs :: epochs]
    found = {}
    for i, name in enumerate(("seconds", "cpu")):
        found[name] = statistics.median(b[i] - a[i] for a, b in pairwise(ends))
    return found


def lab_step(length: int, epochs: int) -> dict:
    """The loop of the notebook, as it is."""
    from cotkit import lab
    from cotkit.losses import advantage, policy
    from cotkit.rewards.answer import accuracy

    model, tokenizer = lab.load("tiny")
    model.generation_config.min_new_tokens = length  # all completions as long as allowed, for both
    questions = lab.rows("word_problem", "train", n=PROMPTS)
    reward, batch, lengths, marks = accuracy(), {}, [], [clock()]

    def batches(step: int) -> dict:
        if step:
            marks.append(clock())
        if step % epochs == 0:
            how = {"max_new_tokens": length, "seed": step, "old_logps": epochs > 1}
            batch.update(lab.rollout(model, tokenizer, questions, reward, GENERATIONS, **how))
            batch["advantages"] = advantage.group(batch["rewards"]).flatten()
            lengths.append(float(batch["mask"].sum(1).float().mean()))
        return batch

    def loss(logps, batch, denom):
        old = batch.get("old_logps", logps.detach())
        return policy.grpo(logps, old, batch["advantages"], batch["mask"], denom=denom)

    steps = epochs * (WARM + MEASURED) + 1
    lab.fit(model, tokenizer, batches, loss, steps=steps, lr=LR, unit="sequence", warmup=0.0)
    return per_batch(marks, epochs) | {"lengths": lengths}


def trl_step(length: int, epochs: int) -> dict:
    """GRPOTrainer with the same settings."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from cotkit import lab
    from cotkit.rewards.answer import accuracy

    model, tokenizer = lab.load("tiny")
    questions = lab.rows("word_problem", "train", n=PROMPTS)
    marks = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
            marks.append(clock())

        def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
            marks.append(clock())

    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            per_device_train_batch_size=PROMPTS * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
            num_iterations=epochs,
            loss_type="grpo",
            beta=0.0,
            epsilon=0.2,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_steps=epochs * (WARM + MEASURED),
            learning_rate=LR,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            optim="adamw_torch",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = Dataset.from_list([{"prompt": r["prompt"], "answer": r["answer"]} for r in questions])
        trainer = GRPOTrainer(model, accuracy(), args, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())
        trainer.train()
        lengths = list(trainer._metrics["train"]["completions/mean_length"])
    return per_batch(marks, epochs) | {"lengths": lengths}


def main() -> int:
    """Measure, print the table, and compare with the bar."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--quick", action="store_true", help="short completions, one process each")
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--epochs", type=int, nargs="+", default=[1, 2])
    asked.add_argument("--case", choices=["lab", "trl"], help=argparse.SUPPRESS)
    args = asked.parse_args()
    length, repeats = (24, 1) if args.quick else (64, 5)
    if args.case:
        import torch

        torch.set_num_threads(args.threads)
        found = (lab_step if args.case == "lab" else trl_step)(length, args.epochs[0])
        print(json.dumps(found))
        return 0
    quiet = {"CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, __file__, "--threads", str(args.threads), *(["--quick"] if args.quick else [])]
    missed = []
    shape = f"{PROMPTS} prompts x {GENERATIONS} completions of {length} tokens"
    print(f"{shape}, {args.threads} thread(s), median of {repeats} processes with {MEASURED} batches each")
    print(f"{'epochs':>6} {'':4}{'wall s':>9}{'x TRL':>8}{'cpu s':>9}{'x TRL':>8}   fastest - slowest")
    for epochs in args.epochs:
        runs: dict[str, list[dict]] = {"lab": [], "trl": []}
        for _ in range(repeats):
            for case, found in runs.items():
                more = ["--case", case, "--epochs", str(epochs)]
                environment = os.environ | quiet
                done = subprocess.run(
                    [*command, *more], capture_output=True, text=True, check=True, env=environment
                )
                found.append(json.loads(done.stdout.splitlines()[-1]))
        for case, found in runs.items():
            wrong = [x for run in found for x in run["lengths"] if x != length]
            if wrong:
                print(f"WRONG: {case} wrote {wrong[0]} tokens, not {length}")
                return 1
        middle = {
            case: {k: statistics.median(run[k] for run in found) for k in ("seconds", "cpu")}
            for case, found in runs.items()
        }
        for case, now in middle.items():
            ratios = [now[k] / middle["trl"][k] for k in ("seconds", "cpu")]
            times = [run["seconds"] for run in runs[case]]
            row = f"{epochs:6} {case:4}{now['seconds']:9.2f}{ratios[0]:8.2f}{now['cpu']:9.2f}{ratios[1]:8.2f}"
            print(f"{row}   {min(times):.2f} - {max(times):.2f}")
        if middle["lab"]["seconds"] > BAR * middle["trl"]["seconds"]:
            missed.append(f"{epochs} epoch(s)")
    print("bar met" if not missed else "BAR MISSED: " + "; ".join(missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
