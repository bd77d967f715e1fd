"""From rows to tokens: the text the model sees, the part of each character, and where tokens must split.

A row becomes *pieces*, ``(text, codes)`` with one code (segment, step, turn) per character. A piece begins
wherever the model begins to write, so that its tokens are those of the sampling side: the prompt's never
merge with the completion's.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

PAD, PROMPT, THOUGHT, ANSWER, SPECIAL, TOOL = range(6)

Code = tuple[int, int, int]
Piece = tuple[str, list[Code]]

_PROBE, _THOUGHT, _MARK = "cotkitprobe", "cotkitthought", "cotkitmark{}end"
_SAID = {"role": "assistant", "content": _PROBE}
_TOOL_ROLES = ("tool", "function", "ipython")
# put in front of a piece, so that it is not read as the beginning of a text
_BEFORE = ("\n", "a", ".", "0", " ")


def check_tokenizer(fn: str, tokenizer: Any) -> None:
    """Raise unless the tokenizer is a fast one with an end token."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{fn}: expected a fast tokenizer (character offsets), got {type(tokenizer).__name__}. "
            f"Load it with transformers.AutoTokenizer."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{fn}: expected a tokenizer with an end token, got none. Set tokenizer.eos_token.")


def row_pieces(where: str, row: Any, tokenizer: Any, fmt: Any) -> tuple[list[Piece], list[str], bool]:
    """Pieces of a row (prompt, completion, prompt, ...), the completions' texts, and whether it is a chat."""
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: expected a dict with prompt and completion, got {type(row).__name__}.")
    for name in ("prompt", "completion"):
        if name not in row:
            raise ValueError(
                f"{where}: expected prompt and completion, got {sorted(row)}. Rename the columns."
            )
    prompt, completion = row["prompt"], row["completion"]
    kinds = [_kind(where, name, value) for name, value in (("prompt", prompt), ("completion", completion))]
    if kinds == ["messages", "text"]:
        completion = [{"role": "assistant", "content": completion}]
    elif kinds == ["text", "messages"]:
        raise ValueError(
            f"{where}: expected prompt as messages too, got a string. Wrap it in a user message."
        )
    if kinds[0] == "text":
        body = completion.removesuffix(tokenizer.eos_token)
        pieces: list[Piece] = [(prompt, [(PROMPT, -1, 0)] * len(prompt)), (body, _body(body, fmt, 1, 0))]
        texts = [body]
    else:
        pieces, texts = _chat(where, list(prompt), list(completion), row, tokenizer, fmt)
    for text, _ in pieces:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(
                f"{where}: expected text, got a lone surrogate (half a character). Repair the string."
            )
    return pieces, texts, kinds[0] == "messages"


def _kind(where: str, name: str, value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, Sequence) and all(isinstance(m, Mapping) and "role" in m for m in value):
        return "messages"
    raise TypeError(
        f"{where}: expected {name} as a string or chat messages (dicts with role), got {value!r:.80}."
    )


def _body(text: str, fmt: Any, turn: int, first: int) -> list[Code]:
    codes: list[Code] = []
    for start, end, segment, step in fmt.spans(text):
        codes += [(segment, step + first if step >= 0 else -1, turn)] * (end - start)
    return codes


def _chat(where: str, prompt: list, completion: list, row: Mapping, tokenizer: Any, fmt: Any) -> tuple:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: expected a tokenizer with a chat template, got none. Set tokenizer.chat_template."
        )
    while completion and completion[0]["role"] != "assistant":
        prompt.append(completion.pop(0))
    if not completion or completion[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: expected a completion that ends with an assistant message, got none there."
        )

    def render(messages: list, generate: bool) -> str:
        from jinja2 import TemplateError

        extra = row.get("chat_template_kwargs") or {}
        try:
            return tokenizer.apply_chat_template(
                messages, tools=row.get("tools"), tokenize=False, add_generation_prompt=generate, **extra
            )
        except TemplateError as error:
            roles = " ".join(str(m["role"]) for m in messages)
            raise ValueError(
                f"{where}: expected messages that the chat template takes, got {roles}: {error}. "
                f"Reorder or merge them (a system text can go in front of the first user message)."
            ) from error

    pieces: list[Piece] = []
    texts: list[str] = []
    given, tail, first = prompt, "", 0
    for turn, message in enumerate(completion, len(prompt)):
        if message["role"] == "assistant":
            head = render(given, True) if given else ""
            if pieces:
                said = max(i for i, m in enumerate(given) if m["role"] == "assistant")
                told = [*given[:said], _SAID]
                text, frame = (
                    render([*told, *after], True).rpartition(_PROBE)[2]
                    for after in (given[said + 1 :], _marked(given[said + 1 :], said + 1))
                )
                pieces[-1] = _join(pieces[-1], _bridge(text, frame, tail, said, given, tokenizer.eos_token))
            else:
                frame = render(_marked(given, 0), True) if given else ""
                pieces.append((head, _placed(head, [(PROMPT, -1, -1)] * len(head), 0, given, frame)))
            lead, found, tail = render([*given, _SAID], False).rpartition(_PROBE)
            if not found:
                raise ValueError(
                    f"{where}: expected a chat template that shows assistant messages, got one that "
                    f"drops them. Repair tokenizer.chat_template."
                )
            lead = lead[len(head) :] if lead.startswith(head) else ""
            if any(tag and tag in lead for tag in (fmt.open, fmt.close)):
                lead = ""  # an empty thought that the template puts in front of plain content
            body = _message_text(where, message, fmt, given, render)
            body = _without_end(body, tail, tokenizer.eos_token)
            closed, body = _after_prefill(where, body, head, fmt)
            codes = _body(closed + body, fmt, turn, first)[len(closed) :]
            first = max([first, *(step + 1 for _, step, _ in codes)])
            pieces.append((lead + body, [(SPECIAL, -1, turn)] * len(lead) + codes))
            texts.append(closed + body)
        given = [*given, message]
    tail = tail.partition(tokenizer.eos_token)[0].rstrip()
    pieces[-1] = _join(pieces[-1], (tail, [(SPECIAL, -1, turn)] * len(tail)))
    return pieces, texts


