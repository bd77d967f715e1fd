"""A saved Hugging Face checkpoint, the whole way: 4 bit on the CPU, LoRA, SFT, samples, AFT in TRL, merge, reload."""

import pytest
import torch
import trl_worker as worker  # first: it keeps the hub's client off the network

from cotkit import lab, tokens
from cotkit.interop import peft as adapters, trl as bridge
from cotkit.rewards.answer import accuracy

SPECIALS = ["<pad>", "<eos>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama and a byte-level tokenizer in a folder, as a user's own model would lie there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    folder = tmp_path_factory.mktemp("checkpoint")
    network = worker.model(vocab_size=len(letters), hidden_size=64, initializer_range=0.1, eos_token_id=1)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count=12):
    made = []
    for i in range(count):
        a, b = i % 4 + 1, i // 4 + 1
        text = tokens.FORMATS["think"].render([f"{a}+{b}={a + b}"], str(a + b))
        made.append({"prompt": f"{a}+{b}?\n", "completion": text, "answer": str(a + b)})
    return made


def grouped(some, generate, reward):
    """Rows for AFT: the reference (rank 0, gold 1), then the distinct samples with rank 0 if right, else 1."""
    flat = []
    written = generate([row["prompt"] for row in some], 3)
    for number, (row, texts) in enumerate(zip(some, written, strict=True)):
        flat.append({**row, "group": number, "rank": 0, "gold": 1})
        kept = sorted(set(texts) - {row["completion"]})
        scores = reward(
            prompts=[row["prompt"]] * len(kept), completions=kept, answer=[row["answer"]] * len(kept)
        )
        for text, score in zip(kept, scores, strict=True):
            flat.append({**row, "completion": text, "group": number, "rank": int(score == 0), "gold": 0})
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

    history = lab.fit(model, tokenizer, rows(), worker.plain, steps=30, lr=2e-2, batch=12)
    assert history["loss"].iloc[-1] < 0.7 * history["loss"].iloc[0]

    generate = lab.generator(model, tokenizer, max_new_tokens=12)
    some = grouped(rows(6), generate, accuracy())
    assert {row["rank"] for row in some} == {0, 1}
    data = bridge.dataset(some, tokenizer, columns=("rank", "gold"), unit="group", malformed="keep")
    before = objective(model, data)
    trainer = bridge.sft_trainer(worker.aft, columns=("rank", "gold"), unit="group", microbatch=4)(
        model,
        worker.config(
            tmp_path / "run",
            optim="adamw_torch",
            learning_rate=5e-3,
            max_steps=6,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    trained = trainer.model.eval()
    assert objective(trained, data) < 0.7 * before
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
    prompts = [row["prompt"] for row in rows(4)]
    greedy = lab.generator(again, tokenizer_again, temperature=0, max_new_tokens=12)(prompts, 1)
    assert greedy == lab.generator(whole, tokenizer, temperature=0, max_new_tokens=12)(prompts, 1)


@pytest.mark.errors
def test_merged_refuses_a_plain_model():
    with pytest.raises(ValueError, match=r"expected a peft.PeftModel, got LlamaForCausalLM"):
        adapters.merged(worker.model())
