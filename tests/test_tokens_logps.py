import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from cotkit.tokens import (
    _linear,
    entropy,
    grouped,
    kl,
    kl_k2,
    kl_k3,
    linear_logps,
    model_logps,
    seq_logps,
    token_logps,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


LOGITS = f64([[0.3, -1.1, 0.7], [2.0, 0.5, -0.4], [9.0, -9.0, 4.0]])[0:1].reshape(1, 3, 3)
LABELS = torch.tensor([[1, 2, 0]])


def test_token_logps_by_hand():
    found = token_logps(LOGITS, LABELS)
    first = 0.7 - math.log(math.exp(0.3) + math.exp(-1.1) + math.exp(0.7))  # label 2 read from position 0
    second = 2.0 - math.log(math.exp(2.0) + math.exp(0.5) + math.exp(-0.4))  # label 0 read from position 1
    assert found[0].tolist() == pytest.approx([0.0, first, second], abs=1e-12)
    assert found.sum().item() == pytest.approx(
        -cross_entropy(LOGITS[0, :-1], LABELS[0, 1:], reduction="sum").item()
    )
    cold = token_logps(LOGITS, LABELS, temperature=0.5)
    assert cold[0, 1].item() == pytest.approx(1.4 - math.log(math.exp(0.6) + math.exp(-2.2) + math.exp(1.4)))
    straight = token_logps(LOGITS, LABELS, shift=False)
    assert straight[0, 0].item() == pytest.approx(
        -1.1 - math.log(math.exp(0.3) + math.exp(-1.1) + math.exp(0.7))
    )
    assert straight.shape == (1, 3)


def case(dtype=torch.float64, bias=False, frozen=False):
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 6, 4, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(23, 4, generator=g, dtype=torch.float64).to(dtype).requires_grad_(not frozen)
    b = (
        torch.randn(23, generator=g, dtype=torch.float64).to(dtype).requires_grad_(not frozen)
        if bias
        else None
    )
    labels = torch.randint(0, 23, (3, 6), generator=g)
    labels[0, :3] = labels[1, 4] = labels[2] = -100
    upstream = torch.randn(3, 6, generator=g, dtype=torch.float64)
    return hidden, weight, b, labels, upstream


def gradients(fn, hidden, weight, bias, labels, upstream, **kwargs):
    logps = fn(hidden, weight, bias, labels, **kwargs)
    wanted = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    return logps, torch.autograd.grad((logps * upstream).sum(), wanted)


def fused(hidden, weight, bias, labels, **kwargs):
    return linear_logps(hidden, weight, labels, bias=bias, **kwargs)


def full(hidden, weight, bias, labels, **kwargs):
    wide = torch.float32 if hidden.dtype == torch.bfloat16 else hidden.dtype
    logits = hidden.to(wide) @ weight.to(wide).t()
    return token_logps(logits if bias is None else logits + bias.to(wide), labels, **kwargs)


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize(("bias", "frozen"), itertools.product([False, True], repeat=2))
def test_linear_logps_agrees_with_full_logits(
    monkeypatch, bias, frozen, dtype, tolerance, temperature, tiled
):
    if tiled:  # rows and vocabulary both in several tiles, the last ones short
        monkeypatch.setattr(_linear, "SMALL", 0)
        monkeypatch.setattr(_linear, "tile_shape", lambda _: (5, 7))
    inputs = case(dtype, bias, frozen)
    ours, grads = gradients(fused, *inputs, temperature=temperature)
    wide = [
        x.detach().double().requires_grad_(x.requires_grad) if x is not None else None for x in inputs[:3]
    ]
    want, want_grads = gradients(full, *wide, *inputs[3:], temperature=temperature)
    torch.testing.assert_close(ours.double(), want, rtol=tolerance, atol=tolerance)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    labels = inputs[3]
    assert bool((ours[labels == -100] == 0).all())
    assert bool((ours[:, 0] == 0).all())
    unread = torch.ones(3, 6, dtype=torch.bool)
    unread[:, :-1] = labels[:, 1:] == -100  # the position before an ignored label, and the last one
    assert bool((grads[0][unread] == 0).all())
    assert bool((grads[0][~unread] != 0).any(-1).all())
    assert all(g.dtype == dtype for g in grads)


def test_large_logits_stay_finite(monkeypatch):
    monkeypatch.setattr(_linear, "SMALL", 0)
    monkeypatch.setattr(_linear, "tile_shape", lambda _: (2, 3))
    hidden, weight, _, labels, upstream = case()
    for frozen in (False, True):  # the maximum of a row moves from tile to tile
        w = (weight.detach() * 1e3 * torch.arange(23)[:, None]).requires_grad_(not frozen)
        ours, grads = gradients(fused, hidden, w, None, labels, upstream)
        want, want_grads = gradients(full, hidden, w, None, labels, upstream)
        torch.testing.assert_close(ours, want)
        torch.testing.assert_close(grads, want_grads)


def test_no_target_at_all_gives_zero_and_zero_gradient(monkeypatch):
    for small in (0, 1 << 22):
        monkeypatch.setattr(_linear, "SMALL", small - 1)
        hidden, weight, _, labels, _ = case()
        for fn in (fused, full):
            logps = fn(hidden, weight, None, torch.full_like(labels, -100))
            grads = torch.autograd.grad(logps.sum(), [hidden, weight])
            assert not logps.any()
            assert not any(g.any() for g in grads)


def test_gradient_is_not_computed_where_it_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(_linear, "SMALL", 0)
    hidden, weight, _, labels, _ = case()
    logps = linear_logps(hidden.detach(), weight, labels)
    (grad,) = torch.autograd.grad(logps.sum(), [weight])
    want = torch.autograd.grad(full(hidden.detach(), weight, None, labels).sum(), [weight])[0]
    torch.testing.assert_close(grad, want)
    assert not linear_logps(hidden.detach(), weight.detach(), labels).requires_grad


def test_padding_changes_nothing():
    hidden, weight, _, labels, _ = case()
    base = linear_logps(hidden, weight, labels)
    more = torch.cat([hidden, hidden[:, :2]], 1), torch.cat([labels, torch.full((3, 2), -100)], 1)
    torch.testing.assert_close(linear_logps(more[0], weight, more[1])[:, :6], base)
    left = torch.cat([hidden[:, :2], hidden], 1), torch.cat([torch.full((3, 2), -100), labels], 1)
    wanted = labels.clone()
    wanted[:, 0] = -100  # with padding in front, label 0 would be read from it
    left[1][:, 2] = -100
    torch.testing.assert_close(
        linear_logps(left[0], weight, left[1])[:, 2:], linear_logps(hidden, weight, wanted)
    )


def test_autocast_rounds_the_factors_only(monkeypatch):
    hidden, weight, _, labels, upstream = case(torch.float32)
    for small in (0, 1 << 22):
        monkeypatch.setattr(_linear, "SMALL", small)
        with torch.autocast("cpu", torch.bfloat16):
            ours, grads = gradients(fused, hidden, weight, None, labels, upstream.float())
        want, want_grads = gradients(full, hidden, weight, None, labels, upstream.float())
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grads, want_grads, rtol=2e-2, atol=5e-2)
        assert not torch.equal(ours, want)


