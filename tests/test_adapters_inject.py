"""Modules put into a model, stored, read back, and folded into plain weights."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from cotkit.adapters.modules import chain_linear, delta, fold, givens, inject, load, save

IDS = torch.tensor([[3, 5, 7, 2], [4, 1, 9, 6]])


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def llama(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = {"tie_word_embeddings": False, "initializer_range": 0.3, "use_cache": False, **sizes, **config}
    return LlamaForCausalLM(LlamaConfig(vocab_size=13, **given)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def trained(model, seed=3):
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(0.2 * torch.randn(p.shape, generator=gen(seed + i), dtype=p.dtype))
    return model


def adapted(model=None):
    model = llama() if model is None else model
    inject(model, r"q_proj$", lambda m: delta(m, 2, scale=0.5, chain=2, generator=gen(1)))
    inject(model, r"o_proj$", givens)
    inject(model, r"down_proj$", lambda m: delta(m, 3, sequential=True, gate=0.15, generator=gen(2)))
    return model


def test_nothing_changes_until_trained_and_only_the_new_parts_are():
    model = llama()
    before = logits(model)
    names = inject(model, r"(q|v)_proj$", lambda m: delta(m, 2, generator=gen(1)))
    assert names == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    assert torch.equal(logits(model), before)
    assert {
        n.rpartition(".")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad
    } == {
        "down",
        "up",
    }
    inject(model, r"o_proj$", givens)  # a second call leaves the first one's parts trainable
    assert torch.equal(logits(model), before)
    assert sum(p.requires_grad for p in model.parameters()) == 4 * 2 + 2
    weights = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS).logits.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert not torch.equal(logits(model), before)


def test_what_others_ask_of_the_layer_its_base_answers():
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    inject(model, r"q_proj$", lambda m: delta(m, 2))
    wrapped = model.model.layers[0].self_attn.q_proj
    assert wrapped.weight is layer.weight
    assert (wrapped.in_features, wrapped.out_features) == (16, 16)
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing


def test_frozen_parts_stay_frozen_as_built():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    inject(model, "0", lambda m: chain_linear(m, [3], [4], expand=(1, 2), zero=False))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["0.weights.1", "0.biases.1"]


def test_one_module_under_two_names_is_built_once():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(3, 3)})
    assert inject(model, "a|b", lambda m: delta(m, 1)) == ["a", "b"]
    assert model["a"] is model["b"]
    trained(model)
    x = torch.randn(2, 3, generator=gen())
    before = model["b"](x)
    assert fold(model) == ["a", "b"]
    assert model["a"] is model["b"]
    torch.testing.assert_close(model["b"](x), before)


def test_copies_and_pickles_know_what_is_their_own(tmp_path):
    model = trained(adapted())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), logits(model))
        assert save(again, tmp_path / "a.safetensors") == save(model, tmp_path / "b.safetensors")


# save and load


def test_stored_and_read_back_to_the_bit(tmp_path):
    model = trained(adapted())
    names = save(model, tmp_path / "adapter.safetensors")
    assert len(names) == 2 * (4 + 1 + 3)
    assert all(dict(model.named_parameters())[n].requires_grad for n in names)
    again = adapted()
    assert not torch.equal(logits(again), logits(model))
    assert sorted(load(again, tmp_path / "adapter.safetensors")) == sorted(names)
    assert torch.equal(logits(again), logits(model))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


@pytest.mark.errors
def test_what_is_wrong_with_a_file_is_named_and_nothing_is_read(tmp_path):
    from safetensors.torch import load_file, save_file

    path, model = tmp_path / "adapter.safetensors", trained(adapted())
    save(model, path)
    good = load_file(path)
    name = "model.layers.1.self_attn.q_proj.down.weight"
    target = adapted()
    before = logits(target)

    def refused(tensors, match):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=match):
            load(target, path)
        assert torch.equal(logits(target), before)

    refused({n: t for n, t in good.items() if n != name}, rf"the file lacks {name} \(1 in all\)")
    refused(good | {"x.up.weight": torch.ones(1)}, r"the file also has x\.up\.weight")
    refused(good | {name: torch.ones(3, 16)}, rf"expected {name} as \[2, 16\] torch.float32, got \[3, 16\]")
    refused(good | {name: good[name].half()}, rf"expected {name} as .* got \[2, 16\] torch.float16")
    refused(good | {name: good[name] * math.nan}, rf"got NaN or infinity in {name}")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        ValueError, match=r"load: expected a whole safetensors file, got .*adapter\.safetensors"
    ):
        load(target, path)
    with pytest.raises(ValueError, match=r"expected a whole safetensors file, got .*missing"):
        load(target, tmp_path / "missing")


@pytest.mark.errors
def test_a_bad_tensor_is_not_written_over_a_good_file(tmp_path):
    path, model = tmp_path / "adapter.safetensors", trained(adapted())
    save(model, path)
    good = path.read_bytes()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.angle[2] = math.nan
    with pytest.raises(
        ValueError, match=r"save: .*NaN or infinity in model\.layers\.0\.self_attn\.o_proj\.angle"
    ):
        save(model, path)
    assert path.read_bytes() == good
    with pytest.raises(ValueError, match=r"save: expected a model with injected modules, got none"):
        save(llama(), path)


# fold


def test_folded_into_the_architecture_it_had(tmp_path):
    from transformers import AutoModelForCausalLM

    model = trained(adapted())
    before = logits(model)
    assert len(fold(model)) == 6
    assert [type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")] == ["Linear"] * 14
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in llama().named_parameters()}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert fold(model) == []


def test_folding_draws_nothing_and_keeps_dtype_and_mode():
    model = trained(adapted(llama().double()))
    state = torch.get_rng_state()
    fold(model)
    assert torch.equal(torch.get_rng_state(), state)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.float64
    assert not model.model.layers[0].self_attn.q_proj.training


def test_one_on_another_is_folded_through():
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, "0", givens)
    inject(model, "0", lambda m: delta(m, 2))
    assert sum(p.requires_grad for p in model.parameters()) == 3
    trained(model)
    x = torch.randn(5, 4, generator=gen())
    before = model(x)
    assert fold(model) == ["0"]
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), before)


def test_chains_are_stored_whole_and_folded(tmp_path):
    def built(seed):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        inject(
            model, "0", lambda m: chain_linear(m, [3], [4], expand=(2, 1), zero=False, generator=gen(seed))
        )
        return model

    model, x = trained(built(1)), torch.randn(5, 5, generator=gen())
    names = save(model, tmp_path / "chains.safetensors")
    assert names == ["0.weights.0", "0.weights.1", "0.biases.0", "0.biases.1"]
    again = built(2)
    load(again, tmp_path / "chains.safetensors")
    assert torch.equal(again(x), model(x))
    assert fold(again) == ["0"]
    assert again[0].weight.shape == (5, 5)
    assert not again[0].weight[:4, 3:].any()
    torch.testing.assert_close(again(x), model(x))


def test_conv1d_stays_conv1d():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(5, 4))  # 4 in, 5 out
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[0].bias)
    x = torch.randn(3, 4, generator=gen())
    for build in (lambda m: delta(m, 2), givens):
        inject(model, "0", build)
        trained(model)
        before = model(x)
        fold(model)
        assert type(model[0]) is Conv1D
        assert model[0].weight.shape == (4, 5)
        torch.testing.assert_close(model(x), before)


def test_a_4_bit_base_is_trained_beside_then_taken_out_of_4_bit(tmp_path):
    from transformers import AutoModelForCausalLM

    from cotkit import lab

    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    model = lab._model._pretrained(str(tmp_path / "base"), True, torch.float32)
    before = logits(model)
    adapted(model)
    assert torch.equal(logits(model), before)
    own = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in own} == {torch.float32}
    packed = {n: p.clone() for n, p in model.named_parameters() if "4bit" in type(p).__name__}
    assert len(packed) == 14
    optimizer = torch.optim.Adam(own, lr=0.02)
    start = model(IDS).logits.square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        model(IDS).logits.square().mean().backward()
        optimizer.step()
    assert model(IDS).logits.square().mean() < start
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)
    save(model, tmp_path / "adapter.safetensors")
    with pytest.raises(
        ValueError, match=r"fold: at model.*full precision, got Linear4bit.*dequantize\(\) first"
    ):
        fold(model)
    after = logits(model)
    model = model.dequantize()
    assert len(fold(model)) == 6
    torch.testing.assert_close(logits(model), after, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(logits(again), logits(model))


# refusals


@pytest.mark.errors
def test_inject_refusals_leave_the_model_alone():
    model = llama()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"targets to match a module, got 'q_project'\. Names: model, "):
        inject(model, "q_project", givens)
    with pytest.raises(
        ValueError, match=r"got model.layers.0.mlp and model.layers.0.mlp.gate_proj inside it"
    ):
        inject(model, "mlp", givens)
    with pytest.raises(TypeError, match=r"build to return an nn.Module, got int"):
        inject(model, "q_proj", lambda _: 3)
    with pytest.raises(ValueError, match=r"new module for model.layers.0.self_attn.q_proj, got the same"):
        inject(model, "q_proj", lambda m: m)
    with pytest.raises(ValueError, match=r"delta: expected a linear layer, got LlamaMLP"):
        inject(model, r"q_proj$|mlp$", lambda m: delta(m, 2))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.errors
def test_fold_refusals_leave_the_model_alone():
    model = adapted()
    inject(model, r"up_proj$", lambda m: delta(m, 2, act=torch.relu))
    with pytest.raises(
        ValueError, match=r"fold: at model.layers.0.mlp.up_proj: merge: .*an activation in it"
    ):
        fold(model)
    assert sum("base" in n for n, _ in model.named_parameters()) == 8
    tied = llama(tie_word_embeddings=True)
    inject(tied, "lm_head", givens)
    with pytest.raises(
        ValueError, match=r"expected lm_head to have a weight of its own, got one tied to model.emb"
    ):
        fold(tied)
    broken = adapted()
    with torch.no_grad():
        broken.model.layers[1].self_attn.o_proj.angle[0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in model.layers.1.self_attn.o_proj.weight"):
        fold(broken)
    assert sum("base" in n for n, _ in broken.named_parameters()) == 6
    user = nn.Sequential(nn.Linear(2, 2))
    inject(user, "0", lambda m: nn.Sequential(m, nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"expected modules with a merge\(\), got Sequential at 0"):
        fold(user)
