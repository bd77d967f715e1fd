"""Routers, branches and who speaks; adapters made from a task's name; layers averaged."""

import copy
import math

import pytest
import torch
from torch import nn, tensor

from cotkit.adapters.experts import by_step, gates, hyper_adapter, layer_ensemble, lora_experts, router
from cotkit.adapters.modules import delta, fold, inject, load, save
from cotkit.losses.regularize import localized_balance


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def f64(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def wave(*shape, a=1.0, b=0.0):
    """Sines, as in the script that ran the authors' code."""
    n = math.prod(shape)
    return torch.sin(a * torch.arange(n, dtype=torch.float64) + b).reshape(shape).float()


def layer(d_in=5, d_out=3):
    made = nn.Linear(d_in, d_out).double()
    made.weight.data.copy_(f64(d_out, d_in, seed=1))
    made.bias.data.copy_(f64(d_out, seed=2))
    return made


def mixed(e=3, **options):
    given = {"router": router(5, e, generator=gen(4)), "generator": gen(3), "alpha": 6.0, **options}
    return lora_experts(layer(), e, 2, **given)


def spread(made, seed=7):
    made.up.data.copy_(f64(*made.up.shape, seed=seed))
    return made


class Given(nn.Module):
    """Gates that do not depend on the input."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _x):
        return self.value


# router


def test_one_router_is_a_softmax():
    route, x = router(4, 3, generator=gen(1)), torch.randn(2, 5, 4, generator=gen(2))
    expected = (x @ route.routers[0].T).softmax(-1)
    torch.testing.assert_close(route(x), expected)
    assert [tuple(p.shape) for p in route.parameters()] == [(1, 3, 4)]
    assert route.routers.abs().max() <= 0.5  # 1 / sqrt(4)


def test_the_mixture_against_a_slow_one():
    route, x = router(4, 5, n_routers=3, top_k=2, generator=gen(1)).double(), f64(2, 6, 4, seed=2)
    got = route(x)
    for b in range(2):
        for t in range(6):
            m = (route.main @ x[b, t]).softmax(0)
            p = sum(m[j] * (route.routers[j] @ x[b, t]).softmax(0) for j in range(3))
            best = sorted(range(5), key=lambda e: -p[e].item())[:2]
            expected = torch.zeros(5, dtype=torch.float64)
            for e in best:
                expected[e] = p[e] / (p[best[0]] + p[best[1]])
            torch.testing.assert_close(got[b, t], expected, rtol=1e-12, atol=1e-14)
    assert ((got > 0).sum(-1) == 2).all()
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 6).double())


def test_two_equal_routers_are_one_and_top_k_of_all_changes_nothing():
    one, x = router(4, 3, generator=gen(1)), torch.randn(7, 4, generator=gen(2))
    two = router(4, 3, n_routers=2, generator=gen(5))
    two.routers.data.copy_(one.routers.data.expand(2, 3, 4))
    torch.testing.assert_close(two(x), one(x))
    everyone = router(4, 3, top_k=3, generator=gen(1))
    torch.testing.assert_close(everyone(x), one(x))


def test_names_of_experts_do_not_matter():
    route, x = router(4, 3, n_routers=2, top_k=2, generator=gen(1)), torch.randn(7, 4, generator=gen(2))
    order, renamed = tensor([2, 0, 1]), copy.deepcopy(route)
    renamed.routers.data.copy_(route.routers[:, order])
    torch.testing.assert_close(renamed(x), route(x)[:, order])


def test_a_router_that_is_always_wrong_is_outvoted():
    """One of the two routers sends all tokens to expert 0; the main router learns to ignore it."""
    x = torch.randn(64, 4, generator=gen(1))
    right = (x[:, 0] > 0).long() + 1

    def learned(n_routers):
        route = router(4, 3, n_routers=n_routers, generator=gen(2))
        route.routers.data[0] = 0
        x1 = torch.cat([x[:, :3], torch.ones(64, 1)], 1)
        route.routers.data[0, 0, 3] = 12.0
        optimizer = torch.optim.Adam(route.parameters(), lr=0.1)
        for _ in range(40):
            loss = torch.nn.functional.nll_loss(route(x1).clamp_min(1e-9).log(), right)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (route(x1).argmax(-1) == right).float().mean()

    assert learned(2) > 0.9
    assert learned(1) < 0.6


def test_half_precision_in_half_precision_out():
    route = router(4, 3, top_k=2).bfloat16()
    assert route(torch.ones(2, 4).bfloat16()).dtype == torch.bfloat16


@pytest.mark.errors
def test_router_refusals():
    for options, match in (
        ({"n_experts": 0}, r"expected n_experts >= 1"),
        ({"n_routers": 0}, r"expected n_routers >= 1"),
        ({"top_k": 4}, r"expected top_k in \[1, 3\], got 4"),
    ):
        with pytest.raises(ValueError, match=match):
            router(**{"d": 4, "n_experts": 3, **options})


# lora_experts


def test_at_first_the_layer_to_the_bit_and_then_the_formula():
    made, x = mixed(), f64(2, 4, 5, seed=5)
    assert torch.equal(made(x), made.base(x))
    spread(made)
    g = made.router(x)
    expected = made.base(x)
    for i in range(3):
        branch = x @ made.down[i].T @ made.up[i].T
        expected = expected + 3.0 * g[..., i : i + 1] * branch  # alpha / r = 6 / 2
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


def test_the_authors_layer():
    # Ablustrund/LoRAMoE, peft/tuners/lora.py Linear(3, 2, r=2, lora_alpha=8, lora_nums=4, bias=False).forward
    base = nn.Linear(3, 2, bias=False)
    made = lora_experts(base, 4, 2, router=router(3, 4), alpha=8.0)
    base.weight.data.copy_(wave(2, 3, a=1.3))
    made.router.routers.data[0] = wave(4, 3, a=0.7, b=0.2)
    for i in range(4):
        made.down.data[i], made.up.data[i] = wave(2, 3, a=1.1, b=i), wave(2, 2, a=0.9, b=2 * i + 0.5)
    expected = [1.9692944288253784, -0.21714401245117188, 0.007187321782112122, -1.000991702079773]
    expected += [0.24320605397224426, 3.1420140266418457, 2.2563676834106445, -0.9555730819702148]
    expected += [-1.7729434967041016, -0.8976578309509827, 1.2864776849746704, 0.6212499141693115]
    x = wave(3, 2, 3, a=0.8, b=0.1)
    nested = nn.Sequential(made)
    with gates(nested) as seen:
        y = nested(x)
    torch.testing.assert_close(y.flatten(), tensor(expected), rtol=1e-5, atol=1e-6)
    # its balance term, blc_alpha=0.25, blc_weight=1, task_types (1, 0, 1): type 1 on the first two experts
    kinds = tensor([1, 0, 1]), tensor([1, 1, 0, 0])
    loss = localized_balance(seen["0"], torch.ones(3, 2).bool(), *kinds, delta=0.25, squared=True)
    assert loss.item() == pytest.approx(0.21061943471431732, rel=1e-5)


def test_one_expert_is_lora():
    made, x = mixed(1, router=lambda x: x.new_ones(*x.shape[:-1], 1)), f64(2, 4, 5, seed=5)
    spread(made)
    lora = delta(layer(), 2, scale=3.0)
    lora.down.weight.data, lora.up.weight.data = made.down.data[0], made.up.data[0]
    torch.testing.assert_close(made(x), lora(x), rtol=1e-12, atol=1e-12)


def test_the_shared_expert():
    x, steps = f64(2, 4, 5, seed=5), tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    route = Given(by_step(steps, 2).double())
    plain = spread(mixed(2, router=route))
    half = spread(mixed(2, router=route, shared=0.25))
    assert half.up.shape == (3, 3, 2)
    half.up.data[:2], half.down.data[:2] = plain.up.data, plain.down.data
    own = plain(x) - plain.base(x)
    shared = 3.0 * x @ half.down[2].T @ half.up[2].T
    torch.testing.assert_close(half(x), plain.base(x) + 0.75 * own + 0.25 * shared, rtol=1e-12, atol=1e-12)
    only = spread(mixed(2, router=route, shared=1.0))
    torch.testing.assert_close(only(x), only.base(x) + 3.0 * x @ only.down[2].T @ only.up[2].T)


def test_an_expert_without_a_token_learns_nothing():
    x, steps = f64(2, 4, 5, seed=5), tensor([[0, 2, 2, 0], [2, 2, 0, 0]])
    made = spread(mixed(3, router=lambda _x: by_step(steps, 3).double(), shared=0.5))
    made(x).square().sum().backward()
    for gradient in (made.down.grad, made.up.grad):
        assert [bool(gradient[i].any()) for i in range(4)] == [True, False, True, True]


def test_all_tokens_in_one_step_is_one_lora():
    x = f64(2, 4, 5, seed=5)
    made = spread(mixed(3, router=lambda _x: by_step(torch.ones(2, 4).long(), 3).double()))
    torch.testing.assert_close(made(x), made.base(x) + 3.0 * x @ made.down[1].T @ made.up[1].T)


def test_dropout_only_in_training():
    made, x = spread(mixed(dropout=0.5)), f64(2, 4, 5, seed=5)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


def test_in_a_model_stored_read_back_and_kept(tmp_path):
    def built(seed):
        model = nn.Sequential(layer(), nn.Tanh(), layer(3, 3))
        inject(
            model,
            "0|2",
            lambda m: lora_experts(m, 3, 2, router=router(m.in_features, 3, generator=gen(seed))),
        )
        return model

    model, x = built(1), f64(2, 4, 5, seed=5)
    names = save(model, tmp_path / "experts.safetensors")
    assert names == [f"{i}.{n}" for i in (0, 2) for n in ("down", "up", "router.routers")]
    for m in (model[0], model[2]):
        spread(m)
    save(model, tmp_path / "experts.safetensors")
    again = built(2)
    load(again, tmp_path / "experts.safetensors")
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match=r"fold: at 0: merge: .*depends on the input"):
        fold(model)


def test_experts_on_a_4_bit_base(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from cotkit import lab
    from cotkit.adapters.lora import valve

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=13, use_cache=False, **sizes)).save_pretrained(tmp_path)
    model, ids = lab._model._pretrained(str(tmp_path), True, torch.float32), tensor([[3, 5, 7], [1, 2, 4]])
    base = model(ids).logits
    inject(model, r"(up|down)_proj$", lambda m: lora_experts(m, 3, 2, router=router(m.in_features, 3)))
    with gates(model) as seen:
        assert torch.equal(model(ids).logits, base)
    assert {tuple(g.shape) for g in seen.values()} == {(2, 3, 3)}
    assert len(seen) == 2
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn(p.shape, generator=gen(1)))
    loss = model(ids).logits.square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with valve(model, 0.0):
        assert torch.equal(model(ids).logits, base)


def test_gates_let_go_and_carry_a_gradient():
    model = nn.Sequential(mixed())
    x = f64(2, 4, 5, seed=5)
    with gates(model) as seen:
        assert seen == {}
        model(x)
    assert list(seen) == ["0"]
    localized_balance(seen["0"], torch.ones(2, 4).bool(), tensor([0, 1]), tensor([0, 0, 1])).backward()
    assert model[0].router.routers.grad.any()
    before = seen["0"]
    model(2 * x)
    assert seen["0"] is before
    with pytest.raises(RuntimeError, match="boom"), gates(model):
        raise RuntimeError("boom")
    assert not model[0].gates._forward_hooks


@pytest.mark.errors
def test_lora_experts_refusals():
    with pytest.raises(ValueError, match=r"expected shared in \[0, 1\], got 1.5"):
        mixed(shared=1.5)
    with pytest.raises(ValueError, match=r"expected r >= 1"):
        lora_experts(layer(), 3, 0, router=router(5, 3))
    with pytest.raises(ValueError, match=r"lora_experts: expected a linear layer, got Tanh"):
        lora_experts(nn.Tanh(), 3, 2, router=router(5, 3))
    with pytest.raises(
        ValueError, match=r"expected gates \[2, 4, 3\] for an input \[2, 4, 5\], got \[2, 4, 2\]"
    ):
        mixed(router=router(5, 2))(f64(2, 4, 5))
    with (
        pytest.raises(ValueError, match=r"gates: expected a model with lora_experts, got none"),
        gates(layer()),
    ):
        pass


# by_step


def test_tokens_go_to_their_step_and_the_question_to_one_of_them():
    steps = tensor([[-1, -1, 0, 1, 1], [-1, 2, 2, 0, -1]])
    got = by_step(steps, 3, generator=gen(1))
    assert got.shape == (2, 5, 3)
    assert (got.sum(-1) == 1).all()
    assert got.argmax(-1)[steps >= 0].tolist() == steps[steps >= 0].tolist()
    assert torch.equal(got[0, 0], got[0, 1])
    assert torch.equal(got[1, 0], got[1, 4])
    drawn = [by_step(-torch.ones(200, 2).long(), 3, generator=gen(s)).mean((0, 1)) for s in (1, 2)]
    assert not torch.equal(*drawn)
    assert all((abs(d - 1 / 3) < 0.12).all() for d in drawn)


@pytest.mark.errors
def test_by_step_refusals():
    with pytest.raises(ValueError, match=r"expected steps below 2, got 2"):
        by_step(tensor([[0, 2]]), 2)
    with pytest.raises(TypeError, match=r"expected steps as an integer tensor"):
        by_step(tensor([[0.0]]), 2)
    with pytest.raises(ValueError, match=r"expected steps \[B, T\]"):
        by_step(tensor([0]), 2)


# hyper_adapter and layer_ensemble


def test_hyper_adapter():
    made, h = hyper_adapter(6, 2, 3, 2, d_task=4, generator=gen(1)).double(), f64(2, 5, 6, seed=1)
    assert torch.equal(made(h, 0, 0), h)
    made.make_up.weight.data.copy_(f64(12, 4, seed=2))
    z = made.mix(torch.cat([made.task.weight[2], made.layer.weight[1]]))
    down, up = made.make_down(z).view(2, 6), made.make_up(z).view(6, 2)
    norm = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = h + (norm @ down.T).relu() @ up.T
    torch.testing.assert_close(made(h, 2, 1), expected, rtol=1e-10, atol=1e-12)
    rows = made(h, tensor([2, 0]), 1)
    torch.testing.assert_close(rows[0], expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows[1], made(h, 0, 1)[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(made(h, 0, 1), made(h, 0, 0))
    made.task.weight.data[1] = made.task.weight.data[0]
    torch.testing.assert_close(made(h, 0, 1), made(h, 1, 1))


def test_layer_ensemble():
    made = layer_ensemble([4, 6], 3, 2, width=5, generator=gen(1)).double()
    hidden, small = [f64(7, 4, seed=1), f64(7, 6, seed=2)], f64(7, 3, seed=3)
    each = [
        (torch.cat([h, small], 1) @ a.weight.T + a.bias).relu() @ head.weight.T + head.bias
        for h, a, head in zip(hidden, made.adapt, made.heads, strict=True)
    ]
    torch.testing.assert_close(made(hidden, small), (each[0] + each[1]) / 2, rtol=1e-12, atol=1e-12)


def test_first_values_come_from_the_source_given():
    for build in (
        lambda g: hyper_adapter(4, 2, 3, 2, generator=g),
        lambda g: layer_ensemble([4], 3, 2, generator=g),
    ):
        state = torch.get_rng_state()
        a, b = build(gen(1)), build(gen(1))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert not all(
            torch.equal(p, q) for p, q in zip(a.parameters(), build(gen(2)).parameters(), strict=True)
        )


@pytest.mark.errors
def test_their_refusals():
    with pytest.raises(ValueError, match=r"hyper_adapter: expected n_tasks >= 1"):
        hyper_adapter(4, 2, 0, 2)
    with pytest.raises(ValueError, match=r"at least one layer, got none"):
        layer_ensemble([], 3, 2)
    with pytest.raises(ValueError, match=r"expected dims\[1\] >= 1"):
        layer_ensemble([4, 0], 3, 2)
    with pytest.raises(ValueError, match=r"hidden states of 1 layers, got 2"):
        layer_ensemble([4], 3, 2)([torch.ones(1, 4)] * 2, torch.ones(1, 3))
