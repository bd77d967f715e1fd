import copy
import itertools
import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import cross_entropy, pad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cotkit.losses.sft import ift_inputs, ift_weights, iw_sft, iw_weights, multi_token, nll, poft
from cotkit.tokens import seq_logps

T, F = True, False


def rows(f64):
    """Two rows of unequal length; the zeros stand where nothing counts."""
    logps = f64([[0.0, -0.5, -1.25, -2.0], [0.0, 0.0, -0.75, -3.5]])
    ref = f64([[0.0, -0.9, -1.05, -2.6], [0.0, 0.0, -0.6, -3.2]])
    mask = tensor([[F, T, T, T], [F, F, T, T]])
    return logps, ref, mask


# nll


def test_nll_token_mean(f64):
    logps, _, mask = rows(f64)
    loss = nll(logps, mask)
    assert loss.item() == pytest.approx((0.5 + 1.25 + 2 + 0.75 + 3.5) / 5, abs=1e-12)
    loss.backward()
    torch.testing.assert_close(logps.grad, -mask.double() / 5, rtol=0, atol=1e-12)


def test_nll_sequence_mean(f64):
    logps, _, mask = rows(f64)
    loss = nll(logps, mask, per="sequence")
    assert loss.item() == pytest.approx((3.75 / 3 + 4.25 / 2) / 2, abs=1e-12)


def test_nll_denom_replaces_the_count(f64):
    logps, _, mask = rows(f64)
    assert nll(logps, mask, denom=16).item() == pytest.approx(8.0 / 16, abs=1e-12)
    assert nll(logps, mask, denom=tensor(16)).item() == pytest.approx(8.0 / 16, abs=1e-12)
    expected = (3.75 / 3 + 4.25 / 2) / 8
    assert nll(logps, mask, per="sequence", denom=8).item() == pytest.approx(expected, abs=1e-12)
    assert nll(logps, mask, denom=0.5).item() == pytest.approx(16.0, abs=1e-12)


def test_nll_row_without_tokens_is_not_a_row(f64):
    logps = f64([[0.0, -0.5, -1.25], [0.0, 0.0, 0.0]])
    mask = tensor([[F, T, T], [F, F, F]])
    assert nll(logps, mask, per="sequence").item() == pytest.approx(1.75 / 2, abs=1e-12)


def test_nll_weights_per_token_and_per_row(f64):
    logps, _, mask = rows(f64)
    per_token = f64([[9.0, 2.0, 0.5, 1.5], [9.0, 9.0, 4.0, 0.25]])
    loss = nll(logps, mask, weights=per_token)
    # 2*.5 + .5*1.25 + 1.5*2 + 4*.75 + .25*3.5 = 8.5, divided by tokens, not by the sum of the weights
    assert loss.item() == pytest.approx(8.5 / 5, abs=1e-12)
    loss.backward()
    torch.testing.assert_close(logps.grad, -per_token.detach() * mask / 5, rtol=0, atol=1e-12)
    torch.testing.assert_close(per_token.grad, -logps.detach() * mask / 5, rtol=0, atol=1e-12)
    assert nll(logps, mask, weights=f64(2.0, 3.0)).item() == pytest.approx(
        (2 * 3.75 + 3 * 4.25) / 5, abs=1e-12
    )


def test_nll_square_batch_takes_weights_by_row(f64):
    logps = f64([[0.0, -1.0], [0.0, -2.0]])  # B = T = 2: a vector of weights still means rows
    mask = tensor([[F, T], [F, T]])
    assert nll(logps, mask, weights=f64(10.0, 1.0)).item() == pytest.approx((10 + 2) / 2, abs=1e-12)


