"""What is called through peft: it holds there what the papers ask for, also beside our own parts."""

import copy
import math

import pytest
import torch
from torch import nn, tensor

from cotkit.adapters.freeze import layer_groups, only
from cotkit.adapters.modules import delta, inject
from cotkit.adapters.sparse import principal

IDS = torch.tensor([[3, 5, 7, 2], [4, 1, 9, 6]])


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def wave(*shape, a=1.0, b=0.0):
    """Sines, as in the script that ran the authors' code."""
    n = math.prod(shape)
    return torch.sin(a * torch.arange(n, dtype=torch.float64) + b).reshape(shape).float()


def llama(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = {"tie_word_embeddings": False, "initializer_range": 0.3, "use_cache": False, **sizes, **config}
    return LlamaForCausalLM(LlamaConfig(vocab_size=13, **given)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def trained(model, steps=3):
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(own, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).logits.square().mean().backward()
        optimizer.step()
    return model


def test_delta_is_pefts_lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, x = nn.Linear(5, 3), torch.randn(4, 5)
    ours = delta(base, 3, scale=2.0)
    nn.init.normal_(ours.up.weight)
    theirs = get_peft_model(
        nn.Sequential(copy.deepcopy(base)), LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    )
    inner = theirs.base_model.model[0]
    with torch.no_grad():
        inner.lora_A["default"].weight.copy_(ours.down.weight)
        inner.lora_B["default"].weight.copy_(ours.up.weight)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-6, atol=1e-6)


# CorDA


def corda(net, run, r, method):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    targets = ["0"] if isinstance(net, nn.Sequential) else ["q_proj", "down_proj"]
    start = {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method=method)}
    config = LoraConfig(r=r, lora_alpha=r, target_modules=targets, **start)
    preprocess_corda(net, config, run_model=run)
    return get_peft_model(net, config)


# iboing/CorDA, cordalib/decomposition.py decompose_to_adapter(cov_aware=True, r=2), on a Linear(4, 3): B A
# fmt: off
CORDA = {
    "kpm": [0.5115389227867126, 0.36304157972335815, -0.31731173396110535, -0.5328013300895691,
            -0.42453888058662415, -0.3012971580028534, 0.26334503293037415, 0.4421851933002472,
            -0.9093491435050964, -0.6453716158866882, 0.5640738606452942, 0.9471448659896851],
    "ipm": [0.1986706256866455, 0.9974970817565918, 0.3349905014038086, -0.8182766437530518,
            -0.7727633714675903, 0.40484851598739624, 0.9893565773963928, 0.12445208430290222,
            -0.9227756857872009, -0.6181408166885376, 0.5920695066452026, 0.9348925352096558],
}
# fmt: on


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_corda_equals_the_authors_numbers(method):
    layer, x = nn.Linear(4, 3, bias=False), wave(4, 9, a=1.7, b=0.3)
    layer.weight.data.copy_(wave(3, 4, a=1.3, b=0.2))
    weight = layer.weight.detach().clone()
    net = nn.Sequential(layer)
    # one sample of nine tokens; peft divides by its largest entry, which scales C and changes nothing
    model = corda(net, lambda: net(x.T[None]), 2, method)
    adapted = model.base_model.model[0]
    product = adapted.get_delta_weight("default")
    torch.testing.assert_close(product.flatten(), tensor(CORDA[method]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(adapted.base_layer.weight + product, weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_corda_keeps_the_function_of_a_model(method):
    model = llama()
    before = logits(model)
    ids = torch.randint(13, (8, 1, 20), generator=gen(1))
    adapted = corda(model, lambda: [model(i) for i in ids], 3, method)
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-4)
    names = {n.split(".")[-3] for n, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B"}


# one adapter per task, modes per part, prefixes


def test_a_bank_of_adapters_forgets_nothing():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), adapter_name="one")
    base = logits(model)
    trained(model)
    first = logits(model)
    assert not torch.equal(first, base)
    for name in ("two", "three"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        model.set_adapter(name)
        assert torch.equal(logits(model), base)  # a fresh one changes nothing
        assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {name}
        trained(model)
    model.set_adapter("one")
    assert torch.equal(logits(model), first)
    with pytest.raises((ValueError, KeyError)):
        model.set_adapter("four")


def test_rescaling_vectors_start_at_one():
    from peft import IA3Config, get_peft_model

    before = logits(llama())
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    torch.testing.assert_close(logits(get_peft_model(llama(), config)), before, rtol=1e-6, atol=1e-6)


def test_lora_above_and_everything_below():
    """Each part in its own way: LoRA on the upper block, the embeddings in full, the rest frozen."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=r".*layers\.1\..*(q|v)_proj"))
    lora = [n for n, p in model.named_parameters() if p.requires_grad]
    names = only(model, [layer_groups(model)[0], *lora])
    assert len(lora) == 4
    assert names == ["base_model.model.model.embed_tokens.weight", *lora]
    before = {n: p.clone() for n, p in model.named_parameters()}
    trained(model)
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == names


def test_a_prefix_and_parallel_adapters_together():
    """The mix-and-match adapter: a short prefix in the attention, a scaled parallel adapter on the MLP."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    model = llama(use_cache=True)
    base = logits(model)
    inject(model, r"mlp$", lambda m: delta(m, 4, d_in=16, act=torch.relu, scale=4.0))
    mixed = get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    own = only(mixed, r"^prompt_encoder|\.(down|up)\.weight$")  # peft freezes what it finds
    assert len(own) == 2 * 2 + 1
    assert not torch.allclose(logits(mixed), base)
    weights = {n: p.clone() for n, p in mixed.named_parameters()}
    trained(mixed)
    assert {n for n, p in mixed.named_parameters() if not torch.equal(p, weights[n])} == set(own)
    for p in (p for n, p in mixed.named_parameters() if ".up." in n):
        p.data.zero_()
    with mixed.disable_adapter():  # without prefix and branches: the base again
        assert torch.equal(logits(mixed), base)


def test_principal_weights_through_shira():
    from peft import ShiraConfig, get_peft_model

    config = ShiraConfig(r=2, target_modules=["q_proj"], mask_type="random")
    config.mask_fn = lambda layer, r, **_: principal(layer.weight, 1, r).to(layer.weight)
    model = llama()
    masks = {n: principal(m.weight, 1, 2) for n, m in model.named_modules() if n.endswith("q_proj")}
    start = {n: model.get_submodule(n).weight.clone() for n in masks}
    before = logits(model)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "shira" in name:
                p.copy_(torch.randn(p.shape, generator=gen(1)))
    assert not torch.equal(logits(model), before)
    whole = model.merge_and_unload()
    for name, mask in masks.items():
        assert torch.equal(whole.get_submodule(name).weight != start[name], mask)
