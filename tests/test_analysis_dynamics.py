"""Pins for analysis.dynamics: the squeezing effect and the kernel behind it."""

import math

import pytest
import torch
from torch import tensor

from cotkit.analysis.dynamics import entk, flat_grad, squeeze
from cotkit.losses.preference import dpo

# Softmax of the authors' linear layer: x = (.8, -.5), so x.W and |x|^2 = .89
LOGITS = [[-0.1, -1.25, 1.975, 0.325, -0.75]]


@pytest.mark.parametrize(
    ("negative", "positive", "after"),
    [
        (1, None, [0.06984917822995713, 0.012555243577236145, 0.7724028524858639, 0.10954029877290293,
                   0.03565242693403999]),
        (2, None, [0.1013359745535681, 0.031069963525457985, 0.656950977342898, 0.1589191628353385,
                   0.05172392174273744]),
        (4, 0, [0.1442784459138636, 0.026782403462710307, 0.6736731715703299, 0.1293788710403355,
                0.025887108012760663]),
    ],
)  # fmt: skip
def test_squeeze_equals_the_authors_notebook(f64, negative, positive, after):
    """Numbers of Joshua-Ren/Learning_dynamics_LLM notebook/squeeze_effect.ipynb, case_all, both rates 0.6."""
    raised = None if positive is None else tensor([positive])
    got = squeeze(f64(LOGITS), tensor([negative]), positive=raised, lr=0.6 * 0.89)
    assert got[0].tolist() == pytest.approx(after, abs=1e-12)


def test_squeeze_by_hand(f64):
    # pi = .5, .3, .2; token 2 down by .8, the others up by .5 and .3
    logits = f64([[math.log(0.5), math.log(0.3), math.log(0.2)]])
    up = [0.5 * math.exp(0.5), 0.3 * math.exp(0.3), 0.2 * math.exp(-0.8)]
    got = squeeze(logits, tensor([2]))
    assert got[0].tolist() == pytest.approx([u / sum(up) for u in up], abs=1e-12)


def test_squeeze_is_the_ascent_step_of_nll(f64):
    logits = f64([[0.3, -1.2, 0.9, 0.1]])
    (-logits.log_softmax(-1)[0, 1]).backward()
    stepped = (logits + 0.7 * logits.grad).softmax(-1)
    torch.testing.assert_close(squeeze(logits, tensor([1]), lr=0.7), stepped, rtol=0, atol=1e-12)


def test_what_squeezing_does():
    logits = torch.tensor([[3.0, 0.5, 0.0, -2.0], [1.0, 0.9, 0.8, 0.7]], dtype=torch.float64)
    before, after = logits.softmax(-1), squeeze(logits, tensor([3, 3]), lr=0.5)
    assert after.sum(-1).tolist() == pytest.approx([1, 1], abs=1e-12)
    assert (after[:, 3] < before[:, 3]).all()
    assert (after[:, 0] > before[:, 0]).all()  # the likeliest of the rest rises
    assert (after[0, 1:] < before[0, 1:]).all()  # peaky: it takes from all others too
    assert (after[1, :3] > before[1, :3]).all()  # flat: nearly all gain
    uniform = squeeze(torch.zeros(1, 4, dtype=torch.float64), tensor([1]), lr=0.3)[0]
    assert uniform[0] == uniform[2] == uniform[3] > 0.25 > uniform[1]
    assert torch.equal(squeeze(logits, tensor([3, 3]), lr=0.0), before)


def network(params, x):
    return 2 * torch.tanh(params["out"] @ torch.tanh(params["w"] @ x + params["b"]))


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {"w": draw(5, 3), "b": draw(5), "out": draw(4, 5)}, draw(3), draw(3)


def predicted(params, x_u, x_o, g):
    pi = network(params, x_u).softmax(-1)
    a = torch.eye(4, dtype=torch.float64) - torch.ones(4, 1, dtype=torch.float64) @ pi[None]
    assert (a @ torch.ones(4, dtype=torch.float64)).abs().max() < 1e-12
    return -a @ entk(network, params, x_u, x_o) @ g


