"""A policy-gradient batch: the sampled ids themselves, their scores, and a loop that fits on one screen."""

import pytest
import torch
import trl_worker as worker

from cotkit import lab, tokens
from cotkit.lab import _rollout
from cotkit.losses import advantage, policy
from cotkit.losses.sft import nll
from cotkit.rewards.answer import accuracy
from cotkit.tokens import ANSWER, PAD, PROMPT, SPECIAL, THOUGHT


@pytest.fixture(scope="module")
def tiny():
    return lab.load("tiny")


@pytest.fixture(scope="module")
def drawn(tiny):
    rows = lab.rows("word_problem", "train", n=4, seed=1)
    return rows, lab.rollout(*tiny, rows, accuracy(), n=3, max_new_tokens=36, seed=5)


def test_ids_are_the_sampled_ones(tiny, drawn):
    model, tokenizer = tiny
    rows, batch = drawn
    out = lab.sample(model, tokenizer, [r["prompt"] for r in rows], 3, max_new_tokens=36, seed=5)
    assert batch["texts"] == out["texts"]
    assert torch.equal(batch["truncated"], out["truncated"])
    assert 0 < int(batch["truncated"].sum()) < 12  # both kinds are there
    assert batch["group"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for i in range(12):
        front = tokenizer(rows[i // 3]["prompt"])["input_ids"]
        ids = out["ids"][i][out["mask"][i]].tolist()
        size = len(front) + len(ids)
        assert batch["input_ids"][i, :size].tolist() == front + ids
        assert batch["labels"][i, : len(front)].tolist() == [-100] * len(front)
        assert batch["labels"][i, len(front) : size].tolist() == ids
        assert batch["attention_mask"][i].tolist() == [1] * size + [0] * (batch["mask"].shape[1] - size)
        assert batch["labels"][i, size:].tolist() == [-100] * (batch["mask"].shape[1] - size)
        assert (ids[-1] == tokenizer.eos_token_id) == (not out["truncated"][i])
    assert torch.equal(batch["mask"], batch["labels"] != -100)


def test_rewards_are_those_of_the_texts(tiny):
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [None if i == 2 else i / 10 for i in range(len(prompts))]

    rows = [{"prompt": "1+1=", "answer": "2", "completion": "x"}, {"prompt": "1+2=", "level": 7}]
    batch = lab.rollout(*tiny, rows, reward, n=2, max_new_tokens=5, old_logps=False)
    assert seen["prompts"] == ["1+1=", "1+1=", "1+2=", "1+2="]
    assert seen["completions"] == [text for texts in batch["texts"] for text in texts]
    assert seen["answer"] == ["2", "2", None, None]  # a column that a row lacks
    assert seen["level"] == [None, None, 7, 7]
    assert "completion" not in seen
    kept = batch["input_ids"][batch["mask"]].tolist()
    assert [i for ids in seen["completion_ids"] for i in ids] == kept
    assert batch["rewards"].isnan().tolist() == [[False, False], [True, False]]
    torch.testing.assert_close(batch["rewards"][0], torch.tensor([0.0, 0.1]))
    assert "old_logps" not in batch


def test_old_logps_are_those_of_the_policy_that_sampled(tiny, drawn):
    model, _ = tiny
    _, batch = drawn
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    want = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    want = torch.nn.functional.pad(want, (1, 0)).masked_fill(~batch["mask"], 0)
    torch.testing.assert_close(batch["old_logps"], want.detach(), rtol=1e-5, atol=1e-5)
    assert not batch["old_logps"].requires_grad
    rows = lab.rows("word_problem", "train", n=4, seed=1)
    parts = lab.rollout(*tiny, rows, accuracy(), n=3, max_new_tokens=36, seed=5, batch=5)
    assert parts["old_logps"].shape == parts["mask"].shape


def test_segments_and_steps_are_those_of_encode(tiny, drawn):
    """Where a sample is written in the tokenizer's own tokens, ``tokens.encode`` says the same of it."""
    _, tokenizer = tiny
    rows, batch = drawn
    same = 0
    for i, text in enumerate(t for texts in batch["texts"] for t in texts):
        row = {"prompt": rows[i // 3]["prompt"], "completion": text}
        want = tokens.encode([row], tokenizer, malformed="keep")
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        if want["input_ids"][0, : len(ids)].tolist() == ids.tolist():
            same += 1
            assert batch["segments"][i, : len(ids)].tolist() == want["segments"][0, : len(ids)].tolist()
            assert batch["steps"][i, : len(ids)].tolist() == want["steps"][0, : len(ids)].tolist()
    assert same >= 6
    assert set(batch["segments"].unique().tolist()) == {PAD, PROMPT, THOUGHT, ANSWER, SPECIAL}


def codes(tokenizer, text, ids, front="2+2?"):
    front = tokenizer(front)["input_ids"]
    return _rollout.codes(tokenizer, [front], [text], [ids], tokens.FORMATS["think"])[0]


def test_an_unusual_spelling_keeps_its_tokens(tiny):
    tokenizer = tiny[1]
    text = "<think>\ntotal 12\n</think>\n12"
    usual = tokenizer(text)["input_ids"]
    letters = [
        i
        for token in usual
        for i in (
            [token]
            if token in tokenizer.all_special_ids
            else tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(token)))
        )
    ]
    assert len(letters) > len(usual)  # one token per character: the model may write so, encode never does
    assert tokenizer.decode(letters) == text
    got = codes(tokenizer, text, letters)
    per_char = [code for a, b, *code in tokens.FORMATS["think"].spans(text) for _ in range(b - a)]
    place = 0
    for token, code in zip(letters, got, strict=True):
        piece = tokenizer.decode([token])
        if not piece.isspace():
            assert list(code) == per_char[place], piece
        place += len(piece)
    assert codes(tokenizer, text, [*letters, tokenizer.eos_token_id])[-1] == (SPECIAL, -1)
    split = tokenizer.convert_tokens_to_ids(
        list(tokenizer.convert_ids_to_tokens(tokenizer("é")["input_ids"]))
    )
    assert len(codes(tokenizer, tokenizer.decode(split), split)) == len(split)  # half a character each
    assert codes(tokenizer, tokenizer.decode(split[:1]), split[:1]) == [(THOUGHT, 0)]


def test_a_thought_that_the_prompt_closed(tiny):
    tokenizer = tiny[1]
    ids = tokenizer("12")["input_ids"]
    front = "<user>2+2?<assistant><think>\n\n</think>\n"
    assert codes(tokenizer, "12", ids, front) == [(ANSWER, -1)] * 2
    assert codes(tokenizer, "12", ids) == [(THOUGHT, 0)] * 2  # no thought, no answer: malformed
    assert codes(tokenizer, "", [tokenizer.eos_token_id]) == [(SPECIAL, -1)]
    ended = [*ids, tokenizer.eos_token_id]
    assert codes(tokenizer, "12", ended, front) == [(ANSWER, -1), (ANSWER, -1), (SPECIAL, -1)]


def test_chat_prompts_reach_the_reward_as_messages(tiny):
    chat = [{"role": "user", "content": "Use 2 3 to reach 5."}]
    seen = []

    def reward(prompts, completions, **columns):  # noqa: ARG001
        seen.extend([prompts, completions])
        return [0.5] * len(prompts)

    batch = lab.rollout(*tiny, [{"prompt": chat}], reward, n=2, max_new_tokens=6)
    assert seen[0] == [chat] * 2
    assert seen[1] == [[{"role": "assistant", "content": text}] for text in batch["texts"][0]]


def test_seed_mode_and_generator_are_left_alone(tiny):
    model, tokenizer = tiny
    rows = [{"prompt": "Use 2 3 to reach 5.\n"}]
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one = lab.rollout(model, tokenizer, rows, zero, n=2, max_new_tokens=6, seed=1)
    assert torch.equal(torch.rand(2), expected)
    assert model.training
    model.eval()
    two = lab.rollout(model, tokenizer, rows, zero, n=2, max_new_tokens=6, seed=1)
    assert one["texts"] == two["texts"]
    assert torch.equal(one["old_logps"], two["old_logps"])
    assert not model.training


def zero(prompts, completions, **columns):  # noqa: ARG001
    return [0.0] * len(prompts)


def test_dropout_plays_no_part_in_the_old_logps():
    network, tokenizer = worker.letter_model(), worker.letters()
    network.config.attention_dropout = 0.5
    for module in network.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    network.train()
    batch = lab.rollout(network, tokenizer, [{"prompt": "1+1?"}], zero, n=3, max_new_tokens=6)
    assert network.training
    network.eval()
    torch.testing.assert_close(batch["old_logps"], tokens.model_logps(network, batch))


# In lab.fit


def surrogate(logps, batch, denom):
    """The clipped surrogate, advantages centred by hand: the loop is tested without the losses."""
    rewards = batch["rewards"]
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()[:, None]
    ratio = (logps - batch["old_logps"]).exp()
    worse = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -torch.where(batch["mask"], worse, 0.0).sum() / denom


def test_fit_takes_the_batch_as_it_is_and_again():
    model, tokenizer = lab.load("tiny")
    rows = lab.rows("word_problem", "train", n=3)
    held, seen, asked = {}, [], []

    def batches(step):
        asked.append(step)
        if step % 2 == 0:
            held.update(lab.rollout(model, tokenizer, rows, accuracy(), n=4, max_new_tokens=40, seed=step))
        return held

    def loss(logps, batch, denom):
        gap = (logps - batch["old_logps"]).detach()[batch["mask"]].abs().max()
        seen.append((batch["input_ids"].clone(), float(gap), denom, batch["rewards"].shape))
        assert "texts" not in batch
        return surrogate(logps, batch, denom)

    history = lab.fit(model, tokenizer, batches, loss, steps=4, lr=1e-3, warmup=0.0)
    assert asked == [0, 1, 2, 3]
    assert torch.equal(seen[0][0], seen[1][0])  # an inner epoch reads the same batch ...
    assert not torch.equal(seen[1][0], seen[2][0])
    for first in (0, 2):
        assert seen[first][1] < 1e-4  # on policy: every ratio is 1 ...
        assert seen[first + 1][1] > 1e-3  # ... and no longer after a step
    assert seen[2][2] == int(held["mask"].sum())  # denom counts its tokens
    assert seen[0][3] == (3, 4)
    assert len(history) == 4
    assert "group" in held  # the user's batch is left alone
    assert held["group"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_microbatch_and_units_hold_for_a_batch():
    rows = lab.rows("word_problem", "train", n=3)
    ends = []
    for microbatch in (None, 5):
        model, tokenizer = lab.load("tiny")

        def batches(step, model=model, tokenizer=tokenizer):
            return lab.rollout(model, tokenizer, rows, accuracy(), n=4, max_new_tokens=40, seed=step)

        denoms = []

        def loss(logps, batch, denom, denoms=denoms):
            denoms.append(denom)
            return surrogate(logps, batch, denom)

        how = {"steps": 1, "lr": 1e-3, "warmup": 0.0, "microbatch": microbatch}
        lab.fit(model, tokenizer, batches, loss, unit="sequence", **how)
        assert denoms == [12]
        ends.append(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-6)


def test_a_plain_encoded_batch_will_do():
    """What ``encode`` gives is trained on as it is: the same step as from its rows."""
    rows = lab.rows("word_problem", "train", n=4)
    ends = []
    for encoded in (False, True):
        model, tokenizer = lab.load("tiny")

        def given(_, encoded=encoded, tokenizer=tokenizer):
            return tokens.encode(rows, tokenizer) if encoded else rows

        def sft(logps, batch, denom):
            return nll(logps, batch["mask"], denom=denom)

        lab.fit(model, tokenizer, given, sft, steps=1, lr=1e-3, warmup=0.0)
        ends.append(model.lm_head.weight.detach().clone())
    assert torch.equal(*ends)


def test_grpo_on_one_screen():
    """The notebook's loop on a network that begins at random: two epochs a batch, small letters are paid."""

    def letters(prompts, completions, **columns):  # noqa: ARG001
        return [sum(c.islower() for c in text) / 4 for text in completions]

    model, tokenizer = worker.letter_model(), worker.letters()
    rows, means, held = [{"prompt": f"{k}?"} for k in range(4)], [], {}

    def batches(step):
        if step % 2 == 0:
            held.update(lab.rollout(model, tokenizer, rows, letters, n=16, max_new_tokens=4, seed=step))
            held["advantages"] = advantage.group(held["rewards"]).flatten()
            means.append(float(held["rewards"].mean()))
        return held

    def loss(logps, batch, denom):
        return policy.grpo(logps, batch["old_logps"], batch["advantages"], batch["mask"], denom=denom)

    lab.fit(model, tokenizer, batches, loss, steps=40, lr=1e-2, warmup=0.0, unit="sequence")
    assert means[0] < 0.3
    assert means[-1] > 0.6


@pytest.mark.errors
def test_refusals(tiny):
    model, tokenizer = tiny
    row = [{"prompt": "1+1="}]
    with pytest.raises(ValueError, match="rows with a prompt, got none"):
        lab.rollout(model, tokenizer, [], zero)
    with pytest.raises(ValueError, match="in row 1"):
        lab.rollout(model, tokenizer, [*row, {"question": "?"}], zero)
    with pytest.raises(TypeError, match="reward as a function, got str"):
        lab.rollout(model, tokenizer, row, "accuracy")
    with pytest.raises(ValueError, match="fmt to be one of"):
        lab.rollout(model, tokenizer, row, zero, fmt="thinking")
    with pytest.raises(ValueError, match="n > 0"):
        lab.rollout(model, tokenizer, row, zero, n=0)
    with pytest.raises(ValueError, match="at least one token"):
        lab.rollout(model, tokenizer, [{"prompt": ""}], zero)
    with pytest.raises(ValueError, match="expected 2 rewards, got 1"):
        lab.rollout(model, tokenizer, row, lambda **_: [1.0], n=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="finite rewards"):
        lab.rollout(model, tokenizer, row, lambda **_: [float("inf")], n=1, max_new_tokens=2)
    with pytest.raises(ValueError, match="one without attention_mask, labels"):
        lab.fit(model, tokenizer, lambda _: {"input_ids": torch.ones(1, 2)}, surrogate, steps=1)
