import functools
import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cotkit.tokens import ANSWER, FORMATS, PAD, PROMPT, SPECIAL, THOUGHT, TOOL, Format, encode, mask

SPECIALS = ["<pad>", "<eos>", "<s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Question: what is 2+3? <think>\n2+3=5\n5*2=10\n</think>\n10",
    "<think>Janet has 3 ducks.\nShe eats 4 eggs; 16-4=<<16-4=12>>12\n#### 12",
    "The answer is 12. \\boxed{12} user assistant system Hello there, it's é ü 😀",
    "[INST] [/INST] User: Assistant: <response></response>",
]
ROWS = [
    {"prompt": "What is 2+3?", "completion": "<think>\n2+3=5\n5*2=10\n</think>\n10"},
    {"prompt": "Ducks\n", "completion": "<think>Janet has 3 ducks.\nShe eats é😀</think>12 eggs"},
    {"prompt": "x ", "completion": "Janet\n</think>12"},
]


def _wrap(tokenizer, template=None, **special):
    from transformers import PreTrainedTokenizerFast

    special = {"eos_token": "<eos>", "pad_token": "<pad>", **special}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    return fast


def byte_level(template=None, **options):
    return _wrap(_byte_level(**options), template)


@functools.cache
def _byte_level(*, split=True, tags=False, size=420, trim=False, bos=False):
    """Byte-level BPE; without ``split`` there is no pre-tokenizer and tokens run across tags and lines."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    t.decoder = decoders.ByteLevel()
    extra = ["<think>", "</think>"] if tags else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS + extra, initial_alphabet=alphabet),
    )
    steps = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if bos:
        steps.append(
            processors.TemplateProcessing(single="<s> $A <eos>", special_tokens=[("<s>", 2), ("<eos>", 1)])
        )
    if steps:
        t.post_processor = processors.Sequence(steps)
    return t


def metaspace(template=None, **options):
    return _wrap(_metaspace(**options), template, unk_token="<unk>")


@functools.cache
def _metaspace(*, prepend="always", kind="unigram"):
    t = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>"))
    t.normalizer = normalizers.NFKC()
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    t.decoder = decoders.Metaspace(prepend_scheme=prepend)
    specials = [*SPECIALS, "<unk>"]
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    else:
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials)
    t.train_from_iterator(CORPUS, trainer)
    return t


def word_level(template=None):
    t = Tokenizer(models.WordLevel(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=[*SPECIALS, "<unk>"]))
    return _wrap(t, template, unk_token="<unk>")


TOKENIZERS = {
    "byte BPE": byte_level,
    "byte BPE, tags are tokens": lambda template=None: byte_level(template, tags=True),
    "byte BPE across everything": lambda template=None: byte_level(template, split=False, size=900),
    "byte BPE, trimmed offsets": lambda template=None: byte_level(template, trim=True),
    "byte BPE, adds start and end": lambda template=None: byte_level(template, bos=True),
    "bytes only": lambda template=None: byte_level(template, size=10),
    "unigram": metaspace,
    "unigram, prepend first": lambda template=None: metaspace(template, prepend="first"),
    "metaspace BPE": lambda template=None: metaspace(template, kind="bpe"),
}

LOOP = "{% for m in messages %}"
CHATML = (
    LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLIT = "{% set said = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
TEMPLATES = {
    "ChatML": CHATML,
    "ChatML, eos": CHATML.replace("<|im_end|>\n{% endfor", "<eos>\n{% endfor"),
    "prefills the opening tag": CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
    "prefills, no line break": CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"),
    "strips the thought": CHATML.replace("{{ m.content }}", SPLIT + "{{ said.strip() }}"),
    "prefills and strips": (
        LOOP + SPLIT + "{{ m.role }}: {{ said.strip() }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
    ),
    "puts an empty thought in front": (
        LOOP
        + SPLIT
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ said.strip() }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "wraps": (
        LOOP + "{% if m.role == 'assistant' %}<response>{{ m.content }}</response><eos>{% else %}"
        "User: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
    "no generation prompt": (
        LOOP + "{% if m.role == 'assistant' %} {{ m.content.strip() }} <eos>{% else %}"
        "[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    "no end of turn": LOOP
    + "\n{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}\nassistant: {% endif %}",
}
END = {"ChatML": "<|im_end|>", "strips the thought": "<|im_end|>", "wraps": "</response>"}


def part(tokenizer, batch, row, segment, **kwargs):
    ids = batch["input_ids"][row][batch["segments"][row] == segment]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False, **kwargs)


def consistent(batch, tokenizer):
    keys = ("input_ids", "attention_mask", "labels", "segments", "steps", "turns")
    assert set(keys) <= set(batch)
    assert len({batch[k].shape for k in keys}) == 1
    dtypes = [batch[k].dtype for k in keys]
    assert dtypes == [torch.int64] * 3 + [torch.int8] + [torch.int64] * 2
    segments, target = batch["segments"], batch["labels"] != -100
    assert torch.equal(target, mask(segments, THOUGHT, ANSWER, SPECIAL))
    assert torch.equal(batch["labels"][target], batch["input_ids"][target])
    assert torch.equal(batch["attention_mask"] == 1, segments != PAD)
    assert bool((batch["attention_mask"].diff(dim=1) <= 0).all())  # padding on the right only
    assert bool(((batch["steps"] >= 0) == (segments == THOUGHT)).all())
    assert bool((batch["turns"][target] >= 0).all())
    last = batch["attention_mask"].sum(1) - 1
    assert bool((batch["labels"].gather(1, last[:, None]) == tokenizer.eos_token_id).all())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_round_trip_under_every_tokenizer(kind):
    tokenizer = TOKENIZERS[kind]()
    batch = encode(ROWS, tokenizer)
    consistent(batch, tokenizer)
    for i, row in enumerate(ROWS):
        want = FORMATS["think"].parse(row["completion"])
        assert part(tokenizer, batch, i, THOUGHT).strip() == want.thought
        assert part(tokenizer, batch, i, ANSWER).strip() == want.answer
        prompt = tokenizer(row["prompt"])["input_ids"]
        prompt = (
            prompt[:-1] if prompt[-1] == tokenizer.eos_token_id else prompt
        )  # an added end is not the prompt's
        assert batch["input_ids"][i][batch["segments"][i] == PROMPT].tolist() == prompt
        for k, step in enumerate(want.steps):
            ids = batch["input_ids"][i][batch["steps"][i] == k]
            assert tokenizer.decode(ids).strip() == step
        alone = encode([row], tokenizer)
        n = alone["input_ids"].shape[1]
        assert all(torch.equal(batch[key][i, :n], alone[key][0]) for key in alone)  # padding changes nothing
    assert batch["turns"][0][batch["segments"][0] == THOUGHT].unique().tolist() == [1]


def test_words_round_trip_up_to_white_space():
    row = {"prompt": "Question: what", "completion": "<think>\nShe eats 4 eggs;\n</think>\n10"}
    tokenizer = word_level()
    batch = encode([row], tokenizer)
    consistent(batch, tokenizer)
    assert part(tokenizer, batch, 0, THOUGHT) == "She eats 4 eggs;"
    assert part(tokenizer, batch, 0, ANSWER) == "10"


def test_a_token_across_the_tag_is_split():
    tokenizer = byte_level(split=False, size=900)
    text = "<think>Janet has 3 ducks.</think>12"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert any(s < 7 < e for s, e in offsets)  # otherwise this test tests nothing
    batch = encode([{"prompt": "Q", "completion": text}], tokenizer)
    assert part(tokenizer, batch, 0, THOUGHT) == "Janet has 3 ducks."
    assert part(tokenizer, batch, 0, SPECIAL) == "<think></think><eos>"


@pytest.mark.parametrize(
    "kind", ["byte BPE", "byte BPE across everything", "byte BPE, adds start and end", "unigram"]
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_round_trip_under_every_template(name, kind):
    tokenizer = TOKENIZERS[kind](TEMPLATES[name])
    prompt = [{"role": "user", "content": "what is 2+3?"}]
    rows = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": ROWS[0]["completion"]}]},
        {"prompt": prompt, "completion": ROWS[0]["completion"]},  # a string after messages is the assistant's
        {
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": "10", "reasoning_content": "2+3=5\n5*2=10"}],
        },
    ]
    batch = encode(rows, tokenizer)
    consistent(batch, tokenizer)
    for key in batch:
        assert torch.equal(batch[key][0], batch[key][1])
        assert torch.equal(batch[key][0], batch[key][2])
    assert part(tokenizer, batch, 0, THOUGHT).strip() == "2+3=5\n5*2=10"
    assert part(tokenizer, batch, 0, ANSWER).strip() == "10"
    head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    head_ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][0][batch["segments"][0] == PROMPT].tolist() == head_ids
    special = part(tokenizer, batch, 0, SPECIAL).replace("▁", " ")
    assert special.count("<think>") == (0 if head.rstrip().endswith("<think>") else 1)
    assert special.count("</think>") == 1
    assert special.count("<eos>") == 1
    assert END.get(name, "") in special
    user = batch["input_ids"][0][batch["turns"][0] == 0]
    found = tokenizer.decode(
        user
    ).strip()  # the prompt is never split, even where tokens run across its parts
    assert found == "what is 2+3?" or ("across" in kind and found.endswith("is 2+3?"))


@pytest.mark.parametrize(
    "name", ["ChatML", "prefills the opening tag", "strips the thought", "wraps", "no end of turn"]
)
def test_a_conversation_keeps_every_thought(name):
    tokenizer = byte_level(TEMPLATES[name])
    row = {
        "prompt": [{"role": "system", "content": "Hello"}, {"role": "user", "content": "what is 2+3?"}],
        "completion": [
            {"role": "assistant", "content": "<think>\n2+3=5\n</think>\n5"},
            {"role": "tool", "content": "it's 12"},
            {"role": "assistant", "content": "<think>\n5*2=10\n16-4=12\n</think>\n12"},
        ],
    }
    batch = encode([row], tokenizer)
    consistent(batch, tokenizer)
    assert part(tokenizer, batch, 0, THOUGHT).strip() == "2+3=55*2=10\n16-4=12"
    assert part(tokenizer, batch, 0, TOOL).strip() == "it's 12"
    turns, segments, ids = (batch[k][0] for k in ("turns", "segments", "input_ids"))
    assert tokenizer.decode(ids[turns == 1]).strip() == "what is 2+3?"
    assert tokenizer.decode(ids[(turns == 2) & (segments == ANSWER)]).strip() == "5"
    assert tokenizer.decode(ids[(turns == 4) & (segments == ANSWER)]).strip() == "12"
    assert [tokenizer.decode(ids[batch["steps"][0] == k]).strip() for k in range(3)] == [
        "2+3=5",
        "5*2=10",
        "16-4=12",
    ]
    assert not bool(mask(batch["segments"], THOUGHT, ANSWER, SPECIAL)[batch["segments"] == TOOL].any())
    if name == "ChatML":  # the end of an inner turn is the model's to write; what follows it is not
        inner = tokenizer.decode(ids[(turns == 2) & (segments == SPECIAL)])
        assert inner == "<think>\n\n</think>\n<|im_end|>"
        want = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
        assert tokenizer.decode(ids).removesuffix("<eos>") == want.rstrip()


def test_truncation_cuts_everything_alike():
    tokenizer = byte_level()
    whole = encode(ROWS, tokenizer)
    rows = [ROWS[0]]
    end = int((whole["segments"][0] == ANSWER).nonzero()[0]) + 1
    cut = encode(rows, tokenizer, max_length=end)
    assert all(torch.equal(cut[k][0], whole[k][0, :end]) for k in cut)
    with pytest.raises(ValueError, match=r"row 0.*max_length.*answer tokens"):
        encode(rows, tokenizer, max_length=end - 1)
    late = {"prompt": "x" * 99, "completion": "<think>a</think>b"}
    with pytest.raises(ValueError, match=r"row 1.*thought answer tokens"):
        encode([{"prompt": "x", "completion": "<think>a</think>b"}, late], tokenizer, max_length=60)
    kept = encode(rows, tokenizer, max_length=end - 1, malformed="keep")
    assert kept["malformed"].tolist() == [True]
    with pytest.raises(ValueError, match="thought answer"):
        encode(rows, tokenizer, max_length=3, malformed="keep")


def test_malformed_rows_are_kept_and_counted_when_asked():
    tokenizer = byte_level()
    rows = [
        ROWS[0],
        {"prompt": "Q", "completion": "<think>\n2+3=5\n5*2"},
        {"prompt": "Q", "completion": "so 12"},
    ]
    with pytest.raises(ValueError, match=r'row 1: expected a completion that follows.*malformed="keep"'):
        encode(rows, tokenizer)
    batch = encode(rows, tokenizer, malformed="keep")
    assert batch["malformed"].tolist() == [False, True, True]
    assert part(tokenizer, batch, 1, THOUGHT) == "2+3=5\n5*2"
    assert part(tokenizer, batch, 1, SPECIAL) == "<think>\n<eos>"
    assert part(tokenizer, batch, 2, THOUGHT) == "so 12"
    consistent(batch, tokenizer)


def test_an_end_token_in_the_text_is_not_doubled():
    tokenizer = byte_level()
    plain = encode(ROWS[:1], tokenizer)
    ended = encode([ROWS[0] | {"completion": ROWS[0]["completion"] + "<eos>"}], tokenizer)
    assert torch.equal(plain["input_ids"], ended["input_ids"])


def test_other_formats_and_prompts():
    tokenizer = byte_level(bos=True)
    row = {
        "prompt": "",
        "completion": "16-4=<<16-4=12>>12\n#### 12",
    }  # the start token predicts the first one
    batch = encode([row], tokenizer, "gsm8k")
    assert part(tokenizer, batch, 0, PROMPT) == "<s>"
    assert part(tokenizer, batch, 0, THOUGHT) == "16-4=<<16-4=12>>12"
    assert part(tokenizer, batch, 0, SPECIAL) == "\n####<eos>"  # the blank is part of the answer's token
    own = Format("<reasoning>", "</reasoning>")
    row = {"prompt": "Q", "completion": "<reasoning>a</reasoning>b"}
    assert part(tokenizer, encode([row], tokenizer, own), 0, THOUGHT) == "a"


@pytest.mark.errors
def test_refusals():
    tokenizer, chat = byte_level(), byte_level(CHATML)
    user = [{"role": "user", "content": "x"}]
    for row, match, tok in [
        ({"prompt": "x"}, "row 0: expected prompt and completion", tokenizer),
        ({"prompt": "", "completion": "a</think>b"}, "expected a prompt, got none", tokenizer),
        ({"prompt": "x", "completion": "\ud800</think>b"}, "lone surrogate", tokenizer),
        ({"prompt": user, "completion": "a</think>b"}, "chat template, got none", tokenizer),
        ({"prompt": "x", "completion": user}, "prompt as messages too", chat),
        ({"prompt": user, "completion": user}, "ends with an assistant message", chat),
        (
            {"prompt": user, "completion": [{"role": "assistant", "tool_calls": [1]}]},
            "tool calls written",
            chat,
        ),
        ({"prompt": user, "completion": "a</think>b"}, "drops them", byte_level("{{ messages[0].content }}")),
        (
            {"prompt": user, "completion": "<think>a</think>b"},
            "ends the prompt with '</think>'",
            byte_level(CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")),
        ),
    ]:
        with pytest.raises(ValueError, match=match):
            encode([row], tok)
    for rows, match in [(ROWS[0], r"Pass \[row\]"), ([], "non-empty"), (["x"], "row 0: expected a dict")]:
        with pytest.raises(TypeError, match=match):
            encode(rows, tokenizer)
    with pytest.raises(TypeError, match="string or chat messages"):
        encode([{"prompt": 3, "completion": "x"}], tokenizer)
    with pytest.raises(ValueError, match="fmt to be one of"):
        encode(ROWS, tokenizer, "thinking")
    with pytest.raises(ValueError, match="fast tokenizer"):
        encode(ROWS, object())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end token"):
        encode(ROWS, tokenizer)


def test_all_gsm8k_solutions_round_trip():
    root = Path(os.environ.get("COTKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / "gsm8k" / "example_model_solutions.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set COTKIT_DATA")
    rows = [
        {"prompt": line["question"] + "\n", "completion": value["solution"]}
        for line in map(json.loads, path.read_text().splitlines())
        for value in line.values()
        if isinstance(value, dict)
    ]
    assert len(rows) == 5276
    tokenizer, fmt = byte_level(size=1000), FORMATS["gsm8k"]
    batch = encode(rows, tokenizer, fmt, malformed="keep")
    consistent(batch, tokenizer)
    parts = [fmt.parse(row["completion"]) for row in rows]
    assert int(batch["malformed"].sum()) == sum(not p.ok for p in parts) == 11
    for i, want in enumerate(parts):
        assert part(tokenizer, batch, i, THOUGHT).strip() == want.thought
        assert part(tokenizer, batch, i, ANSWER).strip() == (want.answer or "")
        whole = batch["input_ids"][i][batch["segments"][i] != PAD]
        assert tokenizer.decode(whole) == rows[i]["prompt"] + rows[i]["completion"] + "<eos>"
