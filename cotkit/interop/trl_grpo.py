"""TRL's ``GRPOTrainer`` with an advantage function of one's own, one number per sample or per token.

Conventions: rewards and advantages are [P, G], the G samples of one prompt in a line, or [N, T] with N =
P * G rows in the same order. TRL's loss takes both. Rewards need no bridge: cotkit's are handed to
``reward_funcs`` as they are. Functions: ``grpo_trainer`` the trainer class for an advantage.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cotkit import _check

if TYPE_CHECKING:
    from cotkit.tokens import Format

__all__ = ["grpo_trainer"]


def grpo_trainer(
    advantage: Callable[[Tensor, dict[str, Any]], Tensor], *, fmt: "Format | str | None" = None
) -> type:
    """Make a ``GRPOTrainer`` subclass whose advantages come from a function, one per sample or per token.

    Sampling, rewards, losses, clipping, KL, accumulation, vLLM and logging stay TRL's; ``scale_rewards``
    alone has no effect any more. The class takes what its parent takes. The function sees the groups of its
    own process, so a process must hold whole ones: make ``per_device_train_batch_size *
    steps_per_generation`` a multiple of ``num_generations``.

    Args:
        advantage: ``advantage(rewards [P, G], batch) -> [P, G]``, or ``[N, T]`` for one number per token of
            the N = P * G completions (samples of one prompt stand next to each other). ``rewards`` is the
            weighted sum over the reward functions, NaN where none could score. ``batch`` holds ``scores``
            [P, G, F] of each reward function, ``completion_ids`` and ``mask`` [N, T], ``rows`` and
            ``completions`` (N dataset rows, N texts or message lists); with ``fmt`` also ``segments`` and
            ``steps`` [N, T]; where TRL computed them ``old_logps`` and ``ref_logps`` [N, T], nats.
        fmt: how a thought and its answer are written, for ``segments`` and ``steps``. None: neither.

    Returns:
        The class. A completion that no reward could score gets advantage 0, as in TRL.

    Raises:
        TypeError: ``advantage`` cannot be called, or returned something else than a float tensor.
        ValueError: in training, when a group is split over processes, or the advantages are of another shape
            or not finite.

    Source: none (plumbing)

    Example:
        >>> def bon(rewards, batch):
        ...     return losses.advantage.bon(rewards, 4)
        >>> def final_steps(rewards, batch):  # every token of a step the step's own credit
        ...     return losses.advantage.spread(credit(batch["completions"]), batch["steps"])
        >>> trainer = grpo_trainer(bon)(model, accuracy(), args, train_dataset=data)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    if not callable(advantage):
        raise TypeError(f"grpo_trainer: expected advantage as a function, got {type(advantage).__name__}.")
    from trl import GRPOTrainer

    from cotkit.tokens import FORMATS

    if isinstance(fmt, str):
        _check.one_of("grpo_trainer", FORMATS, fmt=fmt)
        fmt = FORMATS[fmt]

    class CotkitGRPOTrainer(GRPOTrainer):  # type: ignore[misc, valid-type]
        """TRL's trainer with a cotkit advantage; see ``cotkit.interop.trl_grpo.grpo_trainer``."""

        _name = getattr(advantage, "__name__", type(advantage).__name__)
        _tag_names = ["trl", "grpo", "cotkit"]  # noqa: RUF012  (TRL declares it so)

        def _send_telemetry(self) -> None:
            """Send nothing."""

        def _calculate_rewards(
            self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list
        ) -> Tensor:
            scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            self._scored = scores, list(inputs), completions, completion_ids_list
            return scores

        def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
            output = super()._generate_and_score_completions(inputs)
            scores, rows, completions, ids = self._scored
            del self._scored
            model: Any = self.model
            n: Any = self.num_generations if model.training else self.num_generations_eval
            if len(rows) % n:
                raise ValueError(
                    f"grpo_trainer: expected whole groups of {n} completions on a process, got {len(rows)} "
                    f"completions. Make per_device_train_batch_size * steps_per_generation a multiple of "
                    f"num_generations."
                )
            first = self.accelerator.process_index * len(rows)
            scores = scores[first : first + len(rows)]
            unscorable = scores.isnan().all(1)
            rewards = (scores * self.reward_weights.to(scores.device)).nansum(1)
            rewards = rewards.masked_fill(unscorable, torch.nan).view(-1, n)
            batch = _batch(output) | {"rows": rows, "completions": completions}
            batch["scores"] = scores.view(-1, n, scores.shape[1])
            if fmt is not None:
                batch |= _segments(self._tokenizer, output, ids, fmt)
            value = _advantages(advantage(rewards, batch), rewards, batch["mask"], unscorable)
            output["advantages"] = value
            self._show_advantages(value, batch["mask"])
            return output

        def _show_advantages(self, value: Tensor, mask: Tensor) -> None:
            """Put ours, the mean over a row's tokens, into the table of completions in place of TRL's."""
            if value.dim() == 2:
                value = (value * mask).sum(1) / mask.sum(1).clamp(min=1)
            shown = self.accelerator.gather(value).tolist()
            kept: Any = self._logs["advantages"]
            for _ in range(min(len(shown), len(kept))):
                kept.pop()
            kept.extend(shown)

    return CotkitGRPOTrainer


def _batch(output: dict) -> dict[str, Any]:
    mask = output["completion_mask"] * output.get("tool_mask", 1)
    batch = {"completion_ids": output["completion_ids"], "mask": mask.bool()}
    names = {"old_per_token_logps": "old_logps", "ref_per_token_logps": "ref_logps"}
    return batch | {ours: output[theirs] for theirs, ours in names.items() if theirs in output}


def _segments(tokenizer: Any, output: dict, ids: list, fmt: Any) -> dict[str, Tensor]:
    from cotkit.lab._rollout import codes
    from cotkit.tokens import PAD

    written = [list(map(int, row)) for row in ids]
    fronts = [
        row[kept.bool()].tolist()
        for row, kept in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
    ]
    ended = [bool(row) and row[-1] == tokenizer.eos_token_id for row in written]
    texts = [tokenizer.decode(row[:-1] if end else row) for row, end in zip(written, ended, strict=True)]
    like = output["completion_ids"]
    segments, steps = torch.full_like(like, PAD, dtype=torch.int8), torch.full_like(like, -1)
    for i, marks in enumerate(codes(tokenizer, fronts, texts, written, fmt)):
        if marks:
            found = torch.tensor(marks, device=like.device)
            segments[i, : len(marks)], steps[i, : len(marks)] = found[:, 0].to(torch.int8), found[:, 1]
    return {"segments": segments, "steps": steps}


def _advantages(value: Any, rewards: Tensor, mask: Tensor, unscorable: Tensor) -> Tensor:
    """Check what the function returned: [N] or [N, T], without gradient, 0 where nothing could be scored."""
    _check.floating("grpo_trainer", advantage=value)
    if value.shape == rewards.shape:
        value = value.flatten()
    elif value.shape != mask.shape:
        raise ValueError(
            f"grpo_trainer: expected advantages {list(rewards.shape)} (one per sample) or "
            f"{list(mask.shape)} (one per token), got {list(value.shape)}."
        )
    else:
        value = torch.where(mask, value, 0.0)
        unscorable = unscorable[:, None]
    value = torch.where(unscorable, 0.0, value.detach().to(rewards.dtype))
    if value.device.type == "cpu" and not bool(value.isfinite().all()):
        raise ValueError(
            "grpo_trainer: expected finite advantages, got NaN or infinite ones. A reward of NaN means that "
            "nothing could score the sample: leave it out of the statistics, as losses.advantage does."
        )
    return value
