"""Masks of what is trained: LIFT's and the lottery tickets'."""

import math

import pytest
import torch
from torch import nn, tensor

from cotkit.adapters.sparse import carry_moments, largest_change, principal, train_only


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def wave(*shape, a=1.0, b=0.0):
    """Sines, as in the script that ran the authors' code."""
    n = math.prod(shape)
    return torch.sin(a * torch.arange(n, dtype=torch.float64) + b).reshape(shape)


def lift_weight():
    n = torch.arange(24.0)
    rows = tensor([1.0, 2.0, 0.5, 1.5])[:, None]
    return torch.sin(7.3 * n).reshape(4, 6) * rows + 0.3 * torch.cos(2.1 * n).reshape(4, 6)


# principal


def test_rank_one_by_hand():
    # orthogonal rows of norm 3 and 1: of rank 1 the first row alone is left, then zeros; k = 6 of 8
    weight = tensor([[2.4, 1.8, 0.0, 0.0], [-0.6, 0.8, 0.0, 0.0]], dtype=torch.float64)
    mask = principal(weight, 1, 1)
    assert mask[0, :2].tolist() == [True, True]
    assert principal(weight, 2, 1)[:, :2].all()


def test_the_authors_masks():
    # zihanghliu/LIFT, sparseAdam.py SparseAdamW(mask_type="lift_sparse_largest"): rank 1, filter_rank 1, 2, 4
    expected = {
        1: [2, 5, 7, 8, 9, 10, 11, 20, 22, 23],
        2: [4, 5, 7, 8, 9, 10, 11, 20, 21, 23],
        4: [4, 5, 7, 8, 9, 10, 11, 20, 21, 23],
    }
    for rank, indices in expected.items():
        assert principal(lift_weight(), rank, 1).flatten().nonzero().flatten().tolist() == indices
    # mask_type="lift_sparse", as their configurations have it: the smallest of |W_r|
    smallest = [0, 3, 6, 12, 13, 14, 15, 16, 18, 19]
    assert not principal(lift_weight(), 2, 1).flatten()[smallest].any()


def test_full_rank_is_magnitude_and_the_count_is_exact():
    weight = torch.randn(7, 5, generator=gen(), dtype=torch.float64)
    for budget, k in ((1, 12), (2, 24), (3, 35), (100, 35)):
        mask = principal(weight, 5, budget)
        assert mask.sum() == k
        assert weight[mask].abs().min() >= weight[~mask].abs().max() if k < 35 else mask.all()
        assert principal(weight, 2, budget).sum() == k
    assert torch.equal(principal(weight, 99, 1), principal(weight, 5, 1))
    assert not torch.equal(principal(weight, 1, 1), principal(weight, 5, 1))
    assert principal(torch.ones(3, 4), 1, 1).sum() == 7  # ties too


def test_it_ranks_the_approximation_and_not_the_weight():
    # a strong rank-1 pattern, and one large entry that does not belong to it
    weight = 2 * torch.outer(tensor([1.0, 1.0, 1.0, 0.0]), tensor([1.0, 1.0, 1.0, 0.0]))
    weight[3, 3] = 5.0
    assert not principal(weight, 1, 1)[3, 3]  # 2 * 3 = 6 > 5: the pattern is the first component
    assert principal(weight, 4, 1)[3, 3]


def test_half_precision_is_ranked_in_single():
    weight = torch.randn(6, 8, generator=gen(1)).bfloat16()
    assert torch.equal(principal(weight, 2, 1), principal(weight.float(), 2, 1))


@pytest.mark.errors
def test_principal_refusals():
    weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"expected filter_rank >= 1, got 0"):
        principal(weight, 0)
    with pytest.raises(ValueError, match=r"expected budget_rank >= 1, got 0"):
        principal(weight, 1, 0)
    with pytest.raises(TypeError, match=r"expected weight as a float tensor, got uint8"):
        principal(weight.to(torch.uint8), 1)
    with pytest.raises(ValueError, match=r"expected weight \[M, N\], got \[6\]"):
        principal(weight.flatten(), 1)
    with pytest.raises(ValueError, match=r"finite weight, got NaN"):
        principal(weight * math.nan, 1)


# training under masks


