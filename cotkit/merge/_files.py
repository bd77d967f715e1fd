"""Safetensors as a stream: one tensor at a time in, one at a time out, and no half-written result.

The format is read and written here rather than by its library, which maps whole files into memory and writes
only what lies there complete. A merge looks at its inputs through windows of one tensor each.
"""

import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from cotkit import _check
from cotkit.merge._states import Lazy, labelled, same_names

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_INDEX = "model.safetensors.index.json"
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")  # beside the weights: config, tokenizer
_Stamp = tuple[int, int, int]  # which file, its size, when it was written
_Entry = tuple[Path, _Stamp, torch.dtype, tuple[int, ...], int, int]  # ..., type, shape, first byte, bytes


def checkpoint(path: str | Path) -> Mapping[str, Tensor]:
    r"""A model in safetensors files as a state that is read tensor by tensor.

    Only the headers are read now, and checked against the index and the sizes of the files; a tensor is read
    each time it is asked for, and not kept. Every function of this room takes such a state.

    Args:
        path: a ``.safetensors`` file, or a folder with ``model.safetensors``, with shards and their
            ``model.safetensors.index.json``, or with one other ``.safetensors`` file.

    Returns:
        A mapping from names to CPU tensors, in the order of the files.

    Raises:
        ValueError: nothing there, a shard missing, a header that cannot be right, a file that is too short
            (the first tensor it cuts is named) or too long, an index that speaks of other tensors; later, a
            file that was written anew.
        TypeError: a tensor of a type that torch does not have.

    Source: none (plumbing)

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> _ = save({"w": torch.tensor([1.0, 2.0])}, folder)
        >>> state = checkpoint(folder)
        >>> list(state), state["w"]
        (['w'], tensor([1., 2.]))
    """
    entries: dict[str, _Entry] = {}
    where = Path(path)
    index = where / _INDEX
    files = [where] if where.is_file() else sorted(where.glob("*.safetensors"))
    if index.is_file():
        listed = _weight_map(index)
        files = [where / shard for shard in dict.fromkeys(listed.values())]
        for name, shard in listed.items():
            if not (where / shard).is_file():
                raise ValueError(f"checkpoint: expected {name!r} in {where / shard}, got no such file.")
    elif (where / "model.safetensors").is_file():
        files = [where / "model.safetensors"]
    elif len(files) != 1:
        raise ValueError(
            f"checkpoint: expected one .safetensors file, or shards with {_INDEX}, at {where}, got "
            f"{len(files)} such files."
        )
    for file in files:
        for name, entry in _header(file).items():
            if name in entries:
                raise ValueError(
                    f"checkpoint: expected {name!r} once, got it in {entries[name][0]} and {file}."
                )
            entries[name] = entry
    if index.is_file():
        for name in listed.keys() | entries.keys():
            if name not in entries or listed.get(name) != entries[name][0].name:
                there = f"in {entries[name][0].name}" if name in entries else "in no file"
                raise ValueError(
                    f"checkpoint: expected {name!r} in {listed.get(name, 'the index')}, got it {there}. "
                    f"{index} does not belong to these shards."
                )
    return Lazy(
        list(entries), lambda name: _read(name, *entries[name]), lambda name: _map(name, *entries[name])
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as broken:
        raise ValueError(f"checkpoint: expected a weight_map in {index}, got none ({broken}).") from None
    for name, shard in found.items() if isinstance(found, dict) else [("", None)]:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"checkpoint: expected file names in {index}, got {shard!r} for {name!r}.")
    return found


