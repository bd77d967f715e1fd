import itertools
import math

import pytest
import torch
from torch import tensor

from cotkit.losses.advantage import (
    aapo,
    better_than_direct,
    bon,
    discounted,
    gae,
    group,
    kl_rewards,
    spread,
    whiten,
)
from cotkit.losses.policy import reinforce

T, F = True, False
MASK = tensor([[F, T, T, T, T], [F, T, T, T, F], [F, T, T, F, F]])
LOGPS = [[0.0, -0.7, -1.3, -0.2, -0.9], [0.0, -0.4, -2.1, -0.6, 0.0], [0.0, -1.5, -0.3, 0.0, 0.0]]
REF = [[0.0, -0.6, -1.9, -0.35, -0.8], [0.0, -0.9, -1.4, -0.7, 0.0], [0.0, -1.25, -0.5, 0.0, 0.0]]


def const(*values):
    return torch.tensor(values[0] if isinstance(values[0], list) else list(values), dtype=torch.float64)


def close(ours, theirs, atol=1e-12):
    expected = theirs if isinstance(theirs, torch.Tensor) else const(theirs)
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol, equal_nan=True)


# group


def test_group_by_hand(f64):
    rewards = f64([[1.0, 0.0, 0.0, 1.0]])
    a = group(rewards)
    std = math.sqrt(4 * 0.25 / 3)
    close(a, [[0.5 / (std + 1e-4) * s for s in (1, -1, -1, 1)]])
    assert not a.requires_grad
    close(group(rewards, unbiased=False, eps=0.5), [[0.5 * s for s in (1, -1, -1, 1)]])
    close(group(const([[2.0, 0.5, 0.2]]), scale=False), [[1.1, -0.4, -0.7]])


def test_group_leaves_out_what_has_no_reward():
    some = const([[2.0, math.nan, 0.5, 7.0, 0.2], [math.nan, 1.0, math.nan, 3.0, math.nan]])
    valid = tensor([[T, T, T, F, T], [T, T, T, F, T]])
    a = group(some, valid)
    close(a[0, [0, 2, 4]], group(const([[2.0, 0.5, 0.2]]))[0])
    assert a[0, [1, 3]].tolist() == [0.0, 0.0]
    assert a[1].tolist() == [0.0] * 5  # a group of one
    assert not group(some, torch.zeros_like(valid)).any()
    assert group(some[:, :0]).shape == (2, 0)
    assert group(const([[4.0]]), eps=0.0, unbiased=False).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1000.1])
def test_equal_rewards_are_exactly_zero_however_small_eps(dtype, reward):
    rewards = torch.full((1, 7), reward, dtype=dtype)
    for eps in (1e-4, 1e-9, 0.0):
        assert group(rewards, eps=eps).tolist() == [[0.0] * 7]


def test_group_compositions_of_its_docstring():
    r = const([[1.0, 0.3, -0.7], [0.2, 0.9, 0.4]])
    out = group(r, scale=False) * 3 / 2
    close(out[0], [1 - (0.3 - 0.7) / 2, 0.3 - (1 - 0.7) / 2, -0.7 - (1 + 0.3) / 2])  # leave-one-out
    turns = torch.stack([r, 2 * r + 5, -r], 2)  # [B, K, S]
    per_turn = group(turns.movedim(2, 1).flatten(0, 1)).unflatten(0, (2, 3)).movedim(1, 2)
    close(per_turn[..., 0], group(r))
    close(per_turn[..., 2], -group(r))
    both = group(torch.cat([r, const([[2.0], [0.0]])], 1))  # a demonstration beside the samples
    assert both.shape == (2, 4)
    assert both[0, 3] > 0 > both[1, 3]


# aapo


