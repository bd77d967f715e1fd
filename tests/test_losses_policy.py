import itertools
import math

import pytest
import torch
from torch import tensor

from cotkit import tokens
from cotkit.losses.advantage import aapo, better_than_direct, gae, group, kl_rewards, whiten
from cotkit.losses.policy import clipped_value, entropy_temperature, grpo, reinforce, srft
from cotkit.losses.sft import nll

T, F = True, False
MASK = tensor([[F, T, T, T, T], [F, T, T, T, F], [F, T, T, F, F]])
LOGPS = [[0.0, -0.7, -1.3, -0.2, -0.9], [0.0, -0.4, -2.1, -0.6, 0.0], [0.0, -1.5, -0.3, 0.0, 0.0]]
OLD = [[0.0, -1.1, -1.2, -0.45, -0.3], [0.0, -0.5, -1.7, -0.8, 0.0], [0.0, -1.0, -0.75, 0.0, 0.0]]
REF = [[0.0, -0.6, -1.9, -0.35, -0.8], [0.0, -0.9, -1.4, -0.7, 0.0], [0.0, -1.25, -0.5, 0.0, 0.0]]
ADV = [1.3, -0.6, 0.4]


def const(*values):
    return torch.tensor(values[0] if isinstance(values[0], list) else list(values), dtype=torch.float64)


def close(ours, theirs, atol=1e-12):
    torch.testing.assert_close(ours, const(theirs), rtol=0, atol=atol)


def one_token(x):
    """Log-probs and mask of answers of one token behind one token of prompt."""
    return torch.stack([torch.zeros_like(x), x], 1), tensor([[F, T]]).expand(len(x), 2)


# By hand


def test_reinforce_by_hand(f64):
    logps = f64([[0.0, -1.0, -3.0], [0.0, -0.5, 0.0]])
    mask = tensor([[F, T, T], [F, T, F]])
    loss = reinforce(logps, f64(2.0, -1.5), mask)
    assert loss.item() == pytest.approx((2 * 1 + 2 * 3 - 1.5 * 0.5) / 3, abs=1e-12)
    loss.backward()
    close(logps.grad, [[0, -2 / 3, -2 / 3], [0, 0.5, 0]])
    a = f64([[9.0, 2.0, -0.25], [9.0, 4.0, 9.0]])
    by_row = reinforce(logps, a, mask, per="sequence")
    assert by_row.item() == pytest.approx(((2 * 1 - 0.25 * 3) / 2 + 4 * 0.5) / 2, abs=1e-12)
    by_row.backward()
    assert a.grad is None


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "value", "slope"),
    [  # rho, A: which branch counts, and d loss / d log-prob = -A rho where it is not clipped
        (0.4, 1.3, -1.3 * 1.28, 0.0),
        (0.4, -1.3, 1.3 * math.exp(0.4), 1.3 * math.exp(0.4)),
        (-0.4, 1.3, -1.3 * math.exp(-0.4), -1.3 * math.exp(-0.4)),
        (-0.4, -1.3, 1.3 * 0.9, 0.0),
        (0.2, 1.3, -1.3 * math.exp(0.2), -1.3 * math.exp(0.2)),
        (-0.05, -1.3, 1.3 * math.exp(-0.05), 1.3 * math.exp(-0.05)),
        (0.0, 1.3, -1.3, -1.3),
        (0.4, 0.0, 0.0, 0.0),
    ],
)
def test_surrogate_by_hand(f64, log_ratio, advantage, value, slope):
    old, a = f64([[0.0, -1.0]]), f64(advantage)
    logps = f64([[0.0, -1.0 + log_ratio]])
    loss = grpo(logps, old, a, tensor([[F, T]]), epsilon=0.1, epsilon_high=0.28)
    assert loss.item() == pytest.approx(value, abs=1e-12)
    loss.backward()
    assert logps.grad[0, 1].item() == pytest.approx(slope, abs=1e-12)
    assert old.grad is None
    assert a.grad is None


def test_epsilon_high_is_epsilon_and_infinity_is_no_clip(f64):
    args = (f64([[0.0, 0.0, -2.0]]), f64([[0.0, -1.0, -1.0]]), f64([[0.0, 1.5, -2.5]]), tensor([[F, T, T]]))
    both = grpo(*args, epsilon=0.3)
    assert both.item() == pytest.approx((-1.5 * 1.3 + 2.5 * 0.7) / 2, abs=1e-12)
    free = grpo(*args, epsilon=math.inf)
    assert free.item() == pytest.approx((-1.5 * math.e + 2.5 / math.e) / 2, abs=1e-12)


def test_kl_term_and_weights_by_hand(f64):
    logps, old, ref = f64([[0.0, -1.0, -0.5]]), f64([[0.0, -1.0, -0.5]]), f64([[0.0, -1.6, -0.2]])
    weights, mask = f64(0.25), tensor([[F, T, T]])
    loss = grpo(logps, old, f64(2.0), mask, ref_logps=ref, beta=0.5, weights=weights)
    k3 = [math.exp(-0.6) + 0.6 - 1, math.exp(0.3) - 0.3 - 1]
    assert loss.item() == pytest.approx(-0.25 * 2 + 0.5 * sum(k3) / 2, abs=1e-12)  # the KL is not weighted
    loss.backward()
    slope = [-0.25 * 2 / 2 + 0.5 * (1 - math.exp(d)) / 2 for d in (-0.6, 0.3)]
    close(logps.grad, [[0.0, *slope]])
    assert ref.grad is None
    assert weights.grad is None
    bare = grpo(logps, old, f64(2.0), mask, ref_logps=ref)  # beta 0
    assert bare.item() == -2.0


