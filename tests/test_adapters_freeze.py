"""Layers from the embeddings to the head; which of them are trained; half of everything."""

import random
import warnings

import pytest
import torch
from torch import nn

from cotkit.adapters.freeze import half, layer_groups, only

IDS = torch.tensor([[3, 5, 7, 2], [4, 1, 9, 6]])


def llama(layers=4, *, tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=13, tie_word_embeddings=tied, use_cache=False, **sizes))


def trained(model):
    return [n for n, p in model.named_parameters() if p.requires_grad]


# layer_groups


def test_every_parameter_once_from_the_bottom_to_the_top():
    model = llama()
    groups = layer_groups(model)
    assert len(groups) == 6
    assert list(groups[0]) == ["model.embed_tokens.weight"]
    assert list(groups[-1]) == ["model.norm.weight", "lm_head.weight"]
    assert all(n.startswith("model.layers.2.") for n in groups[3])
    assert [n for g in groups for n in g] == [n for n, _ in model.named_parameters()]
    assert all(p is model.get_parameter(n) for g in groups for n, p in g.items())


def test_a_tied_head_is_said_to_be_in_the_first_group():
    model = llama(tied=True)
    with pytest.warns(UserWarning, match=r"lm_head.weight is tied to model.embed_tokens.weight.*its group 0"):
        groups = layer_groups(model)
    assert list(groups[0]) == ["model.embed_tokens.weight"]
    assert list(groups[-1]) == ["model.norm.weight"]


def test_other_families():
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        OPTConfig,
        OPTForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=8, n_layer=3, n_head=2, n_positions=16))
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=13, hidden_size=8, ffn_dim=12, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=16, word_embed_proj_dim=8,
        )
    )  # fmt: skip
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=13, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_decoder_layers=2, num_heads=2)
    )
    with warnings.catch_warnings(action="ignore"):
        for model, blocks in ((gpt2, 3), (opt, 3), (t5, 4)):
            groups = layer_groups(model)
            assert len(groups) == blocks + 2
            assert all(groups[1:-1])
            assert sum(len(g) for g in groups) == len(list(model.parameters()))
        assert [n.split(".")[-2] for n in layer_groups(gpt2)[0]] == ["wte", "wpe"]
        assert list(layer_groups(opt)[-1]) == [
            "model.decoder.final_layer_norm.weight",
            "model.decoder.final_layer_norm.bias",
        ]
        assert next(iter(layer_groups(t5)[3])).startswith("decoder.block.0.")


def test_wrapped_by_peft_and_models_of_ones_own():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    groups = layer_groups(model)
    assert len(groups) == 6
    assert sum("lora_A" in n for n in groups[2]) == 1
    own = nn.ModuleDict(
        {
            "embedding": nn.Embedding(3, 2),
            "blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(2)),
            "out": nn.Linear(2, 3),
        }
    )
    assert [len(g) for g in layer_groups(own)] == [1, 2, 2, 2]


@pytest.mark.errors
def test_no_blocks():
    for function in (layer_groups, lambda m: half(m, rng=random.Random(0))):
        with pytest.raises(ValueError, match=r"expected a model with a list of blocks, got Linear"):
            function(nn.Linear(2, 2))


# only


def test_telly_freezes_embeddings_and_the_bottom():
    model = llama()
    groups = layer_groups(model)
    counts = []
    for k in range(5):
        names = only(model, groups[k + 1 :])
        assert names == trained(model)
        assert not any("embed" in n or any(f"layers.{i}." in n for i in range(k)) for n in names)
        counts.append(len(names))
    assert counts == [38, 29, 20, 11, 2]


def test_gradual_unfreezing_and_smaller_steps_below():
    model = llama()
    groups = layer_groups(model)
    for epoch in range(8):
        only(model, groups[-(epoch + 1) :])
        assert sum(any(p.requires_grad for p in g.values()) for g in groups) == min(epoch + 1, 6)
    sized = [{"params": [*g.values()], "lr": 1.0 / 2.6**i} for i, g in enumerate(reversed(groups))]
    optimizer = torch.optim.SGD(sized)
    assert [g["lr"] for g in optimizer.param_groups][:3] == [1.0, 1 / 2.6, pytest.approx(1 / 6.76)]
    assert optimizer.param_groups[0]["params"][-1] is model.lm_head.weight
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_slanted_triangles_are_torchs_one_cycle():
    # ULMFiT: p = t / cut up to cut = floor(T cut_frac), then back; lr = max (1 + p (ratio - 1)) / ratio
    total, cut, ratio, top = 100, 10, 32, 0.01
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, top, total_steps=total + 1, pct_start=(cut + 1) / (total + 1), anneal_strategy="linear",
        div_factor=ratio, final_div_factor=1, cycle_momentum=False,
    )  # fmt: skip
    for t in range(total + 1):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (total / cut - 1))
        assert schedule.get_last_lr()[0] == pytest.approx(top * (1 + p * (ratio - 1)) / ratio, abs=1e-12)
        optimizer.step()
        if t < total:
            schedule.step()


