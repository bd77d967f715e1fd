"""DPO, SimPO and ORPO's odds-ratio term equal TRL's on the same model, rows and tensors."""

import os

import pytest
import torch

from cotkit import lab, tokens
from cotkit.losses.preference import dpo, orpo, simpo

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl")

ROWS = {
    "prompt": [
        "Ann has 3 apples and buys 4. How many?\n",
        "2+2?\n",
        "Ben has 9 pens and loses 5. How many?\n",
    ],
    "chosen": ["3+4=7\n7", "4", "9-5=4\nBen has 4"],
    "rejected": ["3+4=8 and that is all of them\n8", "it is 5", "9+5=14"],
}
OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
OPTIONS |= {"per_device_train_batch_size": 3, "gradient_checkpointing": False, "max_length": 128}


def data():
    from datasets import Dataset

    return Dataset.from_dict(ROWS)


def logps(model, batch, *, grad=False):
    """Log-probs of TRL's batch: its ids, cut to the completion by its mask."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    return tokens.seq_logps(tokens.model_logps(model, inputs, grad=grad), labels != -100)


@pytest.mark.filterwarnings("ignore")
def test_dpo_equals_trl_sigmoid(tmp_path):
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = lab.load("tiny", seed=0)
    reference, _ = lab.load("tiny", seed=1)
    config = DPOConfig(str(tmp_path), beta=0.3, loss_type="sigmoid", **OPTIONS)
    trainer = DPOTrainer(model, reference, config, train_dataset=data(), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    theirs = trainer.compute_loss(model, batch)
    theirs.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    chosen, rejected = logps(model, batch, grad=True).chunk(2)
    ref_chosen, ref_rejected = logps(reference, batch).chunk(2)
    ours = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    ours.backward()
    assert abs(ours.item() - 0.693) > 0.05  # the two checkpoints disagree
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-6)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(4)
    return (-3 * torch.rand(2, 7, generator=generator, dtype=torch.float64)).requires_grad_()


def same(ours, theirs, pairs):
    torch.testing.assert_close(ours, theirs.mean().to(ours.dtype), rtol=1e-6, atol=1e-6)
    mine, yours = (torch.autograd.grad(x, pairs)[0] for x in (ours, theirs.mean()))
    torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_equals_trl(tmp_path, pairs, smoothing):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model, tokenizer = lab.load("tiny")
    config = CPOConfig(
        str(tmp_path), loss_type="simpo", beta=2.5, simpo_gamma=0.75, label_smoothing=smoothing, **OPTIONS
    )
    trainer = CPOTrainer(model, config, train_dataset=data(), processing_class=tokenizer)
    theirs, *_ = trainer.cpo_loss(pairs[0], pairs[1])
    same(simpo(pairs[0], pairs[1], beta=2.5, offset=0.75, label_smoothing=smoothing), theirs, pairs)


@pytest.mark.filterwarnings("ignore")
def test_orpo_equals_trl_odds_ratio_term(tmp_path, pairs):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, tokenizer = lab.load("tiny")
    trainer = ORPOTrainer(
        model,
        ORPOConfig(str(tmp_path), beta=0.3, **OPTIONS),
        train_dataset=data(),
        processing_class=tokenizer,
    )
    theirs, *_ = trainer.odds_ratio_loss(pairs[0], pairs[1])  # to be maximised; its likelihood term apart
    same(orpo(pairs[0], pairs[1], beta=0.3) + pairs[0].mean(), -theirs.double(), pairs)