def test_token_weights(f64):
    logps = f64(LOGPS)
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = const(ADV)
    ours = grpo(logps, logps.detach(), a, MASK, weights=weights, per="token")
    direct = grpo(logps, logps.detach(), a[:, None] * weights, MASK, per="token")
    assert ours.item() == pytest.approx(direct.item(), abs=1e-12)


def test_what_is_averaged(f64):
    logps = f64(LOGPS)
    args = (logps, logps.detach(), const(ADV), MASK)
    assert grpo(*args).item() == pytest.approx(-(1.3 - 0.6 + 0.4) / 3, abs=1e-12)  # ratios 1
    assert grpo(*args, per="token").item() == pytest.approx(-(4 * 1.3 - 3 * 0.6 + 2 * 0.4) / 9, abs=1e-12)
    dr = grpo(*args, per="token", denom=3 * 10)
    assert dr.item() == pytest.approx(-(4 * 1.3 - 3 * 0.6 + 2 * 0.4) / 30, abs=1e-12)


def test_clipped_value_by_hand(f64):
    v = f64([[0.0, 1.0, 0.5, -1.0, 0.35]])
    old, target = f64([[0.0, 0.3, 0.4, -1.1, 0.1]]), f64([[0.0, 2.0, 0.1, 0.2, 0.3]])
    loss = clipped_value(v, old, target, tensor([[F, T, T, T, T]]))
    # near: .5, .5, -1, .3; (1 - 2)^2 against (.5 - 2)^2; .4^2; 1.2^2; .05^2 against 0
    assert loss.item() == pytest.approx((1.5**2 + 0.4**2 + 1.2**2 + 0.05**2) / 8, abs=1e-12)
    loss.backward()
    close(v.grad, [[0.0, 0.0, 0.4 / 4, -1.2 / 4, 0.05 / 4]])
    assert old.grad is None
    assert target.grad is None
    down = clipped_value(f64([[0.0, -1.0]]), f64([[0.0, 0.0]]), f64([[0.0, -2.0]]), tensor([[F, T]]))
    assert down.item() == pytest.approx((2 - 0.2) ** 2 / 2, abs=1e-12)
    free = clipped_value(v, old, target, tensor([[F, T, T, F, F]]), epsilon=math.inf, per="token", denom=8)
    assert free.item() == pytest.approx((1 + 0.16) / 16, abs=1e-12)


def test_srft_by_hand(f64):
    demo, roll = f64([[0.0, -1.0, -0.5], [0.0, -2.0, 0.0]]), f64([[0.0, -0.7], [0.0, -0.2], [0.0, -1.1]])
    demo_mask, roll_mask = tensor([[F, T, T], [F, T, F]]), tensor([[F, T]] * 3)
    a, h_demo, h_roll = f64(1.5, -0.5), f64(1.0), f64([[0.0, 0.2], [0.0, 9.0], [0.0, 0.4]])
    right = tensor([T, F, T])
    args = (demo, demo_mask, a, roll, roll_mask, right, h_demo[0], h_roll)
    loss = srft(*args)
    imitate = 0.5 * math.exp(-1) * (1 + 0.5 + 2) / 3
    second = -(1.5 * (math.exp(-1) + math.exp(-0.5)) - 0.5 * math.exp(-2)) / 3
    third = 0.1 * (math.exp(0.2) * 0.7 + math.exp(0.4) * 1.1) / 2
    assert loss.item() == pytest.approx(imitate + second + third - 0.2, abs=1e-12)
    loss.backward()
    w, p = 0.5 * math.exp(-1), [math.exp(-1), math.exp(-0.5), math.exp(-2)]
    slopes = [(-w - 1.5 * p[0]) / 3, (-w - 1.5 * p[1]) / 3, (-w + 0.5 * p[2]) / 3]
    close(demo.grad, [[0, slopes[0], slopes[1]], [0, slopes[2], 0]])
    close(roll.grad[:, 1], [-0.05 * math.exp(0.2), 1.0, -0.05 * math.exp(0.4)])  # wrong answers: down
    assert a.grad is None
    assert h_demo.grad is None
    assert h_roll.grad is None
    by_row = srft(*args, w_sft=2.0, w_rl=0.0, per="sequence")
    imitate = 2 * math.exp(-1) * (1.5 / 2 + 2) / 2
    second = -(1.5 * (p[0] + p[1]) / 2 - 0.5 * p[2]) / 2
    assert by_row.item() == pytest.approx(imitate + second - 0.2, abs=1e-12)


def test_srft_weights_of_the_entry(f64):
    """Entropy 1: .184 and .272; .2: .409 and .122."""
    x, m = f64([[0.0, -1.0]]), tensor([[F, T]])
    none = tensor([[F, F]])
    for h, w_sft, w_rl in ((1.0, 0.184, 0.272), (0.2, 0.409, 0.122)):
        demo = srft(x, m, const(0.0), x, none, tensor([T]), h, f64(h).detach())
        roll = srft(x, none, const(0.0), x, m, tensor([T]), h, h)
        assert (demo.item(), roll.item()) == pytest.approx((w_sft, w_rl), abs=5e-4)