def test_names_expressions_and_groups_mixed():
    model = llama()
    groups = layer_groups(model)
    assert only(model, [groups[0], groups[-1]]) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert only(model, groups[4]) == list(groups[4])
    assert only(model, r"layers\.0\..*norm", exclude=r"post") == ["model.layers.0.input_layernorm.weight"]
    assert only(model, (g for g in [groups[1], "lm_head.weight"]), exclude=list(groups[1])[1:]) == [
        next(iter(groups[1])),
        "lm_head.weight",
    ]
    assert trained(model) == [next(iter(groups[1])), "lm_head.weight"]
    assert len(only(model, ".")) == len(list(model.parameters()))


def test_frozen_is_frozen_and_a_tied_tensor_is_one():
    model = llama(tied=True)
    assert only(model, "lm_head") == ["model.embed_tokens.weight"]
    assert only(model, "norm|embed", exclude=["lm_head.weight"]) == [
        *[f"model.layers.{i}.{n}_layernorm.weight" for i in range(4) for n in ("input", "post_attention")],
        "model.norm.weight",
    ]
    before = {n: p.clone() for n, p in model.named_parameters()}
    model(IDS).logits.sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("norm" not in name)
        assert (p.grad is None) == ("norm" not in name)


@pytest.mark.errors
def test_only_refusals_change_nothing():
    model = llama()
    for args, match in (
        (("lm_hed",), r"only: expected names to match a parameter, got 'lm_hed'. Names: model.embed"),
        ((["model.norm"],), r"expected names to be names of parameters, got 'model.norm'"),
        (([],), r"expected something to train"),
    ):
        with pytest.raises(ValueError, match=match):
            only(model, *args)
    with pytest.raises(ValueError, match=r"expected exclude to match a parameter"):
        only(model, ".", exclude="nrom")
    with pytest.raises(ValueError, match=r"something to train, got nothing but what exclude='norm' names"):
        only(model, "norm", exclude="norm")
    assert len(trained(model)) == len(list(model.parameters()))
    model.lm_head.weight = nn.Parameter(torch.ones(13, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"lm_head.weight in full precision, got a quantized weight. Put LoRA"
    ):
        only(model, "lm_head")


# half


def per_layer(frozen, word, layers=4):
    return [sum(f"layers.{i}." in n and word in n for n in frozen) for i in range(layers)]


@pytest.mark.parametrize("seed", range(5))
def test_half_by_category(seed):
    model = llama()
    frozen = half(model, rng=random.Random(seed))
    assert per_layer(frozen, "self_attn") == [2, 2, 2, 2]
    assert sorted(per_layer(frozen, "mlp")) == [1, 1, 2, 2]
    assert per_layer(frozen, "layernorm") == [1, 1, 1, 1]
    assert not any(n in frozen for n in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"))
    order = [n for n, _ in model.named_parameters()]
    assert frozen == sorted(frozen, key=order.index)
    assert frozen == half(model, rng=random.Random(seed))


def test_draws_differ_and_reach_every_matrix():
    model = llama()
    draws = [frozenset(half(model, rng=random.Random(seed))) for seed in range(30)]
    assert len(set(draws)) == 30
    assert frozenset().union(*draws) == {n for n, _ in model.named_parameters() if ".layers." in n}
    assert len({tuple(per_layer(d, "mlp")) for d in draws}) > 3
    rng = random.Random(1)
    assert half(model, rng=rng) != half(model, rng=rng)


def test_half_is_frozen_to_the_bit():
    model = llama()
    frozen = half(model, rng=random.Random(2))
    assert set(only(model, ".", exclude=frozen)) | set(frozen) == {n for n, _ in model.named_parameters()}
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    model(IDS).logits.square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in frozen)


def test_shares_and_levels():
    model = llama()
    inside = [n for n, _ in model.named_parameters() if ".layers." in n]
    for level in ("category", "layer", "model"):
        assert half(model, ratio=0.0, level=level, rng=random.Random(0)) == []
        assert half(model, ratio=1.0, level=level, rng=random.Random(0)) == inside
    whole = half(model, level="layer", rng=random.Random(0))
    assert sorted(per_layer(whole, "")) == [0, 0, 9, 9]
    pot = half(model, level="model", rng=random.Random(0))
    assert len(pot) == 18
    assert per_layer(pot, "self_attn") != [2, 2, 2, 2]
    quarter = half(model, ratio=0.25, rng=random.Random(0))
    assert (sum(per_layer(quarter, "self_attn")), sum(per_layer(quarter, "mlp"))) == (4, 3)
    assert sum(per_layer(half(llama(3), rng=random.Random(0)), "mlp", 3)) == 5  # 4.5 rounded up


def test_a_matrix_goes_with_its_bias_and_fused_ones_count_once():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=16))
    frozen = half(model, rng=random.Random(0))
    assert {n.rpartition(".")[0] + ".weight" for n in frozen} | {
        n.rpartition(".")[0] + ".bias" for n in frozen
    } == set(frozen)
    for block in range(2):
        for kind, count in (("attn.c", 1), ("mlp.c", 1), ("ln_", 1)):
            assert sum(f"h.{block}.{kind}" in n and n.endswith("weight") for n in frozen) == count


@pytest.mark.errors
def test_half_refusals():
    model = llama(1)
    with pytest.raises(ValueError, match=r"expected ratio in \[0, 1\], got 1.5"):
        half(model, ratio=1.5, rng=random.Random(0))
    with pytest.raises(ValueError, match=r"expected level to be one of 'category', 'layer', 'model'"):
        half(model, level="row", rng=random.Random(0))
