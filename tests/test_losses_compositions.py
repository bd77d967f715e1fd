"""Methods that need no function of their own: what they compose, and the limits their papers imply."""

import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import cross_entropy

from cotkit import lab, tokens
from cotkit.losses.preference import rrhf
from cotkit.losses.sft import nll

T, F = True, False


# TransferTransfo (2019) arXiv:1901.08149: likelihood of the gold reply + choice among the candidates


def transfer(logps, mask, scores, gold, lm=1.0, choice=1.0):
    """Flat rows [B * C] of candidates, scores [B, C], gold [B]."""
    is_gold = torch.nn.functional.one_hot(gold, scores.shape[1]).bool().flatten()
    return lm * nll(logps, mask & is_gold[:, None]) + choice * cross_entropy(scores, gold)


def test_transfer_transfo_hand_value(f64):
    logps = f64([[0.0, -1.0, -3.0], [0.0, -0.5, -0.25], [0.0, -7.0, 0.0]])
    mask = tensor([[F, T, T], [F, T, T], [F, T, F]])
    scores = f64([[math.log(2.0), math.log(5.0), 0.0]])
    for gold, likelihood, chance in (
        (0, 4 / 2, 2 / 8),
        (1, 0.75 / 2, 5 / 8),
        (2, 7.0, 1 / 8),
    ):  # gold anywhere
        loss = transfer(logps, mask, scores, tensor([gold]), lm=2.0, choice=0.5)
        assert loss.item() == pytest.approx(2 * likelihood - 0.5 * math.log(chance), abs=1e-12)


def test_transfer_transfo_distractors_get_no_likelihood(f64):
    logps, scores = f64([[0.0, -1.0, -3.0], [0.0, -0.5, -0.25]]), f64([[0.3, 0.3]])
    mask = tensor([[F, T, T], [F, T, T]])
    loss = transfer(logps, mask, scores, tensor([1]), lm=0.0)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)  # equal scores: ln C
    transfer(logps, mask, scores, tensor([1])).backward()
    assert not logps.grad[0].any()
    assert logps.grad[1, 1:].tolist() == [-0.5, -0.5]
    torch.testing.assert_close(scores.grad, f64([[0.5, -0.5]]).detach())


# MLM ranking (2020) arXiv:2004.14074: log P(premise | hypothesis) with a causal model


def scored(model, tokenizer, given, wanted):
    row = {"prompt": given + "\n", "completion": wanted}
    batch = tokens.encode([row], tokenizer, malformed="keep")
    counted = tokens.mask(batch["segments"], tokens.THOUGHT)  # the text alone, without the end token
    return tokens.seq_logps(tokens.model_logps(model, batch), counted)


def test_premise_score_does_not_feel_the_length_of_the_hypothesis():
    model, tokenizer = lab.load("tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every token is as likely as any other
    premise, short, long = "5 boxes fell", "the shelf broke", "a truck with 3 wheels drove into the shelf"
    by_premise = [scored(model, tokenizer, h, premise) for h in (short, long)]
    assert by_premise[0].item() == by_premise[1].item() < 0
    by_hypothesis = [scored(model, tokenizer, premise, h) for h in (short, long)]
    assert by_hypothesis[0] > by_hypothesis[1]  # the other way round the shorter one wins


def test_premise_score_is_a_masked_sum():
    model, tokenizer = lab.load("tiny")
    row = {"prompt": "2 apples\n", "completion": "3 pears"}
    batch = tokens.encode([row], tokenizer, malformed="keep")
    ids, start = batch["input_ids"], int((batch["labels"] != -100).int().argmax())
    logp = model(input_ids=ids).logits.log_softmax(-1)[0]
    n = ids.shape[1] - 1  # the end token is left out
    by_hand = sum(logp[t - 1, ids[0, t]] for t in range(start, n))
    found = scored(model, tokenizer, "2 apples", "3 pears")
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_premise_ranking_is_a_margin_on_the_scores(f64):
    rank = tensor([[0, 1, 1]])
    loss = rrhf(f64([[1.0, 0.75, 0.25]]), rank, margin=0.5)  # max(0, .5 - 1 + .75) + max(0, .5 - 1 + .25)
    assert loss.item() == pytest.approx(0.25, abs=1e-12)
    assert rrhf(f64([[8.0, 7.75, 7.25]]), rank, margin=0.5).item() == pytest.approx(0.25, abs=1e-12)
    assert rrhf(f64([[1.0, 0.5, 0.25]]), rank, margin=0.5).item() == 0


# Vega v1 (2023) arXiv:2302.09268: transductive rounds, a plain loop over two callables


def transductive(train, predict, rows, unlabelled, rounds=1):
    model = train(rows)
    for _ in range(rounds):
        model = train([*rows, *(row | {"label": predict(model, row)} for row in unlabelled)])
    return model


def test_transductive_rounds():
    def train(rows):  # the mean of each class
        means = {}
        for label in sorted({row["label"] for row in rows}):
            xs = [row["x"] for row in rows if row["label"] == label]
            means[label] = sum(xs) / len(xs)
        return means

    def predict(model, row):
        assert "label" not in row  # no gold label of the test is there to be read
        return min(model, key=lambda label: abs(model[label] - row["x"]))

    rows = [{"x": 0.0, "label": "a"}, {"x": 4.0, "label": "b"}]
    unlabelled = [{"x": x} for x in (1.0, 3.5, 5.5, 6.0)]
    assert transductive(train, predict, rows, unlabelled, rounds=0) == train(rows)
    once = transductive(train, predict, rows, unlabelled)
    assert once == {"a": 0.5, "b": (4 + 3.5 + 5.5 + 6) / 4}
    assert predict(train(rows), {"x": 2.25}) == "b"
    assert predict(once, {"x": 2.25}) == "a"  # the boundary moved into the gap between the clusters
    assert unlabelled[0] == {"x": 1.0}