def tiny(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **size, **config)).eval()


def scored(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (2, 7), generator=g)
    labels = ids.clone()
    labels[:, :2] = labels[1, 5:] = -100
    attention = torch.ones_like(ids)
    attention[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": attention, "labels": labels, "segments": ids}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits
    return batch, token_logps(logits[:, -7:], labels)


def no_logits(monkeypatch):
    monkeypatch.setattr("cotkit.tokens._logps.token_logps", lambda *_: pytest.fail("built the logits"))


@pytest.mark.parametrize("tied", [False, True])
def test_model_logps_without_logits(monkeypatch, tied):
    model = tiny(tie_word_embeddings=tied)
    batch, want = scored(model)
    no_logits(monkeypatch)
    found = model_logps(model, batch)
    torch.testing.assert_close(found, want)
    assert not found.requires_grad
    model_logps(model, batch, grad=True).sum().backward()
    assert model.get_input_embeddings().weight.grad is not None
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("cap", [False, True])
def test_model_logps_reads_embeddings_in_place_of_ids(monkeypatch, cap):
    model = tiny()
    if cap:  # no plain head: the road over the logits
        monkeypatch.setattr("cotkit.tokens._logps.plain_head", lambda _: None)
    batch, _ = scored(model)
    want = model_logps(model, batch)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    other = batch | {"inputs_embeds": embeds, "input_ids": batch["input_ids"] * 0}  # ids there, and not read
    assert torch.equal(model_logps(model, other), want)
    assert not model_logps(model, other).requires_grad
    del other["input_ids"]
    found = model_logps(model, other, grad=True)
    assert torch.equal(found.detach(), want)
    (found[0, 4] + found[1, 3]).backward()
    reached = (embeds.grad != 0).any(-1)  # what stands before a scored token, in its own row
    assert reached.tolist() == [[True] * 4 + [False] * 3, [True] * 3 + [False] * 4]


def test_model_logps_sees_a_soft_cap_and_whatever_else_follows_the_head():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=40, num_key_value_heads=1, final_logit_softcapping=0.05, **size)
    model = Gemma2ForCausalLM(config).eval()
    batch, want = scored(model)
    torch.testing.assert_close(model_logps(model, batch), want)
    strange = tiny()
    plain = strange.forward

    def doubled(*args, logits_to_keep=0, **kwargs):
        out = plain(*args, logits_to_keep=logits_to_keep, **kwargs)
        out.logits = out.logits * 2
        return out

    strange.forward = doubled
    batch, want = scored(strange)
    torch.testing.assert_close(model_logps(strange, batch), want)


