import math

import pytest
import torch
from torch import tensor

from cotkit.losses.preference import (
    constraint_alignment,
    discriminative,
    discriminative_log_z,
    dpo,
    dpo_ranked,
    orpo,
    pro,
    rrhf,
    simpo,
)

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


# PRO


def pro_loop(scores, rewards, valid, constraint, beta):
    """Sum of softmax steps, written with loops from the formula; returns one loss per group."""
    losses = []
    for s, r, v in zip(scores, rewards, valid, strict=True):
        total = torch.zeros((), dtype=scores.dtype)
        for k in range(len(s)):
            worse = [i for i in range(len(s)) if v[i] and v[k] and r[i] < r[k]]
            if not worse:
                continue
            sharp = max(r[k] - r[i] for i in worse)  # 1 / T_k^k
            below = torch.exp(sharp * s[k])
            for i in worse:
                s_i = s[i].detach() if constraint == "detach" else s[i]
                below = below + torch.exp((r[k] - r[i]) * s_i)
                if constraint == "boundary":
                    floor = min(s[j].item() for j in range(len(s)) if v[j] and r[j] > r[i]) - beta
                    constant = torch.exp(2 * (r[k] - r[i]) * floor - sharp * s[k]).detach()
                    below = below + torch.exp(sharp * s[k]) * constant * torch.exp(-(r[k] - r[i]) * s[i])
            total = total - torch.log(torch.exp(sharp * s[k]) / below)
        losses.append(total)
    return torch.stack(losses)


def test_pro_by_hand(f64):
    """Rewards 2, 1, 0: step 1 has 1/T = 1 and 2 (own 2), step 2 has 1."""
    scores = f64([[-0.5, -0.7, -1.5]])
    first = math.log1p(math.exp(1 * -0.7 - 2 * -0.5) + math.exp(2 * -1.5 - 2 * -0.5))
    second = math.log1p(math.exp(-1.5 + 0.7))
    loss = pro(scores, torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64))
    assert loss.item() == pytest.approx(first + second, abs=1e-12)
    shuffled = pro(f64([[-1.5, -0.5, -0.7]]), torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64))
    assert shuffled.item() == pytest.approx(loss.item(), abs=1e-12)


def test_pro_equals_the_authors_code(f64):
    """Numbers of AlibabaResearch/DAMO-ConvAI PRO/train/utils/process_manager.py, compute_loss, sft_weight 0.

    The code adds 1e-10 inside the logarithm.
    """
    scores = f64([[-1.3, -0.4, -2.2, -0.9], [-0.6, -3.1, -1.1, -0.2]])
    rewards = torch.tensor([[2.5, 1.25, 0.5, -1.0], [0.9, 0.4, 0.3, 0.05]], dtype=torch.float64)
    loss = pro(scores, rewards)
    assert loss.item() == pytest.approx(5.389061909041732, abs=2e-9)
    loss.backward()
    expected = [
        [-1.7224905447608747, 0.06495562775857122, -0.539748363641698, 0.9713857081974444],
        [-0.3075678217169401, -0.12328531286691671, 0.022523409911370806, 0.3098151908700856],
    ]
    torch.testing.assert_close(scores.grad, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-9)
    pair = pro(f64([[-1.3, -0.4]]), torch.tensor([[2.5, 1.25]], dtype=torch.float64))
    assert pair.item() == pytest.approx(1.4061501363727793, abs=2e-9)


REWARDS = torch.tensor(
    [[0.25, 2.5, -0.75, 1.0, 1.0], [0.4, 0.4, 0.9, 0.3, 5.0], [3.0, 0.1, 0.1, -0.6, 1.2]], dtype=torch.float64
)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_pro_equals_the_loops(f64, constraint):
    ours, theirs = f64(RANKED), f64(RANKED)
    loss = pro(ours, REWARDS, VALID, constraint=constraint, boundary=0.35)
    expected = pro_loop(theirs, REWARDS, VALID, constraint, 0.35).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_pro_with_unit_gaps_on_two_levels_is_one_constraint_alignment_per_better_chain(f64):
    scores = f64([[-1.0, -1.5, -0.6]])
    expected = constraint_alignment(
        scores, tensor([[0, 1, 1]]), constraint=None
    )  # one better chain: one step
    rewards = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    assert pro(scores, rewards).item() == pytest.approx(expected.item(), abs=1e-12)
    bounded = constraint_alignment(scores, tensor([[0, 1, 1]]), boundary=0.4)
    assert pro(scores, rewards, constraint="boundary", boundary=0.4).item() == pytest.approx(
        bounded.item(), abs=1e-12
    )


