import pytest
import torch

from cotkit.analysis.faithful import token_dependency

IDS = [5, 6, 7, 8, 9]


def three_back(ids):
    """Token t is the sum of tokens t - 3 and t - 1, modulo 10: it hangs on distances 1 and 3 only."""
    padded = torch.nn.functional.pad(ids, (2, 0))
    return (padded[:, : ids.shape[1]] + ids) % 10


def lines(frame):
    return [
        (int(i), int(d), bool(c))
        for i, d, c in zip(frame["position"], frame["distance"], frame["changed"], strict=True)
    ]


def test_distances_by_hand():
    frame = token_dependency(three_back, IDS, [0, 3], 1)
    assert list(frame.columns) == ["distance", "changed", "position"]
    assert lines(frame) == [
        (0, 1, True),  # token 1 is read behind token 0
        (0, 2, False),
        (0, 3, True),
        (0, 4, False),
        (3, 1, True),
    ]
    rate = token_dependency(three_back, IDS, range(4), 1).groupby("distance")["changed"].mean()
    assert rate.to_dict() == {1: 1.0, 2: 0.0, 3: 1.0, 4: 0.0}


def test_a_change_that_does_not_reach_the_greedy_token_does_not_count():
    parity = lambda ids: ids % 2  # noqa: E731  a new token of the same parity changes nothing
    assert not token_dependency(parity, IDS, [1], 4)["changed"].any()
    assert lines(token_dependency(parity, IDS, [1], 3)) == [(1, 1, True), (1, 2, False), (1, 3, False)]


def test_targets_and_order():
    frame = token_dependency(three_back, torch.tensor(IDS), torch.tensor([3, 0]), 1, targets=[1, 4])
    assert lines(frame) == [(3, 1, True), (0, 1, True), (0, 4, False)]
    assert token_dependency(three_back, IDS, [4], 1).empty
    assert token_dependency(three_back, IDS, [4], 1)["changed"].dtype == bool


def test_one_call_clean_row_first_and_one_change_per_row():
    calls = []

    def spy(ids):
        calls.append(ids)
        return ids

    token_dependency(spy, IDS, [1, 3], [6, 8, 2], generator=torch.Generator().manual_seed(0))
    (rows,) = calls
    assert rows[0].tolist() == IDS
    assert (rows[1:] != rows[0]).tolist() == [
        [False, True, False, False, False],
        [False, False, False, True, False],
    ]
    assert rows[1, 1] in (8, 2)  # never the token itself
    assert rows[2, 3] in (6, 2)


def test_replacements_are_drawn_evenly_and_from_the_generator():
    drawn = []

    def spy(ids):
        drawn.append(int(ids[1, 1]))
        return ids

    g = torch.Generator().manual_seed(0)
    for _ in range(600):
        token_dependency(spy, IDS, [1], [6, 1, 2, 3], generator=g)
    counts = [drawn.count(k) for k in (6, 1, 2, 3)]
    assert counts[0] == 0
    assert all(150 < c < 250 for c in counts[1:])
    again = []
    for _ in range(2):
        drawn.clear()
        g = torch.Generator().manual_seed(7)
        for _ in range(9):
            token_dependency(spy, IDS, [1], range(50), generator=g)
        again.append(list(drawn))
    assert again[0] == again[1]


def test_a_causal_model():
    """On a real decoder: what follows the changed token may change, and the text comes out as it went in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **size)).eval()
    ids = torch.randint(0, 40, (12,), generator=torch.Generator().manual_seed(1))
    before = ids.clone()

    @torch.no_grad()
    def greedy(x):
        return model(input_ids=x).logits.argmax(-1)

    frame = token_dependency(greedy, ids, range(11), range(40), generator=torch.Generator().manual_seed(2))
    assert torch.equal(ids, before)
    assert len(frame) == 11 * 12 // 2
    rate = frame.groupby("distance")["changed"].mean()
    assert rate[1] > rate[5]  # an untrained model mostly repeats what it has just read


@pytest.mark.errors
def test_refusals():
    for positions in ([5], [-1], [0, 7]):
        with pytest.raises(ValueError, match=r"positions in \[0, 5\)"):
            token_dependency(three_back, IDS, positions, 1)
    with pytest.raises(ValueError, match=r"targets in \[0, 5\)"):
        token_dependency(three_back, IDS, [1], 1, targets=[5])
    with pytest.raises(ValueError, match="at least one position"):
        token_dependency(three_back, IDS, [], 1)
    for replacement in (6, [6], [6, 6]):
        with pytest.raises(ValueError, match=r"differs from the token at 1 \(6\)"):
            token_dependency(three_back, IDS, [1], replacement)
    with pytest.raises(ValueError, match=r"ids \[T\]"):
        token_dependency(three_back, torch.tensor([IDS]), [1], 1)
    with pytest.raises(TypeError, match="integer"):
        token_dependency(three_back, torch.tensor([0.5]), [0], 1)
    with pytest.raises(ValueError, match=r"expected next_token to return \[2, 5\], got \[2, 5, 3\]"):
        token_dependency(lambda ids: ids[..., None].expand(-1, -1, 3), IDS, [1], 1)
