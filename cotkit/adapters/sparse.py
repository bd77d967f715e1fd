r"""Sparse tuning: choose the entries of a weight that are trained, and train nothing else.

Conventions: ``masks`` map the names of ``model.named_parameters()`` to bool tensors of the parameter's shape,
True = trained. An optimizer must have ``weight_decay=0``, and no momentum from before, or what is masked
drifts.

Functions: ``principal`` the largest entries after rank reduction (LIFT); ``largest_change`` the entries that
moved most in a trial run (lottery tickets); ``train_only`` gradients through the masks alone;
``carry_moments`` the optimizer's memory from one set of masks to the next.

LIFT: ``masks = {n: principal(p) ...}``, `train_only`, train; every some hundred steps new masks, and
`carry_moments`. Lottery tickets: train all of a copy, `largest_change`, `train_only` from the start again;
the difference to the start is sparse, and such differences add up (language + task). Where masks stay and
memory is short, peft's SHiRA stores only what is trained: ``ShiraConfig`` with ``mask_fn``.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cotkit import _check

__all__ = ["carry_moments", "largest_change", "principal", "train_only"]


def principal(
    weight: Float[Tensor, "M N"], filter_rank: int = 128, budget_rank: int = 128
) -> Bool[Tensor, "M N"]:
    r"""The k entries that are largest in the best approximation of low rank.

    $W_r = U_r S_r V_r^\top$; True at the k largest $|W_r|$, $k = \min((m + n) b, m n)$: as many numbers as a
    LoRA of rank b has.

    Args:
        weight: a matrix [m, n], of a linear layer in attention or feed-forward; the rest of a model (norms,
            biases, embeddings, head) is left frozen.
        filter_rank: r >= 1. Authors: 32 for 1B, 64 for 3B and 7B, 128 for 8B. From min(m, n) on, W itself is
            ranked by magnitude.
        budget_rank: b >= 1. Authors: 128. Their headline is about 5 % of the weights:
            ``round(0.05 * m * n / (m + n))``.

    Returns:
        Bool [m, n] with exactly k True.

    Raises:
        ValueError: a rank below 1, no matrix, NaN or infinity.
        TypeError: not a float tensor (a 4-bit weight: dequantize it).

    Source: LIFT (2025) arXiv:2506.00772
    Basis: authors' code, run (equal masks with their ``largest`` setting).
    Differs: the released configurations leave that setting out, and their code then takes the *smallest*
        entries. Follows the paper.

    Example:
        >>> weight = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0, 5.0]))  # of rank 1
        >>> principal(weight, 1, 1)  # k = (2 + 3) * 1 of 6: all but the smallest
        tensor([[False,  True,  True],
                [ True,  True,  True]])
    """
    _check.ndim("principal", "M N", weight=weight)
    _check.floating("principal", weight=weight)
    _check.integers("principal", filter_rank=filter_rank, budget_rank=budget_rank)
    _check.at_least("principal", 1, filter_rank=filter_rank, budget_rank=budget_rank)
    w = weight.detach()
    w = w if w.dtype == torch.float64 else w.float()
    if w.device.type == "cpu" and not bool(torch.isfinite(w).all()):
        raise ValueError("principal: expected a finite weight, got NaN or infinity.")
    m, n = w.shape
    r = min(filter_rank, m, n)
    if r < min(m, n):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        w = (u[:, :r] * s[:r]) @ vh[:r]
    k = min((m + n) * budget_rank, m * n)
    mask = torch.zeros(m * n, dtype=torch.bool, device=w.device)
    return mask.index_fill(0, w.abs().flatten().topk(k).indices, True).view(m, n)


def largest_change(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    k: int,
    *,
    chosen: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""The k entries that changed most in a trial run, ranked over all tensors together.

    $k$ largest $|\theta_1 - \theta_0|$. Then go back to $\theta_0$ and train these alone, `train_only`.

    Args:
        before: theta_0, name -> tensor: what may be chosen from. Leave out what is not (layer norms, a new
            head, which is trained whole).
        after: theta_1, the same names and shapes.
        k: >= 0; how many. Authors: about 4 to 8 % of all parameters.
        chosen: masks of an earlier round; they stay, and k more are chosen.

    Returns:
        Name -> bool tensor of the tensor's shape; k True in all (and those of ``chosen``). Of equal changes
        the first are taken, in the order of the names.

    Raises:
        ValueError: names, shapes or dtypes differ; not so many entries are left; NaN or infinity.
        TypeError: a tensor is not floating, or a mask not bool.

    Source: LT-SFT (2021) arXiv:2110.07560
    Basis: authors' code, run (equal masks).
    Differs: of equal changes exactly k are taken; the released code takes all that reach the threshold.

    Example:
        >>> from torch import tensor
        >>> start = {"a": tensor([1.0, 2.0]), "b": tensor([3.0])}
        >>> largest_change(start, {"a": tensor([1.5, 2.1]), "b": tensor([2.0])}, 2)
        {'a': tensor([ True, False]), 'b': tensor([True])}
    """
    _check.integers("largest_change", k=k)
    _check.at_least("largest_change", 0, k=k)
    _same_names("largest_change", before=before, after=after)
    free = {name: _free(name, before[name], after[name], chosen) for name in before}
    left = sum(int(f.sum()) for f in free.values())
    if k > left:
        raise ValueError(f"largest_change: expected k <= {left}, the entries to choose from, got {k}.")
    top = torch.empty(0, dtype=torch.float64)
    for name in before:  # never more than k numbers and one tensor in memory
        change = _change(before[name], after[name])[free[name]].double()
        top = torch.cat([top.to(change.device), change])
        top = top.topk(min(k, len(top))).values
    threshold = top.min() if k else torch.tensor(torch.inf)
    equal = k - int((top > threshold).sum())
    masks = {}
    for name in before:
        change = _change(before[name], after[name]).double()
        limit = threshold.to(change.device)
        tied = free[name] & (change == limit)
        tied &= (tied.flatten().cumsum(0) <= equal).view(tied.shape)
        equal -= int(tied.sum())
        old = torch.zeros_like(tied) if chosen is None else chosen[name].to(tied.device)
        masks[name] = (free[name] & (change > limit)) | tied | old
    return masks


