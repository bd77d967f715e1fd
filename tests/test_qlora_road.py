"""A saved checkpoint, the whole way: 4 bit on the CPU, LoRA, SFT, samples, AFT in TRL, merge, reload."""

import pytest
import torch
import trl_worker as worker  # first: it keeps the hub's client off the network

from cotkit import lab, tokens
from cotkit.bootstrap.reject import sample_and_score
from cotkit.interop import peft as adapters
from cotkit.interop import trl as bridge
from cotkit.rewards.answer import accuracy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama and a byte-level tokenizer in a folder, as a user's own model would lie there."""
    folder = tmp_path_factory.mktemp("checkpoint")
    worker.letters().save_pretrained(folder)
    worker.letter_model().save_pretrained(folder)
    return folder


def grouped(some, generate):
    """Rows for AFT: the reference (rank 0, gold 1), then the distinct samples, rank 0 if right, else 1."""
    flat = []
    for number, group in enumerate(sample_and_score(some, generate, accuracy(), n=3)):
        row = {name: group[name] for name in ("prompt", "completion", "answer")} | {"group": number}
        flat.append(row | {"rank": 0, "gold": 1})
        samples = zip(group["completions"], group["rewards"], group["duplicate"], strict=True)
        kept = [(text, score) for text, score, again in samples if not again and text != row["completion"]]
        flat += [row | {"completion": text, "rank": int(score == 0), "gold": 0} for text, score in kept]
    return flat


def objective(model, data):
    """The AFT loss of all groups at once."""
    batch = bridge.collate(list(data), columns=("rank", "gold"))
    batch["mask"] = batch["labels"] != -100
    return float(worker.aft(tokens.model_logps(model.eval(), batch), batch, None))


def test_the_whole_road(checkpoint, tmp_path):
    model, tokenizer = lab.load(str(checkpoint), four_bit=True, lora=8)
    packed = {n: p.detach().clone() for n, p in model.named_parameters() if "4bit" in type(p).__name__}
    assert len(packed) == 14  # two layers of seven linear maps; the head stays in float

    history = lab.fit(model, tokenizer, worker.sums(), worker.plain, steps=30, lr=2e-2, batch=12)
    assert history["loss"].iloc[-1] < 0.7 * history["loss"].iloc[0]

    generate = lab.generator(model, tokenizer, max_new_tokens=12)
    some = grouped(worker.sums(6), generate)
    assert {row["rank"] for row in some} == {0, 1}
    data = bridge.dataset(some, tokenizer, columns=("rank", "gold"), unit="group", malformed="keep")
    before = objective(model, data)
    trainer = bridge.sft_trainer(worker.aft, columns=("rank", "gold"), unit="group", microbatch=4)(
        model,
        worker.config(
            tmp_path / "run",
            optim="adamw_torch",
            learning_rate=1e-2,
            max_steps=6,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    trained = trainer.model.eval()
    assert objective(trained, data) < 0.9 * before
    assert all(torch.equal(p, packed[n]) for n, p in trained.named_parameters() if n in packed)

    batch = bridge.collate(list(data), columns=())
    with_adapter = tokens.model_logps(trained, batch)
    whole = adapters.merged(trained)
    assert not any("4bit" in type(p).__name__ or "lora" in n for n, p in whole.named_parameters())
    after_merge = tokens.model_logps(whole.eval(), batch)
    # the adapter ran in bfloat16, as QLoRA has it; 4-bit rounding of the sum would move these by whole nats
    assert (after_merge - with_adapter).abs().max() < 0.25
    assert (after_merge - with_adapter).abs().mean() < 0.01

    whole.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    again, tokenizer_again = lab.load(str(tmp_path / "merged"))
    torch.testing.assert_close(tokens.model_logps(again, batch), after_merge, rtol=0, atol=0)
    prompts = [row["prompt"] for row in worker.sums(4)]
    greedy = lab.generator(again, tokenizer_again, temperature=0, max_new_tokens=12)(prompts, 1)
    assert greedy == lab.generator(whole, tokenizer, temperature=0, max_new_tokens=12)(prompts, 1)


@pytest.mark.errors
def test_merged_refuses_a_plain_model():
    with pytest.raises(ValueError, match=r"expected a peft.PeftModel, got LlamaForCausalLM"):
        adapters.merged(worker.model())
