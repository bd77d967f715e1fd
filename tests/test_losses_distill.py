import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import cross_entropy

from cotkit import tokens
from cotkit.losses.distill import kl, mixed_label

T, F = True, False


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair():
    student, teacher = draw(1, 2, 4, 5).requires_grad_(), draw(2, 2, 4, 5).requires_grad_()
    return student, teacher, tensor([[F, T, F, T], [F, F, T, T]])


# kl


def test_kl_hand_value(f64):
    ln3 = math.log(3)
    teacher = f64([[[ln3, 0.0], [5.0, 7.0]]])  # (3/4, 1/4) at position 0, which predicts label 1
    student = f64([[[0.0, 0.0], [1.0, 9.0]]])
    mask = tensor([[F, T]])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert kl(student, teacher, mask).item() == pytest.approx(forward, abs=1e-12)
    assert kl(student, teacher, mask, reverse=True).item() == pytest.approx(reverse, abs=1e-12)
    # temperature 1/2: the teacher is (9/10, 1/10)
    cold = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert kl(student, teacher, mask, temperature=0.5).item() == pytest.approx(cold, abs=1e-12)


def test_kl_reads_the_position_before_the_label():
    student, teacher, mask = pair()
    expected = (
        tokens.kl(teacher, student)[0, [0, 2]].sum() + tokens.kl(teacher, student)[1, [1, 2]].sum()
    ) / 4
    loss = kl(student, teacher, mask)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.backward()
    assert student.grad[0, [0, 2]].abs().amin() > 0
    assert not student.grad[0, [1, 3]].any()
    assert not student.grad[1, [0, 3]].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_kl_moves_the_student_only(reverse):
    student, teacher, mask = pair()
    before = kl(student, teacher, mask, reverse=reverse)
    before.backward()
    assert teacher.grad is None
    after = kl(student.detach() - 0.1 * student.grad, teacher, mask, reverse=reverse)
    assert after < before
    assert kl(teacher, teacher, mask, reverse=reverse).item() == 0


def test_kl_is_the_cross_entropy_of_xcot():
    strong, weak, mask = *pair()[:2], pair()[2]
    shifted = mask[:, 1:]
    p_h = strong[:, :-1][shifted].softmax(-1).detach()
    cross = -(p_h * weak[:, :-1][shifted].log_softmax(-1)).sum(-1).mean()
    entropy = tokens.entropy(strong)[:, :-1][shifted].mean()
    loss = kl(weak, strong, mask)
    assert loss.item() == pytest.approx((cross - entropy).item(), abs=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, weak), torch.autograd.grad(cross, weak), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_kl_two_prompts_of_different_length():
    answer = draw(3, 1, 3, 5)  # from the last prompt token on: two answer tokens are predicted
    weak = torch.cat([draw(4, 1, 4, 5), draw(5, 1, 3, 5)], 1)
    strong = torch.cat([draw(6, 1, 2, 5), answer], 1)
    mask = tensor([[F, F, F, F, F, T, T]])
    n = 3
    expected = tokens.kl(answer, weak[:, 4:])[0, :2].mean()
    found = kl(weak[:, -n:], strong[:, -n:], mask[:, -n:])
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_kl_split_padding_accumulation():
    student, teacher, mask = pair()
    whole = kl(student, teacher, mask)
    parts = sum(kl(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1], denom=4) for i in (0, 1))
    assert parts.item() == pytest.approx(whole.item(), abs=1e-12)
    pad = torch.full((2, 3, 5), math.nan, dtype=torch.float64)
    longer = [torch.cat([x, pad], 1) for x in (student, teacher)]
    padded = kl(*longer, torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1))
    assert padded.item() == whole.item()
    (grad,) = torch.autograd.grad(padded, student)
    assert grad.isfinite().all()


def test_kl_nothing_counts():
    student, teacher, mask = pair()
    for m in (mask & F, tensor([[T, F, F, F], [F, F, F, F]])):
        loss = kl(student, teacher, m)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.errors
