"""Run any cotkit loss inside TRL's ``SFTTrainer``, which accumulates, distributes, saves and logs.

Conventions: the loss is ``loss(logps [B, T], batch, denom) -> scalar``, the form that ``lab.fit`` calls too.
``batch`` holds ``mask``, ``segments``, ``steps``, ``turns`` and the named columns as tensors; ``denom``
counts tokens, sequences or groups over the whole accumulated batch of all processes (None in evaluation: this
batch alone). A dataset item is one encoded row, or one whole group: K encoded rows of a question, which
therefore never part.
Functions, in the order of use: ``dataset`` rows to encoded items; ``add_logps`` a frozen model's log-probs as
a column; ``collate`` items to a batch; ``sft_trainer`` the trainer class for a loss; ``fit`` all of it for
one machine, with the arguments and the history of ``lab.fit``.
"""

import copy
import functools
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cotkit._check import one_of
from cotkit.interop._rows import ENCODED, UNITS, add_logps, collate, dataset, is_group, parts

if TYPE_CHECKING:
    import pandas as pd

    from cotkit.tokens import Format

__all__ = ["add_logps", "collate", "dataset", "fit", "sft_trainer"]


def sft_trainer(
    loss: Callable[[Tensor, dict, Any], Tensor],
    *,
    columns: Sequence[str] = (),
    unit: str = "token",
    microbatch: int | None = None,
) -> type:
    """Make an ``SFTTrainer`` subclass that trains with ``loss``.

    The class takes ``model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
    optimizers`` as its parent does. Data come from ``dataset`` and are used as they are. One forward per row
    and no logits: TRL's fused head gives the log-probs. The gradient of a step does not depend on how the
    batch is cut into micro-batches and processes, as long as the loss divides by ``denom`` (and
    ``average_tokens_across_devices`` stays on; without it each process counts for itself). In evaluation
    ``denom`` is None and ``eval_loss`` the mean over evaluation batches.

    Args:
        loss: ``loss(logps [B, T], batch, denom) -> scalar``; must divide by ``denom`` where it is not None.
        columns: the named columns that ``batch`` shall hold.
        unit: what ``denom`` counts: "token" (labels that are not -100), "sequence" (rows with such a token),
            "group".
        microbatch: at most this many rows per forward and backward, for groups too big for the memory.
            Gradients stay exact: one pass without gradient, d loss / d logps, then a second forward per part,
            with the same dropout. None does all in one pass, which is a third cheaper.

    Returns:
        A subclass of ``trl.SFTTrainer``.

    Raises:
        TypeError: ``loss`` is not callable.
        ValueError: unknown ``unit``, ``microbatch < 1``. The class itself raises ValueError for what would
            train something else in silence: packing, padding-free batches, TRL's own loss options, LoRA on
            the output head, a model without trainable weights, groups cut apart, sequence parallelism.

    Source: none (plumbing)

    Example:
        >>> def loss(logps, batch, denom):
        ...     return losses.sft.nll(logps, batch["mask"], denom=denom)
        >>> trainer = sft_trainer(loss)(model, args, train_dataset=dataset(rows, tokenizer))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    if not callable(loss):
        raise TypeError(f"sft_trainer: expected loss as a callable, got {type(loss).__name__}.")
    one_of("sft_trainer", UNITS, unit=unit)
    if microbatch is not None and (isinstance(microbatch, bool) or microbatch < 1):
        raise ValueError(f"sft_trainer: expected microbatch >= 1 or None, got {microbatch!r}.")
    columns = tuple(columns)
    from trl import SFTTrainer

    class CotkitSFTTrainer(SFTTrainer):  # type: ignore[misc, valid-type]
        """TRL's trainer with a cotkit loss; see ``cotkit.interop.trl.sft_trainer``."""

        loss_is_scaled_for_ga = True  # type: ignore[assignment]  # the loss is divided by the count over the whole accumulated batch
        _name = getattr(loss, "__name__", type(loss).__name__)
        _tag_names = ["trl", "sft", "cotkit"]  # noqa: RUF012  (TRL declares it so)

        def __init__(
            self,
            model: Any,
            args: Any,
            train_dataset: Any = None,
            eval_dataset: Any = None,
            processing_class: Any = None,
            *,
            peft_config: Any = None,
            callbacks: Any = None,
            optimizers: Any = (None, None),
        ) -> None:
            args = _checked_args(args)
            _check_data(train_dataset, eval_dataset, columns, unit)
            _check_model(model, peft_config)
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
            self._multiple = args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else 1
            collator = functools.partial(collate, columns=columns, multiple=self._multiple)
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                callbacks=callbacks,
                optimizers=optimizers,
            )
            pad_id = self._tokenizer.pad_token_id
            collator.keywords["pad_id"] = 0 if pad_id is None else pad_id
            _check_engine(self, microbatch)

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns: Any = [*ENCODED, *columns]

        def _send_telemetry(self) -> None:
            """Send nothing."""

        def get_batch_samples(
            self, epoch_iterator: Iterator, num_batches: int, device: Any
        ) -> tuple[list, Any]:
            samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            if not samples:
                return samples, None
            count = torch.stack([_count(batch, unit) for batch in samples]).sum().to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                # the ranks of a tensor-parallel group hold the same rows
                count = self.accelerator.gather(count).sum() // self.get_tp_size()
            return samples, count.clamp(min=1)

        def compute_loss(
            self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            batch = {**inputs, "mask": inputs["labels"] != -100}
            fed = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
            cuts = parts(fed, microbatch or len(fed["labels"]), self._multiple)
            seen: list[Any] = []
            states: list[Any] = []

            def forward(**kwargs: Any) -> Any:
                if "fused_lm_head" not in kwargs:
                    return model(**kwargs)
                if len(cuts) == 1:
                    seen.append(model(**kwargs))
                else:  # without the DDP wrapper: processes may hold different numbers of parts
                    seen.append(_in_parts(self.accelerator.unwrap_model(model), kwargs, cuts, states))
                return seen[-1]

            # TRL's step runs the forward and logs entropy and accuracy; its own loss is never differentiated
            base = super().compute_loss(forward, dict(fed), return_outputs=return_outputs)
            out = seen[0]
            two_pass = len(cuts) > 1 and torch.is_grad_enabled()
            logps = _align(out.log_probs, batch["labels"])
            if two_pass:
                logps = logps.detach().requires_grad_()
            value = loss(logps, batch, num_items_in_batch)
            _check_value(value)
            if torch.is_grad_enabled() and not value.requires_grad:
                value = (
                    value + 0.0 * logps.sum()
                )  # a batch that counts nothing still takes part in the backward
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                value = value * (
                    self.accelerator.num_processes // self.get_tp_size()
                )  # DDP averages the gradients
            if self.aux_loss_enabled:
                share = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
                value = value + self.router_aux_loss_coef * out.aux_loss / share
            if two_pass:
                value = self._second_pass(model, fed, cuts, states, value, logps)
            return (value, base[1]) if return_outputs else value

        def _second_pass(
            self, model: Any, fed: dict, cuts: list, states: list, value: Tensor, logps: Tensor
        ) -> Tensor:
            (slope,) = torch.autograd.grad(value, logps)
            bare = self.accelerator.unwrap_model(model)  # only the last part synchronises the processes
            for number, ((part, width), state) in enumerate(zip(cuts, states, strict=True)):
                last = number == len(cuts) - 1
                _set_random_state(state)
                kwargs = {name: tensor[part, :width] for name, tensor in fed.items()}
                out = (model if last else bare)(**kwargs, use_cache=False, fused_lm_head=True)
                labels = fed["labels"][part]
                found = pad(out.log_probs, (0, labels.shape[1] - width))
                surrogate = (_align(found, labels) * slope[part]).sum()
                if not last:
                    self.accelerator.backward(surrogate)
            return surrogate + (value - surrogate).detach()  # the loss's value with the last part's gradient

    return CotkitSFTTrainer


def fit(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict],
    loss: Callable[[Tensor, dict, Any], Tensor],
    *,
    steps: int,
    lr: float = 3e-4,
    batch: int = 64,
    seed: int = 0,
    fmt: "Format | str" = "think",
    columns: Sequence[str] = (),
    unit: str = "token",
    microbatch: int | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    max_length: int | None = None,
    malformed: str = "keep",
) -> "pd.DataFrame":
    """Train as ``lab.fit`` does, with TRL's trainer: what ``lab.fit(engine="trl")`` calls.

    For checkpoints, several processes or evaluation during training write the two lines yourself:
    ``sft_trainer(loss)`` with your own ``SFTConfig``.

    Args:
        model: a causal language model, plain or with an adapter; trained in place.
        tokenizer: its tokenizer.
        rows: prompt-completion rows; with ``unit="group"`` each has a ``group`` number.
        loss: ``loss(logps [B, T], batch, denom) -> scalar``.
        steps: optimizer steps.
        lr: highest learning rate of AdamW; linear warm-up, then cosine to zero.
        batch: rows, or groups, a step.
        seed: order of the rows, and dropout.
        fmt: how a thought and its answer are written.
        columns: row entries that the loss wants.
        unit: what ``denom`` counts: "token", "sequence" or "group".
        microbatch: most rows in memory with gradient; see ``sft_trainer``.
        warmup: share of the steps.
        weight_decay: of AdamW.
        clip: largest gradient norm.
        max_length: longest row in tokens.
        malformed: what ``tokens.encode`` does with a completion that does not follow ``fmt``.

    Returns:
        DataFrame with a line per step: ``step``, ``loss``, ``grad_norm``, ``lr``, ``tokens`` read,
        ``seconds``.

    Raises:
        ValueError: what ``dataset`` and ``sft_trainer`` refuse.

    Source: none (plumbing)

    Example:
        >>> history = fit(model, tokenizer, rows, loss, steps=2)  # doctest: +SKIP
        >>> list(history.columns)  # doctest: +SKIP
        ['step', 'loss', 'grad_norm', 'lr', 'tokens', 'seconds']
    """
    from trl import SFTConfig

    data = dataset(
        rows, tokenizer, fmt, columns=columns, unit=unit, max_length=max_length, malformed=malformed
    )
    training, device, state = model.training, next(model.parameters()).device, random.getstate()
    devices = [device] if device.type == "cuda" else []
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices):
        args = SFTConfig(
            folder,
            max_steps=steps,
            learning_rate=lr,
            per_device_train_batch_size=batch,
            lr_scheduler_type="cosine",
            warmup_steps=round(warmup * steps),
            weight_decay=weight_decay,
            max_grad_norm=clip,
            optim="adamw_torch",
            seed=seed,
            use_cpu=device.type == "cpu",
            bf16=False,
            activation_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = sft_trainer(loss, columns=columns, unit=unit, microbatch=microbatch)(
            model, args, train_dataset=data, processing_class=tokenizer, callbacks=[_clock()]
        )
        trainer.remove_callback(_printer())
        trainer.train()
    random.setstate(state)
    model.train(training)
    _unpatch(model)
    return _history(trainer.state.log_history)


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Puts the seconds since the start into every line of the log."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            self.start = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            state.log_history[-1]["seconds"] = time.perf_counter() - self.start

    return Clock()


def _unpatch(model: Any) -> None:
    # A copy of a model with TRL's patched forward would go on computing with the weights of the original
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.__dict__.pop("forward", None)


def _history(lines: list[dict]) -> "pd.DataFrame":
    import pandas as pd

    names = {
        "step": "step",
        "loss": "loss",
        "grad_norm": "grad_norm",
        "learning_rate": "lr",
        "num_tokens": "tokens",
    }
    steps = [line for line in lines if "loss" in line]
    table = pd.DataFrame(
        [{new: line[old] for old, new in {**names, "seconds": "seconds"}.items()} for line in steps]
    )
    table["step"] -= 1
    table["tokens"] = table["tokens"].diff().fillna(table["tokens"]).astype(int)
    return table


def _checked_args(args: Any) -> Any:
    from trl import SFTConfig

    if not isinstance(args, SFTConfig):
        raise ValueError(
            f"sft_trainer: expected args as a trl.SFTConfig, got {type(args).__name__}. On a CPU say "
            f"SFTConfig(folder, use_cpu=True, bf16=False, activation_checkpointing=False)."
        )
    refused = {
        "packing": args.packing,
        "eval_packing": args.eval_packing,
        "padding_free": args.padding_free,
        "assistant_only_loss": args.assistant_only_loss,
        "label_smoothing_factor": args.label_smoothing_factor,
        "loss_type": args.loss_type != "nll",
        "use_liger_kernel": args.use_liger_kernel,
    }
    for name, on in refused.items():
        if on:
            raise ValueError(
                f"sft_trainer: expected {name} left at its default, got {getattr(args, name)!r}. The loss "
                f"and the encoded rows decide what is trained; the option would be ignored or move columns."
            )
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise ValueError(
            "sft_trainer: expected dispatch_batches off, got True. It cuts batches between rows of a group."
        )
    return copy.copy(args)


def _check_data(train: Any, evaluation: Any, columns: Sequence[str], unit: str) -> None:
    named = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    for name, data in {"train_dataset": train, **named}.items():
        if data is None and name != "train_dataset":
            continue
        item: dict = next(iter(data), {}) if data is not None else {}
        missing = [c for c in (*ENCODED, *columns) if c not in item and c != "group"]
        if missing:
            raise ValueError(
                f"sft_trainer: expected columns {', '.join(missing)} in {name}, "
                f"got {', '.join(item) or 'nothing'}. Build it with interop.trl.dataset(rows, tokenizer, "
                f"columns=..., unit=...)."
            )
        if (unit == "group" or "group" in columns) and not is_group(item):
            raise ValueError(
                f"sft_trainer: expected whole groups as items of {name}, got single rows, which could fall "
                f"into different micro-batches. Build it with interop.trl.dataset(..., unit='group')."
            )


def _check_model(model: Any, peft_config: Any) -> None:
    targets = getattr(peft_config, "target_modules", None) or ()
    if not isinstance(targets, str) and any(name.split(".")[-1] == "lm_head" for name in targets):
        raise ValueError(
            "sft_trainer: expected LoRA on inner layers, got lm_head among target_modules. The fused head "
            "reads lm_head.weight, so that adapter would never train; use target_modules='all-linear', or "
            "modules_to_save."
        )
    if isinstance(model, str):
        return
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError(
            "sft_trainer: expected a plain output head, got an adapter on lm_head. The fused head reads "
            "lm_head.weight, so that adapter would never train; leave lm_head out of target_modules."
        )
    if head is None or not head.weight.is_floating_point():
        kind = "none" if head is None else str(head.weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"sft_trainer: expected a floating-point output head, got {kind}. Keep lm_head out of the "
            f"quantisation (llm_int8_skip_modules=['lm_head'])."
        )
    if peft_config is None and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "sft_trainer: expected a model with trainable weights, got none. Load the adapter with "
            "is_trainable=True, or pass peft_config."
        )