def test_aapo_values_of_the_entry():
    ones, zeros = torch.ones(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    close(aapo(ones, zeros), [[0.28] * 3])
    close(aapo(zeros, ones), [[-0.2] * 3])
    r = const([[1.0, 0.0, 0.4]])
    close(aapo(r, r), group(r))
    close(aapo(r, const([[0.9, 0.05, 0.5]]), low=-0.07, high=0.06) - group(r), [[0.06, -0.05, -0.07]])
    close(aapo(r, const([[0.9, 0.05, 0.5]]), low=0.0, high=0.0), group(r))
    ours = aapo(r.clone().requires_grad_(), r.clone().requires_grad_())
    assert not ours.requires_grad


def test_aapo_equals_the_authors_code():
    """JianxXiong/AAPO open-r1/trainer/AAPOTrainer.py: its advantages plus its clamped constraint."""
    r, ref = (
        const([[1.0, 0.0, 0.5, 0.2], [0.9, 0.1, 0.3, 0.7]]),
        const([[0.9, 0.5, 0.1, 0.3], [0, 1, 0.35, 0.6]]),
    )
    close(aapo(r, ref), [
        [1.4217389776518288, -1.176937505220917, 0.452400736215456, -0.6172022086463678],
        [1.3751451971462223, -1.2951451971462222, -0.5975725985731111, 0.6475725985731109],
    ])  # fmt: skip


def test_aapo_without_a_reward():
    r, ref = const([[1.0, math.nan, 0.0, 0.4]]), const([[0.9, 0.3, math.nan, 0.3]])
    a = aapo(r, ref)
    close(a, group(r) + const([[0.1, 0.0, 0.0, 0.1]]))
    assert a[0, 1].item() == 0.0


# bon


def test_bon_by_hand():
    r = const([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    close(bon(r, 3), [[3 * (2 / 3) ** 2] * 2 + [0, 0], [0, 0, 0, 3.0]])
    close(bon(r, 3, clip=0.7), [[0.7] * 2 + [0, 0], [0, 0, 0, 0.7]])
    close(bon(r, 1), r)  # REINFORCE
    centred = bon(r, 3, positive_only=False)
    right, wrong = 3 * (2 / 3) ** 2 * (1 - 1 / 3), -3 * (1 / 3) ** 2 * (2 / 3)
    close(centred, [[right] * 2 + [wrong] * 2, [-3 * (2 / 3) ** 2 / 3] * 3 + [3.0]])
    close(bon(r, 3, positive_only=False, clip=0.4)[0, 2:], [-2 / 9] * 2)
    p = 0.6
    close(bon(r[:1], 3, p_fail=const(p)), [[3 * p**2] * 2 + [0, 0]])
    gain = 3 * p**2 / (1 - p**3)
    close(bon(r[:1], 3, p_fail=const(p), samples_from="bon"), [[gain * (1 - p)] * 2 + [0, 0]])
    close(
        bon(r[:1], 3, p_fail=const(p), samples_from="bon", positive_only=False),
        [[gain] * 2 + [3 * p / (1 - p)] * 2],
    )
    close(bon(r[:1], 3, unbiased=True), [[3 * 1 / 3] * 2 + [0, 0]])  # 3 C(2, 2) / C(3, 2)
    five = const([[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]])
    close(bon(five, 3, unbiased=True)[0, 0], const(3 * 6 / 10)[0])  # 3 C(4, 2) / C(5, 2)
    close(bon(r[:1], 2, unbiased=True), bon(r[:1], 2))


def test_bon_has_no_gradient_and_takes_certain_failure_rates(f64):
    p = f64(0.0, 1.0)
    ours = bon(f64([[1.0, 0.0], [1.0, 0.0]]), 3, p_fail=p)
    assert ours.tolist() == [[0.0, 0.0], [3.0, 0.0]]
    assert not ours.requires_grad


def test_bon_root_for_samples_of_best_of_n():
    """Of the others of a best-of-2 group half failed: p^2 = 1/2."""
    r = const([[1.0, 1.0, 0.0]])
    p = math.sqrt(0.5)
    ours = bon(r, 2, samples_from="bon")
    close(ours[0, 0], torch.tensor(2 * p * (1 - p) / (1 - 0.5), dtype=torch.float64))


def test_bon_at_the_ends_is_finite():
    right, wrong = torch.ones(1, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    for options in ({}, {"positive_only": False}, {"unbiased": True}):
        assert not bon(right, 3, **options).any()  # p = 0: nothing to gain
        assert not bon(wrong, 3, **options).any()  # p = 1, no right sample; the centred one: R - 0
    lone = const([[0.0, 0.0, 0.0, 1.0]])  # the right one sees p = 1
    for n in (1, 2, 7):
        close(bon(lone, n, samples_from="bon")[0, 3], const(1.0)[0])  # limit of n p^(n-1) (1-p) / (1-p^n)
        both = bon(lone, n, samples_from="bon", positive_only=False)
        assert both[0, 3].item() == pytest.approx(4.0)  # 1 / (1 - p), held at K
        assert both.isfinite().all()
    alone = const([[1.0, math.nan, math.nan]])
    assert bon(alone, 1)[0].tolist() == [1.0, 0.0, 0.0]
    assert bon(alone, 2)[0].tolist() == [0.0, 0.0, 0.0]
    assert bon(alone[:, :0], 2).shape == (1, 0)


def test_bon_leaves_out_what_has_no_reward():
    some, valid = const([[1.0, math.nan, 0.0, 1.0, 0.0]]), tensor([[T, T, T, F, T]])
    small = const([[1.0, 0.0, 0.0]])
    for options in ({}, {"positive_only": False}, {"unbiased": True}, {"samples_from": "bon"},
                    {"samples_from": "bon", "positive_only": False, "clip": 2.0}):  # fmt: skip
        ours = bon(some, 2, valid, **options)
        close(ours[0, [0, 2, 4]], bon(small, 2, **options)[0])
        assert ours[0, [1, 3]].tolist() == [0.0, 0.0]
    few = bon(const([[1.0, 0.0, math.nan]]), 3, unbiased=True)
    assert not few.any()  # two samples say nothing exact about the best of three


# better_than_direct


def test_better_than_direct_by_hand():
    thought, direct = const([[3.0, 1.0, 2.0], [0.5, 0.1, 0.7]]), const([[2.0, 1.5], [0.6, 0.9]])
    keep = better_than_direct(thought, direct)
    assert keep.tolist() == [[T, F, T], [F, F, F]]
    ok = tensor([[T, F, T], [T, T, F]])
    assert better_than_direct(thought, direct, ok).tolist() == [[T, T, T], [F, F, T]]
    assert better_than_direct(thought, direct, ok, group=True).all()
    lost = better_than_direct(thought - 1, direct, ok, group=True)
    assert lost.tolist() == [[T, T, T], [F, F, T]]
    assert better_than_direct(thought, direct[:, :0]).all()
    assert better_than_direct(thought[:, :0], direct).shape == (2, 0)


@pytest.mark.parametrize(
    ("thought", "direct", "kept"),
    [
        ([0.5, 0.25], [1.0, 0.75], F),
        ([0.5, 0.75], [1.0, 0.75], T),
        ([0.5, 0.5], [1.0, 2.0], T),
        ([0.5, 0.25], [0.6, 0.4], T),
    ],
)
def test_group_filter_equals_the_authors_code(thought, direct, kept):
    """yuleiqin/RAIF openrlhf/trainer/ppo_utils/replay_buffer.py filter_out, run on these scores."""
    assert better_than_direct(const([thought]), const([direct]), group=True).tolist() == [[kept, kept]]


# discounted, gae, kl_rewards, whiten, spread


def test_discounted_by_hand(f64):
    rewards = f64([[9.0, 1.0, -2.0, 9.0, 3.0, 9.0]])
    mask = tensor([[F, T, T, F, T, F]])  # the hole is stepped over and costs no discount
    g = discounted(rewards, mask, gamma=0.5)
    close(g, [[0, 1 + 0.5 * (-2 + 0.5 * 3), -2 + 0.5 * 3, 0, 3, 0]])
    assert not g.requires_grad
    close(discounted(rewards, mask), [[0, 2, 1, 0, 3, 0]])
    close(discounted(rewards, mask, gamma=0.0), [[0, 1, -2, 0, 3, 0]])


def test_multi_gamma_equals_the_authors_code():
    """eddycmu/demystify-long-cot ppo_utils/experience_maker.py get_advantages_and_returns."""
    right, repeated = const([[0, 0, 2.0], [0, -10, 7]]), const([[-0.05, -0.05, 0], [-0.1, 0, 7]])
    values, mask = const([[0.3, 0.6, -0.2], [0.4, 0.1, 9.0]]), tensor([[T, T, T], [T, T, F]])
    both = discounted(right, mask) + discounted(repeated, mask, gamma=0.99)
    close(both - values * mask, [[1.6005, 1.35, 2.2], [-10.5, -10.1, 0.0]])
    one = gae(right + repeated, values, mask, gamma=0.97, lam=0.9)
    close(one, [[1.1718718, 1.0766, 2.2], [-9.2203, -10.1, 0.0]])
    same = discounted(right, mask, gamma=0.97) + discounted(repeated, mask, gamma=0.97)
    close(discounted(right + repeated, mask, gamma=0.97), same)


def test_gae_by_hand_and_at_its_ends(f64):
    rewards, values = f64([[9.0, 1.0, -2.0, 9.0, 3.0]]), f64([[9.0, 0.5, 0.25, 9.0, -1.0]])
    mask = tensor([[F, T, T, F, T]])
    a = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    d = [1 + 0.9 * 0.25 - 0.5, -2 + 0.9 * -1 - 0.25, 3 + 1.0]
    close(a, [[0, d[0] + 0.72 * (d[1] + 0.72 * d[2]), d[1] + 0.72 * d[2], 0, d[2]]])
    assert not a.requires_grad
    full = discounted(rewards, mask, gamma=0.9) - torch.where(mask, values, 0.0).detach()
    close(gae(rewards, values, mask, gamma=0.9, lam=1.0), full)
    close(gae(rewards, values, mask, gamma=0.9, lam=0.0), [[0, d[0], d[1], 0, d[2]]])
    assert gae(rewards[:, :0], values[:, :0], mask[:, :0]).shape == (1, 0)


def test_kl_rewards_and_gae_equal_crystal():
    """liujch1998/crystal scripts/model/reward.py kl_penalize_reward; scripts/main.py loss, its recursion."""
    rewards = kl_rewards(const(0.9, -0.4, 1.7), const(LOGPS), const(REF), MASK, beta=0.2)
    close(rewards[:, 1:], [
        [0.019999999999999997, -0.11999999999999998, -0.029999999999999995, 0.92],
        [-0.1, 0.14000000000000004, -0.42000000000000004, 0.0],
        [0.05, 1.66, 0.0, 0.0],
    ])  # fmt: skip
    values = const([[7, 0.5, -0.2, 0.9, 0.1], [7, 1.2, 0.3, -0.4, 7], [7, 0.05, 0.6, 7, 7]])
    close(gae(rewards, values, MASK, gamma=0.98)[:, 1:], [
        [0.1601795306199999, 0.8981520199999999, -0.06858000000000009, 0.8200000000000001],
        [-1.53724722, -0.57062, -0.020000000000000018, 0.0],
        [1.57486, 1.06, 0.0, 0.0],
    ])  # fmt: skip


def test_kl_rewards_of_a_row_without_tokens(f64):
    score = f64(3.0, math.nan)
    mask = tensor([[F, T, T], [F, F, F]])
    logps = f64([[0.0, -1.0, -2.0], [math.nan, -1.0, 0.0]])
    rewards = kl_rewards(score, logps, logps.detach().requires_grad_(), mask, beta=0.5)
    close(rewards, [[0, 0, 3.0], [0, 0, 0]])  # a policy that equals its reference pays nothing
    assert not rewards.requires_grad
    bare = kl_rewards(score, logps, logps.detach() - 1, mask, beta=0.0)
    close(bare, rewards)


def test_whiten_by_hand(f64):
    x, mask = f64([[1.0, 3.0, 9.0], [-5.0, math.nan, 4.0]]), tensor([[T, T, F], [T, F, F]])
    mean, var = -1 / 3, ((4 / 3) ** 2 + (10 / 3) ** 2 + (14 / 3) ** 2) / 2
    scale = math.sqrt(var + 0.5)
    white = whiten(x, mask, eps=0.5)
    close(white, [[(1 - mean) / scale, (3 - mean) / scale, 0], [(-5 - mean) / scale, 0, 0]])
    assert not white.requires_grad
    kept = whiten(x, mask, center=False, eps=0.5)
    close(kept, torch.where(mask, white + mean, 0.0))
    assert not whiten(x, mask & False, center=False).any()
    one = tensor([[T, F, F], [F, F, F]])
    assert not whiten(x, one).any()
    close(whiten(x, one, center=False), [[1, 0, 0], [0, 0, 0]])


def test_whiten_equals_the_authors_code():
    """The whitening of ReFT (verl's masked_whiten is the same function) on its own advantages."""
    x = const([
        [0.26110400054097194, 1.0432000067532063, 0.31000001206994066, 5, 5],
        [0.0014759133995913554, -0.49795010185885435, 0.766735999649763, -0.2962000124901533, -0.1475],
        [0.5534364367094039, -0.6966160079717637, -0.05780000217258935, -0.6150000244379044, 5],
    ])  # fmt: skip
    close(whiten(x, x < 5), [
        [0.3794302063460764, 1.7990859385202393, 0.4681859377347844, 0, 0],
        [-0.09184505809205092, -0.9984000075187474, 1.2972502184721624, -0.6321845191849499, -0.36226519537],
        [0.9100701986366545, -1.3590171058807488, -0.1994423257593176, -1.2108682879088626, 0],
    ], atol=1e-9)  # fmt: skip


def test_spread_by_hand(f64):
    values = f64([[0.5, -2.0, math.nan], [3.0, 7.0, 1.0]])
    index = tensor([[-1, 0, 0, 1, -100], [2, 2, 0, -1, 1]], dtype=torch.int8)
    out = spread(values, index)
    close(out, [[0, 0.5, 0.5, -2, 0], [1, 1, 3, 0, 7]])
    assert not out.requires_grad
    assert spread(values[:, :0], index.clamp(max=-1)).tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_agrees_with_float64(dtype, rtol):
    generator = torch.Generator().manual_seed(2)
    r = torch.randn(3, 40, generator=generator).to(dtype)
    v = torch.randn(3, 40, generator=generator).to(dtype)
    mask = torch.rand(3, 40, generator=generator) < 0.8
    right = (r > 0).to(dtype)
    for call, *inputs in (
        (group, r),
        (aapo, r, v),
        (lambda x: bon(x, 32), right),
        (lambda x: discounted(x, mask, gamma=0.95), r),
        (lambda x, y: gae(x, y, mask), r, v),
        (lambda x: whiten(x, mask), r),
    ):
        low, exact = call(*inputs), call(*(x.double() for x in inputs))
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), exact, rtol=rtol, atol=rtol / 2)


# Exact expectations over a policy of three tokens

REWARD = (1.0, 0.3, -0.7)
RIGHT = (1.0, 0.0, 1.0)


@pytest.fixture
def theta(f64):
    return f64(0.4, -0.3, 0.9)


def gradient(theta, weigh, n, chance=None):
    """Expected gradient of the mean of weight * log-prob over n drawn tokens, all draws enumerated."""
    logp = theta.log_softmax(0)
    chance = logp.detach().exp() if chance is None else chance
    total = theta.new_zeros(())
    for drawn in itertools.product(range(3), repeat=n):
        at = list(drawn)
        logps = torch.stack([torch.zeros_like(logp[at]), logp[at]], 1)
        mask = tensor([[F, T]]).expand(n, 2)
        loss = reinforce(logps, weigh(at).flatten(), mask, denom=n)
        total = total - chance[at].prod() * loss
    return torch.autograd.grad(total, theta)[0]


def slope(value, theta):
    return torch.autograd.grad(value, theta)[0]


def best_of(theta, n):
    """Chance that one of n samples is right."""
    return 1 - (theta.softmax(0) * (1 - const(*RIGHT))).sum() ** n


@pytest.mark.parametrize("n", [2, 3])
def test_leave_one_out_is_unbiased_and_the_group_mean_costs_its_share(theta, n):
    r = const(*REWARD)
    exact = slope((theta.softmax(0) * r).sum(), theta)
    close(gradient(theta, lambda at: group(r[at][None], scale=False) * n / (n - 1), n), exact)
    close(gradient(theta, lambda at: group(r[at][None], scale=False), n), (n - 1) / n * exact)


def test_the_scaled_pair_counts_wins(theta):
    """Of two samples the better one gets 1 / sqrt(2): the gradient of wins minus losses."""
    r, p = const(*REWARD), theta.softmax(0)
    ours = gradient(theta, lambda at: group(r[at][None], eps=0.0), 2)
    wins = (p[:, None] * p.detach()[None, :] * (r[:, None] - r[None, :]).sign()).sum() / math.sqrt(2)
    close(ours, slope(wins, theta))


@pytest.mark.parametrize("n", [1, 2, 5, 32])
def test_bon_has_the_gradient_of_pass_at_n(theta, n):
    exact = slope(best_of(theta, n), theta)
    for i in range(3):  # that gradient is right, by finite differences
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = 1e-5
        near = (best_of(theta.detach() + step, n) - best_of(theta.detach() - step, n)) / 2e-5
        assert exact[i].item() == pytest.approx(near.item(), abs=1e-9)
    right, p = const(*RIGHT), theta.detach().softmax(0)
    fail = (p * (1 - right)).sum()
    win = torch.where(right > 0, p / (1 - fail) * (1 - fail**n), p / fail * fail**n)  # best of n
    for source, chance in (("policy", p), ("bon", win)):
        for positive_only in (True, False):

            def weigh(at, source=source, positive_only=positive_only):
                options = {"samples_from": source, "positive_only": positive_only}
                return bon(right[at][None], n, p_fail=fail[None], **options)

            # two samples: 1 - p may be as small as 1/2 unhindered, here it is .80
            close(gradient(theta, weigh, 2, chance), exact)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4)])