def test_entropy_temperature_by_hand(f64):
    """Logits log 3 and 0 have chances 3/4 and 1/4 at temperature 1: entropy log 4 - 3/4 log 3."""
    h = math.log(4) - 0.75 * math.log(3)
    logits = f64([[[1.7 * math.log(3), 0.0], [0.0, 50.0], [3.0, 1.0]]])
    mask = tensor([[F, T, F]])  # token 1 was drawn from the distribution at position 0
    found = entropy_temperature(logits, mask, target=h)
    assert found.item() == pytest.approx(1.7, abs=1e-9)
    assert not found.requires_grad
    for mask in (tensor([[F, T, T]]), tensor([[T, T, T]])):
        found = entropy_temperature(logits, mask, target=0.21)
        seen = tokens.entropy(logits, temperature=found.item())[0, :2].mean()
        assert seen.item() == pytest.approx(0.21, abs=1e-9)


def test_entropy_temperature_at_its_ends():
    z, mask = torch.zeros(1, 2, 4), tensor([[F, T]])
    assert entropy_temperature(z, mask).item() == pytest.approx(0.1)  # log 4 at every temperature
    sure = tensor([[[90.0, 0.0], [0.0, 0.0]]])
    assert entropy_temperature(sure, mask).item() == pytest.approx(2.0)
    assert entropy_temperature(sure, mask, low=0.5, high=0.75).item() == pytest.approx(0.75)
    assert entropy_temperature(z, ~mask & False).item() == pytest.approx(2.0)
    impossible = tensor([[[math.log(3), 0.0, -math.inf], [0.0, 0.0, 0.0]]])
    h = math.log(4) - 0.75 * math.log(3)
    assert entropy_temperature(impossible, mask, target=h).item() == pytest.approx(1.0, abs=1e-4)


# Authors' code on the tensors at the top: its numbers


def rows(loss, logps):
    loss.backward()
    return logps.grad


def test_aapo_equals_the_authors_code(f64):
    """JianxXiong/AAPO open-r1/trainer/AAPOTrainer.py compute_loss, advantages and constraint given."""
    logps = f64(LOGPS)
    momentum = const(1.0, -0.7, 0.1).clamp(-0.2, 0.28)
    loss = reinforce(logps, const(0.5, -0.3, 1.1) + momentum, MASK)
    assert loss.item() == pytest.approx(0.33644444444444443, abs=1e-12)
    a = [0.08666666666666667, -0.05555555555555555, 0.13333333333333336]
    close(rows(loss, logps), (MASK * -const(a)[:, None]).tolist())


def test_raif_equals_the_authors_code(f64):
    """yuleiqin/RAIF openrlhf/models/loss.py PolicyLoss with loss_mask [True, False, True]."""
    logps = f64(LOGPS)
    keep = better_than_direct(const([[3.0, 1.0, 2.0]]), const([[2.0]])).flatten()
    assert keep.tolist() == [T, F, T]
    loss = grpo(logps, const(OLD), const(ADV), MASK, weights=keep.double())
    dropped = -ADV[1] / 3  # the released ratio of a dropped sample is 1
    assert loss.item() == pytest.approx(-0.337914024844924 - dropped, abs=1e-12)
    close(rows(loss, logps), [
        [0.0, 0.0, -0.09802405362056228, 0.0, -0.0594545939101862],
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, -0.04043537731417556, 0.0, 0.0, 0.0],
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "value", "column"),
    [
        (lambda m: (1.05 - m) ** 2, -0.15863579374421863,
         [-0.046527825061055614, -0.004505567588757676, 0.001208461646146788]),
        (lambda m: torch.exp(1 - m), -0.6283169699669043,
         [-0.18626511572261456, -0.004505567588757676, 0.001208461646146788]),
        (lambda m: -torch.log(0.02 + m), -0.3247747047012207,
         [-0.09595667694160524, -0.004505567588757676, 0.001208461646146788]),
    ],
)  # fmt: skip
def test_difficulty_weights_equal_the_authors_code(f64, weight, value, column):
    """AMAP-ML/UniVG-R1 trainer/grpo_trainer.py compute_loss: miou .35, its power 2, beta .04."""
    logps = f64(LOGPS)
    loss = grpo(
        logps, const(OLD), const(ADV), MASK, ref_logps=const(REF), beta=0.04,
        weights=weight(torch.full((3,), 0.35, dtype=torch.float64)),
    )  # fmt: skip
    assert loss.item() == pytest.approx(value, abs=1e-12)
    close(rows(loss, logps)[:, 2], column)


def test_r1_vl_equals_the_authors_code(f64):
    """jingyi0000/R1-VL trainer/grpo_trainer.py compute_loss: one step per batch, beta .04."""
    logps = f64(LOGPS)
    loss = grpo(logps, logps.detach(), const(ADV), MASK, ref_logps=const(REF), beta=0.04)
    assert loss.item() == pytest.approx(-0.3638593283272426, abs=1e-12)
    close(rows(loss, logps), [
        [0.0, -0.10868390306025216, -0.10682937212031343, -0.10786902658808353, -0.10868390306025216],
        [0.0, 0.06841541929016608, 0.06216109907790899, 0.06708961147539573, 0.0],
        [0.0, -0.06856016944458494, -0.06545820502051988, 0.0, 0.0],
    ])  # fmt: skip


def test_relift_equals_the_authors_code(f64):
    """TheRoadQaQ/ReLIFT verl/relift/core_algos.py compute_policy_loss, plain and as its scripts call it."""
    logps = f64(LOGPS)
    plain = grpo(logps, const(OLD), const(ADV), MASK, per="token")
    assert plain.item() == pytest.approx(-0.4284902031680605, abs=1e-12)
    loss = grpo(logps, const(OLD), const(ADV), MASK, epsilon=math.inf, per="token", denom=4)
    assert loss.item() == pytest.approx(-1.1425374559287362, abs=1e-12)
    close(rows(loss, logps), [
        [0.0, -0.48484302673341295, -0.29407216086168686, -0.417308260423516, -0.17836378173055858],
        [0.0, 0.16577563771134712, 0.10054800690534588, 0.18321041372402547, 0.0],
        [0.0, -0.06065306597126335, -0.1568312185490169, 0.0, 0.0],
    ])  # fmt: skip