def _check_engine(trainer: Any, microbatch: int | None) -> None:
    parallel = trainer.accelerator.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            "sft_trainer: expected whole sequences on every process, got context or sequence parallelism. "
            "Use data, tensor or FSDP parallelism."
        )
    if microbatch is None:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "sft_trainer: expected one process or plain data parallelism with microbatch, got FSDP or "
            "DeepSpeed. Use smaller groups, or gradient checkpointing."
        )
    if trainer.aux_loss_enabled:
        raise ValueError(
            "sft_trainer: expected a model without routed experts with microbatch, got one with."
        )


def _check_value(value: Any) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"sft_trainer: expected the loss to return a 0-d tensor, got {got}. Reduce it with denom."
        )


def _count(batch: dict, unit: str) -> Tensor:
    if unit == "group":
        return batch["group"].max() + 1
    counted = batch["labels"][:, 1:] != -100
    return counted.sum() if unit == "token" else counted.any(1).sum()


def _align(logps: Tensor, labels: Tensor) -> Tensor:
    # [B, T-1] to [B, T]: nothing predicts the first token. Prompt tuning adds virtual columns on the left.
    width = labels.shape[1]
    return pad(logps[:, logps.shape[1] - (width - 1) :], (1, 0))


def _in_parts(model: Any, kwargs: dict, cuts: list[tuple[slice, int]], states: list) -> Any:
    outs: list[dict] = []
    full = kwargs["labels"].shape[1]
    with torch.no_grad():
        for part, width in cuts:
            states.append(_random_state(kwargs["input_ids"].device))
            cut = {k: v[part, :width] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            out = model(**cut)
            fields = {k: v for k, v in out.items() if isinstance(v, Tensor) and v.dim() == 2}
            outs.append({k: pad(v, (0, full - width)) for k, v in fields.items()})
    return type(out)(**{k: torch.cat([o[k] for o in outs]) for k in outs[0]})


def _random_state(device: torch.device) -> tuple[Any, Any, torch.device]:
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), accelerator, device


def _set_random_state(state: tuple[Any, Any, torch.device]) -> None:
    cpu, accelerator, device = state
    torch.set_rng_state(cpu)
    if accelerator is not None:
        torch.cuda.set_rng_state(accelerator, device)