def _header(file: Path) -> dict[str, _Entry]:
    """Read what a file says it holds, and check that it can hold it."""
    with file.open("rb") as stream:
        stamp = _stamp(stream)
        size = stamp[1]
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"checkpoint: expected a safetensors file, got {size} bytes without a whole header in "
                f"{file}: not written to its end, or no safetensors file."
            )
        try:
            found = json.loads(stream.read(length))
            items = [
                (n, e["dtype"], e["shape"], *e["data_offsets"])
                for n, e in found.items()
                if n != "__metadata__"
            ]
            items = [(n, d, tuple(map(int, s)), int(a), int(b)) for n, d, s, a, b in items]
        except (ValueError, KeyError, TypeError, AttributeError) as broken:
            raise ValueError(
                f"checkpoint: expected a safetensors header in {file}, got {broken!r}."
            ) from None
    entries: dict[str, _Entry] = {}
    at = 0
    for name, kind, shape, start, stop in sorted(items, key=lambda item: item[3:]):
        if kind not in _DTYPES:
            raise TypeError(f"checkpoint: expected a type that torch has, got {kind} for {name!r} in {file}.")
        if start != at or stop - start != prod(shape) * _DTYPES[kind].itemsize or min(shape, default=0) < 0:
            raise ValueError(
                f"checkpoint: expected {list(shape)} {kind} from byte {at} on for {name!r}, got bytes "
                f"{start} to {stop} in {file}. Its header is broken."
            )
        at = stop
        if 8 + length + stop > size:
            raise ValueError(
                f"checkpoint: expected {8 + length + max(item[4] for item in items)} bytes in {file}, got "
                f"{size}: {name!r} is cut. The file was not written, or not downloaded, to its end."
            )
        entries[name] = (file, stamp, _DTYPES[kind], shape, 8 + length + start, stop - start)
    if 8 + length + at != size:
        raise ValueError(f"checkpoint: expected {8 + length + at} bytes in {file}, got {size}.")
    return entries


