"""GRPOTrainer with an advantage function: TRL's own gives TRL's steps, one per token reaches the loss."""

import inspect
import math
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl_worker as worker  # first: it keeps the hub's client off the network

from cotkit import lab, tokens
from cotkit.interop.trl_grpo import _advantages, _segments, grpo_trainer
from cotkit.losses import advantage
from cotkit.rewards import answer, combine, format, length
from cotkit.rewards.answer import accuracy

ANSWERS = [f"\\boxed{{{n}}}" for n in range(9)]  # a token is a whole answer: a random model is right at times


def config(folder, **changes):
    from trl import GRPOConfig

    quiet = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    cpu = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "seed": 1}
    size = {
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 3,
        "max_steps": 2,
    }
    return GRPOConfig(str(folder), **{**quiet, **settings, **cpu, **size, **changes})


def data():
    from datasets import Dataset

    gold = ["3", "5", None, "7"]  # the third has no right answer: its completions cannot be scored
    return Dataset.from_list([{"prompt": " ".join(ANSWERS[i : i + 3]), "answer": gold[i]} for i in range(4)])


def short(prompts, completions, **columns):  # noqa: ARG001
    return [float(len(c) % 7) for c in completions]


def only_scorable(prompts, completions, answer, **columns):  # noqa: ARG001
    """Several values, and None for the prompt without gold: a whole group that nothing can score."""
    digits = [sum(int(x) for x in c if x.isdigit()) for c in completions]
    return [None if a is None else float(d % 5) for d, a in zip(digits, answer, strict=True)]


