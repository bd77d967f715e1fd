"""The TRL bridge: one step is the same however it is cut, columns stay in place, traps are refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl_worker as worker

from cotkit import tokens
from cotkit.interop import trl as bridge
from cotkit.losses.sft import nll

HERE = Path(__file__).parent


def close(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Parameters after one step over eight items in one micro-batch of one process."""
    return {
        name: worker.step(name, tmp_path_factory.mktemp(name), batch=8, accumulation=1)
        for name in worker.LOSSES
    }


def by_hand(name):
    """The same step without any trainer: the mathematics on full logits, then theta - 0.1 * gradient."""
    loss, options, data = worker.LOSSES[name]
    network = worker.model()
    items = list(data())
    batch = bridge.collate(items, columns=options.get("columns", ()))
    logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    logps = torch.nn.functional.pad(logps.masked_fill(batch["labels"][:, 1:] == -100, 0), (1, 0))
    batch["mask"] = batch["labels"] != -100
    denom = {"token": int(batch["mask"].sum()), "group": len(items)}[options.get("unit", "token")]
    loss(logps, batch, denom).backward()
    with torch.no_grad():
        return {key: value - 0.1 * value.grad for key, value in network.named_parameters()}


@pytest.mark.parametrize("name", worker.LOSSES)
def test_step_equals_the_mathematics(name, whole):
    want = by_hand(name)
    close({key: whole[name][key] for key in want}, want)
    start = worker.model().state_dict()
    assert max((whole[name][key] - start[key]).abs().max() for key in want) > 1e-3


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("name", worker.LOSSES)
def test_accumulation_changes_nothing(name, accumulation, whole, tmp_path):
    close(worker.step(name, tmp_path, batch=8 // accumulation, accumulation=accumulation), whole[name])


@pytest.mark.parametrize("name", worker.LOSSES)
def test_parts_change_nothing(name, whole, tmp_path):
    close(worker.step(name, tmp_path, batch=4, accumulation=2, microbatch=3), whole[name])


def test_parts_repeat_their_dropout(tmp_path):
    def loss(logps, batch, denom):
        seen.append(logps.detach().clone())
        return nll(logps, batch["mask"], denom=denom)

    seen = []
    network = worker.model(attention_dropout=0.5)
    trainer = bridge.sft_trainer(loss, microbatch=3)(
        network,
        worker.config(tmp_path, per_device_train_batch_size=8),
        train_dataset=worker.flat(),
        processing_class=worker.tokenizer(),
    )
    second = []
    original = bridge._align
    try:
        bridge._align = lambda logps, labels: second.append(original(logps, labels)) or second[-1]
        trainer.train()
    finally:
        bridge._align = original
    first, repeated = second[0], torch.cat(second[1:])
    assert torch.equal(first, repeated)  # dropout drew the same masks in both passes
    network.eval()


def test_two_processes_equal_one(whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    run = subprocess.run(
        [sys.executable, *command, str(HERE / "trl_worker.py"), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for name, got in torch.load(tmp_path / "results.pt").items():
        close(got, whole[name.split()[0]])


def test_columns_stay_beside_their_tokens():
    rows = worker.flat()
    batch = bridge.collate([rows[i] for i in (0, 3, 5)], columns=("ref_logps",), pad_id=7, multiple=8)
    lengths = [len(rows[i]["input_ids"]) for i in (0, 3, 5)]
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["input_ids"].shape[1] >= max(lengths)
    for b, (i, n) in enumerate(zip((0, 3, 5), lengths, strict=True)):
        for name in ("input_ids", "segments", "steps", "turns", "ref_logps", "labels"):
            assert batch[name][b, :n].tolist() == pytest.approx(rows[i][name])
        assert batch["attention_mask"][b].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        filled = {
            name: batch[name][b, n:].unique().tolist()
            for name in ("input_ids", "segments", "steps", "labels")
        }
        if n < batch["input_ids"].shape[1]:
            assert filled == {"input_ids": [7], "segments": [0], "steps": [-1], "labels": [-100]}


def test_groups_are_flattened_and_counted_from_zero():
    data = worker.groups()
    batch = bridge.collate(
        [data[2], data[0], data[2]], columns=("rank", "gold")
    )  # the same group twice stays two
    assert batch["group"].tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert batch["rank"].tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1]
    assert int(bridge._count(batch, "group")) == 3


def test_first_token_is_never_a_target():
    item = {"input_ids": [5, 6], "labels": [5, 6], "segments": [2, 2], "steps": [0, 0], "turns": [0, 0]}
    assert bridge.collate([item])["labels"].tolist() == [[-100, 6]]
    assert int(bridge._count(bridge.collate([item]), "token")) == 1


def test_denom_counts_the_accumulated_batch(tmp_path):
    def loss(logps, batch, denom):
        seen.append((denom, sorted(batch), logps.shape == batch["mask"].shape))
        return nll(logps, batch["mask"], denom=denom)

    rows = list(worker.flat())
    for unit, want in {
        "token": sum(sum(label != -100 for label in row["labels"]) for row in rows),
        "sequence": 8,
    }.items():
        seen = []
        trainer = bridge.sft_trainer(loss, unit=unit)(
            worker.model(),
            worker.config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4),
            train_dataset=worker.flat(),
            processing_class=worker.tokenizer(),
        )
        trainer.train()
        assert [int(denom) for denom, _, _ in seen] == [want] * 4
        assert all(same for _, _, same in seen)
        assert {"mask", "segments", "steps", "turns"} <= set(seen[0][1])


def test_evaluation_and_logging(tmp_path):
    trainer = bridge.sft_trainer(worker.aft, columns=("rank", "gold"), unit="group")(
        worker.model(),
        worker.config(tmp_path, per_device_eval_batch_size=8, logging_strategy="steps", logging_steps=1),
        train_dataset=worker.groups(),
        eval_dataset=worker.groups(),
        processing_class=worker.tokenizer(),
    )
    metrics = trainer.evaluate()
    batch = bridge.collate(list(worker.groups()), columns=("rank", "gold"))
    batch["mask"] = batch["labels"] != -100
    network = worker.model().eval()
    want = worker.aft(
        tokens.model_logps(network, batch), batch, None
    )  # one batch: denom None = its eight groups
    assert metrics["eval_loss"] == pytest.approx(want.item(), rel=1e-5)
    trainer.train()
    assert {"loss", "entropy", "mean_token_accuracy", "num_tokens"} <= set().union(*trainer.state.log_history)


def test_a_batch_without_targets_changes_nothing(tmp_path):
    from datasets import Dataset

    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in worker.items(2)]
    network = worker.model()
    start = {key: value.clone() for key, value in network.state_dict().items()}
    trainer = bridge.sft_trainer(worker.plain)(
        network,
        worker.config(tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=worker.tokenizer(),
    )
    trainer.train()
    close(network.state_dict(), start)


def test_lora_trains_and_the_base_stays(tmp_path):
    from peft import LoraConfig

    network = worker.model()
    trainer = bridge.sft_trainer(worker.plain)(
        network,
        worker.config(tmp_path, max_steps=2),
        train_dataset=worker.flat(),
        processing_class=worker.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    start = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {key for key, value in trainer.model.named_parameters() if not torch.equal(value, start[key])}
    assert moved
    assert all("lora_" in key for key in moved)
    assert not any("lm_head" in key for key in moved)


def test_nothing_is_sent(tmp_path, monkeypatch):
    from trl import SFTTrainer
    from trl.trainer import base_trainer

    def sent(*_, **__):
        raise AssertionError("telemetry was sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", sent)
    assert hasattr(SFTTrainer, "_send_telemetry")  # gone upstream: look for the new place
    make(tmp_path)


def test_rows_become_items_with_their_columns():
    rows = [{**row, "rank": i % 3, "group": i // 4} for i, row in enumerate(worker.sums(8))]
    tokenizer = worker.letters()
    flat = bridge.dataset(rows, tokenizer, columns=("rank",))
    block = tokens.encode(rows, tokenizer)
    batch = bridge.collate(list(flat), columns=("rank",))
    for name in ("input_ids", "attention_mask", "labels", "segments", "steps", "turns"):
        assert batch[name].tolist() == block[name].tolist()
    assert batch["rank"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    whole = bridge.dataset(rows, tokenizer, columns=("rank",), unit="group")
    assert len(whole) == 2
    again = bridge.collate(list(whole), columns=("rank",))
    assert again["group"].tolist() == [0] * 4 + [1] * 4
    assert again["input_ids"].tolist() == block["input_ids"].tolist()
    broken = [*rows, {"prompt": "1+1?", "completion": "no tags", "rank": 0}]
    kept = bridge.dataset(broken, tokenizer, columns=("rank",), malformed="keep")
    assert sum(kept["malformed"]) == 1


@pytest.mark.parametrize("unit", ["token", "group"])
def test_reference_logps_are_those_of_the_frozen_model(unit):
    rows = [{**row, "group": i // 2} for i, row in enumerate(worker.sums(6))]
    data = bridge.dataset(rows, worker.letters(), unit=unit)
    network = worker.letter_model().train()
    batch = bridge.collate(list(bridge.add_logps(data, network, batch_size=2)), columns=("ref_logps",))
    assert network.training
    want = tokens.model_logps(network.eval(), batch)
    torch.testing.assert_close(batch["ref_logps"], want, rtol=1e-5, atol=1e-6)
    assert (batch["ref_logps"][batch["labels"] == -100] == 0).all()


@pytest.mark.parametrize("microbatch", [None, 5])
def test_fit_takes_the_step_that_the_lab_takes(microbatch):
    from cotkit import lab

    same = {"steps": 1, "lr": 1e-3, "batch": 12, "warmup": 0.0, "clip": 1e9}
    ours, theirs = worker.letter_model(), worker.letter_model()
    left = lab.fit(ours, worker.letters(), worker.sums(), worker.plain, **same)
    state = torch.get_rng_state()
    right = bridge.fit(theirs, worker.letters(), worker.sums(), worker.plain, microbatch=microbatch, **same)
    assert torch.equal(state, torch.get_rng_state())
    assert list(right.columns) == list(left.columns)
    for name in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert right[name].tolist() == pytest.approx(left[name].tolist(), rel=1e-4), name
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 2e-5, name  # AdamW moves by lr = 1e-3 wherever there is a gradient


def test_a_copy_of_a_fitted_model_stands_alone():
    import copy

    network = worker.letter_model()
    history = bridge.fit(network, worker.letters(), worker.sums(), worker.plain, steps=3, batch=4)
    assert history["step"].tolist() == [0, 1, 2]
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    twin = copy.deepcopy(network)
    ids = torch.tensor([[5, 6, 7]])
    before = twin(input_ids=ids).logits
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
    assert torch.equal(twin(input_ids=ids).logits, before)


def make(folder, *, loss=worker.plain, options=None, network=None, data=None, peft_config=None, **changes):
    return bridge.sft_trainer(loss, **(options or {}))(
        worker.model() if network is None else network,
        worker.config(folder, **changes),
        train_dataset=worker.flat() if data is None else data,
        processing_class=worker.tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.errors
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"packing": True}, "packing"),
        ({"padding_free": True, "max_length": None}, "padding_free"),
        ({"assistant_only_loss": True}, "assistant_only_loss"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    ],
)
def test_options_that_would_train_something_else_are_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=f"sft_trainer: expected {match}"):
        make(tmp_path, **changes)


@pytest.mark.errors
def test_refusals(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="expected loss as a callable"):
        bridge.sft_trainer("nll")
    with pytest.raises(ValueError, match="expected unit to be one of"):
        bridge.sft_trainer(worker.plain, unit="row")
    with pytest.raises(ValueError, match="expected microbatch >= 1"):
        bridge.sft_trainer(worker.plain, microbatch=0)
    with pytest.raises(ValueError, match=r"expected args as a trl.SFTConfig"):
        bridge.sft_trainer(worker.plain)(worker.model(), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="expected columns reference in train_dataset"):
        make(tmp_path, options={"columns": ("reference",)})
    with pytest.raises(ValueError, match="expected whole groups"):
        make(tmp_path, options={"unit": "group"})
    head = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="got lm_head among target_modules"):
        make(tmp_path, peft_config=head)
    with pytest.raises(ValueError, match="got an adapter on lm_head"):
        make(tmp_path, network=get_peft_model(worker.model(), head))
    with pytest.raises(ValueError, match="expected a model with trainable weights"):
        make(tmp_path, network=worker.model().requires_grad_(False))
    with pytest.raises(ValueError, match="expected the loss to return a 0-d tensor"):
        make(tmp_path, loss=lambda logps, batch, denom: logps).train()  # noqa: ARG005
    with pytest.raises(ValueError, match="expected at least one row"):
        bridge.dataset([], worker.letters())
    with pytest.raises(ValueError, match="expected column 'rank' in every row, got none in row 0"):
        bridge.dataset(worker.sums(2), worker.letters(), columns=("rank",))
    with pytest.raises(ValueError, match="expected answer as a number"):
        bridge.dataset(worker.sums(2), worker.letters(), columns=("answer",))
    with pytest.raises(ValueError, match="one per token"):
        bridge.dataset([{**worker.sums(1)[0], "weight": [1.0, 2.0]}], worker.letters(), columns=("weight",))
    with pytest.raises(ValueError, match="expected a new column name"):
        bridge.add_logps(worker.flat(), worker.model())
    with pytest.raises(ValueError, match="rows and groups mixed"):
        bridge.collate([worker.flat()[0], worker.groups()[0]])
    with pytest.raises(ValueError, match="expected column 'rank' in every item"):
        bridge.collate([worker.flat()[0]], columns=("rank",))


def test_the_users_arguments_are_left_alone(tmp_path):
    args = worker.config(tmp_path)
    bridge.sft_trainer(worker.plain)(
        worker.model(), args, train_dataset=worker.flat(), processing_class=worker.tokenizer()
    )
    assert args.dataset_kwargs is None


def test_importing_the_bridge_does_not_import_trl():
    heavy = "('trl', 'transformers', 'datasets', 'peft', 'pandas')"
    code = f"import sys, cotkit.interop.trl; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=False).returncode == 0
