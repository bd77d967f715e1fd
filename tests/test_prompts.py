import csv
from pathlib import Path

import pytest

from cotkit import prompts
from cotkit.prompts import Template, apply, templates

ROW = {"prompt": "2+3?", "completion": "2+3=5\n#### 5", "answer": "5", "hops": 1}
OTHER = {"prompt": "4-1?", "completion": "4-1=3\n#### 3", "answer": "3", "hops": 2}


# the table


def test_table_lists_the_fields_of_its_texts():
    with Path(prompts.__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(templates()) == [line["name"] for line in lines]
    assert len(templates()) == len(lines)
    for line in lines:
        found = templates()[line["name"]]
        assert list(found.fields) == line["fields"].split()
        assert found.writer in ("solver", "teacher", "judge")
        assert "arXiv:" in found.source
        assert found.name.isidentifier()


def test_ten_learning_strategies_without_fields():
    learn = templates("learn")
    assert len(learn) == len({t.text for t in learn.values()}) == 10
    for template in learn.values():
        assert not template.fields
        assert template.text.endswith("\n\n")
    assert len(templates("mislead")) == 2  # the negative control


def test_table_cannot_be_changed_from_outside():
    templates().clear()
    assert "task_definition" in templates()


# apply


def test_apply_by_name_by_text_and_by_template():
    assert apply("ul2_mode_s", ROW) == "[S2S] 2+3?"
    assert apply("Q: {prompt} ({hops} step)", ROW) == "Q: 2+3? (1 step)"
    assert apply(Template("mine", "{prompt}!"), ROW) == "2+3?!"
    assert apply("", ROW) == ""
    assert apply("task_definition", {"input": "a b"}, fields={"instruction": "Sort."}) == (
        "Task: Sort.\nInput: a b\nOutput: "
    )


def test_apply_fields_stand_for_columns():
    assert apply("{prompt} in {language}", ROW, fields={"language": "Dutch"}) == "2+3? in Dutch"
    assert apply("Q {prompt}", ROW, fields={"prompt": "1?"}) == "Q 1?"


def test_apply_leaves_braces_alone():
    assert apply("{prompt} in \\boxed{{}}", {"prompt": "{x} {answer}"}) == "{x} {answer} in \\boxed{}"


def test_apply_demonstrations():
    text = apply("Q: {prompt}\nA: ", ROW, demos=[OTHER])
    assert text == "Q: 4-1?\nA: 4-1=3\n#### 3\n\nQ: 2+3?\nA: "
    assert apply("Q: {prompt}", ROW, demos=[OTHER], chat=True) == [
        {"role": "user", "content": "Q: 4-1?"},
        {"role": "assistant", "content": "4-1=3\n#### 3"},
        {"role": "user", "content": "Q: 2+3?"},
    ]
    assert apply("Q: {prompt}", ROW, chat=True) == [{"role": "user", "content": "Q: 2+3?"}]


def test_apply_teacher_and_judge_may_see_the_gold():
    for writer in ("teacher", "judge"):
        assert apply(Template("why", "{prompt} {answer}", writer), ROW) == "2+3? 5"


@pytest.mark.errors
def test_apply_refusals():
    for name in ("answer", "completion", "target", "solution"):
        with pytest.raises(ValueError, match="gold column"):
            apply("{prompt} {%s}" % name, ROW)  # noqa: UP031
    with pytest.raises(ValueError, match="gold column"):
        apply("{prompt} {answer}", ROW, fields={"answer": "5"})
    with pytest.raises(ValueError, match="ul2_mode_s"):
        apply("ul2_mode_z", ROW)
    with pytest.raises(ValueError, match="column 'language'"):
        apply("cot_in_language", ROW)
    with pytest.raises(ValueError, match="column 'hint'"):
        apply("{prompt} {hint}", ROW | {"hint": None})
    with pytest.raises(ValueError, match="Remove or rename"):
        apply("Q {prompt}", ROW, fields={"langage": "Dutch"})
    with pytest.raises(ValueError, match="very question"):
        apply("Q {prompt}", ROW, demos=[OTHER, dict(ROW)])
    with pytest.raises(TypeError, match="got list"):
        apply("Q {prompt}", {"prompt": [{"role": "user", "content": "2+3?"}]})
    with pytest.raises(TypeError, match="completion of a demo"):
        apply("Q {prompt}", ROW, demos=[{"prompt": "1?"}])
    with pytest.raises(ValueError, match="writer"):
        apply(Template("x", "{prompt}", "student"), ROW)
    with pytest.raises(TypeError, match="name or a text"):
        apply(3, ROW)
    with pytest.raises(ValueError, match="beginning of a name"):
        templates("nothing")
