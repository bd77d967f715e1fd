"""The embedded model, sampling and the loop: shapes, seeds, batch cuts, groups, how checkpoints are made."""

import json
import random

import pytest
import torch

from cotkit import lab, tokens
from cotkit.lab import _pretrain
from cotkit.lab._model import CHECKPOINTS, build_model, build_tokenizer
from cotkit.lab._train import backward, count
from cotkit.losses.preference import constraint_alignment
from cotkit.losses.sft import nll
from cotkit.rewards.answer import accuracy
from cotkit.tasks.arithmetic import word_problem


def sft(logps, batch, denom):
    return nll(logps, batch["mask"], denom=denom)


def aft(logps, batch, denom):
    scores, valid = tokens.grouped(tokens.seq_logps(logps, batch["mask"], mean=True), batch["group"])
    rank, _ = tokens.grouped(batch["rank"], batch["group"])
    reference = batch["mask"] & (batch["gold"] == 1)[:, None]
    align = constraint_alignment(scores, rank, valid, denom=denom)
    return nll(logps, reference, per="sequence", denom=denom) + align


@pytest.fixture(scope="module")
def tiny():
    return lab.load("tiny")


def group_rows(n=4):
    rows = []
    for g, row in enumerate(lab.rows("word_problem", "train", n=n)):
        rows.append(row | {"group": g, "rank": 0, "gold": 1})
        for k, path in enumerate(row["paths"][:2]):
            text = "<think>\n" + "\n".join(path) + "\n</think>\n" + str(int(row["answer"]) + k)
            rows.append(row | {"completion": text, "group": g, "rank": k, "gold": 0})
    return rows