def test_pro_is_softer_for_smaller_gaps_and_sends_nothing_to_rewards(f64):
    rewards = f64([[0.5, -0.5]])
    wide, narrow = f64([[-1.0, -1.5]]), f64([[-1.0, -1.5]])
    pro(wide, 2 * rewards).backward()
    pro(narrow, 0.1 * rewards).backward()
    assert wide.grad[0, 1] > narrow.grad[0, 1] > 0
    assert rewards.grad is None


# The turn of the push, for every loss on groups with one worse chain


def turning(name, scores, constraint, boundary):
    rank, rewards = tensor([[0, 0, 1]]), torch.tensor([[2.0, 1.25, 0.5]], dtype=torch.float64)
    if name == "aft":
        return constraint_alignment(scores, rank, constraint=constraint, boundary=boundary)
    if name == "rrhf":
        return rrhf(scores, rank, margin=0.5, constraint=constraint, boundary=boundary)
    if name == "pro":
        return pro(scores, rewards, constraint=constraint, boundary=boundary)
    return dpo_ranked(scores, rank, beta=1.0, offset=0.25, constraint=constraint, boundary=boundary)


GROUP_LOSSES = ["aft", "rrhf", "pro", "dpo_ranked"]


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_push_is_zero_at_the_boundary_and_turns_there(f64, name):
    """The lowest better chain of the worst one is -2, boundary 0.5: B = -2.5, all binary fractions."""
    pushes = []
    for wrong in (-2.375, -2.5, -2.625):
        scores = f64([[-1.0, -2.0, wrong]])
        turning(name, scores, "boundary", 0.5).backward()
        pushes.append(scores.grad[0, 2].item())
    above, at, below = pushes
    assert above > 0.01
    assert at == pytest.approx(0, abs=1e-15)
    assert below < -0.01


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_detach_has_the_plain_value_and_never_pushes_the_worst_chain(f64, name):
    scores, plain = f64([[-1.0, -2.0, -1.75]]), f64([[-1.0, -2.0, -1.75]])
    loss = turning(name, scores, "detach", 0.5)
    assert loss.item() == turning(name, plain, None, 0.5).item()
    loss.backward()
    assert scores.grad[0, 2].item() == 0.0
    assert scores.grad[0, 1].item() < 0
    turning(name, plain, None, 0.5).backward()
    assert plain.grad[0, 2].item() > 0


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_far_boundary_is_no_constraint_for_any(f64, name):
    scores = f64([[-1.0, -2.0, -1.75]])
    far, none = turning(name, scores, "boundary", 60.0), turning(name, scores, None, 60.0)
    assert far.item() == pytest.approx(none.item(), abs=1e-12)


# What must not matter, for every loss on groups


def grouped_loss(name, scores, valid=None, **options):
    if name == "pro":
        return pro(scores, REWARDS[: len(scores), : scores.shape[1]], valid, **options)
    function = {"rrhf": rrhf, "dpo_ranked": dpo_ranked, "aft": constraint_alignment}[name]
    return function(scores, RANKS[: len(scores), : scores.shape[1]], valid, **options)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("name", ["rrhf", "dpo_ranked"])
def test_a_constant_added_changes_nothing_in_hinge_and_logistic(f64, name, constraint):
    scores = f64(RANKED)
    moved = grouped_loss(name, scores + 3.25, constraint=constraint)
    assert moved.item() == pytest.approx(grouped_loss(name, scores, constraint=constraint).item(), abs=1e-12)


def test_a_constant_added_changes_pro_unless_the_gaps_are_equal(f64):
    scores = f64([[-1.0, -1.5, -0.7]])
    uneven = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    even = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    assert abs(pro(scores + 1, uneven).item() - pro(scores, uneven).item()) > 0.1
    for constraint in CONSTRAINTS:
        moved = pro(scores + 1, even, constraint=constraint)
        assert moved.item() == pytest.approx(pro(scores, even, constraint=constraint).item(), abs=1e-12)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("name", GROUP_LOSSES)