def test_model_logps_under_peft(monkeypatch):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    virtual = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    batch, want = scored(virtual)
    torch.testing.assert_close(model_logps(virtual, batch), want)
    headed = get_peft_model(tiny(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).eval()
    batch, want = scored(headed)
    torch.testing.assert_close(model_logps(headed, batch), want)
    lora = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    batch, want = scored(lora)
    no_logits(monkeypatch)
    torch.testing.assert_close(model_logps(lora, batch), want)


def test_seq_logps():
    logps = f64([0.0, -1.0, -2.5, -4.0], [0.0, -0.25, -9.0, -9.0]).requires_grad_()
    counted = torch.tensor([[False, True, True, True], [False, True, False, False]])
    assert seq_logps(logps, counted).tolist() == [-7.5, -0.25]
    assert seq_logps(logps, counted, mean=True).tolist() == [-2.5, -0.25]
    weights = f64([5.0, 2.0, 1.0, 0.5], [5.0, 3.0, 7.0, 7.0]).requires_grad_()
    found = seq_logps(logps, counted, weights=weights)
    assert found.tolist() == [-6.5, -0.75]  # 2*1 + 2.5 + 0.5*4; 3*0.25
    assert seq_logps(logps, counted, weights=weights, mean=True).tolist() == pytest.approx([-6.5 / 3, -0.75])
    found.sum().backward()
    assert logps.grad.tolist() == [[0, 2, 1, 0.5], [0, 3, 0, 0]]
    assert weights.grad is None
    empty = seq_logps(logps, torch.zeros_like(counted), mean=True)
    assert empty.tolist() == [0, 0]


def test_grouped():
    values = f64(1.0, 2.0, 3.0, 4.0, 5.0).requires_grad_()
    padded, valid = grouped(values, torch.tensor([7, 2, 7, 2, 7]))
    assert padded.tolist() == [[1, 3, 5], [2, 4, 0]]
    assert valid.tolist() == [[True, True, True], [True, True, False]]
    (padded * f64([1, 2, 3], [4, 5, 6])).sum().backward()
    assert values.grad.tolist() == [1, 4, 2, 5, 3]
    ranks, _ = grouped(torch.tensor([1, 0]), torch.tensor([-3, -3]))
    assert ranks.tolist() == [[1, 0]]
    assert grouped(f64(), torch.tensor([], dtype=torch.long))[0].shape == (0, 0)


def test_entropy_and_kl_by_hand():
    p, q = f64(0.5, 0.3, 0.2), f64(0.1, 0.6, 0.3)
    z, y = (p.log() + 4.0).view(1, 1, 3), (q.log() - 1.0).view(1, 1, 3)
    want = 0.5 * math.log(0.5 / 0.1) + 0.3 * math.log(0.3 / 0.6) + 0.2 * math.log(0.2 / 0.3)
    assert kl(z, y).item() == pytest.approx(want, abs=1e-12)
    assert entropy(z).item() == pytest.approx(-sum(x * math.log(x) for x in (0.5, 0.3, 0.2)), abs=1e-12)
    square = [x * x / (0.25 + 0.09 + 0.04) for x in (0.5, 0.3, 0.2)]  # temperature 1/2 squares the odds
    assert entropy(z, temperature=0.5).item() == pytest.approx(
        -sum(x * math.log(x) for x in square), abs=1e-12
    )
    other = [x * x / 0.46 for x in (0.1, 0.6, 0.3)]
    want = sum(a * math.log(a / b) for a, b in zip(square, other, strict=True))
    assert kl(z, y, temperature=0.5).item() == pytest.approx(want, abs=1e-12)
    holes = f64([[[0.0, 0.0, -math.inf]]])[0].requires_grad_()
    assert entropy(holes).item() == pytest.approx(math.log(2))
    assert kl(holes, y).item() == pytest.approx(
        0.5 * math.log(5) * 0 + 0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.6)
    )
    assert entropy(torch.zeros(1, 1, 8, dtype=torch.bfloat16)).item() == pytest.approx(math.log(8))


