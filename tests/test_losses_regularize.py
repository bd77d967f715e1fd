import math

import pytest
import torch
from torch import tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cotkit import tokens
from cotkit.losses.distill import kl
from cotkit.losses.regularize import _symmetric_kl, adversarial, localized_balance

T, F = True, False


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def sharp(x):
    """Two words, logits w * x and 0; w is 3."""
    return torch.cat([3 * x, 0 * x], -1)


def causal(head):
    """A model [B, T, D] -> [B, T, V] whose position t reads tokens 0..t."""
    return lambda x: torch.tanh(x).cumsum(1) @ head


def inputs():
    head = torch.randn(3, 5, generator=gen(1), dtype=torch.float64).requires_grad_()
    embeds = torch.randn(2, 4, 3, generator=gen(2), dtype=torch.float64).requires_grad_()
    mask = tensor([[F, T, F, T], [F, F, T, T]])
    return head, embeds, mask


# the symmetric divergence


def test_symmetric_kl_hand_value(f64):
    p, q = f64([[math.log(3.0), 0.0]]), f64([[0.0, 0.0]])  # (3/4, 1/4) against (1/2, 1/2)
    # (3/4 - 1/2) ln(3/2) + (1/4 - 1/2) ln(1/2) = ln(3) / 4
    assert _symmetric_kl(p, q).item() == pytest.approx(math.log(3) / 4, abs=1e-12)
    assert _symmetric_kl(p, q).item() == pytest.approx(_symmetric_kl(q, p).item(), abs=1e-15)
    assert _symmetric_kl(p, p).item() == 0


def test_symmetric_kl_is_both_directions_of_kl():
    p, q = (torch.randn(1, 6, 5, generator=gen(s), dtype=torch.float64).requires_grad_() for s in (3, 4))
    ours, both = _symmetric_kl(p[0], q[0]).sum(), (tokens.kl(p, q) + tokens.kl(q, p)).sum()
    torch.testing.assert_close(ours, both, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (p, q)), torch.autograd.grad(both, (p, q)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_symmetric_kl_impossible_words(f64):
    p, q = f64([[1.0, 0.0, -math.inf]]), f64([[0.0, 2.0, -math.inf]])
    expected = _symmetric_kl(p[:, :2], q[:, :2])
    loss = _symmetric_kl(p, q)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.sum().backward()
    assert p.grad.isfinite().all()
    assert _symmetric_kl(p.detach(), tensor([[0.0, 2.0, 1.0]])).item() == math.inf


def test_symmetric_kl_of_the_authors():
    # namisan/mt-dnn, mt_dnn/loss.py SymKlCriterion()(p, q): 0.3219982385635376 ("batchmean", over the rows)
    p = tensor([[0.5, -1.0, 0.25, 2.0], [1.5, 0.1, -0.7, 0.3], [-0.2, 0.9, 1.1, -2.0]])
    q = tensor([[0.1, -0.5, 0.75, 1.0], [1.0, 0.6, -0.9, 0.2], [0.4, 1.3, 0.2, -1.0]])
    assert _symmetric_kl(p, q).mean().item() == pytest.approx(0.3219982385635376, rel=1e-6)


def test_small_changes_pull_twice_as_hard_as_the_authors():
    # Their criterion detaches the target of each divergence; written out: kl_div(q, sg p) + kl_div(p, sg q).
    p = torch.randn(3, 4, generator=gen(5), dtype=torch.float64)
    q = (p + 1e-4 * torch.randn(3, 4, generator=gen(6), dtype=torch.float64)).requires_grad_()
    theirs = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="sum")  # p is constant
    (theirs_grad,) = torch.autograd.grad(theirs, q)
    (ours_grad,) = torch.autograd.grad(_symmetric_kl(p, q).sum(), q)
    torch.testing.assert_close(ours_grad, 2 * theirs_grad, rtol=1e-2, atol=1e-8)


# adversarial


def test_adversarial_hand_value(f64):
    x = f64([[[0.0], [0.5], [7.0]]])
    mask = tensor([[F, T, F]])  # label 1 is predicted at position 0
    loss = adversarial(sharp, x, sharp(x), mask, eps=0.25, eta=1.0)
    # the step of 1 is cut to +-0.25, the logit moves by 0.75: (sigmoid(.75) - 1/2) * .75
    assert loss.item() == pytest.approx((1 / (1 + math.exp(-0.75)) - 0.5) * 0.75, abs=1e-12)
    # without the cut the step is eta whatever the gradient's size (noise of 1e-9 aside)
    loss = adversarial(sharp, x, sharp(x), mask, eps=9.0, eta=0.25, sigma=1e-9)
    assert loss.item() == pytest.approx((1 / (1 + math.exp(-0.75)) - 0.5) * 0.75, abs=1e-7)


