"""The data half of ``interop.trl``: rows to encoded items, items to a padded batch; needs no TRL."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cotkit._check import one_of

if TYPE_CHECKING:
    from datasets import Dataset

    from cotkit.tokens import Format

UNITS = ("token", "sequence", "group")
ENCODED = ("input_ids", "labels", "segments", "steps", "turns")
_FILL = {"labels": -100, "steps": -1, "turns": -1}  # padding of the others and of named columns is 0
_SLICE = 256  # rows encoded at a time: the padded block stays small whatever the data set


def dataset(
    rows: Sequence[dict],
    tokenizer: Any,
    fmt: "Format | str" = "think",
    *,
    columns: Sequence[str] = (),
    unit: str = "token",
    max_length: int | None = None,
    malformed: str = "raise",
) -> "Dataset":
    """Encode rows into the data set that ``sft_trainer`` trains on.

    Args:
        rows: prompt-completion rows. With ``unit="group"`` each also has a ``group`` number; rows of one
            number become one item, in order of first appearance.
        tokenizer: a fast Hugging Face tokenizer.
        fmt: how a thought and its answer are marked; see ``tokens.Format``.
        columns: names of row entries that travel along: a number or bool per row, or a list with one number
            per token.
        unit: "token" or "sequence" give an item per row, "group" an item per group.
        max_length: longest row in tokens; ``tokens.encode`` cuts all per-token columns alike. None keeps
            everything.
        malformed: what ``tokens.encode`` does with a completion that does not follow ``fmt``.

    Returns:
        ``datasets.Dataset`` with ``input_ids``, ``labels``, ``segments``, ``steps``, ``turns`` and
        ``columns``; with ``malformed="keep"`` also ``malformed``, so that the rows kept in spite of their
        form can be counted.

    Raises:
        ValueError: no rows, a row without a named column, a per-token column of another length, unknown
            ``unit``.

    Source: none (plumbing)

    Example:
        >>> rows = [{"prompt": "1+1=", "completion": "2", "answer": "2"}]
        >>> dataset(rows, tokenizer, "plain", columns=("answer",))  # doctest: +SKIP
        Dataset({
            features: ['input_ids', 'labels', 'segments', 'steps', 'turns', 'answer'],
            num_rows: 1
        })
    """
    from datasets import Dataset

    from cotkit.tokens import encode

    one_of("dataset", UNITS, unit=unit)
    if not rows:
        raise ValueError(
            "dataset: expected at least one row, got none. Pass rows with prompt and completion."
        )
    wanted = [*columns, *(["group"] if unit == "group" and "group" not in columns else [])]
    items: list[dict] = []
    for start in range(0, len(rows), _SLICE):
        part = list(rows[start : start + _SLICE])
        try:
            block = encode(part, tokenizer, fmt, max_length=max_length, malformed=malformed)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (Rows are counted from row {start}.)") from error
        lengths = block["attention_mask"].sum(1).tolist()
        for i, (row, length) in enumerate(zip(part, lengths, strict=True)):
            item: dict[str, Any] = {name: block[name][i, :length].tolist() for name in ENCODED}
            item |= {"malformed": bool(block["malformed"][i])} if "malformed" in block else {}
            items.append(item | {name: _column(row, name, start + i, length) for name in wanted})
    return Dataset.from_list(_whole_groups(items) if unit == "group" else items)


def _column(row: dict, name: str, number: int, length: int) -> Any:
    if name not in row:
        raise ValueError(
            f"dataset: expected column {name!r} in every row, got none in row {number}. Add it or drop it."
        )
    value = row[name].tolist() if isinstance(row[name], Tensor) else row[name]
    if isinstance(value, list) and len(value) != length:
        raise ValueError(
            f"dataset: expected {name} with {length} values (one per token) in row {number}, "
            f"got {len(value)}. Encode first, then compute per-token columns; add_logps does both in step."
        )
    if not isinstance(value, int | float | list):
        raise ValueError(
            f"dataset: expected {name} as a number or one number per token in row {number}, "
            f"got {type(value).__name__}."
        )
    return value


def _whole_groups(items: list[dict]) -> list[dict]:
    groups: dict[Any, list[dict]] = {}
    for item in items:
        groups.setdefault(item["group"], []).append(item)
    names = [name for name in items[0] if name != "group"]
    return [{name: [item[name] for item in group] for name in names} for group in groups.values()]


def add_logps(data: "Dataset", model: Any, *, name: str = "ref_logps", batch_size: int = 8) -> "Dataset":
    """Add a frozen model's log-probs as a per-token column, once, before training.

    iw-SFT, KL terms and DPO-like losses need a reference; computing it beforehand keeps one model in memory.

    Args:
        data: what ``dataset`` returned, of rows or of groups.
        model: the reference; a causal language model. It is put back into its mode afterwards.
        name: name of the new column; give it to ``sft_trainer(columns=...)`` too.
        batch_size: items (rows or groups) per forward.

    Returns:
        The data set with one more column: log-probs in nats, one per token, 0 where the label is -100.

    Raises:
        ValueError: ``data`` has that column already.

    Source: none (plumbing)

    Example:
        >>> data = add_logps(dataset(rows, tokenizer), frozen_model)  # doctest: +SKIP
        >>> data.column_names[-1]  # doctest: +SKIP
        'ref_logps'
    """
    from cotkit.tokens import model_logps

    if name in data.column_names:
        raise ValueError(
            f"add_logps: expected a new column name, got {name!r}, which is there. Drop it or rename."
        )
    device, training = next(model.parameters()).device, model.training
    model.eval()
    values: list[Any] = []
    for start in range(0, len(data), batch_size):
        items = [data[i] for i in range(start, min(start + batch_size, len(data)))]
        batch = {key: value.to(device) for key, value in collate(items).items()}
        lengths = batch["attention_mask"].sum(1).tolist()
        flat = [row[:n].tolist() for row, n in zip(model_logps(model, batch).float(), lengths, strict=True)]
        for item in items:
            if is_group(item):
                values.append([flat.pop(0) for _ in item["input_ids"]])
            else:
                values.append(flat.pop(0))
    model.train(training)
    return data.add_column(name, values)


def is_group(item: dict) -> bool:
    """Whether an item of a data set is a group of rows."""
    return bool(item["input_ids"]) and isinstance(item["input_ids"][0], list)


def collate(
    items: Sequence[dict], *, columns: Sequence[str] = (), pad_id: int = 0, multiple: int = 1
) -> dict:
    """Pad items on the right into one batch of tensors; groups are flattened and numbered.

    Args:
        items: what ``dataset`` holds: encoded rows, or groups of them.
        columns: the named columns to carry; per row they become [B], per token [B, T] padded with 0.
        pad_id: token id under the padding; the attention mask hides it.
        multiple: T is rounded up to a multiple of this.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``, ``segments``, ``steps``, ``turns`` [B, T], the columns,
        and for groups ``group`` [B], counted from 0 in this batch. ``labels[:, 0]`` is -100: nothing predicts
        the first token.

    Raises:
        ValueError: an item without a named column, or rows and groups mixed.

    Source: none (plumbing)

    Example:
        >>> row = {
        ...     "input_ids": [5, 6],
        ...     "labels": [-100, 6],
        ...     "segments": [1, 2],
        ...     "steps": [-1, 0],
        ...     "turns": [0, 0],
        ... }
        >>> longer = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "segments": [1, 2, 2]}
        >>> longer |= {"steps": [-1, 0, 0], "turns": [0, 0, 0]}
        >>> collate([row, longer])["labels"]
        tensor([[-100,    6, -100],
                [-100,    6,    7]])
    """
    nested = {is_group(item) for item in items}
    if len(nested) != 1:
        raise ValueError(
            "collate: expected items of one kind, got rows and groups mixed (or nothing). Use dataset()."
        )
    grouped = nested.pop()
    for name in (*ENCODED, *columns):
        if any(name not in item for item in items) and not (grouped and name == "group"):
            raise ValueError(
                f"collate: expected column {name!r} in every item, got items without. Pass it to dataset()."
            )
    names = [name for name in (*ENCODED, *columns) if not (grouped and name == "group")]
    if grouped:
        rows = [
            {name: item[name][k] for name in names} for item in items for k in range(len(item["input_ids"]))
        ]
    else:
        rows = list(items)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    width = -(-max(2, int(lengths.max())) // multiple) * multiple
    batch = {name: _stack([row[name] for row in rows], _FILL.get(name, 0), width) for name in names}
    batch["input_ids"] = batch["input_ids"].masked_fill(torch.arange(width) >= lengths[:, None], pad_id)
    batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    batch["labels"][:, 0] = -100
    if grouped:
        batch["group"] = torch.tensor(
            [number for number, item in enumerate(items) for _ in item["input_ids"]]
        )
    return batch


def _stack(values: list[Any], fill: int, width: int) -> Tensor:
    if not isinstance(values[0], list):
        return torch.tensor(values)
    tensors = [torch.tensor(value) for value in values]
    return torch.stack([pad(t, (0, width - len(t)), value=fill) for t in tensors])


def parts(batch: dict, size: int, multiple: int = 1) -> list[tuple[slice, int]]:
    """Slices of at most ``size`` rows, each with the width of its longest row, rounded up to ``multiple``.

    A row alone is thus read without padding: under padding an attention mask [T, T] would be kept per layer.
    """
    labels, mask = batch["labels"], batch.get("attention_mask")
    rows, full = labels.shape
    lengths = [full] * rows
    if mask is not None and mask.dim() == 2:
        used = mask.bool() | (labels != -100)
        lengths = (used * torch.arange(1, full + 1, device=used.device)).amax(1).tolist()
    found = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    widths = [-(-max(2, *lengths[part]) // multiple) * multiple for part in found]
    return [(part, min(width, full)) for part, width in zip(found, widths, strict=True)]
