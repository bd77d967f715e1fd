r"""Token tensors: where the thought is in a text, which tokens count, and how likely the model finds them.

Conventions: B rows, T tokens, V vocabulary, D hidden size. Log-probabilities, entropies and divergences are
in nats. Position t of ``logps`` is the log-probability of ``labels[:, t]``: labels are never shifted by the
caller, position 0 is exactly 0, and so is every position whose label is -100. ``mask`` is bool, True =
counts. Padding is on the right.

Segments: PAD, PROMPT, THOUGHT (exactly the thought's text), ANSWER (the final answer's text), SPECIAL (what
the model must also write: tags, answer markers, white space between, the end token), TOOL (tool output, never
a target).

Functions: ``Format`` and ``FORMATS`` say how a chain is written; ``encode`` turns rows into tensors;
``mask``, ``labels``, ``between`` pick tokens; ``corrupt`` masks the thought (MFT); ``token_logps``,
``linear_logps``, ``model_logps`` score tokens; ``seq_logps``, ``grouped`` reduce them; ``entropy``, ``kl``,
``kl_k2``, ``kl_k3`` compare.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cotkit import _check
from cotkit._encode import (
    ANSWER,
    PAD,
    PROMPT,
    SPECIAL,
    THOUGHT,
    TOOL,
    check_tokenizer,
    parts_lost,
    row_pieces,
    shortened,
    tokenize,
)
from cotkit._linear import check_targets, chunked_logps, last_hidden, plain_head
from cotkit._types import (
    HeadBias,
    HeadWeight,
    Hidden,
    Logits,
    Mask,
    Segments,
    SeqLogps,
    TokenIds,
    TokenLogps,
    TokenValues,
)

__all__ = [
    "ANSWER",
    "FORMATS",
    "PAD",
    "PROMPT",
    "SPECIAL",
    "THOUGHT",
    "TOOL",
    "Format",
    "Parts",
    "between",
    "corrupt",
    "encode",
    "entropy",
    "grouped",
    "kl",
    "kl_k2",
    "kl_k3",
    "labels",
    "linear_logps",
    "mask",
    "model_logps",
    "seq_logps",
    "token_logps",
]

IGNORED = -100


class Parts(NamedTuple):
    r"""What ``Format.parse`` finds: thought, steps, final answer, and whether the text is well formed.

    Source: none (plumbing)

    Example:
        >>> FORMATS["gsm8k"].parse("2+3=<<2+3=5>>5\n#### 5")
        Parts(thought='2+3=<<2+3=5>>5', steps=['2+3=<<2+3=5>>5'], answer='5', ok=True)
    """

    thought: str
    steps: list[str]
    answer: str | None
    ok: bool


@dataclass(frozen=True)
class Format:
    r"""How a chain of thought is written as text: tags around it, its steps, the mark of the answer.

    Args:
        open: tag in front of the thought; may be missing in a text, since chat templates prefill it.
        close: tag behind the thought; the text is split at its last occurrence. "" = the answer's mark ends
            the thought.
        step: what separates steps.
        answer: marks in front of the final answer; the first is written, all are read. A mark that begins
            with a line break must begin the last line. "" (only with ``close``) = everything behind the tag.
        end: what follows the answer. "}" is matched by counting braces; "." may be missing.

    Source: none (plumbing)

    Example:
        >>> Format("<think>", "</think>").parse("<think>\n2+3=5\n5*2=10\n</think>\n10").steps
        ['2+3=5', '5*2=10']
    """

    open: str = ""
    close: str = ""
    step: str = "\n"
    answer: str | tuple[str, ...] = ("",)
    end: str = ""

    def __post_init__(self) -> None:
        """Refuse a format in which nothing marks the answer."""
        if isinstance(self.answer, str):
            object.__setattr__(self, "answer", (self.answer,))
        if not self.answer or (not self.close and "" in [a.strip() for a in self.answer]):
            raise ValueError(
                "Format: expected a mark of the answer, got none. Give close= or a non-empty answer=."
            )
        if not self.step:
            raise ValueError('Format: expected a step separator, got "". Use "\\n" for one step per line.')

    def parse(self, text: str) -> Parts:
        r"""Split a completion into thought, steps and answer; nothing is guessed.

        Args:
            text: what the model wrote, with or without the opening tag.

        Returns:
            ``Parts``; ``ok=False`` and ``answer=None`` when the text does not follow the format. Then
            ``thought`` is what is there.

        Example:
            >>> FORMATS["plain"].parse("2 and 3 make 5. The answer is 5.")
            Parts(thought='2 and 3 make 5.', steps=['2 and 3 make 5.'], answer='5', ok=True)
        """
        (start, stop), answer, ok = self._locate(text)
        steps = [text[s:e] for s, e in self._steps(text, start, stop)]
        return Parts(text[start:stop], steps, text[slice(*answer)] if answer else None, ok)

    def render(self, steps: Sequence[str], answer: str) -> str:
        r"""Write steps and an answer in this format.

        Args:
            steps: the steps of the thought; may be empty.
            answer: the final answer.

        Returns:
            A text for which ``parse`` gives the same steps and answer back.

        Raises:
            TypeError: ``steps`` is one string.
            ValueError: a step or the answer holds a separator or mark, so that the text would read
            differently.

        Example:
            >>> FORMATS["think"].render(["2+3=5", "5*2=10"], "10")
            '<think>\n2+3=5\n5*2=10\n</think>\n10'
        """
        if isinstance(steps, str):
            raise TypeError("render: expected steps as a list of strings, got one string. Pass [text].")
        thought, mark = self.step.join(steps), self.answer[0]
        if self.close:
            head = f"{self.open}\n{thought}\n{self.close}\n"
        else:
            head = thought + ("" if mark.startswith("\n") or not thought else "\n")
            mark = mark if thought else mark.lstrip("\n")
        text = f"{head}{mark}{answer}{self.end}"
        back = self.parse(text)
        if not back.ok or back.steps != [s.strip() for s in steps] or back.answer != str(answer).strip():
            raise ValueError(
                f"render: expected steps and an answer free of separators and marks, got {text!r}. "
                f"It would be read back as {back}."
            )
        return text

    def spans(self, text: str) -> list[tuple[int, int, int, int]]:
        r"""Cover a completion with segments, as character ranges.

        A step's range reaches to the next step, separator included, so that the steps tile the thought.

        Args:
            text: what the model wrote.

        Returns:
            ``(start, end, segment, step)`` in order, without gaps; step is -1 outside the thought. Of a
            malformed text all but a leading opening tag is THOUGHT.

        Example:
            >>> FORMATS["gsm8k"].spans("2+3=5\n#### 5")  # THOUGHT, then SPECIAL "\n#### ", then ANSWER
            [(0, 5, 2, 0), (5, 11, 4, -1), (11, 12, 3, -1)]
        """
        (start, stop), answer, _ = self._locate(text)
        steps = self._steps(text, start, stop)
        edges = [s for s, _ in steps] + [stop]
        found = [(s, e, THOUGHT, k) for k, (s, e) in enumerate(pairwise(edges))]
        found += [(*answer, ANSWER, -1)] if answer else []
        covered, last = [], 0
        for span in [*found, (len(text), len(text), SPECIAL, -1)]:
            covered += [(last, span[0], SPECIAL, -1), span]
            last = span[1]
        return [span for span in covered if span[0] < span[1]]

    def _steps(self, text: str, start: int, stop: int) -> list[tuple[int, int]]:
        found, at = [], start
        for part in text[start:stop].split(self.step):
            s, e = _strip(text, at, at + len(part))
            found += [(s, e)] if s < e else []
            at += len(part) + len(self.step)
        return found

    def _locate(self, text: str) -> tuple[tuple[int, int], tuple[int, int] | None, bool]:
        begin, end = _strip(text, 0, len(text))
        opened = bool(self.open) and text.startswith(self.open, begin)
        begin += len(self.open) if opened else 0
        if not self.close:
            marked = self._answer(text, begin)
            if marked:
                return _strip(text, begin, marked[0]), marked[1], True
            return _strip(text, begin, end), None, False
        cut = text.rfind(self.close, begin)
        marked = self._answer(text, cut + len(self.close)) if cut >= 0 else None
        if marked and (opened or not self.open or self.open not in text[:cut]):
            return _strip(text, begin, cut), marked[1], True
        closed_only = cut >= 0 and not text[cut + len(self.close) :].strip()
        return _strip(text, begin, cut if closed_only else end), None, False

    def _answer(self, text: str, low: int) -> tuple[int, tuple[int, int]] | None:
        best = None
        for mark in self.answer:
            pattern = re.escape(mark.strip()) + r"[ \t]*"
            if mark.startswith("\n"):
                pattern = r"(?m:^)[ \t]*" + pattern
            hits = [m.span() for m in re.finditer(pattern, text[low:])] if mark.strip() else [(0, 0)]
            if hits and (best is None or hits[-1][0] > best[0]):
                best = hits[-1]
        if best is None:
            return None
        value = self._value(text, low + best[1], bare=best == (0, 0))
        return (low + best[0], value) if value and value[0] < value[1] else None

    def _value(self, text: str, s: int, *, bare: bool) -> tuple[int, int] | None:
        if self.end == "}":
            e = _closing_brace(text, s)
        elif self.end not in ("", "."):
            e = text.find(self.end, s)
        else:
            s, e = _strip(text, s, len(text))
            e -= self.end == "." and text.endswith(".", s, e)
            one_line = bare or not re.search(r"\n|[.!?]\s", text[s:e])
            return _strip(text, s, e) if one_line else None
        if e < 0 or re.search(r"\w", text[e + len(self.end) :]):
            return None
        return _strip(text, s, e)


FORMATS = {
    "think": Format("<think>", "</think>"),
    "gsm8k": Format(answer=("\n#### ", "\nA: ")),
    "boxed": Format(answer=("\\boxed{",), end="}"),
    "plain": Format(answer=("The answer is ", "the answer is "), end="."),
}


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    part = text[start:end]
    left = len(part) - len(part.lstrip())
    return (start + left, start + left + len(part.strip())) if part.strip() else (start, start)


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for m in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return start + m.start()
    return -1


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
    the turn. The prompt is tokenized alone, as at sampling time. Tokens are assigned by character offsets;
    where one token would hold visible characters of two segments the text is split there. The end token is
    always part of the target.

    Args:
        rows: dicts with ``prompt`` and ``completion``, both strings or both lists of chat messages. An
            assistant message may keep its thought in ``reasoning_content``. Columns ``tools`` and
            ``chat_template_kwargs`` go to the template.
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

    Args:
        segments: as ``encode`` gives them, [B, T].
        parts: any of PROMPT, THOUGHT, ANSWER, SPECIAL, TOOL, PAD. TOOL is in no mask unless named.

    Returns:
        Bool [B, T].

    Raises:
        ValueError: no part is named, or one that does not exist.

    Source: none (plumbing)

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


def corrupt(
    input_ids: TokenIds,
    mask: Mask,
    rate: float | Float[Tensor, "B"],
    *,
    mask_id: int | None = None,
    replacement: TokenIds | None = None,
    generator: torch.Generator | None = None,
) -> tuple[TokenIds, Mask]:
    r"""Masked thought (MFT): replace random input tokens, and keep every label as it was.

    $\tilde w_i = n_i$ with probability ``rate`` where the mask counts, else $w_i$; the loss stays
    $-\sum_t \log p(w_t \mid \tilde w_{<t})$ with the *clean* $w_t$.

    Args:
        input_ids: clean ids, [B, T].
        mask: which inputs may be replaced. The paper: the whole response, ``labels != -100``.
        rate: probability in [0, 1], one number or one per row [B] (diffusion). The paper: 0.2 to 0.4, rising
            linearly from 0 during the first two thirds of training.
        mask_id: id written in place of a replaced token (paper: a new token ``<mask>``).
        replacement: ids [B, T] to write instead: random ones, or samples of the model (scheduled sampling).
        generator: source of randomness.

    Returns:
        The corrupted ids and ``noised`` [B, T], True where a token was drawn. No 1/(1 - rate) is applied.

    Raises:
        ValueError: neither or both of ``mask_id`` and ``replacement``; a rate outside [0, 1].

    Source: MFT (2024) arXiv:2403.02178 Eq. 1
    Basis: authors' code
    Differs: nothing; the rate's warm-up is the caller's (``min(p, p * step / (2/3 * total + 1))`` in the
    code).

    Example:
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> corrupt(ids, ids > 5, 1.0, mask_id=0)[0]
        tensor([[5, 0, 0]])
    """
    _check.same_shape("corrupt", input_ids=input_ids, mask=mask)
    _check.boolean("corrupt", mask=mask)
    _check.integer("corrupt", input_ids=input_ids)
    if (mask_id is None) == (replacement is None):
        raise ValueError(
            "corrupt: expected either mask_id or replacement, got both or neither. Pass one of them."
        )
    if isinstance(rate, Tensor):
        _check.floating("corrupt", rate=rate)
        if rate.shape != input_ids.shape[:1]:
            raise ValueError(
                f"corrupt: expected rate as a number or [B], got {list(rate.shape)}. Pass one per row."
            )
        if rate.device.type == "cpu" and not bool(((rate >= 0) & (rate <= 1)).all()):
            raise ValueError(f"corrupt: expected rate in [0, 1], got {rate.tolist()}. It is a probability.")
        rate = rate[:, None]
    else:
        _check.between("corrupt", 0, 1, rate=rate)
    device = input_ids.device if generator is None else generator.device
    drawn = torch.rand(input_ids.shape, generator=generator, device=device).to(input_ids.device)
    noised = mask & (drawn < rate)
    if replacement is None:
        return input_ids.masked_fill(noised, mask_id), noised  # type: ignore[arg-type]
    _check.same_shape("corrupt", input_ids=input_ids, replacement=replacement)
    return torch.where(noised, replacement, input_ids), noised


def token_logps(
    logits: Logits, labels: TokenIds, *, temperature: float = 1.0, shift: bool = True
) -> TokenLogps:
    r"""Log-probability of every label under the model's logits. The one place where the shift happens.

    $\log \mathrm{softmax}(z_{t-1} / T)[y_t]$

    Args:
        logits: as the model returns them, unshifted, [B, T, V]; gradient flows.
        labels: ids, unshifted, -100 = ignored, [B, T].
        temperature: > 0; the logits are divided by it.
        shift: False for bidirectional models, whose position t predicts label t.

    Returns:
        Nats [B, T]; exactly 0, with zero gradient, where the label is -100 and (with the shift) at position
        0. Half-precision logits are read in float32, and so is the result.

    Raises:
        ValueError: shapes differ (with a word on labels shifted before the call), an id outside the
            vocabulary, ``temperature <= 0``.

    Source: none (plumbing)

    Example:
        >>> token_logps(torch.zeros(1, 2, 4), torch.tensor([[3, 1]]))  # log 1/4 at position 1
        tensor([[ 0.0000, -1.3863]])
    """
    check_targets("token_logps", logits, labels, logits.shape[-1])
    _check.positive("token_logps", temperature=temperature)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != IGNORED
    rows = logits[kept]
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    rows = rows / temperature
    chosen = rows.gather(-1, labels[kept][:, None])[:, 0] - rows.logsumexp(-1)
    found = chosen.new_zeros(kept.shape).masked_scatter(kept, chosen)
    return torch.nn.functional.pad(found, (1, 0)) if shift else found


def linear_logps(
    hidden: Hidden,
    weight: HeadWeight,
    labels: TokenIds,
    *,
    bias: HeadBias | None = None,
    temperature: float = 1.0,
) -> TokenLogps:
    r"""``token_logps(hidden @ weight.T + bias, labels)``, values and gradients, without the logits [B, T, V].

    Works through the vocabulary in tiles that fit the cache, on target positions only; the gradient of a
    frozen head is not computed, and then the backward pass needs no matrix product at all.

    Args:
        hidden: last hidden states, unshifted, [B, T, D]; gradient flows.
        weight: output embedding [V, D]; gradient flows if it is asked for.
        labels: ids, unshifted, -100 = ignored, [B, T].
        bias: [V] or None.
        temperature: > 0; the logits are divided by it.

    Returns:
        Nats [B, T], as ``token_logps``; float32 for half-precision inputs, accumulated in float32.

    Raises:
        ValueError: shapes differ, an id outside the vocabulary, ``temperature <= 0``.

    Source: none (plumbing)

    Example:
        >>> linear_logps(torch.zeros(1, 2, 3), torch.ones(4, 3), torch.tensor([[3, 1]]))
        tensor([[ 0.0000, -1.3863]])
    """
    _check.ndim("linear_logps", "V D", weight=weight)
    check_targets("linear_logps", hidden, labels, weight.shape[0])
    _check.positive("linear_logps", temperature=temperature)
    if hidden.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}" + (
            f", bias {list(bias.shape)}" if bias is not None else ""
        )
        raise ValueError(
            f"linear_logps: expected one D and one V, got {shapes}. weight is [V, D], as in lm_head."
        )
    kept = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))  # the position that predicts a target
    chosen = chunked_logps(hidden, weight, bias, labels.roll(-1, 1)[kept], kept, float(temperature))
    return chosen.new_zeros(kept.shape).masked_scatter(kept, chosen).roll(1, 1)


def model_logps(model: Any, batch: Mapping[str, Tensor], *, grad: bool = False) -> TokenLogps:
    """Score an encoded batch with one forward pass: reference scores, perplexity, probes.

    The logits [B, T, V] are not built where the model's last step is a plain linear head (also under peft,
    with a 4-bit body or tied embeddings). A soft-cap, a logit scale, a quantized or adapted head are seen and
    scored from the logits.

    Args:
        model: a causal language model of ``transformers``, or its peft wrapper. Dropout stays as the model's
            mode says.
        batch: from ``encode``; ``input_ids``, ``attention_mask`` and ``labels`` are read.
        grad: keep the graph.

    Returns:
        Nats [B, T], as ``token_logps``.

    Raises:
        ValueError: the batch lacks ``input_ids`` or ``labels``.

    Source: none (plumbing)

    Example:
        >>> model_logps(model, encode(rows, tokenizer)).shape  # doctest: +SKIP
        torch.Size([8, 120])
    """
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise ValueError(
                f"model_logps: expected {name} in the batch, got {sorted(batch)}. Use tokens.encode."
            )
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
    labels = batch["labels"]
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        head = plain_head(model)
        if head is not None:
            hidden = last_hidden(model, head, inputs)
            if hidden is not None and hidden.shape[:2] == labels.shape:
                return linear_logps(hidden, head.weight, labels.to(hidden.device), bias=head.bias)
        logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] :]
        return token_logps(logits, labels.to(logits.device))


def seq_logps(
    logps: TokenLogps, mask: Mask, *, weights: TokenValues | None = None, mean: bool = False
) -> SeqLogps:
    r"""Log-probability of each row: sum, or mean, of its counted tokens.

    Args:
        logps: nats [B, T]; gradient flows.
        mask: True = counts.
        weights: factors [B, T] of the terms (thought against action, position); not part of the mean's count;
            detached.
        mean: divide by the number of counted tokens. AFT and length-normalised scores want the mean, DPO the
            sum.

    Returns:
        Nats (mean: nats per token) [B]; 0 with zero gradient for a row without counted tokens.

    Raises:
        ValueError: shapes differ; logits or shifted labels in place of log-probs.
        TypeError: the mask is not bool.

    Source: AFT (2023) arXiv:2309.02144 Eq. 2 (mean)
    Basis: second-hand
    Differs: nothing

    Example:
        >>> logps, counted = torch.tensor([[0.0, -1.0, -3.0]]), torch.tensor([[False, True, True]])
        >>> seq_logps(logps, counted), seq_logps(logps, counted, mean=True)
        (tensor([-4.]), tensor([-2.]))
    """
    _check.token_logps("seq_logps", mask, logps=logps)
    if weights is not None:
        _check.same_shape("seq_logps", logps=logps, weights=weights)
        logps = logps * weights.detach()
    summed = torch.where(mask, logps, 0.0).sum(1)
    return summed / mask.sum(1).clamp(min=1) if mean else summed


def grouped(
    values: Float[Tensor, "N"] | Int[Tensor, "N"], group: Int[Tensor, "N"]
) -> tuple[Tensor, Bool[Tensor, "B K"]]:
    """Gather the flat rows of several prompts into one line per prompt.

    Args:
        values: one value per row, [N]; gradient flows.
        group: number of the prompt each row belongs to, [N]; any integers, in any order.

    Returns:
        Padded values [B, K], groups and members in the order of their first appearance, 0 where there is
        none, and ``valid`` [B, K], True where there is one.

    Raises:
        ValueError: shapes differ.
        TypeError: ``group`` is not an integer tensor.

    Source: none (plumbing)

    Example:
        >>> grouped(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 4, 7]))
        (tensor([[1., 3.],
                [2., 0.]]), tensor([[ True,  True],
                [ True, False]]))
    """
    _check.ndim("grouped", "N", values=values, group=group)
    _check.same_shape("grouped", values=values, group=group)
    _check.integer("grouped", group=group)
    same = group[:, None] == group[None, :]
    n = group.shape[0]
    at = torch.arange(n, device=group.device)
    first = torch.where(same, at, n).amin(1) if n else at  # where each row's group begins
    line = torch.isin(at, first).cumsum(0)[first] - 1
    place = (same & (at[None, :] < at[:, None])).sum(1)
    shape = (int(line.max()) + 1, int(place.max()) + 1) if n else (0, 0)
    valid = torch.zeros(shape, dtype=torch.bool, device=group.device)
    valid[line, place] = True
    return values.new_zeros(shape).index_put((line, place), values), valid


def entropy(logits: Logits, *, temperature: float = 1.0) -> TokenValues:
    r"""Entropy of every next-token distribution, $-\sum_v p_v \log p_v$ with $p = \mathrm{softmax}(z / T)$.

    Args:
        logits: [B, T, V], not shifted; gradient flows. -inf = impossible.
        temperature: > 0.

    Returns:
        Nats [B, T], between 0 and log V; position t belongs to the distribution read at t, the one of token t
        + 1.

    Raises:
        ValueError: ``temperature <= 0``, not [B, T, V].

    Source: none (plumbing)

    Example:
        >>> entropy(torch.zeros(1, 1, 4))  # log 4
        tensor([[1.3863]])
    """
    _check.ndim("entropy", "B T V", logits=logits)
    _check.floating("entropy", logits=logits)
    _check.positive("entropy", temperature=temperature)
    logp = _log_softmax(logits, temperature)
    return -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)


def kl(p_logits: Logits, q_logits: Logits, *, temperature: float = 1.0) -> TokenValues:
    r"""Exact divergence KL(p || q) $= \sum_v p_v (\log p_v - \log q_v)$ at every position.

    Args:
        p_logits: [B, T, V]; gradient flows.
        q_logits: [B, T, V]; gradient flows. Detach the side that must stay fixed.
        temperature: > 0, for both. No T^2 is applied.

    Returns:
        Nats [B, T], at least 0; 0 log 0 = 0.

    Raises:
        ValueError: shapes differ, ``temperature <= 0``.

    Source: none (plumbing)

    Example:
        >>> kl(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]]]))
        tensor([[0.]])
    """
    _check.same_shape("kl", p_logits=p_logits, q_logits=q_logits)
    _check.ndim("kl", "B T V", p_logits=p_logits)
    _check.floating("kl", p_logits=p_logits, q_logits=q_logits)
    _check.positive("kl", temperature=temperature)
    logp, logq = _log_softmax(p_logits, temperature), _log_softmax(q_logits, temperature)
    return torch.where(logp == -torch.inf, 0.0, logp.exp() * (logp - logq)).sum(-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return (wide / temperature).log_softmax(-1)


def kl_k2(logps: TokenLogps, ref_logps: TokenLogps) -> TokenValues:
    r"""Squared estimate of KL(policy || ref) on the policy's own samples.

    $\tfrac12 (\log\pi - \log\pi_{ref})^2$

    Args:
        logps: policy, nats [B, T]; gradient flows. On policy its expected gradient is that of the exact
            divergence.
        ref_logps: reference, nats [B, T]; detached.

    Returns:
        Nats [B, T], at least 0; biased as a value.

    Raises:
        ValueError: shapes differ.

    Source: none (Schulman's note on approximating KL, 2020: k2)
    Basis: memory
    Differs: nothing

    Example:
        >>> kl_k2(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]))
        tensor([[2.]])
    """
    _check.same_shape("kl_k2", logps=logps, ref_logps=ref_logps)
    _check.floating("kl_k2", logps=logps, ref_logps=ref_logps)
    return (logps - ref_logps.detach()).square() / 2


def kl_k3(logps: TokenLogps, ref_logps: TokenLogps) -> TokenValues:
    r"""Unbiased, non-negative estimate of KL(policy || ref) on the policy's own samples (GRPO's KL term).

    $e^{d} - d - 1$ with $d = \log\pi_{ref} - \log\pi$.

    Args:
        logps: policy, nats [B, T]; gradient flows.
        ref_logps: reference, nats [B, T]; detached.

    Returns:
        Nats [B, T], at least 0; its mean over samples of the policy is the exact divergence.

    Raises:
        ValueError: shapes differ.

    Source: GRPO (2024) arXiv:2402.03300 Eq. 4
    Basis: memory
    Differs: nothing

    Example:
        >>> kl_k3(torch.tensor([[-2.0]]), torch.tensor([[-1.0]]))  # e - 1 - 1
        tensor([[0.7183]])
    """
    _check.same_shape("kl_k3", logps=logps, ref_logps=ref_logps)
    _check.floating("kl_k3", logps=logps, ref_logps=ref_logps)
    d = ref_logps.detach() - logps
    return torch.expm1(d) - d
