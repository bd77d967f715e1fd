"""Pins for analysis.forgetting."""

import math

import numpy as np
import pytest
import torch
from torch import tensor

from cotkit.analysis.forgetting import (
    fit_forgetting_law,
    forgetting_law,
    layer_change,
    steer_tuning,
    token_shift,
    tuning_contribution,
)
from cotkit.merge import checkpoint, save

T, F = True, False


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# token_shift


def test_rank_by_sorting():
    logits, ids = draw(1, 3, 6, 9), torch.randint(9, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[0, 0] = True  # nothing predicts the first token
    ranks = token_shift(logits, ids, mask)
    for b in range(3):
        for t in range(6):
            order = logits[b, t - 1].sort(descending=True).indices.tolist()
            expected = order.index(ids[b, t].item()) + 1 if mask[b, t] and t else 0
            assert ranks[b, t].item() == expected
    assert ranks.dtype == torch.int64


def test_greedy_tokens_of_the_base_are_unshifted():
    logits = draw(4, 2, 5, 7)
    ids = torch.cat([tensor([[3], [1]]), logits[:, :-1].argmax(-1)], 1)
    ranks = token_shift(logits, ids, torch.ones_like(ids, dtype=torch.bool))
    assert ranks.tolist() == [[0, 1, 1, 1, 1]] * 2


def test_ties_go_to_the_best_and_minus_infinity_is_last():
    logits = tensor([[[0.5, 0.5, 0.9, -math.inf], [0.0, 0.0, 0.0, 0.0]]])
    for token, rank in ((0, 2), (1, 2), (2, 1), (3, 4)):
        assert token_shift(logits, tensor([[0, token]]), tensor([[F, T]]))[0, 1].item() == rank
    shares = token_shift(
        logits.repeat(4, 1, 1), tensor([[0, 0], [0, 1], [0, 2], [0, 3]]), tensor([[F, T]] * 4)
    )
    assert (shares[:, 1] == 1).float().mean().item() == 0.25
    assert (shares[:, 1] > 3).float().mean().item() == 0.25


def test_what_is_not_counted_may_be_anything():
    logits, mask = draw(5, 1, 4, 5), tensor([[F, F, T, F]])
    spoiled = logits.clone()
    spoiled[0, [0, 2, 3]] = math.nan
    ranks = token_shift(spoiled, tensor([[-100, 77, 2, -1]]), mask)
    assert torch.equal(ranks, token_shift(logits, tensor([[0, 0, 2, 0]]), mask))
    assert token_shift(logits, tensor([[0, 0, 0, 0]]), mask & F).tolist() == [[0] * 4]
    assert token_shift(logits[:, :1], tensor([[0]]), mask[:, 2:3]).tolist() == [[0]]


# layer_change


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(3, 2)
        self.inner = torch.nn.Linear(2, 2, bias=False)
        self.head = torch.nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", tensor(4))


def copied(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


def lines(frame):
    return {tuple(row[:-3]): tuple(row[-3:]) for row in frame.itertuples(index=False, name=None)}


def test_norms_by_hand():
    before = {
        "layers.0.q_proj.weight": tensor([[3.0, 0.0], [0.0, 4.0]]),
        "layers.0.k_proj.weight": tensor([[1.0, 2.0]]),
        "layers.1.q_proj.weight": tensor([[6.0]]),
        "norm.weight": tensor([2.0]),
        "zero": tensor([0.0]),
    }
    after = {
        "layers.0.q_proj.weight": tensor([[3.0, 2.0], [0.0, 4.0]]),
        "layers.0.k_proj.weight": tensor([[1.0, 2.0]]),
        "layers.1.q_proj.weight": tensor([[5.0]]),
        "norm.weight": tensor([2.5]),
        "zero": tensor([3.0]),
    }
    every = lines(layer_change(before, after))
    assert every["layers.0.q_proj.weight",] == pytest.approx((2, 5, 0.4))
    assert every["layers.0.k_proj.weight",] == pytest.approx((0, 5**0.5, 0))
    assert every["layers.1.q_proj.weight",] == pytest.approx((1, 6, 1 / 6))
    assert every["zero",][:2] == (3, 0)
    assert math.isnan(every["zero",][2])
    # q: changes 2 and 1, norms 5 and 6
    module = lines(layer_change(before, after, group=r"(\w+)_proj"))
    assert list(module) == [("q",), ("k",)]
    assert module["q",] == pytest.approx((5**0.5, 61**0.5, (5 / 61) ** 0.5))
    both = layer_change(before, after, group=r"layers\.(?P<layer>\d+)\.(?P<module>\w+)_proj")
    assert list(both.columns) == ["layer", "module", "change", "norm", "relative"]
    assert list(lines(both)) == [("0", "q"), ("0", "k"), ("1", "q")]
    assert list(lines(layer_change(before, after, group=r"layers\.\d"))) == [("layers.0",), ("layers.1",)]
    pairs = layer_change(before, after, group=r"layers\.(\d)\.(\w)_")
    assert list(lines(pairs)) == [("0/q",), ("0/k",), ("1/q",)]


def test_doubling_one_matrix_is_a_relative_change_of_1():
    before = {"a": draw(6, 3, 2), "b": draw(7, 4)}
    frame = layer_change(before, {"a": 2 * before["a"], "b": before["b"].clone()})
    assert frame["relative"].tolist() == [pytest.approx(1.0, abs=1e-12), 0.0]


def test_tied_weights_count_once_and_integers_not_at_all():
    torch.manual_seed(0)
    model = Tied().double()
    before = copied(model)
    norm = model.embed.weight.norm().item()
    with torch.no_grad():
        model.embed.weight.mul_(3)
    frame = layer_change(before, model.state_dict())
    assert frame["group"].tolist() == ["embed.weight", "inner.weight"]
    assert frame["change"].tolist() == pytest.approx([2 * norm, 0.0])
    whole = layer_change(before, model.state_dict(), group="weight")
    assert whole["change"].tolist() == pytest.approx([2 * norm])
    torch.manual_seed(0)
    started = Tied().double().state_dict()  # tied before, copied after
    assert layer_change(started, copied(model))["group"].tolist() == ["embed.weight", "inner.weight"]


def test_half_precision_is_measured_in_double():
    before = {"w": torch.full((4096,), 1.0, dtype=torch.bfloat16)}
    after = {"w": torch.full((4096,), 1.0078125, dtype=torch.bfloat16)}  # one step of bfloat16
    assert layer_change(before, after)["change"][0] == pytest.approx(0.0078125 * 64, abs=1e-12)


def test_change_is_read_from_files_too(tmp_path):
    before, after = {"a": draw(1, 3, 2), "b": draw(2, 4)}, {"a": draw(3, 3, 2), "b": draw(4, 4)}
    files = [
        checkpoint(save(state, tmp_path / f"{i}.safetensors")) for i, state in enumerate((before, after))
    ]
    assert layer_change(*files).equals(layer_change(before, after))


# tuning_contribution, steer_tuning


def block(weight):
    return lambda x: torch.tanh(x) @ weight


def test_tuco_by_hand():
    def adds(*v):
        return lambda x: x * 0 + tensor(v, dtype=torch.float64)

    x = draw(1, 2, 3, 2)
    none, one, other = adds(0.0, 0.0), adds(1.0, -2.0), adds(4.0, 2.0)
    assert tuning_contribution([one, other], [one, other], x).tolist() == [0, 0]
    assert tuning_contribution([none, none], [one, other], x).tolist() == [1, 1]
    assert tuning_contribution([none], [none], x).tolist() == [0, 0]
    # p = (1, -2) + (4, 2) = (5, 0); f = (3, 4) + (-3, -4): they cancel
    assert tuning_contribution([one, other], [other, one], x).tolist() == [0, 0]
    # p = (1, -2), f = (3, 4): 7 of 3 + 7
    assert tuning_contribution([one], [other], x).tolist() == pytest.approx([0.7, 0.7])


def slow_tuco(base, tuned, x, last):
    x, p_sum, f_sum = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    for p, f in zip(base, tuned, strict=True):
        p_sum, f_sum, x = p_sum + p(x), f_sum + f(x) - p(x), x + f(x)
    rows = []
    for b, t in enumerate(last):
        above = f_sum[b, t].abs().sum().item()
        rows.append(above / (p_sum[b, t].abs().sum().item() + above))
    return rows, x


def test_tuco_follows_the_tuned_model():
    base = [block(draw(i, 4, 4)) for i in range(3)]
    tuned = [block(draw(i, 4, 4) + 0.3 * draw(i + 9, 4, 4)) for i in range(3)]
    x = draw(20, 2, 5, 4)
    expected, end = slow_tuco(base, tuned, x, [4, 4])
    assert tuning_contribution(base, tuned, x).tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(steer_tuning(base, tuned, x), end, rtol=0, atol=1e-12)
    ragged, _ = slow_tuco(base, tuned, x, [2, 4])  # rows padded on the right
    assert tuning_contribution(base, tuned, x, last=tensor([2, 4])).tolist() == pytest.approx(
        ragged, abs=1e-12
    )
    assert (
        tuning_contribution(base, tuned, x, last=-1)[1] == tuning_contribution(base, tuned, x[1:], last=4)[0]
    )
    small = [block(draw(i, 4, 4) + 0.01 * draw(i + 9, 4, 4)) for i in range(3)]
    assert (tuning_contribution(base, small, x) < tuning_contribution(base, tuned, x)).all()


def test_steering():
    base, tuned = [block(draw(i, 3, 3)) for i in range(2)], [block(draw(i + 5, 3, 3)) for i in range(2)]
    x = draw(20, 1, 2, 3)
    h = x
    for p in base:
        h = h + p(h)
    torch.testing.assert_close(steer_tuning(base, tuned, x, alpha=0.0), h, rtol=0, atol=1e-12)
    h = x
    for p, f in zip(base, tuned, strict=True):
        h = h + 1.25 * f(h) - 0.25 * p(h)
    torch.testing.assert_close(steer_tuning(base, tuned, x, alpha=1.25), h, rtol=0, atol=1e-12)


# forgetting_law, fit_forgetting_law


LAW = {"a": 2e4, "alpha": 0.45, "b": 30.0, "beta": 0.6, "rho": 0.8, "s": 2.4}
P, N = (v.ravel() for v in np.meshgrid([1e3, 3e3, 1e4, 1e5], [10.0, 30.0, 100.0, 1000.0]))


def test_law_by_hand():
    # s - (4^.5 + 3^2)^.5
    law = {"a": 8.0, "alpha": 0.5, "b": 6.0, "beta": 2.0, "rho": 0.5, "s": 5.0}
    assert float(forgetting_law(2.0, 2.0, **law)) == pytest.approx(5 - math.sqrt(11), abs=1e-12)
    values = forgetting_law([1.0, 2.0, 4.0], 2.0, **law)
    assert values.shape == (3,)
    assert (np.diff(values) > 0).all()
    assert (np.diff(forgetting_law(2.0, [1.0, 2.0, 4.0], **law)) > 0).all()
    assert float(forgetting_law(1e30, 1e30, **law)) == pytest.approx(5.0, abs=1e-6)


def test_fit_finds_the_law_that_made_the_points():
    values = forgetting_law(P, N, **LAW)
    found = fit_forgetting_law(P, N, values)
    assert list(found) == list(LAW)
    assert forgetting_law(P, N, **found) == pytest.approx(values, abs=1e-6)
    assert found == pytest.approx(LAW, rel=0.02)
    mixed = np.random.default_rng(0).permutation(len(P))
    again = fit_forgetting_law(P[mixed].tolist(), N[mixed].tolist(), values[mixed].tolist())
    assert again == pytest.approx(found, rel=0.02)


def test_fit_to_noisy_points_predicts_points_left_out():
    noise = np.random.default_rng(1).normal(0, 0.01, len(P))
    kept = np.arange(len(P)) % 5 > 0
    found = fit_forgetting_law(P[kept], N[kept], (forgetting_law(P, N, **LAW) + noise)[kept])
    left = forgetting_law(P[~kept], N[~kept], **found) - forgetting_law(P[~kept], N[~kept], **LAW)
    assert np.abs(left).max() < 0.05
    inside = forgetting_law(P[kept], N[kept], **found) - (forgetting_law(P, N, **LAW) + noise)[kept]
    true = noise[kept]
    assert inside @ inside <= true @ true  # least squares: no worse than the truth itself
    assert fit_forgetting_law(P[kept], N[kept], (forgetting_law(P, N, **LAW) + noise)[kept]) == found


def test_fit_of_a_falling_loss_is_that_of_its_negative():
    loss = 1.5 + ((300.0 / P) ** 0.5 + (20.0 / N) ** 0.5) ** 1.2
    found = fit_forgetting_law(P, N, -loss)
    assert found["s"] == pytest.approx(-1.5, abs=0.01)
    assert -forgetting_law(P, N, **found) == pytest.approx(loss, abs=1e-6)


@pytest.mark.errors
def test_refusals_of_blocks_and_laws():
    x, f = draw(1, 2, 3, 2), [block(draw(2, 2, 2))]
    y = forgetting_law(P, N, **LAW)
    for call, error, text in (
        (lambda: tuning_contribution([], [], x), ValueError, "as many base_blocks as tuned_blocks, got 0, 0"),
        (lambda: steer_tuning(f, f * 2, x), ValueError, "got 1, 2"),
        (lambda: steer_tuning(f, f, x[0]), ValueError, r"hidden \[B, T, D\]"),
        (lambda: steer_tuning(f, f, x, alpha=math.nan), ValueError, "alpha finite"),
        (lambda: tuning_contribution(f, f, x, last=3), ValueError, "last among 3 tokens, got 3"),
        (lambda: tuning_contribution(f, f, x, last=tensor([1])), ValueError, r"a number or \[B\], got \[1\]"),
        (lambda: forgetting_law(0, 1, **LAW), ValueError, "parameters > 0"),
        (lambda: forgetting_law(1, 1, **LAW | {"a": -1.0}), ValueError, "a > 0"),
        (lambda: fit_forgetting_law(P, N, y[:-1]), ValueError, "one finite forgetting per point"),
        (lambda: fit_forgetting_law(P, N, y * math.nan), ValueError, "one finite forgetting per point"),
        (lambda: fit_forgetting_law(P[:6], N[:6], y[:6]), ValueError, "seven points or more"),
        (lambda: fit_forgetting_law(P * 0 + 1, N, y), ValueError, "of several P and N"),
        (lambda: fit_forgetting_law(P, N, -y), ValueError, "grows with P or N, got none"),
        (lambda: fit_forgetting_law(P, -N, y), ValueError, "finite steps > 0"),
    ):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.errors
def test_refusals():
    logits, ids, mask = draw(8, 2, 3, 5), torch.zeros(2, 3, dtype=torch.long), tensor([[F, T, T]] * 2)
    with pytest.raises(ValueError, match=r"ids in \[0, 5\) where they count"):
        token_shift(logits, ids - 100, mask)
    with pytest.raises(ValueError, match="without NaN, got NaN"):
        token_shift(logits * math.nan, ids, mask)
    with pytest.raises(ValueError, match=r"base_logits \[2, 2, 5\].*Pass the logits of every position"):
        token_shift(logits[:, 1:], ids, mask)
    with pytest.raises(TypeError, match="tuned_ids as an integer tensor"):
        token_shift(logits, ids.float(), mask)
    with pytest.raises(TypeError, match="mask as a bool tensor"):
        token_shift(logits, ids, ids)

    weights = {"a": draw(9, 2), "b": draw(10, 2)}
    with pytest.raises(ValueError, match="expected weights before as a copy"):
        layer_change(weights, weights)
    with pytest.raises(ValueError, match="got 'b' in before but not in after"):
        layer_change(weights, {"a": weights["a"]})
    with pytest.raises(ValueError, match="expected 'a' of one shape"):
        layer_change(weights, {"a": draw(9, 3), "b": draw(10, 2)})
    with pytest.raises(ValueError, match="expected names that match 'q', got none of 2"):
        layer_change(weights, {"a": draw(11, 2), "b": draw(12, 2)}, group="q")
    with pytest.raises(TypeError, match="expected 'a' as a tensor, got float in before"):
        layer_change({"a": 1.0}, {"a": 2.0})
