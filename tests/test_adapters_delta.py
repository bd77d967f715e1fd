"""Low-rank branches, rotations and chains beside a layer; and the head that predicts mistakes."""

import math

import pytest
import torch
from torch import nn, tensor

from cotkit.adapters._layers import pairs
from cotkit.adapters.modules import chain_linear, delta, error_head, givens


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def f64(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def wave(*shape, a=1.0, b=0.0):
    """Sines, as in the script that ran the authors' code."""
    n = math.prod(shape)
    return torch.sin(a * torch.arange(n, dtype=torch.float64) + b).reshape(shape).float()


def layer(d_in=5, d_out=3, *, bias=True, seed=0):
    made = nn.Linear(d_in, d_out, bias=bias).double()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(f64(*p.shape, seed=seed + i))
    return made


def trained(module, seed=9):
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            if not name.startswith("base") and name != "gate":
                p.add_(0.5 * f64(*p.shape, seed=seed + i).to(p.dtype))
    return module


# delta


def test_lora_by_hand():
    base = nn.Linear(2, 2, bias=False).double()
    lora = delta(base, 2, scale=0.5)
    base.weight.data = tensor([[1.0, 2.0], [3.0, 5.0]]).double()
    lora.down.weight.data = tensor([[1.0, -1.0], [2.0, 0.5]]).double()
    lora.up.weight.data = tensor([[0.5, 1.0], [-2.0, 4.0]]).double()
    x = tensor([[3.0, 7.0]]).double()
    # Wx = (17, 44); Ax = (-4, 9.5); B Ax = (-2 + 9.5, 8 + 38) = (7.5, 46); half of it: (3.75, 23)
    assert lora(x).tolist() == [[20.75, 67.0]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chain": 2},
        {"act": torch.relu, "bias": True},
        {"sequential": True},
        {"act": torch.relu, "sequential": True},
        {"gate": 0.15},
    ],
)
def test_at_first_every_form_is_the_identity_to_the_bit(options):
    base, x = layer(), f64(4, 5, seed=1)
    made = delta(base, 2, scale=3.0, **options)
    assert torch.equal(made(x), base(x))
    trained(made)
    assert not torch.allclose(made(x), base(x))


def test_first_values_are_loras():
    made = delta(layer(), 4, generator=gen(5))
    assert torch.equal(made.down.weight, delta(layer(), 4, generator=gen(5)).down.weight)
    assert not torch.equal(made.down.weight, delta(layer(), 4, generator=gen(6)).down.weight)
    assert made.down.weight.abs().max() <= 1 / math.sqrt(5)
    assert abs(delta(nn.Linear(400, 3), 50).down.weight.var().item() * 400 - 1 / 3) < 0.02  # uniform: a^2 / 3
    assert not made.up.weight.any()
    base = layer()
    state = torch.get_rng_state()
    delta(base, 4, generator=gen(5))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_chain_of_identities_is_lora_in_value_and_gradient():
    x, target = f64(6, 5, seed=1), f64(6, 3, seed=2)
    plain, chained = (delta(layer(), 2, chain=n, generator=gen(3)) for n in (0, 3))
    for made in (plain, chained):
        made.up.weight.data.copy_(f64(3, 2, seed=4))
        (made(x) - target).square().sum().backward()
    assert torch.equal(plain(x), chained(x))
    assert torch.equal(plain.down.weight.grad, chained.down.weight.grad)
    assert torch.equal(plain.up.weight.grad, chained.up.weight.grad)
    assert all(link.grad.abs().min() > 0 for link in chained.links)
    new = sum(p.numel() for n, p in chained.named_parameters() if not n.startswith("base"))
    assert new == 2 * (5 + 3) + 3 * 2**2