@pytest.mark.parametrize("positive_only", [True, False])
def test_bon_from_the_group_alone_is_exact_when_unbiased(theta, n, k, positive_only):
    right = const(*RIGHT)
    exact = slope(best_of(theta, n), theta)
    for unbiased in (True, False):
        options = {"unbiased": unbiased, "positive_only": positive_only}
        ours = gradient(theta, lambda at, o=options: bon(right[at][None], n, **o), k)
        if unbiased or n < 3:  # a rate to the power 1 is unbiased as it is
            close(ours, exact)
        else:
            assert (ours - exact).abs().max() > 1e-4


# Two steps: the first token is read by the second

STEP = const([[0.5, -0.2, 1.0], [0.0, 0.7, -1.0], [2.0, 0.3, -0.4]])  # reward of the second, after the first
FIRST = const(0.4, -0.6, 0.1)


@pytest.fixture
def tree(f64):
    return f64(0.4, -0.3, 0.9), f64([[0.1, 0.5, -0.2], [0.0, -0.4, 0.3], [0.8, -0.1, 0.2]])


def paths(tree):
    """All nine chains: chance, log-probs [9, 3] behind a token of prompt, the two rewards."""
    first, second = tree[0].log_softmax(0), tree[1].log_softmax(1)
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    logps = torch.stack([torch.zeros_like(first[i]), first[i], second[i, j]], 1)
    rewards = torch.stack([torch.zeros(9, dtype=torch.float64), FIRST[i], STEP[i, j]], 1)
    return logps.detach().sum(1).exp(), logps, rewards, i


