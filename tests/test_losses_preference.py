import math

import pytest
import torch
from torch import tensor

from cotkit.losses.preference import constraint_alignment, rrhf

CONSTRAINTS = [None, "detach", "boundary"]


def loop(scores, rank, valid, constraint, beta):
    """Ranking form, written from the formula with four loops; returns one loss per group."""
    losses = []
    for s, r, v in zip(scores, rank, valid, strict=True):
        total = 1.0
        for i in range(len(s)):
            for j in range(len(s)):
                if not (v[i] and v[j] and r[i] < r[j]):
                    continue
                if constraint == "detach":
                    total = total + torch.exp(s[j].detach() - s[i])
                else:
                    total = total + torch.exp(s[j] - s[i])
                if constraint == "boundary":
                    lowest = math.inf
                    for k in range(len(s)):
                        if v[k] and r[k] < r[j]:
                            lowest = min(lowest, s[k].item())
                    total = total + torch.exp(2 * lowest - 2 * beta - s[i].item() - s[j])
        losses.append(torch.log(torch.as_tensor(total, dtype=scores.dtype)))
    return torch.stack(losses)


def binary(f64, wrong=-1.5):
    return f64([[-1.0, -2.0, wrong]]), tensor([[0, 0, 1]])


# Values of the method entry: right -1 and -2, wrong -1.5


def test_plain_eq6(f64):
    scores, rank = binary(f64)
    loss = constraint_alignment(scores, rank, constraint=None)
    up, down = math.exp(-1.5 + 1.0), math.exp(-1.5 + 2.0)
    assert loss.item() == pytest.approx(math.log(1 + up + down), abs=1e-12)
    assert loss.item() == pytest.approx(1.1803, abs=5e-5)
    loss.backward()
    z = 1 + up + down
    expected = tensor([[-up / z, -down / z, (up + down) / z]], dtype=torch.float64)
    torch.testing.assert_close(scores.grad, expected, rtol=0, atol=1e-12)


def test_boundary_adds_the_pull_back(f64):
    scores, rank = binary(f64)
    loss = constraint_alignment(scores, rank, boundary=0.5)
    # s* = -2; T = -4 - 1 + 1 = -4 and -4 - 1 + 2 = -3; exp(T + 1.5) = e^-2.5 and e^-1.5
    z = 1 + math.exp(-0.5) + math.exp(0.5) + math.exp(-2.5) + math.exp(-1.5)
    assert loss.item() == pytest.approx(math.log(z), abs=1e-12)
    assert loss.item() == pytest.approx(1.2699, abs=5e-5)
    loss.backward()
    expected = [-math.exp(-0.5), -math.exp(0.5)]  # T is a constant: better chains feel the first term only
    expected.append(math.exp(-0.5) + math.exp(0.5) - math.exp(-2.5) - math.exp(-1.5))
    torch.testing.assert_close(scores.grad[0] * z, tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("wrong", "push"), [(-2.4, 0.0623), (-2.5, 0.0), (-2.6, -0.0623)])
def test_boundary_turns_the_push_on_the_wrong_chain(f64, wrong, push):
    scores, rank = binary(f64, wrong)  # B = min(-1, -2) - 0.5 = -2.5
    constraint_alignment(scores, rank, boundary=0.5).backward()
    assert scores.grad[0, 2].item() == pytest.approx(push, abs=5e-5 if push else 1e-15)


@pytest.mark.parametrize("right", [[-0.7], [-0.7, -1.9], [-0.7, -1.9, -1.2, -0.1]])
def test_boundary_is_the_same_for_any_number_of_right_chains(f64, right):
    wrong = min(right) - 0.15  # exactly the default boundary
    scores = f64([[*right, wrong]])
    constraint_alignment(scores, tensor([[0] * len(right) + [1]])).backward()
    assert scores.grad[0, -1].item() == pytest.approx(0.0, abs=1e-15)
    assert (scores.grad[0, :-1] < 0).all()


def test_detach_has_the_plain_value_and_moves_right_chains_only(f64):
    scores, rank = binary(f64)
    loss = constraint_alignment(scores, rank, constraint="detach")
    assert loss.item() == constraint_alignment(scores, rank, constraint=None).item()
    loss.backward()
    assert scores.grad[0, 2].item() == 0.0
    z = 1 + math.exp(-0.5) + math.exp(0.5)
    assert scores.grad[0, :2].tolist() == pytest.approx([-math.exp(-0.5) / z, -math.exp(0.5) / z], abs=1e-12)


