import pytest
import torch

from cotkit.tokens import ANSWER, PAD, PROMPT, SPECIAL, THOUGHT, TOOL, between, corrupt, labels, mask

IDS = torch.tensor([[11, 12, 13, 14, 15, 0], [21, 22, 23, 24, 0, 0]])
SEGMENTS = torch.tensor([[1, 4, 2, 5, 3, 0], [1, 2, 3, 4, 0, 0]], dtype=torch.int8)
TARGETS = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]]).bool()


def test_mask_and_labels():
    assert (PAD, PROMPT, THOUGHT, ANSWER, SPECIAL, TOOL) == (0, 1, 2, 3, 4, 5)
    assert torch.equal(mask(SEGMENTS, THOUGHT, ANSWER, SPECIAL), TARGETS)
    assert mask(SEGMENTS, ANSWER).nonzero().tolist() == [[0, 4], [1, 2]]
    assert mask(SEGMENTS, TOOL).nonzero().tolist() == [[0, 3]]
    assert labels(IDS, TARGETS).tolist() == [[-100, 12, 13, -100, 15, -100], [-100, 22, 23, 24, -100, -100]]


def test_between():
    def inside(ids, **kwargs):
        return between(torch.tensor([ids]), 8, 9, **kwargs)[0].int().tolist()

    assert inside([1, 8, 2, 3, 9, 4]) == [0, 0, 1, 1, 0, 0]
    assert inside([1, 8, 2, 3, 9, 4], inclusive=True) == [0, 1, 1, 1, 1, 0]
    assert inside([9, 1, 8, 2]) == [0, 0, 0, 1]  # a stray close; never closed
    assert inside([9, 1, 8, 2], inclusive=True) == [0, 0, 1, 1]
    assert inside([8, 2, 9, 3, 9, 8, 4, 9]) == [0, 1, 0, 0, 0, 0, 1, 0]
    assert inside([8, 2, 9, 3, 9, 8, 4, 9], inclusive=True) == [1, 1, 1, 0, 0, 1, 1, 1]
    assert inside([8, 2, 8, 3, 9, 4]) == [0, 1, 0, 1, 0, 0]
    assert between(torch.zeros(2, 0, dtype=torch.long), 8, 9).shape == (2, 0)


def test_corrupt_ends_of_the_range():
    clean, before = IDS.clone(), labels(IDS, TARGETS)
    same, noised = corrupt(IDS, TARGETS, 0.0, mask_id=9)
    assert torch.equal(same, IDS)
    assert not noised.any()
    gone, noised = corrupt(IDS, TARGETS, 1.0, mask_id=9)
    assert torch.equal(noised, TARGETS)
    assert torch.equal(gone, torch.where(TARGETS, 9, IDS))
    assert torch.equal(IDS, clean)  # inputs and labels are untouched
    assert torch.equal(labels(IDS, TARGETS), before)
    swapped, _ = corrupt(IDS, TARGETS, 1.0, replacement=IDS + 100)
    assert torch.equal(swapped, torch.where(TARGETS, IDS + 100, IDS))


def test_corrupt_rate():
    ids, every = torch.ones(100, 1000, dtype=torch.long), torch.ones(100, 1000, dtype=torch.bool)
    every[:, ::2] = False
    every = torch.cat([every, every], 1)
    ids = torch.cat([ids, ids], 1)
    g = torch.Generator().manual_seed(0)
    _, noised = corrupt(ids, every, 0.4, mask_id=0, generator=g)
    assert not (noised & ~every).any()
    assert noised[every].double().mean().item() == pytest.approx(0.4, abs=0.01)
    rate = torch.linspace(0, 1, 100)
    _, noised = corrupt(ids, every, rate, mask_id=0, generator=g)
    assert not noised[0].any()
    assert torch.equal(noised[-1], every[-1])
    shares = noised.double().sum(1) / every.sum(1)
    torch.testing.assert_close(shares, rate.double(), rtol=0, atol=0.08)
    again = [
        corrupt(ids, every, 0.4, mask_id=0, generator=torch.Generator().manual_seed(5))[1] for _ in range(2)
    ]
    assert torch.equal(*again)


def test_corrupting_an_input_changes_no_prediction_before_it():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **size)).eval()
    at = torch.zeros_like(TARGETS)
    at[:, 2] = True
    noisy, _ = corrupt(IDS, at, 1.0, mask_id=39)
    with torch.no_grad():
        a, b = model(IDS).logits, model(noisy).logits
    torch.testing.assert_close(a[:, :2], b[:, :2])
    assert not torch.allclose(a[:, 2:], b[:, 2:])


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="at least one part"):
        mask(SEGMENTS)
    with pytest.raises(ValueError, match="part to be one of"):
        mask(SEGMENTS, 6)
    with pytest.raises(TypeError, match="integer"):
        mask(SEGMENTS.float(), THOUGHT)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        mask(SEGMENTS[0], THOUGHT)
    with pytest.raises(ValueError, match="equal shapes"):
        labels(IDS, TARGETS[:, 1:])
    with pytest.raises(TypeError, match="mask as a bool"):
        labels(IDS, TARGETS.int())
    with pytest.raises(ValueError, match="two different ids"):
        between(IDS, 8, 8)
    for kwargs in ({}, {"mask_id": 1, "replacement": IDS}):
        with pytest.raises(ValueError, match="either mask_id or replacement"):
            corrupt(IDS, TARGETS, 0.5, **kwargs)
    with pytest.raises(ValueError, match=r"rate in \[0, 1\]"):
        corrupt(IDS, TARGETS, 1.5, mask_id=1)
    with pytest.raises(ValueError, match=r"rate in \[0, 1\]"):
        corrupt(IDS, TARGETS, torch.tensor([0.5, -0.5]), mask_id=1)
    with pytest.raises(ValueError, match="one per row"):
        corrupt(IDS, TARGETS, torch.rand(3), mask_id=1)
    with pytest.raises(ValueError, match="equal shapes"):
        corrupt(IDS, TARGETS, 0.5, replacement=IDS[:, 1:])
    with pytest.raises(TypeError, match="replacement as an integer tensor, got float32"):
        corrupt(IDS, TARGETS, 0.5, replacement=IDS.float())
    with pytest.raises(ValueError, match="mask_id >= 0, got -1"):
        corrupt(IDS, TARGETS, 0.5, mask_id=-1)
    with pytest.raises(TypeError, match="mask_id as an int, got float"):
        corrupt(IDS, TARGETS, 0.5, mask_id=3.0)
    with pytest.raises(ValueError, match="replacement ids >= 0 under the mask, got -100"):
        corrupt(IDS, TARGETS, 0.5, replacement=torch.full_like(IDS, -100))
    assert torch.equal(corrupt(IDS, TARGETS, 1.0, replacement=IDS.masked_fill(~TARGETS, -100))[0], IDS)