def test_tokenizer(tiny):
    tokenizer = tiny[1]
    assert len(tokenizer) <= 1024
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("17+25=42 and 103")["input_ids"])
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("172542103")  # digits one by one
    for text in ("naïve café, 数学 \U0001f600\n\ttabs", "<think>\n1+1=2\n</think>\n2"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>2+2?<assistant>4<eos>"


def test_tokenizer_is_what_the_script_makes(tiny):
    assert build_tokenizer().get_vocab() == tiny[1].get_vocab()


def test_checkpoints_are_small_and_of_middling_skill():
    files = sorted(CHECKPOINTS.glob("tiny-*.safetensors"))
    assert [f.name for f in files] == [f"tiny-{seed}.safetensors" for seed in (0, 1, 2)]
    assert all(f.stat().st_size <= 4_000_000 for f in files)
    assert sum(f.stat().st_size for f in CHECKPOINTS.iterdir()) <= 8_000_000
    for seed in (0, 1, 2):
        scores = json.loads((CHECKPOINTS / f"scores-{seed}.json").read_text())
        assert 0.3 <= scores["word_problem, 3 steps"] <= 0.6


def test_recorded_score_is_the_measured_one(tiny):
    recorded = json.loads((CHECKPOINTS / "scores-0.json").read_text())["word_problem, 3 steps"]
    rows = lab.rows(_pretrain.WORDS[3], "test", n=500, seed=0)[:150]
    generate = lab.generator(*tiny, temperature=0, max_new_tokens=64)
    right = lab.evaluate(generate, rows, {"right": accuracy()})["right"].mean()
    assert abs(right - recorded) < 0.13  # three standard errors of 150 questions


def test_seeds_are_different_networks():
    first, second = lab.load("tiny", seed=0)[0], lab.load("tiny", seed=1)[0]
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_pretraining_repeats_itself(tiny, monkeypatch):
    monkeypatch.setattr(_pretrain, "build_tokenizer", lambda: tiny[1])  # the same one, see above
    one, _ = _pretrain.pretrain(3, steps=3, batch=8)
    two, _ = _pretrain.pretrain(3, steps=3, batch=8)
    other, _ = _pretrain.pretrain(4, steps=3, batch=8)
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.slow
def test_checkpoint_is_remade_bit_for_bit(tmp_path):
    from safetensors.torch import load_file

    _pretrain.make(tmp_path, seeds=(0,))
    made, shipped = load_file(tmp_path / "tiny-0.safetensors"), load_file(CHECKPOINTS / "tiny-0.safetensors")
    assert all(torch.equal(made[k], shipped[k]) for k in shipped)


def test_sample_shapes_order_and_seed(tiny):
    rows = lab.rows("word_problem", "test", n=5, seed=3)
    prompts = [r["prompt"] for r in rows]
    out = lab.sample(*tiny, prompts, 3, max_new_tokens=40, seed=1)
    assert [len(t) for t in out["texts"]] == [3] * 5
    assert out["ids"].shape == out["mask"].shape
    assert out["ids"].shape[0] == out["truncated"].shape[0] == 15
    assert lab.sample(*tiny, prompts, 3, max_new_tokens=40, seed=1)["texts"] == out["texts"]
    assert lab.sample(*tiny, prompts, 3, max_new_tokens=40, seed=2)["texts"] != out["texts"]
    greedy = lab.sample(*tiny, prompts, 1, temperature=0, max_new_tokens=40)["texts"]
    small = lab.sample(*tiny, prompts[::-1], 1, temperature=0, max_new_tokens=40, batch=2)["texts"]
    assert small[::-1] == greedy  # the order of prompts and the size of batches change nothing
    short = lab.sample(*tiny, prompts, 1, max_new_tokens=3)
    assert bool(short["truncated"].all())
    assert short["ids"].shape[1] == 3
    ends = out["ids"].gather(1, (out["mask"].sum(1) - 1)[:, None])[:, 0]
    assert torch.equal(ends == tiny[1].eos_token_id, ~out["truncated"])


def test_sample_leaves_the_global_generator_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lab.sample(*tiny, ["Use 2 3 to reach 5.\n"], 2, max_new_tokens=5)
    assert torch.equal(torch.rand(3), expected)


def test_generator_counts_its_calls_and_stops(tiny):
    prompts = [lab.rows("word_problem", "test", n=1, seed=9)[0]["prompt"]]
    generate = lab.generator(*tiny, max_new_tokens=30, seed=4)
    assert generate(prompts, 4) != generate(prompts, 4)
    stopped = lab.generator(*tiny, max_new_tokens=30, stop="\n", temperature=0)(prompts, 1)[0][0]
    assert stopped.count("\n") == 1
    assert stopped.endswith("\n")


def test_chat_prompts_go_through_the_template(tiny):
    chat = [{"role": "user", "content": "Use 2 3 to reach 5."}]
    plain = lab.sample(*tiny, ["<user>Use 2 3 to reach 5.<assistant>"], 1, temperature=0, max_new_tokens=8)
    assert lab.sample(*tiny, [chat], 1, temperature=0, max_new_tokens=8)["texts"] == plain["texts"]


def test_evaluate_hands_columns_over():
    rows = [
        {"prompt": "2+2=", "answer": "4", "meta": {"n": 7}},
        {"prompt": "1+2=", "answer": "3", "meta": {"n": 8}},
    ]

    def reward(prompts, completions, *, answer, meta):
        assert prompts == ["2+2=", "2+2=", "1+2=", "1+2="]
        return [
            None if c == "?" else float(c == a) + m["n"]
            for c, a, m in zip(completions, answer, meta, strict=True)
        ]

    frame = lab.evaluate(lambda prompts, n: [["4", "?"][:n] for _ in prompts], rows, {"r": reward}, n=2)
    assert frame["row"].tolist() == [0, 0, 1, 1]
    assert frame["sample"].tolist() == [0, 1, 0, 1]
    assert frame["r"].tolist()[0] == 8
    assert frame["r"].tolist()[2] == 8
    assert frame["r"].isna().tolist() == [False, True] * 2


def test_fit_repeats_itself_and_learns():
    rows = lab.rows("word_problem", "train", n=16)
    runs = []
    for seed in (0, 0, 1):
        model, tokenizer = lab.load("tiny")
        history = lab.fit(model, tokenizer, rows, sft, steps=6, batch=8, lr=1e-3, seed=seed)
        runs.append((history, model.lm_head.weight.detach().clone()))
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])
    history = runs[0][0]
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert history["lr"].iloc[0] <= 1e-3
    assert history["lr"].iloc[-1] < 2e-4
    assert (history["tokens"] > 0).all()


@pytest.mark.parametrize(("loss", "unit"), [(sft, "token"), (aft, "group")])
def test_two_passes_give_the_gradient_of_one(tiny, loss, unit):
    from cotkit.lab._train import _encode

    model, tokenizer = build_model(tiny[1], seed=3), tiny[1]
    rows = group_rows()
    batch = _encode(rows, tokenizer, "think", ("rank", "gold"), "group", None, "raise")
    grads, values = [], []
    for microbatch in (None, 5, 2, 1):
        model.zero_grad()
        values.append(backward(model, batch, loss, count(batch, unit), microbatch=microbatch))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for value, grad in zip(values[1:], grads[1:], strict=True):
        assert value == pytest.approx(values[0], rel=1e-5)
        torch.testing.assert_close(grad, grads[0], rtol=1e-4, atol=1e-6)


def test_groups_stay_whole_and_are_numbered_anew():
    model, tokenizer = lab.load("tiny")
    seen = []

    def spy(logps, batch, denom):
        seen.append((batch["group"].tolist(), batch["gold"].tolist(), denom))
        return aft(logps, batch, denom)

    lab.fit(model, tokenizer, group_rows(), spy, steps=3, batch=3, unit="group", columns=("rank", "gold"))
    for group, gold, denom in seen:
        assert denom == 3
        assert set(group) == {0, 1, 2}
        for g in (0, 1, 2):
            members = [d for d, h in zip(gold, group, strict=True) if h == g]
            assert members == [1, 0, 0]  # whole, reference first