def test_kl_estimators_over_three_tokens():
    z = f64(0.2, -0.7, 1.1).requires_grad_()
    ref = f64(0.6, 0.1, -0.9)
    exact = kl(z.view(1, 1, 3), ref.view(1, 1, 3)).sum()
    (exact_grad,) = torch.autograd.grad(exact, z)
    logp, logq = z.log_softmax(0)[None], ref.log_softmax(0)[None].requires_grad_()
    p = logp.detach().exp()
    k3 = (p * kl_k3(logp, logq)).sum()
    assert k3.item() == pytest.approx(exact.item(), abs=1e-12)  # unbiased as a value
    assert bool((kl_k3(logp, logq) >= 0).all())
    k2 = (p * kl_k2(logp, logq)).sum()
    assert k2.item() == pytest.approx((p * (logp - logq) ** 2 / 2).sum().item(), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(k2, z, retain_graph=True)[0], exact_grad)  # as a gradient
    assert not torch.allclose(torch.autograd.grad(k3, z, retain_graph=True)[0], exact_grad)
    assert torch.autograd.grad(
        kl_k3(logp, logq).sum() + kl_k2(logp, logq).sum(), logq, allow_unused=True
    ) == (None,)
    assert kl_k3(f64([-2.0]), f64([-1.0])).item() == pytest.approx(math.e - 2, abs=1e-12)
    assert kl_k3(f64([-1.0]), f64([-2.0])).item() == pytest.approx(math.exp(-1), abs=1e-12)


@pytest.mark.errors
def test_refusals():
    logits, labels = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)
    for x, y, match in [
        (logits, labels[:, 1:], "already shifted"),
        (logits[:, 1:], labels, "cut off"),
        (logits, labels[:, 3:], "longer by 3"),
        (logits[0], labels, r"\[B, T, ...\]"),
        (logits, labels + 3, r"labels in \[0, 3\) or -100, got 3"),
        (logits, labels - 1, "got -1"),
    ]:
        with pytest.raises(ValueError, match=match):
            token_logps(x, y)
        with pytest.raises(ValueError, match=match):
            linear_logps(x, torch.zeros(3, 3), y)
    for bad in (0, -1, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            token_logps(logits, labels, temperature=bad)
        with pytest.raises(ValueError, match="temperature"):
            entropy(logits, temperature=bad)
    with pytest.raises(TypeError, match="integer"):
        token_logps(logits, labels.float())
    with pytest.raises(TypeError, match="float"):
        token_logps(logits.long(), labels)
    with pytest.raises(ValueError, match="one D and one V"):
        linear_logps(logits, torch.zeros(3, 4), labels)
    with pytest.raises(ValueError, match="one D and one V"):
        linear_logps(logits, torch.zeros(3, 3), labels, bias=torch.zeros(4))
    with pytest.raises(ValueError, match="expected labels in the batch"):
        model_logps(None, {"input_ids": labels})
    with pytest.raises(ValueError, match="expected input_ids in the batch"):
        model_logps(None, {"labels": labels})
    for embeds in (logits[:, 1:], logits[0], logits[:1]):
        with pytest.raises(ValueError, match=r"inputs_embeds \[B, T, D\]"):
            model_logps(None, {"inputs_embeds": embeds, "labels": labels})
    with pytest.raises(TypeError, match="inputs_embeds as a float"):
        model_logps(None, {"inputs_embeds": logits.long(), "labels": labels})
    with pytest.raises(ValueError, match="equal shapes"):
        kl(logits, logits[:1])
    with pytest.raises(ValueError, match="equal shapes"):
        kl_k3(logits[0], logits[0, :1])
    with pytest.raises(ValueError, match=r"token_logps\(logits, labels\)"):
        seq_logps(logits, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="equal shapes"):
        grouped(torch.zeros(3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="integer"):
        grouped(torch.zeros(3), torch.zeros(3))