def _message_text(
    where: str, message: Mapping, fmt: Any, given: list, render: Callable[[list, bool], str]
) -> str:
    """The text of an assistant message, its separate thought (``reasoning_content``) put into tags.

    A template that writes such a thought shows which tags and line breaks the model expects.
    """
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise TypeError(f"{where}: expected an assistant message of text, got {content!r:.80}.")
        content = "".join(part["text"] for part in content)
    if message.get("tool_calls"):
        raise ValueError(
            f"{where}: expected tool calls written in content, got tool_calls. Write them as text."
        )
    field = next((f for f in ("reasoning_content", "thinking") if message.get(f)), None)
    if field is None:
        return content
    thought = message[field]
    if not fmt.close:
        return f"{thought}\n{content}"
    lead, _, rest = render([*given, {**_SAID, field: _THOUGHT}], False).partition(_THOUGHT)
    behind, shown, _ = rest.partition(_PROBE)
    at = lead.rfind(fmt.open) if fmt.open else -1
    if not shown or at < 0 or fmt.close not in behind:
        return f"{fmt.open}\n{thought.strip()}\n{fmt.close}\n{content}"
    return lead[at:] + thought.strip() + behind + (content.lstrip("\n") if behind.endswith("\n") else content)


def _without_end(body: str, tail: str, eos: str) -> str:
    """Drop the end of the turn from a text that already holds it, as a model's sample may."""
    for mark in (eos, tail.partition(eos)[0].strip()):
        if mark and body.rstrip().endswith(mark):
            body = body.rstrip().removesuffix(mark)
    return body


def _after_prefill(where: str, body: str, head: str, fmt: Any) -> tuple[str, str]:
    """The thought that the prompt has closed already ("": none), and the body without tags written twice."""
    shown, inner = head.rstrip(), body.lstrip()
    if fmt.close and shown.endswith(fmt.close):
        tagged = fmt.close in body or bool(fmt.open and fmt.open in body)
        if tagged and fmt.parse(body).thought:
            raise ValueError(
                f"{where}: expected a template that leaves the thought open, got one that ends the prompt "
                f"with {fmt.close!r}. Switch thinking on (chat_template_kwargs) or drop the thought."
            )
        inner = inner.rpartition(fmt.close)[2] if tagged else body
        return fmt.open + fmt.close, inner.lstrip("\n") if tagged and head.endswith("\n") else inner
    if not (fmt.open and shown.endswith(fmt.open) and inner.startswith(fmt.open)):
        return "", body
    inner = inner[len(fmt.open) :]
    return "", inner.lstrip("\n") if head.endswith("\n") else inner


def _marked(messages: list, number: int) -> list:
    """The messages with a mark in place of each text, so that a template shows where it puts them."""
    return [
        {**m, "content": _MARK.format(turn)} if isinstance(m.get("content"), str) else m
        for turn, m in enumerate(messages, number)
    ]


