"""Pins for losses.flow."""

import itertools
import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import pad

from cotkit import tokens
from cotkit.losses.flow import subtb, tb, trice

T, F = True, False
TREE = ["", "a", "b", "aa", "ab", "ba", "bb"]  # every word of at most two letters, each may be the last
REWARD = dict(zip(TREE, [0.3, 1.7, 0.05, 2.9, 0.8, 0.11, 4.1], strict=True))
LOG_Z = math.log(sum(REWARD.values()))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact():
    """Log-probs of the policy that ends in each word in proportion to its reward: {(state, action): ...}."""
    flow = {s: sum(r for w, r in REWARD.items() if w.startswith(s)) for s in TREE}
    policy = {(s, "."): math.log(REWARD[s] / flow[s]) for s in TREE}
    policy |= {(s, x): math.log(flow[s + x] / flow[s]) for s in ("", "a", "b") for x in "ab"}
    return {key: tensor(value, dtype=torch.float64) for key, value in policy.items()}


def written(logits):
    """The same from free logits [3, 3] of the states "", a, b over (end, a, b); a word of two must end."""
    policy = {(s, "."): logits.new_zeros(()) for s in TREE[3:]}
    for s, row in zip(("", "a", "b"), logits.log_softmax(-1), strict=True):
        policy |= {(s, x): row[i] for i, x in enumerate(".ab")}
    return policy


def rows(policy, words=TREE):
    """One row per word: states "", first letter, second letter in columns 1 to 3; column 0 is the prompt."""
    zero = tensor(0.0, dtype=torch.float64)
    table = {"logps": [], "stop_logps": [], "log_r": [], "mask": []}
    for word in words:
        states = [word[:n] for n in range(len(word) + 1)]
        blank = [zero] * (3 - len(states))
        table["logps"].append(torch.stack([zero, zero, *[policy[s[:-1], s[-1]] for s in states[1:]], *blank]))
        table["stop_logps"].append(torch.stack([zero, *[policy[s, "."] for s in states], *blank]))
        table["log_r"].append(
            tensor([0.0, *[math.log(REWARD[s]) for s in states], *blank], dtype=torch.float64)
        )
        table["mask"].append(tensor([F, *[T] * len(states), *[F] * len(blank)]))
    return {name: torch.stack(values) for name, values in table.items()}


def words(policy):
    """Log-prob and log reward of every word, [1, 7]."""
    made = [sum(policy[w[:n], w[n]] for n in range(len(w))) + policy[w, "."] for w in TREE]
    return torch.stack(made)[None], tensor([[math.log(REWARD[w]) for w in TREE]], dtype=torch.float64)


LOSSES = {
    "tb": lambda policy: tb(*words(policy), tensor([LOG_Z], dtype=torch.float64)),
    "vargrad": lambda policy: tb(*words(policy)),
    "subtb": lambda policy: subtb(**rows(policy)),
    "db": lambda policy: subtb(**rows(policy), max_span=1),
    "subtb lam 0.4": lambda policy: subtb(**rows(policy), lam=0.4),
}


# The true posterior on an enumerated tree


@pytest.mark.parametrize("name", LOSSES)
def test_the_policy_in_proportion_to_the_reward_costs_nothing(name):
    policy = {key: value.requires_grad_() for key, value in exact().items()}
    loss = LOSSES[name](policy)
    assert loss.item() == pytest.approx(0.0, abs=1e-28)
    loss.backward()
    assert all(p.grad is None or abs(p.grad.item()) < 1e-14 for p in policy.values())