def test_the_order_of_the_chain():
    made = trained(delta(layer(bias=False), 2, chain=2, scale=0.7))
    w1, w2 = made.links
    change = 0.7 * made.up.weight @ w2 @ w1 @ made.down.weight  # B W_2 W_1 A
    torch.testing.assert_close(made.merge().weight, made.base.weight + change, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"chain": 3}, {"sequential": True}, {"sequential": True, "gate": 0.3}]
)
@pytest.mark.parametrize("bias", [True, False])
def test_merged_is_the_same(options, bias):
    made, x = trained(delta(layer(bias=bias), 2, scale=0.5, **options)), f64(4, 5, seed=1)
    whole = made.merge()
    assert type(whole) is nn.Linear
    torch.testing.assert_close(whole(x), made(x), rtol=1e-12, atol=1e-12)
    single = trained(delta(layer(bias=bias), 2, scale=0.5, **options)).float()
    torch.testing.assert_close(single.merge()(x.float()), single(x.float()), rtol=1e-5, atol=1e-5)


def test_the_authors_adapters():
    # jxhe/unify-parameter-efficient-tuning, petl/petl_factory.py Adapter_Layer(init_option="lora",
    # adapter_scalar="4", adapter_layernorm_option="none"): forward(x, residual=h), then forward(h)
    x, h = wave(2, 3, a=0.8, b=0.1), wave(2, 3, a=1.9, b=0.4)
    parallel = [10.069663047790527, 8.945841789245605, -2.1422739028930664]
    parallel += [8.561847686767578, 5.094701290130615, -3.759559392929077]
    sequential = [6.837954044342041, 4.619696617126465, -2.045788288116455]
    sequential += [6.389455795288086, 6.066874980926514, -0.8826172351837158]

    class Given(nn.Module):
        def forward(self, _x):
            return h

    for name, expected in (("parallel", parallel), ("sequential", sequential)):
        behind = name == "sequential"
        made = delta(Given(), 2, d_in=3, scale=4.0, act=torch.relu, bias=True, sequential=behind)
        with torch.no_grad():
            made.down.weight.copy_(wave(2, 3, a=1.1))
            made.down.bias.copy_(wave(2, a=0.4, b=0.3))
            made.up.weight.copy_(wave(3, 2, a=0.6, b=1))
            made.up.bias.copy_(wave(3, a=0.5, b=2))
        torch.testing.assert_close(made(x).flatten(), tensor(expected), rtol=1e-5, atol=1e-5)


def test_identity_for_an_activation_makes_the_parallel_adapter_lora():
    x = f64(4, 5, seed=1)
    lora, adapter = (
        trained(delta(layer(), 2, scale=4.0, act=a, generator=gen(3))) for a in (None, lambda z: z)
    )
    assert torch.equal(lora(x), adapter(x))


def test_modules_with_tuples_and_keywords():
    class Attention(nn.Module):
        def forward(self, hidden_states, scale=None):
            return scale * hidden_states, "weights"

    made, x = trained(delta(Attention(), 2, d_in=5).double()), f64(3, 4, 5, seed=1)
    out, extra = made(hidden_states=x, scale=2)
    assert extra == "weights"
    assert torch.equal(out, made(x, 2)[0])
    torch.testing.assert_close(out, 2 * x + x @ made.down.weight.T @ made.up.weight.T)


@pytest.mark.parametrize(("g", "is_open"), [(0.1, True), (0.0999, False), (-3.0, False), (7.5, True)])
def test_a_gate_is_open_or_shut(g, is_open):
    base, x = layer(), f64(4, 5, seed=1)
    made = delta(base, 2, gate=0.15)
    assert made.open().item() == 1.0  # at first all are on
    up, down = f64(3, 2, seed=5), f64(2, 5, seed=6)
    made.up.weight.data, made.down.weight.data, made.gate.data = up, down, tensor(g, dtype=torch.float64)
    expected = base(x) + is_open * (x @ down.T @ up.T)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)
    if not is_open:
        assert torch.equal(made(x), base(x))
        assert torch.equal(made.merge().weight, base.weight)
    weight = f64(4, 3, seed=7)
    (made(x) * weight).sum().backward()
    # straight through: dL/dg is the sum of dL/dy times the branch, whether it is open or not
    assert made.gate.grad.item() == pytest.approx((weight * (x @ down.T @ up.T)).sum().item(), rel=1e-12)
    assert made.up.weight.grad.any() == is_open
    assert made.down.weight.grad.any() == is_open


