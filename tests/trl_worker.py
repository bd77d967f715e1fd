"""One optimizer step through ``interop.trl``: what the interop tests share, and launch as two processes.

Not a test file: ``python -m torch.distributed.run --nproc-per-node 2 tests/trl_worker.py OUT``.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

from cotkit import tokens
from cotkit.interop.trl import sft_trainer
from cotkit.losses.preference import constraint_alignment
from cotkit.losses.sft import iw_sft, nll

VOCAB = 64


def model(seed=0, *, vocab_size=VOCAB, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, **{**small, **ids, **config})
    )
    return network.float()


def tokenizer(words=None):
    """Words w3 ... w63: TRL only asks for pad and end tokens when the rows are encoded already."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(words or (f"w{i}" for i in range(3, VOCAB)))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


SPECIALS = ["<pad>", "<eos>", "<think>", "</think>"]


def letters():
    """A byte-level tokenizer without merges: any text, one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def letter_model(seed=0):
    """A Llama for ``letters``."""
    return model(seed, vocab_size=len(letters()), hidden_size=64, initializer_range=0.1, eos_token_id=1)


def sums(count=12):
    """Additions with a one-step thought."""
    made = []
    for i in range(count):
        a, b = i % 4 + 1, i // 4 + 1
        text = tokens.FORMATS["think"].render([f"{a}+{b}={a + b}"], str(a + b))
        made.append({"prompt": f"{a}+{b}?\n", "completion": text, "answer": str(a + b)})
    return made


def items(count=8, seed=0):
    """Encoded rows of unequal length; the prompt is two to four tokens long."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        prompt, target = (int(torch.randint(2, high, (), generator=draw)) for high in (5, 13))
        ids = torch.randint(3, VOCAB, (prompt + target,), generator=draw).tolist()
        labels = [-100] * prompt + ids[prompt:]
        places = {"segments": [1] * prompt + [2] * target, "steps": [-1] * prompt + [0] * target}
        made.append({"input_ids": ids, "labels": labels, **places, "turns": [0] * (prompt + target)})
    return made


def flat():
    """Eight rows with a reference column, as ``add_logps`` would leave it."""
    from datasets import Dataset

    draw = torch.Generator().manual_seed(5)
    rows = items()
    for row in rows:
        noise = (-4 - torch.rand(len(row["labels"]), generator=draw)).tolist()
        row["ref_logps"] = [
            n if label != -100 else 0.0 for n, label in zip(noise, row["labels"], strict=True)
        ]
    return Dataset.from_list(rows)


def groups():
    """Eight groups of two to four candidates, one of them one-sided; ``gold`` marks the reference."""
    from datasets import Dataset

    made = []
    for number, size in enumerate([3, 2, 4, 2, 3, 4, 2, 3]):
        rows = items(size, seed=100 + number)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        rank = [0] * size if number == 1 else [int(k >= size // 2) for k in range(size)]
        made.append({**columns, "rank": rank, "gold": [int(k == 0) for k in range(size)]})
    return Dataset.from_list(made)


def plain(logps, batch, denom):
    return nll(logps, batch["mask"], denom=denom)


def weighted(logps, batch, denom):
    return iw_sft(logps, batch["ref_logps"], batch["mask"], level="token", denom=denom)


def aft(logps, batch, denom):
    scores, valid = tokens.grouped(tokens.seq_logps(logps, batch["mask"], mean=True), batch["group"])
    rank, _ = tokens.grouped(batch["rank"], batch["group"])
    reference = batch["mask"] & (batch["gold"] == 1)[:, None]
    return nll(logps, reference, per="sequence", denom=denom) + constraint_alignment(
        scores, rank, valid, denom=denom
    )


LOSSES = {
    "nll": (plain, {}, flat),
    "iw_sft": (weighted, {"columns": ("ref_logps",)}, flat),
    "aft": (aft, {"columns": ("rank", "gold"), "unit": "group"}, groups),
}


def config(folder, **changes):
    """Plain SGD in float32 without clipping, decay, dropout or logging to services."""
    from trl import SFTConfig

    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    backend = "gloo" if "RANK" in os.environ else None
    cpu = {
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "ddp_backend": backend,
        "seed": 0,
    }
    return SFTConfig(str(folder), **{**settings, **quiet, **cpu, "max_steps": 1, **changes})


def step(name, folder, *, batch, accumulation, microbatch=None, network=None, **changes):
    """Parameters after one optimizer step over ``batch * accumulation`` items per process."""
    loss, options, data = LOSSES[name]
    network = network or model()
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = sft_trainer(loss, microbatch=microbatch, **options)(
        network, config(folder, **sizes, **changes), train_dataset=data(), processing_class=tokenizer()
    )
    trainer.train()
    return {
        key: value.detach().clone()
        for key, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }


def main(out):
    results = {}
    for name in LOSSES:
        results[f"{name} 4x1"] = step(name, out, batch=4, accumulation=1)
        results[f"{name} 2x2"] = step(name, out, batch=2, accumulation=2)
    results["aft 2x2 in parts"] = step("aft", out, batch=2, accumulation=2, microbatch=2)
    if torch.distributed.get_rank() == 0:
        assert torch.distributed.get_world_size() == 2
        torch.save(results, f"{out}/results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
