"""Many-shot targets (ManyICL): all answers, the last one, or whole examples, read off segments and turns."""

import pytest
import torch

from cotkit import lab
from cotkit.losses.sft import nll
from cotkit.tokens import ANSWER, PROMPT, SPECIAL, THOUGHT, encode, labels, mask, model_logps

SHOTS = [("2 * 3 + 1", "7"), ("2 * 5 + 1", "11"), ("2 * 8 + 1", "17")]  # one task: twice x and 1


def conversation(shots, *, system=False, thought="so "):
    said = [
        {"role": role, "content": text if role == "user" else f"<think>\n{thought}{text}\n</think>\n{text}"}
        for x, y in shots
        for role, text in (("user", x), ("assistant", y))
    ]
    head = [{"role": "system", "content": "Find the rule."}] if system else []
    return {"prompt": [*head, said[0]], "completion": said[1:]}


def answers(batch, *parts):
    return mask(batch["segments"], *(parts or (THOUGHT, ANSWER, SPECIAL)))


def last(batch, *parts):
    return answers(batch, *parts) & (batch["turns"] == batch["turns"].amax(1, keepdim=True))


@pytest.fixture(scope="module")
def tiny():
    return lab.load("tiny")


def read(tokenizer, batch, counted, row=0):
    """The counted tokens as runs of neighbours, decoded."""
    runs, open_run = [], False
    for token, here in zip(batch["input_ids"][row].tolist(), counted[row].tolist(), strict=True):
        if here:
            runs = [*runs[:-1], [*runs[-1], token]] if open_run else [*runs, [token]]
        open_run = here
    return [tokenizer.decode(run).strip() for run in runs]


def test_the_three_targets_by_text(tiny):
    _, tokenizer = tiny
    batch = encode([conversation(SHOTS)], tokenizer)
    ids = batch["input_ids"]
    assert read(tokenizer, batch, mask(batch["segments"], ANSWER)) == ["7", "11", "17"]
    assert read(tokenizer, batch, last(batch, ANSWER)) == ["17"]
    texts = read(tokenizer, batch, answers(batch))
    assert [text.partition("</think>")[0] for text in texts] == [
        f"<think>\nso {y}\n" for _, y in SHOTS
    ]  # whole answers, with the end of each turn
    assert texts[-1].endswith("<eos>")
    assert read(tokenizer, batch, last(batch)) == texts[-1:]
    examples = batch["turns"] > 0
    assert read(tokenizer, batch, examples & (batch["segments"] == PROMPT)) == ["2 * 5 + 1", "2 * 8 + 1"]
    assert torch.equal(examples & (batch["segments"] != PROMPT), answers(batch))
    # the labels of encode are those of "answers"; the others are made from the ids
    assert torch.equal(labels(ids, answers(batch)), batch["labels"])
    assert torch.equal(labels(ids, last(batch))[last(batch)], batch["labels"][last(batch)])
    assert bool((labels(ids, examples) != -100).sum() > (batch["labels"] != -100).sum())


def test_no_question_token_counts_and_every_answer_token_does(tiny):
    _, tokenizer = tiny
    batch = encode([conversation(SHOTS), conversation(SHOTS[:2])], tokenizer)
    counted = answers(batch)
    assert not (counted & (batch["segments"] == PROMPT)).any()
    for row, shots in enumerate((SHOTS, SHOTS[:2])):
        alone = [encode([conversation([shot])], tokenizer) for shot in shots]
        # as many targets as the single examples have; the end token stands once, at the end
        sizes = [int(answers(one).sum()) for one in alone]
        ends = [int((one["input_ids"] == tokenizer.eos_token_id).sum()) for one in alone]
        both = int((batch["input_ids"][row][counted[row]] == tokenizer.eos_token_id).sum())
        assert int(counted[row].sum()) == sum(sizes) - sum(ends) + both
        assert int(last(batch)[row].sum()) == sizes[-1]


def test_one_example_is_plain_fine_tuning(tiny):
    _, tokenizer = tiny
    batch = encode([conversation(SHOTS[:1])], tokenizer)
    sft = batch["labels"] != -100
    assert torch.equal(answers(batch), sft)
    assert torch.equal(last(batch), sft)
    assert torch.equal(batch["turns"] > 0, sft)


def test_a_system_text_moves_the_first_question_by_one(tiny):
    _, tokenizer = tiny
    batch = encode([conversation(SHOTS, system=True)], tokenizer)
    plain = encode([conversation(SHOTS)], tokenizer)
    assert read(tokenizer, batch, batch["turns"] > 1) == read(tokenizer, plain, plain["turns"] > 0)
    assert read(tokenizer, batch, last(batch)) == read(tokenizer, plain, last(plain))
    assert "2 * 3 + 1" in read(tokenizer, batch, batch["turns"] > 0)[0]  # turns > 0 would train it too


def test_one_pass_trains_on_every_number_of_shots(tiny):
    """The answer of turn i scores as it does at the end of a conversation of i shots."""
    model, tokenizer = tiny
    batch = encode([conversation(SHOTS)], tokenizer)
    logps = model_logps(model, batch)
    total = logps.new_zeros(())
    for n in (1, 2, 3):
        short = encode([conversation(SHOTS[:n])], tokenizer)
        found = model_logps(model, short)[last(short, THOUGHT, ANSWER)]
        here = mask(batch["segments"], THOUGHT, ANSWER) & (batch["turns"] == 2 * n - 1)
        torch.testing.assert_close(logps[here], found, rtol=1e-4, atol=1e-5)
        total -= found.sum()
    counted = mask(batch["segments"], THOUGHT, ANSWER)
    assert nll(logps, counted).item() == pytest.approx((total / counted.sum()).item(), rel=1e-5)
