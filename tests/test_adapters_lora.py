"""The valve and the chain of LoRA, on peft's layers and on our own."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from cotkit.adapters.lora import merge_and_reset, valve
from cotkit.adapters.modules import delta, givens, inject

IDS = torch.tensor([[3, 5, 7, 2], [4, 1, 9, 6], [8, 8, 2, 5]])


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def llama(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = {"tie_word_embeddings": False, "initializer_range": 0.3, "use_cache": False, **sizes, **config}
    return LlamaForCausalLM(LlamaConfig(vocab_size=13, **given)).eval()


def with_lora(model=None, *, trained=True, **config):
    from peft import LoraConfig, get_peft_model

    given = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **config}
    model = get_peft_model(llama() if model is None else model, LoraConfig(**given))
    return shaken(model) if trained else model


def shaken(model, seed=1):
    """Adapter weights that are no longer at their start."""
    generator = gen(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
            if "magnitude" in name:
                p.mul_(1.3)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def base_logits(model):
    with torch.no_grad(), model.disable_adapter():
        return model(IDS).logits


# valve


def test_alpha_zero_is_the_base_and_one_the_adapter_to_the_bit():
    model = with_lora()
    trained, base = logits(model), base_logits(model)
    assert (trained - base).abs().max() > 0.1
    with valve(model, 0.0):
        assert torch.equal(logits(model), base)
    with valve(model, 1):
        assert torch.equal(logits(model), trained)
    with valve(model, torch.tensor([0.0, 1.0, 0.0])):
        mixed = logits(model)
    for row, expected in enumerate((base, trained, base)):
        assert torch.equal(mixed[row], expected[row])
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("alpha", [-0.7, 0.25, 1.5])
def test_alpha_is_the_weights_plus_alpha_times_the_change(alpha):
    model = with_lora()
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for layer in merged.modules():
            if hasattr(layer, "lora_B") and "default" in getattr(layer, "lora_B", ()):
                layer.base_layer.weight += (
                    alpha * 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                )
    with valve(model, alpha):
        ours = logits(model)
    torch.testing.assert_close(ours, base_logits(merged), rtol=1e-5, atol=1e-5)


def test_a_number_equals_pefts_rescaling():
    from peft.helpers import rescale_adapter_scale

    model = with_lora()
    with rescale_adapter_scale(model, 0.6):
        theirs = logits(model)
    with valve(model, 0.6):
        torch.testing.assert_close(logits(model), theirs, rtol=1e-6, atol=1e-6)


def test_a_tensor_equals_the_same_numbers_row_by_row():
    model = with_lora()
    alphas = [0.3, -1.2, 1.7]
    with valve(model, torch.tensor(alphas)):
        together = logits(model)
    for row, alpha in enumerate(alphas):
        with valve(model, alpha):
            torch.testing.assert_close(together[row], logits(model)[row], rtol=1e-5, atol=1e-6)


def test_gradient_scales_with_alpha():
    # B = 0: the hidden states do not depend on alpha, so dL/dB is alpha times what it is at alpha = 1
    model = with_lora(trained=False).double()
    b = [p for n, p in model.named_parameters() if "lora_B" in n]

    def gradients(alpha, rows=slice(None)):
        with valve(model, alpha):
            return torch.autograd.grad(model(IDS[rows]).logits.square().sum(), b)

    each = [gradients(1.0, slice(row, row + 1)) for row in range(3)]
    weighted = gradients(torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64))
    for i, got in enumerate(weighted):
        assert each[0][i].abs().max() > 1e-3
        torch.testing.assert_close(got, 0.5 * each[0][i] - 2.0 * each[2][i], rtol=1e-9, atol=1e-12)


def test_a_row_at_zero_teaches_nothing():
    model = with_lora()
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    with valve(model, torch.tensor([0.0, 0.8, 0.8])):
        some = torch.autograd.grad(model(IDS).logits[0].square().sum(), lora)
    assert not any(g.any() for g in some)


def test_no_gradient_reaches_alpha_and_it_may_change_afterwards():
    model, alpha = with_lora(), torch.tensor([0.5, 0.5, 0.5], requires_grad=True)
    with valve(model, alpha):
        first = logits(model)
        model(IDS).logits.sum().backward()
        with torch.no_grad():
            alpha.mul_(3)
        assert torch.equal(logits(model), first)
    assert alpha.grad is None


def test_blocks_multiply_and_everything_is_restored_after_an_exception():
    model = with_lora()
    before = logits(model)
    with valve(model, 0.3):
        expected = logits(model)
    with valve(model, 0.6), valve(model, 0.5):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="boom"), valve(model, 0.3):
        raise RuntimeError("boom")
    assert torch.equal(logits(model), before)
    assert not any(m._forward_hooks for m in model.modules())


def test_saved_and_loaded(tmp_path):
    from peft import PeftModel

    model = with_lora()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    for alpha in (0.0, 0.4, torch.tensor([1.0, 0.2, -0.5])):
        with valve(model, alpha), valve(again, alpha):
            assert torch.equal(logits(again), logits(model))


def test_generation_runs_at_the_same_strength():
    model = with_lora()
    model.generation_config.eos_token_id = None
    with valve(model, 0.0):
        closed = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with model.disable_adapter():
        base = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    opened = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(closed, base)
    assert not torch.equal(opened, base)


def test_half_precision_keeps_alpha_precise():
    model = with_lora().bfloat16()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 3, 24, generator=gen(4)).bfloat16()
    branch = layer.lora_B["default"](layer.lora_A["default"](x))
    with torch.no_grad(), valve(model, 0.3):
        scaled = layer.lora_B["default"](layer.lora_A["default"](x))
    assert torch.equal(scaled, (branch.float() * 0.3).bfloat16())


@pytest.mark.parametrize("config", [{"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_dora_and_embeddings_are_interpolated(config):
    model = with_lora(**config)
    trained, base = logits(model), base_logits(model)
    with valve(model, 0.0):
        assert torch.equal(logits(model), base)
    with valve(model, 1.0):
        assert torch.equal(logits(model), trained)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and "q_proj" not in str(type(m)))
    x = IDS if "Embedding" in type(layer).__name__ else torch.randn(3, 4, 16, generator=gen(5))
    with torch.no_grad():
        plain, full = layer.base_layer(x), layer(x)
        with valve(model, torch.tensor([0.25, 1.5, -1.0])):
            got = layer(x)
    factor = torch.tensor([0.25, 1.5, -1.0])[:, None, None]
    torch.testing.assert_close(got, plain + factor * (full - plain), rtol=1e-5, atol=1e-6)


def test_our_own_modules_too():
    model = llama()
    base = logits(model)
    inject(model, r"q_proj$", lambda m: delta(m, 2, generator=gen(1)))
    inject(model, r"mlp$", lambda m: delta(m, 2, d_in=16, act=torch.relu, scale=4.0, generator=gen(2)))
    inject(model, r"o_proj$", givens)
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(0.2 * torch.randn(p.shape, generator=gen(i)))
    trained = logits(model)
    with valve(model, 0.0):
        assert torch.equal(logits(model), base)
    with valve(model, torch.tensor([1.0, 0.0, 1.0])):
        mixed = logits(model)
    assert torch.equal(mixed[1], base[1])
    torch.testing.assert_close(mixed[0], trained[0], rtol=1e-6, atol=1e-6)


def test_backward_outside_of_the_block_is_noticed_under_checkpointing():
    model = with_lora().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    b = [p for n, p in model.named_parameters() if "lora_B" in n]
    plain = with_lora().train()
    with valve(plain, 0.5):
        expected = torch.autograd.grad(
            plain(IDS).logits.square().sum(), [p for n, p in plain.named_parameters() if "lora_B" in n]
        )
    with valve(model, 0.5):
        inside = torch.autograd.grad(model(IDS).logits.square().sum(), b)
        loss = model(IDS).logits.square().sum()
    for a, e in zip(inside, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError):
        loss.backward()


def four_bit(tmp_path):
    from cotkit import lab

    model = llama(hidden_size=64, intermediate_size=64)
    model.save_pretrained(tmp_path)
    return lab._model._pretrained(str(tmp_path), True, torch.float32)


def test_on_a_4_bit_base(tmp_path):
    model = with_lora(four_bit(tmp_path))
    assert any("4bit" in type(p).__name__ for p in model.parameters())
    trained, base = logits(model), base_logits(model)
    assert (trained - base).abs().max() > 0.1
    with valve(model, 0.0):
        assert torch.equal(logits(model), base)
    with valve(model, torch.tensor([1.0, 0.0, 0.5])):
        mixed = logits(model)
    assert torch.equal(mixed[1], base[1])
    torch.testing.assert_close(mixed[0], trained[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"full precision, got Linear4bit at .*merge with interop.peft.merged"
    ):
        merge_and_reset(model)


@pytest.mark.errors
def test_valve_refusals():
    model = with_lora()
    with pytest.raises(ValueError, match=r"expected a model with LoRA, got none"), valve(llama(), 0.5):
        pass
    for alpha in (math.nan, math.inf, torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match=r"valve: expected alpha finite"), valve(model, alpha):
            pass
    with pytest.raises(TypeError, match=r"expected alpha as a number"), valve(model, "0.5"):
        pass
    with pytest.raises(TypeError, match=r"expected alpha as a float tensor"), valve(model, torch.tensor([1])):
        pass
    with pytest.raises(ValueError, match=r"one per row \[B\], got \[1, 2\]"), valve(model, torch.ones(1, 2)):
        pass
    with (
        valve(model, torch.ones(2)),
        pytest.raises(ValueError, match=r"each of 3 rows, got 2.*repeat_interleave"),
    ):
        logits(model)
    whole = with_lora(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head trained whole"), valve(whole, 0.5):
        pass
    with pytest.raises(ValueError, match=r"got bias='all'"), valve(with_lora(bias="all"), 0.5):
        pass
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj merged. Unmerge it first"), valve(model, 0.5):
        pass


# merge_and_reset


def test_a_knot_changes_no_output_and_starts_anew():
    model = with_lora()
    before, a = logits(model), {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}
    names = merge_and_reset(model, generator=gen(7))
    assert len(names) == 4
    assert all(n.endswith(("q_proj", "down_proj")) for n in names)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(base_logits(model), before, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            assert not p.any()
        if "lora_A" in name:
            assert not torch.equal(p, a[name])
            assert p.abs().max() <= 1 / math.sqrt(p.shape[1])
            assert p.abs().max() > 0.7 / math.sqrt(p.shape[1])
    again = with_lora()
    merge_and_reset(again, generator=gen(7))
    assert torch.equal(logits(again), logits(model))


def test_only_what_was_trained_since_is_forgotten_by_the_optimizer():
    model = with_lora()
    other = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([*(p for p in model.parameters() if p.requires_grad), other], lr=0.01)
    (model(IDS).logits.square().sum() + other.sum()).backward()
    optimizer.step()
    assert len(optimizer.state) == 9
    merge_and_reset(model, optimizer)
    assert list(optimizer.state) == [other]
    optimizer.step()
    assert all(int(s["step"]) == (2 if p is other else 1) for p, s in optimizer.state.items())


def fitted(links, steps):
    """Error of a rank-4 target after `links` LoRAs of rank 1, with the same number of steps in all."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    target = torch.randn(8, 4, generator=gen(1)) @ torch.randn(4, 6, generator=gen(2))
    net = nn.Sequential(nn.Linear(6, 8, bias=False))
    model = get_peft_model(net, LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    start = net[0].base_layer.weight.clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(links):
        for _ in range(steps):
            layer = net[0]
            whole = layer.base_layer.weight - start + layer.get_delta_weight("default")
            loss = (whole - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        merge_and_reset(model, optimizer, generator=gen(3))
    change = net[0].base_layer.weight - start
    return (change - target).square().sum().item(), torch.linalg.matrix_rank(change, rtol=1e-4).item(), target


def test_four_links_of_rank_one_reach_what_one_cannot():
    one, rank_one, target = fitted(1, 400)
    four, rank_four, _ = fitted(4, 100)
    tail = torch.linalg.svdvals(target)[1:].square().sum().item()  # what rank 1 must leave (Eckart, Young)
    assert rank_one == 1
    assert one == pytest.approx(tail, rel=1e-2)
    assert rank_four == 4
    assert four < 0.02 * tail


def test_embeddings_are_merged_too():
    model = with_lora(target_modules=["embed_tokens"])
    before = logits(model)
    assert merge_and_reset(model) == ["base_model.model.model.embed_tokens"]
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.errors
def test_merge_and_reset_refusals_change_nothing():
    with pytest.raises(ValueError, match=r"merge_and_reset: expected a model with LoRA, got none"):
        merge_and_reset(llama())
    tied = with_lora(llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    before = logits(tied)
    with pytest.raises(
        ValueError, match=r"lm_head to have a weight of its own, got one tied to .*embed_tokens"
    ):
        merge_and_reset(tied)
    assert torch.equal(logits(tied), before)
    with pytest.raises(ValueError, match=r"expected plain LoRA, got a variant"):
        merge_and_reset(with_lora(use_dora=True))
    broken = with_lora()
    weights = {n: p.clone() for n, p in broken.named_parameters() if "base_layer" in n}
    with torch.no_grad():
        broken.base_model.model.model.layers[1].mlp.down_proj.lora_B["default"].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in the LoRA of .*layers.1.mlp.down_proj"):
        merge_and_reset(broken)
    assert all(torch.equal(p, weights[n]) for n, p in broken.named_parameters() if n in weights)
    broken.merge_adapter()
    with pytest.raises(ValueError, match=r"merged already"):
        merge_and_reset(broken)
