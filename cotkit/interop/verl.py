"""Advantages, policy losses and rewards for verl, there by name on every worker of a cluster.

``import verl`` loads what a package announces in its entry-point group ``verl.plugins``; cotkit announces
`register`, so that with cotkit installed this is all that a run needs::

    algorithm.adv_estimator=cotkit_group +algorithm.cotkit.eps=1e-6
    actor_rollout_ref.actor.policy_loss.loss_mode=cotkit_grpo
    reward.custom_reward_function.path=pkg://cotkit.interop.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.reward=answer.accuracy

Estimators: ``cotkit_group`` and ``cotkit_bon``, `losses.advantage` of these names, with the entries of
``algorithm.cotkit`` as keywords. Policy losses: ``cotkit_grpo`` with verl's ``clip_ratio_low`` and
``clip_ratio_high``, ``cotkit_reinforce``; both follow ``loss_agg_mode``. KL and entropy terms stay verl's.

Conventions: verl's tensors are [N, T] over the response, ``uid`` says which rows share a prompt. Functions:
``advantage``, ``policy_loss``, ``scorer`` turn a function of one's own into what verl takes;
``compute_score`` a reward by its name; ``register`` the names above. Checked against verl 0.10.0.dev.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cotkit._check import one_of

__all__ = ["advantage", "compute_score", "policy_loss", "register", "scorer"]

_TOKEN = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm")
_SEQUENCE = ("seq-mean-token-mean",)

Estimator = Callable[..., tuple[Tensor, Tensor]]
PolicyLoss = Callable[..., tuple[Tensor, dict[str, Any]]]
Score = Callable[..., dict[str, float]]


def advantage(function: Callable[..., Tensor]) -> Estimator:
    """Turn an advantage over groups into a verl estimator, for ``verl``'s ``register_adv_est``.

    The reward of a response is the sum of its token-level rewards, so that verl's KL-in-reward counts;
    groups are the rows of one ``uid``, of any size. What the YAML has under ``algorithm.cotkit`` is passed on
    as keywords, and ``algorithm.norm_adv_by_std_in_grpo`` as ``scale`` where the function knows it.

    Args:
        function: ``function(rewards [B, K], valid=[B, K], ...) -> [B, K]``, as ``losses.advantage.group`` is.

    Returns:
        ``(token_level_rewards, response_mask, config, index, ...) -> (advantages, returns)``, both [N, T],
        0 outside the mask; verl calls it.

    Raises:
        TypeError: ``function`` cannot be called.
        ValueError: in training, when rows have no ``uid``, or the function returned another shape.

    Source: none (plumbing)

    Example:
        >>> from cotkit.losses.advantage import group
        >>> rewards, mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2)
        >>> advantage(group)(rewards, mask, index=["a", "a"])[0]  # 0.5 / (sqrt(0.5) + 1e-4)
        tensor([[ 0.7070,  0.7070],
                [-0.7070, -0.7070]])
    """
    if not callable(function):
        raise TypeError(f"advantage: expected a function, got {type(function).__name__}.")
    return partial(_estimate, function)


def _estimate(
    function: Callable[..., Tensor],
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Any = None,
    **unused: Any,  # noqa: ARG001  verl may hand over more (reward_baselines)
) -> tuple[Tensor, Tensor]:
    from cotkit.tokens import grouped

    if index is None or len(index) != len(token_level_rewards):
        got = "none" if index is None else f"{len(index)} for {len(token_level_rewards)} rows"
        raise ValueError(f"advantage: expected one uid per row, got {got}. verl puts them into the batch.")
    lines: dict[Any, int] = {}
    line = torch.tensor([lines.setdefault(uid, len(lines)) for uid in index])
    line = line.to(token_level_rewards.device)
    mask = response_mask.bool()
    rewards, valid = grouped(torch.where(mask, token_level_rewards.detach(), 0.0).sum(1), line)
    value = function(rewards, valid=valid, **_options(function, config))
    if value.shape != rewards.shape:
        raise ValueError(
            f"advantage: expected {list(rewards.shape)} from the function, got {list(value.shape)}."
        )
    flat = rewards.new_empty(len(line))
    flat[torch.argsort(line, stable=True)] = value[valid].to(rewards.dtype)  # back to the order of the rows
    tokens = flat[:, None] * mask
    return tokens, tokens


def _options(function: Callable[..., Tensor], config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    options = {str(name): value for name, value in dict(config.get("cotkit") or {}).items()}
    scale = config.get("norm_adv_by_std_in_grpo")
    if scale is not None and "scale" in inspect.signature(function).parameters:
        options.setdefault("scale", bool(scale))
    return options


def policy_loss(loss: Callable[[Tensor, dict, Any], Tensor], *, unit: str = "token") -> PolicyLoss:
    """Turn the loss of ``lab.fit`` into a verl policy loss, for ``verl``'s ``register_policy_loss``.

    Args:
        loss: ``loss(logps [N, T], batch, denom) -> scalar``; ``batch`` holds ``old_logps``, ``advantages``
            [N, T], ``mask`` and, with rollout correction, ``weights`` [N, T]. It must divide by ``denom``.
        unit: what ``denom`` counts. "token": the loss is a sum over tokens / denom, and ``loss_agg_mode`` any
            but "seq-mean-token-mean"; "sequence": token means of rows, summed / denom, with that mode.

    Returns:
        ``(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights) ->
        (loss, metrics)``; verl calls it on every micro-batch, with ``denom`` the count over the whole
        mini-batch of all workers, divided by their number since gradients are averaged.

    Raises:
        TypeError: ``loss`` cannot be called.
        ValueError: unknown ``unit``; in training, a ``loss_agg_mode`` of the other unit.

    Source: none (plumbing)

    Example:
        >>> from cotkit.losses.policy import reinforce
        >>> def loss(logps, batch, denom):
        ...     return reinforce(logps, batch["advantages"], batch["mask"], denom=denom)
        >>> logps, ones = torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2)
        >>> policy_loss(loss)(logps, logps, ones, ones, "token-mean")[0]  # (1 + 3) / 2
        tensor(2.)
    """
    if not callable(loss):
        raise TypeError(f"policy_loss: expected a function, got {type(loss).__name__}.")
    one_of("policy_loss", ("token", "sequence"), unit=unit)
    return partial(_loss, loss, unit)


def _loss(
    loss: Callable[[Tensor, dict, Any], Tensor],
    unit: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    mask = response_mask.bool()
    one_of("policy_loss", _TOKEN if unit == "token" else _SEQUENCE, loss_agg_mode=loss_agg_mode)
    batch = {"old_logps": old_log_prob, "advantages": advantages, "mask": mask}
    batch |= {} if rollout_is_weights is None else {"weights": rollout_is_weights}
    value = loss(log_prob, batch, _reduction(loss_agg_mode, config, mask)[1])
    return value, _metrics(log_prob, old_log_prob, mask)


def _reduction(mode: str, config: Any, mask: Tensor) -> tuple[str, Any]:
    """Our ``per`` and ``denom`` for verl's mode, over the whole mini-batch where verl counted it."""
    one_of("policy_loss", (*_TOKEN, *_SEQUENCE), loss_agg_mode=mode)
    counts = dict(getattr(config, "global_batch_info", None) or {})
    workers = counts.get("dp_size") or 1
    if mode == "token-sum":
        return "token", 1 / workers
    if mode == "token-mean":
        count = counts.get("batch_num_tokens")
        return "token", (mask.sum().clamp(min=1) if count is None else count) / workers
    rows = counts.get("global_batch_size")
    rows = (mask.any(1).sum().clamp(min=1) if rows is None else rows) / workers
    if mode == "seq-mean-token-sum-norm":
        rows = rows * (counts.get("loss_scale_factor") or mask.shape[1])
    return ("sequence" if mode in _SEQUENCE else "token"), rows