def test_far_boundary_is_no_constraint(f64):
    scores, rank = binary(f64)
    far = constraint_alignment(scores, rank, boundary=50.0)
    assert far.item() == pytest.approx(constraint_alignment(scores, rank, constraint=None).item(), abs=1e-12)


# Ranking feedback


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_ranking_equals_the_loops(f64, constraint):
    values = [[-1.3, -0.4, -2.2, -0.9, -1.7], [-0.6, -3.1, -1.1, -2.4, -0.2], [-1.0, -1.9, -0.3, -0.8, -2.7]]
    rank = tensor([[2, 0, 3, 1, 1], [1, 1, 0, 2, 5], [0, 4, 4, 7, 1]])  # ties, gaps, any order
    valid = tensor([[True] * 5, [True, True, True, True, False], [True, True, False, True, True]])
    ours, theirs = f64(values), f64(values)
    loss = constraint_alignment(ours, rank, valid, constraint=constraint, boundary=0.35)
    expected = loop(theirs, rank, valid, constraint, 0.35).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_three_ranks_by_hand(f64):
    scores = f64([[-2.0, -1.0, -1.5]])
    rank = tensor([[0, 1, 2]])
    # pairs (better, worse): (0,1): e^1; (0,2): e^.5; (1,2): e^-.5
    # s* of 1: -2, of 2: min(-2, -1) = -2; T01 = -4-.2+2 = -2.2, T02 = -2.2, T12 = -4-.2+1 = -3.2
    z = 1 + math.exp(1) + math.exp(0.5) + math.exp(-0.5)
    assert constraint_alignment(scores, rank, constraint=None).item() == pytest.approx(math.log(z), abs=1e-12)
    z += math.exp(-2.2 + 1.0) + math.exp(-2.2 + 1.5) + math.exp(-3.2 + 1.5)
    assert constraint_alignment(scores, rank, boundary=0.1).item() == pytest.approx(math.log(z), abs=1e-12)


# What must not matter


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_constant_added_to_all_scores_changes_nothing(f64, constraint):
    scores, rank = f64([[-1.3, -0.4, -2.2], [-0.6, -3.1, -1.1]]), tensor([[1, 0, 1], [0, 2, 1]])
    moved = constraint_alignment(scores + 5.25, rank, constraint=constraint)
    assert moved.item() == pytest.approx(
        constraint_alignment(scores, rank, constraint=constraint).item(), abs=1e-12
    )


def test_sums_instead_of_means_matter(f64):
    scores, rank = f64([[-1.0, -1.5]]), tensor([[0, 1]])
    lengths = tensor([[7, 3]])
    for constraint in CONSTRAINTS:
        means = constraint_alignment(scores, rank, constraint=constraint)
        sums = constraint_alignment(scores * lengths, rank, constraint=constraint)
        assert abs(means.item() - sums.item()) > 0.1