def test_callable_rows_and_prepare():
    model, tokenizer = lab.load("tiny")
    asked = []

    def fresh(step):
        asked.append(step)
        return [word_problem(random.Random(step)) for _ in range(4)]

    def noise(batch, step):
        assert step == asked[-1]
        ids, _ = tokens.corrupt(batch["input_ids"], batch["mask"], 0.3, mask_id=tokenizer.mask_token_id)
        return batch | {"input_ids": ids}

    history = lab.fit(model, tokenizer, fresh, sft, steps=3, prepare=noise)
    assert asked == [0, 1, 2]
    assert len(history) == 3


def test_forward_takes_the_place_of_the_logps():
    rows = lab.rows("word_problem", "train", n=8)
    how = {"steps": 2, "batch": 4, "lr": 1e-3}
    ends = []
    for forward in (None, lambda m, b: (tokens.model_logps(m, b, grad=True), m.lm_head.weight)):
        model, tokenizer = lab.load("tiny")

        def loss(out, batch, denom, paired=forward is not None):
            logps, extra = out if paired else (out, None)
            penalty = 0.0 if extra is None else 0 * extra.sum()
            return nll(logps, batch["mask"], denom=denom) + penalty

        lab.fit(model, tokenizer, rows, loss, forward=forward, **how)
        ends.append(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_engine_trl_is_the_same_training():
    rows = lab.rows("word_problem", "train", n=8)  # whole batches: the order of rows plays no part
    weights = []
    for engine in ("lab", "trl"):
        model, tokenizer = lab.load("tiny")
        history = lab.fit(model, tokenizer, rows, sft, steps=2, batch=8, lr=1e-4, warmup=0.0, engine=engine)
        assert len(history) == 2
        weights.append(model.lm_head.weight.detach().clone())
    moved = (weights[0] - lab.load("tiny")[0].lm_head.weight).abs().max()
    assert (weights[0] - weights[1]).abs().max() < 0.02 * moved


def test_saved_model_loads_again_and_lora_trains(tmp_path, tiny):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, again_tokenizer = lab.load(str(tmp_path), lora=4)
    rows = lab.rows("word_problem", "train", n=4)
    batch = tokens.encode(rows, again_tokenizer)
    torch.testing.assert_close(tokens.model_logps(again, batch), tokens.model_logps(model, batch))
    lab.fit(again, again_tokenizer, rows, sft, steps=2, batch=4)
    changed = [n for n, p in again.named_parameters() if p.requires_grad]
    assert changed
    assert all("lora" in n for n in changed)


@pytest.mark.errors
def test_forward_is_for_one_pass_of_the_lab(tiny):
    model, tokenizer = tiny
    rows = lab.rows("word_problem", "train", n=2)
    for how in ({"microbatch": 1}, {"engine": "trl"}):
        with pytest.raises(ValueError, match="forward"):
            lab.fit(model, tokenizer, rows, sft, steps=1, forward=tokens.model_logps, **how)


@pytest.mark.errors
def test_refusals(tiny, tmp_path):
    model, tokenizer = tiny
    rows = lab.rows("word_problem", "train", n=2)
    with pytest.raises(ValueError, match="seed to be one of 0, 1, 2, got 7"):
        lab.load("tiny", seed=7)
    with pytest.raises(ValueError, match="a directory with a saved model"):
        lab.load(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="non-empty list of prompts"):
        lab.sample(model, tokenizer, "a prompt")
    with pytest.raises(ValueError, match="temperature >= 0"):
        lab.sample(model, tokenizer, ["x"], temperature=-1)
    with pytest.raises(ValueError, match="expected rows to train on"):
        lab.fit(model, tokenizer, [], sft, steps=1)
    with pytest.raises(ValueError, match="column 'rank' in every row, got none in row 0"):
        lab.fit(model, tokenizer, rows, sft, steps=1, columns=("rank",))
    with pytest.raises(ValueError, match="finite loss"):
        lab.fit(model, tokenizer, rows, lambda logps, *_: logps.sum() * float("nan"), steps=1)
    with pytest.raises(ValueError, match="no prepare and no forward with engine='trl'"):
        lab.fit(model, tokenizer, rows, sft, steps=1, engine="trl", prepare=lambda b, _: b)
    with pytest.raises(ValueError, match="expected 1 completions for each of 1 prompts"):
        lab.evaluate(lambda *_: [[]], rows[:1], {"r": accuracy()})
    with pytest.raises(ValueError, match="rows and rewards"):
        lab.evaluate(lambda *_: [], [], {})