def lift_problem():
    x = torch.cos(1.7 * torch.arange(30.0)).reshape(6, 5)
    y = torch.sin(0.9 * torch.arange(20.0)).reshape(4, 5)
    layer = nn.Linear(6, 4, bias=False)
    layer.weight.data.copy_(lift_weight())
    return layer, lambda: ((layer.weight @ x - y) ** 2).sum()


# zihanghliu/LIFT, sparseAdam.py SparseAdamW: eight steps, lr 0.2, betas (0.9, 0.95), rank 1, filter_rank 1,
# "lift_sparse_largest", masks anew after every third (fourth) step, counted from the one before the first.
# fmt: off
LIFT_3 = [
    0.30000001192092896, 0.698982834815979, 1.9334499835968018, 0.39097851514816284, -0.9548084735870361,
    -1.5720096826553345, -0.06274190545082092, 1.176937460899353, 1.8687024116516113, 0.7060889601707458,
    -1.3106998205184937, -2.0380780696868896, 0.12103945016860962, 0.13496127724647522, 0.3684157431125641,
    0.5190051794052124, -0.43871307373046875, -0.6245899796485901, -0.4815656244754791, 0.5091813802719116,
    2.436666965484619, 1.1913540363311768, 0.02376607432961464, -0.7044657468795776,
]
LIFT_4 = [*LIFT_3[:19], 0.8574725985527039, 2.4564952850341797, 1.1913540363311768, -0.16953109204769135,
          -0.5984185338020325]
# fmt: on