@pytest.mark.parametrize("filler", [0.0, -9.0, math.nan, math.inf])
def test_what_pads_k_changes_nothing(f64, name, constraint, filler):
    scores = f64(RANKED)
    loss = grouped_loss(name, scores, VALID, constraint=constraint)
    loss.backward()
    filled = f64([[x if v else filler for x, v in zip(r, vs, strict=True)]
                  for r, vs in zip(RANKED, VALID.tolist(), strict=True)])  # fmt: skip
    padded = grouped_loss(name, filled, VALID, constraint=constraint)
    padded.backward()
    assert padded.item() == loss.item()
    assert torch.equal(filled.grad, scores.grad)
    assert not filled.grad[~VALID].any()
    narrow = f64([RANKED[1][:4]])  # row 1 without its padded candidate
    if name == "pro":
        alone = pro(narrow, REWARDS[1:2, :4], constraint=constraint, denom=3)
    else:
        function = {"rrhf": rrhf, "dpo_ranked": dpo_ranked, "aft": constraint_alignment}[name]
        alone = function(narrow, RANKS[1:2, :4], constraint=constraint, denom=3)
    alone.backward()
    torch.testing.assert_close(narrow.grad[0], scores.grad[1, :4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_split_of_the_batch_with_denom_changes_nothing(f64, name, constraint):
    whole, cut = f64(RANKED), f64(RANKED)
    loss = grouped_loss(name, whole, constraint=constraint)
    loss.backward()
    kinds = {"pro": REWARDS}.get(name, RANKS)
    function = {"rrhf": rrhf, "dpo_ranked": dpo_ranked, "aft": constraint_alignment, "pro": pro}[name]
    parts = [
        function(cut[i:j], kinds[i:j], constraint=constraint, denom=tensor(3)) for i, j in ((0, 1), (1, 3))
    ]
    sum(parts).backward()
    assert loss.item() == pytest.approx(sum(parts).item(), abs=1e-12)
    torch.testing.assert_close(whole.grad, cut.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("name", ["rrhf", "dpo_ranked", "pro"])
@pytest.mark.parametrize("valid", [None, [[False] * 3], [[True, False, False]]])
def test_one_sided_groups_give_zero_and_no_gradient_in_all(f64, name, constraint, valid):
    scores = f64([[-1.0, -2.0, -1.5]])
    valid = None if valid is None else tensor(valid)
    if name == "pro":
        rewards = torch.full((1, 3), 0.7, dtype=torch.float64)
        loss = pro(scores, rewards, valid, constraint=constraint)
    else:
        function = {"rrhf": rrhf, "dpo_ranked": dpo_ranked}[name]
        loss = function(scores, tensor([[1, 1, 1]]), valid, constraint=constraint)
    loss.backward()
    assert loss.item() == 0.0
    assert not scores.grad.any()


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_one_sided_groups_are_counted(f64, name):
    values = [[-1.3, -0.4, -2.2, -0.9, -1.7]]
    one = grouped_loss(name, f64(values))
    if name == "pro":
        rewards = torch.cat([REWARDS[:1], torch.ones(1, 5, dtype=torch.float64)])
        two = pro(f64(values * 2), rewards)
    else:
        function = {"rrhf": rrhf, "dpo_ranked": dpo_ranked, "aft": constraint_alignment}[name]
        two = function(f64(values * 2), torch.cat([RANKS[:1], torch.ones(1, 5, dtype=torch.long)]))
    assert two.item() == pytest.approx(one.item() / 2, abs=1e-12)


@pytest.mark.parametrize("name", ["rrhf", "dpo_ranked", "pro"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_groups_in_any(name, shape):
    scores = torch.zeros(shape, requires_grad=True)
    if name == "pro":
        loss = pro(scores, torch.zeros(shape))
    else:
        loss = {"rrhf": rrhf, "dpo_ranked": dpo_ranked}[name](scores, torch.zeros(shape, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("name", ["rrhf", "dpo_ranked", "pro"])
def test_extreme_scores_stay_finite_in_all(f64, name, constraint):
    scores = f64([[-900.0, -0.1, -700.0, -0.2, -650.0]])
    loss = grouped_loss(name, scores, constraint=constraint)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("name", ["rrhf", "dpo_ranked", "pro"])
def test_all_low_precision_agree_with_float64(dtype, rtol, constraint, name):
    scores = torch.tensor(RANKED, dtype=dtype)
    exact, low = (
        (pro(x, REWARDS.to(dtype).to(x.dtype), constraint=constraint) if name == "pro"
         else grouped_loss(name, x, constraint=constraint))
        for x in (scores.double(), scores)
    )  # fmt: skip
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), exact, rtol=rtol, atol=0)


# Pairs: DPO, SimPO, ORPO


def test_dpo_eq7(f64):
    c, r, rc, rr = f64(-1.0), f64(-3.0), f64(-2.0), f64(-2.5)
    loss = dpo(c, r, rc, rr, beta=0.5)  # margin (-1+2) - (-3+2.5) = 1.5
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.75)), abs=1e-12)
    loss.backward()
    push = 0.5 / (1 + math.exp(0.75))
    assert c.grad.item() == pytest.approx(-push, abs=1e-12)
    assert r.grad.item() == pytest.approx(push, abs=1e-12)
    assert rc.grad is None
    assert rr.grad is None


def test_dpo_offset_smoothing_and_weights(f64):
    c, r, rc, rr = f64(-1.0, -4.0), f64(-3.0, -3.5), f64(-2.0, -4.2), f64(-2.5, -3.0)
    # margins 1.5 and (-4+4.2) - (-3.5+3) = .7; beta .5: .75 and .35; offsets .2 and -.1: h = .55 and .45
    gaps = f64(0.2, -0.1)
    loss = dpo(c, r, rc, rr, beta=0.5, offset=gaps)
    first, second = math.log1p(math.exp(-0.55)), math.log1p(math.exp(-0.45))
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-12)
    weighted = dpo(c, r, rc, rr, beta=0.5, offset=gaps, weights=f64(3.0, 0.5))
    assert weighted.item() == pytest.approx((3 * first + 0.5 * second) / 2, abs=1e-12)
    smooth = dpo(c, r, rc, rr, beta=0.5, offset=gaps, label_smoothing=0.1)
    swapped = math.log1p(math.exp(0.55)), math.log1p(math.exp(0.45))
    factors = f64(3.0, 0.5)
    no_reference = simpo(c / 2, r / 2, beta=1.5, offset=0.25, weights=factors)
    # 1.5 * (-.5 + 1.5) - .25 = 1.25 and 1.5 * (-2 + 1.75) - .25 = -.625
    terms = 3 * math.log1p(math.exp(-1.25)) + 0.5 * math.log1p(math.exp(0.625))
    assert no_reference.item() == pytest.approx(terms / 2, abs=1e-12)
    (no_reference + dpo(c, r, rc, rr, weights=factors)).backward()
    assert factors.grad is None  # a weight is a constant
    expected = 0.9 * (first + second) / 2 + 0.1 * sum(swapped) / 2
    assert smooth.item() == pytest.approx(expected, abs=1e-12)
    smooth.backward()
    assert gaps.grad is None
    assert dpo(c, r, rc, rr, offset=0.5).item() > dpo(c, r, rc, rr).item()  # a larger gap costs more
    halves = [
        dpo(c[i : i + 1], r[i : i + 1], rc[i : i + 1], rr[i : i + 1], beta=0.5, denom=2) for i in range(2)
    ]
    assert sum(halves).item() == pytest.approx(dpo(c, r, rc, rr, beta=0.5).item(), abs=1e-12)


def test_dpo_limits(f64):
    c, r = f64(-1.0, -7.0), f64(-3.0, -2.0)
    agreed = dpo(c, r, c.detach(), r.detach(), beta=0.3)
    assert agreed.item() == pytest.approx(math.log(2), abs=1e-12)
    tiny = dpo(c, r, f64(-2.0, -1.0), f64(-5.0, -4.0), beta=1e-9)
    tiny.backward()
    assert tiny.item() == pytest.approx(math.log(2), abs=1e-7)
    assert c.grad.abs().max() < 1e-9
    half = [dpo(c, r, f64(0.0, 0.0), f64(0.0, 0.0), beta=0.3, label_smoothing=0.5),
            dpo(r, c, f64(0.0, 0.0), f64(0.0, 0.0), beta=0.3, label_smoothing=0.5)]  # fmt: skip
    assert half[0].item() == pytest.approx(half[1].item(), abs=1e-12)  # cannot tell the two apart
    none = torch.zeros(0, requires_grad=True)
    empty = dpo(none, none, none.detach(), none.detach())
    empty.backward()
    assert empty.item() == 0.0


def test_simpo_is_dpo_without_reference(f64):
    c, r = f64(-0.4, -1.1), f64(-0.9, -0.8)
    loss = simpo(c, r)  # 2.5 * .5 - .5 = .75 and 2.5 * -.3 - .5 = -1.25
    expected = (math.log1p(math.exp(-0.75)) + math.log1p(math.exp(1.25))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    zero = torch.zeros(2, dtype=torch.float64)
    for constraint in CONSTRAINTS:
        options = {"beta": 1.5, "offset": 0.3, "constraint": constraint, "boundary": 0.7}
        assert simpo(c, r, **options).item() == dpo(c, r, zero, zero, **options).item()


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo"])
def test_push_on_the_rejected_one_turns_at_the_boundary(f64, name):
    """Reward of the chosen one minus 0.5; the offset moves nothing."""
    pushes = []
    for moved in (0.125, 0.0, -0.125):
        if name == "orpo":
            c = f64(math.log(0.5))  # log-odds 0: the boundary is at log-odds -0.5
            r = f64(-math.log1p(math.exp(0.5 - moved)))
            loss = orpo(c, r, beta=1.0, constraint="boundary", boundary=0.5)
        elif name == "dpo":
            c, r = f64(-5.0), f64(-6.5 + 2 * moved)  # rewards .5 * (-5+2) and .5 * (r+2.5): boundary at -6.5
            loss = dpo(c, r, f64(-2.0), f64(-2.5), beta=0.5, offset=0.75, constraint="boundary", boundary=0.5)
        else:
            c, r = f64(-1.0), f64(-1.25 + moved)  # 2 * -1 - .5 = 2 * -1.25
            loss = simpo(c, r, beta=2.0, offset=0.75, constraint="boundary", boundary=0.5)
        loss.backward()
        pushes.append(r.grad.item())
        assert c.grad.item() < 0
    assert pushes[0] > 0.01
    assert pushes[1] == pytest.approx(0, abs=1e-15)
    assert pushes[2] < -0.01


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo"])
def test_detach_has_the_plain_value_and_does_not_push_the_rejected_one(f64, name):
    call = {
        "dpo": lambda c, r, k: dpo(c, r, f64(-2.0), f64(-2.5), offset=0.2, label_smoothing=0.1, constraint=k),
        "simpo": lambda c, r, k: simpo(c, r, constraint=k),
        "orpo": lambda c, r, k: orpo(c, r, constraint=k),
    }[name]
    c, r = f64(-1.0), f64(-1.3)
    loss = call(c, r, "detach")
    assert loss.item() == call(c, r, None).item()
    loss.backward()
    assert r.grad is None or r.grad.item() == 0.0
    assert c.grad.item() < 0


def test_boundary_value_by_hand(f64):
    # rewards -1.5 and -1.75, offset .25: h = 0; T = -1.5 + .25 - 2 * .4 = -2.05, minus r_l: -.3
    loss = dpo(
        f64(-5.0), f64(-6.0), f64(-2.0), f64(-2.5), beta=0.5, offset=0.25, constraint="boundary", boundary=0.4
    )
    assert loss.item() == pytest.approx(math.log(1 + 1 + math.exp(-0.3)), abs=1e-12)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_ranked_pairs_are_dpo_on_each(f64, constraint):
    ours, ref = f64([[-5.0, -6.5, -4.0]]), f64([[-4.5, -5.0, -4.25]])
    rank = tensor([[0, 1, 2]])
    loss = dpo_ranked(ours, rank, ref_scores=ref, beta=0.5, offset=0.1, constraint=constraint, boundary=0.3)
    loss.backward()
    assert ref.grad is None
    s = f64([-5.0, -6.5, -4.0])
    # rewards -.25, -.75, .125: for the pair (0, 2) the lowest better one is 1, its boundary is -.75 - .3
    options = {"beta": 0.5, "offset": 0.1, "constraint": constraint}
    better, worse = s[tensor([0, 1])], s[tensor([1, 2])]
    near = dpo(better, worse, ref[0, :2].detach(), ref[0, 1:].detach(), **options, boundary=0.3, denom=3)
    far = dpo(s[:1], s[2:], ref[0, :1], ref[0, 2:], **options, boundary=0.8, denom=3)  # -.25 - .8 = -1.05
    (near + far).backward()
    assert loss.item() == pytest.approx((near + far).item(), abs=1e-12)
    torch.testing.assert_close(ours.grad[0], s.grad, rtol=0, atol=1e-12)


def test_ranked_without_reference_is_simpo(f64):
    loss = dpo_ranked(f64([[-0.4, -0.9], [-1.1, -0.8]]), tensor([[0, 1], [0, 1]]), beta=2.5, offset=0.5)
    assert loss.item() == pytest.approx(simpo(f64(-0.4, -1.1), f64(-0.9, -0.8)).item(), abs=1e-12)


def test_orpo_by_hand(f64):
    c, r = f64(math.log(0.5)), f64(math.log(0.2))  # odds 1 and 1/4
    loss = orpo(c, r, beta=0.3)
    assert loss.item() == pytest.approx(math.log(2) + 0.3 * math.log(1 + 0.25), abs=1e-12)
    loss.backward()
    # do/dlogP = 1 / (1 - P): 2 and 1.25; sigmoid(-log 4) = .2
    assert c.grad.item() == pytest.approx(-1 - 0.3 * 0.2 * 2, abs=1e-12)
    assert r.grad.item() == pytest.approx(0.3 * 0.2 * 1.25, abs=1e-12)


def test_orpo_limits(f64):
    c, r = f64(-0.7, -1.9), f64(-0.2, -3.0)
    assert orpo(c, r, beta=0.0).item() == (-c).mean().item()  # fine-tuning, exactly
    assert orpo(f64(1e-3), c[:1]).isfinite()  # rounding may lift a log-prob above 0 by this much
    same = orpo(c, c.detach(), beta=1.0)
    assert same.item() == pytest.approx((-c).mean().item() + math.log(2), abs=1e-12)
    for low, high in ((-1e-300, -800.0), (0.0, 0.0), (-800.0, 0.0), (-1e-9, -1e-12)):
        a, b = f64(low), f64(high)
        loss = orpo(a, b)
        loss.backward()
        assert loss.isfinite()
        assert a.grad.isfinite()
        assert b.grad.isfinite()
    for x in (-1e-9, -0.3, -0.6931, -0.7, -5.0, -40.0):  # both branches of log(1 - P)
        odds = -orpo(f64(x), f64(-math.log(2)), beta=1.0).item() - x  # = log sigmoid(log-odds)
        p = math.exp(x)
        assert odds == pytest.approx(math.log(p), rel=1e-6)  # sigmoid(log P/(1-P)) = P


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_pairs_in_low_precision_agree_with_float64(dtype, rtol, constraint):
    generator = torch.Generator().manual_seed(3)
    c, r, rc, rr = (-2 * torch.rand(4, 16, generator=generator)).to(dtype)
    for loss in (
        lambda *x: dpo(*x, constraint=constraint),
        lambda c, r, *_: simpo(c, r, constraint=constraint),
        lambda c, r, *_: orpo(c, r, constraint=constraint),
    ):
        low = loss(c, r, rc, rr)
        assert low.dtype == dtype
        exact = loss(c.double(), r.double(), rc.double(), rr.double())
        torch.testing.assert_close(low.double(), exact, rtol=rtol, atol=0)


# Discriminative fine-tuning


POS, NEG = [-12.5, -20.25], [[-30.5, -18.0, -25.0], [-22.0, -41.5, -19.75]]
NEG_REF, LOG_U = [[-31.0, -18.5, -24.0], [-21.0, -43.0, -20.5]], [0.4, -1.1]


@pytest.mark.parametrize(
    ("tau", "gamma", "losses", "log_z", "pushes"),
    [
        (1.0, 0.85, [-11.044658518578647, -18.603502750432426], [0.232920876872664, 0.7049728536030915],
         [[0.43538126280783873, 0.43538126280783873, 0.09714669089593866],
          [0.06059244023589558, 0.738167037238084, 0.34868541872720193]]),
        (0.7, 1.0, [-5.63456319081639, 0.3563560083490813], [-8.297198534059707, -8.74857040939351],
         [[0.004640921533819604, 0.9844231253742329, 0.010935953091948026],
          [0.06212459536375514, 0.0001776391762055553, 0.9376977654600391]]),
    ],
)  # fmt: skip
def test_discriminative_equals_the_authors_code(f64, tau, gamma, losses, log_z, pushes):
    """Numbers of PenGuln/DFT scripts/dft_trainer.py, DFTTrainer.dft_loss."""
    pos, neg, ref = f64(POS), f64(NEG), f64(NEG_REF)
    z = discriminative_log_z(neg, f64(LOG_U), neg_ref=ref, tau=tau, gamma=gamma)
    assert z.tolist() == pytest.approx(log_z, abs=1e-12)
    assert not z.requires_grad
    z.requires_grad_()
    loss = discriminative(pos, neg, z, neg_ref=ref, tau=tau)
    assert loss.item() == pytest.approx(sum(losses) / 2, abs=1e-12)
    loss.backward()
    assert pos.grad.tolist() == [-0.5, -0.5]
    expected = torch.tensor(pushes, dtype=torch.float64) / 2
    torch.testing.assert_close(neg.grad, expected, rtol=0, atol=1e-12)
    assert ref.grad is None
    assert z.grad is None


def test_discriminative_without_reference_equals_the_authors_code(f64):
    """Numbers of DFTTrainer.dft_loss_ref_free (DFT2) with lengths 10, 15 and 20 12 25 / 11 50 14, eps 0."""
    pos = f64(-12.5 / 10, -20.25 / 15)
    lengths = torch.tensor([[20.0, 12.0, 25.0], [11.0, 50.0, 14.0]], dtype=torch.float64)
    neg = (torch.tensor(NEG, dtype=torch.float64) / lengths).requires_grad_()
    z = discriminative_log_z(neg, f64(LOG_U), tau=0.3, gamma=0.9)
    assert z.tolist() == pytest.approx([-1.8093178288628597, -2.8958442114905334], abs=1e-12)
    loss = discriminative(pos, neg, z, tau=0.3)
    assert loss.item() == pytest.approx((1.1375737897314544 + 0.9426043770480885) / 2, abs=1e-12)
    loss.backward()
    expected = [[0.0006309019683447858, 0.001142883173741436, 0.002904472124267348],
                [0.0006979730846333339, 0.007585947553938202, 0.003910045144381918]]  # fmt: skip
    expected = torch.tensor(expected, dtype=torch.float64) * lengths / 2
    torch.testing.assert_close(neg.grad, expected, rtol=0, atol=1e-12)


def test_discriminative_log_z_by_hand(f64):
    neg, log_u = f64([[-1.0, -2.0]]), f64(0.3)
    z = discriminative_log_z(neg, log_u, tau=0.5, gamma=0.6)
    mean = (math.exp(-2.0) + math.exp(-4.0)) / 2
    assert z.item() == pytest.approx(math.log(0.4 * math.exp(0.3) + 0.6 * mean), abs=1e-12)
    one = discriminative_log_z(f64([[-3.0]]), log_u, gamma=1.0)  # one sample, no memory: weight 1
    pos, single = f64(-1.0), f64([[-3.0]])
    loss = discriminative(pos, single, one)
    assert loss.item() == 1.0 - 3.0
    loss.backward()
    assert (pos.grad.item(), single.grad.item()) == (-1.0, 1.0)


def test_discriminative_has_the_gradient_of_the_likelihood_among_all_outputs(f64):
    """With every output sampled once from a uniform P0 and gamma 1 the estimate is exact."""
    s = f64([[-1.0, -0.3, -2.2, -1.7]])
    ref = torch.full((1, 4), -math.log(4), dtype=torch.float64)
    z = discriminative_log_z(s, f64(5.0), neg_ref=ref, tau=0.7, gamma=1.0)
    discriminative(s[:, 1], s, z, neg_ref=ref, tau=0.7).backward()
    exact = f64([[-1.0, -0.3, -2.2, -1.7]])
    (-exact[0, 1] + 0.7 * (exact[0] / 0.7).logsumexp(0)).backward()
    torch.testing.assert_close(s.grad, exact.grad, rtol=0, atol=1e-12)


def test_discriminative_padding_split_and_groups_without_a_sample(f64):
    pos, neg, log_u = f64(POS), f64(NEG), f64(LOG_U)
    valid = tensor([[True, False, True], [False, False, False]])
    neg.data[~valid] = math.nan
    z = discriminative_log_z(neg, log_u, valid, tau=20.0)
    assert z[1].item() == LOG_U[1]
    narrow = f64([[-30.5, -25.0]])
    alone = discriminative_log_z(narrow, f64(0.4), tau=20.0)
    assert z[0].item() == pytest.approx(alone.item(), abs=1e-12)
    loss = discriminative(pos, neg, z, valid, tau=20.0)
    one = discriminative(f64(-12.5), narrow, alone, tau=20.0, denom=2)
    assert loss.item() == pytest.approx(one.item(), abs=1e-12)
    loss.backward()
    one.backward()
    assert pos.grad.tolist() == [-0.5, 0.0]
    assert neg.grad[0, [0, 2]].tolist() == pytest.approx(narrow.grad[0].tolist(), abs=1e-12)
    assert not neg.grad[~valid].any()
    empty = torch.zeros(2, 0)
    nothing = discriminative_log_z(empty, torch.zeros(2))
    assert discriminative(torch.ones(2, requires_grad=True), empty, nothing).item() == 0.0


@pytest.mark.errors
def test_refusals_of_the_family(f64):
    v, m = f64(-1.0, -2.0), f64([[-1.0, -2.0], [-3.0, -4.0]])
    with pytest.raises(ValueError, match=r"dpo: expected equal shapes, got chosen \[2\], rejected \[1\]"):
        dpo(v, v[:1], v, v)
    with pytest.raises(ValueError, match=r"dpo: expected chosen \[B\], got \[2, 2\]"):
        dpo(m, m, m, m)
    with pytest.raises(ValueError, match="dpo: expected beta > 0, got 0"):
        dpo(v, v, v, v, beta=0)
    with pytest.raises(ValueError, match=r"label_smoothing in \[0, 0\.5\], got 0\.6"):
        dpo(v, v, v, v, label_smoothing=0.6)
    with pytest.raises(ValueError, match="expected label_smoothing 0 with the boundary"):
        simpo(v, v, label_smoothing=0.1, constraint="boundary")
    with pytest.raises(ValueError, match="simpo: expected constraint to be one of"):
        simpo(v, v, constraint="none")
    with pytest.raises(ValueError, match=r"equal shapes, got chosen \[2\], offset \[1\]"):
        simpo(v, v, offset=v[:1])
    with pytest.raises(ValueError, match=r"equal shapes, got chosen \[2\], weights \[1\]"):
        simpo(v, v, weights=v[:1])
    with pytest.raises(TypeError, match="dpo: expected chosen as a float tensor, got int64"):
        dpo(tensor([1, 2]), v, v, v)
    with pytest.raises(ValueError, match=r"denom > 0"):
        dpo(v, v, v, v, denom=0)
    with pytest.raises(ValueError, match=r"orpo: expected chosen_logps as log-probabilities .*got 2\."):
        orpo(-v, v)
    with pytest.raises(ValueError, match=r"orpo: expected chosen_logps as log-probabilities .*got 0\.5"):
        orpo(f64(-1.0, 0.5), v)
    with pytest.raises(ValueError, match=r"orpo: expected rejected_logps as log-probabilities"):
        orpo(v, -v)
    with pytest.raises(ValueError, match=r"orpo: expected beta >= 0"):
        orpo(v, v, beta=-0.1)
    with pytest.raises(TypeError, match=r"pro: expected rewards as a float tensor, got int64"):
        pro(m, tensor([[1, 2], [3, 4]]))
    with pytest.raises(ValueError, match=r"pro: expected scores \[B, K\], got \[2\]"):
        pro(v, v)
    with pytest.raises(ValueError, match=r"equal shapes, got scores \[2, 2\], ref_scores \[2\]"):
        dpo_ranked(m, tensor([[0, 1], [1, 0]]), ref_scores=v)
    with pytest.raises(ValueError, match=r"dpo_ranked: expected boundary >= 0"):
        dpo_ranked(m, tensor([[0, 1], [1, 0]]), boundary=-1)
    with pytest.raises(ValueError, match=r"gamma in \[0, 1\], got 1\.5"):
        discriminative_log_z(m, v, gamma=1.5)
    with pytest.raises(ValueError, match=r"gamma > 0, got 0"):
        discriminative_log_z(m, v, gamma=0)
    with pytest.raises(ValueError, match=r"discriminative: expected tau > 0"):
        discriminative(v, m, v, tau=0)
    with pytest.raises(ValueError, match=r"expected pos \[B\] and neg \[B, K\] of one B"):
        discriminative(f64(-1.0, -2.0, -3.0), m, f64(-1.0, -2.0, -3.0))
    with pytest.raises(TypeError, match="valid as a bool tensor"):
        discriminative(v, m, v, tensor([[0, 1], [1, 1]]))