def _placed(text: str, codes: list[Code], number: int, messages: list, frame: str) -> list[Code]:
    """Put the numbers of the messages on their contents, as far as the template shows them word for word.

    ``frame`` is the same text with a mark in place of each content: what stands between two marks is looked
    for first, so that a short content is not found in a role's name or a date.
    """
    at = 0
    for turn, message in enumerate(messages, number):
        content = message.get("content")
        content = content.strip() if isinstance(content, str) else ""
        lead, mark, rest = frame.partition(_MARK.format(turn))
        begin = text.find(lead, at) + len(lead) if mark and lead in text[at:] else at
        frame = rest if mark else frame
        found = text.find(content, begin) if content else -1
        if found < 0 or (mark and text[begin:found].strip()):
            at = begin  # not shown, or changed by the template
            continue
        at = found + len(content)
        segment = TOOL if number and message["role"] in _TOOL_ROLES else PROMPT
        codes[found:at] = [(segment, -1, turn)] * len(content)
    return codes


def _bridge(text: str, frame: str, tail: str, said: int, given: list, eos: str) -> Piece:
    """Between two completions: the end of the turn (to be written), then other messages (given)."""
    pairs = enumerate(zip(text, tail, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(text), len(tail)))
    end = text.find(eos)
    written = end + len(eos) if 0 <= end < shared else len(text[:shared].rstrip())
    codes = [(SPECIAL, -1, said)] * written + [(PROMPT, -1, -1)] * (len(text) - written)
    return text, _placed(text, codes, said + 1, given[said + 1 :], frame)


def _join(a: Piece, b: Piece) -> Piece:
    return a[0] + b[0], a[1] + b[1]


def tokenize(where: str, tokenizer: Any, pieces: list[Piece], *, chat: bool) -> tuple[list[int], list[Code]]:
    """Ids and one code per token of the pieces in a row, the end token added."""
    first = pieces[0][0]
    ids = [] if chat else _front(tokenizer)
    codes: list[Code] = [(PROMPT, -1, -1)] * len(ids)
    if not ids and not first:
        raise ValueError(
            f"{where}: expected a prompt, got none and a tokenizer that adds no start token. "
            f"Nothing would predict the first token; give the prompt at least one token."
        )
    before = ""
    seen: list[int] = []
    for text, marks in pieces:
        new, new_codes = _extend(tokenizer, before, seen, text, marks)
        before, seen, codes = before + text, seen + new, codes + new_codes
    ids = [*ids, *seen, tokenizer.eos_token_id]
    return ids, [*codes, (SPECIAL, -1, pieces[-1][1][-1][2] if pieces[-1][1] else 1)]


def _front(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts in front of every text."""
    plain, full = _ids(tokenizer, "a")[0], list(tokenizer("a")["input_ids"])
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


def _ids(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(out["input_ids"]), [tuple(o) for o in out["offset_mapping"]]


def _extend(
    tokenizer: Any, before: str | None, seen: list[int], text: str, codes: list[Code]
) -> tuple[list[int], list[Code]]:
    """Tokens of ``text`` behind ``before`` (ids: ``seen``; None: unknown); none crosses segments or steps."""
    if not text:
        return [], []
    fronts: list[tuple[str, list[int] | None]] = [] if before is None else [(before, seen)]
    for front, front_ids in [*fronts, *((s, None) for s in _BEFORE)]:
        known = _ids(tokenizer, front)[0] if front_ids is None else front_ids
        ids, offsets = _ids(tokenizer, front + text)
        if ids[: len(known)] == known:
            ids, offsets, shift = ids[len(known) :], offsets[len(known) :], len(front)
            break
    else:
        (ids, offsets), shift = _ids(tokenizer, text), 0
    marks, cuts = [], []
    for start, end in offsets:
        start, end = max(start - shift, 0), max(end - shift, 0)
        visible = [i for i in range(start, end) if not text[i].isspace()]
        at = visible[0] if visible else min(start, len(text) - 1)
        if any(codes[i][:2] != codes[at][:2] for i in visible):
            cuts.append(next(i for i in range(at, end) if codes[i][:2] != codes[at][:2]))
        marks.append(codes[at])
    if not cuts:
        return ids, marks
    ids, marks = [], []
    for a, b in pairwise([0, *cuts, len(text)]):  # all at once: a long thought may need many
        new = _extend(tokenizer, None if a else before, seen, text[a:b], codes[a:b])
        ids, marks = ids + new[0], marks + new[1]
    return ids, marks


def parts_lost(before: list[Code], after: list[Code]) -> str:
    """Which of "thought answer" truncation took away entirely; ends with "all" when both are gone."""
    was, now = {code[0] for code in before}, {code[0] for code in after}
    names = [name for part, name in ((THOUGHT, "thought"), (ANSWER, "answer")) if part in was - now]
    nothing = names and not now & {THOUGHT, ANSWER}
    return " ".join([*names, "all"] if nothing else names)


def shortened(texts: list[str]) -> str:
    """Texts for a message, the middle of a long one left out."""
    text = "\n".join(texts)
    return repr(text if len(text) < 200 else text[:100] + " ... " + text[-90:])
