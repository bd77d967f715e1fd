r"""New rows from old ones: another prompt, several questions in one row, another language.

Conventions: a row has ``prompt`` and ``completion``, both text or both lists of chat messages; it is never
changed, a new one comes back, and its other columns travel along. Only what the model reads is rewritten
here: what it has to write stays word for word.

Functions: `retarget` a prompt from a template and a completion from a column (Contextual FT, task-specific
tuning, mode tokens); `pack_shots` several solved questions of one task in one row (many-shot tuning,
few-shot prompts); `code_switch` a text with fragments in another language (xCoT).
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from cotkit import prompts
from cotkit._check import between

__all__ = ["code_switch", "pack_shots", "retarget"]


def retarget(
    row: Mapping[str, Any],
    template: str | prompts.Template,
    *,
    completion: str = "completion",
    fields: Mapping[str, Any] | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    r"""A row with a prompt from a template and a completion from one of its columns.

    Contextual fine-tuning: the prompt is a learning strategy, the completion the raw text, so the loss is
    $-\sum_t \log p(x_t \mid c, x_{<t})$ over the text alone; with the prefix empty it is continued
    pre-training. The strategy is drawn anew for each epoch by the caller:
    ``retarget(row, rng.choice(list(templates("learn"))), completion="text")``. Such rows have no final
    answer: encode them with ``malformed="keep"``.

    Task-specific tuning: the template is the instruction of one task with its declared input columns, the
    completion its output column; the data set is the union over the tasks.

    Args:
        row: columns; only those named by the template reach the prompt.
        template: name, text or ``Template``, see ``prompts.apply``. "" is the empty prompt.
        completion: column that holds the new completion.
        fields: values for the template that are not columns.
        chat: True: the prompt is one user message, the completion one assistant message.

    Returns:
        The row with a new ``prompt`` and ``completion``; every other column as it was.

    Raises:
        ValueError: no such column; see also ``prompts.apply``.
        TypeError: the column holds no text.

    Source: CFT-contextual (2025) arXiv:2503.09032 (learning strategies as prefixes)
    Source: AnyTaskTune (2024) arXiv:2407.07094 (a fixed instruction per sub-task)
    Basis: authors' code for the form of a contextual row (prompt in, text out); AnyTaskTune's abstract.
    Differs: the wording of every template is ours.

    Example:
        >>> row = retarget({"text": "Ice floats."}, "Read with care.\n\n", completion="text")
        >>> row["prompt"], row["completion"]
        ('Read with care.\n\n', 'Ice floats.')
    """
    text = row.get(completion)
    if text is None:
        raise ValueError(
            f"retarget: expected a column {completion!r}, got {sorted(row)}. Name the column in completion=."
        )
    if not isinstance(text, str):
        raise TypeError(
            f"retarget: expected {completion} as text, got {type(text).__name__}. Render messages first."
        )
    prompt = prompts.apply(template, row, fields=fields, chat=chat)
    new = [{"role": "assistant", "content": text}] if chat else text
    return {**row, "prompt": prompt, "completion": new}


def pack_shots(
    rows: Sequence[Mapping[str, Any]], *, rng: random.Random | None = None, sep: str | None = None
) -> dict[str, Any]:
    r"""One row of n solved questions of one task, each seen behind those before it.

    $-\sum_{i=1}^n \log p(y_i \mid x_1, y_1, \dots, x_{i-1}, y_{i-1}, x_i)$: one pass trains the task with
    0, 1, ..., n - 1 shots.

    Without ``sep`` the shots are turns of a chat and every completion is a target; the objectives differ in
    the mask alone, which ``turns`` of `tokens.encode` gives: all answers ``labels != -100``; the last one
    ``(labels != -100) & (turns == turns.amax(1, keepdim=True))``; whole examples, from the second question
    on, ``turns > 0``.

    With ``sep`` the shots are one text: all but the last completion are part of the prompt, so only the last
    is a target. That is the few-shot prompt, and the baseline of the paper.

    Args:
        rows: n >= 1 rows of one task. An instruction that all of them carry as a system message is kept once,
            at the start.
        rng: draws the order of the shots. None: as given. Which rows share a sequence is the caller's draw,
            ``rng.sample(rows, n)``.
        sep: text between shots ("\n\n"), for rows whose prompt and completion are text. None: turns.

    Returns:
        A row: ``prompt`` and ``completion`` of the pack, other columns those of the last shot.

    Raises:
        ValueError: no rows; system messages that differ.
        TypeError: ``sep`` with messages; text and messages mixed.

    Source: ManyICL (2025) arXiv:2506.11103 (abstracts of both versions)
    Basis: second-hand; the two versions disagree on what is a target (every answer, every example), so both
        masks are given.
    Differs: the loss is divided by the number of target tokens, end tokens included (our choice).

    Example:
        >>> shots = [{"prompt": "1>", "completion": "2"}, {"prompt": "5>", "completion": "6"}]
        >>> pack_shots(shots, sep="\n")["prompt"], [m["content"] for m in pack_shots(shots)["completion"]]
        ('1>2\n5>', ['2', '5>', '6'])
    """
    if isinstance(rows, Mapping | str) or not rows:
        raise ValueError("pack_shots: expected a list of at least one row, got none. Pass [row].")
    for i, row in enumerate(rows):
        if not {"prompt", "completion"} <= set(row):
            raise ValueError(f"pack_shots: expected prompt and completion in row {i}, got {sorted(row)}.")
    shots = list(rows) if rng is None else rng.sample(list(rows), len(rows))
    last = shots[-1]
    if sep is not None:
        for row in shots:
            for name in ("prompt", "completion"):
                if not isinstance(row[name], str):
                    raise TypeError(
                        f"pack_shots: expected {name} as text with sep=, got {type(row[name]).__name__}. "
                        f"Leave sep out: messages become turns."
                    )
        head = "".join(f"{row['prompt']}{row['completion']}{sep}" for row in shots[:-1])
        return {**last, "prompt": head + last["prompt"]}
    prompt, completion = _messages(shots[0])
    system = [m for m in prompt if m["role"] == "system"]
    for row in shots[1:]:
        asked, solved = _messages(row)
        if [m for m in asked if m["role"] == "system"] != system:
            raise ValueError(
                "pack_shots: expected one task, got rows with different system messages. Pack them apart."
            )
        completion += [m for m in asked if m["role"] != "system"] + solved
    return {**last, "prompt": prompt, "completion": completion}


def code_switch(
    text: str,
    mapping: Mapping[str, str],
    *,
    rate: float = 1.0,
    whole_words: bool = True,
    rng: random.Random | None = None,
) -> str:
    r"""A text in which fragments are replaced by their translations, each with probability ``rate``.

    In xCoT the questions of the demonstrations are switched, never an answer:
    ``row | {"prompt": code_switch(row["prompt"], mapping, rate=0.5, rng=rng)}``. With rate 1 and a mapping of
    all words it is a toy second language.

    Args:
        text: what to switch.
        mapping: fragment (word or phrase) to its translation. Fragments are looked for from left to right,
            the longest first, with their own capitals; a translation is not looked at again.
        rate: probability in [0, 1] that a fragment found is replaced. 0: the text itself; 1: all of them.
        whole_words: a fragment inside a longer word or number does not count. False for scripts without
            spaces, or to relabel single characters.
        rng: source of randomness, one draw per fragment found; needed for 0 < rate < 1.

    Returns:
        The text, everything outside the replaced fragments as it was.

    Raises:
        ValueError: a rate outside [0, 1] or between them without ``rng``; an empty fragment.
        TypeError: ``text`` is no string.

    Source: xCoT (2024) arXiv:2401.07037 (code-switched demonstrations, xICL)
    Basis: second-hand; no code was released.
    Differs: the paper aligns fragments of two translations; the alignment is the caller's mapping here.

    Example:
        >>> code_switch("add two and twenty", {"two": "deux", "twenty": "vingt", "add": "ajoute"})
        'ajoute deux and vingt'
    """
    if not isinstance(text, str):
        raise TypeError(f"code_switch: expected text as a string, got {type(text).__name__}.")
    between("code_switch", 0, 1, rate=rate)
    if "" in mapping:
        raise ValueError("code_switch: expected fragments of at least one character, got an empty one.")
    if 0 < rate < 1 and rng is None:
        raise ValueError(
            f"code_switch: expected rng with rate={rate}, got None. Pass rng=random.Random(seed)."
        )
    if not mapping or rate == 0:
        return text
    lengths: dict[str, list[int]] = {}  # by first character, longest first
    for first, n in sorted({(fragment[0], len(fragment)) for fragment in mapping}, reverse=True):
        lengths.setdefault(first, []).append(n)
    solid = [c.isalnum() for c in text]
    word = [s or c == "_" for s, c in zip(solid, text, strict=True)] + [False]

    def fits(start: int, end: int) -> bool:
        if end > len(text) or text[start:end] not in mapping:
            return False
        inside = (start > 0 and word[start - 1] and solid[start]) or (word[end] and solid[end - 1])
        return not (whole_words and inside)

    pieces, done = [], 0
    for start, c in enumerate(text):
        if start < done:
            continue
        end = next((start + n for n in lengths.get(c, ()) if fits(start, start + n)), None)
        if end is None:
            continue
        switched = rate == 1 or (rng is not None and rng.random() < rate)
        pieces += [text[done:start], mapping[text[start:end]] if switched else text[start:end]]
        done = end
    return "".join([*pieces, text[done:]])


def _messages(row: Mapping[str, Any]) -> tuple[list[dict], list[dict]]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        raise TypeError("pack_shots: expected prompt as messages like completion, got text. Wrap it.")
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return list(prompt), list(completion)
