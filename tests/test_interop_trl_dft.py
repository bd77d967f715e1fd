"""Dynamic fine-tuning (TRL's own ``loss_type="dft"``) is `nll` weighted by the detached probability."""

import pytest
import torch

from cotkit import lab, tokens
from cotkit.losses.sft import nll


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_weights_equal_trls_loss(kind, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = lab.load("tiny")
    rows = lab.rows("word_problem", "train", n=4)
    data = Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in rows])
    args = SFTConfig(
        output_dir=str(tmp_path),
        loss_type=kind,
        per_device_train_batch_size=4,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    inputs = next(iter(trainer.get_train_dataloader()))
    wanted = trainer.compute_loss(trainer.model, dict(inputs))
    labels = inputs["labels"]
    with torch.no_grad():
        logits = lab.load("tiny")[0](inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logps = tokens.token_logps(logits, labels)
    weights = logps.exp() if kind == "dft" else None
    torch.testing.assert_close(wanted, nll(logps, labels != -100, weights=weights), rtol=1e-5, atol=1e-6)
    assert (labels != -100).sum() > 40
