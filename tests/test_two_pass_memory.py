"""Groups of 16 chains in two passes: the memory of SFT on the longest, the gradient of one pass.

The long form, on a larger model and with the memory of whole processes, is ``benchmarks/bench_two_pass.py``;
here the bytes of living tensors are counted, which is exact.
"""

from pathlib import Path

import pytest
import torch
import trl_worker as worker

from cotkit.interop import trl as bridge
from cotkit.interop._rows import parts
from cotkit.lab import _train

K, LONGEST = 16, 256
COLUMNS = {"columns": ("rank", "gold"), "unit": "group"}


@pytest.fixture(scope="module")
def bench():
    """The benchmark as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        import bench_two_pass
    return bench_two_pass


def network():
    return worker.model(hidden_size=64, intermediate_size=128, initializer_range=0.1)


def group(seed=0, longest=LONGEST):
    """An item of 16 encoded chains, the third one the longest; lengths from a quarter of it."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [longest // 4 + 7 * k % (longest // 2) for k in range(K)]
    lengths[2] = longest
    rows = []
    for length in lengths:
        ids = torch.randint(3, worker.VOCAB, (length,), generator=draw).tolist()
        places = {"segments": [1] * 4 + [2] * (length - 4), "steps": [-1] * 4 + [0] * (length - 4)}
        rows.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:], **places, "turns": [0] * length})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {**columns, "rank": [k % 2 for k in range(K)], "gold": [int(k == 0) for k in range(K)]}


def single(item, k=2):
    return {name: item[name][k] for name in ("input_ids", "labels", "segments", "steps", "turns")}


def encoded(items, columns=("rank", "gold")):
    batch = bridge.collate(items, columns=columns)
    return batch | {"mask": batch["labels"] != -100}


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def apart(found, want):
    return ((found - want).norm() / want.norm()).item()


# memory


def bytes_of(bench, run):
    """Most bytes of living tensors in ``run(model, start)``, above a model with its gradients in place."""
    model, held = network(), {}
    model.train()
    run(model, lambda: bench.start_here(model, "two", held))
    held["tensors"].__exit__(None, None, None)
    return held["tensors"].peak


def lab_bytes(bench, batch, loss, unit, microbatch):
    def run(model, start):
        start()
        _train.backward(model, batch, loss, _train.count(batch, unit), microbatch=microbatch)

    return bytes_of(bench, run)


def test_lab_group_fits_where_sft_fits(bench):
    sft = lab_bytes(bench, encoded([single(group())], ()), bench.sft, "token", None)
    two, one = (lab_bytes(bench, encoded([group()]), bench.align, "group", m) for m in (1, None))
    assert two <= 1.1 * sft
    assert one > 5 * sft


def trl_bytes(bench, folder, item, *args, **options):
    from datasets import Dataset
    from transformers import TrainerCallback

    def run(model, start):
        class Begin(TrainerCallback):
            def on_step_begin(self, *_, **__):
                start()

            def on_pre_optimizer_step(self, *_, **__):
                raise bench.Reached

        trainer = bridge.sft_trainer(*args, **options)(
            model,
            worker.config(folder, per_device_train_batch_size=1),
            train_dataset=Dataset.from_list([item]),
            processing_class=worker.tokenizer(),
            callbacks=[Begin()],
        )
        with pytest.raises(bench.Reached):
            trainer.train()

    return bytes_of(bench, run)


def test_trl_group_fits_where_sft_fits(bench, tmp_path, monkeypatch):
    from trl.trainer import utils

    # TRL's head makes room for 32,768 words at once, which would hide the rest of this small model
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", worker.VOCAB)
    sft = trl_bytes(bench, tmp_path, single(group()), bench.sft)
    two, one = (trl_bytes(bench, tmp_path, group(), bench.align, microbatch=m, **COLUMNS) for m in (1, None))
    assert two <= 1.1 * sft
    assert one > 5 * sft


# gradients