def _metrics(logps: Tensor, old_logps: Tensor, mask: Tensor) -> dict[str, Any]:
    gap = torch.where(mask, (old_logps - logps).detach(), 0.0)
    return {"actor/ppo_kl": gap.sum() / mask.sum().clamp(min=1)}


def _grpo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """``losses.policy.grpo`` with verl's clip range: its "vanilla" without the bound ``clip_ratio_c``."""
    from cotkit.losses.policy import grpo

    mask = response_mask.bool()
    per, denom = _reduction(loss_agg_mode, config, mask)
    both = getattr(config, "clip_ratio", 0.2)
    low, high = (getattr(config, f"clip_ratio_{side}", None) for side in ("low", "high"))
    value = grpo(
        log_prob,
        old_log_prob,
        advantages,
        mask,
        epsilon=both if low is None else low,
        epsilon_high=both if high is None else high,
        weights=rollout_is_weights,
        per=per,
        denom=denom,
    )
    return value, _metrics(log_prob, old_log_prob, mask)


def _reinforce(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """``losses.policy.reinforce``: no ratio, no clip."""
    from cotkit.losses.policy import reinforce

    mask = response_mask.bool()
    per, denom = _reduction(loss_agg_mode, config, mask)
    weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    value = reinforce(log_prob, weighted, mask, per=per, denom=denom)
    return value, _metrics(log_prob, old_log_prob, mask)


def scorer(reward: Callable[..., Sequence[float | None]], *, column: str = "answer") -> Score:
    """Turn a reward into verl's ``compute_score``, which judges one response at a time.

    ``compute_score = scorer(...)`` in a module of one's own is what ``custom_reward_function`` asks for.

    Args:
        reward: ``reward(prompts, completions, **columns)``. The entries of ``extra_info`` are its columns;
            its prompt is the entry ``prompt`` or ``question``, if there is one.
        column: the name under which the reward expects ``ground_truth``.

    Returns:
        ``(data_source, solution_str, ground_truth, extra_info=None) -> {"score", "acc", "scored"}``:
        ``scored`` is 0 and the score 0 where the reward says None, which verl does not know; it is picklable
        if the reward is.

    Raises:
        TypeError: ``reward`` cannot be called.
        ValueError: ``reward`` compares the completions of one prompt (``reward.grouped``).

    Source: none (plumbing)

    Example:
        >>> from cotkit.rewards.answer import accuracy
        >>> scorer(accuracy())("gsm8k", "The answer is 5.", "5")
        {'score': 1.0, 'acc': 1.0, 'scored': 1.0}
    """
    if not callable(reward):
        raise TypeError(f"scorer: expected reward as a function, got {type(reward).__name__}.")
    if getattr(reward, "grouped", False):
        raise ValueError(
            "scorer: expected a reward that judges a completion alone, got one that compares a group. verl "
            "calls per sample; put the comparison into an advantage estimator."
        )
    return partial(_score, reward, column)


def _score(
    reward: Callable[..., Sequence[float | None]],
    column: str,
    data_source: Any,  # noqa: ARG001
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    reward_router_address: Any = None,  # noqa: ARG001  verl adds these two where a reward model runs
    reward_model_tokenizer: Any = None,  # noqa: ARG001
) -> dict[str, float]:
    extra = dict(extra_info or {})
    prompt = extra.pop("prompt", extra.get("question"))
    extra.pop("completions", None)
    columns = {str(name): [value] for name, value in extra.items()} | {column: [ground_truth]}
    (score,) = reward(prompts=[prompt], completions=[solution_str], **columns)
    value = 0.0 if score is None or score != score else float(score)
    return {"score": value, "acc": value, "scored": float(score is not None and score == score)}


def compute_score(
    data_source: Any,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    reward: str = "answer.accuracy",
    options: Mapping[str, Any] | None = None,
    column: str = "answer",
    reward_router_address: Any = None,
    reward_model_tokenizer: Any = None,
) -> dict[str, float]:
    """Judge one response with a reward by its name: verl's ``custom_reward_function`` without a file.

    Args:
        data_source: verl's name of the data set; not used.
        solution_str: the response.
        ground_truth: what the data set holds as the answer.
        extra_info: more columns; see `scorer`.
        reward: "room.function" of ``cotkit.rewards``, or the dotted path of another reward or factory.
        options: arguments of the factory, plain values of the YAML (``reward_kwargs.options``). For rewards
            made of other rewards write a module with `scorer`.
        column: the name under which the reward expects ``ground_truth``.
        reward_router_address: verl's; not used.
        reward_model_tokenizer: verl's; not used.

    Returns:
        ``score``, ``acc`` (the same) and ``scored`` (0 where the reward says None).

    Raises:
        ValueError: no such reward, or one that compares a group.

    Source: none (plumbing)

    Example:
        >>> compute_score("gsm8k", "#### 7", "5")
        {'score': 0.0, 'acc': 0.0, 'scored': 1.0}
    """
    made = scorer(_reward(reward, dict(options or {})), column=column)
    return made(
        data_source, solution_str, ground_truth, extra_info, reward_router_address, reward_model_tokenizer
    )


def _reward(path: str, options: dict[str, Any]) -> Callable[..., Sequence[float | None]]:
    from cotkit import rewards

    folder, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(f"cotkit.rewards.{folder}" if folder in rewards.__all__ else folder)
        found = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"compute_score: expected reward as 'room.function' of cotkit.rewards or a dotted path, "
            f"got {path!r}. {error}"
        ) from error
    given = list(inspect.signature(found).parameters)[:2] == ["prompts", "completions"]
    return found if given and not options else found(**options)


def register() -> list[str]:
    """Register cotkit's estimators and policy losses with verl; ``import verl`` does it through the plugin.

    A second call changes nothing. Without the plugin, set ``VERL_USE_EXTERNAL_MODULES`` to
    ``cotkit.interop._verl_plugin``.

    Returns:
        The names that are there afterwards, estimators first.

    Raises:
        ImportError: verl is not installed, or keeps its registries elsewhere.

    Source: none (plumbing)

    Example:
        >>> register()  # doctest: +SKIP
        ['cotkit_bon', 'cotkit_group', 'cotkit_grpo', 'cotkit_reinforce']
    """
    from verl.trainer.ppo import core_algos

    from cotkit.losses.advantage import bon, group

    estimators: dict[str, Callable[..., Tensor]] = {"cotkit_bon": bon, "cotkit_group": group}
    losses = {"cotkit_grpo": _grpo, "cotkit_reinforce": _reinforce}
    for name, function in estimators.items():
        if name not in core_algos.ADV_ESTIMATOR_REGISTRY:
            core_algos.register_adv_est(name)(advantage(function))
    for name, loss in losses.items():
        core_algos.register_policy_loss(name)(loss)
    return [*estimators, *losses]
