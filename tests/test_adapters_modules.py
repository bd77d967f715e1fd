import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, silu

from cotkit.adapters.modules import future_heads, future_logps
from cotkit.losses.sft import multi_token, nll
from cotkit.tokens import model_logps


def tiny(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=13, **sizes, **config)).double().eval()


def encoded(left=0, right=0):
    """Two rows of lengths 7 and 5; the targets begin at position 3 and 2."""
    ids, labels, there = (torch.full((2, left + 7 + right), fill) for fill in (0, -100, 0))
    for row, (length, prompt) in enumerate([(7, 3), (5, 2)]):
        start = left if row == 0 else left + (2 if left else 0)  # left-padded rows end together
        ids[row, start : start + length] = torch.arange(1, length + 1) + 4 * row
        labels[row, start + prompt : start + length] = ids[row, start + prompt : start + length]
        there[row, start : start + length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": there}


def trained(heads, seed=3):
    """Heads that are no longer the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter + 0.3 * noise)
    return heads


def slow(model, heads, batch):
    """Cross-entropy of every head from full logits, one position at a time."""
    hidden = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    losses = []
    for i in range(len(heads) + 1):
        x = hidden if i == 0 else hidden + silu(heads[i - 1].linear(hidden))
        logits, found = x @ model.lm_head.weight.T, []
        for b, t in (batch["labels"] != -100).nonzero().tolist():
            if t - 1 - i >= 0 and batch["attention_mask"][b, t - 1 - i]:
                found.append(cross_entropy(logits[b, t - 1 - i], batch["labels"][b, t]))
        losses.append(torch.stack(found).mean() if found else torch.zeros(()))
    return losses


def test_heads_are_the_models_own_head_at_first():
    model, batch = tiny(), encoded()
    heads = future_heads(model, 3)
    assert [p.dtype for p in heads.parameters()] == [torch.float64] * 6
    assert all(p.requires_grad for p in heads.parameters())
    logps, masks = future_logps(model, heads, batch)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    for i, b, t in masks.nonzero().tolist():
        expected = logits[b, t - 1 - i, batch["labels"][b, t]]
        torch.testing.assert_close(logps[i, b, t], expected, rtol=0, atol=1e-12)
    assert not logps[~masks].any()
    assert masks.sum((1, 2)).tolist() == [7, 7, 6, 4]  # row 1 has 2 prompt tokens, row 0 has 3


@pytest.mark.parametrize("tied", [False, True])
def test_loss_equals_the_slow_one_in_value_and_gradient(tied):
    model, batch = tiny(tie_word_embeddings=tied), encoded(right=1)
    heads = trained(future_heads(model, 4))
    parts = slow(model, heads, batch)
    expected = parts[0] + 0.3 * sum(0.7**i * part for i, part in enumerate(parts[1:], 1))
    loss = multi_token(*future_logps(model, heads, batch), alpha=0.3, decay=0.7)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    trunk = model.model.layers[0].mlp.up_proj.weight
    wanted = torch.autograd.grad(expected, [trunk, *heads.parameters()])
    for a, b in zip(torch.autograd.grad(loss, [trunk, *heads.parameters()]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_alpha_zero_is_plain_fine_tuning_exactly():
    model, batch = tiny(), encoded()
    logps, masks = future_logps(model, trained(future_heads(model)), batch)
    own = model_logps(model, batch, grad=True)
    assert torch.equal(logps[0], own)
    loss, plain = multi_token(logps, masks, alpha=0.0), nll(own, batch["labels"] != -100)
    assert loss.item() == plain.item()
    weights = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(plain, weights), strict=True):
        assert torch.equal(a, b)


def test_unembedding_learns_from_the_next_token_only():
    model, batch = tiny(), encoded()
    logps, _ = future_logps(model, trained(future_heads(model, 2)), batch)
    (gradient,) = torch.autograd.grad(logps[1:].sum(), model.lm_head.weight, allow_unused=True)
    assert gradient is None or not gradient.any()
    assert model_logps(model, batch, grad=True).sum().requires_grad


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4)])
@pytest.mark.parametrize("residual", [True, False])
def test_padding_on_either_side_changes_nothing(left, right, residual):
    model = tiny()
    heads = trained(future_heads(model, 3, residual=residual))
    plain = future_logps(model, heads, encoded())
    padded = future_logps(model, heads, encoded(left, right))
    for i in range(4):
        a, b = (out[0][i][out[1][i]] for out in (plain, padded))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)  # rotary angles are float32


def test_copied_blocks_are_trainable_copies_of_the_last_one():
    model, batch = tiny(), encoded()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    heads = future_heads(model, 2, residual=False)
    last = model.model.layers[-1]
    assert all(torch.equal(a, b) for a, b in zip(heads[1].parameters(), last.parameters(), strict=True))
    assert not {id(p) for p in heads.parameters()} & {id(p) for p in model.parameters()}
    assert all(p.requires_grad for p in heads.parameters())
    logps, masks = future_logps(model, heads, batch)
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    position = torch.arange(7)[None]
    block = last(hidden, position_embeddings=model.model.rotary_emb(hidden, position), attention_mask=None)
    logits = (block if isinstance(block, torch.Tensor) else block[0]) @ model.lm_head.weight.T
    for i, b, t in masks[1:].nonzero().tolist():  # causal, so right padding does not matter
        expected = logits[b, t - 2 - i].log_softmax(-1)[batch["labels"][b, t]]
        torch.testing.assert_close(logps[i + 1, b, t], expected, rtol=0, atol=1e-12)
    multi_token(logps, masks).backward()
    assert all(p.grad is not None and p.grad.any() for p in heads[0].mlp.parameters())


def test_more_heads_than_tokens():
    model, batch = tiny(), encoded()
    logps, masks = future_logps(model, future_heads(model, 9), batch)
    assert masks.sum((1, 2)).tolist() == [7, 7, 6, 4, 2, 1, 0, 0, 0, 0]
    loss = multi_token(logps, masks)
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_reads_embeddings_and_a_batch_without_attention_mask():
    model, batch = tiny(), encoded()
    heads = trained(future_heads(model, 2))
    logps, masks = future_logps(model, heads, batch)
    embeds = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    torch.testing.assert_close(future_logps(model, heads, embeds)[0], logps, rtol=0, atol=1e-12)
    del embeds["attention_mask"], embeds["inputs_embeds"]
    bare = future_logps(model, heads, embeds)
    assert torch.equal(bare[1], masks)
    torch.testing.assert_close(bare[0], logps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("residual", [True, False])
def test_under_peft(residual):
    from peft import LoraConfig, get_peft_model

    model, batch = tiny(), encoded()
    heads = trained(future_heads(model, 2, residual=residual))
    before, masks = future_logps(model, heads, batch)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()  # B = 0: nothing changes
    logps, same = future_logps(wrapped, heads, batch)
    assert torch.equal(masks, same)
    torch.testing.assert_close(logps, before, rtol=0, atol=1e-12)
    multi_token(logps, masks).backward()
    assert any(p.grad is not None and p.grad.any() for n, p in wrapped.named_parameters() if "lora_B" in n)
    assert all(p.grad is not None and p.grad.any() for p in heads[0].parameters())


def test_hung_on_the_model_the_heads_are_trained_with_it_and_go():
    from cotkit import lab

    model, tokenizer = lab.load("tiny")
    names = set(model.state_dict())
    model.future = future_heads(model, 2)
    rows = lab.rows("word_problem", "train", n=8)
    lab.fit(
        model, tokenizer, rows, lambda out, _, denom: multi_token(*out, alpha=0.5, denom=denom), steps=2,
        batch=4, forward=lambda m, batch: future_logps(m, m.future, batch),
    )  # fmt: skip
    assert all(p.any() for head in model.future for p in head.parameters())
    del model.future
    assert set(model.state_dict()) == names


@pytest.mark.errors
def test_refusals():
    model, batch = tiny(), encoded()
    heads = future_heads(model, 2)
    with pytest.raises(ValueError, match="future_heads: expected n >= 1, got 0"):
        future_heads(model, 0)
    with pytest.raises(TypeError, match="n as an int"):
        future_heads(model, 2.0)
    with pytest.raises(ValueError, match=r"future_logps: expected labels in the batch, got \['input_ids'\]"):
        future_logps(model, heads, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="expected input_ids in the batch"):
        future_logps(model, heads, {"labels": batch["labels"]})
    capped = tiny()
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="ends in a plain linear head, got LlamaForCausalLM"):
        future_heads(capped)
    blocks, model.model.layers = model.model.layers, nn.ModuleList()
    with pytest.raises(ValueError, match="expected a list of 2 blocks"):
        future_heads(model, residual=False)
    model.model.layers = blocks