def test_adversarial_climbs_to_the_worst_side(f64):
    x = f64([[[1.0], [0.0]]])  # logit 3: the divergence grows faster on the side of x < 1
    losses = [
        adversarial(
            sharp, x, sharp(x), tensor([[F, T]]), eps=0.5, eta=0.2, sigma=0.01, steps=s, generator=gen(1)
        )
        for s in (0, 1, 2, 3, 9)
    ]
    assert losses[0] < losses[1] < losses[2] < losses[3]
    assert losses[3] == losses[4]  # in the corner of the box


@pytest.mark.parametrize(
    ("eps", "sigma", "eta", "steps"), [(0.1, 0.01, 1.0, 1), (0.05, 9.0, 0.01, 3), (0.2, 9.0, 0.0, 0)]
)
def test_adversarial_stays_in_the_box(eps, sigma, eta, steps):
    head, embeds, mask = inputs()
    seen = []

    def forward(x):
        seen.append(x.detach())
        return causal(head)(x)

    adversarial(forward, embeds, causal(head)(embeds), mask, eps=eps, sigma=sigma, eta=eta, steps=steps)
    assert len(seen) == steps + 1
    assert all(
        (x - embeds).abs().max() <= eps + 1e-12 for x in seen[1:]
    )  # after every step, not only at the end
    delta = seen[-1] - embeds
    assert delta.abs().max().item() == pytest.approx(eps, abs=1e-12)
    assert delta[0, 3].abs().max() <= eps + 1e-12  # behind the last label: no gradient, noise only