def tree_gradient(tree, advantages):
    chance, logps, _, _ = paths(tree)
    mask = tensor([[F, T, T]]).expand(9, 3)
    loss = reinforce(logps, advantages * chance[:, None], mask, denom=1)
    return torch.autograd.grad(-loss, tree)


def value(tree):
    """Exact expected rest of the reward before the first and before the second token."""
    after = (tree[1].softmax(1) * STEP).sum(1)
    return (tree[0].softmax(0) * (FIRST + after)).sum(), after


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_has_the_gradient_of_the_expected_reward(tree, lam):
    """With lambda 1 for any value function, below that for the true one."""
    exact = torch.autograd.grad(value(tree)[0], tree)
    start, after = (x.detach() for x in value(tree))
    _, _, rewards, i = paths(tree)
    mask = tensor([[F, T, T]]).expand(9, 3)
    true = torch.stack([torch.zeros_like(after[i]), start.expand(9), after[i]], 1)
    made_up = torch.stack([torch.zeros_like(after[i]), start.expand(9) - 3, const(0.9, -1.1, 0.2)[i]], 1)
    for values in (true, made_up):
        ours = tree_gradient(tree, gae(rewards, values, mask, lam=lam))
        same = all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ours, exact, strict=True))
        assert same == (values is true or lam == 1.0)