def test_nll_equals_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[:, :2] = -100
    logps = logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    logps = pad(logps, (1, 0)) * (labels != -100)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(nll(logps, labels != -100), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nll_what_is_masked_never_leaks(f64, per, weighted):
    logps, _, mask = rows(f64)
    weights = f64([[0.3, 2.0, 0.5, 1.5], [0.3, 0.3, 4.0, 0.25]]) if weighted else None
    clean = nll(logps, mask, weights=weights, per=per)
    clean.backward()
    dirty = logps.detach().clone().masked_fill(~mask, math.nan).requires_grad_()
    dirty_weights = weights.detach().masked_fill(~mask, math.nan).requires_grad_() if weighted else None
    loss = nll(dirty, mask, weights=dirty_weights, per=per)
    loss.backward()
    assert loss.item() == clean.item()
    assert torch.equal(dirty.grad, logps.grad)
    if weighted:
        assert torch.equal(dirty_weights.grad, weights.grad)


def test_nll_a_nan_that_counts_stays(f64):
    logps = f64([[0.0, math.nan, -1.0]])
    assert nll(logps, tensor([[F, T, T]])).isnan()


# iw_weights


def test_iw_weights_hand_value(f64):
    q, ref = f64([[0.0, -1.0, -2.0 + 2 * math.log(2)]]), f64([[0.0, -1.0, -2.0]])
    mask = tensor([[F, T, T]])  # log-ratios 0 and 2 ln 2, mean ln 2
    assert iw_weights(q, ref, mask).item() == pytest.approx(2.0, abs=1e-12)
    assert iw_weights(q, ref, mask, temperature=3.0).item() == pytest.approx(8.0, abs=1e-12)
    assert iw_weights(q, ref, mask, temperature=10.0).item() == 16.0  # 1024, clipped
    assert iw_weights(q, ref, mask, temperature=10.0, clip=(0.0, 2000.0)).item() == pytest.approx(
        1024.0, rel=1e-12
    )
    assert iw_weights(q, ref, mask, temperature=10.0, clip=(0.0, math.inf)).item() == pytest.approx(
        1024, rel=1e-12
    )
    assert iw_weights(q, ref, mask, temperature=-1.0, clip=(0.75, 16.0)).item() == 0.75  # 1/2, lifted


def test_iw_weights_token_level(f64):
    q, ref = f64([[0.0, -1.0, -2.0, -0.25]]), f64([[0.0, -1.5, -1.9, -3.0]])
    mask = tensor([[F, T, T, T]])
    weights = iw_weights(q, ref, mask, level="token", clip=(0.2, 1.8))
    expected = tensor([[1.0, math.exp(0.5), math.exp(-0.1), 1.8]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    sharp = iw_weights(q, ref, mask, level="token", temperature=2.0, clip=(0.95, 1e9))
    expected = tensor([[1.0, math.exp(1.0), 0.95, math.exp(5.5)]], dtype=torch.float64)
    torch.testing.assert_close(sharp, expected, rtol=1e-12, atol=0)


def test_iw_weights_carry_no_gradient_and_ignore_what_is_masked(f64):
    logps, ref, mask = rows(f64)
    weights = iw_weights(logps, ref, mask)
    assert not weights.requires_grad
    # mean log-ratios (.4 - .2 + .6)/3 and (-.15 - .3)/2
    expected = tensor([math.exp(0.8 / 3), math.exp(-0.225)], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    noise = logps.detach().clone().masked_fill(~mask, -7.0), ref.detach().clone().masked_fill(~mask, math.nan)
    for level in ("sequence", "token"):
        assert torch.equal(iw_weights(*noise, mask, level=level), iw_weights(logps, ref, mask, level=level))


def test_iw_weights_empty_row_weighs_one(f64):
    q, ref = f64([[0.0, -1.0], [0.0, 0.0]]), f64([[0.0, -2.0], [0.0, 0.0]])
    weights = iw_weights(q, ref, tensor([[F, T], [F, F]]))
    torch.testing.assert_close(weights, tensor([math.e, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_iw_weights_true_ratio_of_sequence_probabilities(f64):
    q, ref = f64([[0.0, -1.0, -2.0 + 2 * math.log(2)]]), f64([[0.0, -1.0, -2.0]])
    mask = tensor([[F, T, T]])  # log-ratios 0 and 2 ln 2: the sum, not the mean
    assert iw_weights(q, ref, mask, length_scale=False).item() == pytest.approx(4.0, abs=1e-12)
    sharp = iw_weights(q, ref, mask, length_scale=False, temperature=1.5)
    assert sharp.item() == pytest.approx(8.0, abs=1e-12)
    assert iw_weights(q, ref, mask, length_scale=False, clip=(0.0, 3.0)).item() == 3.0
    by_token = [iw_weights(q, ref, mask, level="token", length_scale=scaled) for scaled in (True, False)]
    assert torch.equal(*by_token)


def test_iw_weights_average_to_one_over_the_reference_only_as_true_ratio(f64):
    # every sequence of two tokens out of three, the second depending on the first
    q = f64([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.25, 0.35, 0.4], [0.7, 0.1, 0.2]]).log()
    ref = f64([[0.3, 0.3, 0.4], [0.2, 0.5, 0.3], [0.45, 0.15, 0.4], [0.35, 0.4, 0.25]]).log()
    pairs = [(i, j) for i in range(3) for j in range(3)]

    def logps(p):
        return torch.stack([torch.stack([p.new_zeros(()), p[0, i], p[1 + i, j]]) for i, j in pairs])

    mask = tensor([[F, T, T]] * 9)
    chance = logps(ref).sum(1).exp()
    ratio = iw_weights(logps(q), logps(ref), mask, length_scale=False)
    assert (chance * ratio).sum().item() == pytest.approx(1.0, abs=1e-12)
    smoothed = iw_weights(logps(q), logps(ref), mask)
    assert abs((chance * smoothed).sum().item() - 1) > 0.01


# iw_sft


def test_iw_sft_is_sft_while_policy_and_reference_agree(f64):
    logps, ref, mask = rows(f64)
    for level in ("sequence", "token"):
        assert iw_sft(logps, logps.detach(), mask, level=level).item() == pytest.approx(8.0 / 5, abs=1e-12)
        assert iw_sft(logps, ref, mask, level=level, temperature=0.0).item() == pytest.approx(
            8.0 / 5, abs=1e-12
        )
        assert iw_sft(logps, ref, mask, q_logps=ref, level=level).item() == pytest.approx(8.0 / 5, abs=1e-12)


def test_iw_sft_two_rows_with_their_own_weights(f64):
    logps, ref, mask = rows(f64)
    loss = iw_sft(logps, ref, mask)
    w0, w1 = math.exp(0.8 / 3), math.exp(-0.225)
    assert loss.item() == pytest.approx((w0 * 3.75 + w1 * 4.25) / 5, abs=1e-12)
    loss.backward()
    expected = -tensor([[0, w0, w0, w0], [0, 0, w1, w1]], dtype=torch.float64) / 5  # nothing through w
    torch.testing.assert_close(logps.grad, expected, rtol=0, atol=1e-12)
    assert ref.grad is None
    assert iw_sft(logps, ref, mask, denom=11).item() == pytest.approx((w0 * 3.75 + w1 * 4.25) / 11, abs=1e-12)


def test_iw_sft_options_reach_the_weights(f64):
    logps, ref, mask = rows(f64)
    q = f64([[0.0, -0.3, -0.8, -1.9], [0.0, 0.0, -1.7, -2.1]])
    options = {"level": "token", "temperature": 1.7, "clip": (0.6, 1.4)}
    expected = nll(logps, mask, weights=iw_weights(q, ref, mask, **options))
    assert iw_sft(logps, ref, mask, q_logps=q, **options).item() == expected.item()
    assert iw_sft(logps, ref, mask, q_logps=q).item() != pytest.approx(
        iw_sft(logps, ref, mask).item(), abs=1e-3
    )
    expected = nll(logps, mask, weights=iw_weights(q, ref, mask, length_scale=False))
    assert iw_sft(logps, ref, mask, q_logps=q, length_scale=False).item() == expected.item()


def test_iw_sft_empty_mask(f64):
    logps, ref, mask = rows(f64)
    loss = iw_sft(logps, ref, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0
    assert not logps.grad.any()


# What the authors' code gave for these tensors (its loss class, one row per call, the two losses added).
LOGITS = [
    [[0.3, -0.7, 1.1], [1.4, 0.2, -0.5], [-0.9, 0.6, 0.1], [0.8, -0.3, 0.4]],
    [[-0.2, 0.9, 0.5], [0.7, -1.2, 0.25], [0.15, 1.3, -0.6], [0.45, 0.05, -0.35]],
]
REF_LOGITS = [
    [[0.1, -0.4, 0.9], [0.2, 0.75, -0.15], [-0.65, -0.85, 1.2], [0.55, 0.35, -0.1]],
    [[0.6, 0.3, -0.45], [-0.25, 0.95, 0.4], [1.05, -0.55, 0.7], [-0.8, 0.65, 0.5]],
]
LABELS = [[-100, 0, 1, 2], [-100, -100, 2, 1]]
AUTHORS = [  # level, temperature, clip, loss, its gradient at row 0 position 0 and at row 1 position 1
    ("sequence", 1.0, (0.0, 16.0), 1.225629703613829,
     [-0.0825727742640802, 0.011713035961147372, 0.07085973830293284],
     [0.30606722817414006, 0.04577805270730531, -0.3518452808814454]),
    ("sequence", 2.0, (0.0, 16.0), 2.373296182750517,
     [-0.047236625452229355, 0.006700565622704221, 0.040536059829525135],
     [0.837097483486995, 0.1252035147598924, -0.9623009982468875]),
    ("sequence", 10.0, (0.0, 16.0), 4.525612469193994,
     [-0.0005417697721199633, 7.685061910611141e-05, 0.00046491915301385197],
     [1.7905135305767563, 0.2678046364678108, -2.0583181670445674]),
    ("token", 1.0, (0.2, 1.8), 0.8735912981462166,
     [-0.15392901004898063, 0.021834993994525796, 0.13209401605445487],
     [0.1299701421836517, 0.019439454706578336, -0.14940959689023003]),
]  # fmt: skip


def unshifted(logits, labels):
    gathered = logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return pad(gathered, (1, 0)) * (labels != -100)


@pytest.mark.parametrize(("level", "temperature", "clip", "expected", "row0", "row1"), AUTHORS)
def test_iw_sft_equals_the_authors_numbers(f64, level, temperature, clip, expected, row0, row1):
    logits, labels = f64(LOGITS), tensor(LABELS)
    logps, ref = unshifted(logits, labels), unshifted(f64(REF_LOGITS), labels)
    loss = iw_sft(logps, ref, labels != -100, level=level, temperature=temperature, clip=clip, denom=5)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert logits.grad[0, 0].tolist() == pytest.approx(row0, rel=1e-10)
    assert logits.grad[1, 1].tolist() == pytest.approx(row1, rel=1e-10)


CONTROL = [  # the control-task code: lagged q, mean per trajectory, temperature on both levels
    ("sequence", 10.0, (0.0, 1000.0), 6.925341979652867),
    ("sequence", 2.0, (0.0, 1000.0), 1.5981018352679737),
    ("token", 10.0, (0.0, 2.0), 2.219871903472195),
    ("token", 2.0, (0.0, 2.0), 1.867873089631698),
]


@pytest.mark.parametrize(("level", "temperature", "clip", "expected"), CONTROL)
def test_iw_weights_equal_the_authors_control_numbers(f64, level, temperature, clip, expected):
    logps = f64([[0.0, -1.1, -0.4, -2.3], [0.0, -0.7, -1.9, -0.2]])
    q = f64([[0.0, -1.0, -0.6, -2.1], [0.0, -0.9, -1.5, -0.3]])
    ref = f64([[0.0, -1.3, -0.9, -2.2], [0.0, -0.5, -1.8, -0.4]])
    mask = tensor([[F, T, T, T], [F, T, T, F]])
    weights = iw_weights(q, ref, mask, level=level, temperature=temperature, clip=clip)
    assert nll(logps, mask, weights=weights, per="sequence").item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("temperature", "expected"), [(10.0, 0.6342591543359603), (2.0, 0.6393667721556502)])
def test_iw_weights_divided_by_their_sum_equal_the_authors_control_numbers(f64, temperature, expected):
    # main.py: loss(..., normalize=True), which divides by the number of rows once more
    logps = f64([[0.0, -1.1, -0.4, -2.3], [0.0, -0.7, -1.9, -0.2]])
    q = f64([[0.0, -1.0, -0.6, -2.1], [0.0, -0.9, -1.5, -0.3]])
    ref = f64([[0.0, -1.3, -0.9, -2.2], [0.0, -0.5, -1.8, -0.4]])
    mask = tensor([[F, T, T, T], [F, T, T, F]])
    w = iw_weights(q, ref, mask, temperature=temperature, clip=(0.0, 1000.0))
    loss = nll(logps, mask, weights=w / w.sum() * len(w), per="sequence")
    assert loss.item() / len(w) == pytest.approx(expected, rel=1e-12)
    means = tensor([3.8 / 3, 2.6 / 2], dtype=torch.float64)
    assert loss.item() == pytest.approx((w * means).sum().item() / w.sum().item(), rel=1e-12)


def test_lagged_q_is_the_averaged_model_of_torch():
    policy = torch.nn.Linear(2, 1).double()

    def become(weight, bias):
        with torch.no_grad():
            policy.weight.copy_(tensor([weight])), policy.bias.copy_(tensor([bias]))

    become([0.5, -1.25], 2.0)
    lagged = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    lagged.update_parameters(policy)
    for step in (([1.5, 0.75], -1.0), ([-0.4, 2.2], 0.3)):
        become(*step)
        lagged.update_parameters(policy)
    # what the control code's ema_update(q, policy, 0.9) left after the same two steps
    assert lagged.module.weight.tolist()[0] == pytest.approx([0.5, -0.725], abs=1e-7)  # set from float32
    assert lagged.module.bias.item() == pytest.approx(1.56, abs=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_q_between_the_reference_and_the_policy(decay):
    policy = torch.nn.Linear(1, 3, bias=False).double()
    arms, mask = tensor([0, 1]), tensor([[F, T]] * 2)

    def logps(model):
        return pad(model(torch.ones(1, dtype=torch.float64)).log_softmax(0)[arms][:, None], (1, 0))

    ref = logps(policy).detach()
    lagged = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(decay))
    lagged.update_parameters(policy)
    frozen = copy.deepcopy(lagged)
    with torch.no_grad():
        policy.weight += tensor([[0.7], [-0.4], [0.1]])
    lagged.update_parameters(policy)
    now = logps(policy)
    loss, current = iw_sft(now, ref, mask, q_logps=logps(frozen)), iw_weights(now, ref, mask)
    assert loss.item() == pytest.approx(nll(now, mask).item(), abs=1e-12)  # q still the reference
    behind = iw_weights(logps(lagged), ref, mask)
    if decay == 0:
        assert torch.equal(behind, current)
    else:  # the policy went up on arm 0 and down on arm 1, and q follows
        assert 1 < behind[0] < current[0]
        assert 1 > behind[1] > current[1]


def bandit_gradient(left, temperature):
    """Gradient of the loss in the logits of a two-armed policy that pulls left with the given probability.

    The data: a 50/50 policy pulled and left succeeded half as often as right: one left, two right successes.
    """
    policy = torch.log(tensor([left, 1 - left], dtype=torch.float64)).requires_grad_()
    arms = tensor([0, 1, 1])
    logps = pad(policy.log_softmax(0)[arms][:, None], (1, 0))
    ref = pad(torch.full((3, 1), math.log(0.5), dtype=torch.float64), (1, 0))
    iw_sft(logps, ref, tensor([[F, T]] * 3), temperature=temperature).backward()
    return policy.grad


@pytest.mark.parametrize(("temperature", "fixed"), [(0.0, 1 / 3), (0.5, 0.2), (0.75, 1 / 17)])
def test_iw_sft_bandit_fixed_point(temperature, fixed):
    # pi is proportional to pi_ref * success ** (1 / (1 - temperature)): (1/2)^1, (1/2)^2, (1/2)^4 against 1
    assert bandit_gradient(fixed, temperature).abs().max() < 1e-12
    assert bandit_gradient(fixed + 0.01, temperature)[0] > 0  # descent lowers left
    assert bandit_gradient(fixed - 0.01, temperature)[0] < 0


def descend(temperature, steps, left=0.5, rate=2.0):
    """Gradient descent on the loss; returns the share of left pulls after every step."""
    path = [left]
    for _ in range(steps):
        policy = torch.log(tensor([path[-1], 1 - path[-1]], dtype=torch.float64))
        path.append((policy - rate * bandit_gradient(path[-1], temperature)).softmax(0)[0].item())
    return path


@pytest.mark.parametrize(("temperature", "left"), [(0.0, 1 / 3), (0.5, 0.2)])
def test_iw_sft_bandit_by_gradient_descent(temperature, left):
    assert descend(temperature, 60)[-1] == pytest.approx(left, abs=1e-9)
    assert descend(temperature, 60, left=0.05)[-1] == pytest.approx(left, abs=1e-9)


def test_iw_sft_bandit_reaches_the_rl_optimum():
    path = descend(
        1.0, 100, rate=20.0
    )  # plain fine-tuning stops at 1/3; here every step still lowers the worse arm
    assert all(b < a for a, b in itertools.pairwise(path))
    assert path[-1] < 1e-3


# poft


def test_poft_hand_value_and_gradient(f64):
    scores, ref = f64(-1.0, -0.25), f64(-1.5, -2.0)
    loss = poft(scores, ref, beta=2.0, gamma=-0.3)  # 2 * .5 - .3 = .7 and 2 * 1.75 - .3 = 3.2
    expected = (math.log1p(math.exp(-0.7)) + math.log1p(math.exp(-3.2))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    slopes = [-2 / (1 + math.exp(0.7)) / 2, -2 / (1 + math.exp(3.2)) / 2]
    assert scores.grad.tolist() == pytest.approx(slopes, abs=1e-12)
    assert ref.grad is None


def test_poft_averages_the_models_inside_the_sigmoid(f64):
    scores, ref = f64(-1.0, -0.25), f64([[-1.5, -2.0], [-0.9, -0.1], [-4.2, -0.6]])
    mean = f64(-2.2, -0.9)
    assert poft(scores, ref).item() == pytest.approx(poft(scores, mean).item(), abs=1e-12)
    outside = sum(poft(scores, one).item() for one in ref) / 3
    assert poft(scores, ref).item() < outside - 0.05  # Jensen: the average of the losses is another number


def test_poft_limits(f64):
    assert poft(f64(-0.7), f64(-0.7)).item() == pytest.approx(math.log(2), abs=1e-12)
    scores = f64(-1.0, -0.25)
    loss = poft(scores, f64(1e4, 1e4))  # aligned models sure of every row: plain fine-tuning per row
    loss.backward()
    assert scores.grad.tolist() == [-0.5, -0.5]
    assert loss.isfinite()
    assert poft(f64(-1e4), f64(1e4)).item() == pytest.approx(2e4)  # log(sigmoid) would be -inf


def test_poft_denom_and_no_rows(f64):
    scores, ref = f64(-1.0, -0.25, -2.0), f64(-1.5, -2.0, -0.5)
    whole = poft(scores, ref).item()
    parts = [poft(scores[i : i + 1], ref[i : i + 1], denom=3).item() for i in range(3)]
    assert sum(parts) == pytest.approx(whole, abs=1e-12)
    empty = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    loss = poft(empty, torch.zeros(0, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0


def test_poft_equals_the_authors_numbers(f64):
    # scripts/run_poft.py: compute_loss of its trainer on LOGITS and LABELS, stored scores -.375 and -1.875
    logits, labels = f64(LOGITS), tensor(LABELS)
    scores = seq_logps(unshifted(logits, labels), labels != -100, mean=True)
    loss = poft(scores, f64(-0.375, -1.875))
    assert loss.item() == pytest.approx(0.7714663396816671, rel=1e-12)
    loss.backward()
    row0 = [-0.08658089076014011, 0.012281591554358682, 0.07429929920578143]
    row1 = [0.03317425900371652, 0.004961828112919948, -0.03813608711663646]
    assert logits.grad[0, 0].tolist() == pytest.approx(row0, rel=1e-10)
    assert logits.grad[1, 1].tolist() == pytest.approx(row1, rel=1e-10)


# ift_inputs


def test_ift_inputs_by_hand(f64):
    table = f64([[0.0, 1.0], [2.0, -1.0], [0.5, 3.0], [-4.0, 0.25]])
    ids, greedy = tensor([[0, 1, 2, 3], [3, 2, 1, 0]]), tensor([[2, 3, 0, 1], [1, 0, 3, 2]])
    mask = tensor([[F, T, F, T], [T, F, T, T]])
    embeds = table[ids]
    mixed = ift_inputs(embeds, table, greedy, mask, lam=0.25)
    expected = embeds.detach().clone()
    # position t takes a quarter of what was guessed at t - 1; position 0 has no guess
    expected[0, 1] = tensor([0.75 * 2 + 0.25 * 0.5, 0.75 * -1 + 0.25 * 3])
    expected[0, 3] = tensor([0.75 * -4 + 0.25 * 0, 0.75 * 0.25 + 0.25 * 1])
    expected[1, 2] = tensor([0.75 * 2 + 0.25 * 0, 0.75 * -1 + 0.25 * 1])
    expected[1, 3] = tensor([0.75 * 0 + 0.25 * -4, 0.75 * 1 + 0.25 * 0.25])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)
    assert not mixed.requires_grad
    default = ift_inputs(embeds, table, greedy, mask)[0, 1]
    assert default.tolist() == pytest.approx([0.8 * 2 + 0.2 * 0.5, 0.8 * -1 + 0.2 * 3], abs=1e-12)


def test_ift_inputs_limits(f64):
    table = f64([[0.1, 1.3], [2.7, -1.9], [0.5, 3.1]])
    ids, greedy = tensor([[0, 1, 2]]), tensor([[2, 0, 1]])
    assert torch.equal(ift_inputs(table[ids], table, greedy, tensor([[F, T, T]]), lam=0.0), table[ids])
    assert torch.equal(ift_inputs(table[ids], table, greedy, tensor([[F, F, F]])), table[ids])
    assert torch.equal(
        ift_inputs(table[ids], table, greedy, tensor([[F, T, T]]), lam=1.0), table[tensor([[0, 2, 0]])]
    )


# ift_weights


def test_ift_weights_code_form_by_hand(f64):
    losses, mask = f64([[9.0, 1.0, 3.0, 0.5, 9.0]]), tensor([[F, T, T, T, F]])
    weights = ift_weights(losses, mask, gamma=0.5)
    # still to come: .5; 3 + .25 = 3.25; 1 + 1.625 = 2.625; together 6.375
    expected = [[0, 3 * 2.625 / 6.375, 3 * 3.25 / 6.375, 3 * 0.5 / 6.375, 0]]
    torch.testing.assert_close(weights, tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    first = ift_weights(f64([[3.0, 0.0, 0.0]]), tensor([[T, T, T]]), gamma=0.5)
    assert first.tolist() == [[3.0, 0.0, 0.0]]  # nothing to come: all weight on the first


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("width", [1, 2, 5, 8, 13])
def test_ift_weights_equal_the_sums_they_stand_for(gamma, width):
    generator = torch.Generator().manual_seed(width)
    losses = torch.rand(2, width, generator=generator, dtype=torch.float64) + 0.01
    mask = torch.rand(2, width, generator=generator) < 0.8
    code = ift_weights(losses, mask, gamma=gamma)
    paper = ift_weights(losses, mask, gamma=gamma, future=False)
    for b in range(2):
        own = [t for t in range(width) if mask[b, t]]
        ahead = {t: sum(gamma ** (i - t) * losses[b, i].item() for i in own if i >= t) for t in own}
        for t in range(width):
            scale = len(own) / sum(ahead.values()) if own else 0
            future = 1.0 if gamma == 0 else ahead.get(t, 0) * scale
            assert code[b, t].item() == pytest.approx(future if t in own else 0, abs=1e-12)
            before = sum(gamma ** (t - n) for n in own if n <= t)
            assert paper[b, t].item() == pytest.approx(before if t in own else 0, abs=1e-12)
    torch.testing.assert_close(code.sum(1), mask.sum(1).double(), rtol=0, atol=1e-12)


def test_ift_weights_paper_form_for_three_tokens(f64):
    weights = ift_weights(f64([[7.0, 1.0, 2.0, 3.0]]), tensor([[F, T, T, T]]), gamma=0.5, future=False)
    assert weights.tolist() == [[0.0, 1.0, 1.5, 1.75]]
    assert not weights.requires_grad


def test_ift_without_residual_and_discount_is_plain_fine_tuning_per_row(f64):
    logps, _, mask = rows(f64)
    for future in (True, False):
        loss = nll(logps, mask, weights=ift_weights(-logps, mask, gamma=0.0, future=future), per="sequence")
        assert loss.item() == nll(logps, mask, per="sequence").item()


def test_ift_weights_row_without_loss_or_tokens(f64):
    losses = f64([[0.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    mask = tensor([[F, T, T], [F, F, F]])
    weights = ift_weights(losses, mask)
    assert weights.tolist() == [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    weights.square().sum().backward()
    assert not losses.grad.any()


# What the authors' trainer gave (src/trainers.py: get_batch_metrics, the branch of this method, run on a toy
# policy; its external discounted sum replaced by the loop it stands for): lam, gamma, loss, two rows of dW.
IFT = [
    (0.25, 0.95, 1.8415077677620038,
     [0.16586760751237137, -0.1451029758534156], [-0.17748795558260008, 0.1433573163637528]),
    (0.375, 0.5, 1.9071458408821353,
     [0.1586516041079814, -0.16282619084353747], [-0.20064112742030138, 0.1736174768046545]),
    (0.0, 0.0, 1.585652012424203,
     [0.10548360508686844, -0.06627465582541756], [-0.06530174783610468, 0.05578915581060081]),
    (1.0, 1.0, 2.1286723019637694,
     [0.20739710100371617, -0.21908574207915], [-0.22002836595320446, 0.16825498812165052]),
]  # fmt: skip


@pytest.mark.parametrize(("lam", "gamma", "expected", "row0", "row2"), IFT)
def test_ift_equals_the_authors_numbers(f64, lam, gamma, expected, row0, row2):
    table = f64([[0.4, -1.1], [1.3, 0.2], [-0.7, 0.9], [0.15, -0.35], [-1.6, 0.55]])
    w = f64([[0.9, -0.3], [-1.2, 0.7], [0.25, 1.4], [0.6, -0.85], [-0.45, 0.1]])
    ids = tensor([[0, 1, 2, 3, 4, 2], [3, 4, 1, 0, 0, 0]])
    labels = tensor([[-100, -100, 2, 3, 4, 2], [-100, 4, 1, -100, -100, -100]])
    mask = labels != -100

    def policy(embeds):
        return torch.tanh(embeds.cumsum(1)) @ w.T

    greedy = policy(table[ids]).argmax(-1)
    logps = unshifted(policy(ift_inputs(table[ids], table, greedy, mask, lam=lam)), labels)
    loss = nll(logps, mask, weights=ift_weights(-logps, mask, gamma=gamma), per="sequence")
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()  # through the weights too, as in their code
    assert w.grad[0].tolist() == pytest.approx(row0, rel=1e-10)
    assert w.grad[2].tolist() == pytest.approx(row2, rel=1e-10)
    assert table.grad is None  # the look-ups are frozen


def test_ift_weights_can_be_constants(f64):
    logps, _, mask = rows(f64)
    weights = ift_weights(-logps.detach(), mask, gamma=0.5)
    nll(logps, mask, weights=weights, per="sequence").backward()
    expected = -weights * mask / mask.sum(1, keepdim=True) / 2
    torch.testing.assert_close(logps.grad, expected, rtol=0, atol=1e-12)


# multi_token


def ahead(f64):
    """Three heads over two rows; the zeros stand where a head has no target."""
    logps = f64([[[0.0, -0.5, -1.25, -2.0], [0.0, 0.0, -0.75, -3.5]],
                 [[0.0, 0.0, -1.5, -2.25], [0.0, 0.0, -0.1, -4.0]],
                 [[0.0, 0.0, 0.0, -3.0], [0.0, 0.0, 0.0, -5.0]]])  # fmt: skip
    return logps, logps.detach() != 0


def test_multi_token_by_hand(f64):
    logps, masks = ahead(f64)
    loss = multi_token(logps, masks, alpha=0.3, decay=0.5)
    # 8 / 5, 7.85 / 4, 8 / 2: each head over its own targets, decay once for the first
    assert loss.item() == pytest.approx(1.6 + 0.3 * (0.5 * 7.85 / 4 + 0.25 * 4), abs=1e-12)
    loss.backward()
    slopes = [-1 / 5, -0.3 * 0.5 / 4, -0.3 * 0.25 / 2]
    torch.testing.assert_close(
        logps.grad, masks * tensor(slopes, dtype=torch.float64)[:, None, None], rtol=0, atol=1e-12
    )
    expected = 1.6 + 0.01 * (0.8 * 7.85 / 4 + 0.64 * 4)
    assert multi_token(logps, masks).item() == pytest.approx(expected, abs=1e-12)


def test_multi_token_alpha_zero_or_one_head_is_plain_fine_tuning(f64):
    logps, masks = ahead(f64)
    plain = nll(logps[0], masks[0])
    assert multi_token(logps, masks, alpha=0.0).item() == plain.item()
    assert multi_token(logps[:1], masks[:1]).item() == plain.item()
    (slope,) = torch.autograd.grad(multi_token(logps, masks, alpha=0.0), logps)
    assert not slope[1:].any()


# What the authors' code gave (caft/core.py: add_caft_loss on fixed logits of three heads): alpha, decay,
# factor of the schedule, loss, its gradient at [0, 0, 0], [1, 1, 1] and [2, 0, 1] of the logits.
CAFT = [
    (0.01, 0.8, 1.0, 1.3941050855362833,
     [0.06514449977268416, 0.008833999671159415, -0.16324335681499996, 0.08926485737115641],
     [0.00023131428100492082, 0.0006511742748458494, 2.399336442141703e-05, -0.0009064819202721876],
     [7.616653456178666e-05, 0.0005483546160515928, 0.0014537797780669393, -0.0020783009286803188]),
    (0.3, 0.5, math.sin(0.7 * math.pi / 2), 1.8044776284863286,
     [0.06514449977268416, 0.008833999671159415, -0.16324335681499996, 0.08926485737115641],
     [0.00386442250337486, 0.010878759886336523, 0.00040084207943834316, -0.01514402446914973],
     [0.0007952915533520005, 0.005725635239891913, 0.01517961641004797, -0.021700543203291883]),
    (0.3, 0.5, 0.0, 1.359091917934211,
     [0.06514449977268416, 0.008833999671159415, -0.16324335681499996, 0.08926485737115641],
     [0.0] * 4, [0.0] * 4),
]  # fmt: skip


@pytest.mark.parametrize(("alpha", "decay", "factor", "expected", "own", "first", "second"), CAFT)
def test_multi_token_equals_the_authors_numbers(alpha, decay, factor, expected, own, first, second):
    places = itertools.product(range(3), range(2), range(5), range(4))
    values = [round(math.sin(1 + 7 * h + 3 * b + 1.7 * t + 2.3 * v) * 2, 3) for h, b, t, v in places]
    logits = tensor(values, dtype=torch.float64).reshape(3, 2, 5, 4).requires_grad_()
    labels = tensor([[-100, 2, 0, 1, 3], [-100, -100, 1, 3, -100]])
    logps, masks = [], []
    for i in range(3):  # head i reads position t - 1 - i for label t
        found = logits[i].log_softmax(-1).roll(1 + i, 1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        masks.append((labels != -100) & (torch.arange(5) > i))
        logps.append(torch.where(masks[i], found, 0.0))
    loss = multi_token(torch.stack(logps), torch.stack(masks), alpha=alpha * factor, decay=decay)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    for (h, b, t), slope in {(0, 0, 0): own, (1, 1, 1): first, (2, 0, 1): second}.items():
        assert logits.grad[h, b, t].tolist() == pytest.approx(slope, rel=1e-10)


def test_multi_token_head_without_target_adds_zero(f64):
    logps, masks = ahead(f64)
    masks[2] = False
    loss = multi_token(logps, masks, alpha=0.3, decay=0.5)
    assert loss.item() == pytest.approx(1.6 + 0.3 * 0.5 * 7.85 / 4, abs=1e-12)
    loss.backward()
    assert logps.grad.isfinite().all()
    assert not logps.grad[2].any()
    assert multi_token(logps, torch.zeros_like(masks)).item() == 0


def test_multi_token_split_over_the_batch(f64):
    logps, masks = ahead(f64)
    whole, counts = multi_token(logps, masks, alpha=0.3), masks.sum((1, 2))
    halves = [multi_token(logps[:, i : i + 1], masks[:, i : i + 1], alpha=0.3, denom=counts) for i in (0, 1)]
    assert sum(halves).item() == pytest.approx(whole.item(), abs=1e-12)
    one = multi_token(logps, masks, alpha=0.3, decay=0.5, denom=5)
    assert one.item() == pytest.approx((8 + 0.3 * (0.5 * 7.85 + 0.25 * 8)) / 5, abs=1e-12)
    assert multi_token(logps, masks, alpha=0.3, decay=0.5, denom=tensor(5)).item() == one.item()


# Properties that the losses share


def ift(logps, mask, denom=None):
    return nll(logps, mask, weights=ift_weights(-logps, mask), per="sequence", denom=denom)


def test_batch_split_with_denom_changes_nothing(f64):
    logps, ref, mask = rows(f64)
    whole = [nll(logps, mask), nll(logps, mask, per="sequence"), iw_sft(logps, ref, mask), ift(logps, mask)]
    halves = [
        sum(nll(logps[i : i + 1], mask[i : i + 1], denom=5) for i in (0, 1)),
        sum(nll(logps[i : i + 1], mask[i : i + 1], per="sequence", denom=2) for i in (0, 1)),
        sum(iw_sft(logps[i : i + 1], ref[i : i + 1], mask[i : i + 1], denom=5) for i in (0, 1)),
        sum(ift(logps[i : i + 1], mask[i : i + 1], denom=2) for i in (0, 1)),
    ]
    for a, b in zip(whole, halves, strict=True):
        assert a.item() == pytest.approx(b.item(), abs=1e-12)


@pytest.mark.parametrize("left", [0, 3])
def test_padding_on_either_side_changes_nothing(f64, left):
    logps, ref, mask = rows(f64)
    wide = [pad(x, (left, 3 - left)) for x in (logps, ref, mask)]
    assert nll(wide[0], wide[2], per="sequence").item() == nll(logps, mask, per="sequence").item()
    assert iw_sft(*wide).item() == pytest.approx(iw_sft(logps, ref, mask).item(), abs=1e-12)
    assert ift(wide[0], wide[2]).item() == pytest.approx(ift(logps, mask).item(), abs=1e-12)
    late = nll(wide[0], wide[2], weights=ift_weights(-wide[0], wide[2], future=False)).item()
    expected = nll(logps, mask, weights=ift_weights(-logps, mask, future=False)).item()
    assert late == pytest.approx(expected, abs=1e-12)
    logps, masks = ahead(f64)
    wide = [pad(x, (left, 3 - left)) for x in (logps, masks)]
    assert multi_token(*wide).item() == pytest.approx(multi_token(logps, masks).item(), abs=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_low_precision_agrees_with_float64(dtype, rtol, level):
    generator = torch.Generator().manual_seed(1)
    logps = -torch.rand(4, 300, generator=generator, dtype=torch.float64) * 3
    ref = (logps + 0.2 * torch.randn(4, 300, generator=generator, dtype=torch.float64)).clamp(max=0)
    mask = torch.rand(4, 300, generator=generator) < 0.7
    mask[:, 0] = False
    three = torch.stack([mask, mask.roll(1, 1), mask.roll(2, 1)])
    for run in (
        lambda p, _: nll(p, mask, per="sequence"),
        lambda p, r: iw_sft(p, r, mask, level=level),
        lambda p, _: ift(p, mask),
        lambda p, r: poft(seq_logps(p, mask, mean=True), seq_logps(r - 0.5, mask, mean=True)),
        lambda p, r: multi_token(torch.stack([p, r, p]), three),
    ):
        low = run(logps.to(dtype), ref.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), run(logps, ref), rtol=rtol, atol=0)


# In the training loop


def test_ift_in_the_training_loop():
    from cotkit import lab

    model, tokenizer = lab.load("tiny")
    chains, settings = lab.rows("word_problem", "train", n=2), {"steps": 1, "batch": 2, "unit": "sequence"}
    before = copy.deepcopy(model.state_dict())

    def first_loss(lam, gamma):
        def prepare(batch, _):
            with torch.no_grad():
                inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
                greedy = model(**inputs).logits.argmax(-1)
            embedding = model.get_input_embeddings()
            gold = embedding(batch["input_ids"])
            return {
                **batch, "inputs_embeds": ift_inputs(gold, embedding.weight, greedy, batch["mask"], lam=lam)
            }  # fmt: skip

        def loss(logps, batch, denom):
            weights = ift_weights(-logps, batch["mask"], gamma=gamma)
            return nll(logps, batch["mask"], weights=weights, per="sequence", denom=denom)

        model.load_state_dict(before)
        return lab.fit(model, tokenizer, chains, loss, prepare=prepare, **settings)["loss"][0]

    own = lab.fit(
        model, tokenizer, chains,
        lambda logps, batch, denom: nll(logps, batch["mask"], per="sequence", denom=denom), **settings,
    )["loss"][0]  # fmt: skip
    assert first_loss(0.0, 0.0) == pytest.approx(own, rel=1e-5)
    assert first_loss(0.9, 0.95) > 1.01 * own


# Refusals


@pytest.mark.errors
@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_what_is_impossible_is_refused_where_it_counts(f64, bad):
    q, ref = f64([[0.0, -1.0, bad]]), f64([[0.0, -1.5, -2.5]])
    mask = tensor([[False, True, True]])
    for level in ("sequence", "token"):
        with pytest.raises(
            ValueError, match=f"iw_weights: expected q_logps finite under the mask, got {bad}"
        ):
            iw_weights(q, ref, mask, level=level, temperature=0.0)
        with pytest.raises(ValueError, match="iw_weights: expected ref_logps finite"):
            iw_weights(ref, q, mask, level=level)
        unseen = iw_weights(q, ref, tensor([[False, True, False]]), level=level)
        assert unseen.isfinite().all()
    heads, masks = torch.stack([ref, q]), torch.stack([mask, mask])
    with pytest.raises(ValueError, match=f"multi_token: expected logps finite under the mask, got {bad}"):
        multi_token(heads, masks, alpha=0.0)
    masks[1, 0, 2] = False
    assert multi_token(heads, masks, alpha=0.5, decay=1.0).item() == pytest.approx(2.5, abs=1e-12)  # 2 + 1/2


@pytest.mark.errors
def test_refusals(f64):
    logps, ref, mask = rows(f64)
    with pytest.raises(ValueError, match=r"nll: expected equal shapes, got logps \[2, 4\], weights \[2, 1\]"):
        nll(logps, mask, weights=f64([[1.0], [2.0]]))
    with pytest.raises(TypeError, match="weights as a float tensor, got bool"):
        nll(logps, mask, weights=mask)
    with pytest.raises(ValueError, match="per to be one of 'token', 'sequence', got 'row'"):
        nll(logps, mask, per="row")
    with pytest.raises(ValueError, match="denom > 0"):
        nll(logps, mask, denom=0)
    with pytest.raises(ValueError, match=r"iw_weights: expected level to be one of .*got 'step'"):
        iw_weights(logps, ref, mask, level="step")
    with pytest.raises(TypeError, match="temperature as a number"):
        iw_weights(logps, ref, mask, temperature=None)
    with pytest.raises(ValueError, match=r"clip = \(low, high\) with 0 <= low <= high, got \(2, 1\)"):
        iw_weights(logps, ref, mask, clip=(2, 1))
    with pytest.raises(ValueError, match=r"iw_sft: expected equal shapes, got ref_logps \[2, 3\]"):
        iw_sft(logps, ref[:, 1:], mask)
    with pytest.raises(ValueError, match=r"iw_weights: expected equal shapes, got q_logps \[2, 3\]"):
        iw_sft(logps, ref, mask, q_logps=ref[:, 1:])
    with pytest.raises(ValueError, match=r"poft: expected equal shapes, got scores \[2\], ref_scores \[3\]"):
        poft(f64(-1.0, -2.0), f64(-1.0, -2.0, -3.0))
    with pytest.raises(ValueError, match=r"poft: expected scores \[B\], got \[2, 4\]"):
        poft(logps, ref)
    with pytest.raises(ValueError, match="poft: expected the scores of at least one aligned model"):
        poft(f64(-1.0, -2.0), f64([[-1.0, -2.0]])[:0])
    with pytest.raises(ValueError, match="beta > 0"):
        poft(f64(-1.0), f64(-2.0), beta=0.0)
    with pytest.raises(ValueError, match="poft: expected denom > 0"):
        poft(f64(-1.0), f64(-2.0), denom=0)
    with pytest.raises(TypeError, match="gamma as a number"):
        poft(f64(-1.0), f64(-2.0), gamma=None)
    table, ids = f64([[0.5, 1.0], [2.0, -1.0]]), tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    with pytest.raises(ValueError, match=r"ift_inputs: expected one B, T and one D, got embeds \[2, 3, 2\]"):
        ift_inputs(table[ids[:, 1:]], table, ids, mask)
    with pytest.raises(ValueError, match=r"embedding \[2, 1\]"):
        ift_inputs(table[ids], table[:, :1], ids, mask)
    with pytest.raises(ValueError, match=r"greedy_ids \[2, 3\], mask \[2, 4\]"):
        ift_inputs(table[ids], table, ids[:, 1:], mask)
    with pytest.raises(TypeError, match="greedy_ids as an integer tensor"):
        ift_inputs(table[ids], table, logps, mask)
    with pytest.raises(ValueError, match=r"lam in \[0, 1\], got 1.5"):
        ift_inputs(table[ids], table, ids, mask, lam=1.5)
    with pytest.raises(TypeError, match="ift_weights: expected mask as a bool"):
        ift_weights(-logps, mask.float())
    with pytest.raises(ValueError, match=r"gamma in \[0, 1\], got -0.5"):
        ift_weights(-logps, mask, gamma=-0.5)
    with pytest.raises(ValueError, match=r"got token_nll \[2, 3\], mask \[2, 4\]"):
        ift_weights(-logps[:, 1:], mask)
    heads, masks = ahead(f64)
    with pytest.raises(ValueError, match="one denom or one each, got 3 heads and 2 counts"):
        multi_token(heads, masks, denom=tensor([5, 4]))
    with pytest.raises(ValueError, match="got 0 heads"):
        multi_token(heads[:0], masks[:0])
    with pytest.raises(ValueError, match=r"multi_token: expected logps \[H, B, T\], got \[2, 4\]"):
        multi_token(heads[0], masks)
    with pytest.raises(ValueError, match="alpha >= 0"):
        multi_token(heads, masks, alpha=-0.1)
    with pytest.raises(ValueError, match="decay >= 0"):
        multi_token(heads, masks, decay=-0.1)