@pytest.fixture(scope="module")
def whole(bench):
    """Gradient of two groups in one pass, float64."""
    model, batch = network().double(), encoded([group(1, 40), group(2, 48)])
    _train.backward(model, batch, bench.align, _train.count(batch, "group"))
    return gradient(model)


@pytest.mark.parametrize("microbatch", [1, 3])
@pytest.mark.parametrize("accumulated", [False, True])
def test_lab_gradient_is_that_of_one_pass(bench, whole, accumulated, microbatch):
    model, items = network().double(), [group(1, 40), group(2, 48)]
    for batch in [encoded([item]) for item in items] if accumulated else [encoded(items)]:
        _train.backward(model, batch, bench.align, 2, microbatch=microbatch)
    assert apart(gradient(model), whole) < 1e-12


@pytest.mark.parametrize(("accumulation", "microbatch"), [(1, 1), (2, 1), (2, 3), (2, None)])
def test_trl_gradient_is_that_of_one_pass(bench, whole, tmp_path, accumulation, microbatch):
    from datasets import Dataset

    model = network().double()
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    bridge.sft_trainer(bench.align, microbatch=microbatch, **COLUMNS)(
        model,
        worker.config(
            tmp_path, per_device_train_batch_size=2 // accumulation, gradient_accumulation_steps=accumulation
        ),
        train_dataset=Dataset.from_list([group(1, 40), group(2, 48)]),
        processing_class=worker.tokenizer(),
    ).train()
    moved = start - torch.cat([p.detach().flatten() for p in model.parameters()])
    # plain SGD with rate 0.1; TRL's head works in float32 even where the model is float64
    assert apart(moved / 0.1, whole) < 1e-6


def test_lab_parts_repeat_their_dropout(bench, monkeypatch):
    model, seen = worker.model(attention_dropout=0.5), []
    model.train()
    original = _train.model_logps
    monkeypatch.setattr(_train, "model_logps", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    batch = encoded([group(1, 40)])
    _train.backward(model, batch, bench.align, 1, microbatch=3)
    assert len(seen) == 12
    for first, second in zip(seen[:6], seen[6:], strict=True):
        assert torch.equal(first, second)
    assert seen[0].shape[1] == 40  # the longest chain is among the first three
    assert max(x.shape[1] for x in seen[1:6]) < 40


# where a part ends


def test_parts_are_as_wide_as_their_longest_row():
    labels = torch.full((5, 9), -100)
    mask = (torch.arange(9) < torch.tensor([3, 9, 4, 5, 1])[:, None]).long()
    batch = {"labels": labels, "attention_mask": mask}
    assert parts(batch, 2) == [(slice(0, 2), 9), (slice(2, 4), 5), (slice(4, 5), 2)]
    assert parts(batch, 2, 4) == [(slice(0, 2), 9), (slice(2, 4), 8), (slice(4, 5), 4)]
    assert [width for _, width in parts(batch, 1)] == [3, 9, 4, 5, 2]
    labels[2, 6] = 1  # a target behind the attention mask is kept
    assert [width for _, width in parts(batch, 1)] == [3, 9, 7, 5, 2]
    left = {"labels": torch.full((2, 9), -100), "attention_mask": mask[[0, 2]].flip(1)}
    assert [width for _, width in parts(left, 1)] == [9, 9]
    for other in ({}, {"attention_mask": torch.ones(5, 1, 9, 9)}):  # nobody says where a row ends
        assert [width for _, width in parts({"labels": labels, **other}, 3)] == [9, 9]


def test_trl_parts_keep_the_multiple(bench, tmp_path):
    from datasets import Dataset

    model, widths = worker.model(), []
    model.model.register_forward_pre_hook(
        lambda _m, _a, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    bridge.sft_trainer(bench.align, microbatch=1, **COLUMNS)(
        model,
        worker.config(tmp_path, per_device_train_batch_size=1, pad_to_multiple_of=8),
        train_dataset=Dataset.from_list([group(1, 42)]),
        processing_class=worker.tokenizer(),
    ).train()
    assert len(widths) == 2 * K
    assert max(widths) == 48
    assert min(widths) == 16  # ten tokens
    assert not any(width % 8 for width in widths)
