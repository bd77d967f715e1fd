import math
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch

from cotkit.tokens import UL2_DENOISERS, labels, span_corrupt

SENTINELS = list(range(999, 899, -1))


def cut(ids, seed=0, **options):
    return span_corrupt(ids, sentinels=SENTINELS, rng=random.Random(seed), **options)


def put_back(inputs, targets):
    """The text, by a walk over both sides; without a sentinel the target continues the input."""
    if not targets or targets[0] not in SENTINELS:
        return [*inputs, *targets]
    spans, text = {}, []
    for token in targets:
        if token in SENTINELS:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    for token in inputs:
        text += spans.pop(token) if token in SENTINELS else [token]
    assert not spans
    return text


def test_the_seven_denoisers():
    settings = [
        (mode, o.get("mean_span", math.inf), o["rate"], o.get("tail", False)) for mode, o in UL2_DENOISERS
    ]
    assert settings == [
        ("R", 3, 0.15, False), ("R", 8, 0.15, False), ("S", math.inf, 0.25, True), ("X", 3, 0.5, False),
        ("X", 8, 0.5, False), ("X", 64, 0.15, False), ("X", 64, 0.5, False),
    ]  # fmt: skip
    with pytest.raises(TypeError, match="item assignment"):
        UL2_DENOISERS[0][1]["rate"] = 1.0


@pytest.mark.parametrize("length", [2, 3, 7, 10, 64, 512])
@pytest.mark.parametrize("number", range(7))
def test_every_denoiser_gives_the_text_back(number, length):
    mode, options = UL2_DENOISERS[number]
    ids = list(range(1, length + 1))
    before = list(ids)
    for seed in range(5):
        inputs, targets = cut(ids, seed, **options)
        assert put_back(inputs, targets) == ids == before
        gone = sum(token not in SENTINELS for token in targets)
        assert gone == min(max(round(length * options["rate"]), 1), length - 1)
        marks = [token for token in inputs if token in SENTINELS]
        assert marks == [token for token in targets if token in SENTINELS] == SENTINELS[: len(marks)]
        assert inputs[0] == 1  # a kept span comes first
        gaps = [i for i, token in enumerate(inputs) if token in SENTINELS]
        assert all(b - a > 1 for a, b in pairwise(gaps))  # spans never touch
        if mode == "S":
            assert (inputs, targets) == (ids[:-gone], ids[-gone:])  # a pure prefix
        elif length > 2:
            assert inputs[-1] in SENTINELS  # the last span is a cut one


# (length, mean span, rate): (tokens cut, spans), from t5/data/preprocessors.py::random_spans_noise_mask of
# google-research/text-to-text-transfer-transformer, run on numpy arrays in place of TensorFlow's.
T5 = {
    (2, 3, 0.15): (1, 1), (2, 64, 0.5): (1, 1), (3, 3, 0.5): (2, 1), (7, 8, 0.5): (4, 1),
    (10, 3, 0.15): (2, 1), (10, 3, 0.5): (5, 2), (20, 3, 0.5): (10, 3), (30, 3, 0.15): (4, 1),
    (30, 3, 0.5): (15, 5), (30, 8, 0.5): (15, 2), (50, 3, 0.15): (8, 3), (50, 8, 0.5): (25, 3),
    (128, 3, 0.15): (19, 6), (128, 8, 0.15): (19, 2), (128, 3, 0.5): (64, 21), (128, 8, 0.5): (64, 8),
    (128, 64, 0.5): (64, 1), (512, 3, 0.15): (77, 26), (512, 8, 0.15): (77, 10), (512, 3, 0.5): (256, 85),
    (512, 8, 0.5): (256, 32), (512, 64, 0.15): (77, 1), (512, 64, 0.5): (256, 4),
}  # fmt: skip


@pytest.mark.parametrize("setting", T5)
def test_counts_are_those_of_t5(setting):
    length, mean_span, rate = setting
    _, targets = cut(list(range(length)), mean_span=mean_span, rate=rate)
    spans = sum(token in SENTINELS for token in targets)
    assert (len(targets) - spans, spans) == T5[setting]