def test_kl_refusals():
    student, teacher, mask = pair()
    with pytest.raises(ValueError, match="equal shapes"):
        kl(student[:, :-1], teacher, mask)
    with pytest.raises(ValueError, match="unshifted"):
        kl(student[:, :-1], teacher[:, :-1], mask)
    with pytest.raises(TypeError, match="bool"):
        kl(student, teacher, mask.long())
    with pytest.raises(ValueError, match="temperature > 0"):
        kl(student, teacher, mask, temperature=0.0)
    with pytest.raises(ValueError, match="denom > 0"):
        kl(student, teacher, mask, denom=-1)


# mixed_label


def test_mixed_label_hand_value(f64):
    logits = f64([[math.log(2.0), math.log(5.0), 0.0], [0.0, 0.0, 0.0]])  # (2, 5, 1) / 8
    q = f64([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    labels = tensor([0, 2])
    lg = [math.log(x / 8) for x in (2, 5, 1)]
    first = -(0.75 * lg[0] + 0.25 * (0.5 * lg[0] + 0.3 * lg[1] + 0.2 * lg[2]))
    loss = mixed_label(logits, labels, q, alpha=0.25)
    assert loss.item() == pytest.approx((first + math.log(3)) / 2, abs=1e-12)
    loss.backward()
    # dL/dz = softmax - target, over 2 rows; target 3/4 + 1/8, .075, .05
    row = [(2 / 8 - 0.875) / 2, (5 / 8 - 0.075) / 2, (1 / 8 - 0.05) / 2]
    torch.testing.assert_close(logits.grad[0], f64(row).detach(), rtol=0, atol=1e-12)
    assert q.grad is None


def test_mixed_label_limits():
    logits, q = draw(1, 4, 5), draw(2, 4, 5).softmax(-1)
    labels = tensor([3, -100, 0, 4])
    kept = labels >= 0
    plain = mixed_label(logits, labels, q, alpha=0.0)
    assert plain.item() == pytest.approx(cross_entropy(logits, labels).item(), abs=1e-14)
    soft = mixed_label(logits, labels, q, alpha=1.0)
    assert soft.item() == pytest.approx(cross_entropy(logits[kept], q[kept]).item(), abs=1e-14)
    smooth = mixed_label(logits, labels, torch.full_like(q, 0.2), alpha=0.3)
    expected = cross_entropy(logits, labels, label_smoothing=0.3)
    assert smooth.item() == pytest.approx(expected.item(), abs=1e-14)


def test_mixed_label_alpha_per_row_and_split():
    logits, q, labels = draw(1, 3, 5), draw(2, 3, 5).softmax(-1), tensor([3, 1, 0])
    alpha = tensor([0.1, 0.6, 1.0], dtype=torch.float64)
    whole = mixed_label(logits, labels, q, alpha=alpha)
    rows = [mixed_label(logits[[i]], labels[[i]], q[[i]], alpha=alpha[i].item(), denom=3) for i in range(3)]
    assert sum(rows).item() == pytest.approx(whole.item(), abs=1e-14)


def test_mixed_label_self_calibration_holds_its_target_fixed():
    logits = draw(3, 2, 4).requires_grad_()
    labels, alpha = tensor([1, 2]), 0.4
    mixed_label(logits, labels, (logits / 2).softmax(-1), alpha=alpha).backward()
    target = (1 - alpha) * torch.eye(4).double()[labels] + alpha * (logits.detach() / 2).softmax(-1)
    expected = (logits.detach().softmax(-1) - target) / 2
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)


def test_mixed_label_over_tokens_is_the_cross_entropy_of_the_shifted_labels():
    logits, ids, mask = draw(4, 2, 4, 5), tensor([[1, 2, 3, 4], [0, 1, 4, 2]]), pair()[2]
    loss = mixed_label(
        logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]], torch.full((4, 5), 0.2).double(), alpha=0.0
    )
    logps = tokens.token_logps(logits, ids.masked_fill(~mask, -100))
    assert loss.item() == pytest.approx(-logps[mask].mean().item(), abs=1e-12)


