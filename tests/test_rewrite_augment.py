import random
import re
import time

import pytest
import torch

from cotkit import lab, tokens
from cotkit.losses.sft import nll
from cotkit.prompts import templates
from cotkit.rewrite.augment import code_switch, pack_shots, retarget

DOC = {"text": "Ice floats on water.", "id": 7}


@pytest.fixture(scope="module")
def tokenizer():
    return lab.load("tiny")[1]


def chain(a, b):
    return {
        "prompt": f"{a}+{b}?",
        "completion": f"<think>\n{a}+{b}={a + b}\n</think>\n{a + b}",
        "answer": str(a + b),
    }


# retarget


def test_retarget_prompt_from_template_completion_from_column():
    before = dict(DOC)
    row = retarget(DOC, "learn_key_ideas", completion="text")
    assert row == {**DOC, "prompt": templates()["learn_key_ideas"].text, "completion": DOC["text"]}
    assert before == DOC
    said = retarget(DOC, "Read.", completion="text", chat=True)
    assert said["prompt"] == [{"role": "user", "content": "Read."}]
    assert said["completion"] == [{"role": "assistant", "content": DOC["text"]}]


def test_retarget_empty_prefix_is_continued_pretraining():
    pretraining = {**DOC, "prompt": "", "completion": DOC["text"]}
    assert retarget(DOC, "", completion="text") == pretraining


def test_retarget_prefix_carries_no_loss_and_targets_stay(tokenizer):
    def encoded(prefix):
        row = retarget(DOC, prefix, completion="text")
        row["prompt"] = (
            "\n" + row["prompt"]
        )  # this tokenizer has no start token, so something must come first
        return tokens.encode([row], tokenizer, malformed="keep")

    plain = encoded("")
    wanted = plain["input_ids"][plain["labels"] != -100]
    assert tokenizer.decode(wanted) == DOC["text"] + tokenizer.eos_token
    for name in templates("learn"):
        batch = encoded(name)
        assert torch.equal(batch["input_ids"][batch["labels"] != -100], wanted)
        assert batch["input_ids"].shape[1] > plain["input_ids"].shape[1]


def test_retarget_strategies_change_over_epochs():
    rng, names = random.Random(0), list(templates("learn"))
    drawn = {retarget(DOC, rng.choice(names), completion="text")["prompt"] for _ in range(40)}
    assert len(drawn) > 5


def test_retarget_task_has_a_constant_prefix_and_its_declared_fields_only():
    task = {"instruction": "Name the animal.", "fields": ["title", "body"], "output": "animal"}
    rows = [{"title": f"T{i}", "body": f"the cat {i}", "animal": "cat", "secret": f"s{i}"} for i in range(3)]

    def example(row):
        given = "\n".join(f"{name}: {row[name]}" for name in task["fields"])
        return retarget(
            row,
            "task_definition",
            completion=task["output"],
            fields={"instruction": task["instruction"], "input": given},
        )

    for i, row in enumerate(rows):
        new = example(row)
        assert new["prompt"] == f"Task: Name the animal.\nInput: title: T{i}\nbody: the cat {i}\nOutput: "
        assert new["completion"] == "cat"
        assert example(row | {"secret": "other"})["prompt"] == new["prompt"]


def test_random_cot_of_xcot():
    # The question comes in one language; its translation into another one begins the target, the chain stays.
    french, german = {"two": "deux", "and": "et"}, {"two": "zwei", "and": "und"}
    languages = {"English": {}, "French": french, "German": german}
    row = {"prompt": "two and 3?", "completion": "2+3=5\n#### 5", "answer": "5"}
    rng = random.Random(1)
    for asked_in in languages:
        for _ in range(5):
            think_in = rng.choice([name for name in languages if name != asked_in])
            asked = code_switch(row["prompt"], languages[asked_in])
            target = code_switch(row["prompt"], languages[think_in]) + "\n" + row["completion"]
            new = retarget(
                row | {"prompt": asked, "restated": target},
                "cot_in_language",
                completion="restated",
                fields={"language": think_in},
            )
            assert new["prompt"].startswith(asked + "\n")
            assert think_in in new["prompt"]
            assert asked_in not in new["prompt"]
            assert new["completion"].endswith(row["completion"])
            assert not new["completion"].startswith(asked)
            assert tokens.FORMATS["gsm8k"].parse(new["completion"]).answer == "5"


@pytest.mark.errors
def test_retarget_refusals():
    with pytest.raises(ValueError, match="column 'txt'"):
        retarget(DOC, "", completion="txt")
    with pytest.raises(TypeError, match="as text"):
        retarget({"completion": []}, "")
    with pytest.raises(ValueError, match="gold column"):
        retarget(chain(2, 3), "{prompt} {answer}")