@pytest.mark.parametrize("filler", [0.0, -9.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_padding_of_k_changes_nothing(f64, constraint, filler):
    scores, rank = binary(f64)
    loss = constraint_alignment(scores, rank, constraint=constraint)
    loss.backward()
    wide = f64([[filler, -1.0, -2.0, filler, -1.5]])
    valid = tensor([[False, True, True, False, True]])
    padded = constraint_alignment(wide, tensor([[0, 0, 0, 9, 1]]), valid, constraint=constraint)
    padded.backward()
    assert padded.item() == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(wide.grad[0, valid[0]], scores.grad[0], rtol=0, atol=1e-12)
    assert not wide.grad[0, ~valid[0]].any()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_split_with_denom_changes_nothing(f64, constraint):
    scores = f64([[-1.3, -0.4, -2.2], [-0.6, -3.1, -1.1], [-0.5, -0.7, -0.9]])
    rank = tensor([[1, 0, 1], [0, 2, 1], [0, 0, 0]])  # the last group has no pair and counts all the same
    whole = constraint_alignment(scores, rank, constraint=constraint)
    parts = [
        constraint_alignment(scores[i : i + 1], rank[i : i + 1], constraint=constraint, denom=3)
        for i in range(3)
    ]
    assert whole.item() == pytest.approx(sum(parts).item(), abs=1e-12)
    tensor_denom = constraint_alignment(scores, rank, constraint=constraint, denom=tensor(6))
    assert tensor_denom.item() == pytest.approx(whole.item() / 2, abs=1e-12)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize(
    ("rank", "valid"),
    [
        ([0, 0, 0], [True] * 3),
        ([1, 1, 1], [True] * 3),
        ([0, 1, 2], [False] * 3),
        ([0, 0, 1], [True, True, False]),
    ],
)
def test_groups_without_a_pair_give_zero_and_no_gradient(f64, constraint, rank, valid):
    scores = f64([[-1.0, -2.0, -1.5]])
    loss = constraint_alignment(scores, tensor([rank]), tensor([valid]), constraint=constraint)
    loss.backward()
    assert loss.item() == 0.0
    assert not scores.grad.any()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_groups_and_no_candidates(shape):
    scores = torch.zeros(shape, requires_grad=True)
    loss = constraint_alignment(scores, torch.zeros(shape, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_extreme_scores_stay_finite(f64, constraint):
    scores = f64([[-900.0, -0.1, -700.0]])
    loss = constraint_alignment(scores, tensor([[0, 1, 1]]), constraint=constraint)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_low_precision_agrees_with_float64(dtype, rtol, constraint):
    generator = torch.Generator().manual_seed(2)
    scores = -2 * torch.rand(6, 8, generator=generator, dtype=torch.float64)
    rank = torch.randint(3, (6, 8), generator=generator)
    exact = constraint_alignment(scores, rank, constraint=constraint)
    low = constraint_alignment(scores.to(dtype), rank, constraint=constraint)
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), exact, rtol=rtol, atol=0)


# Refusals


@pytest.mark.errors
def test_refusals(f64):
    scores, rank = binary(f64)
    with pytest.raises(ValueError, match=r"scores \[B, K\], got \[1, 3, 5\]. These look like logits"):
        constraint_alignment(torch.zeros(1, 3, 5), rank)
    with pytest.raises(ValueError, match=r"got \[3\]. For flat rows with a group number call tokens.grouped"):
        constraint_alignment(scores[0], rank[0])
    with pytest.raises(ValueError, match=r"equal shapes, got scores \[1, 3\], rank \[1, 2\]"):
        constraint_alignment(scores, rank[:, 1:])
    with pytest.raises(
        TypeError, match=r"rank as an integer tensor \(0 = best\), got bool.*\(~correct\).long\(\)"
    ):
        constraint_alignment(scores, rank == 0)
    with pytest.raises(TypeError, match=r"got float32\. A reward is not a rank"):
        constraint_alignment(scores, rank.float())
    with pytest.raises(TypeError, match=r"valid as a bool tensor"):
        constraint_alignment(scores, rank, rank)
    with pytest.raises(ValueError, match=r"equal shapes, got scores \[1, 3\], valid \[1, 2\]"):
        constraint_alignment(scores, rank, rank[:, 1:] == 0)
    with pytest.raises(TypeError, match="scores as a float tensor, got int64"):
        constraint_alignment(rank, rank)
    with pytest.raises(ValueError, match="constraint to be one of 'boundary', 'detach', None, got 'margin'"):
        constraint_alignment(scores, rank, constraint="margin")
    with pytest.raises(ValueError, match=r"boundary >= 0, got -0\.1"):
        constraint_alignment(scores, rank, boundary=-0.1)
    with pytest.raises(ValueError, match="denom > 0"):
        constraint_alignment(scores, rank, denom=-1)
    with pytest.raises(TypeError, match=r"scores as a torch\.Tensor, got list"):
        constraint_alignment([[-1.0]], rank)


# RRHF


def rrhf_loop(scores, rank, valid, constraint, margin, beta):
    """Hinge on every ordered pair, written with loops; returns one loss per group."""
    losses = []
    for s, r, v in zip(scores, rank, valid, strict=True):
        total = torch.zeros((), dtype=scores.dtype)
        for j in range(len(s)):
            better = [i for i in range(len(s)) if v[i] and v[j] and r[i] < r[j]]
            for i in better:
                s_j = s[j].detach() if constraint == "detach" else s[j]
                if margin + s_j - s[i] > 0:
                    total = total + margin + s_j - s[i]
                floor = min(s[k].item() for k in better) - beta
                if constraint == "boundary" and floor > s[j]:
                    total = total + floor - s[j]
        losses.append(total)
    return torch.stack(losses)


def test_rrhf_by_hand(f64):
    scores = f64([[-1.0, -1.4, -0.7]])  # ranks 0, 1, 2: pairs (0,1) in order, (0,2) off by .3, (1,2) by .7
    loss = rrhf(scores, tensor([[0, 1, 2]]))
    assert loss.item() == pytest.approx(0.3 + 0.7, abs=1e-12)
    loss.backward()
    assert scores.grad.tolist() == [[-1.0, -1.0, 2.0]]


def test_rrhf_equals_the_authors_code(f64):
    """Numbers of GanjinZero/RRHF train.py, RRHFTrainer.rrhf_loss, rewards .2 .1 .9 .5 .5."""
    scores = f64([[-1.3, -0.4, -2.2, -0.9, -1.7]])
    loss = rrhf(scores, tensor([[2, 3, 0, 1, 1]]))
    assert loss.item() == pytest.approx(7.6, abs=1e-12)
    loss.backward()
    assert scores.grad.tolist() == [[1.0, 4.0, -4.0, 0.0, -1.0]]


def test_margin_ranking_of_the_entry(f64):
    gold_first = tensor([[0, 1]])
    assert rrhf(f64([[1.0, 0.8]]), gold_first, margin=0.5).item() == pytest.approx(0.3, abs=1e-12)
    assert rrhf(f64([[1.0, 0.45]]), gold_first, margin=0.5).item() == 0.0  # ahead by the margin
    three = f64([[-1.0, -1.2, -1.75]])  # (.5 - .2) + 0, as the mean over the two pairs
    loss = rrhf(three, tensor([[0, 1, 1]]), margin=0.5, denom=2)
    assert loss.item() == pytest.approx(0.15, abs=1e-12)


@pytest.mark.parametrize(("wrong", "push"), [(-2.375, 0.0), (-2.5, 0.0), (-2.625, -2.0), (-1.875, 1.0)])
def test_rrhf_boundary_turns_the_push(f64, wrong, push):
    """Right -1 and -2, boundary .5: B = -2.5; above it 0 until a pair is out of order, below it up."""
    scores, rank = binary(f64, wrong)
    rrhf(scores, rank, constraint="boundary", boundary=0.5).backward()
    assert scores.grad[0, 2].item() == push
    scores, rank = binary(f64, wrong)
    rrhf(scores, rank, constraint="boundary", margin=0.5, boundary=0.5).backward()  # no dead zone: one point
    near = {-2.375: 1.0, -2.5: 0.0, -2.625: -2.0, -1.875: 1.0}
    assert scores.grad[0, 2].item() == near[wrong]


def test_rrhf_detach_has_the_plain_value_and_moves_better_chains_only(f64):
    scores, rank = binary(f64)
    loss = rrhf(scores, rank, margin=0.7, constraint="detach")
    assert loss.item() == rrhf(scores, rank, margin=0.7).item() == pytest.approx(0.2 + 1.2, abs=1e-12)
    loss.backward()
    assert scores.grad.tolist() == [[-1.0, -1.0, 0.0]]


RANKED = [[-1.3, -0.4, -2.2, -0.9, -1.7], [-0.6, -3.1, -1.1, -2.4, -0.2], [-1.0, -1.9, -0.3, -0.8, -2.7]]
RANKS = tensor([[2, 0, 3, 1, 1], [1, 1, 0, 2, 5], [0, 4, 4, 7, 1]])  # ties, gaps, any order
VALID = tensor([[True] * 5, [True, True, True, True, False], [True, True, False, True, True]])


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_rrhf_equals_the_loops(f64, constraint, margin):
    ours, theirs = f64(RANKED), f64(RANKED)
    loss = rrhf(ours, RANKS, VALID, margin=margin, constraint=constraint, boundary=0.35)
    expected = rrhf_loop(theirs, RANKS, VALID, constraint, margin, 0.35).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.errors
def test_rrhf_refusals(f64):
    scores, rank = binary(f64)
    with pytest.raises(ValueError, match=r"rrhf: expected boundary >= margin, got 0\.15 < 0\.5"):
        rrhf(scores, rank, margin=0.5, constraint="boundary")
    with pytest.raises(ValueError, match=r"margin >= 0, got -0\.5"):
        rrhf(scores, rank, margin=-0.5)
    with pytest.raises(ValueError, match=r"boundary >= 0, got -0\.5"):
        rrhf(scores, rank, boundary=-0.5)
    with pytest.raises(ValueError, match="rrhf: expected constraint to be one of"):
        rrhf(scores, rank, constraint="margin")
    with pytest.raises(TypeError, match="rrhf: expected rank as an integer tensor"):
        rrhf(scores, rank.float())