def test_adversarial_step_is_as_long_at_every_token():
    head, embeds, mask = inputs()
    seen = []

    def forward(x):
        seen.append(x.detach())
        return causal(head)(x)

    adversarial(forward, embeds, causal(head)(embeds), mask, eps=9.0, sigma=1e-6, eta=0.25)
    moved = (seen[1] - seen[0]).abs().amax(-1)
    # row 0: labels 1 and 3 hang on tokens 0 to 2; row 1: labels 2 and 3 likewise; the last token on nothing
    expected = tensor([[0.25, 0.25, 0.25, 0.0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-9)


def test_adversarial_ascent_of_the_authors():
    # namisan/mt-dnn, mt_dnn/perturbation.py SmartPerturbation(epsilon=1e-6, step_size=1e6, k=1).forward with
    # these embeddings, noise and model: the direction of the ascent is normalised per token. Two classes and
    # one label per row, where its other divergence has our direction.
    head = tensor([[0.3, -1.2], [0.8, 0.4], [-0.5, 0.9]])
    x = tensor([[[0.2, -0.4, 0.7], [1.1, 0.3, -0.6]], [[-0.9, 0.5, 0.1], [0.4, -1.3, 0.8]]])
    first = [1.0, 0.243180066, -0.623883545], [0.534814239, 0.214188814, -1.0]
    seen = []

    def forward(inputs):
        seen.append(inputs.detach())
        return causal(head)(inputs)

    mask = tensor([[F, T], [F, T]])
    adversarial(forward, x, causal(head)(x), mask, eps=9.0, sigma=0.05, eta=1.0, generator=gen(3))
    noise, delta = seen[0] - x, seen[1] - x
    assert noise[0, 0, 0].item() == pytest.approx(0.040163804, rel=1e-5)  # the authors' run had the same
    torch.testing.assert_close((delta - noise)[:, 0], tensor(first), rtol=1e-4, atol=1e-5)
    assert not (delta - noise)[:, 1].any()  # a token nobody's prediction hangs on does not move


def test_adversarial_limits():
    head, embeds, mask = inputs()
    logits = causal(head)(embeds)
    assert adversarial(causal(head), embeds, logits, mask, sigma=0.0).item() == 0
    tiny = adversarial(causal(head), embeds, logits, mask, eps=1e-12)
    assert 0 <= tiny.item() < 1e-20


def test_adversarial_masked_positions_do_not_count():
    head, embeds, mask = inputs()
    one, two = (
        adversarial(
            causal(head), e, causal(head)(e), m, eps=0.1, sigma=0.1, denom=7, steps=0, generator=gen(s)
        )
        for s, e, m in [(8, embeds, mask), (8, embeds, mask & tensor([[T], [F]]))]
    )
    rest = adversarial(
        causal(head),
        embeds,
        causal(head)(embeds),
        mask & tensor([[F], [T]]),
        eps=0.1,
        sigma=0.1,
        denom=7,
        steps=0,
        generator=gen(8),
    )
    assert one.item() == pytest.approx((two + rest).item(), abs=1e-12)  # accumulation


def test_adversarial_split_and_padding():
    x = torch.randn(2, 3, 2, generator=gen(4), dtype=torch.float64)  # 12 numbers: drawn one by one
    head = torch.randn(2, 4, generator=gen(5), dtype=torch.float64)
    mask = tensor([[F, T, T], [F, F, T]])
    forward, settings = causal(head), {"eps": 0.3, "sigma": 0.1, "eta": 0.2, "denom": 3}
    whole = adversarial(forward, x, forward(x), mask, generator=gen(6), **settings)
    source = gen(6)
    parts = [
        adversarial(
            forward, x[i : i + 1], forward(x[i : i + 1]), mask[i : i + 1], generator=source, **settings
        )
        for i in (0, 1)
    ]
    assert whole.item() == pytest.approx(sum(parts).item(), abs=1e-12)
    short, padded = x[:1], torch.cat([x[:1], torch.full((1, 2, 2), 9.0)], 1)
    expected = adversarial(forward, short, forward(short), mask[:1], generator=gen(7), **settings)
    longer = torch.cat([mask[:1], tensor([[F, F]])], 1)
    found = adversarial(forward, padded, forward(padded), longer, generator=gen(7), **settings)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("scale_invariant", [False, True])
def test_adversarial_gradient_through_both_branches(scale_invariant):
    head, embeds, mask = inputs()
    logits = causal(head)(embeds)
    seen = []

    def forward(x):
        seen.append(x.detach())
        return causal(head)(x)

    settings = {"eps": 0.2, "sigma": 0.1, "eta": 0.1, "scale_invariant": scale_invariant}
    loss = adversarial(forward, embeds, logits, mask, generator=gen(), **settings)
    grads = torch.autograd.grad(loss, (head, embeds))
    delta = (seen[-1] - embeds).detach()  # a constant of the outer gradient
    clean, moved = (causal(head)(embeds + d)[:, :-1] for d in (0, delta))
    both = (tokens.kl(clean, moved) + tokens.kl(moved, clean))[mask[:, 1:]].mean()
    assert loss.item() == pytest.approx(both.item(), abs=1e-12)
    for ours, slow in zip(grads, torch.autograd.grad(both, (head, embeds)), strict=True):
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    assert head.grad is None  # the ascent left nothing behind


def test_adversarial_without_grad_and_frozen():
    head, embeds, mask = inputs()
    with torch.no_grad():
        value = adversarial(
            causal(head), embeds, causal(head)(embeds), mask, eps=0.1, eta=0.1, generator=gen()
        )
    again = adversarial(causal(head), embeds, causal(head)(embeds), mask, eps=0.1, eta=0.1, generator=gen())
    assert value.item() == again.item()
    assert not value.requires_grad


def test_adversarial_nothing_counts():
    head, embeds, mask = inputs()
    for m in (mask & F, tensor([[T, F, F, F], [F, F, F, F]])):  # position 0 predicts nothing
        loss = adversarial(causal(head), embeds, causal(head)(embeds), m)
        assert loss.item() == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, (head, embeds)))


def test_adversarial_scale_invariant():
    head, embeds, mask = inputs()
    forward = causal(head)
    settings = {"eps": 0.1, "sigma": 0.05, "eta": 0.05, "scale_invariant": True}
    one = adversarial(forward, embeds, forward(embeds), mask, generator=gen(), **settings)
    big = 1000 * embeds

    def rescaled(x):
        return forward(x / 1000)

    other = adversarial(rescaled, big, rescaled(big), mask, generator=gen(), **settings)
    assert other.item() == pytest.approx(one.item(), rel=1e-9)
    plain = adversarial(
        forward, embeds, forward(embeds), mask, eps=0.1, sigma=0.05, eta=0.05, generator=gen()
    )
    assert plain.item() != pytest.approx(one.item(), rel=1e-3)


def test_adversarial_half_precision_is_read_in_float32():
    head, embeds, mask = inputs()
    half, weights = embeds.detach().bfloat16(), head.detach().bfloat16()
    loss = adversarial(causal(weights), half, causal(weights)(half), mask, eps=0.5, sigma=0.1, eta=0.5)
    assert loss.dtype == torch.float32
    assert loss.item() > 0


