import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import cross_entropy, pad

from cotkit.losses.sft import ift_inputs, ift_weights, iw_sft, iw_weights, multi_token, nll, poft

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


def test_iw_sft_bandit_reaches_the_rl_optimum():
    left = 0.5
    for _ in range(150):  # SFT stops at 1/3; here every step still lowers the worse arm
        logits = torch.log(tensor([left, 1 - left], dtype=torch.float64)) - 2 * bandit_gradient(left, 1.0)
        assert logits.softmax(0)[0] < left
        left = logits.softmax(0)[0].item()
    assert left < 0.01


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


def test_batch_split_with_denom_changes_nothing(f64):
    logps, ref, mask = rows(f64)
    whole = [nll(logps, mask), nll(logps, mask, per="sequence"), iw_sft(logps, ref, mask)]
    halves = [
        sum(nll(logps[i : i + 1], mask[i : i + 1], denom=5) for i in (0, 1)),
        sum(nll(logps[i : i + 1], mask[i : i + 1], per="sequence", denom=2) for i in (0, 1)),
        sum(iw_sft(logps[i : i + 1], ref[i : i + 1], mask[i : i + 1], denom=5) for i in (0, 1)),
    ]
    for a, b in zip(whole, halves, strict=True):
        assert a.item() == pytest.approx(b.item(), abs=1e-12)


@pytest.mark.parametrize("left", [0, 3])
def test_padding_on_either_side_changes_nothing(f64, left):
    logps, ref, mask = rows(f64)
    wide = [pad(x, (left, 3 - left)) for x in (logps, ref, mask)]
    assert nll(wide[0], wide[2], per="sequence").item() == nll(logps, mask, per="sequence").item()
    assert iw_sft(*wide).item() == pytest.approx(iw_sft(logps, ref, mask).item(), abs=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_low_precision_agrees_with_float64(dtype, rtol, level):
    generator = torch.Generator().manual_seed(1)
    logps = -torch.rand(4, 300, generator=generator, dtype=torch.float64) * 3
    ref = (logps + 0.2 * torch.randn(4, 300, generator=generator, dtype=torch.float64)).clamp(max=0)
    mask = torch.rand(4, 300, generator=generator) < 0.7
    mask[:, 0] = False
    for run in (lambda p, _: nll(p, mask, per="sequence"), lambda p, r: iw_sft(p, r, mask, level=level)):
        low = run(logps.to(dtype), ref.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), run(logps, ref), rtol=rtol, atol=0)


# Refusals


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