def test_outcomes_are_those_of_t5_and_equally_likely():
    """All nine that T5's functions can give for 8 ids, 4 of them cut in 2 spans (same source as above)."""
    t5 = {
        ((11, 12, 13, 99, 15, 98), (99, 14, 98, 16, 17, 18)),
        ((11, 12, 13, 99, 16, 98), (99, 14, 15, 98, 17, 18)),
        ((11, 12, 13, 99, 17, 98), (99, 14, 15, 16, 98, 18)),
        ((11, 12, 99, 14, 15, 98), (99, 13, 98, 16, 17, 18)),
        ((11, 12, 99, 15, 16, 98), (99, 13, 14, 98, 17, 18)),
        ((11, 12, 99, 16, 17, 98), (99, 13, 14, 15, 98, 18)),
        ((11, 99, 13, 14, 15, 98), (99, 12, 98, 16, 17, 18)),
        ((11, 99, 14, 15, 16, 98), (99, 12, 13, 98, 17, 18)),
        ((11, 99, 15, 16, 17, 98), (99, 12, 13, 14, 98, 18)),
    }
    rng, seen = random.Random(0), Counter()
    for _ in range(3600):
        pair = span_corrupt(list(range(11, 19)), mean_span=2, rate=0.5, sentinels=[99, 98], rng=rng)
        seen[tuple(map(tuple, pair))] += 1
    assert set(seen) == t5
    assert all(abs(count - 400) < 100 for count in seen.values())  # 5 standard deviations


def test_the_ends_of_the_range():
    assert cut([4, 5, 6], rate=0) == ([4, 5, 6], [])
    assert cut([4, 5, 6], rate=1, mean_span=1) == ([4, 999], [999, 5, 6])  # one is kept: one span
    assert cut([4, 5, 6], rate=1, tail=True) == ([4], [5, 6])
    # 9 of 10 cut, spans of 1 wanted: one kept token leaves room for one span
    assert cut(list(range(10)), rate=0.9, mean_span=1) == ([0, 999], [999, *range(1, 10)])
    assert cut(list(range(9)), 3, mean_span=2, rate=0.4) == cut(list(range(9)), 3, mean_span=2, rate=0.4)


def test_a_row_for_a_decoder_only_model():
    """The mixture as the docstring says it: mode token, input, target, end; loss on target and end."""
    rng, mode_id, end_id = random.Random(1), {"R": 800, "S": 801, "X": 802}, 803
    seen = set()
    for _ in range(40):
        ids = list(range(1, 21))
        mode, options = rng.choice(UL2_DENOISERS)
        inputs, targets = span_corrupt(ids, **options, sentinels=SENTINELS, rng=rng)
        row = torch.tensor([[mode_id[mode], *inputs, *targets, end_id]])
        counted = torch.arange(row.shape[1])[None] > len(inputs)
        found = labels(row, counted)[0]
        assert found[found != -100].tolist() == [*targets, end_id]
        assert put_back(row[0, 1 : 1 + len(inputs)].tolist(), found[found != -100].tolist()[:-1]) == ids
        seen.add(mode)
    assert seen == {"R", "S", "X"}


@pytest.mark.errors
def test_refusals():
    for ids in ([], [4]):
        with pytest.raises(ValueError, match="at least 2 ids"):
            cut(ids)
    with pytest.raises(ValueError, match=r"rate in \[0, 1\]"):
        cut([4, 5], rate=1.5)
    with pytest.raises(ValueError, match="mean_span >= 1"):
        cut([4, 5], mean_span=0.5)
    rng = random.Random(0)
    with pytest.raises(ValueError, match="expected 3 sentinels for 20 ids, got 2"):
        span_corrupt(list(range(20)), rate=0.5, sentinels=[99, 98], rng=rng)
    for sentinels in ([99, 99], [3]):
        with pytest.raises(ValueError, match="differ and do not occur"):
            span_corrupt(list(range(5)), sentinels=sentinels, rng=rng)


@pytest.mark.errors  # the annotation asks for a sequence
def test_tensors_are_read_as_numbers():
    ids = torch.tensor([5, 6, 7, 8, 9, 10])
    plain = span_corrupt(ids.tolist(), rate=0.5, sentinels=[90, 91], rng=random.Random(1))
    assert span_corrupt(ids, rate=0.5, sentinels=[90, 91], rng=random.Random(1)) == plain
    with pytest.raises(ValueError, match="sentinels that differ"):
        span_corrupt(ids, rate=0.5, sentinels=[7, 91], rng=random.Random(1))
