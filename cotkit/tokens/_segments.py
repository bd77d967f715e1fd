"""From rows to token tensors with segments, and the masks and labels that derive from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cotkit import _check
from cotkit._types import Mask, Segments, TokenIds
from cotkit.tokens._encode import (
    ANSWER,
    PAD,
    SPECIAL,
    THOUGHT,
    check_tokenizer,
    parts_lost,
    row_pieces,
    shortened,
    tokenize,
)
from cotkit.tokens._format import FORMATS, Format

IGNORED = -100


def _format(fn: str, fmt: Any) -> Format:
    if isinstance(fmt, Format):
        return fmt
    _check.one_of(fn, tuple(FORMATS), fmt=fmt)
    return FORMATS[fmt]


def encode(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    fmt: Format | str = "think",
    *,
    max_length: int | None = None,
    malformed: str = "raise",
) -> dict[str, Tensor]:
    r"""Turn rows into token tensors in which every token knows which part of the chain it belongs to.

    The completion is what the model has to write after the generation prompt: it is placed there word for
    word and never passed through the chat template, so a template cannot strip, wrap or double the thought;
    the template gives the prompt, an opening tag it prefills (PROMPT, and not written twice), and the end of
    the turn (not written twice either). Where the prompt ends with an empty thought (thinking switched off)
    the completion is the answer alone. The prompt is tokenized alone, as at sampling time. Tokens are
    assigned by character offsets; where one token would hold visible characters of two segments the text is
    split there. The end token is always part of the target.

    Args:
        rows: dicts with ``prompt`` and ``completion``, both strings or both lists of chat messages. An
            assistant message may keep its thought in ``reasoning_content``: it is put into the tags and line
            breaks that the template writes, if it writes any. Columns ``tools`` and ``chat_template_kwargs``
            go to the template.
        tokenizer: a fast ``transformers`` tokenizer; with a chat template where rows hold messages.
        fmt: a ``Format`` or the name of a preset.
        max_length: tokens kept of each row, counted from its beginning.
        malformed: "raise" refuses a completion that does not follow ``fmt`` or loses its thought or answer to
            ``max_length``; "keep" keeps it: what is there counts as THOUGHT.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` (THOUGHT, ANSWER and SPECIAL; else -100), ``segments``
        (int8), ``steps`` (step number within the row, -1 outside the thought), ``turns`` (number of the
        message, prompt included, -1 outside messages), all [B, T] and padded on the right. With "keep" also
        ``malformed`` [B] bool, the rows kept in spite of their form.

    Raises:
        TypeError: rows are not dicts, or a text is neither a string nor messages.
        ValueError: naming the row: malformed, truncated until thought or answer is gone, no chat template,
            ...

    Source: none (plumbing)

    Example:
        >>> from cotkit.lab import load  # doctest: +SKIP
        >>> row = {"prompt": "2+3?", "completion": "<think>\n2+3=5\n</think>\n5"}  # doctest: +SKIP
        >>> sorted(encode([row], load("tiny")[1]))  # doctest: +SKIP
        ['attention_mask', 'input_ids', 'labels', 'segments', 'steps', 'turns']
    """
    fmt = _format("encode", fmt)
    _check.one_of("encode", ("raise", "keep"), malformed=malformed)
    check_tokenizer("encode", tokenizer)
    if isinstance(rows, Mapping | str) or not rows:
        raise TypeError(
            "encode: expected a non-empty list of rows, got " + type(rows).__name__ + ". Pass [row]."
        )
    encoded, odd = [], []
    for i, row in enumerate(rows):
        pieces, texts, chat = row_pieces(f"encode: row {i}", row, tokenizer, fmt)
        ok = all(fmt.parse(text).ok for text in texts)
        if not ok and malformed == "raise":
            raise ValueError(
                f"encode: row {i}: expected a completion that follows {fmt}, got {shortened(texts)}. "
                f'Repair the row, pass the fitting fmt=, or malformed="keep" for samples of a model.'
            )
        ids, codes = tokenize(f"encode: row {i}", tokenizer, pieces, chat=chat)
        ids, kept = ids[:max_length], codes[:max_length]
        lost = parts_lost(codes, kept)
        if lost and (malformed == "raise" or lost.endswith("all")):
            raise ValueError(
                f"encode: row {i}: expected thought and answer within max_length={max_length}, got none of "
                f"its {lost.replace(' all', '')} tokens (it has {len(codes)}). Raise max_length or drop it."
            )
        encoded.append((ids, kept))
        odd.append(not ok or bool(lost))
    pad = next((p for p in (tokenizer.pad_token_id, tokenizer.eos_token_id) if p is not None), 0)
    width = max(len(ids) for ids, _ in encoded)
    fill = [
        (ids + [pad] * (width - len(ids)), kept + [(PAD, -1, -1)] * (width - len(ids)))
        for ids, kept in encoded
    ]
    input_ids = torch.tensor([ids for ids, _ in fill])
    segments, steps, turns = torch.tensor([kept for _, kept in fill]).unbind(-1)
    batch = {
        "input_ids": input_ids,
        "attention_mask": (segments != PAD).long(),
        "labels": labels(input_ids, mask(segments, THOUGHT, ANSWER, SPECIAL)),
        "segments": segments.to(torch.int8),
        "steps": steps.contiguous(),
        "turns": turns.contiguous(),
    }
    return batch if malformed == "raise" else {**batch, "malformed": torch.tensor(odd)}


def mask(segments: Segments, *parts: int) -> Mask:
    """Which tokens belong to the named parts.

    Many-shot fine-tuning reads its targets off parts and ``turns``: all answers of a conversation ``m =
    mask(segments, THOUGHT, ANSWER, SPECIAL)``, the last one only ``m & (turns == turns.amax(1,
    keepdim=True))``, or whole examples, the first question left out, ``turns > 0`` (``> 1`` after a system
    text); the targets are ``labels(input_ids, m)``.

    Args:
        segments: as ``encode`` gives them, [B, T].
        parts: any of PROMPT, THOUGHT, ANSWER, SPECIAL, TOOL, PAD. TOOL is in no mask unless named.

    Returns:
        Bool [B, T].

    Raises:
        ValueError: no part is named, or one that does not exist.

    Source: ManyICL (2025) arXiv:2506.11103 (loss on every answer)
    Basis: second-hand (abstracts of two versions)
    Differs: the versions speak of "every answer" and "every example"; both are here. Role markers and
        separators are no targets, the end of each answer is.

    Example:
        >>> mask(torch.tensor([[1, 2, 3, 4]]), THOUGHT, ANSWER)
        tensor([[False,  True,  True, False]])
    """
    _check.ndim("mask", "B T", segments=segments)
    _check.integer("mask", segments=segments)
    if not parts:
        raise ValueError(
            "mask: expected at least one part, got none. Name them: mask(segments, THOUGHT, ANSWER)."
        )
    for part in parts:
        _check.one_of("mask", range(6), part=part)
    return torch.isin(segments, torch.tensor(parts, dtype=segments.dtype, device=segments.device))


def labels(input_ids: TokenIds, mask: Mask) -> TokenIds:
    """Targets: the id where the mask counts, -100 elsewhere. Not shifted.

    Args:
        input_ids: [B, T].
        mask: True = target.

    Returns:
        Labels [B, T], a new tensor.

    Raises:
        ValueError: shapes differ.
        TypeError: the mask is not bool.

    Source: none (plumbing)

    Example:
        >>> labels(torch.tensor([[5, 6, 7]]), torch.tensor([[False, True, True]]))
        tensor([[-100,    6,    7]])
    """
    _check.same_shape("labels", input_ids=input_ids, mask=mask)
    _check.boolean("labels", mask=mask)
    _check.integer("labels", input_ids=input_ids)
    return input_ids.masked_fill(~mask, IGNORED)


def between(input_ids: TokenIds, open_id: int, close_id: int, *, inclusive: bool = False) -> Mask:
    """Tokens inside a pair of tags, for generated ids that have no segments.

    Args:
        input_ids: [B, T].
        open_id: id of the opening tag; a second one before the pair is closed changes nothing.
        close_id: id of the closing tag; a stray one is ignored.
        inclusive: count the two tags too.

    Returns:
        Bool [B, T]; a pair that is never closed runs to the end of the row.

    Raises:
        ValueError: both ids are one.

    Source: none (plumbing)

    Example:
        >>> between(torch.tensor([[1, 8, 2, 3, 9, 4]]), 8, 9)
        tensor([[False, False,  True,  True, False, False]])
    """
    _check.ndim("between", "B T", input_ids=input_ids)
    _check.integer("between", input_ids=input_ids)
    if open_id == close_id:
        raise ValueError(
            f"between: expected two different ids, got {open_id} twice. Pass the ids of both tags."
        )
    opens, closes = input_ids == open_id, input_ids == close_id
    at = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    last_open = (at * opens).cummax(1).values if input_ids.shape[1] else opens.long()
    last_close = (at * closes).cummax(1).values if input_ids.shape[1] else closes.long()
    inside = last_open > last_close  # from an opening tag (itself included) up to the next closing one
    if inclusive:
        return inside | (closes & torch.nn.functional.pad(inside, (1, 0))[:, :-1])
    return inside & ~opens