def train_only(model: nn.Module, masks: Mapping[str, Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
    """Train the entries under the masks and nothing else.

    Gradients are multiplied by the masks as they arrive, every other parameter is frozen. With a fresh
    optimizer and no weight decay, what is masked keeps its value to the bit.

    Args:
        model: any module; ``requires_grad`` is set on all its parameters.
        masks: name of a parameter -> bool tensor of its shape; copied to its device.

    Returns:
        Handles: ``for handle in handles: handle.remove()`` before new masks are set.

    Raises:
        ValueError: an unknown name, another shape, two names of one tied parameter, no mask, or a parameter
            in 4 bit.
        TypeError: a mask is not bool.

    Source: LIFT (2025) arXiv:2506.00772
    Source: LT-SFT (2021) arXiv:2110.07560
    Basis: authors' code, run (equal weights after training, with `principal` and `carry_moments`).
    Differs: the moments of masked entries exist and are 0; LIFT's own optimizer stores none for them.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> handles = train_only(layer, {"weight": torch.tensor([[True, False]])})
        >>> layer(torch.tensor([3.0, 4.0])).sum().backward()
        >>> layer.weight.grad
        tensor([[3., 0.]])
    """
    parameters = _parameters("train_only", model, masks)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = []
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        handles.append(parameter.register_hook(_masked(masks[name].to(parameter.device, copy=True))))
    return handles


def carry_moments(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    masks_old: Mapping[str, Tensor],
    masks_new: Mapping[str, Tensor],
) -> None:
    """Take the optimizer's memory from one set of masks to the next.

    Moments are kept where both masks are True and 0 elsewhere; step counts and weights stay as they are, so
    an entry that is dropped keeps the value it has.

    Args:
        optimizer: of ``torch.optim``; every state of a parameter's shape counts as a moment.
        model: which the names belong to.
        masks_old: what was trained until now, name -> bool.
        masks_new: what will be trained from now on, for the same names.

    Raises:
        ValueError: names or shapes differ, a parameter that is not in the optimizer, weight decay, or moments
            that are not floating (8-bit optimizers).
        TypeError: a mask is not bool.

    Source: LIFT (2025) arXiv:2506.00772
    Basis: authors' code, run (equal weights after training with refreshed masks).
    Differs: nothing.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(2)).sum().backward()
        >>> optimizer.step()
        >>> old, new = torch.tensor([[True, True]]), torch.tensor([[False, True]])
        >>> carry_moments(optimizer, layer, {"weight": old}, {"weight": new})
        >>> optimizer.state[layer.weight]["exp_avg"]
        tensor([[0.0000, 0.1000]])
    """
    _same_names("carry_moments", masks_old=masks_old, masks_new=masks_new)
    _parameters("carry_moments", model, masks_old)
    parameters = _parameters("carry_moments", model, masks_new)
    decay = {id(p): g.get("weight_decay", 0) for g in optimizer.param_groups for p in g["params"]}
    moments: list[tuple[Tensor, Tensor]] = []
    for name, parameter in parameters.items():
        if id(parameter) not in decay:
            raise ValueError(f"carry_moments: expected {name} in the optimizer, got an optimizer without it.")
        if decay[id(parameter)] != 0:
            raise ValueError(
                f"carry_moments: expected weight_decay=0, got {decay[id(parameter)]} for {name}. What is "
                f"masked would drift towards 0."
            )
        kept = masks_old[name] & masks_new[name].to(masks_old[name].device)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and parameter.dim():
                if not value.is_floating_point():
                    raise ValueError(
                        f"carry_moments: expected float moments, got {value.dtype} in {key} of {name}. "
                        f"Use an optimizer of torch.optim."
                    )
                moments.append((value, kept))
    for value, kept in moments:
        value.masked_fill_(~kept.to(value.device), 0)


def _masked(mask: Tensor):
    def hook(gradient: Tensor) -> Tensor:
        return torch.where(mask, gradient, 0)  # where, not times: a NaN in a frozen entry stays out

    return hook


def _change(before: Tensor, after: Tensor) -> Tensor:
    wide = torch.promote_types(before.dtype, torch.float32)
    return (after.detach().to(before.device, wide) - before.detach().to(wide)).abs()


def _free(name: str, before: Tensor, after: Tensor, chosen: Mapping[str, Tensor] | None) -> Tensor:
    """Entries that can still be chosen; refuses what cannot be compared."""
    if before.shape != after.shape or before.dtype != after.dtype:
        raise ValueError(
            f"largest_change: expected {name} as {list(before.shape)} {before.dtype} in both, got "
            f"{list(after.shape)} {after.dtype} after."
        )
    _check.floating("largest_change", **{name: before})
    if not bool(torch.isfinite(_change(before, after)).all()):
        raise ValueError(f"largest_change: expected finite numbers, got NaN or infinity in {name}.")
    if chosen is None:
        return torch.ones_like(before, dtype=torch.bool)
    if name not in chosen:
        raise ValueError(f"largest_change: expected {name} among chosen, got {sorted(chosen)[:3]}, ...")
    _check.boolean("largest_change", **{name: chosen[name]})
    _check.same_shape("largest_change", **{name: before, "chosen": chosen[name]})
    return ~chosen[name].to(before.device)


def _same_names(fn: str, **dicts: Mapping[str, Tensor]) -> None:
    (first, a), (second, b) = dicts.items()
    for one, two, names in ((first, second, a.keys() - b.keys()), (second, first, b.keys() - a.keys())):
        if names:
            raise ValueError(
                f"{fn}: expected the same names, got {sorted(names)[0]} in {one} and not in {two} "
                f"({len(names)} such)."
            )


def _parameters(fn: str, model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that the masks are for, checked."""
    if not masks:
        raise ValueError(f"{fn}: expected masks for some parameters, got none.")
    there = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    for name, mask in masks.items():
        if name not in there:
            raise ValueError(
                f"{fn}: expected names of the model's parameters, got {name}. Names: "
                f"{', '.join(list(there)[:3])}, ..."
            )
        parameter = there[name]
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise ValueError(
                f"{fn}: expected {name} in full precision, got a quantized weight. It cannot be trained."
            )
        _check.boolean(fn, **{name: mask})
        if mask.shape != parameter.shape:
            raise ValueError(
                f"{fn}: expected a mask {list(parameter.shape)} for {name}, got {list(mask.shape)}."
            )
        for other, p in found.items():
            if p is parameter:
                raise ValueError(f"{fn}: expected one mask for each parameter, got {other} and {name}, tied.")
        found[name] = parameter
    return found
