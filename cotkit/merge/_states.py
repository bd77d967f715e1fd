"""Plumbing of the room: states that must fit each other, walked tensor by tensor and piece by piece."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
PIECE = 1 << 17  # elements worked on at a time: they stay in the cache, and beside the tensors is little
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Lazy(Mapping[str, Tensor]):
    """A state whose tensors are made when they are asked for, and not kept.

    ``lend`` makes one that is only looked at and dropped soon: it may be the file itself.
    """

    def __init__(
        self,
        names: Sequence[str],
        make: Callable[[str], Tensor],
        lend: Callable[[str], Tensor] | None = None,
    ) -> None:
        self._names = dict.fromkeys(names)
        self._make = make
        self.lend = lend or make

    def __getitem__(self, name: str) -> Tensor:
        """Make one tensor."""
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        """Look into the names only: no tensor is made."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """List the names in the order of the files."""
        return iter(self._names)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._names)


def labelled(
    fn: str, one: dict[str, Any], many: dict[str, Any] | None = None, *, at_least: int = 1
) -> dict[str, State]:
    """Give every state a name for messages: ``base``, ``tuned[0]``, ``tuned[1]``, ..."""
    found = dict(one)
    for key, states in (many or {}).items():
        if isinstance(states, Mapping | str) or not isinstance(states, Sequence):
            raise TypeError(f"{fn}: expected {key} as a list of states, got {type(states).__name__}.")
        if len(states) < at_least:
            raise ValueError(f"{fn}: expected at least {at_least} states in {key}, got {len(states)}.")
        found |= {f"{key}[{i}]": state for i, state in enumerate(states)}
    for label, state in found.items():
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{fn}: expected {label} as a mapping from names to tensors, got {type(state).__name__}. "
                f"Pass model.state_dict(), or merge.checkpoint(path) for files."
            )
    return found


def same_names(fn: str, states: dict[str, State]) -> list[str]:
    """Return the names that all states share, in the order of the first; raise where one has others."""
    (first, names), *others = states.items()
    if not names:
        raise ValueError(f"{fn}: expected tensors, got none in {first}.")
    for label, state in others:
        for here, there, a, b in ((first, label, names, state), (label, first, state, names)):
            lone = [name for name in a if name not in b]
            if lone:
                more = f" (and {len(lone) - 1} more)" if len(lone) > 1 else ""
                raise ValueError(
                    f"{fn}: expected the same names in all states, got {lone[0]!r} in {here} but not in "
                    f"{there}{more}. A weight tied to another is often saved once only: give both states "
                    f"the same names, or pop what one has beyond the other."
                )
    return list(names)


def ties(fn: str, states: dict[str, State]) -> dict[str, str]:
    """Map every name that shares its memory with an earlier one to that one.

    A tie in one state must be one in all, or at least their two tensors must be equal there.
    """
    found: dict[str, str] = {}
    for state in states.values():
        if isinstance(state, Lazy):  # files share no memory, and reading them all to see so would take time
            continue
        seen: dict[Any, str] = {}
        for name, x in state.items():
            if isinstance(x, Tensor) and x.numel() and not x.is_meta:
                owner = seen.setdefault((x.device, x.data_ptr(), x.dtype, x.shape, x.stride()), name)
                if owner != name:
                    found.setdefault(name, owner)
    for name, owner in found.items():
        for label, state in states.items():
            if name in state and owner in state and not torch.equal(state[name], state[owner]):
                raise ValueError(
                    f"{fn}: expected {name!r} and {owner!r} tied in all states, got two different tensors in "
                    f"{label}. Untie the others: clone {name!r} there before the merge."
                )
    return found


def tensors(
    fn: str, name: str, states: dict[str, State], *, one_dtype: bool = True, look: bool = True
) -> list[Tensor]:
    """Return the tensor of that name from every state, checked against each other and (look) for NaN."""
    found = {label: state[name] for label, state in states.items()}
    for label, x in found.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{fn}: expected {name!r} as a tensor, got {type(x).__name__} in {label}.")
        if x.is_complex() or (x.is_floating_point() and x.dtype not in _FLOATS):
            raise TypeError(
                f"{fn}: expected {name!r} in float16, bfloat16, float32 or float64, got {kind(x)} in "
                f"{label}. Dequantise the model first."
            )
    if any(part in name for part in (".lora_A", ".lora_B", ".lora_embedding_", ".lora_magnitude")):
        raise ValueError(
            f"{fn}: expected whole weights, got the LoRA factor {name!r}. The factors A and B merged apart "
            f"are not the merged B A: use model.merge_and_unload().state_dict(), or peft's "
            f"add_weighted_adapter(combination_type='cat')."
        )
    values = list(found.values())
    for what, said in (("shape", lambda x: list(x.shape)), ("dtype", kind), ("device", lambda x: x.device)):
        if what == "dtype" and not one_dtype and all(x.is_floating_point() for x in values):
            continue
        if any(said(x) != said(values[0]) for x in values):
            got = ", ".join(f"{label} {said(x)}" for label, x in found.items())
            raise ValueError(f"{fn}: expected {name!r} of one {what}, got {got}.")
    if look and values[0].is_floating_point():
        for label, x in found.items():
            finite(fn, name, x, label)
    packed = values[0].dtype in (torch.int8, torch.uint8)
    if packed and any(not torch.equal(x, values[0]) for x in values):
        raise TypeError(
            f"{fn}: expected {name!r} as floats, got different {kind(values[0])} tensors: packed weights of "
            f"a quantised model. Dequantise the models first."
        )
    return [x.detach() for x in values]


def finite(fn: str, name: str, x: Tensor, label: str) -> None:
    """Raise if a tensor holds a NaN or an infinity."""
    if not _all_finite(x):
        where = "the result overflows" if label == "the result" else f"{label} is broken there"
        raise ValueError(f"{fn}: expected finite numbers in {name!r}, got NaN or infinity: {where}.")


def _all_finite(x: Tensor) -> bool:
    pieces = x.detach().reshape(-1).split(PIECE)
    return all(bool(p.sum(dtype=wide(x)).isfinite()) or bool(p.isfinite().all()) for p in pieces)


def kind(x: Tensor) -> str:
    """Return the name of a tensor's dtype."""
    return str(x.dtype).removeprefix("torch.")