def test_relift_fine_tuning_step_raises_entropy(f64):
    """Minus alpha times the entropy: a larger alpha leaves a larger entropy after the step."""
    labels, mask, after = tensor([[-100, 1]]), tensor([[F, T]]), []
    for alpha in (0.0, 0.1):
        logits = f64([[[0.5, -0.2, 1.1], [0.0, 0.0, 0.0]]])
        h = tokens.entropy(logits)[:, :-1][mask[:, 1:]].mean()
        loss = nll(tokens.token_logps(logits, labels), mask, per="sequence") - alpha * h
        loss.backward()
        after.append(tokens.entropy(logits - 0.1 * logits.grad)[0, 0].item())
    assert after[1] > after[0]


def test_uft_equals_the_authors_code(f64):
    """liumy2010/UFT verl core_algos: compute_policy_loss, kl_penalty low_var_kl, masked_mean of the hint."""
    logps = f64(LOGPS)
    hint = f64([[0.0, -0.3, -1.7, 0.0], [0.0, -0.9, -0.2, -2.4], [0.0, 0.0, 0.0, 0.0]])
    hinted = hint != 0
    policy = grpo(logps, const(OLD), const(ADV), MASK, ref_logps=const(REF), beta=0.001, per="token")
    loss = policy + 0.001 * nll(hint, hinted)
    assert loss.item() == pytest.approx(-0.4273182322343211, abs=1e-12)
    loss.backward()
    close(hint.grad, (hinted.double() * -0.0002).tolist())
    close(logps.grad, [
        [0.0, -1.1685657563960823e-05, -0.1306486061203157, 1.5476891508326918e-05, -0.0792844775378122],
        [0.0, 0.07372178002063065, -0.00011263918971894191, 0.08143742416422954, 0.0],
        [0.0, -0.02698847658908235, 2.01410274357798e-05, 0.0, 0.0],
    ])  # fmt: skip