def test_step_credit_that_is_spread_has_it_too(tree):
    exact = torch.autograd.grad(value(tree)[0], tree)
    steps = paths(tree)[2][:, 1:]
    to_go = discounted(steps, torch.ones_like(steps, dtype=torch.bool))
    ours = tree_gradient(tree, spread(to_go, tensor([[-1, 0, 1]]).expand(9, 3)))
    for a, b in zip(ours, exact, strict=True):
        close(a, b)


def test_kl_rewards_charge_the_divergence_of_whole_chains(tree):
    ref = [const(0.2, 0.3, -0.5), const([[0.3, -0.2, 0.1], [0.6, 0.0, -0.3], [-0.1, 0.4, 0.2]])]
    chance, logps, rewards, _ = paths(tree)
    ref_logps = paths(ref)[1]
    mask = tensor([[F, T, T]]).expand(9, 3)
    r = kl_rewards(rewards.sum(1), logps, ref_logps, mask, beta=0.3)
    divergence = (logps.sum(1).exp() * (logps - ref_logps).sum(1)).sum()
    exact = value(tree)[0] - 0.3 * divergence
    assert (chance * r.sum(1)).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    ours = tree_gradient(tree, discounted(r, mask))
    for a, b in zip(ours, torch.autograd.grad(exact, tree), strict=True):
        close(a, b)