def wide(x: Tensor) -> torch.dtype:
    """Return the type that sums of these numbers are made in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pieces(xs: Sequence[Tensor], dtype: torch.dtype, times: int = 1) -> Iterator[tuple[slice, list[Tensor]]]:
    """Walk flat tensors side by side: where, and the piece of each in ``dtype``. Do not write into them."""
    flat, step = [x.reshape(-1) for x in xs], times * PIECE
    for start in range(0, flat[0].numel(), step):
        where = slice(start, min(start + step, flat[0].numel()))
        yield where, [x[where].to(dtype) for x in flat]


def each(
    fn: str,
    states: dict[str, State],
    rule: Callable[[str, list[Tensor]], Tensor],
    *,
    one_dtype: bool = True,
    linear: bool = False,
    by_name: Callable[[str], Any] | None = None,
) -> dict[str, Tensor]:
    """Merge name by name; integers come from the first state, and what was tied stays tied.

    ``linear`` says that a NaN in any state is a NaN in the result: then only that is looked through.
    ``by_name`` is what the rule makes of a name, so that two tied names are not treated differently.
    """
    names, shared = same_names(fn, states), ties(fn, states)
    for name, owner in shared.items():
        if by_name is not None and name in names and by_name(name) != by_name(owner):
            raise ValueError(
                f"{fn}: expected {name!r} and {owner!r} treated alike, for they are tied, got "
                f"{by_name(name)} and {by_name(owner)}. Untie them: clone one before the merge."
            )
    merged: dict[str, Tensor] = {}
    for name in names:
        if shared.get(name) in merged:
            merged[name] = merged[shared[name]]
            continue
        xs = tensors(fn, name, states, one_dtype=one_dtype, look=not linear)
        if xs[0].is_floating_point():
            merged[name] = rule(name, xs)
            if not _all_finite(merged[name]):
                for label, x in zip(states, xs, strict=True):
                    finite(fn, name, x, label)
                finite(fn, name, merged[name], "the result")
        else:
            merged[name] = xs[0].clone()
        del xs
    return merged


def like(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return an empty tensor of that shape and its flat view, to be filled piece by piece."""
    made = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    return made, made.view(-1)
