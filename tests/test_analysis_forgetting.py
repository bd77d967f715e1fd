"""Pins for analysis.forgetting."""

import math

import pytest
import torch
from torch import tensor

from cotkit.analysis.forgetting import layer_change, token_shift

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