# Refusals


@pytest.mark.errors
def test_refusals_of_what_is_per_sample():
    r = const([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"group: expected rewards \[B, K\], got \[2\]"):
        group(r[0])
    with pytest.raises(TypeError, match="group: expected rewards as a float tensor, got int64"):
        group(r.long())
    with pytest.raises(TypeError, match="valid as a bool tensor"):
        group(r, r)
    with pytest.raises(ValueError, match=r"equal shapes, got rewards \[2, 2\], valid \[1, 2\]"):
        group(r, r[:1] > 0)
    with pytest.raises(ValueError, match="group: expected rewards finite where it counts, got -inf"):
        group(r - math.inf)
    with pytest.raises(ValueError, match="eps >= 0"):
        group(r, eps=-1)
    with pytest.raises(ValueError, match=r"equal shapes, got rewards \[2, 2\], ref_rewards \[1, 2\]"):
        aapo(r, r[:1])
    with pytest.raises(ValueError, match=r"aapo: expected low <= 0, got 0\.1"):
        aapo(r, r, low=0.1)
    with pytest.raises(ValueError, match="high >= 0"):
        aapo(r, r, high=-0.1)
    with pytest.raises(ValueError, match="low finite"):
        aapo(r, r, low=math.nan)
    for bad in (0.5, -1.0, 2.0):
        with pytest.raises(ValueError, match=r"bon: expected rewards 1 \(right\) or 0 \(wrong\)"):
            bon(r * bad, 3)
    with pytest.raises(ValueError, match="bon: expected n >= 1, got 0"):
        bon(r, 0)
    with pytest.raises(TypeError, match="n as an int"):
        bon(r, 2.0)
    with pytest.raises(ValueError, match="samples_from to be one of"):
        bon(r, 2, samples_from="best")
    with pytest.raises(ValueError, match="clip > 0"):
        bon(r, 2, clip=0)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"p_fail in \[0, 1\]"):
            bon(r, 2, p_fail=const(bad, 0.5))
    with pytest.raises(ValueError, match=r"p_fail \[B\] with B 2, got \[1\]"):
        bon(r, 2, p_fail=const(0.5))
    with pytest.raises(TypeError, match="p_fail as a float tensor"):
        bon(r, 2, p_fail=tensor([1, 0]))
    for options in ({"n": 3}, {"n": 2, "samples_from": "bon"}, {"n": 2, "p_fail": const(0.5, 0.5)}):
        with pytest.raises(ValueError, match="bon: expected samples of the policy, no p_fail and n <= K"):
            bon(r, unbiased=True, **options)
    with pytest.raises(ValueError, match=r"thought \[B, K\] and direct \[B, M\] of one B"):
        better_than_direct(r, r[:1])
    with pytest.raises(ValueError, match="better_than_direct: expected direct finite"):
        better_than_direct(r, r * math.nan)
    with pytest.raises(ValueError, match="better_than_direct: expected thought finite"):
        better_than_direct(r * math.nan, r)
    with pytest.raises(ValueError, match=r"direct \[B, M\], got \[2\]"):
        better_than_direct(r, r[0])
    with pytest.raises(ValueError, match=r"thought \[B, K\], got \[2\]"):
        better_than_direct(r[0], r)
    with pytest.raises(TypeError, match="direct as a float tensor"):
        better_than_direct(r, r.long())
    with pytest.raises(TypeError, match="format_ok as a bool tensor"):
        better_than_direct(r, r, r)
    with pytest.raises(ValueError, match=r"equal shapes, got thought \[2, 2\], format_ok \[1, 2\]"):
        better_than_direct(r, r, r[:1] > 0)