@pytest.mark.parametrize("name", LOSSES)
def test_every_other_policy_costs_and_descent_finds_the_posterior(name):
    logits = (0.3 * draw(3, 3, 3)).requires_grad_()
    assert LOSSES[name](written(logits)) > 0.1
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-8, tolerance_change=1e-15
    )

    def closure():
        optimizer.zero_grad()
        loss = LOSSES[name](written(logits))
        loss.backward()
        return loss

    optimizer.step(closure)
    log_pf, log_r = words(written(logits))
    torch.testing.assert_close(log_pf.exp(), log_r.exp() / math.exp(LOG_Z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", [["bb"], ["a", "ba"], ["", "ab", "b"]])
def test_the_zero_needs_no_samples_of_the_policy(kept):
    assert subtb(**rows(exact(), kept)).item() == pytest.approx(0.0, abs=1e-28)
    log_pf, log_r = (x[:, [TREE.index(w) for w in kept]] for x in words(exact()))
    assert tb(log_pf, log_r).item() == pytest.approx(0.0, abs=1e-28)


# tb


def test_tb_by_hand(f64):
    log_pf, log_r, log_z = f64([[-1.0, -3.0]]), f64([[-2.5, -1.0]]), f64(0.5)
    loss = tb(log_pf, log_r, log_z)
    # residuals .5 - 1 + 2.5 = 2 and .5 - 3 + 1 = -1.5
    assert loss.item() == pytest.approx((4 + 2.25) / 2, abs=1e-12)
    loss.backward()
    assert log_pf.grad.tolist() == [pytest.approx([2.0, -1.5], abs=1e-12)]  # 2 * residual / K
    assert log_z.grad.tolist() == pytest.approx([0.5], abs=1e-12)
    assert log_r.grad is None


def test_tb_without_log_z_is_the_variance(f64):
    log_pf, log_r = f64([[-1.0, -3.0, -0.4]]), f64([[-2.5, -1.0, -2.2]])
    loss = tb(log_pf, log_r)
    zeta = [-1.5, 2.0, -1.8]
    mean = sum(zeta) / 3
    assert loss.item() == pytest.approx(sum((z - mean) ** 2 for z in zeta) / 3, abs=1e-12)
    loss.backward()
    assert log_pf.grad[0].tolist() == pytest.approx([-2 / 3 * (z - mean) for z in zeta], abs=1e-12)
    given = f64([[-1.0, -3.0, -0.4]])
    same = tb(given, log_r, tensor([mean], dtype=torch.float64))
    same.backward()
    assert same.item() == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(given.grad, log_pf.grad, rtol=0, atol=1e-12)


def test_tb_without_log_z_knows_rewards_up_to_a_factor():
    log_pf, log_r = draw(1, 2, 5), draw(2, 2, 5)
    shifted = log_r + tensor([[7.3], [-40.1]])
    torch.testing.assert_close(tb(log_pf, log_r), tb(log_pf, shifted), rtol=1e-12, atol=1e-12)
    fixed = draw(3, 2)
    assert abs(tb(log_pf, log_r, fixed) - tb(log_pf, shifted, fixed)) > 1


def test_tb_is_kimis_mirror_descent(f64):
    tau, rewards = 0.6, tensor([[1.0, 0.0, 0.3], [0.2, 0.9, 0.0]], dtype=torch.float64)
    old = tensor([[-2.1, -3.3, -1.7], [-0.9, -4.2, -2.6]], dtype=torch.float64)
    ours, theirs = f64((old + draw(4, 2, 3)).tolist()), f64((old + draw(4, 2, 3)).tolist())
    (tau / 2 * tb(ours, old + rewards / tau, rewards.mean(1) / tau)).backward()
    delta = theirs - old
    formula = -(delta * (rewards - rewards.mean(1, keepdim=True)) - tau / 2 * delta**2).mean(1).mean()
    formula.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-14)
    on_policy = f64(old.tolist())  # Delta 0: REINFORCE with the group's mean as the baseline
    (tau / 2 * tb(on_policy, old + rewards / tau, rewards.mean(1) / tau)).backward()
    expected = -(rewards - rewards.mean(1, keepdim=True)) / 6
    torch.testing.assert_close(on_policy.grad, expected, rtol=0, atol=1e-14)


def test_tb_of_a_thought_and_an_action():
    """GFlowVLM: lambda * log p(thought) + log p(action) is a weighted sum over the tokens."""
    logps, thought = -draw(5, 3, 4).abs(), tensor([[T, T, F, F], [T, F, F, F], [T, T, T, F]])
    whole = torch.ones_like(thought)
    log_pf = tokens.seq_logps(logps, whole, weights=torch.where(thought, 0.5, 1.0).double())
    expected = (logps * ~thought).sum(1) + 0.5 * (logps * thought).sum(1)
    torch.testing.assert_close(log_pf, expected, rtol=1e-12, atol=1e-12)
    assert tb(log_pf[None], log_pf[None] + 2.0).item() == pytest.approx(0.0, abs=1e-28)


def test_tb_ragged_groups(f64):
    log_pf = f64([[-1.0, -3.0, math.nan], [-0.5, math.inf, -2.0], [-1.0, -2.0, -3.0]])
    log_r = f64([[-2.5, -1.0, math.inf], [-0.1, math.nan, -0.7], [-9.0, -9.0, -9.0]])
    valid = tensor([[T, T, F], [T, F, T], [F, F, F]])
    # zeta -1.5, 2: 1.75^2; .4, 1.3: .45^2; nothing
    loss = tb(log_pf, log_r, valid=valid)
    assert loss.item() == pytest.approx((1.75**2 + 0.45**2 + 0) / 3, abs=1e-12)
    loss.backward()
    assert log_pf.grad.isfinite().all()
    assert not log_pf.grad[~valid].any()
    with_z = tb(log_pf, log_r, f64(0.1, -0.2, 0.3), valid=valid)
    # .1 + 1.5, .1 - 2; -.2 - .4, -.2 - 1.3
    assert with_z.item() == pytest.approx(((1.6**2 + 1.9**2) / 2 + (0.6**2 + 1.5**2) / 2) / 3, abs=1e-12)


def test_tb_split_batches_add_up():
    log_pf, log_r, log_z = draw(6, 4, 3), draw(7, 4, 3), draw(8, 4)
    for z in (None, log_z):
        parts = [tb(log_pf[p], log_r[p], None if z is None else z[p], denom=4) for p in ([0], [1, 2], [3])]
        torch.testing.assert_close(sum(parts), tb(log_pf, log_r, z), rtol=1e-12, atol=1e-12)


def test_tb_of_one_chain_or_none(f64):
    one = f64([[-2.0], [-3.0]])
    loss = tb(one, tensor([[-1.0], [-5.0]], dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0.0
    assert not one.grad.any()
    nothing = torch.zeros(0, 3, requires_grad=True)
    tb(nothing, torch.zeros(0, 3)).backward()
    assert tb(nothing, torch.zeros(0, 3)).item() == 0.0


# subtb


def loop(logps, stops, log_r, mask, lam, max_span):
    """The formula with three loops; every pair of states without a gap between them."""
    above, below = 0.0, 0.0
    for b in range(len(mask)):
        for i, j in itertools.combinations(range(mask.shape[1]), 2):
            if not mask[b, i : j + 1].all() or (max_span is not None and j - i > max_span):
                continue
            residual = log_r[b, i].item() - stops[b, i] - log_r[b, j].item() + stops[b, j]
            for t in range(i + 1, j + 1):
                residual = residual + logps[b, t]
            above = above + lam ** (j - i - 1) * residual**2
            below = below + lam ** (j - i - 1)
    return above / max(below, 1)


def chains():
    logps, stops = (-draw(seed, 4, 6).abs() for seed in (11, 12))
    mask = tensor([[F, T, T, T, T, T], [T, T, F, T, T, F], [F, F, T, T, F, F], [F, T, F, T, F, T]])
    return logps, stops, draw(13, 4, 6), mask


@pytest.mark.parametrize(("lam", "max_span"), [(1.0, None), (0.7, None), (0.0, None), (1.3, 2), (0.9, 1)])
def test_subtb_equals_the_loops(lam, max_span):
    logps, stops, log_r, mask = chains()
    ours = [logps.clone().requires_grad_(), stops.clone().requires_grad_()]
    theirs = [logps.clone().requires_grad_(), stops.clone().requires_grad_()]
    loss = subtb(*ours, log_r, mask, lam=lam, max_span=max_span)
    expected = loop(*theirs, log_r, mask, lam, max_span)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_subtb_by_hand(f64):
    # states "", x, xy; delta_1 = -2 + 1 - .5 + 3 - .2 = 1.3; delta_2 = -3 + .2 - .7 + 1 - .4 = -2.9
    logps, stops = f64([[0.0, -0.5, -0.7]]), f64([[-1.0, -0.2, -0.4]])
    log_r, states = f64([[-2.0, -3.0, -1.0]]), tensor([[T, T, T]])
    d1, d2 = 1.3, -2.9
    assert subtb(logps, stops, log_r, states).item() == pytest.approx(
        (d1**2 + d2**2 + (d1 + d2) ** 2) / 3, abs=1e-12
    )
    assert subtb(logps, stops, log_r, states, lam=0.5).item() == pytest.approx(
        (d1**2 + d2**2 + 0.5 * (d1 + d2) ** 2) / 2.5, abs=1e-12
    )
    loss = subtb(logps, stops, log_r, states, max_span=1)  # detailed balance
    assert loss.item() == pytest.approx((d1**2 + d2**2) / 2, abs=1e-12)
    assert subtb(logps, stops, log_r, states, lam=0.0).item() == loss.item()
    loss.backward()
    assert logps.grad[0].tolist() == pytest.approx([0.0, d1, d2], abs=1e-12)  # 2 delta / 2 pairs
    assert stops.grad[0].tolist() == pytest.approx([-d1, d1 - d2, d2], abs=1e-12)
    assert log_r.grad is None


# GFNOrg/gfn-lm-tuning, next_sentence/utils.py, modified_subtb_loss run on these numbers in float64; there the
# token that leaves state t stands in column t, and the text after the prompt [1, 1] ends at token 9; with
# lambda below 1 it adds up the weights in float32
THEIR_LOG_PF = [[-0.31, -1.27, -0.62, -2.05, -0.44], [-1.91, -0.58, 0, 0, 0], [-0.73, -0.19, -1.48, -0.87, 0]]
THEIR_LOG_PTERM = [
    [-2.3, -1.1, -0.7, -1.9, -0.2],
    [-0.9, -1.6, -0.35, 0, 0],
    [-1.2, -2.7, -0.55, -0.81, -0.13],
]
THEIR_LOG_R = [[-5.2, -4.1, -6.7, -3.3, -8.9], [-2.4, -7.5, -4.8, 0, 0], [-6.1, -3.9, -5.6, -7.2, -4.4]]
THEIR_TEXT = [[4, 5, 6, 7, 8], [3, 2, 9, 9, 9], [5, 4, 3, 6, 9]]
THEIR_GRADIENTS = {  # by lambda: loss, its gradient on log_pf and on log_pterm
    1.0: (
        7.962669565217393,
        [
            [-0.0730434783, -0.0547826087, -0.7886956522, 0.7469565217, 0.0],
            [0.2565217391, -0.1365217391, 0.0, 0.0, 0.0],
            [-0.8704347826, 0.1852173913, -0.3504347826, -0.8252173913, 0.0],
        ],
        [
            [0.0730434783, -0.0182608696, 0.7339130435, -1.5356521739, 0.7469565217],
            [-0.2565217391, 0.3930434783, -0.1365217391, 0.0, 0.0],
            [0.8704347826, -1.0556521739, 0.5356521739, 0.4747826087, -0.8252173913],
        ],
    ),
    0.7: (
        8.617220400096617,
        [
            [-0.0487119532, -0.0077453544, -0.9188361269, 0.7597229517, 0.0],
            [0.3205288693, -0.1946882321, 0.0, 0.0, 0.0],
            [-0.7697024334, 0.4629088873, -0.1585432448, -0.7134389021, 0.0],
        ],
        [
            [0.0487119532, -0.0409665987, 0.9110907724, -1.6785590786, 0.7597229517],
            [-0.3205288693, 0.5152171014, -0.1946882321, 0.0, 0.0],
            [0.7697024334, -1.2326113206, 0.621452132, 0.5548956574, -0.7134389021],
        ],
    ),
}


@pytest.mark.parametrize("lam", THEIR_GRADIENTS)
def test_subtb_equals_the_authors_code(f64, lam):
    log_pf, stops = f64(THEIR_LOG_PF), f64(THEIR_LOG_PTERM)
    ended = (tensor(THEIR_TEXT) == 9).cumsum(1) > 0
    states = ~pad(ended[:, :-1], (1, 0))  # a state counts until a stop has been written
    logps = pad(log_pf[:, :-1], (1, 0))
    loss = subtb(logps, stops, tensor(THEIR_LOG_R, dtype=torch.float64), states, lam=lam)
    value, pf_grad, stop_grad = THEIR_GRADIENTS[lam]
    tolerance = 1e-10 if lam == 1 else 2e-7
    assert loss.item() == pytest.approx(value, rel=tolerance)
    loss.backward()
    for grad, theirs in ((log_pf.grad, pf_grad), (stops.grad, stop_grad)):
        torch.testing.assert_close(grad, tensor(theirs, dtype=torch.float64), rtol=tolerance, atol=1e-9)


def test_subtb_is_0_when_every_chain_ends_at_once(f64):
    """The authors' code gives NaN here: no pair, and 0 / 0."""
    logps, stops = f64([[0.0, 0.0, -0.3]] * 2), f64([[-0.1, -0.4, -0.7]] * 2)
    states = tensor([[F, T, F], [T, F, F]])
    for mask in (states, torch.zeros_like(states)):
        loss = subtb(logps, stops, draw(1, 2, 3), mask)
        loss.backward()
        assert loss.item() == 0.0
        assert not logps.grad.any()
        assert not stops.grad.any()


def test_subtb_does_not_read_behind_the_stop():
    logps, stops, log_r, mask = chains()
    clean = subtb(logps, stops, log_r, mask)
    spoiled = [x.masked_fill(~mask, math.nan).requires_grad_() for x in (logps, stops)]
    loss = subtb(*spoiled, log_r.masked_fill(~mask, -math.inf), mask)
    assert loss.item() == clean.item()
    loss.backward()
    for x in spoiled:
        assert x.grad.isfinite().all()
        assert not x.grad[~mask].any()
    first = mask & ~pad(mask[:, :-1], (1, 0))  # the step into the first state of a chain is nobody's choice
    assert not spoiled[0].grad[first].any()
    assert subtb(logps.masked_fill(first, -50.0), stops, log_r, mask).item() == clean.item()
    wider = [pad(x, (2, 3), value=-0.6) for x in (logps, stops, log_r)]
    assert subtb(*wider, pad(mask, (2, 3))).item() == pytest.approx(clean.item(), abs=1e-12)


def test_subtb_knows_rewards_up_to_a_factor():
    logps, stops, log_r, mask = chains()
    shifted = log_r + tensor([[3.1], [-8.0], [0.4], [11.0]])
    torch.testing.assert_close(
        subtb(logps, stops, log_r, mask), subtb(logps, stops, shifted, mask), rtol=1e-11, atol=0
    )


def test_subtb_split_batches_add_up():
    logps, stops, log_r, mask = chains()
    # runs of 5; 2, 2; 2; 1, 1, 1 states: 10 + 1 + 1 + 1 pairs
    parts = [subtb(logps[p], stops[p], log_r[p], mask[p], denom=13) for p in ([0, 3], [1], [2])]
    torch.testing.assert_close(sum(parts), subtb(logps, stops, log_r, mask), rtol=1e-12, atol=0)
    # lam 1/2: 4 + 3/2 + 2/4 + 1/8 for the five, 1 for each pair
    parts = [subtb(logps[p], stops[p], log_r[p], mask[p], lam=0.5, denom=9.125) for p in ([0, 3], [1, 2])]
    torch.testing.assert_close(sum(parts), subtb(logps, stops, log_r, mask, lam=0.5), rtol=1e-12, atol=0)


def test_subtb_from_logits_of_a_model():
    """States from the mask of written tokens; the stop stands in the stop log-probs, not in the log-probs."""
    ids, stop = tensor([[5, 6, 1, 2, 9], [5, 7, 9, 0, 0]]), 9
    whole = tensor([[F, F, T, T, T], [F, F, T, F, F]])  # the written tokens, the stop among them
    logits = draw(14, 2, 5, 10).requires_grad_()
    logps = tokens.token_logps(logits, ids)
    stops = logits.log_softmax(-1)[..., stop]
    states = pad(whole[:, 1:], (0, 1))
    assert states.tolist() == [[F, T, T, T, F], [F, T, F, F, F]]
    log_r = draw(15, 2, 5)
    loss = subtb(logps, stops, log_r, states)
    lp = logits[0].log_softmax(-1)
    d1 = log_r[0, 1] - lp[1, 9] + lp[1, 1] - log_r[0, 2] + lp[2, 9]
    d2 = log_r[0, 2] - lp[2, 9] + lp[2, 2] - log_r[0, 3] + lp[3, 9]
    assert loss.item() == pytest.approx(((d1**2 + d2**2 + (d1 + d2) ** 2) / 3).item(), abs=1e-12)
    loss.backward()
    assert not logits.grad[1].any()  # one state only
    assert not logits.grad[0, [0, 4]].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision(dtype, tolerance):
    logps, stops, log_r, mask = chains()
    exact_loss = subtb(logps, stops, log_r, mask)
    loss = subtb(logps.to(dtype), stops.to(dtype), log_r.to(dtype), mask)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), exact_loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        tb(logps.to(dtype), log_r.to(dtype)).double(), tb(logps, log_r), rtol=tolerance, atol=tolerance
    )


# trice

PRIORS = tensor([[0.4, -1.1, 0.9], [1.3, 0.2, -0.6], [-0.3, 0.8, 0.1]], dtype=torch.float64)  # logits
RIGHT = tensor([[T, F, T], [F, T, T], [T, T, T]])  # which of three thoughts answer each question


def enumerated(control_variate):
    """Mean and second moment of the gradient over all memories of the posterior and all proposals."""
    prior = PRIORS.softmax(-1)
    posterior = torch.where(RIGHT, prior, 0.0)
    posterior = posterior / posterior.sum(1, keepdim=True)
    three, mean, square, mass = range(3), torch.zeros(3, 3, dtype=torch.float64), 0.0, 0.0
    rows_ = torch.arange(3)
    for old in itertools.product(three, repeat=3):
        for new in itertools.product(three, repeat=3):
            chance = posterior[rows_, list(old)].prod() * prior[rows_, list(new)].prod()
            if chance == 0:
                continue
            ok = RIGHT[rows_, list(new)]
            kept = [n if right else o for o, n, right in zip(old, new, ok.tolist(), strict=True)]
            logits = PRIORS.clone().requires_grad_()
            logps = logits.log_softmax(-1)
            loss = trice(
                logps[rows_, kept],
                logps[rows_, list(new)],
                RIGHT[rows_, kept],
                ok,
                control_variate=control_variate,
            )
            (grad,) = torch.autograd.grad(loss, logits)
            mean, square, mass = mean + chance * grad, square + chance * (grad**2).sum(), mass + chance
    assert mass.item() == pytest.approx(1.0, abs=1e-12)
    return mean, (square - (mean**2).sum()).item()


def test_trice_expects_the_gradient_of_the_marginal_likelihood():
    logits = PRIORS.clone().requires_grad_()
    marginal = torch.where(RIGHT, logits.softmax(-1), 0.0).sum(1).log()
    (-marginal.mean()).backward()
    plain, noise = enumerated(control_variate=False)
    reduced, less = enumerated(control_variate=True)
    torch.testing.assert_close(plain, logits.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(reduced, logits.grad, rtol=0, atol=1e-12)
    assert less < noise


def test_trice_by_hand(f64):
    memory, proposal = f64(-1.0, -2.0, -4.0, -0.7, -1.6), f64(-1.0, -3.0, -4.0, -2.2, -0.9)
    ok, right = tensor([T, T, T, F, T]), tensor([T, F, T, F, F])
    loss = trice(memory, proposal, ok, right)
    # c' = 1, 1, 1, 0, 1, accepted = 1, 0, 1, 0, 0: beta = 1/3, 2/3, 1/3, -, 2/3
    terms = [-1 + 1 / 3, -2 + 2, -4 + 4 / 3, -1.6 + 0.6]
    assert loss.item() == pytest.approx(-sum(terms) / 4, abs=1e-12)
    loss.backward()
    assert memory.grad.tolist() == pytest.approx([-0.25, -0.25, -0.25, 0.0, -0.25], abs=1e-12)
    assert proposal.grad.tolist() == pytest.approx([1 / 12, 1 / 6, 1 / 12, 0.0, 1 / 6], abs=1e-12)
    basic = trice(memory, proposal, ok, right, control_variate=False)
    assert basic.item() == pytest.approx((1 + 2 + 4 + 1.6) / 4, abs=1e-12)


def test_trice_falls_silent_when_every_proposal_is_right():
    logits = draw(16, 3, 4).requires_grad_()
    logps = logits.log_softmax(-1)[[0, 1, 2], [3, 0, 2]]
    every = tensor([T, T, T])
    (silent,) = torch.autograd.grad(trice(logps, logps, every, every), logits, retain_graph=True)
    assert not silent.any()
    (loud,) = torch.autograd.grad(trice(logps, logps, every, every, control_variate=False), logits)
    assert loud.abs().amin(1).min() > 0


def test_trice_of_one_question_is_the_basic_estimator(f64):
    memory, proposal = f64(-1.3), f64(-2.4)
    for right in (tensor([T]), tensor([F])):
        assert trice(memory, proposal, tensor([T]), right).item() == pytest.approx(1.3, abs=1e-12)


def test_trice_without_a_right_memory_is_0(f64):
    memory, proposal, none = f64(-1.3, -math.inf), f64(math.nan, -2.4), tensor([F, F])
    loss = trice(memory, proposal, none, none)
    loss.backward()
    assert loss.item() == 0.0
    assert not memory.grad.any()
    assert not proposal.grad.any()


def test_trice_split_batches_add_up(f64):
    memory, proposal = f64(-1.0, -2.0, -4.0, -0.7), f64(-1.0, -3.0, -4.5, -2.2)
    ok, right = tensor([T, T, T, F]), tensor([T, F, F, F])
    whole = trice(memory, proposal, ok, right, control_variate=False)
    parts = [
        trice(memory[p], proposal[p], ok[p], right[p], control_variate=False, denom=3)
        for p in ([0, 3], [1, 2])
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.errors
def test_refusals(f64):
    pf, r = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"tb: expected equal shapes, got log_pf \[2, 3\], log_r \[2, 2\]"):
        tb(pf, r[:, :2])
    with pytest.raises(ValueError, match=r"tb: expected log_z \[B\] with B = 2, got \[2, 1\]"):
        tb(pf, r, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"tb: expected log_r finite where it counts, got -inf\. .*clamp"):
        tb(pf, r.log().masked_fill(r > 0, -math.inf))
    with pytest.raises(ValueError, match="tb: expected log_pf finite where it counts, got nan"):
        tb(pf * math.nan, r)
    with pytest.raises(ValueError, match="tb: expected log_z finite"):
        tb(pf, r, torch.full((2,), math.nan))
    with pytest.raises(TypeError, match="tb: expected valid as a bool tensor"):
        tb(pf, r, valid=r)
    with pytest.raises(ValueError, match="tb: expected denom > 0"):
        tb(pf, r, denom=0)
    with pytest.raises(ValueError, match=r"tb: expected log_pf \[B, K\], got \[2, 3, 4\]"):
        tb(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))

    logps, stops, log_r, mask = chains()
    with pytest.raises(ValueError, match=r"subtb: .*one column fewer.*pad\(logps, \(1, 0\)\)"):
        subtb(logps[:, 1:], stops, log_r, mask)
    with pytest.raises(ValueError, match="subtb: expected stop_logps as log-probabilities"):
        subtb(logps, -stops, log_r, mask)
    with pytest.raises(ValueError, match="subtb: expected equal shapes, got log_r"):
        subtb(logps, stops, log_r[:, 1:], mask)
    with pytest.raises(ValueError, match="subtb: expected log_r finite where it counts, got -inf"):
        subtb(logps, stops, log_r.masked_fill(mask, -math.inf), mask)
    with pytest.raises(ValueError, match="subtb: expected logps finite where it counts, got -inf"):
        subtb(logps.masked_fill(mask, -math.inf), stops, log_r, mask)
    with pytest.raises(TypeError, match="subtb: expected mask as a bool tensor"):
        subtb(logps, stops, log_r, mask.float())
    with pytest.raises(ValueError, match="subtb: expected lam >= 0, got -1"):
        subtb(logps, stops, log_r, mask, lam=-1)
    with pytest.raises(ValueError, match="subtb: expected max_span >= 1, got 0"):
        subtb(logps, stops, log_r, mask, max_span=0)
    with pytest.raises(TypeError, match=r"subtb: expected max_span as an int, got float"):
        subtb(logps, stops, log_r, mask, max_span=1.5)

    memory, ok = f64(-1.0, -2.0), tensor([T, F])
    with pytest.raises(ValueError, match="trice: expected a right memory wherever the proposal is right"):
        trice(memory, memory, ok, ~ok)
    with pytest.raises(TypeError, match="trice: expected memory_ok as a bool tensor"):
        trice(memory, memory, ok.float(), ok)
    with pytest.raises(ValueError, match="trice: expected equal shapes"):
        trice(memory, memory[:1], ok, ok)
    with pytest.raises(ValueError, match="trice: expected memory finite where it counts, got -inf"):
        trice(memory - math.inf, memory, ok, ok)
