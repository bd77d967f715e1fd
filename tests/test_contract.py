"""What holds for every public function, found by walking the package.

Tensor arguments are built from the annotations: the aliases of ``cotkit._types`` carry kind and dimensions.
"""

import ast
import importlib
import inspect
import json
import math
import pickle
import pkgutil
import re
import statistics
import subprocess
import sys
import typing
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cotkit

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"B": 4, "T": 9, "V": 11, "D": 6, "K": 5, "N": 12, "H": 3, "M": 2, "S": 11}
NEEDS_A_MODEL = ("cotkit.lab.", "cotkit.interop.")  # their behaviour is tested in their own files


# Walking the package


@cache
def modules() -> dict[str, ModuleType]:
    """Every public module of every room, by its canonical path."""
    found = {}
    for info in pkgutil.walk_packages(cotkit.__path__, "cotkit."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            found[info.name] = importlib.import_module(info.name)
    return found


@cache
def public() -> dict[str, typing.Callable]:
    """Every public function by its canonical path; a folder of private files lists them in its __init__."""
    found = {}
    for name, module in modules().items():
        for attribute in getattr(module, "__all__", ()):
            value = getattr(module, attribute)
            if inspect.isfunction(value):
                found[f"{name}.{attribute}"] = value
    return found


def functions(*, lab: bool = True) -> list:
    """Return pytest parameters: name and function."""
    chosen = {n: f for n, f in public().items() if lab or not n.startswith(NEEDS_A_MODEL)}
    return [pytest.param(name, f, id=name.removeprefix("cotkit.")) for name, f in chosen.items()]


def parameters(function: typing.Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


# How a module and a function are written


def test_the_package_is_not_empty():
    assert {"cotkit.losses.sft.nll", "cotkit.losses.preference.constraint_alignment"} <= set(public())


@pytest.mark.parametrize("name", modules())
def test_all_lists_exactly_what_is_public(name):
    module = modules()[name]
    listed = list(getattr(module, "__all__", ()))
    assert len(listed) == len(set(listed))
    for attribute in listed:
        importlib.import_module(name)
        assert hasattr(module, attribute) or importlib.util.find_spec(f"{name}.{attribute}")
        assert not attribute.startswith("_")
    defined = {
        key
        for key, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == name
        and not key.startswith("_")
    }
    assert defined <= set(listed), f"public but not in __all__: {sorted(defined - set(listed))}"
    assert (module.__doc__ or "").strip(), "a file opens with its idea in one sentence"
    assert "annotations" not in vars(module), "from __future__ import annotations hides the aliases"


@pytest.mark.parametrize(("name", "function"), functions())
def test_signature(name, function):
    for p in parameters(function):
        assert p.annotation is not p.empty, f"{p.name} has no annotation"
        if p.kind is p.VAR_KEYWORD:
            assert p.name == "columns", "no **kwargs; rewards take **columns"
            assert name.startswith("cotkit.rewards.") or takes_prompts_first(function)
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


def takes_prompts_first(function: typing.Callable) -> bool:
    return [p.name for p in parameters(function)[:2]] == ["prompts", "completions"]


@pytest.mark.parametrize("function", [pytest.param(p.values[1], id=p.id) for p in functions()])
def test_docstring(function):
    doc = inspect.getdoc(function) or ""
    assert doc.strip(), "no docstring"
    described = section(doc, "Args")
    for p in parameters(function):
        if p.kind is not p.VAR_KEYWORD:
            assert re.search(rf"^ +\**{p.name}( \(.*\))?: \S", described, re.MULTILINE), f"Args lack {p.name}"
    if inspect.signature(function).return_annotation is not None:
        assert section(doc, "Returns").strip() or section(doc, "Yields").strip(), "no Returns"
    if "raise " in inspect.getsource(function):
        assert section(doc, "Raises").strip(), "no Raises"
    sources = re.findall(r"^Source: (.+)", doc, re.MULTILINE)
    assert sources, "no Source: line"
    if not any(source.startswith("none (") for source in sources):
        for source in sources:
            assert re.match(r"[^():]+ \(\d{4}\) (arXiv:\d{4}\.\d{4,5}|\S)", source), f"Source: {source}"
        assert re.search(r"^Basis: \S", doc, re.MULTILINE), "no Basis: line"
        assert re.search(r"^Differs: \S", doc, re.MULTILINE), "no Differs: line"
    assert ">>> " in section(doc, "Example"), "no Example"


def section(doc: str, title: str) -> str:
    """Return the indented block under ``title:``."""
    found = re.search(rf"^{title}s?:[ ]*\n((?:[ ]+.*\n?|[ ]*\n)*)", doc + "\n", re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("name", modules())
def test_files_stay_readable(name):
    """At most 400 lines of code, docstrings, comments and blank lines not counted."""
    source = Path(modules()[name].__file__ or "").read_text(encoding="utf-8")
    lines = {n for n, text in enumerate(source.splitlines(), 1) if text.strip() and text.strip()[0] != "#"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            text = node.body[0]
            lines -= set(range(text.lineno, text.end_lineno + 1))
    assert len(lines) <= 400


def used_in_notebooks() -> set[str]:
    """Return every name and attribute that a code cell of a notebook speaks of."""
    words: set[str] = set()
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            code = "".join(cell["source"])
            code = "\n".join(
                "pass" if line.lstrip()[:1] in "%!?" else line for line in code.splitlines() if line
            )
            for node in ast.walk(ast.parse(code)):
                words |= {node.attr} if isinstance(node, ast.Attribute) else set()
                words |= {node.id} if isinstance(node, ast.Name) else set()
                words |= {a.name for a in node.names} if isinstance(node, ast.ImportFrom) else set()
    return words


# Why a function, or a room, is in no notebook: it would need a real model, or only scripts call it.
SHOWN_ELSEWHERE = {
    "cotkit.interop.": "training a real model: README.md and tests/test_qlora_road.py",
    "cotkit.lab.save_table": "scripts/sweep_spine.py and scripts/sweep_gsm8k.py",
    "cotkit.lab.holm": "scripts/claims_md.py",
    "cotkit.lab.false_verdicts": "scripts/claims_md.py",
    # rooms whose notebooks (04 to 06, 08, 11, 12) are still to be written
    "cotkit.losses.policy.": "tests/test_losses_policy.py",
    "cotkit.losses.advantage.": "tests/test_losses_advantage.py",
    "cotkit.losses.flow.": "tests/test_losses_flow.py",
    "cotkit.lab.rollout": "tests/test_lab_rollout.py",
    "cotkit.merge.": "tests/test_merge.py",
    "cotkit.analysis.forgetting.": "tests/test_analysis_forgetting.py",
    "cotkit.adapters.lora.": "tests/test_adapters_lora.py",
    "cotkit.adapters.experts.": "tests/test_adapters_experts.py",
    "cotkit.adapters.freeze.": "tests/test_adapters_freeze.py",
    "cotkit.adapters.sparse.": "tests/test_adapters_sparse.py",
    "cotkit.adapters.modules.chain_linear": "tests/test_adapters_inject.py",
    "cotkit.adapters.modules.delta": "tests/test_adapters_delta.py",
    "cotkit.adapters.modules.error_head": "tests/test_adapters_delta.py",
    "cotkit.adapters.modules.fold": "tests/test_adapters_inject.py",
    "cotkit.adapters.modules.givens": "tests/test_adapters_delta.py",
    "cotkit.adapters.modules.inject": "tests/test_adapters_inject.py",
    "cotkit.adapters.modules.save": "tests/test_adapters_inject.py",
    "cotkit.losses.regularize.localized_balance": "tests/test_losses_regularize.py",
    "cotkit.metrics.best_at_k": "tests/test_metrics.py",
    "cotkit.metrics.flips": "tests/test_metrics.py",
    "cotkit.rewrite.structure.reveal_steps": "tests/test_rewrite_structure.py",
    "cotkit.select.curriculum.match_distribution": "tests/test_select_curriculum.py",
    "cotkit.select.difficulty.": "tests/test_select_difficulty.py",
    "cotkit.select.rehearsal.": "tests/test_select_rehearsal.py",
}


@pytest.mark.parametrize("name", SHOWN_ELSEWHERE)
def test_what_no_notebook_shows_is_shown_where_we_say(name):
    shown = [f for f in public() if f.startswith(name)]
    assert shown, "no such function: take it off the list"
    for file in re.findall(r"[\w/]+\.(?:py|md)", SHOWN_ELSEWHERE[name]):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert any(re.search(rf"\b{f.rpartition('.')[2]}\(", text) for f in shown), file


def test_every_function_is_shown_in_a_notebook():
    words = used_in_notebooks()
    absent = sorted(
        name
        for name in public()
        if name.rpartition(".")[2] not in words and not name.startswith(tuple(SHOWN_ELSEWHERE))
    )
    assert not absent, f"in no notebook: {', '.join(absent)}"


# Importing


HEAVY = {
    "transformers",
    "peft",
    "trl",
    "matplotlib",
    "pandas",
    "datasets",
    "math_verify",
    "sympy",
    "vllm",
    "verl",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_a_room_imports_no_engine():
    code = f"import sys, importlib\nfor m in {sorted(modules())!r}: importlib.import_module(m)\n"
    code += "print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in python(code).split()}
    assert not loaded & HEAVY


def test_import_adds_a_tenth_of_a_second_to_torch():
    # Processor time after torch is there, whatever else the machine does; the median of three runs.
    code = """import time, torch
t = time.process_time()
import cotkit
print(time.process_time() - t)
import cotkit.losses.sft, cotkit.losses.preference, cotkit.tokens, cotkit.metrics
print(time.process_time() - t)"""
    runs = [[float(seconds) for seconds in python(code).split()] for _ in range(3)]
    bare, rooms = (statistics.median(column) for column in zip(*runs, strict=True))
    assert bare <= 0.1
    assert rooms <= 0.3


# Tensors


EXTRA: dict[str, typing.Any] = {
    "n": 3,
    "rate": 0.4,
    "mask_id": 7,
    "open_id": 2,
    "close_id": 5,
    "beta": 0.3,
    "alpha": 0.3,
}
EXTRA["forward"] = lambda x: torch.cat([x, 2 * x], -1)[..., : SIZES["V"]]  # embeddings to logits
INSTEAD_OF = {"replacement": "mask_id"}  # two ways to say one thing
DYNAMIC = {  # read values on the device on purpose
    "cotkit.tokens.grouped": "the number of groups is the shape of the result",
    "cotkit.tokens.token_logps": "only the target rows are normalised",
    "cotkit.tokens.linear_logps": "only the target rows are multiplied",
    "cotkit.losses.distill.kl": "only the target rows are compared",
    "cotkit.losses.regularize.adversarial": "only the target rows are compared",
}
UPCAST = {
    f"cotkit.tokens.{name}" for name in ("token_logps", "linear_logps", "entropy", "kl")
} | {  # bfloat16 logits
    "cotkit.losses.distill.kl",
    "cotkit.losses.distill.mixed_label",
    "cotkit.losses.regularize.adversarial",
}
NOISE = {"cotkit.losses.regularize.adversarial"}  # drawn for padding too: other columns, other noise


def alias(annotation: typing.Any) -> typing.Any:
    """Return the tensor alias of an annotation, the first of a union, or None."""
    for option in (annotation, *typing.get_args(annotation)):
        if hasattr(option, "dim_str"):
            return option
    return None


def tensors(function: typing.Callable) -> dict[str, typing.Any]:
    return {p.name: alias(p.annotation) for p in parameters(function) if alias(p.annotation) is not None}


def tensor_functions(*needed: str) -> list:
    return [
        p for p in functions(lab=False) if tensors(p.values[1]) and set(needed) <= set(tensors(p.values[1]))
    ]


def value(name: str, kind: typing.Any, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """A plausible tensor: log-probs are negative, a mask spares position 0, labels may be ignored."""
    dims = kind.dim_str.split()
    shape = [SIZES[d] for d in dims]
    family = kind.dtypes[0] if isinstance(kind.dtypes, list | tuple) else ""
    if "bool" in family:
        out = torch.rand(shape, generator=generator) < 0.7
        if dims == ["B", "T"]:
            out[:, 0] = False
        return out
    if "int" in family:
        if name == "segments":
            return torch.randint(6, shape, generator=generator).to(torch.int8)
        out = torch.randint(3 if name in {"rank", "group"} else SIZES["V"], shape, generator=generator)
        return (
            out.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100) if name == "labels" else out
        )
    if "logps" in name:
        out = -3 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.01
        if dims == ["B", "T"]:
            out[:, 0] = 0
        return out.to(dtype)
    if name == "q":  # probabilities
        return torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1).to(dtype)
    if name == "rewards":
        return (torch.rand(shape, generator=generator) < 0.5).to(dtype)
    if name in {"weights", "rate", "p_fail"}:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def variants(function: typing.Callable) -> list[tuple[str, ...]]:
    """Return which optional tensors are given: none of them, then each alone."""
    optional = [
        p.name for p in parameters(function) if p.default is not p.empty and p.name in tensors(function)
    ]
    return [(), *[(name,) for name in optional]]


def arguments(
    function: typing.Callable, given: tuple[str, ...], dtype=torch.float64, seed=0
) -> tuple[list, dict]:
    """Return positional and keyword arguments of a call."""
    generator = torch.Generator().manual_seed(seed)
    positional, named = [], {}
    replaced = {INSTEAD_OF[name] for name in given if name in INSTEAD_OF}
    for p in parameters(function):
        kind = alias(p.annotation)
        if p.kind is p.VAR_POSITIONAL:
            positional += [2, 3]
            continue
        if p.name == "generator":
            made: typing.Any = torch.Generator().manual_seed(seed)
        elif p.name in EXTRA and p.name not in replaced and p.name not in given:
            if p.default is not p.empty and p.default is not None:
                continue
            made = EXTRA[p.name]
        elif kind is not None and (p.default is p.empty or p.name in given):
            made = value(p.name, kind, generator, dtype)
        else:
            assert p.default is not p.empty, f"teach EXTRA a value for {p.name}"
            continue
        if p.kind is p.KEYWORD_ONLY:
            named[p.name] = made
        else:
            positional.append(made)
    return positional, named


def bound(function: typing.Callable, positional: list, named: dict) -> dict[str, typing.Any]:
    return dict(inspect.signature(function).bind(*positional, **named).arguments)


def leaves(result: typing.Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    items = (
        result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else ()
    )
    return [leaf for item in items for leaf in leaves(item)]


def replace(
    positional: list, named: dict, change: typing.Callable, function: typing.Callable
) -> tuple[list, dict]:
    """Return the arguments with ``change(name, tensor)`` in place of each tensor."""
    names = [p.name for p in parameters(function) if p.kind is p.POSITIONAL_OR_KEYWORD]
    names += [""] * len(positional)

    def swap(name, x):
        return change(name, x) if isinstance(x, torch.Tensor) else x

    swapped = {key: swap(key, x) for key, x in named.items()}
    if "generator" in named:
        swapped["generator"] = torch.Generator().manual_seed(0)
    return [swap(n, x) for n, x in zip(names, positional, strict=False)], swapped


def call(function: typing.Callable, arguments: tuple[list, dict]) -> list[torch.Tensor]:
    return leaves(function(*arguments[0], **arguments[1]))


@pytest.mark.parametrize(("name", "function"), tensor_functions())
def test_inputs_are_left_alone(name, function):
    for given in variants(function):
        positional, named = arguments(function, given)
        everything = [x for x in [*positional, *named.values()] if isinstance(x, torch.Tensor)]
        copies = [x.clone() for x in everything]
        outputs = call(function, (positional, named))
        for out in outputs:  # and no output is a window on an input
            if out.is_floating_point() and not out.requires_grad:
                out += 1
        for before, after in zip(copies, everything, strict=True):
            assert torch.equal(before, after), f"{name} changes its input"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "function"), tensor_functions())
def test_dtype_is_kept(name, function, dtype):
    for given in variants(function):
        for out in call(function, arguments(function, given, dtype)):
            if out.is_floating_point():
                assert out.dtype == (torch.float32 if name in UPCAST and dtype == torch.bfloat16 else dtype)
                assert out.isfinite().all()


@pytest.mark.parametrize(("name", "function"), tensor_functions())
def test_device_is_kept_and_never_waited_for(name, function):
    """On the meta device there are no values, so reading one (a synchronisation on CUDA) raises."""
    if name in DYNAMIC:
        pytest.skip(DYNAMIC[name])
    for given in variants(function):
        positional, named = arguments(function, given)
        named.pop("generator", None)
        for out in call(function, replace(positional, named, lambda _, x: x.to("meta"), function)):
            assert out.device.type == "meta"


@pytest.mark.parametrize("switch", ["mask", "valid"])
@pytest.mark.parametrize(("name", "function"), tensor_functions())
def test_what_is_masked_does_not_matter(name, function, switch):
    """Noise where the mask is False changes no value and no gradient where it is True."""
    if switch not in tensors(function):
        pytest.skip(f"takes no {switch}")
    if name == "cotkit.losses.sft.ift_inputs":
        pytest.skip("greedy_ids are unshifted: the guess for a counted token stands one position before it")
    for given in {(*g, switch) if switch in optional(function) else g for g in variants(function)}:
        positional, named = arguments(function, given)
        counts = bound(function, positional, named)[switch]

        def noisy(key, x, counts=counts):
            if x.shape != counts.shape or x.dtype == torch.bool:
                return x.clone().requires_grad_(x.is_floating_point())
            other = value(key, tensors(function)[key], torch.Generator().manual_seed(9), x.dtype)
            return torch.where(counts, x, other).requires_grad_(x.is_floating_point())

        clean_arguments = replace(
            positional, named, lambda _, x: x.clone().requires_grad_(x.is_floating_point()), function
        )
        noisy_arguments = replace(positional, named, noisy, function)
        clean, dirty = call(function, clean_arguments), call(function, noisy_arguments)
        for a, b in zip(clean, dirty, strict=True):
            if a.shape == counts.shape:
                a, b = a[counts], b[counts]
            assert torch.equal(a, b), f"{name} reads what is masked"
        for a, b in zip(gradients(clean, clean_arguments), gradients(dirty, noisy_arguments), strict=True):
            assert (a is None) == (b is None)
            if a is not None and a.shape == counts.shape:
                assert torch.equal(a[counts], b[counts])
                assert not b[~counts].any(), f"{name} sends a gradient to what is masked"


def optional(function: typing.Callable) -> set[str]:
    return {p.name for p in parameters(function) if p.default is not p.empty}


def gradients(outputs: list[torch.Tensor], arguments: tuple[list, dict]) -> list[torch.Tensor | None]:
    """Return the gradient of every floating argument, without [B, T] outputs: their masked part is free."""
    inputs = [
        x for x in [*arguments[0], *arguments[1].values()] if isinstance(x, torch.Tensor) and x.requires_grad
    ]
    summed = [o.sum() for o in outputs if o.requires_grad and o.dim() < 2]
    if not summed:
        return [None] * len(inputs)
    return list(torch.autograd.grad(sum(summed), inputs, allow_unused=True))


@pytest.mark.parametrize(("name", "function"), tensor_functions("mask"))
def test_masking_is_deleting(name, function):
    """Columns that the mask leaves out may as well not be there."""
    if name in NOISE:
        pytest.skip("draws noise for every column")
    for given in variants(function):
        positional, named = arguments(function, given)
        shape = bound(function, positional, named)["mask"].shape

        def wider(_, x, shape=shape):
            behind = (0, 0) * (x.dim() - 2) + (0, 3)
            return torch.nn.functional.pad(x, behind) if x.shape[:2] == shape else x

        outputs = call(function, (positional, named))
        if any(out.dim() > 1 for out in outputs):
            continue
        for a, b in zip(outputs, call(function, replace(positional, named, wider, function)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("switch", ["mask", "valid"])
@pytest.mark.parametrize(("name", "function"), tensor_functions())
def test_an_empty_mask_is_harmless(name, function, switch):
    if switch not in tensors(function):
        pytest.skip(f"takes no {switch}")
    if name == "cotkit.losses.sft.ift_inputs":
        pytest.skip("greedy_ids are unshifted: the guess for a counted token stands one position before it")
    for given in {(*g, switch) if switch in optional(function) else g for g in variants(function)}:
        positional, named = arguments(function, given)

        def empty(key, x):
            x = torch.zeros_like(x) if key == switch else x.clone()
            return x.requires_grad_(x.is_floating_point())

        called = replace(positional, named, empty, function)
        outputs = call(function, called)
        assert all(out.isfinite().all() for out in outputs if out.is_floating_point()), name
        for gradient in gradients(outputs, called):
            assert gradient is None or not gradient.any()


# Rewards: prompts and completions in, one number or None each out


TEXTS = ["<think>\n2 + 2 = 4\n</think>\n4", "<think>\nno\n</think>\n#### 5", "The answer is \\boxed{4}.", "4"]
COLUMNS = {"answer": ["4"] * 4, "solution": ["4"] * 4}


@cache
def rewards() -> dict[str, typing.Callable]:
    """Every reward of the room: the functions themselves, and what the factories return by default."""
    found = {}
    for name, function in public().items():
        if not name.startswith("cotkit.rewards."):
            continue
        if takes_prompts_first(function):
            found[name] = function
        elif "Callable" in str(inspect.signature(function).return_annotation):
            required = [p for p in parameters(function) if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
            if not required and all(p.default is not p.empty for p in parameters(function)):
                found[name] = function()
    return found


def run(reward: typing.Callable, completions: list) -> list:
    columns = {key: (column * len(completions))[: len(completions)] for key, column in COLUMNS.items()}
    return reward(prompts=["2 + 2?"] * len(completions), completions=completions, **columns)


@pytest.mark.parametrize("name", rewards())
def test_reward_is_picklable_and_has_a_readable_name(name):
    reward = rewards()[name]
    assert run(pickle.loads(pickle.dumps(reward)), TEXTS) == run(reward, TEXTS)
    shown = getattr(reward, "__name__", None) or reward.func.__name__
    assert shown.isidentifier()
    assert not shown.startswith("_")


@pytest.mark.parametrize("name", rewards())
def test_reward_gives_one_number_or_none_each(name):
    scores = run(rewards()[name], TEXTS)
    assert isinstance(scores, list)
    assert len(scores) == len(TEXTS)
    assert all(s is None or (isinstance(s, float) and math.isfinite(s)) for s in scores)
    assert rewards()[name](prompts=[], completions=[], **{column: [] for column in COLUMNS}) == []


@pytest.mark.parametrize("name", rewards())
def test_reward_reads_strings_and_chat_messages_alike(name):
    chats = [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert run(rewards()[name], chats) == run(rewards()[name], TEXTS)


@pytest.mark.parametrize("name", rewards())
def test_reward_of_nothing_is_finite(name):
    nothing = [
        "",
        " \n",
        [],
        [{"role": "assistant", "content": ""}],
        [{"role": "assistant", "content": None}],
        None,
    ]
    for score in run(rewards()[name], nothing):
        assert score is None or math.isfinite(score)


@pytest.mark.parametrize("name", rewards())
def test_reward_leaves_its_inputs_alone(name):
    chats = [[{"role": "assistant", "content": text}] for text in TEXTS]
    columns = {key: list(column) for key, column in COLUMNS.items()}
    before = json.dumps([chats, columns])
    rewards()[name](prompts=["2 + 2?"] * 4, completions=chats, **columns)
    assert json.dumps([chats, columns]) == before