def test_unigrpo_equals_the_authors_code(f64):
    """Gen-Verse/dLLM-RL train/rl_mmada_v.py forward_process: epsilon .2, beta .01, k3 against the sampler."""
    scores = [[[0.3, -0.5, 1.1], [0.2, 0.9, -0.4], [1.5, 0.1, 0.0], [0.7, 0.7, -0.9]],
              [[0.0, 0.4, 0.8], [-0.6, 0.2, 0.3], [1.0, -1.0, 0.5], [0.25, 0.35, 0.45]]]  # fmt: skip
    logits, labels = f64(scores), tensor([[-100, 1, 0, 2], [-100, 2, 2, 1]])
    noised = tensor([[F, T, F, T], [F, T, T, T]])
    old = const([[0.0, -0.5, -0.3, -2.6], [0.0, -0.4, -1.35, -1.05]])
    logps = tokens.token_logps(logits, labels, shift=False)
    loss = grpo(logps, old, const(0.8, -0.5), noised)
    assert loss.item() == pytest.approx(-0.16867521701255478, abs=1e-12)
    (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
    close(slope[1, 2], [-0.06425983525186538, -0.008696623004549268, 0.07295645825641464])
    assert not slope[0, 2].any()  # not masked out by noise: no part of it
    kl = 0.01 * torch.where(noised, tokens.kl_k3(logps, old), 0.0).sum() / 2  # summed over tokens there
    assert (loss + kl).item() == pytest.approx(-0.167796727544399, abs=1e-12)


def test_rl4vlm_equals_the_authors_code(f64):
    """RL4VLM/RL4VLM VLM_PPO/a2c_ppo_acktr/algo/ppo.py update: an environment step is one token here."""
    new, old = f64([[-2.0], [-1.2], [-0.7], [-3.0]]), const([[-2.05], [-1.6], [-0.5], [-3.5]])
    mask = torch.ones(4, 1, dtype=torch.bool)
    loss = grpo(new, old, const(1.1, -0.4, -1.3, 0.6), mask, epsilon=0.1)
    assert loss.item() == pytest.approx(-0.012417081739279523, abs=1e-12)
    close(rows(loss, new), [[-0.2890995515034066], [0.14918246976412705], [0.0], [0.0]])
    v, old_v, r = (
        const([[0.3, 0.9, -0.2, 0.5]]),
        const([[0.25, 0.6, 0.1, 0.55]]),
        const([[1.0, 0.2, -0.5, 0.4]]),
    )
    value = clipped_value(v, old_v, r, mask.T, epsilon=0.1)
    assert value.item() == pytest.approx(0.155, abs=1e-12)
    joint = tokens.seq_logps(const(LOGPS), MASK, weights=const([[0, 0.5, 0.5, 1, 1]] * 3))
    close(joint, [-0.5 * 2.0 - 1.1, -0.5 * 2.5 - 0.6, -0.5 * 1.8])


def test_clipped_value_equals_verl(f64):
    """liumy2010/UFT verl core_algos compute_value_loss, epsilon .2."""
    v = f64([[0.0, 0.5, -0.2, 0.9, 0.1], [0.0, 1.2, 0.3, -0.4, 0.7], [0.0, 0.05, 0.6, 0.2, 0.8]])
    old = [[0.0, 0.1, -0.1, 0.6, 0.35], [0.0, 1.15, 0.9, -0.5, 0.2], [0.0, 0.4, 0.1, 0.0, 0.0]]
    target = [[0.0, 1.0, 0.2, 0.3, 0.8], [0.0, 0.0, 0.5, -0.9, 0.4], [0.0, 0.7, 0.3, 9.0, 9.0]]
    loss = clipped_value(v, const(old), const(target), MASK, per="token")
    assert loss.item() == pytest.approx(0.2079166666666667, abs=1e-12)
    close(rows(loss, v)[2], [0.0, -0.0722222222222222, 0.03333333333333333, 0.0, 0.0])


REFT = {  # the prompt is two tokens; what the policy wrote ends with an end token, or with the row
    "mask": tensor([[F, F, T, T, T, F, F], [F, F, T, T, T, T, T], [F, F, T, T, T, T, F]]),
    "old": [[0, -4, -2.1, -1.4, -1.7, -3, -3], [0, -4, -1.9, -1.2, -2.6, -1.8, -1.35],
            [0, -4, -1.5, -2.3, -1.15, -1.6, -3]],
    "ref": [[0, -5, -2.3, -1.6, -1.5, -2, -2], [0, -5, -1.7, -1.4, -2.2, -2.1, -1.3],
            [0, -5, -1.8, -2.1, -1.25, -1.9, -2]],
    "values": [[0, 9, 0.3, -0.2, 0.7, 8, 8], [0, 9, 0.1, 0.5, -0.6, 0.4, 0.25],
               [0, 9, -0.35, 0.8, 0.15, 0.6, 8]],
    "moved": [[0, 0, 0.3, -0.1, 0.05, 1, 1], [0, 0, -0.4, 0.25, 0.1, -0.3, 0.15],
              [0, 0, 0.1, -0.35, 0.22, -0.05, 1]],
    "values moved": [[0, 0, 0.5, -0.1, 0.15, 0, 0], [0, 0, -0.3, 0.1, 0.25, -0.6, 0.05],
                     [0, 0, 0.15, -0.45, 0.3, 0.1, 0]],
}  # fmt: skip


def ppo(*, gamma, lam):
    """PPO of ReFT on the block above: loss, log-probs and values."""
    mask = REFT["mask"]
    old, ref, values, moved, shift = (const(REFT[key]) for key in list(REFT)[1:])
    new = (old * mask + moved).requires_grad_()
    v = (values + shift).requires_grad_()
    rewards = kl_rewards(const(1.0, 0.1, 0.0), old * mask, ref * mask, mask, beta=0.05)
    advantages = gae(rewards, values, mask, gamma=gamma, lam=lam)
    policy = grpo(new, old * mask, whiten(advantages, mask), mask)
    value = clipped_value(v, values, advantages + values, mask)
    return rewards, advantages, policy, value, new, v


def test_ppo_equals_the_authors_code():
    """lqtrung1998/mwp_ReFT train_rl_reft.py rollout and train_one_epoch; its rewards are float32."""
    new = ppo(gamma=1.0, lam=0.95)[1]
    close(new[:, 2:], [
        [0.6152749872077258, 1.1845000023767354, 0.31000001206994066, 0.0, 0.0],
        [0.014443450567085458, -0.4163753137808527, 0.730131273905281, -0.3051250065211206, -0.147499999962],
        [0.40132686996180555, -0.7722875109501184, -0.13925000540912152, -0.6150000244379044, 0.0],
    ], atol=1e-7)  # fmt: skip
    rewards, _, policy, value, new, v = ppo(gamma=0.9, lam=0.8)
    close(rewards[1, 2:], [0.01, -0.01, 0.02, -0.015, 0.1025])
    assert policy.item() == pytest.approx(-0.10611348077684712, abs=1e-7)
    assert value.item() == pytest.approx(0.15092259420340814, abs=1e-7)
    (policy + 5 * value).backward()
    close(new.grad[:, 2:], [
        [0.0, -0.18087558615949492, -0.0546878160078093, 0.0, 0.0],
        [0.0, 0.08546473237835359, -0.09557888099484761, 0.0, 0.0280594739282658],
        [-0.08381525974504653, 0.0, 0.020710036768576152, 0.09598446205447601, 0.0],
    ], atol=1e-7)  # fmt: skip
    down = [-0.1004919716299025, 0.19931670061961812, 0.0, -0.10126666449010371, 0.0658333333209157]
    close(v.grad[1, 2:], down, atol=1e-7)


def test_ppo_equals_a_slow_loop():
    """Everything again, from the formulas, one Python number at a time."""
    gamma, lam, beta, score = 0.9, 0.8, 0.05, (1.0, 0.1, 0.0)
    raw, targets = {}, {}
    for b, row in enumerate(REFT["mask"].tolist()):
        at = [t for t, counts in enumerate(row) if counts]
        r = {t: -beta * (REFT["old"][b][t] - REFT["ref"][b][t]) for t in at}
        r[at[-1]] += score[b]
        v = [REFT["values"][b][t] for t in at] + [0.0]
        delta = [r[t] + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            raw[b, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(at)))
            targets[b, t] = raw[b, t] + v[i]
    mean = sum(raw.values()) / len(raw)
    std = math.sqrt(sum((a - mean) ** 2 for a in raw.values()) / (len(raw) - 1) + 1e-8)
    policy = value = 0.0
    for b in range(3):
        at = [t for t in range(7) if REFT["mask"][b, t]]
        for t in at:
            rho, a = math.exp(REFT["moved"][b][t]), (raw[b, t] - mean) / std
            policy -= min(rho * a, min(max(rho, 0.8), 1.2) * a) / len(at) / 3
            v, moved = REFT["values"][b][t], REFT["values moved"][b][t]
            errors = (v + moved - targets[b, t], v + min(max(moved, -0.2), 0.2) - targets[b, t])
            value += max(e * e for e in errors) / 2 / len(at) / 3
    _, _, ours, ours_value, _, _ = ppo(gamma=gamma, lam=lam)
    assert (ours.item(), ours_value.item()) == pytest.approx((policy, value), abs=1e-12)


# Exact expectations over a policy of three tokens

REWARD = (1.0, 0.3, -0.7)


def expected(theta, loss, n=1, behaviour=None):
    """Mean of a loss of n drawn tokens and their log-probs over all ways to draw them."""
    logp = theta.log_softmax(0)
    chance = (logp if behaviour is None else behaviour).detach()
    total = theta.new_zeros(())
    for drawn in itertools.product(range(3), repeat=n):
        at = list(drawn)
        total = total + chance[at].sum().exp() * loss(at, logp[at])
    return total


def slope(value, theta):
    return torch.autograd.grad(value, theta)[0]


@pytest.fixture
def theta(f64):
    return f64(0.4, -0.3, 0.9)


def test_reinforce_has_the_gradient_of_the_expected_reward(theta):
    r = const(*REWARD)
    exact = slope((theta.softmax(0) * r).sum(), theta)
    for per in ("token", "sequence"):
        loss = expected(
            theta, lambda at, x, per=per: reinforce(one_token(x)[0], r[at], one_token(x)[1], per=per), 2
        )
        torch.testing.assert_close(slope(loss, theta), -exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_grpo_on_policy_has_that_gradient_times_a_constant(theta, n):
    """A group's own mean costs (K - 1) / K; without the scale nothing else does."""
    r = const(*REWARD)

    def loss(at, x):
        logps, mask = one_token(x)
        return grpo(logps, logps.detach(), group(r[at][None], scale=False)[0], mask)

    exact = slope((theta.softmax(0) * r).sum(), theta)
    ours = slope(expected(theta, loss, n), theta)
    torch.testing.assert_close(ours, -(n - 1) / n * exact, rtol=0, atol=1e-12)


def test_off_policy_ratio_gives_the_expected_reward_of_the_new_policy(theta):
    old = const(-0.2, 0.6, 0.1).log_softmax(0)
    r = const(*REWARD)

    def loss(at, x):
        logps, mask = one_token(x)
        return grpo(logps, one_token(old[at])[0], r[at], mask, epsilon=math.inf)

    ours, exact = expected(theta, loss, behaviour=old), (theta.softmax(0) * r).sum()
    assert ours.item() == pytest.approx(-exact.item(), abs=1e-12)
    torch.testing.assert_close(slope(ours, theta), -slope(exact, theta), rtol=0, atol=1e-12)


def test_kl_term_has_the_value_of_one_divergence_and_the_gradient_of_the_other(theta):
    ref = const(0.7, 0.2, -0.5).log_softmax(0)

    def loss(at, x):
        logps, mask = one_token(x)
        zero = torch.zeros(len(x), dtype=x.dtype)
        return grpo(logps, logps.detach(), zero, mask, ref_logps=one_token(ref[at])[0], beta=0.7)

    logp = theta.log_softmax(0)
    ours = expected(theta, loss)
    assert ours.item() == pytest.approx(0.7 * (logp.exp() * (logp - ref)).sum().item(), abs=1e-12)
    forward = 0.7 * (ref.exp() * (ref - logp)).sum()
    torch.testing.assert_close(slope(ours, theta), slope(forward, theta), rtol=0, atol=1e-12)


def test_aapo_climbs_the_group_part_and_the_clipped_margin(theta):
    r, ref = const(*REWARD), const(0.7, 0.2, -0.5).softmax(0)

    def loss(at, x, margin=True):
        total = 0.0
        for other in itertools.product(range(3), repeat=2):
            rewards = r[list(other)][None] if margin else r[at][None]
            logps, mask = one_token(x)
            a = aapo(r[at][None], rewards)[0]
            total = total + ref[list(other)].prod() * reinforce(logps, a, mask)
        return total

    gained = slope(
        expected(theta, loss, 2) - expected(theta, lambda at, x: loss(at, x, margin=False), 2), theta
    )
    p = theta.softmax(0)
    margin = sum(
        p[i] * ref[j] * min(max(REWARD[i] - REWARD[j], -0.2), 0.28) for i in range(3) for j in range(3)
    )
    torch.testing.assert_close(gained, -slope(margin, theta), rtol=0, atol=1e-12)


def test_srft_climbs_the_reward_of_its_own_samples_and_the_demonstrated_one(theta):
    sign = const(1.0, -1.0, 1.0)
    none = torch.zeros(1, 2, dtype=torch.float64)

    def loss(at, x):
        logps, mask = one_token(x)
        return srft(none, none.bool(), const(0.0), logps, mask, sign[at] > 0, 0.0, 0.0, w_rl=1.0)

    ours = slope(expected(theta, loss), theta)
    torch.testing.assert_close(ours, -slope((theta.softmax(0) * sign).sum(), theta), rtol=0, atol=1e-12)
    logps, mask = one_token(theta.log_softmax(0))  # every token shown once
    demo = srft(logps, mask, const(*REWARD), none, none.bool(), tensor([T]), 0.0, 0.0, w_sft=0.0)
    exact = slope((theta.softmax(0) * const(*REWARD)).sum() / 3, theta)
    torch.testing.assert_close(slope(demo, theta), -exact, rtol=0, atol=1e-12)


def test_clipped_value_rests_at_the_expected_return(theta):
    r, p = const(*REWARD), theta.detach().softmax(0)
    v = (p * r).sum().requires_grad_()
    loss = sum(
        p[i] * clipped_value(v[None, None], v[None, None], r[i][None, None], tensor([[T]])) for i in range(3)
    )
    assert slope(loss, v).item() == pytest.approx(0, abs=1e-12)


# Padding, splitting, nothing, precision


def surrogate(x, old, a, mask, ref, **options):
    return grpo(x, old, a, mask, ref_logps=ref, beta=0.3, weights=a.abs(), **options)


LOSSES = {
    "reinforce": lambda *x, **options: reinforce(x[0], x[2], x[3], **options),
    "grpo": surrogate,
    "clipped_value": lambda *x, **options: clipped_value(x[0], x[1], x[4], x[3], **options),
}


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_split_batches_change_nothing(f64, name, per):
    loss = LOSSES[name]
    x, o, a, r = f64(LOGPS), const(OLD), const(ADV), const(REF)
    count = 9 if per == "token" else 3
    whole = loss(x, o, a, MASK, r, per=per)
    whole.backward()
    y = f64(LOGPS)
    parts = [loss(y[s], o[s], a[s], MASK[s], r[s], per=per, denom=count) for s in (slice(1), slice(1, 3))]
    sum(parts).backward()
    assert whole.item() == pytest.approx(sum(parts).item(), abs=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)
    z = f64([[9.0, math.nan, *row, -math.inf] for row in LOGPS])
    wide = [torch.nn.functional.pad(t, (2, 1), value=math.nan) for t in (o, r)]
    mask = torch.nn.functional.pad(MASK, (2, 1))
    padded = loss(z, wide[0], a, mask, wide[1], per=per)
    padded.backward()
    assert padded.item() == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(z.grad[:, 2:-1], x.grad, rtol=0, atol=1e-12)
    assert not z.grad[:, :2].any()
    assert not z.grad[:, -1].any()


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_srft_padding_and_split_batches_change_nothing(f64, per):
    right = tensor([T, F, T])
    counts = (9, 6, 3) if per == "token" else (3, 2, 1)
    demo, roll = f64(LOGPS), f64(OLD)
    h = const(REF).abs()
    whole = srft(demo, MASK, const(ADV), roll, MASK, right, h, h, per=per)
    whole.backward()
    demo2, roll2 = f64(LOGPS), f64([[math.nan, *row] for row in OLD])
    mask, h2 = (torch.nn.functional.pad(t, (1, 0)) for t in (MASK, h))
    total = 0.0
    for s in (slice(1), slice(1, 3)):
        total = total + srft(
            demo2[s], MASK[s], const(ADV)[s], roll2[s], mask[s], right[s], h[s], h2[s], per=per, denom=counts
        )
    total.backward()
    assert total.item() == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(demo.grad, demo2.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(roll.grad, roll2.grad[:, 1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_nothing_to_learn_from_is_zero_with_zero_gradient(f64, per):
    none = torch.zeros_like(MASK)
    for name in LOSSES:
        for x in (f64(LOGPS), f64([[math.nan] * 5] * 3)):
            loss = LOSSES[name](x, const(OLD), const(ADV), none, const(REF), per=per)
            loss.backward()
            assert loss.item() == 0.0
            assert not x.grad.any()
    x, y = f64(LOGPS), f64(OLD)
    loss = srft(x, none, const(ADV), y, MASK, tensor([F, F, F]), 0.5, 0.5, per=per)  # only wrong ones
    (x_slope, y_slope) = torch.autograd.grad(loss, (x, y))
    assert not x_slope.any()
    assert (y_slope[MASK] > 0).all()
    empty = srft(x[:0], none[:0], const(ADV)[:0], y[:0], MASK[:0], tensor([F])[:0], 0.5, 0.5, per=per)
    assert empty.item() == 0.0


def test_a_ratio_out_of_all_bounds_stays_finite(f64):
    x, mask = f64([[0.0, -1.0, -1.0, -1.0]]), tensor([[F, T, T, T]])
    old = const([[0.0, -900.0, -900.0, -900.0]])
    loss = grpo(x, old, const([[0.0, 1.0, 0.0, -1.0]]), mask, per="token", denom=1)
    assert loss.item() == pytest.approx(-1.2 + math.exp(20), rel=1e-12)
    loss.backward()
    assert not x.grad.any()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_agrees_with_float64(dtype, rtol):
    generator = torch.Generator().manual_seed(5)
    x = (-2 * torch.rand(4, 12, generator=generator) - 0.05).to(dtype)
    o = (x + torch.randn(4, 12, generator=generator).to(dtype) / 4).clamp(max=-0.01)
    a, mask = torch.randn(4, generator=generator).to(dtype), torch.ones(4, 12, dtype=torch.bool)
    for name, loss in LOSSES.items():
        low, exact = loss(x, o, a, mask, o), loss(*(t.double() for t in (x, o, a)), mask, o.double())
        assert low.dtype == dtype, name
        torch.testing.assert_close(low.double(), exact, rtol=rtol, atol=rtol / 10)


# Refusals


@pytest.mark.errors
def test_refusals(f64):
    x, o, a = f64(LOGPS), const(OLD), const(ADV)
    with pytest.raises(ValueError, match=r"grpo: expected ref_logps with beta 0\.1, got None"):
        grpo(x, o, a, MASK, beta=0.1)
    with pytest.raises(ValueError, match="grpo: expected beta >= 0, got -1"):
        grpo(x, o, a, MASK, beta=-1)
    with pytest.raises(ValueError, match="grpo: expected epsilon >= 0"):
        grpo(x, o, a, MASK, epsilon=-0.1)
    with pytest.raises(ValueError, match="grpo: expected epsilon_high >= 0"):
        grpo(x, o, a, MASK, epsilon_high=-0.1)
    with pytest.raises(ValueError, match="epsilon finite, got nan"):
        clipped_value(x, o, o, MASK, epsilon=math.nan)
    with pytest.raises(ValueError, match=r"equal shapes, got mask \[3, 5\], advantages \[2\]"):
        grpo(x, o, a[:2], MASK)
    with pytest.raises(ValueError, match=r"equal shapes, got mask \[3, 5\], weights \[3, 4\]"):
        grpo(x, o, a, MASK, weights=o[:, 1:])
    with pytest.raises(TypeError, match="advantages as a float tensor, got int64"):
        reinforce(x, tensor([1, 0, 1]), MASK)
    with pytest.raises(ValueError, match=r"reinforce: expected advantages finite where it counts, got nan"):
        reinforce(x, a * math.nan, MASK)
    for name, bad in (("logps", x - math.inf), ("old_logps", o - math.inf)):
        with pytest.raises(ValueError, match=rf"grpo: expected {name} finite where it counts, got -inf"):
            grpo(**{"logps": x, "old_logps": o, name: bad}, advantages=a, mask=MASK)
    with pytest.raises(ValueError, match=r"grpo: expected ref_logps finite where it counts, got nan"):
        grpo(x, o, a, MASK, ref_logps=o * math.nan, beta=0.1)
    with pytest.raises(ValueError, match=r"reinforce: expected logps finite"):
        reinforce(x * math.nan, a, MASK)
    with pytest.raises(ValueError, match=r"These look like logits \[B, T, V\]"):
        grpo(x[..., None], o, a, MASK)
    with pytest.raises(ValueError, match=r"grpo: expected ref_logps as log-probabilities"):
        grpo(x, o, a, MASK, ref_logps=-o, beta=0.1)
    with pytest.raises(TypeError, match="mask as a bool tensor"):
        reinforce(x, a, MASK.long())
    with pytest.raises(ValueError, match="denom > 0"):
        clipped_value(x, o, o, MASK, denom=0)
    with pytest.raises(ValueError, match="returns finite where it counts, got inf"):
        clipped_value(x, o, o + math.inf, MASK)
    with pytest.raises(ValueError, match=r"equal shapes, got mask \[3, 5\], values \[3, 4\]"):
        clipped_value(x[:, 1:], o, o, MASK)


@pytest.mark.errors
def test_refusals_of_srft_and_entropy_temperature(f64):
    x, a, right = f64(LOGPS), const(ADV), tensor([T, F, T])
    with pytest.raises(ValueError, match=r"srft: expected correct \[N\] with N 3, got \[2\]"):
        srft(x, MASK, a, x, MASK, right[:2], 0.1, 0.1)
    with pytest.raises(TypeError, match="correct as a bool tensor"):
        srft(x, MASK, a, x, MASK, right.double(), 0.1, 0.1)
    with pytest.raises(ValueError, match="denom as \\(demonstrations, right, wrong\\), got 3"):
        srft(x, MASK, a, x, MASK, right, 0.1, 0.1, denom=3)
    with pytest.raises(ValueError, match="denom as \\(demonstrations, right, wrong\\)"):
        srft(x, MASK, a, x, MASK, right, 0.1, 0.1, denom=(1, 2))
    with pytest.raises(ValueError, match="w_sft >= 0"):
        srft(x, MASK, a, x, MASK, right, 0.1, 0.1, w_sft=-1)
    with pytest.raises(ValueError, match="w_rl >= 0"):
        srft(x, MASK, a, x, MASK, right, 0.1, 0.1, w_rl=-1)
    with pytest.raises(ValueError, match=r"got mask \[3, 5\], roll_entropy \[2\]"):
        srft(x, MASK, a, x, MASK, right, 0.1, a[:2])
    with pytest.raises(ValueError, match="demo_entropy finite where it counts"):
        srft(x, MASK, a, x, MASK, right, math.inf, 0.1)
    for name, demo, roll in (("demo_logps", x - math.inf, x), ("roll_logps", x, x - math.inf)):
        with pytest.raises(ValueError, match=f"srft: expected {name} finite"):
            srft(demo, MASK, a, roll, MASK, right, 0.1, 0.1)
    logits, mask = torch.zeros(1, 2, 3), tensor([[F, T]])
    with pytest.raises(ValueError, match=r"mask \[B, T\] with the B and T of logits, got \[1, 1\]"):
        entropy_temperature(logits, mask[:, 1:])
    with pytest.raises(ValueError, match=r"expected low < high, got 2\.0 and 2\.0"):
        entropy_temperature(logits, mask, low=2.0)
    for name in ("target", "low", "high"):
        with pytest.raises(ValueError, match=f"expected {name} > 0"):
            entropy_temperature(logits, mask, **{name: 0})
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="logits finite where it counts"):
            entropy_temperature(logits + bad, mask)
    with pytest.raises(TypeError, match="logits as a float tensor"):
        entropy_temperature(logits.long(), mask)
    with pytest.raises(ValueError, match=r"logits \[B, T, V\], got \[2, 3\]"):
        entropy_temperature(logits[0], mask)
    with pytest.raises(TypeError, match="mask as a bool tensor"):
        entropy_temperature(logits, mask.long())
