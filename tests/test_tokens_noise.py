"""Masked thought (MFT): the authors' numbers, and every line of the paper's table of noises."""

import pytest
import torch
from torch.nn.functional import dropout, pad

from cotkit.losses.sft import nll
from cotkit.tokens import corrupt, labels, model_logps, token_logps

IDS = torch.tensor([[2, 3, 4, 5, 2, 1], [3, 4, 5, 1, 0, 0]])
RESPONSE = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool()
MASK_ID = 6
TABLE = torch.tensor(
    [
        [-0.4, -0.35, -0.2, 0.05, 0.4, 0.85, 0.1],
        [-0.14, -0.31, 0.06, 0.09, 0.66, -0.41, 0.36],
        [0.12, -0.27, 0.32, 0.13, 0.92, -0.37, 0.62],
        [0.38, -0.23, 0.58, 0.17, 1.18, -0.33, 0.88],
        [0.64, -0.19, 0.84, 0.21, 0.14, -0.29, 1.14],
        [0.9, -0.15, 1.1, 0.25, 0.4, -0.25, 1.4],
        [1.16, -0.11, 1.36, -1.01, 0.66, -0.21, 0.36],
    ],
    dtype=torch.float64,
)
# From ChangyuChen347/MaskedThought: ids as MaskPolicy.get_gpt_masked_input (models/mask_policy_utils.py) left
# them, and the loss lines of models/modeling_llama.py, run on logits[b, t] = TABLE[ids[b, t]].
AUTHORS = [
    ([[2, 3, 4, 5, 2, 1], [3, 4, 5, 1, 0, 0]], 2.1157037109669403),  # rate 0
    ([[2, 3, 6, 6, 6, 6], [3, 6, 6, 6, 0, 0]], 2.066103935008826),  # rate 1
    ([[2, 3, 4, 6, 2, 6], [3, 4, 6, 6, 0, 0]], 2.0423785926994773),  # rate .5
    ([[2, 3, 2, 4, 0, 1], [3, 6, 1, 1, 0, 0]], 2.0427210574083055),  # rate .4, random and mask tokens
    ([[2, 3, 4, 5, 6, 5], [3, 4, 5, 5, 0, 0]], 2.132851393080691),  # rate .6, random tokens
]


def loss(ids, counted=RESPONSE):
    return nll(token_logps(TABLE[ids], labels(IDS, RESPONSE)), counted)


@pytest.mark.parametrize(("ids", "want"), AUTHORS)
def test_loss_of_the_authors(ids, want):
    ids = torch.tensor(ids)
    assert loss(ids).item() == pytest.approx(want, rel=1e-9)
    drawn = (ids != IDS).double()  # the same through corrupt, each row at the rate that gives these ids
    for row in range(2):
        at = torch.zeros_like(RESPONSE)
        at[row] = drawn[row].bool()
        again, noised = corrupt(IDS, at, 1.0, replacement=ids)
        assert torch.equal(again[row], ids[row])
        assert torch.equal(noised, at)


def test_both_ends_are_those_of_the_authors():
    for rate, (ids, want) in zip((0.0, 1.0), AUTHORS[:2], strict=True):
        found, noised = corrupt(IDS, RESPONSE, rate, mask_id=MASK_ID)
        assert found.tolist() == ids
        assert loss(found).item() == pytest.approx(want, rel=1e-9)
        assert torch.equal(noised, RESPONSE & bool(rate))
        assert int((labels(IDS, RESPONSE) != -100).sum()) == 7  # as many labels as before
    clean = corrupt(IDS, RESPONSE, 0.0, mask_id=MASK_ID)[0]
    assert torch.equal(loss(clean), loss(IDS))  # rate 0 is plain fine-tuning, bit for bit


def test_the_end_token_may_be_lost_without_effect():
    last = torch.zeros_like(RESPONSE)
    last[0, 5] = last[1, 3] = True
    noisy, noised = corrupt(IDS, last, 1.0, mask_id=MASK_ID)
    assert noised.sum() == 2
    assert torch.equal(loss(noisy), loss(IDS))


def test_warm_up_of_the_authors():
    """trainer/Trainer/trainer_436.py: linear from 0 over two thirds of 300 steps, to .4."""

    def rate(step):
        return min(0.4, 0.4 * step / (2 / 3 * 300 + 1))

    assert [rate(step) for step in (0, 100, 200, 201, 300)] == pytest.approx(
        [0.0, 0.19900497512437812, 0.39800995024875624, 0.4, 0.4], abs=1e-15
    )


def test_clean_only_drops_the_label_behind_a_noised_token():
    noised = torch.zeros_like(RESPONSE)
    noised[0, 3] = noised[1, 3] = True  # the second is its row's last: nothing follows
    ids = torch.where(noised, MASK_ID, IDS)
    kept = RESPONSE & ~pad(noised, (1, -1))
    assert (RESPONSE & ~kept).nonzero().tolist() == [[0, 4]]
    logps = token_logps(TABLE[ids], labels(IDS, RESPONSE))
    by_hand = [logps[0, t] for t in (2, 3, 5)] + [logps[1, t] for t in (1, 2, 3)]
    assert loss(ids, kept).item() == pytest.approx(-sum(by_hand).item() / 6, abs=1e-12)
    assert torch.equal(
        token_logps(TABLE[IDS], labels(IDS, RESPONSE))[kept], logps[kept]
    )  # a bigram sees no more
    assert not pad(noised, (1, -1))[:, 0].any()


