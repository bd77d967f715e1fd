r"""Freezing: which whole parameters are trained.

Conventions: names are those of ``model.named_parameters()``; a tied tensor has one, its first.

Functions: ``layer_groups`` a model from its embeddings up to its head; ``only`` trains these and freezes the
rest; ``half`` a random half to freeze.

With these, for ``groups = layer_groups(model)``: all but the embeddings and the bottom k layers,
``only(model, groups[k + 1:])`` (Telly); one more group each epoch from the top down,
``only(model, groups[-(epoch + 1):])``, and a smaller step further down,
``[{"params": [*g.values()], "lr": lr / 2.6**i} for i, g in enumerate(reversed(groups))]`` (ULMFiT); per user
the embeddings and the head, or the last block, ``only(model, [groups[0], groups[-1]])``,
``only(model, groups[-2:-1])``. Different parts in different ways (full, LoRA, IA3, frozen): peft with
``target_modules`` first, then `only` on the rest.
"""

import random
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from cotkit import _check

__all__ = ["half", "layer_groups", "only"]

Names = str | Iterable[str | Mapping[str, nn.Parameter]]


def layer_groups(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """A model cut into layers: embeddings, each block, and what comes after the last block.

    Args:
        model: a language model of ``transformers``, plain or wrapped by peft; or any module with a list of
            blocks (the longest ``nn.ModuleList``).

    Returns:
        1 + L + 1 dicts name -> parameter, which together hold every parameter once: embeddings of words and
        positions; blocks 0 to L - 1 (an encoder's before a decoder's); final norm and head. A tied head is
        in the first group only, with a warning: to freeze or train one is to freeze or train both.

    Raises:
        ValueError: no list of blocks is found.

    Source: ULMFiT (2018) arXiv:1801.06146
    Source: Telly (2023) arXiv:2304.05216
    Source: Personalized models (2022) arXiv:2208.13928
    Basis: memory.
    Differs: the papers' models have other layers (LSTM, encoder and decoder).

    Example:
        >>> from cotkit import lab
        >>> model, tokenizer = lab.load("tiny")
        >>> with warnings.catch_warnings(action="ignore"):  # its head is tied
        ...     groups = layer_groups(model)
        >>> len(groups), list(groups[0]), list(groups[-1])
        (6, ['model.embed_tokens.weight'], ['model.norm.weight'])
    """
    lists = _block_lists("layer_groups", model)
    prefixes = [f"{name}.{i}." for name, size in lists for i in range(size)]
    embeddings = {f"{name}." for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    groups: list[dict[str, nn.Parameter]] = [{} for _ in range(len(prefixes) + 2)]
    place: dict[int, tuple[str, int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = [i for i, prefix in enumerate(prefixes, 1) if name.startswith(prefix)]
        first = "embed" in name or any(name.startswith(e) for e in embeddings)
        group = inside[0] if inside else 0 if first else len(groups) - 1
        if id(parameter) in place:
            other, where = place[id(parameter)]
            if where != group:
                warnings.warn(
                    f"layer_groups: {name} is tied to {other} and stays in its group {where}.", stacklevel=2
                )
            continue
        place[id(parameter)] = (name, group)
        groups[group][name] = parameter
    return groups


def only(model: nn.Module, names: Names, *, exclude: Names = ()) -> list[str]:
    """Train these parameters and freeze all others.

    Args:
        model: any module; ``requires_grad`` is set on all its parameters.
        names: a regular expression, searched for in the names; or names; or groups of `layer_groups`, in a
            list.
        exclude: what of these stays frozen after all, in the same three ways: ``exclude=half(...)``.

    Returns:
        The names that are trained now. Of a tied tensor that is the first of its names.

    Raises:
        ValueError: an unknown name, an expression that matches nothing, nothing left to train, or a parameter
            in 4 bit.

    Source: Telly (2023) arXiv:2304.05216
    Source: ULMFiT (2018) arXiv:1801.06146
    Source: Personalized models (2022) arXiv:2208.13928
    Source: MILE (2024) arXiv:2403.06407
    Basis: memory; the released code of Telly was not run.
    Differs: nothing; which parameters a paper trains is the caller's list.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> only(model, r"^1", exclude="bias")
        ['1.weight']
    """
    chosen = _resolve(model, "names", names)
    left_out = _resolve(model, "exclude", exclude) if exclude else set()
    trained = [(n, p) for n, p in model.named_parameters() if id(p) in chosen and id(p) not in left_out]
    if not trained:
        raise ValueError(
            f"only: expected something to train, got nothing but what exclude={exclude!r} names."
        )
    for name, p in trained:
        if not p.is_floating_point() or hasattr(p, "quant_state"):
            raise ValueError(
                f"only: expected {name} in full precision, got a quantized weight. Put LoRA beside it."
            )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, parameter in trained:
        parameter.requires_grad_(True)
    return [name for name, _ in trained]


def half(model: nn.Module, *, ratio: float = 0.5, level: str = "category", rng: random.Random) -> list[str]:
    """Draw a random half of a model to freeze: half fine-tuning.

    By category, in every block apart: 2 of the 4 attention matrices, half of the norms, and of the 3
    feed-forward matrices 2 in one half of the blocks and 1 in the other. Embeddings and head are always
    trained. Draw anew for each round or task; what is frozen keeps its value.

    ``only(model, ".", exclude=half(model, rng=rng))`` trains the other half. Putting the base's values back
    for such a draw is the half-reset.

    Args:
        model: as in `layer_groups`.
        ratio: share that is frozen, in [0, 1]. Paper: 0.5.
        level: "category"; "layer", whole blocks; or "model", matrices and norms of all blocks in one pot.
        rng: source of the draw.

    Returns:
        Names of the parameters to freeze, in the model's order. A matrix goes with its bias. Where a share is
        no whole number per block, some blocks have one more, so that the sum over blocks is right.

    Raises:
        ValueError: ``ratio`` outside [0, 1], another ``level``, or no list of blocks.

    Source: HFT (2024) arXiv:2404.18466
    Basis: second-hand: a review of the method and its ablations; no code was found.
    Differs: nothing known.

    Example:
        >>> from cotkit import lab
        >>> model, tokenizer = lab.load("tiny")
        >>> frozen = half(model, rng=random.Random(0))
        >>> sum("self_attn" in name for name in frozen), sum("mlp" in name for name in frozen)  # 4 blocks
        (8, 6)
    """
    _check.between("half", 0, 1, ratio=ratio)
    _check.one_of("half", ("category", "layer", "model"), level=level)
    blocks: dict[str, dict[str, list[str]]] = {
        f"{name}.{i}": {} for name, size in _block_lists("half", model) for i in range(size)
    }
    for name, _ in model.named_parameters():
        for block, units in blocks.items():
            if name.startswith(f"{block}."):
                units.setdefault(name.rpartition(".")[0], []).append(name)  # a matrix and its bias
    if level == "layer":
        pots = [[list(units) for units in blocks.values()]]
    elif level == "model":
        pots = [[[unit] for units in blocks.values() for unit in units]]
    else:
        return _by_category(model, blocks, ratio, rng)
    frozen = {
        unit for pot in pots for group in rng.sample(pot, int(ratio * len(pot) + 0.5)) for unit in group
    }
    return _in_order(model, blocks, frozen)


def _by_category(
    model: nn.Module, blocks: dict[str, dict[str, list[str]]], ratio: float, rng: random.Random
) -> list[str]:
    """In each block a share of each category; what does not come out even is spread over the blocks."""
    frozen: set[str] = set()
    for category in ("attention", "feed-forward", "norm", "other"):
        there = [
            [u for u in units if _category(u[len(block) :]) == category] for block, units in blocks.items()
        ]
        counts = [int(ratio * len(units)) for units in there]
        total = int(ratio * sum(map(len, there)) + 0.5)
        open_ones = [i for i, units in enumerate(there) if counts[i] < len(units)]
        for i in rng.sample(open_ones, total - sum(counts)):
            counts[i] += 1
        for units, count in zip(there, counts, strict=True):
            frozen.update(rng.sample(units, count))
    return _in_order(model, blocks, frozen)


def _category(unit: str) -> str:
    """What a matrix of a block is for, by the words in its name; ``ln_1`` and ``q_norm`` are norms."""
    last = unit.rpartition(".")[2].lower()
    if "norm" in last or re.match(r"ln(_|\d|$)", last):
        return "norm"
    words = unit.lower()
    if "attn" in words or "attention" in words:
        return "attention"
    return "feed-forward" if re.search(r"mlp|ffn|feed_forward|\.fc\d|moe|expert|dense", words) else "other"


def _in_order(model: nn.Module, blocks: dict[str, dict[str, list[str]]], units: set[str]) -> list[str]:
    chosen = {n for there in blocks.values() for unit, names in there.items() if unit in units for n in names}
    return [name for name, _ in model.named_parameters() if name in chosen]


def _block_lists(fn: str, model: nn.Module) -> list[tuple[str, int]]:
    """Names and lengths of the lists of blocks, none inside another."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    lists: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and not any(name.startswith(f"{n}.") for n, _ in lists)
        ):
            lists.append((name, len(module)))
    depth = 0
    if hasattr(inner, "config") and hasattr(inner.config, "get_text_config"):
        depth = getattr(inner.config.get_text_config(), "num_hidden_layers", 0)
    depth = depth or max((size for _, size in lists), default=0)
    lists = [(name, size) for name, size in lists if size == depth]
    if not lists:
        raise ValueError(
            f"{fn}: expected a model with a list of blocks, got {type(inner).__name__}. Name parameters."
        )
    return lists


def _resolve(model: nn.Module, what: str, names: Names) -> set[int]:
    """The ids of the parameters that an expression, names or groups of `layer_groups` speak of."""
    there = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(names, str):
        found = {id(p) for n, p in there.items() if re.search(names, n)}
        if not found:
            raise ValueError(
                f"only: expected {what} to match a parameter, got {names!r}. "
                f"Names: {', '.join(list(there)[:3])}, ..."
            )
        return found
    found = set()
    for entry in names:
        for name in [entry] if isinstance(entry, str) else entry:
            if name not in there:
                raise ValueError(
                    f"only: expected {what} to be names of parameters, got {name!r}. "
                    f"Names: {', '.join(list(there)[:3])}, ..."
                )
            found.add(id(there[name]))
    return found