@pytest.mark.errors
def test_adversarial_refusals():
    head, embeds, mask = inputs()
    forward = causal(head)
    logits = forward(embeds)
    with pytest.raises(ValueError, match="unshifted"):
        adversarial(forward, embeds, logits[:, :-1], mask)
    with pytest.raises(ValueError, match="forward to return"):
        adversarial(lambda x: forward(x)[:, :-1], embeds, logits, mask)
    with pytest.raises(TypeError, match="bool"):
        adversarial(forward, embeds, logits, mask.double())
    with pytest.raises(ValueError, match="eps > 0"):
        adversarial(forward, embeds, logits, mask, eps=0.0)
    with pytest.raises(ValueError, match="sigma >= 0"):
        adversarial(forward, embeds, logits, mask, sigma=-1.0)
    with pytest.raises(TypeError, match="steps as an int"):
        adversarial(forward, embeds, logits, mask, steps=1.0)
    with pytest.raises(ValueError, match="denom > 0"):
        adversarial(forward, embeds, logits, mask, denom=0)
    with pytest.raises(ValueError, match=r"embeds \[B, T, D\]"):
        adversarial(forward, embeds[0], logits, mask)


# the proximal half of SMART is a composition


def test_momentum_bregman_is_distill_both_ways_from_an_average():
    model = torch.nn.Linear(3, 5, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(5, 3, generator=gen(1)))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)  # the first call copies
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
        model.weight[0].add_(1.0)
    average.update_parameters(model)
    expected = 0.75 * start + 0.25 * model.weight  # theta~ <- beta theta~ + (1 - beta) theta
    torch.testing.assert_close(average.module.weight, expected, rtol=0, atol=1e-12)
    x, mask = (
        torch.randn(2, 4, 3, generator=gen(2), dtype=torch.float64),
        tensor([[F, T, T, F], [F, F, T, T]]),
    )
    student, teacher = model(x), average(x)
    bregman = kl(student, teacher, mask) + kl(student, teacher, mask, reverse=True)
    pairs = tokens.kl(student, teacher) + tokens.kl(teacher, student)
    assert bregman.item() == pytest.approx(pairs[:, :-1][mask[:, 1:]].mean().item(), abs=1e-12)
    bregman.backward()
    assert model.weight.grad.abs().max() > 0
    assert average.module.weight.grad is None  # the average stays where it is
    assert kl(student, student, mask).item() == 0


# localised balancing


def balance_inputs(rows=3, width=5, experts=4):
    logits = torch.randn(rows, width, experts, generator=gen(11), dtype=torch.float64).requires_grad_()
    mask = tensor([[T, T, F, T, F], [F, T, T, T, T], [T, F, F, F, F]])[:rows]
    return logits, mask, tensor([0, 1, 0])[:rows], tensor([0, 1, 1, 0])


def test_localized_balance_by_hand():
    gate = tensor([[[0.75, 0.25], [0.5, 0.5]], [[0.0, 1.0], [0.25, 0.75]]], dtype=torch.float64)
    mask = tensor([[T, T], [T, F]])
    # sums (1.25, 0.75), (0, 1); kinds (0, 1) of the rows and of the experts: 1.5 where equal, 0.5 where not:
    # Z = 1.875, 0.375, 0, 1.5; mean 0.9375, squares of the distances .87890625 + .31640625 + .87890625
    # + .31640625 = 2.390625, over 3 = 0.796875
    loss = localized_balance(gate, mask, tensor([0, 1]), tensor([0, 1]), delta=0.5)
    assert loss.item() == pytest.approx(0.796875 / 0.9375, abs=1e-12)
    squared = localized_balance(gate, mask, tensor([0, 1]), tensor([0, 1]), delta=0.5, squared=True)
    assert squared.item() == pytest.approx(0.796875 / 0.9375**2, abs=1e-12)
    other = localized_balance(gate, mask, tensor([0, 1]), tensor([1, 0]), delta=-0.5)
    assert other.item() == pytest.approx(loss.item(), abs=1e-12)  # both signs turned