def observed(params, x_u, loss, lr):
    live = {name: p.clone().requires_grad_() for name, p in params.items()}
    loss(live).backward()
    moved = {name: p.detach() - lr * p.grad for name, p in live.items()}
    return (network(moved, x_u).log_softmax(-1) - network(params, x_u).log_softmax(-1)) / lr


def test_kernel_predicts_a_step_of_fine_tuning(parts):
    params, x_u, x_o = parts
    g = network(params, x_o).softmax(-1)
    g[2] -= 1
    seen = observed(params, x_u, lambda p: -network(p, x_o).log_softmax(-1)[2], 1e-6)
    torch.testing.assert_close(predicted(params, x_u, x_o, g), seen, rtol=1e-3, atol=1e-4)


def test_kernel_predicts_a_step_of_dpo(parts):
    params, x_u, x_o = parts
    ref = torch.tensor([-1.0, -2.5], dtype=torch.float64)

    def loss(p):
        logps = network(p, x_o).log_softmax(-1)
        return dpo(logps[1:2], logps[3:4], ref[:1], ref[1:], beta=0.4)

    logps = network(params, x_o).log_softmax(-1)
    h = 0.4 * ((logps[1] - ref[0]) - (logps[3] - ref[1]))
    g = torch.zeros(4, dtype=torch.float64)
    g[1], g[3] = -1, 1  # (pi - e_+) - (pi - e_-)
    g *= 0.4 * torch.sigmoid(-h)
    seen = observed(params, x_u, loss, 1e-6)
    torch.testing.assert_close(predicted(params, x_u, x_o, g), seen, rtol=1e-3, atol=1e-4)


def test_kernel_of_an_input_with_itself_is_symmetric_and_sides_matter(parts):
    params, x_u, x_o = parts
    same, mixed = entk(network, params, x_o, x_o), entk(network, params, x_u, x_o)
    torch.testing.assert_close(same, same.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed, entk(network, params, x_o, x_u).T, rtol=0, atol=1e-12)
    assert not torch.allclose(mixed, mixed.T)
    assert not mixed.requires_grad


def test_flat_grad_keeps_order_and_fills_with_zeros(f64):
    a, b, frozen, unused = f64([[1.0, 2.0]]), f64(3.0), torch.ones(1), f64(5.0, 6.0)
    loss = (a**2).sum() * b[0]
    got = flat_grad(loss, [unused, frozen, b, a])
    assert got.tolist() == [0, 0, 0, 5.0, 6.0, 12.0]  # d/db = 1 + 4; d/da = 2 a b
    assert torch.equal(flat_grad(loss, [unused, frozen, b, a]), got)  # the graph is still there
    assert flat_grad(b.sum(), [frozen]).tolist() == [0.0]
    assert a.grad is None


@pytest.mark.errors
def test_refusals(f64):
    with pytest.raises(ValueError, match=r"squeeze: expected logits \[B, V\], got \[3\]"):
        squeeze(f64(1.0, 2.0, 3.0), tensor([1]))
    with pytest.raises(ValueError, match=r"negative \[B\] with B = 1, got \[2\]"):
        squeeze(f64([[1.0, 2.0]]), tensor([1, 0]))
    with pytest.raises(TypeError, match="positive as an integer tensor, got float64"):
        squeeze(f64([[1.0, 2.0]]), tensor([1]), positive=f64(1.0))
    with pytest.raises(ValueError, match=r"lr >= 0, got -1"):
        squeeze(f64([[1.0, 2.0]]), tensor([1]), lr=-1)
    with pytest.raises(ValueError, match="entk: expected parameters, got none"):
        entk(network, {}, None, None)
    with pytest.raises(ValueError, match=r"expected logits \[V\] of one input, got \[2, 3\]"):
        entk(lambda p, _: p["w"], {"w": torch.ones(2, 3)}, None, None)
    with pytest.raises(ValueError, match="loss as a scalar with a graph"):
        flat_grad(torch.ones(2), [f64(1.0)])
    with pytest.raises(ValueError, match="expected parameters, got none"):
        flat_grad(f64([1.0]).sum(), [])