def test_random_tokens_and_mix():
    g = torch.Generator().manual_seed(0)
    ids, response = torch.full((50, 400), 9), torch.ones(50, 400, dtype=torch.bool)
    response[:, :100] = False
    random_ids = torch.randint(0, 8, ids.shape, generator=g)  # all ids of the base vocabulary
    found, noised = corrupt(ids, response, 0.4, replacement=random_ids, generator=g)
    assert torch.equal(found[noised], random_ids[noised])
    assert (found[~noised] == 9).all()
    share = torch.bincount(found[noised], minlength=8) / noised.sum()
    assert share.tolist() == pytest.approx([1 / 8] * 8, abs=0.02)
    mixed = torch.where(torch.rand(ids.shape, generator=g) < 0.25, MASK_ID + 100, random_ids)
    found, noised = corrupt(ids, response, 1.0, replacement=mixed)
    assert (found[noised] == MASK_ID + 100).double().mean().item() == pytest.approx(0.25, abs=0.02)


def test_scheduled_sampling_puts_the_models_own_token_in():
    g = torch.Generator().manual_seed(0)
    cold = (TABLE[IDS] / 1e-4).softmax(-1)
    samples = torch.multinomial(cold.flatten(0, 1), 1, generator=g).view_as(IDS)
    replacement = pad(samples, (1, -1))  # at t what the model wrote behind t - 1
    found, noised = corrupt(IDS, RESPONSE, 1.0, replacement=replacement)
    assert torch.equal(noised, RESPONSE)
    greedy = TABLE.argmax(-1)
    assert found[0].tolist() == [2, 3, *greedy[[3, 4, 5, 2]].tolist()]
    assert found[1].tolist() == [3, *greedy[[3, 4, 5]].tolist(), 0, 0]
    hot = (TABLE[IDS] / 2.0).softmax(-1)  # tau = 2: odds are their square roots
    assert hot[0, 0, 4] / hot[0, 0, 6] == pytest.approx(
        torch.tensor((0.92 - 0.62) / 2).exp().item(), rel=1e-6
    )


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=7, **size)).eval()


BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long(), "labels": labels(IDS, RESPONSE)}


def neftune(embeds, attention, noised, alpha, generator):
    """Uniform noise of the size alpha / sqrt(tokens * D), only where ``noised``."""
    size = alpha / (attention.sum(1) * embeds.shape[-1]).sqrt()
    noise = torch.rand(embeds.shape, generator=generator) * 2 - 1
    return embeds + noise * size[:, None, None] * noised[..., None]


def test_uniform_noise_on_the_embeddings_inside_a_mask(model):
    embeds, attention = model.get_input_embeddings()(IDS), BATCH["attention_mask"]
    _, noised = corrupt(IDS, RESPONSE, 0.6, mask_id=MASK_ID, generator=torch.Generator().manual_seed(3))
    assert 0 < noised.sum() < RESPONSE.sum()
    g = torch.Generator().manual_seed(0)
    noisy = neftune(embeds, attention, noised, 5.0, g)
    moved = noisy - embeds
    assert torch.equal((moved != 0).any(-1), noised)
    for row, tokens in enumerate((6, 4)):  # 6 and 4 tokens, 12 dimensions
        reach = moved[row].abs().max().item()
        assert 0.8 * 5 / (tokens * 12) ** 0.5 < reach <= 5 / (tokens * 12) ** 0.5
    clean = model_logps(model, BATCH)
    none = neftune(embeds, attention, noised, 0.0, g)
    assert torch.equal(model_logps(model, BATCH | {"inputs_embeds": none}), clean)
    found = model_logps(model, BATCH | {"inputs_embeds": noisy})
    after = pad(noised.cumsum(1) > 0, (1, -1)) & RESPONSE  # every scored token behind a noised one
    assert torch.equal(found != clean, after)


def test_uniform_noise_on_every_token_is_that_of_transformers(model):
    from transformers.integrations.neftune import neftune_post_forward_hook

    layer = model.get_input_embeddings()
    ids, every = IDS[:1], torch.ones(1, 6, dtype=torch.bool)
    embeds = layer(ids)
    torch.manual_seed(4)
    layer.train()
    layer.neftune_noise_alpha = 5.0
    want = neftune_post_forward_hook(layer, None, embeds.clone())
    del layer.neftune_noise_alpha
    layer.eval()
    torch.manual_seed(4)
    found = neftune(embeds, every.long(), every, 5.0, torch.default_generator)
    torch.testing.assert_close(found, want)


def test_dropout_of_embeddings_inside_a_mask(model):
    embeds = model.get_input_embeddings()(IDS)
    noised = corrupt(IDS, RESPONSE, 1.0, mask_id=MASK_ID)[1]
    torch.manual_seed(0)

    def dropped(q):
        return torch.where(noised[..., None], dropout(embeds, q), embeds)

    assert torch.equal(dropped(0.0), embeds)
    wiped = dropped(1.0)
    assert not wiped[noised].any()  # q = 1 wipes the token, and gives no NaN
    assert torch.equal(wiped[~noised], embeds[~noised])
    half = dropped(0.5)
    assert torch.equal(half[~noised], embeds[~noised])
    kept = half[noised] != 0
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(half[noised][kept], 2 * embeds[noised][kept])  # nn.Dropout's 1 / (1 - q)
    assert model_logps(model, BATCH | {"inputs_embeds": wiped}).isfinite().all()


def test_noise_on_the_question_is_a_mask_of_its_own():
    question = BATCH["attention_mask"].bool() & ~RESPONSE  # the paper's harmful control
    found, noised = corrupt(IDS, question, 1.0, mask_id=MASK_ID)
    assert found.tolist() == [[6, 6, 4, 5, 2, 1], [6, 4, 5, 1, 0, 0]]
    assert not (noised & RESPONSE).any()