def test_localized_balance_squared_is_the_squared_coefficient_of_variation():
    # Gates of one token each, kinds 1 and 0: Z by hand, then Var / Mean^2. A number of the authors' code
    # is in test_adapters_experts.py.
    z = tensor([0.75, 0.375, 0.075, 0.0, 0.15, 0.15, 0.25, 0.5], dtype=torch.float64)
    gate = tensor([[[0.6, 0.3, 0.1, 0.0]], [[0.2, 0.2, 0.2, 0.4]]], dtype=torch.float64)
    kinds = tensor([1, 0]), tensor([1, 1, 0, 0])
    loss = localized_balance(gate, tensor([[T], [T]]), *kinds, delta=0.25, squared=True)
    assert loss.item() == pytest.approx((z.var() / z.mean() ** 2).item(), rel=1e-12)


def test_localized_balance_sends_rows_to_the_other_kind():
    logits = torch.zeros(2, 1, 2, dtype=torch.float64, requires_grad=True)
    kinds, mask, delta = tensor([0, 1]), tensor([[T], [T]]), 0.3
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        localized_balance(logits.softmax(-1), mask, kinds, kinds, delta=delta).backward()
        optimizer.step()
    gate = logits.detach().softmax(-1)[:, 0]
    for row in range(2):
        assert (gate[row, row] / gate[row, 1 - row]).item() == pytest.approx(0.7 / 1.3, rel=1e-6)


def test_localized_balance_without_delta_is_zero_for_even_gates():
    _, _, sample, expert = balance_inputs()
    even = torch.full((3, 5, 4), 0.25, dtype=torch.float64, requires_grad=True)
    loss = localized_balance(even, torch.ones(3, 5).bool(), sample, expert, delta=0.0)
    assert loss.item() == 0
    one = localized_balance(torch.ones(1, 1, 1), tensor([[T]]), tensor([0]), tensor([0]))
    assert one.item() == 0  # a single number varies not at all


def test_localized_balance_padding_and_empty_rows_do_not_matter():
    logits, mask, sample, expert = balance_inputs()
    loss = localized_balance(logits.softmax(-1), mask, sample, expert)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[~mask].any()
    assert gradient[mask].any()
    wide = torch.nn.functional.pad(logits.softmax(-1), (0, 0, 2, 3), value=math.inf)
    padded = localized_balance(wide, torch.nn.functional.pad(mask, (2, 3)), sample, expert)
    assert padded.item() == pytest.approx(loss.item(), abs=1e-12)
    more = torch.cat([logits.softmax(-1), torch.rand(1, 5, 4, generator=gen(1), dtype=torch.float64)])
    empty = torch.cat([mask, torch.zeros(1, 5).bool()])
    again = localized_balance(more, empty, torch.cat([sample, tensor([1])]), expert)
    assert again.item() == pytest.approx(loss.item(), abs=1e-12)
    order = tensor([2, 0, 1])
    turned = localized_balance(logits.softmax(-1)[order], mask[order], sample[order], expert)
    assert turned.item() == pytest.approx(loss.item(), abs=1e-12)


def test_localized_balance_of_nothing_and_in_half_precision():
    logits, mask, sample, expert = balance_inputs()
    nothing = localized_balance(logits.softmax(-1), mask & F, sample, expert)
    assert nothing.item() == 0
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert not gradient.any()
    full = localized_balance(logits.softmax(-1), mask, sample, expert)
    half = localized_balance(logits.softmax(-1).bfloat16(), mask, sample, expert)
    assert half.dtype == torch.bfloat16
    assert half.item() == pytest.approx(full.item(), rel=2e-2)


@pytest.mark.errors
def test_localized_balance_refusals():
    logits, mask, sample, expert = balance_inputs()
    gate = logits.softmax(-1)
    for args, match in (
        ((gate[0], mask, sample, expert), r"expected gate \[B, T, N\], got \[5, 4\]"),
        ((gate, mask[:, :4], sample, expert), r"expected mask \[3, 5\].*got \[3, 4\]"),
        ((gate, mask, sample[:2], expert), r"sample_type \[3\] and expert_type \[4\], got .*\[2\] and \[4\]"),
        ((gate, mask, sample, sample), r"expert_type \[4\], got .* and \[3\]"),
        ((gate * math.nan, mask, sample, expert), r"expected finite gates, got NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=match):
            localized_balance(*args)
    with pytest.raises(ValueError, match=r"expected delta in \[-1, 1\], got 1.5"):
        localized_balance(gate, mask, sample, expert, delta=1.5)
    with pytest.raises(TypeError, match=r"expected mask as a bool tensor"):
        localized_balance(gate, mask.float(), sample, expert)
    with pytest.raises(TypeError, match=r"expected sample_type as an integer tensor"):
        localized_balance(gate, mask, sample.float(), expert)