@pytest.mark.errors
def test_refusals_of_what_is_per_token():
    x, mask = const([[0.0, -0.5]]), tensor([[F, T]])
    for gamma in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"gamma in \[0, 1\]"):
            discounted(x, mask, gamma=gamma)
        with pytest.raises(ValueError, match=r"lam in \[0, 1\]"):
            gae(x, x, mask, lam=gamma)
        with pytest.raises(ValueError, match=r"gamma in \[0, 1\]"):
            gae(x, x, mask, gamma=gamma)
    with pytest.raises(TypeError, match="mask as a bool tensor"):
        discounted(x, x)
    with pytest.raises(ValueError, match=r"equal shapes, got mask \[1, 2\], rewards \[1, 1\]"):
        discounted(x[:, 1:], mask)
    with pytest.raises(ValueError, match=r"mask \[B, T\], got \[2\]"):
        discounted(x[0], mask[0])
    with pytest.raises(ValueError, match="gae: expected values finite where it counts, got nan"):
        gae(x, x * math.nan, mask)
    with pytest.raises(TypeError, match="whiten: expected x as a float tensor"):
        whiten(mask.long(), mask)
    with pytest.raises(ValueError, match="eps > 0"):
        whiten(x, mask, eps=0)
    with pytest.raises(ValueError, match=r"score \[B\] with B 1, got \[2\]"):
        kl_rewards(const(1.0, 2.0), x, x, mask, beta=0.1)
    with pytest.raises(TypeError, match="score as a float tensor"):
        kl_rewards(tensor([1]), x, x, mask, beta=0.1)
    with pytest.raises(ValueError, match="beta >= 0"):
        kl_rewards(const(1.0), x, x, mask, beta=-0.1)
    with pytest.raises(ValueError, match="score finite where it counts, got nan"):
        kl_rewards(const(math.nan), x, x, mask, beta=0.1)
    for name in ("logps", "ref_logps"):
        with pytest.raises(ValueError, match=f"kl_rewards: expected {name} finite"):
            kl_rewards(const(1.0), **{"logps": x, "ref_logps": x, name: x - math.inf}, mask=mask, beta=0.1)
    with pytest.raises(ValueError, match="as log-probabilities"):
        kl_rewards(const(1.0), -x, x, mask, beta=0.1)
    with pytest.raises(ValueError, match="index below S = 2, got 2"):
        spread(x, tensor([[0, 2]]))
    with pytest.raises(ValueError, match=r"values \[B, S\] and index \[B, T\] of one B"):
        spread(x, tensor([[0, 1], [0, 1]]))
    with pytest.raises(TypeError, match="index as an integer tensor"):
        spread(x, x)
    with pytest.raises(TypeError, match="values as a float tensor"):
        spread(mask, tensor([[0, 1]]))
    with pytest.raises(ValueError, match="values finite where it counts, got inf"):
        spread(x + math.inf, tensor([[0, -1]]))
    with pytest.raises(ValueError, match=r"values \[B, S\], got \[2\]"):
        spread(x[0], tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"index \[B, T\], got \[2\]"):
        spread(x, tensor([0, 1]))