# pack_shots


def test_pack_shots_turns_and_text():
    rows = [chain(1, 2), chain(3, 4), chain(5, 1)]
    pack = pack_shots(rows)
    assert [m["role"] for m in pack["prompt"] + pack["completion"]] == ["user", "assistant"] * 3
    assert [m["content"] for m in pack["completion"]] == [
        rows[0]["completion"],
        rows[1]["prompt"],
        rows[1]["completion"],
        rows[2]["prompt"],
        rows[2]["completion"],
    ]
    assert pack["answer"] == "6"
    text = pack_shots(rows, sep="\n\n")
    shown = "".join(f"{r['prompt']}{r['completion']}\n\n" for r in rows[:2])
    assert text == {**rows[2], "prompt": shown + "5+1?"}
    assert "answer" in rows[0]
    assert isinstance(rows[0]["prompt"], str)


def test_pack_shots_of_one_row_is_the_row(tokenizer):
    row = chain(1, 2)
    assert pack_shots([row], sep="\n") == row
    messages = {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
    one, packed = (tokens.encode([r], tokenizer) for r in (messages, pack_shots([row])))
    for name in one:
        assert torch.equal(one[name], packed[name])


def test_pack_shots_targets_are_the_answers(tokenizer):
    rows = [chain(1, 2), chain(3, 4), chain(5, 1)]
    batch = tokens.encode([pack_shots(rows)], tokenizer)
    ids, turns, target = batch["input_ids"][0], batch["turns"][0], batch["labels"][0] != -100
    assert turns.unique().tolist() == [-1, 0, 1, 2, 3, 4, 5]
    for i, row in enumerate(rows):
        y = ids[target & (turns == 2 * i + 1)]
        assert tokenizer.decode(y) == row["completion"] + tokenizer.eos_token
        assert tokenizer.decode(ids[turns == 2 * i]) == row["prompt"]
        assert not target[turns == 2 * i].any()  # no label on any question
    alone = [tokens.encode([pack_shots([row])], tokenizer) for row in rows]
    assert target.sum() == sum((b["labels"] != -100).sum() for b in alone)


def test_pack_shots_objectives_are_masks(tokenizer):
    rows = [chain(1, 2), chain(3, 4), chain(5, 1)]
    batch = tokens.encode([pack_shots(rows)], tokenizer)
    answers, turns = batch["labels"] != -100, batch["turns"]
    last = answers & (turns == turns.amax(1, keepdim=True))
    assert tokenizer.decode(batch["input_ids"][last]) == rows[2]["completion"] + tokenizer.eos_token
    examples = turns > 0
    shown = tokenizer.decode(batch["input_ids"][examples])
    said = [
        rows[0]["completion"],
        rows[1]["prompt"] + rows[1]["completion"],
        rows[2]["prompt"] + rows[2]["completion"],
    ]
    assert shown == "".join(text + tokenizer.eos_token for text in said)
    assert (examples & ~answers).any()
    assert not (last & ~answers).any()
    logps = -torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    parts = [nll(logps, answers & (turns == t), denom=1) for t in (1, 3, 5)]
    assert nll(logps, answers, denom=1).item() == pytest.approx(sum(parts).item(), rel=1e-6)


def test_pack_shots_one_instruction():
    def row(word, question):
        asked = [{"role": "system", "content": word}, {"role": "user", "content": question}]
        return {"prompt": asked, "completion": [{"role": "assistant", "content": question + "!"}]}

    pack = pack_shots([row("Add.", "1"), row("Add.", "2")])
    assert [m["content"] for m in pack["prompt"] + pack["completion"]] == ["Add.", "1", "1!", "2", "2!"]


def test_pack_shots_order_is_drawn():
    rows = [chain(i, 1) for i in range(6)]
    drawn = pack_shots(rows, rng=random.Random(3), sep="\n")
    assert drawn == pack_shots(rows, rng=random.Random(3), sep="\n")
    assert drawn != pack_shots(rows, sep="\n")
    assert sorted(drawn["prompt"] + drawn["completion"]) == sorted(
        "\n".join(r["prompt"] + r["completion"] for r in rows)
    )


def test_xicl_switches_the_questions_of_the_demonstrations():
    rows = [{"prompt": f"two and {n}? ", "completion": f"two plus {n}"} for n in (1, 2, 3)]
    shots = [r | {"prompt": code_switch(r["prompt"], {"two": "deux", "and": "et"})} for r in rows[:-1]]
    pack = pack_shots([*shots, rows[-1]], sep="\n")
    assert pack["prompt"] == "deux et 1? two plus 1\ndeux et 2? two plus 2\ntwo and 3? "
    assert pack["completion"] == "two plus 3"


@pytest.mark.errors
def test_pack_shots_refusals():
    with pytest.raises(ValueError, match="at least one row"):
        pack_shots([])
    with pytest.raises(ValueError, match="at least one row"):
        pack_shots(chain(1, 2))
    with pytest.raises(ValueError, match="prompt and completion in row 1"):
        pack_shots([chain(1, 2), {"prompt": "1?"}])
    words = [
        [{"role": "system", "content": word}, {"role": "user", "content": "1"}] for word in ("Add.", "Halve.")
    ]
    with pytest.raises(ValueError, match="one task"):
        pack_shots([{"prompt": asked, "completion": "2"} for asked in words])
    with pytest.raises(TypeError, match="with sep="):
        pack_shots([pack_shots([chain(1, 2)])], sep="\n")
    with pytest.raises(TypeError, match="Wrap it"):
        pack_shots([{"prompt": "1?", "completion": [{"role": "assistant", "content": "1"}]}])


# code_switch


MAPPING = {"the cat": "le chat", "cat": "chat", "the": "le", "sat": "s'assit"}


def test_code_switch_rates():
    text = "the cat sat; the catalogue, cat-like."
    assert code_switch(text, MAPPING) == "le chat s'assit; le catalogue, chat-like."
    assert code_switch(text, MAPPING, rate=0.0) == text
    assert code_switch(text, {}) == text
    n, rng = 4000, random.Random(0)
    switched = code_switch("sat " * n, MAPPING, rate=0.3, rng=rng).count("s'assit")
    assert abs(switched / n - 0.3) < 0.03  # four standard errors


def test_code_switch_fragments():
    assert code_switch("a b", {"a": "b", "b": "a"}) == "b a"  # a translation is not translated again
    assert code_switch("12+2", {"2": "z", "12": "d"}) == "d+z"
    assert code_switch("122", {"2": "z"}) == "122"
    assert code_switch("122", {"2": "z"}, whole_words=False) == "1zz"
    assert code_switch("a+b (c)", {"+": " plus ", "(c)": "d"}) == "a plus b d"
    inverse = {v: k for k, v in MAPPING.items()}
    assert code_switch(code_switch("the cat sat", MAPPING), inverse) == "the cat sat"


def by_alternatives(text, mapping, rate, whole_words, rng):
    """The same as one regular expression with an alternative per fragment, tried in turn: slow."""
    edges = [(r"(?<!\w)" if f[0].isalnum() else "", r"(?!\w)" if f[-1].isalnum() else "") for f in mapping]
    found = [
        (len(f), left + re.escape(f) + right if whole_words else re.escape(f))
        for f, (left, right) in zip(mapping, edges, strict=True)
    ]
    pattern = "|".join(p for _, p in sorted(found, key=lambda pair: -pair[0]))
    return re.sub(pattern, lambda m: mapping[m[0]] if rate == 1 or rng.random() < rate else m[0], text)


@pytest.mark.parametrize("whole_words", [True, False])
def test_code_switch_equals_a_slow_search(whole_words):
    draw = random.Random(3)
    for _ in range(300):
        texts = ["".join(draw.choices("ab1_ +é²", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 8))]
        mapping = {fragment: f"<{i}>" for i, fragment in enumerate(texts)}
        text = "".join(draw.choices("ab1_ +é²", k=40))
        for rate in (1.0, 0.6):
            want = by_alternatives(text, mapping, rate, whole_words, random.Random(5))
            assert (
                code_switch(text, mapping, rate=rate, whole_words=whole_words, rng=random.Random(5)) == want
            )


def test_code_switch_takes_a_whole_dictionary():
    mapping = {f"word{i}": f"mot{i}" for i in range(20_000)}
    text = " ".join(f"word{i}" for i in range(19_999, -1, -10))
    start = time.process_time()
    assert code_switch(text, mapping) == text.replace("word", "mot")
    assert time.process_time() - start < 2  # 20,000 alternatives at every position take minutes


@pytest.mark.errors
def test_code_switch_refusals():
    with pytest.raises(ValueError, match="rng"):
        code_switch("a", {"a": "b"}, rate=0.5)
    with pytest.raises(ValueError, match=r"rate in \[0, 1\]"):
        code_switch("a", {"a": "b"}, rate=1.5)
    with pytest.raises(ValueError, match="empty"):
        code_switch("a", {"": "b"})
    with pytest.raises(TypeError, match="string"):
        code_switch(["a"], {"a": "b"})
