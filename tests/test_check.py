"""The messages of a mistaken call, and the calls that must not be mistaken for one."""

import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import pad

from cotkit import _check
from cotkit._reduce import check_denom, total
from cotkit.losses.sft import iw_sft, iw_weights, nll

LOSSES = [
    pytest.param(lambda logps, mask: nll(logps, mask), id="nll"),
    pytest.param(lambda logps, mask: iw_sft(logps, logps, mask), id="iw_sft"),
    pytest.param(lambda logps, mask: iw_weights(logps, logps, mask), id="iw_weights"),
]


def batch(prompt=2, target=3, vocabulary=11, rows=2, seed=0):
    """Random logits with labels of which the prompt is -100."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, prompt + target, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (rows, prompt + target), generator=generator)
    labels[:, :prompt] = -100
    return logits, labels


def shifted_once(logits, labels):
    """What tokens.token_logps does: position t holds log p(labels[:, t]) read from logits[:, t - 1]."""
    gathered = logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return pad(gathered, (1, 0)).masked_fill(labels == -100, 0.0)


# The three mistakes of the issue, in every loss of log-probs


@pytest.mark.errors
@pytest.mark.parametrize("loss", LOSSES)
def test_logits_instead_of_logps(loss):
    logits, labels = batch()
    with pytest.raises(
        ValueError, match=r"\[B, T\], got \[2, 5, 11\]. These look like logits .*token_logps\("
    ):
        loss(logits, labels != -100)
    with pytest.raises(ValueError, match=r"log-probabilities \(at most 0\), got .*These look like logits"):
        loss(logits.amax(-1), labels != -100)  # gathered, but never normalised
    with pytest.raises(ValueError, match="or probabilities"):
        loss(shifted_once(logits, labels).exp(), labels != -100)


@pytest.mark.errors
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("prompt", [2, 3, 5])
@pytest.mark.parametrize("target", [1, 2, 6])
def test_labels_shifted_twice(loss, prompt, target):
    logits, labels = batch(prompt, target)
    twice = shifted_once(logits, pad(labels[:, 1:], (0, 1), value=-100))
    with pytest.raises(
        ValueError, match=r"one step to the left\. The labels were shifted twice: pass labels and mask"
    ):
        loss(twice, labels != -100)
    loss(shifted_once(logits, labels), labels != -100)


@pytest.mark.errors
def test_labels_shifted_twice_in_a_padded_batch_with_a_prompt_of_one_token():
    logits, labels = batch(prompt=1, target=6)
    labels[0, 4:] = -100
    labels[1, :3] = -100
    twice = shifted_once(logits, pad(labels[:, 1:], (0, 1), value=-100))
    with pytest.raises(ValueError, match="shifted twice"):
        nll(twice, labels != -100)


@pytest.mark.errors
@pytest.mark.parametrize("loss", LOSSES)
def test_mask_of_the_wrong_shape_or_type(loss):
    logits, labels = batch()
    logps, mask = shifted_once(logits, labels), labels != -100
    with pytest.raises(
        ValueError, match=r"logps \[2, 4\], mask \[2, 5\]. \w+ has one column fewer.*pad\(\w+, \(1, 0\)\)"
    ):
        loss(logps[:, 1:], mask)
    with pytest.raises(ValueError, match=r"mask \[5, 2\]. One of the two is transposed"):
        loss(logps, mask.T)
    with pytest.raises(ValueError, match=r"mask \[2, 4\]. cotkit does not broadcast"):
        loss(logps, mask[:, 1:])
    with pytest.raises(ValueError, match=r"mask \[1, 5\]. cotkit does not broadcast"):
        loss(logps, mask[:1])
    with pytest.raises(ValueError, match=r"expected mask \[B, T\], got \[5\]"):
        loss(logps, mask[0])
    with pytest.raises(
        TypeError, match=r"mask as a bool tensor \(True = counts\), got float32. .*mask.bool\(\)"
    ):
        loss(logps, mask.float())
    with pytest.raises(TypeError, match="got int64"):
        loss(logps, labels)
    with pytest.raises(TypeError, match=r"mask as a torch\.Tensor, got list"):
        loss(logps, mask.tolist())
    with pytest.raises(TypeError, match="as a float tensor, got int64"):
        loss(labels, mask)


@pytest.mark.errors
def test_a_mask_that_counts_ignored_labels():
    logits, labels = batch(prompt=40, target=3)
    with pytest.raises(
        ValueError, match=r"below 0 somewhere under the mask, got 80 zeros\..*use mask = labels != -100"
    ):
        nll(shifted_once(logits, labels), labels == -100)


# No false alarms


@pytest.mark.parametrize("loss", LOSSES)
def test_a_model_that_knows_almost_everything_is_welcome(loss):
    mask = pad(torch.ones(3, 7, dtype=torch.bool), (2, 0))
    generator = torch.Generator().manual_seed(3)
    for share in (0.0, 0.05, 0.3, 0.7):  # of the positions that are not exactly 0
        for _ in range(200):
            logps = -torch.rand(3, 9, generator=generator) * (torch.rand(3, 9, generator=generator) < share)
            loss(logps * mask, mask)
            loss(pad(logps[:, 1:], (1, 0)), mask)  # the labels of the prompt were scored too


def test_a_row_known_by_heart_is_welcome():
    mask = tensor([[False, False, True, True, True]])
    logps = torch.zeros(1, 5, requires_grad=True)
    loss = nll(logps, mask)
    loss.backward()
    assert loss.item() == 0
    assert logps.grad[0].tolist() == pytest.approx([0, 0, -1 / 3, -1 / 3, -1 / 3])


def test_a_first_token_that_is_sure_and_a_last_token_that_is_sure():
    mask = tensor([[False, True, True, True]])
    nll(tensor([[0.0, 0.0, -1.0, -2.0]]), mask)
    nll(tensor([[0.0, -1.0, -2.0, 0.0]]), mask)  # looks like a shift by one, and is not
    nll(tensor([[0.0, -1.0, 0.0, 0.0]]), mask)


def test_rounding_above_zero_is_welcome():
    mask = tensor([[False, True]])
    nll(tensor([[0.0, 2e-4]]), mask)  # two kernels for one logit, float32
    nll(tensor([[0.0, 0.0625]], dtype=torch.bfloat16), mask)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("value", "dtype"), [(2e-3, torch.float32), (2e-3, torch.float64), (0.25, torch.bfloat16)]
)
def test_more_than_rounding_above_zero_is_refused(value, dtype):
    with pytest.raises(ValueError, match="at most 0"):
        nll(tensor([[0.0, value]], dtype=dtype), tensor([[False, True]]))


def test_values_that_do_not_count_may_be_anything():
    nll(tensor([[7.0, -1.0, math.inf]]), tensor([[False, True, False]]))


def test_minus_infinity_and_nan_pass_through():
    mask = tensor([[False, True, True]])
    assert nll(tensor([[0.0, -math.inf, -1.0]]), mask).item() == math.inf
    assert nll(tensor([[0.0, math.nan, -1.0]]), mask).isnan()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 1), (0, 0)])
def test_empty_shapes(shape):
    logps = torch.zeros(shape, requires_grad=True)
    loss = nll(logps, torch.zeros(shape, dtype=torch.bool), per="sequence")
    loss.backward()
    assert loss.item() == 0


# The checks by themselves


@pytest.mark.errors
def test_numbers():
    for bad in (0, -1.0):
        with pytest.raises(ValueError, match=f"f: expected beta > 0, got {bad}"):
            _check.positive("f", beta=bad)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="beta finite"):
            _check.positive("f", beta=bad)
    for bad in (True, "1", None, tensor(1.0)):
        with pytest.raises(TypeError, match="beta as a number"):
            _check.finite("f", beta=bad)
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"rate in \[0, 1\]"):
            _check.between("f", 0, 1, rate=bad)
    with pytest.raises(ValueError, match="n >= 2, got 1"):
        _check.at_least("f", 2, n=1)
    with pytest.raises(TypeError, match=r"clip as a pair \(low, high\), got 3"):
        _check.interval("f", clip=3)
    for bad in ((-1, 1), (2, 1)):
        with pytest.raises(ValueError, match="0 <= low <= high"):
            _check.interval("f", clip=bad)
    with pytest.raises(ValueError, match=r"clip\[0\] finite"):
        _check.interval("f", clip=(math.inf, math.inf))
    with pytest.raises(ValueError, match=r"clip\[1\] finite"):
        _check.interval("f", clip=(0.0, math.nan))


def test_numbers_at_the_edge():
    _check.positive("f", beta=1e-9, n=1)
    _check.between("f", 0, 1, a=0, b=1)
    _check.at_least("f", 2, n=2)
    _check.interval("f", clip=(0, math.inf), point=(1, 1), as_list=[0.5, 2])


@pytest.mark.errors
def test_tensors():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"f: expected a \[B\], got \[2, 3\]"):
        _check.ndim("f", "B", a=x)
    with pytest.raises(TypeError, match="a as an integer tensor, got float32"):
        _check.integer("f", a=x)
    with pytest.raises(TypeError, match="a as an integer tensor, got bool"):
        _check.integer("f", a=x > 0)
    with pytest.raises(TypeError, match="a as an integer tensor, got complex64"):
        _check.integer("f", a=x.to(torch.complex64))
    with pytest.raises(ValueError, match=r"equal shapes, got a \[2, 3\], b \[3, 2\]"):
        _check.same_shape("f", a=x, b=x.T)
    _check.integer("f", a=x.to(torch.int8))


@pytest.mark.errors
def test_denominators():
    for bad in (0, -3, 0.0, math.inf, math.nan, tensor(0.0), tensor(math.inf)):
        with pytest.raises(ValueError, match=r"f: expected denom > 0 and finite, got .*accumulated batch"):
            check_denom("f", bad)
    for bad in (True, "4", [4]):
        with pytest.raises(TypeError, match="denom as a number"):
            check_denom("f", bad)
    with pytest.raises(ValueError, match=r"0-d tensor, got shape \[1\]"):
        check_denom("f", tensor([4]))
    for good in (None, 1, 0.5, tensor(3), tensor(0.25)):
        check_denom("f", good)


def test_total_divides_by_at_least_one():
    values, mask = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert total("f", values, mask).item() == 0
    assert total("f", values, mask, per="sequence").item() == 0
    assert total("f", values, mask, denom=4).item() == 0