def train(trainer_class, folder, rewards, **changes):
    tokenizer = worker.tokenizer(ANSWERS)
    network = worker.model(vocab_size=len(tokenizer))
    trainer = trainer_class(
        model=network,
        reward_funcs=list(rewards),
        args=config(folder, **changes),
        train_dataset=data(),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer, {name: value.detach().clone() for name, value in network.named_parameters()}


def close(got, want):
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def group(rewards, batch):  # noqa: ARG001
    return advantage.group(rewards)


def spread(rewards, batch):
    """The same number for every token of a sample."""
    return advantage.group(rewards).flatten()[:, None].expand(batch["mask"].shape)


@pytest.mark.parametrize(
    ("rewards", "function"), [((accuracy(), short), group), ((only_scorable,), spread)], ids=["two", "None"]
)
def test_the_group_advantage_is_trls_own(rewards, function, tmp_path):
    from trl import GRPOTrainer

    how = {"reward_weights": [1.0, 0.25]} if len(rewards) == 2 else {"num_iterations": 2}
    theirs, want = train(GRPOTrainer, tmp_path / "theirs", rewards, **how)
    ours, got = train(grpo_trainer(function), tmp_path / "ours", rewards, **how)
    assert ours.state.global_step == theirs.state.global_step == 2
    start = dict(worker.model(vocab_size=len(worker.tokenizer(ANSWERS))).named_parameters())
    assert max((want[name] - start[name]).abs().max() for name in want) > 1e-4
    close(got, want)
    assert list(ours._logs["advantages"]) == pytest.approx(list(theirs._logs["advantages"]), abs=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_advantages_of_tokens_reach_the_loss(loss_type, tmp_path):
    """A step of plain SGD by hand on TRL's own samples: theta + 0.1 * gradient of the mean of A_t log p_t."""
    seen = []

    def credit(rewards, batch):
        place = torch.arange(batch["mask"].shape[1])
        value = (place - 0.5) * rewards.flatten()[:, None] + 0.25  # every token of a row another one
        seen.append((batch, value))
        return value

    class Spy(grpo_trainer(credit)):
        def _compute_loss(self, model, inputs):
            seen.append(inputs)
            return super()._compute_loss(model, inputs)

    _, got = train(Spy, tmp_path, rewards=(short,), max_steps=1, loss_type=loss_type)
    (batch, value), inputs = seen
    assert inputs["advantages"].shape == value.shape
    given = torch.where(batch["mask"], value, 0.0)
    pairs = [(ids.tolist(), a.tolist()) for ids, a in zip(batch["completion_ids"], given, strict=True)]
    for ids, a in zip(inputs["completion_ids"], inputs["advantages"], strict=True):
        pairs.remove((ids.tolist(), a.tolist()))  # TRL shuffles the rows, each with its advantages
    assert not pairs
    network = worker.model(vocab_size=len(worker.tokenizer(ANSWERS)))
    mask = inputs["completion_mask"].bool()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = network(input_ids=ids, attention_mask=seen_mask).logits[:, -mask.shape[1] - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    terms = torch.where(mask, inputs["advantages"] * logps, 0.0)
    total = terms.sum() / mask.sum() if loss_type == "dapo" else (terms.sum(1) / mask.sum(1)).mean()
    total.backward()
    want = {n: (p + 0.1 * p.grad).detach() for n, p in network.named_parameters()}
    close(got, want)


def test_what_the_function_sees(tmp_path):
    seen = []

    def look(rewards, batch):
        seen.append((rewards, batch))
        return advantage.group(rewards)

    how = {"num_iterations": 2, "max_steps": 1, "beta": 0.0, "reward_weights": [2.0, 0.5]}
    trainer, _ = train(grpo_trainer(look), tmp_path, (accuracy(), short), **how)
    ((rewards, batch),) = seen
    assert rewards.shape == (4, 4)
    assert batch["scores"].shape == (4, 4, 2)
    assert len(batch["rows"]) == len(batch["completions"]) == 16
    for i, (row, text, ids, kept) in enumerate(
        zip(batch["rows"], batch["completions"], batch["completion_ids"], batch["mask"], strict=True)
    ):
        own = batch["scores"][i // 4, i % 4]
        right = accuracy()([row["prompt"]], [text], answer=[row["answer"]])[0]
        assert (math.isnan(own[0]) and right is None) or float(own[0]) == right
        assert float(own[1]) == len(text) % 7
        assert float(rewards[i // 4, i % 4]) == 2 * (right or 0) + 0.5 * (len(text) % 7)
        assert row == batch["rows"][i // 4 * 4]  # samples of one prompt stand next to each other
        decoded = trainer.processing_class.decode(ids[kept], skip_special_tokens=True)
        assert decoded == text
    assert "segments" not in batch
    assert "ref_logps" not in batch
    assert batch["old_logps"].shape == batch["mask"].shape  # two iterations on a batch: TRL keeps them


def test_segments_and_steps_are_those_of_rollout():
    """The codes of TRL's padded output are those of ``lab.rollout`` for the same samples."""
    model, tokenizer = lab.load("tiny")
    rows = lab.rows("word_problem", "train", n=3, seed=1)
    drawn = lab.rollout(model, tokenizer, rows, short, n=2, max_new_tokens=36, old_logps=False)
    longest = int(drawn["mask"].sum(1).max())
    fronts = [tokenizer(r["prompt"])["input_ids"] for r in rows for _ in range(2)]
    written = [row[kept].tolist() for row, kept in zip(drawn["input_ids"], drawn["mask"], strict=True)]
    widest = max(map(len, fronts))
    output = {
        "prompt_ids": torch.tensor([[0] * (widest - len(f)) + f for f in fronts]),
        "prompt_mask": torch.tensor([[0] * (widest - len(f)) + [1] * len(f) for f in fronts]),
        "completion_ids": torch.tensor([w + [0] * (longest - len(w)) for w in written]),
    }
    got = _segments(tokenizer, output, written, tokens.FORMATS["think"])
    for i, ids in enumerate(written):
        begin = len(fronts[i])
        for name in ("segments", "steps"):
            want = drawn[name][i, begin : begin + len(ids)]
            assert torch.equal(got[name][i, : len(ids)], want)
        assert (got["segments"][i, len(ids) :] == tokens.PAD).all()
        assert (got["steps"][i, len(ids) :] == -1).all()
    assert int(got["steps"].max()) >= 1


def test_steps_reach_the_function(tmp_path):
    seen = []

    def credit(rewards, batch):
        seen.append(batch)
        return advantage.spread(rewards.flatten()[:, None], batch["steps"])

    train(grpo_trainer(credit, fmt="boxed"), tmp_path, (short,), max_steps=1)
    (batch,) = seen
    assert batch["segments"].shape == batch["steps"].shape == batch["mask"].shape
    assert {tokens.THOUGHT, tokens.SPECIAL} <= set(batch["segments"].unique().tolist())
    assert (batch["segments"][~batch["mask"]] == tokens.PAD).all()
    assert torch.equal(batch["steps"] >= 0, batch["segments"] == tokens.THOUGHT)


REWARDS = {
    "accuracy": accuracy(),
    "closeness": answer.closeness(),
    "tags": format.tags(),
    "scripts": format.scripts(),
    "cosine": length.cosine(accuracy(), 8),
    "relative": length.relative(accuracy(), group_size=4),
    "weighted": combine.weighted([accuracy(), format.tags()], [0.9, 0.1]),
    "gated": combine.gated(length.cosine(accuracy(), 8), accuracy()),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_pickled_reward_is_the_reward(name):
    """AsyncGRPO sends rewards to another process; what arrives scores the same and has the same name."""
    from trl.trainer.utils import get_callable_name

    reward = REWARDS[name]
    there = pickle.loads(pickle.dumps(reward))
    columns = {"answer": ["3"] * 4, "completion_ids": [[5, 6, 7], [5], [5, 5, 5, 5], [6, 5, 6, 5, 6]]}
    given = {"prompts": ["?"] * 4, "completions": ["\\boxed{3}", "a 3", "3 3 3 3", "<think>\n</think>\n4"]}
    assert there(**given, **columns) == reward(**given, **columns)
    assert get_callable_name(there) == get_callable_name(reward) == name
    assert getattr(there, "grouped", False) == getattr(reward, "grouped", False)


def test_pickled_rewards_train(tmp_path):
    rewards = [pickle.loads(pickle.dumps(REWARDS[name])) for name in ("accuracy", "relative", "cosine")]
    trainer, parameters = train(grpo_trainer(group), tmp_path, rewards)
    logged = set().union(*trainer.state.log_history)
    assert {"rewards/accuracy/mean", "rewards/relative/mean", "rewards/cosine/mean"} <= logged
    assert all(value.isfinite().all() for value in parameters.values())


def test_the_hooks_of_trl_are_still_there():
    from trl import GRPOTrainer

    assert list(inspect.signature(GRPOTrainer._calculate_rewards).parameters) == [
        "self",
        "inputs",
        "prompts",
        "completions",
        "completion_ids_list",
    ]
    assert list(inspect.signature(GRPOTrainer._generate_and_score_completions).parameters) == [
        "self",
        "inputs",
    ]
    assert callable(GRPOTrainer._send_telemetry)
    assert "advantages.dim() == 1" in inspect.getsource(GRPOTrainer._compute_loss)  # [N, T] goes through
    written = inspect.getsource(GRPOTrainer.__init__) + inspect.getsource(
        GRPOTrainer._generate_and_score_completions
    )
    for name in (
        "self.reward_weights",
        "self.num_generations_eval",
        '"completion_mask"',
        '"tool_mask"',
        '"old_per_token_logps"',
        '"ref_per_token_logps"',
        'self._logs["advantages"]',
    ):
        assert name in written, name


TWO_PROCESSES = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_interop_grpo as here
from cotkit.interop.trl_grpo import grpo_trainer
from trl import GRPOTrainer

theirs, ours = [], []
Ours = grpo_trainer(here.group)
original = GRPOTrainer._generate_and_score_completions

def spy(self, inputs):
    output = original(self, inputs)
    theirs.append(output["advantages"].clone())
    return output

GRPOTrainer._generate_and_score_completions = spy

class Spy(Ours):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        ours.append(output["advantages"])
        return output

how = {{"ddp_backend": "gloo", "per_device_train_batch_size": 8}}
trainer, _ = here.train(Spy, {folder!r}, (here.only_scorable,), **how)
assert trainer.accelerator.num_processes == 2
assert len(ours) == 2 and max(float(value.abs().max()) for value in ours) > 0.5
for got, want in zip(ours, theirs, strict=True):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
try:
    here.train(Spy, {folder!r}, (here.short,), **{{**how, "per_device_train_batch_size": 2}})
    raise AssertionError("a split group went through")
except ValueError as error:
    assert "whole groups of 4 completions on a process, got 2" in str(error), error
"""


@pytest.mark.slow
def test_two_processes_see_their_own_groups(tmp_path):
    """On each process ours are TRL's advantages of its own rows; a group in two halves is refused."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    run = subprocess.run(
        [sys.executable, *command, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.errors
def test_refusals():
    with pytest.raises(TypeError, match="advantage as a function, got str"):
        grpo_trainer("group")
    with pytest.raises(ValueError, match="fmt to be one of"):
        grpo_trainer(group, fmt="thinking")
    rewards, mask = torch.tensor([[1.0, math.nan], [0.0, 2.0]]), torch.ones(4, 3, dtype=torch.bool)
    unscorable = rewards.isnan().flatten()
    checked = _advantages(rewards, rewards, mask, unscorable)  # NaN where nothing could score is 0
    assert checked.tolist() == [1.0, 0.0, 0.0, 2.0]
    with pytest.raises(
        ValueError, match=r"\[2, 2\] \(one per sample\) or \[4, 3\] \(one per token\), got \[3, 2\]"
    ):
        _advantages(torch.zeros(3, 2), rewards, mask, unscorable)
    with pytest.raises(ValueError, match="finite advantages"):
        _advantages(rewards / 0, rewards, mask, unscorable)
    with pytest.raises(TypeError, match="advantage as a float tensor, got int64"):
        _advantages(torch.zeros(2, 2).long(), rewards, mask, unscorable)