def test_mixed_label_impossible_class(f64):
    logits = f64([[1.0, 0.0, -math.inf]])
    loss = mixed_label(logits, tensor([0]), tensor([[0.25, 0.75, 0.0]]).double(), alpha=0.5)
    two = mixed_label(logits[:, :2], tensor([0]), tensor([[0.25, 0.75]]).double(), alpha=0.5)
    assert loss.item() == pytest.approx(two.item(), abs=1e-12)
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_mixed_label_a_share_of_zero_asks_for_nothing(f64, as_tensor):
    logits = f64([[1.0, 0.0, -math.inf]])
    for alpha, label, q in ((1.0, 2, [0.25, 0.75, 0.0]), (0.0, 1, [0.25, 0.25, 0.5])):
        # cross-entropies of the two possible classes: log(1 + e) = 1.3133 for class 1, less 1 for class 0
        want = math.log1p(math.e) - (0.25 if alpha else 0.0)
        share = tensor([alpha]) if as_tensor else alpha
        loss = mixed_label(logits, tensor([label]), tensor([q]).double(), alpha=share)
        assert loss.item() == pytest.approx(want, abs=1e-12)
        (slope,) = torch.autograd.grad(loss, logits)
        p = 1 / (1 + math.exp(-1.0))  # of class 0
        assert slope[0].tolist() == pytest.approx([p - 0.25 * alpha, 0.25 * alpha - p, 0.0], abs=1e-12)


@pytest.mark.errors
def test_mixed_label_refuses_what_is_not_finite(f64):
    q = tensor([[0.5, 0.5, 0.0]]).double()
    for row, label in (([1.0, 0.0, -math.inf], 2), ([1.0, -math.inf, 0.0], 0), ([math.nan, 0.0, 1.0], 1)):
        with pytest.raises(ValueError, match="finite loss in every row, got"):
            mixed_label(f64([row]), tensor([label]), q, alpha=0.3)
    with pytest.raises(ValueError, match="finite loss in every row, got nan"):
        mixed_label(f64([[-math.inf] * 3]), tensor([0]), q, alpha=0.3)
    kept = mixed_label(f64([[math.nan] * 3, [1.0, 1.0, 1.0]]), tensor([-100, 0]), q.expand(2, 3), alpha=0.3)
    assert kept.item() == pytest.approx(math.log(3), abs=1e-12)


def test_mixed_label_nothing_counts(f64):
    logits = f64([[1.0, math.inf], [0.0, 2.0]])
    loss = mixed_label(logits, tensor([-100, -100]), tensor([[0.5, 0.5]] * 2).double(), alpha=0.5)
    assert loss.item() == 0
    loss.backward()
    assert not logits.grad.any()


@pytest.mark.errors
def test_mixed_label_refusals():
    logits, q, labels = draw(1, 3, 5), draw(2, 3, 5).softmax(-1), tensor([3, 1, 0])
    with pytest.raises(ValueError, match="shifted once"):
        mixed_label(logits, labels[:2], q, alpha=0.5)
    with pytest.raises(ValueError, match="softmax"):
        mixed_label(logits, labels, logits, alpha=0.5)
    with pytest.raises(ValueError, match=r"labels in \[0, 5\)"):
        mixed_label(logits, tensor([3, 1, 5]), q, alpha=0.5)
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\]"):
        mixed_label(logits, labels, q, alpha=1.5)
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\]"):
        mixed_label(logits, labels, q, alpha=tensor([0.1, 0.2, -0.3]))
    with pytest.raises(ValueError, match="one per row"):
        mixed_label(logits, labels, q, alpha=tensor([0.1, 0.2]))
    with pytest.raises(TypeError, match="integer"):
        mixed_label(logits, labels.double(), q, alpha=0.5)