@pytest.mark.parametrize(("interval", "expected"), [(3, LIFT_3), (4, LIFT_4)])
def test_the_authors_training_with_masks_made_anew(interval, expected):
    layer, loss = lift_problem()
    start = layer.weight.detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.2, betas=(0.9, 0.95), eps=1e-8)
    masks = {"weight": principal(layer.weight, 1, 1)}
    ever = masks["weight"].clone()
    handles, changes = train_only(layer, masks), 0
    for step in range(8):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if (step + 2) % interval == 0:
            new = {"weight": principal(layer.weight, 1, 1)}
            changes += int((masks["weight"] & ~new["weight"]).sum())
            carry_moments(optimizer, layer, masks, new)
            for handle in handles:
                handle.remove()
            handles, masks = train_only(layer, new), new
            ever |= new["weight"]
    assert changes > 0  # the masks did move
    torch.testing.assert_close(layer.weight.flatten(), tensor(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight[~ever], start[~ever])


def test_what_is_masked_keeps_its_value_to_the_bit():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = {"0.weight": torch.rand(4, 5, generator=gen()) < 0.4, "2.bias": tensor([True, False, True])}
    train_only(model, masks)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == list(masks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    for seed in range(20):
        model(torch.randn(6, 5, generator=gen(seed))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        mask = masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert torch.equal(p[~mask], start[name][~mask])
        assert (p[mask] != start[name][mask]).all()


def test_gradients_accumulate_and_handles_let_go():
    layer, mask = nn.Linear(2, 1, bias=False), tensor([[True, False]])
    handles = train_only(layer, {"weight": mask})
    mask.fill_(True)  # it was copied
    for x in ([3.0, 4.0], [1.0, 7.0]):
        layer(tensor(x)).sum().backward()
    assert layer.weight.grad.tolist() == [[4.0, 0.0]]
    for handle in handles:
        handle.remove()
    layer.weight.grad = None
    layer(tensor([3.0, 4.0])).sum().backward()
    assert layer.weight.grad.tolist() == [[3.0, 4.0]]
    assert layer.weight.requires_grad


def test_a_nan_in_a_masked_gradient_stays_out():
    layer = nn.Linear(2, 1, bias=False)
    train_only(layer, {"weight": tensor([[True, False]])})
    layer(tensor([3.0, math.nan])).sum().backward()
    assert layer.weight.grad.tolist() == [[3.0, 0.0]]


def test_moments_by_hand_on_two_by_two():
    layer = nn.Linear(2, 2, bias=False).double()
    optimizer = torch.optim.Adam(layer.parameters(), betas=(0.5, 0.75), amsgrad=True)
    old, new = tensor([[True, True], [False, True]]), tensor([[True, False], [True, True]])
    train_only(layer, {"weight": old})
    weight = layer.weight.detach().clone()
    layer(tensor([2.0, 6.0]).double()).sum().backward()  # dL/dW = [[2, 6], [0 (masked), 6]]
    optimizer.step()
    moved = layer.weight.detach().clone()
    carry_moments(optimizer, layer, {"weight": old}, {"weight": new})
    state = optimizer.state[layer.weight]
    # m = 0.5 g, v = 0.25 g^2; kept at (0, 0) and (1, 1) alone
    assert state["exp_avg"].tolist() == [[1.0, 0.0], [0.0, 3.0]]
    assert state["exp_avg_sq"].tolist() == [[1.0, 0.0], [0.0, 9.0]]
    assert state["max_exp_avg_sq"].tolist() == [[1.0, 0.0], [0.0, 9.0]]
    assert int(state["step"]) == 1
    assert torch.equal(layer.weight, moved)  # the dropped entry (0, 1) keeps what it has learned
    assert moved[0, 1] != weight[0, 1]


def test_momentum_of_plain_descent_is_carried_too():
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(tensor([2.0, 6.0])).sum().backward()
    optimizer.step()
    both = {"weight": tensor([[True, True]])}
    carry_moments(optimizer, layer, both, {"weight": tensor([[False, True]])})
    assert optimizer.state[layer.weight]["momentum_buffer"].tolist() == [[0.0, 6.0]]
    carry_moments(torch.optim.Adam(layer.parameters()), layer, both, both)  # no state yet: nothing to do


@pytest.mark.errors
def test_train_only_refusals_change_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    good = torch.ones(2, 2, dtype=torch.bool)
    for masks, match in (
        ({}, r"expected masks for some parameters, got none"),
        ({"0.wait": good}, r"names of the model's parameters, got 0.wait. Names: 0.weight"),
        ({"0.weight": good[:1]}, r"expected a mask \[2, 2\] for 0.weight, got \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=match):
            train_only(model, masks)
    with pytest.raises(TypeError, match=r"expected 0.weight as a bool tensor.*got float32"):
        train_only(model, {"0.weight": good.float()})
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"one mask for each parameter, got 0.weight and 1.weight, tied"):
        train_only(model, {"0.weight": good, "1.weight": good})
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"expected 0.weight in full precision, got a quantized weight"):
        train_only(model, {"0.weight": good})
    assert model[0].bias.requires_grad


@pytest.mark.errors
def test_carry_moments_refusals():
    layer, mask = nn.Linear(2, 1, bias=False), tensor([[True, False]])
    adam = torch.optim.Adam(layer.parameters())
    with pytest.raises(ValueError, match=r"the same names, got weight in masks_old and not in masks_new"):
        carry_moments(adam, layer, {"weight": mask}, {})
    with pytest.raises(ValueError, match=r"expected a mask \[1, 2\] for weight, got \[2, 1\]"):
        carry_moments(adam, layer, {"weight": mask.T}, {"weight": mask})
    decayed = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"expected weight_decay=0, got 0.1 for weight"):
        carry_moments(decayed, layer, {"weight": mask}, {"weight": mask})
    other = torch.optim.Adam(nn.Linear(2, 1).parameters())
    with pytest.raises(ValueError, match=r"expected weight in the optimizer"):
        carry_moments(other, layer, {"weight": mask}, {"weight": mask})
    adam.state[layer.weight] = {"state1": torch.zeros(1, 2, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"float moments, got torch.uint8 in state1 of weight"):
        carry_moments(adam, layer, {"weight": mask}, {"weight": mask})


# largest_change


def change():
    before = {"a": wave(2, 3), "b": wave(4, b=0.7)}
    return before, {"a": wave(2, 3, a=1.4, b=0.1), "b": wave(4, a=0.5, b=1.1)}


def test_the_authors_masks_in_two_rounds():
    # cambridgeltl/composable-sft, src/sft/lt_sft.py unfreeze_k_most_changed_params(3), then (2)
    before, after = change()
    first = largest_change(before, after, 3)
    assert {n: m.int().tolist() for n, m in first.items()} == {"a": [[0, 0, 0], [1, 0, 1]], "b": [0, 0, 0, 1]}
    second = largest_change(before, after, 2, chosen=first)
    assert {n: m.int().tolist() for n, m in second.items()} == {
        "a": [[0, 0, 1], [1, 0, 1]],
        "b": [0, 0, 1, 1],
    }
    assert {n: m.sum().item() for n, m in largest_change(before, after, 5).items()} == {"a": 3, "b": 2}


def test_ranked_over_all_tensors_against_a_slow_sort():
    generator = gen(4)
    before = {
        n: torch.randn(shape, generator=generator)
        for n, shape in (("x", (5, 7)), ("y", (3,)), ("z", (2, 2, 2)))
    }
    after = {n: t + torch.randn(t.shape, generator=generator) for n, t in before.items()}
    flat = sorted(
        ((after[n] - before[n]).abs().flatten()[i].item(), n, i)
        for n in before
        for i in range(before[n].numel())
    )
    for k in (0, 1, 17, 45, 46):
        masks = largest_change(before, after, k)
        expected = {(n, i) for _, n, i in flat[len(flat) - k :]}
        got = {(n, i) for n, m in masks.items() for i in m.flatten().nonzero().flatten().tolist()}
        assert got == expected


def test_of_equal_changes_exactly_k():
    zero = {"a": torch.zeros(3), "b": torch.zeros(2)}
    one = {"a": torch.ones(3), "b": tensor([2.0, -1.0])}
    assert {n: m.tolist() for n, m in largest_change(zero, one, 3).items()} == {
        "a": [True, True, False],
        "b": [True, False],
    }
    assert sum(int(m.sum()) for m in largest_change(zero, zero, 4).values()) == 4


def test_mixed_precision():
    before = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.bfloat16)}
    after = {"a": tensor([1e-9, 1.00000001], dtype=torch.float64), "b": tensor([1.0, 0.5]).bfloat16()}
    masks = largest_change(before, after, 1)
    assert {n: m.tolist() for n, m in masks.items()} == {"a": [False, True], "b": [False, False]}


def test_trial_rewind_sparse_training_and_composition():
    """The whole of lottery-ticket tuning, twice from one start; the two differences add up."""
    start = {k: v.clone() for k, v in nn.Linear(6, 4).double().state_dict().items()}

    def tuned(seed):
        model = nn.Linear(6, 4).double()
        x = torch.randn(20, 6, generator=gen(seed), dtype=torch.float64)
        y = torch.randn(20, 4, generator=gen(seed + 1), dtype=torch.float64)

        def run(masks):
            model.load_state_dict(start)
            if masks:
                train_only(model, masks)
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
            for _ in range(10):
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
            return {k: v.clone() for k, v in model.state_dict().items()}

        masks = largest_change(start, run(None), 5)
        sparse = run(masks)
        phi = {k: sparse[k] - start[k] for k in start}
        assert sum(int((p != 0).sum()) for p in phi.values()) == 5
        assert all(torch.equal(p != 0, masks[k]) for k, p in phi.items())
        return phi

    language, task = tuned(1), tuned(5)
    both = {k: start[k] + language[k] + task[k] for k in start}
    assert 5 <= sum(int((both[k] != start[k]).sum()) for k in start) <= 10


@pytest.mark.errors
def test_largest_change_refusals():
    before, after = change()
    for args, match in (
        ((before, {"a": after["a"]}, 1), r"the same names, got b in before and not in after \(1 such\)"),
        ((before, after | {"c": after["b"]}, 1), r"the same names, got c in after and not in before"),
        ((before, after | {"b": after["b"][:2]}, 1), r"expected b as \[4\] torch.float64 in both, got \[2\]"),
        ((before, after | {"b": after["b"].half()}, 1), r"expected b as .* got \[4\] torch.float16 after"),
        ((before, after | {"b": after["b"] * math.nan}, 1), r"NaN or infinity in b"),
        ((before, after, 11), r"expected k <= 10, the entries to choose from, got 11"),
        ((before, after, -1), r"expected k >= 0"),
    ):
        with pytest.raises(ValueError, match=match):
            largest_change(*args)
    with pytest.raises(ValueError, match=r"expected b among chosen"):
        largest_change(before, after, 1, chosen={"a": torch.zeros(2, 3, dtype=torch.bool)})
    ids = {"a": torch.ones(2, dtype=torch.long)}
    with pytest.raises(TypeError, match=r"expected a as a float tensor, got int64"):
        largest_change(ids, ids, 1)