def test_a_penalty_on_the_gates_shuts_what_is_not_needed():
    x, weight = f64(64, 5, seed=1), layer().weight.detach()
    useful, useless = (
        delta(layer(), 2, gate=0.15, generator=gen(2)),
        delta(layer(), 2, gate=0.15, generator=gen(3)),
    )
    target = x @ (weight + f64(3, 2, seed=4) @ f64(2, 5, seed=5)).T
    plain = x @ weight.T + layer().bias
    optimizer = torch.optim.Adam(
        [p for m in (useful, useless) for n, p in m.named_parameters() if "base" not in n]
    )
    for _ in range(300):
        fit = (useful(x) - target).square().mean() + (useless(x) - plain).square().mean()
        loss = fit + 0.5 * (useful.gate.abs() + useless.gate.abs()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert useful.gate > useful.tau
    assert useless.gate < useless.tau


@pytest.mark.errors
def test_delta_refusals():
    for options, match in (
        ({"r": 0}, r"expected r >= 1"),
        ({"chain": -1}, r"expected chain >= 0"),
        ({"bias": True}, r"expected bias only with act"),
        ({"scale": math.nan}, r"expected scale finite"),
        ({"gate": math.inf}, r"expected gate finite"),
    ):
        with pytest.raises(ValueError, match=match):
            delta(layer(), **options)
    with pytest.raises(TypeError, match=r"expected r as an int"):
        delta(layer(), 2.0)
    with pytest.raises(ValueError, match=r"expected a linear layer, got Tanh.*Name the size"):
        delta(nn.Tanh())
    with pytest.raises(ValueError, match=r"merge: expected a linear branch, got an activation"):
        delta(layer(), act=torch.relu).merge()
    with pytest.raises(ValueError, match=r"merge: expected a linear layer, got Tanh"):
        delta(nn.Tanh(), d_in=3).merge()


# givens


@pytest.mark.parametrize("d", [2, 3, 6, 7, 8, 13])
def test_pairs_are_disjoint_in_each_level_and_one_less_than_d(d):
    levels = pairs(d)
    assert sum(len(i) for i, _ in levels) == d - 1
    for i, j in levels:
        assert len({*i.tolist(), *j.tolist()}) == 2 * len(i)
    if d == 8:  # (2^r k, 2^r k + 2^(r-1))
        assert [list(zip(i.tolist(), j.tolist(), strict=True)) for i, j in levels] == [
            [(0, 1), (2, 3), (4, 5), (6, 7)],
            [(0, 2), (4, 6)],
            [(0, 4)],
        ]
    if d == 7:
        assert [list(zip(i.tolist(), j.tolist(), strict=True)) for i, j in levels] == [
            [(0, 1), (2, 3), (4, 5)],
            [(0, 2), (4, 6)],
            [(0, 4)],
        ]


def slow_rotation(d, angles):
    """R = P_1 P_2 .. as a product of dense rotations, one pair at a time."""
    r, angles = torch.eye(d, dtype=torch.float64), iter(angles)
    for first, second in pairs(d):
        for i, j in zip(first.tolist(), second.tolist(), strict=True):
            p, t = torch.eye(d, dtype=torch.float64), next(angles)
            p[i, i] = p[j, j] = math.cos(t)
            p[i, j], p[j, i] = -math.sin(t), math.sin(t)
            r = r @ p
    return r


@pytest.mark.parametrize("d", [8, 6, 7])
def test_a_rotation_of_the_input(d):
    base, x = layer(d, 4), f64(5, 3, d, seed=2)
    made = givens(base)
    assert torch.equal(made(x), base(x))
    angles = 3 * f64(d - 1, seed=3)
    made.angle.data.copy_(angles)
    r = slow_rotation(d, angles.tolist())
    rotated = made.rotate(x)
    torch.testing.assert_close(rotated, x @ r, rtol=1e-12, atol=1e-12)  # rows: (R^T x)^T = x^T R
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(r.T @ r, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(made(x), base(rotated))
    whole = made.merge()
    torch.testing.assert_close(whole(x), made(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.linalg.svdvals(whole.weight), torch.linalg.svdvals(base.weight))
    (made(x) * f64(5, 3, 4, seed=4)).sum().backward()
    assert made.angle.grad.abs().min() > 1e-6  # every angle counts
    assert made.penalty() == 0


def test_where_the_released_code_and_the_paper_agree_and_where_not():
    # ArthurLeoM/peft-givens, tuners/givens/layer.py Linear.forward and get_delta_weight, strict, W = I,
    # x = sin(0.9 i + 0.5). Level 1 alone: the same numbers, at minus their angle.
    made, x = givens(nn.Linear(4, 4, bias=False)), wave(1, 4, a=0.9, b=0.5)
    nn.init.eye_(made.base.weight)
    made.angle.data.copy_(-tensor([0.7, -0.4, 0.0]))
    theirs = tensor([[-0.26815924048423767, 1.062567949295044, 0.6641079783439636, -0.34415745735168457]])
    torch.testing.assert_close(made(x), theirs, rtol=1e-5, atol=1e-6)
    # With a second level theirs pairs 0 with 1 and 2 with 3 again: the norm goes from 1.3268 to 1.2077.
    made.angle.data.copy_(-tensor([0.7, -0.4, 0.9]))
    theirs = tensor([[-0.9973132610321045, 0.4484100043773651, 0.44633105397224426, -0.25208282470703125]])
    assert made(x).norm().item() == pytest.approx(x.norm().item(), rel=1e-6)
    assert theirs.norm().item() == pytest.approx(1.2076682, rel=1e-6)
    assert not torch.allclose(made(x), theirs, atol=0.1)


def test_adjacent_pairs_at_level_two_are_no_rotation():
    made = givens(layer(8, 4))
    made.angle.data.copy_(f64(7, seed=3))
    x = f64(5, 8, seed=2)
    made._partner1 = tensor([1, 0, 3, 2, 5, 4, 7, 6])  # the released pairing: neighbours at each level
    assert (made.rotate(x).norm(dim=-1) - x.norm(dim=-1)).abs().max() > 0.05


@pytest.mark.parametrize("d", [8, 6, 7])
def test_free_blocks(d):
    base, x = layer(d, 4), f64(5, d, seed=2)
    made = givens(base, free=True)
    assert made.block.shape == (d - 1, 2, 2)
    assert torch.equal(made(x), base(x))
    assert made.penalty() == 0
    angles = f64(d - 1, seed=3)
    made.block.data.copy_(
        torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], 1).view(-1, 2, 2)
    )
    strict = givens(base)
    strict.angle.data.copy_(angles)
    torch.testing.assert_close(made(x), strict(x), rtol=1e-12, atol=1e-12)
    trained(made)
    torch.testing.assert_close(made.merge()(x), made(x), rtol=1e-11, atol=1e-11)


def test_penalty_by_hand():
    made = givens(layer(3, 2), free=True)
    made.block.data.copy_(tensor([[[1.0, 2.0], [3.0, 5.0]], [[2.0, -1.0], [0.5, 0.25]]]))
    # columns (1, 3).(2, 5) = 17; (2, .5).(-1, .25) = -1.875: 289 + 3.515625
    assert made.penalty().item() == pytest.approx(292.515625, abs=1e-12)
    made.block.data.copy_(tensor([[[3.0, -2.0], [1.5, 4.0]], [[0.0, 0.0], [7.0, 0.0]]]))
    assert made.penalty().item() == 0  # orthogonal columns, lengths free


def test_half_precision_starts_at_the_identity():
    base = nn.Linear(8, 4).bfloat16()
    x = torch.randn(3, 8, generator=gen(1)).bfloat16()
    assert torch.equal(givens(base)(x), base(x))
    assert torch.equal(delta(base, 2)(x), base(x))
    assert givens(base).angle.dtype == torch.bfloat16


@pytest.mark.errors
def test_givens_refusals():
    with pytest.raises(ValueError, match=r"givens: expected a linear layer, got Embedding"):
        givens(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match=r"two inputs or more, got 1"):
        givens(nn.Linear(1, 3))
    with pytest.raises(TypeError, match=r"givens: expected an nn.Module, got Tensor"):
        givens(torch.ones(3, 4))


# chain_linear


def test_one_chain_is_the_layer():
    base, x = layer(5, 3), f64(4, 5, seed=1)
    assert torch.equal(chain_linear(base, [5], [3])(x), base(x))


def test_later_inputs_never_reach_earlier_outputs_not_even_through_two_layers():
    first = chain_linear(layer(6, 9), [1, 2, 3], [4, 3, 2])
    second = chain_linear(layer(9, 6), [4, 3, 2], [2, 1, 3])
    jacobian = torch.autograd.functional.jacobian(lambda x: second(torch.tanh(first(x))), f64(6, seed=1))
    outputs, inputs = tensor([0, 0, 1, 2, 2, 2]), tensor([0, 1, 1, 2, 2, 2])
    allowed = inputs <= outputs[:, None]
    assert not jacobian[~allowed].any()
    assert jacobian[allowed].abs().min() > 0


def test_the_first_chains_are_a_smaller_layer():
    base, x = layer(6, 9), f64(4, 6, seed=1)
    made = chain_linear(base, [1, 2, 3], [4, 3, 2])
    whole = made(x)
    assert torch.equal(made(x[:, :1]), whole[:, :4])
    assert torch.equal(made(x[:, :3]), whole[:, :7])
    # by hand: chain 2 of the output is W[4:7, :3] x[:3] + b[4:7]
    expected = x[:, :3] @ base.weight[4:7, :3].T + base.bias[4:7]
    torch.testing.assert_close(whole[:, 4:7], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.merge()(x), whole, rtol=1e-12, atol=1e-12)


def test_a_new_chain_leaves_the_old_model_alone():
    """A trained two-layer model, widened; its head is a plain layer over both chains, new columns 0."""
    hidden, head, x = layer(4, 6), layer(6, 3, seed=5), f64(8, 4, seed=1)
    old = head(torch.tanh(hidden(x)))
    wide = chain_linear(hidden, [4], [6], expand=(2, 5), zero=False, generator=gen(2))
    new_head = nn.Linear(11, 3).double()
    with torch.no_grad():
        new_head.weight.copy_(torch.cat([head.weight, torch.zeros(3, 5)], 1))
        new_head.bias.copy_(head.bias)
    x2 = torch.cat([x, f64(8, 2, seed=3)], 1)
    torch.testing.assert_close(new_head(torch.tanh(wide(x2))), old, rtol=1e-12, atol=1e-12)
    first_chain = wide(x)
    trainable = [p for p in wide.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trainable] == [(5, 6), (5,)]
    optimizer = torch.optim.Adam([*trainable, new_head.weight], lr=0.05)
    new_head.weight.register_hook(lambda g: torch.cat([torch.zeros(3, 6).to(g), g[:, 6:]], 1))
    target, losses = f64(8, 3, seed=4), []
    for _ in range(60):
        loss = (new_head(torch.tanh(wide(x2))) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert torch.equal(wide(x), first_chain)
    assert torch.equal(wide(x2)[:, :6], first_chain)
    small = torch.nn.functional.linear(torch.tanh(wide(x)), new_head.weight[:, :6], new_head.bias)
    torch.testing.assert_close(small, old, rtol=1e-12, atol=1e-12)


def test_new_rows_of_zeros_are_silent():
    wide = chain_linear(layer(4, 6), [4], [6], expand=(2, 5))
    assert not wide(f64(3, 6, seed=1))[:, 6:].any()
    assert (wide.in_features, wide.out_features) == (6, 11)


@pytest.mark.errors
def test_chain_linear_refusals():
    base = layer(5, 3)
    for given, match in (
        (([2, 2], [1, 2]), r"chains_in to add up to 5, got \[2, 2\]. They are widths"),
        (([5], [1, 2]), r"as many chains in as out, got 1 and 2"),
        (([5, 0], [1, 2]), r"chains_in as integers >= 1"),
        (([], []), r"chains_in as integers >= 1"),
    ):
        with pytest.raises(ValueError, match=match):
            chain_linear(base, *given)
    with pytest.raises(ValueError, match=r"expected expand\[1\] >= 1"):
        chain_linear(base, [5], [3], expand=(2, 0))
    with pytest.raises(ValueError, match=r"the first chains whole, a width of \[2, 5\], got 3"):
        chain_linear(base, [2, 3], [1, 2])(f64(4, 3))


# error_head


def mistakes(logits, labels):
    return torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logits.dtype) - logits.softmax(-1)


def test_nothing_is_predicted_at_first_and_nothing_flows_back():
    head, hidden, errors = error_head(4, 6, 2), f64(2, 5, 4).float(), f64(2, 5, 6).float()
    hidden.requires_grad_()
    errors.requires_grad_()
    assert not head(hidden, errors).any()
    nn.init.normal_(head.out.weight)
    head(hidden, errors).square().sum().backward()
    assert hidden.grad is None
    assert errors.grad is None
    assert all(p.grad is not None for p in head.parameters())


def test_a_position_sees_only_the_mistakes_before_it():
    head = error_head(4, 6, 2, generator=gen(1)).double()
    nn.init.normal_(head.out.weight)
    hidden, errors = f64(1, 5, 4), f64(1, 5, 6, seed=1)
    out = head(hidden, errors)
    for t in range(5):
        changed = errors.clone()
        changed[0, t] += 1
        moved = (head(hidden, changed) - out).abs().amax(-1)[0] > 1e-9
        assert moved.tolist() == [False] * (t + 1) + [True] * (4 - t)


def test_layers_are_averaged_and_padding_on_either_side_does_not_matter():
    head = error_head(4, 6, 2, generator=gen(1)).double()
    nn.init.normal_(head.out.weight)
    hidden, errors = f64(3, 2, 5, 4), f64(2, 5, 6, seed=1)
    out = head(hidden, errors)
    assert torch.equal(out, head(hidden.mean(0), errors))
    noise = f64(2, 3, 4, seed=2), f64(2, 3, 6, seed=3) * math.inf
    for order in (1, -1):
        h = torch.cat([hidden.mean(0), noise[0]][::order], 1)
        e = torch.cat([errors, noise[1]][::order], 1)
        mask = torch.cat([torch.ones(2, 5), torch.zeros(2, 3)][::order], 1).bool()
        padded = head(h, e, mask)
        assert padded.isfinite().all()
        torch.testing.assert_close(padded[mask], out.flatten(0, 1), rtol=1e-10, atol=1e-10)


def test_it_learns_a_pilots_mistakes():
    """A pilot that is always wrong in the same way: the predicted mistake brings it nearer the truth."""
    labels = torch.randint(5, (16, 6), generator=gen(1))
    hidden = torch.nn.functional.one_hot(labels, 8).float()
    logits = 2 * torch.nn.functional.one_hot((labels + 1) % 5, 5).float()
    head, truth = error_head(8, 5, generator=gen(2)), mistakes(logits, labels)
    assert truth.sum(-1).abs().max() < 1e-6
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(60):
        loss = (head(hidden, truth) - truth).square().sum((1, 2)).sqrt().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    onehot, q = torch.nn.functional.one_hot(labels, 5), logits.softmax(-1)
    fused = q + head(hidden, truth)
    assert (fused - onehot).abs().sum() < 0.4 * (q - onehot).abs().sum()
    torch.testing.assert_close(q + truth, onehot.float())  # the mistake itself, lam = 1: the truth


def test_the_source_of_the_first_values():
    state = torch.get_rng_state()
    a, b = (error_head(4, 6, generator=gen(1)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.blocks[0].before.weight.eq(1).all()
    assert a.norm.weight.eq(1).all()
    assert not a.blocks[0].up.bias.any()
    assert not torch.equal(error_head(4, 6).state.weight, error_head(4, 6).state.weight)


@pytest.mark.errors
def test_error_head_refusals():
    with pytest.raises(ValueError, match=r"expected vocab >= 1"):
        error_head(4, 0)
    with pytest.raises(ValueError, match=r"of one B and T, got \[2, 5, 4\] and \[2, 4, 6\]"):
        error_head(4, 6)(torch.ones(2, 5, 4), torch.ones(2, 4, 6))
