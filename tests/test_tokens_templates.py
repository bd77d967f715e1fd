"""Segments, masks and turns under chat templates in the style of current models, written here by hand.

The markers are special tokens of the tokenizer, as they are in the models' own, or plain text.
"""

import time

import pytest
import torch

from cotkit import lab
from cotkit.tokens import ANSWER, PAD, PROMPT, SPECIAL, THOUGHT, TOOL, encode, mask

EACH = "{% for m in messages %}"
# Qwen3: ChatML; thoughts before the last user message are dropped, the last message shows one, empty or not,
# and without thinking the prompt ends with an empty one.
QWEN = (
    "{% set ns = namespace(last=-1) %}" + EACH + "{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + EACH + "{% if m.role == 'assistant' %}"
    "{% set said = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ said.lstrip('\n') }}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n"
    "<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# R1-distill: a start token, a bare system text, thoughts dropped from what was said, and a prefilled tag.
R1 = (
    "<start>"
    + EACH
    + "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'assistant' %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# Llama 3: a header per message, trimmed contents, and a system block with dates even where there is none.
LLAMA = (
    "<start>{% set first = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "<|header|>system<|/header|>\n\nUp to 12 2023, today is 26 Jul 2024\n\n{{ first }}<|eot|>" + EACH + ""
    "{% if m.role != 'system' %}<|header|>{{ 'ipython' if m.role == 'tool' else m.role }}<|/header|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
# Gemma: the assistant is called model, no system role, strict alternation; the end of a turn is not the end
# token.
GEMMA = (
    "<start>" + EACH + "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('not alternating') }}{% endif %}"
    "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|/turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
R1_MARKS = ["<start>", "<|User|>", "<|Assistant|>", "<|end|>"]
# name: template, markers, end token (None: the tokenizer's own)
STYLES = {
    "qwen": (QWEN, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "r1": (R1, R1_MARKS, "<|end|>"),
    "r1, nothing prefilled": (R1.replace("<think>\n", ""), R1_MARKS, "<|end|>"),
    "llama": (LLAMA, ["<start>", "<|header|>", "<|/header|>", "<|eot|>"], "<|eot|>"),
    "gemma": (GEMMA, ["<start>", "<|turn|>", "<|/turn|>"], None),
}  # fmt: skip
HEADER = "<|header|>{}<|/header|>\n\n"
LLAMA_SYSTEM = "<start>" + HEADER.format("system") + "Up to 12 2023, today is 26 Jul 2024\n\n"
OPENS = {
    "qwen": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "r1": ("<start><|User|>", "<|Assistant|><think>\n"),
    "r1, nothing prefilled": ("<start><|User|>", "<|Assistant|>"),
    "llama": (LLAMA_SYSTEM + "<|eot|>" + HEADER.format("user"), "<|eot|>" + HEADER.format("assistant")),
    "gemma": ("<start><|turn|>user\n", "<|/turn|>\n<|turn|>model\n"),
}
ENDS = {"qwen": "<|im_end|>", "r1": "<|end|>", "r1, nothing prefilled": "<|end|>", "llama": "<|eot|>"}
ENDS["gemma"] = "<|/turn|>"
NEXT = {  # from the end of a turn to the text of the next user message
    "qwen": "\n<|im_start|>user\n",
    "r1": "<|User|>",
    "r1, nothing prefilled": "<|User|>",
    "llama": HEADER.format("user"),
    "gemma": "\n<|turn|>user\n",
}


def styled(name, *, special=True):
    tokenizer = lab.load("tiny")[1]
    tokenizer.chat_template, marks, end = STYLES[name]
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        tokenizer.eos_token = end or tokenizer.eos_token
    return tokenizer


def parts(batch, tokenizer, row=0):
    """The row as runs of one segment and turn, each decoded: (segment, turn, text)."""
    ids, segments, turns = (batch[k][row].tolist() for k in ("input_ids", "segments", "turns"))
    runs = []
    for token, segment, turn in zip(ids, segments, turns, strict=True):
        if segment == PAD:
            break
        if not runs or runs[-1][:2] != (segment, turn):
            runs.append((segment, turn, []))
        runs[-1][2].append(token)
    return [(s, t, tokenizer.decode(x)) for s, t, x in runs]


def consistent(batch):
    target = batch["labels"] != -100
    assert torch.equal(target, mask(batch["segments"], THOUGHT, ANSWER, SPECIAL))
    assert torch.equal(batch["labels"][target], batch["input_ids"][target])
    assert torch.equal(batch["attention_mask"] == 1, batch["segments"] != PAD)
    assert torch.equal(batch["steps"] >= 0, batch["segments"] == THOUGHT)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **columns):
    return {"role": "assistant", "content": text, **columns}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", STYLES)
def test_two_turns_part_by_part(name, special):
    """Contents are chosen to occur in the markers too: "user" is a role, "26" stands in a date."""
    tokenizer = styled(name, special=special)
    row = {
        "prompt": [user("user")],
        "completion": [
            assistant("<think>\n2+3=5\nso 5\n</think>\n\n5"),
            user("26"),
            assistant("<think>\n5*2=10\n</think>\n\nIt is 10."),
        ],
    }
    batch = encode([row], tokenizer)
    consistent(batch)
    (opens, said), end, after = OPENS[name], ENDS[name], NEXT[name]
    last = end if special and STYLES[name][2] else end + "<eos>"
    tag = [] if name == "r1" else [(SPECIAL, 1, "<think>\n")]
    tag_2 = [] if name == "r1" else [(SPECIAL, 3, "<think>\n")]
    assert parts(batch, tokenizer) == [
        (PROMPT, -1, opens), (PROMPT, 0, "user"), (PROMPT, -1, said),
        *tag, (THOUGHT, 1, "2+3=5\nso 5"), (SPECIAL, 1, "\n</think>\n\n"), (ANSWER, 1, "5"),
        (SPECIAL, 1, end), (PROMPT, -1, after), (PROMPT, 2, "26"), (PROMPT, -1, said),
        *tag_2, (THOUGHT, 3, "5*2=10"), (SPECIAL, 3, "\n</think>\n\n"), (ANSWER, 3, "It is 10."),
        (SPECIAL, 3, last),
    ]  # fmt: skip
    steps = [tokenizer.decode(batch["input_ids"][0][batch["steps"][0] == k]) for k in range(4)]
    assert steps == ["2+3=5\n", "so 5", "5*2=10", ""]
    # the prompt's ids are those of the sampling side
    head = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    head_ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][0, : len(head_ids)].tolist() == head_ids
    assert (batch["segments"][0, : len(head_ids)] == PROMPT).all()
    if name == "r1":  # the same without the tag that is prefilled, and with a thought of its own field
        bare = [dict(m) for m in row["completion"]]
        bare[0]["content"] = bare[0]["content"].removeprefix("<think>\n")
        again = encode([row | {"completion": bare}], tokenizer)
        assert all(torch.equal(batch[k], again[k]) for k in batch)


@pytest.mark.parametrize("name", ["qwen", "r1", "llama"])
def test_a_system_text_and_a_history_keep_their_numbers(name):
    """What the template drops or changes (a thought of the history) gets no number, and no one else's."""
    tokenizer = styled(name)
    row = {
        "prompt": [
            {"role": "system", "content": "7"},
            user("26 ducks"),
            assistant("<think>\nold\n</think>\n\n7"),
            user("7"),
        ],
        "completion": [assistant("<think>\nnew\n</think>\n\n5")],
    }
    batch = encode([row], tokenizer)
    consistent(batch)
    found = [
        (turn, text) for segment, turn, text in parts(batch, tokenizer) if segment == PROMPT and turn >= 0
    ]
    history = [(2, "<think>\nold\n</think>\n\n7")] if name == "llama" else []
    assert found == [(0, "7"), (1, "26 ducks"), *history, (3, "7")]
    text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    prompt = batch["input_ids"][0][batch["segments"][0] == PROMPT]
    assert tokenizer.decode(prompt) == text
    assert {t for s, t, _ in parts(batch, tokenizer) if s in (THOUGHT, ANSWER, SPECIAL)} == {4}


@pytest.mark.parametrize(("name", "content"), [("qwen", "response"), ("llama", "ipython")])
def test_tool_output_is_no_target_and_found_where_it_is(name, content):
    tokenizer = styled(name)
    row = {
        "prompt": [user("26 ducks")],
        "completion": [
            assistant("<think>\nold\n</think>\n\ncall"),
            {"role": "tool", "content": content},
            assistant("<think>\nnew\n</think>\n\n7"),
        ],
    }
    batch = encode([row], tokenizer)
    consistent(batch)
    runs = parts(batch, tokenizer)
    at = next(i for i, (segment, _, _) in enumerate(runs) if segment == TOOL)
    assert runs[at] == (TOOL, 2, content)
    before, after = {
        "qwen": (
            "\n<|im_start|>user\n<tool_response>\n",
            "\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        "llama": (HEADER.format("ipython"), "<|eot|>" + HEADER.format("assistant")),
    }[name]
    assert (runs[at - 1], runs[at + 1]) == ((PROMPT, -1, before), (PROMPT, -1, after))
    assert not (mask(batch["segments"], THOUGHT, ANSWER, SPECIAL) & (batch["segments"] == TOOL)).any()


def test_a_thought_of_its_own_field_is_written_as_the_template_writes_it():
    rows = [
        {"prompt": [user("x")], "completion": [assistant("5", reasoning_content="2+3=5\nso 5")]},
        {"prompt": [user("x")], "completion": [assistant("<think>\n2+3=5\nso 5\n</think>\n\n5")]},
        {"prompt": [user("x")], "completion": [assistant("<think>\n2+3=5\nso 5\n</think>\n5")]},
    ]
    for name, same in (("qwen", 1), ("llama", 2), ("r1", 2), ("gemma", 2)):  # the others know no such field
        tokenizer = styled(name)
        batch = encode(rows, tokenizer)
        assert parts(batch, tokenizer, 0) == parts(batch, tokenizer, same)
        assert parts(batch, tokenizer, 0) != parts(batch, tokenizer, 3 - same)
    tokenizer = styled("qwen")
    whole = tokenizer.apply_chat_template([*rows[0]["prompt"], *rows[0]["completion"]], tokenize=False)
    assert tokenizer.decode(encode(rows[:1], tokenizer)["input_ids"][0]) == whole.rstrip()


@pytest.mark.parametrize("text", ["5", "<think>\n\n</think>\n\n5", "\n</think>\n\n5"])
def test_thinking_switched_off(text):
    """The prompt ends with an empty thought: it is not written again, and the answer is no thought."""
    tokenizer = styled("qwen")
    row = {"prompt": [user("x")], "completion": text, "chat_template_kwargs": {"enable_thinking": False}}
    batch = encode([row], tokenizer)
    assert parts(batch, tokenizer)[-3:] == [
        (PROMPT, -1, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (ANSWER, 1, "5"),
        (SPECIAL, 1, "<|im_end|>"),
    ]
    assert not (batch["steps"] >= 0).any()


@pytest.mark.parametrize("name", STYLES)
def test_the_end_of_a_turn_in_the_text_is_not_doubled(name):
    tokenizer = styled(name)
    text = "<think>\na\n</think>\n\n5"
    rows = [
        {"prompt": [user("x")], "completion": text + end}
        for end in ("", ENDS[name], ENDS[name] + "\n", tokenizer.eos_token)
    ]
    batch = encode(rows, tokenizer)
    assert all(torch.equal(batch["input_ids"][0], ids) for ids in batch["input_ids"][1:])
    assert all(torch.equal(batch["segments"][0], s) for s in batch["segments"][1:])
    if name == "gemma":
        both = encode([rows[1] | {"completion": rows[1]["completion"] + "<eos>"}], tokenizer)
        assert torch.equal(both["input_ids"], batch["input_ids"][:1])


def long_row(turns=1):
    steps = [f"step {i}: {i % 97} + {i % 89} = {i % 97 + i % 89} so we go on" for i in range(700)]
    said = assistant("<think>\n" + "\n".join(steps) + "\n</think>\n\n10")
    return steps, {"prompt": [user("x")], "completion": [said, user("again"), said][: 2 * turns - 1]}


@pytest.mark.parametrize("name", STYLES)
def test_a_thought_of_16k_tokens(name):
    tokenizer = styled(name)
    steps, row = long_row()
    begun = time.perf_counter()
    batch = encode([row], tokenizer)
    assert time.perf_counter() - begun < 5
    consistent(batch)
    length = batch["input_ids"].shape[1]
    assert length > 16_000
    ids, segments = batch["input_ids"][0], batch["segments"][0]
    assert tokenizer.decode(ids[segments == THOUGHT]) == "\n".join(steps)
    assert tokenizer.decode(ids[segments == ANSWER]) == "10"
    for k in (0, 1, 350, 699):
        assert tokenizer.decode(ids[batch["steps"][0] == k]).strip() == steps[k]
    with pytest.raises(ValueError, match=r"max_length=16000.*answer tokens"):
        encode([row], tokenizer, max_length=16_000)
    cut = encode([row], tokenizer, max_length=16_000, malformed="keep")
    assert cut.pop("malformed").tolist() == [True]
    assert all(torch.equal(cut[k], batch[k][:, :16_000]) for k in cut)


def test_two_long_turns_cut_in_the_second():
    tokenizer = styled("qwen")
    steps, row = long_row(turns=2)
    begun = time.perf_counter()
    batch = encode([row], tokenizer)
    assert time.perf_counter() - begun < 5
    assert int(batch["steps"].max()) == 2 * len(steps) - 1
    cut = encode([row], tokenizer, max_length=25_000)  # an answer is left, the first turn's
    assert all(torch.equal(cut[k], batch[k][:, :25_000]) for k in cut)
    consistent(cut)


def test_many_tokens_across_steps_are_split_without_deep_recursion():
    """A tokenizer whose tokens run over line breaks, and a split for each of 1,500 steps."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["k\ns"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    assert len(tokenizer("k\ns")["input_ids"]) == 1
    steps = [f"s{i}k" for i in range(1500)]
    row = {"prompt": "x", "completion": "<think>" + "\n".join(steps) + "</think>10"}
    batch = encode([row], tokenizer)
    consistent(batch)
    ids = batch["input_ids"][0]
    for k in (0, 1, 777, 1499):
        assert tokenizer.decode(ids[batch["steps"][0] == k]).strip() == steps[k]
    assert tokenizer.decode(ids) == "x" + row["completion"] + "<eos>"


@pytest.mark.errors
def test_what_a_template_refuses_is_said_by_row():
    tokenizer = styled("gemma")
    good = {"prompt": [user("x")], "completion": "<think>\na\n</think>\n5"}
    for messages, match in (
        ([{"role": "system", "content": "s"}, user("x")], r"row 1: .*got system user: no system role"),
        ([user("x"), user("y")], r"row 1: .*got user user: not alternating"),
    ):
        with pytest.raises(ValueError, match=match):
            encode([good, good | {"prompt": messages}], tokenizer)
    off = {"prompt": [user("x")], "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(ValueError, match="leaves the thought open"):
        encode([off | {"completion": "<think>\na\n</think>\n5"}], styled("qwen"))