def _stamp(stream: Any) -> _Stamp:
    found = os.fstat(stream.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(
    name: str, file: Path, stamp: _Stamp, dtype: torch.dtype, shape: tuple[int, ...], start: int, size: int
) -> Tensor:
    buffer = torch.empty(size, dtype=torch.uint8)
    view, done = memoryview(buffer.numpy().data), 0
    with file.open("rb", buffering=0) as stream:
        _same_file(name, file, stamp, stream)
        stream.seek(start)
        while done < size:  # a call gives 2 GB at most
            got = stream.readinto(view[done:])
            if not got:
                raise ValueError(f"checkpoint: expected {size} bytes of {name!r} in {file}, got {done}.")
            done += got
    return buffer.view(dtype).reshape(shape)


def _map(
    name: str, file: Path, stamp: _Stamp, dtype: torch.dtype, shape: tuple[int, ...], start: int, size: int
) -> Tensor:
    """The tensor as a private window on its file: nothing is copied."""
    if not size or start % dtype.itemsize:  # nothing to map, or numbers that lie askew
        return _read(name, file, stamp, dtype, shape, start, size)
    before = start % mmap.ALLOCATIONGRANULARITY
    with file.open("rb") as stream:
        _same_file(name, file, stamp, stream)
        window = mmap.mmap(stream.fileno(), before + size, access=mmap.ACCESS_COPY, offset=start - before)
    return torch.frombuffer(window, dtype=torch.uint8)[before:].view(dtype).reshape(shape)


def _same_file(name: str, file: Path, stamp: _Stamp, stream: Any) -> None:
    if _stamp(stream) != stamp:
        raise ValueError(
            f"checkpoint: expected {file} as it was opened, got another before {name!r} was read. "
            f"Open the checkpoint again."
        )


def lazy(rule: Callable[..., Mapping[str, Tensor]], *states: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    r"""A merge that is made tensor by tensor, when a tensor is asked for.

    Because every merge works name by name, ``rule`` is called with states of one name each:
    ``lazy(lambda base, *tuned: model_stock(base, tuned), *map(checkpoint, paths))``. Memory holds one tensor
    of each state and the result. Files must not be written to, other than by ``save``, while it reads them.

    Args:
        rule: states (as many as given, one tensor in each) -> a state with the merged tensor under its name.
        *states: states with the same names, lazy ones too: ``lines`` may follow on ``delta``.

    Returns:
        A mapping from names to merged tensors, in the order of the first state; nothing is kept.

    Raises:
        ValueError: no states, names that differ; later, what ``rule`` raises, and a result under other names.
        TypeError: no mappings.

    Source: none (plumbing)

    Example:
        >>> from torch import tensor
        >>> a, b = {"w": tensor([2.0]), "v": tensor([0.0])}, {"w": tensor([4.0]), "v": tensor([1.0])}
        >>> lazy(lambda x, y: {name: x[name] - y[name] for name in x}, a, b)["w"]
        tensor([-2.])
    """
    named = labelled("lazy", {}, {"states": states})

    def make(name: str) -> Tensor:
        lent = [state.lend(name) if isinstance(state, Lazy) else state[name] for state in states]
        made = rule(*({name: x} for x in lent))
        if not isinstance(made, Mapping) or list(made) != [name]:
            got = list(made) if isinstance(made, Mapping) else type(made).__name__
            raise ValueError(f"lazy: expected rule to return a state with {name!r} alone, got {got}.")
        memory = [x.untyped_storage().data_ptr() for x in lent]
        return made[name].clone() if made[name].untyped_storage().data_ptr() in memory else made[name]

    return Lazy(same_names("lazy", named), make)


def save(
    state: Mapping[str, Tensor],
    out: str | Path,
    *,
    like: str | Path | None = None,
    max_shard: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    r"""Write a state to safetensors, tensor by tensor; the result appears whole or not at all.

    Everything is written beside ``out`` first and moved there in the end: if a tensor cannot be made, the
    disk is full or the process dies, what was there before is still there.

    Args:
        state: what to write; a lazy one is made while it is written.
        out: a folder (``model.safetensors``, or shards and their index, as transformers reads them), or a
            path that ends in ``.safetensors`` for one file.
        like: folder of a model whose config, tokenizer and code files are copied along.
        max_shard: bytes per file; a larger tensor has a file of its own.
        overwrite: replace what is there. A file is replaced in one step; of a folder, between two renames,
            neither the old nor the new is there for a moment.

    Returns:
        The path that was written.

    Raises:
        ValueError: ``out`` exists, no tensors, tensors that share memory, ``like`` without a folder.
        TypeError: a value that is no tensor, or of a type that safetensors does not have.

    Source: none (plumbing)

    Example:
        >>> import tempfile, torch
        >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 5.0])}
        >>> file = save(
        ...     lazy(lambda x, y: {"w": x["w"] + y["w"]}, a, b), tempfile.mkdtemp() + "/c.safetensors"
        ... )
        >>> checkpoint(file)["w"]
        tensor([4., 7.])
    """
    goal = Path(out)
    single = goal.suffix == ".safetensors"
    _check.integers("save", max_shard=max_shard)
    _check.positive("save", max_shard=max_shard)
    labelled("save", {"state": state})
    if goal.is_dir() if single else goal.is_file():
        raise ValueError(f"save: expected a {'file' if single else 'folder'} or a new path, got {goal}.")
    if not overwrite and (goal.is_file() or (goal.is_dir() and any(goal.iterdir()))):
        raise ValueError(f"save: expected a new path, got {goal}, which exists. Pass overwrite=True.")
    if like is not None and (single or not Path(like).is_dir()):
        raise ValueError(f"save: expected like as a folder, and out as one, got {like} and {goal}.")
    if not state:
        raise ValueError("save: expected tensors, got none.")
    _refuse_shared(state)
    goal.parent.mkdir(parents=True, exist_ok=True)
    draft = goal.parent / f".{goal.name}.{uuid4().hex[:8]}.partial"
    draft.mkdir()
    try:
        shards = _write_shards(state, draft, None if single else max_shard)
        if single:
            shards[0].replace(goal)
        else:
            _copy_rest(like, draft)
            _swap(draft, goal)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return goal


def _refuse_shared(state: Mapping[str, Tensor]) -> None:
    seen: dict[Any, str] = {}
    for name, x in () if isinstance(state, Lazy) else state.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"save: expected {name!r} as a tensor, got {type(x).__name__}.")
        owner = seen.setdefault((x.device, x.data_ptr(), x.numel()) if x.numel() else name, name)
        if owner != name:
            raise ValueError(
                f"save: expected tensors with memory of their own, got {name!r} tied to {owner!r}. Pop it if "
                f"the model's config ties them (transformers then saves the first only), or clone it."
            )


def _write_shards(state: Mapping[str, Tensor], folder: Path, max_shard: int | None) -> list[Path]:
    """Write the files, name them by their number, and write the index if there are several."""
    # A header is written when its shard is complete: room for all names that are left, spaces for the rest.
    names = list(state)
    files: list[dict[str, tuple[str, list[int], int, int]]] = [{}]
    stream, room, at = None, 0, 0
    try:
        for i, name in enumerate(names):
            x = state[name].detach()
            if x.dtype not in _DTYPES.values():
                raise TypeError(f"save: expected {name!r} in a type of safetensors, got {x.dtype}.")
            data = x.contiguous().cpu().reshape(-1).view(torch.uint8)
            if stream and max_shard is not None and at and at + data.numel() > max_shard:
                _close(stream, room, files[-1])
                stream, at = None, 0
                files.append({})
            if stream is None:
                room = sum(len(json.dumps(n)) + 400 for n in names[i:]) + 100
                room += -room % 8
                stream = (folder / f"{len(files)}.safetensors").open("wb", buffering=0)
                stream.write(bytes(8 + room))
            left = memoryview(data.numpy().data)
            while left:  # a call takes 2 GB at most
                left = left[stream.write(left) :]
            kind = next(k for k, dtype in _DTYPES.items() if dtype == x.dtype)
            files[-1][name] = (kind, list(x.shape), at, at + data.numel())
            at += data.numel()
            del x, data, left
        _close(stream, room, files[-1])
        stream = None
    finally:
        if stream:
            stream.close()
    return _name_files(folder, files)


def _close(stream: Any, room: int, held: dict[str, tuple[str, list[int], int, int]]) -> None:
    """Write the header into the room that was left for it."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    head |= {n: {"dtype": k, "shape": s, "data_offsets": [a, b]} for n, (k, s, a, b) in held.items()}
    text = json.dumps(head, separators=(",", ":")).encode()
    if len(text) > room:
        raise ValueError(f"save: expected a header of at most {room} bytes, got {len(text)}.")
    stream.seek(0)
    stream.write(room.to_bytes(8, "little") + text + b" " * (room - len(text)))
    stream.close()


def _name_files(folder: Path, files: list[dict[str, tuple[str, list[int], int, int]]]) -> list[Path]:
    total, paths = 0, []
    listed: dict[str, str] = {}
    for i, held in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        paths.append((folder / f"{i}.safetensors").rename(folder / name))
        listed |= dict.fromkeys(held, name)
        total += max(stop for *_, stop in held.values())
    if len(files) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": listed}
        (folder / _INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return paths


def _copy_rest(like: str | Path | None, folder: Path) -> None:
    for file in sorted(Path(like).iterdir()) if like is not None else ():
        if file.is_file() and file.suffix in _COPIED and not re.search(r"\.index\.json$", file.name):
            shutil.copyfile(file, folder / file.name)


def _swap(draft: Path, goal: Path) -> None:
    """Move the finished folder to its place; what stood there is removed after, or put back."""
    if not goal.exists():
        draft.rename(goal)
        return
    old = draft.with_suffix(".old")
    goal.rename(old)
    try:
        draft.rename(goal)
    except BaseException:
        old.rename(goal)
        raise
    shutil.rmtree(old)
