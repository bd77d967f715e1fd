"""Every keyword that cotkit and its notebooks pass to TRL, transformers, peft, ... still exists there.

The source is read, not run: a call is checked when its callable can be named from the imports
(``SFTConfig(...)``, ``AutoModel.from_pretrained(...)``, ``super().__init__(...)``), or is a method whose name
these libraries own (``model.generate(...)``). A keyword that only ends in a ``**kwargs`` must be listed below
with the reason why it holds.
"""

import ast
import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("trl", "transformers", "peft", "accelerate", "datasets")
FILES = sorted([*(ROOT / "cotkit").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")])

# Called on objects, so that no import names them: method -> where the library defines it
METHODS = {
    "generate": "transformers.GenerationMixin.generate",
    "apply_chat_template": "transformers.PreTrainedTokenizerBase.apply_chat_template",
    "save_pretrained": "transformers.PreTrainedModel.save_pretrained",
    "dequantize": "transformers.PreTrainedModel.dequantize",
    "merge_and_unload": "peft.LoraModel.merge_and_unload",
    "unload": "peft.LoraModel.unload",
    "add_column": "datasets.Dataset.add_column",
    "unwrap_model": "accelerate.Accelerator.unwrap_model",
}
# Variables that always hold the same kind of object: name -> what a call of it runs
NAMES = {
    "tokenizer": "transformers.PreTrainedTokenizerBase.__call__",
    "processing_class": "transformers.PreTrainedTokenizerBase.__call__",
}

# Keywords that a **kwargs swallows: (callable, keyword) -> (the text that proves it, where, why it holds)
MODEL = "transformers.PreTrainedModel.from_pretrained"
TOKENIZER = "transformers.PreTrainedTokenizerBase.__init__"
GENERATION = "transformers.GenerationConfig.__init__"
SWALLOWED = {
    ("transformers.AutoModelForCausalLM.from_pretrained", "dtype"): ('"dtype"', MODEL, "popped by name"),
    ("transformers.AutoModelForCausalLM.from_pretrained", "device_map"): (
        '"device_map"',
        MODEL,
        "popped by name",
    ),
    ("transformers.AutoModelForCausalLM.from_pretrained", "quantization_config"): (
        '"quantization_config"',
        MODEL,
        "popped by name",
    ),
    ("transformers.AutoTokenizer.from_pretrained", "padding_side"): (
        '"padding_side"',
        TOKENIZER,
        "an attribute of every tokenizer, set from the keywords",
    ),
}
for _name in ("tokenizer_object",):
    SWALLOWED["transformers.PreTrainedTokenizerFast", _name] = (
        f'"{_name}"',
        "transformers.PreTrainedTokenizerFast.__init__",
        "popped by name",
    )
for _name in ("clean_up_tokenization_spaces", "padding_side", "chat_template"):
    SWALLOWED["transformers.PreTrainedTokenizerFast", _name] = (f'"{_name}"', TOKENIZER, "popped by name")
for _name in ("pad_token", "eos_token", "bos_token", "mask_token"):
    SWALLOWED["transformers.PreTrainedTokenizerFast", _name] = (
        f'"{_name}"',
        "transformers.PreTrainedTokenizerBase",
        "SPECIAL_TOKENS_ATTRIBUTES",
    )
for _name in ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "pad_token_id", "eos_token_id"):
    SWALLOWED["transformers.GenerationMixin.generate", _name] = (
        f'"{_name}"',
        GENERATION,
        "a generation setting",
    )


def find(path: str) -> object:
    """The object behind a dotted name; AttributeError or ImportError when it is gone."""
    module, _, rest = path.partition(".")
    found = importlib.import_module(module)
    for name in filter(None, rest.split(".")):
        try:
            found = getattr(found, name)
        except AttributeError:
            if not inspect.ismodule(found):
                raise
            found = importlib.import_module(f"{found.__name__}.{name}")
    return found


@functools.cache
def accepts(path: str, keyword: str) -> bool:
    """Whether the callable still takes the keyword."""
    parameters = inspect.signature(find(path)).parameters
    if keyword in parameters and parameters[keyword].kind is not inspect.Parameter.POSITIONAL_ONLY:
        return True
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return False
    if (path, keyword) not in SWALLOWED:
        return False
    proof, where, _ = SWALLOWED[path, keyword]
    source = inspect.getsource(inspect.getmodule(find(where)) if where.count(".") < 2 else find(where))
    return proof in source


class Calls(ast.NodeVisitor):
    """Collects ``(line, callable, keywords)`` of all calls into the packages, and what cannot be resolved."""

    def __init__(self) -> None:
        self.imported: dict[str, str] = {}
        self.base: list[str | None] = []
        self.method: list[str] = []
        self.dicts: list[dict[str, ast.Dict]] = [{}]
        self.found: list[tuple[int, str, list[str]]] = []
        self.problems: list[str] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] in PACKAGES:
                self.imported[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and node.module and node.module.split(".")[0] in PACKAGES:
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                self.imported[alias.asname or alias.name] = path
                try:
                    find(path)
                except (AttributeError, ImportError):
                    self.problems.append(f"line {node.lineno}: {path} no longer exists")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [self.name(base) for base in node.bases]
        self.base.append(next((b for b in bases if b), None))
        self.generic_visit(node)
        self.base.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.method.append(node.name)
        self.dicts.append(dict(self.dicts[-1]))
        self.generic_visit(node)
        self.method.pop()
        self.dicts.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.remember(target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.remember(node.target, node.value)
        self.generic_visit(node)

    def remember(self, target: ast.expr, value: ast.expr | None) -> None:
        """Note the dict literals behind a name, and keys added to them, so that ``f(**name)`` can be read."""
        if isinstance(target, ast.Name):
            merged = [d for d in ast.walk(value) if isinstance(d, ast.Dict)] if value else []
            if merged and not isinstance(value, ast.Call):
                self.dicts[-1][target.id] = ast.Dict(
                    [k for d in merged for k in d.keys], [v for d in merged for v in d.values]
                )
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            known = self.dicts[-1].get(target.value.id)
            if known is not None:
                known.keys.append(target.slice)
                known.values.append(target.slice)

    def name(self, node: ast.expr) -> str | None:
        """Dotted path of an expression inside one of the packages, or None."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.name(node.value)
            return f"{owner}.{node.attr}" if owner else None
        return None

    def callable(self, node: ast.expr) -> str | None:
        """What a call runs, if it is theirs."""
        named = self.name(node)
        if named:
            return named
        if isinstance(node, ast.Name):
            return NAMES.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = node.value
        if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
            base = self.base[-1] if self.base else None
            return f"{base}.{node.attr}" if base else None
        if isinstance(owner, ast.Name) and owner.id in ("lab", "cotkit"):
            return None
        return METHODS.get(node.attr)

    def visit_Call(self, node: ast.Call) -> None:
        path = self.callable(node.func)
        if path:
            keywords: list[str] = []
            for keyword in node.keywords:
                keywords += [keyword.arg] if keyword.arg else self.unpacked(node, path, keyword.value)
            self.found.append((node.lineno, path, keywords))
        self.generic_visit(node)

    def unpacked(self, node: ast.Call, path: str, value: ast.expr) -> list[str]:
        literal = self.dicts[-1].get(value.id) if isinstance(value, ast.Name) else value
        if isinstance(literal, ast.Dict) and all(isinstance(k, ast.Constant) for k in literal.keys):
            return [k.value for k in literal.keys]
        if not path.endswith(
            (".generate", ".__call__")
        ):  # an encoded batch unpacked into the model has no fixed keys
            self.problems.append(
                f"line {node.lineno}: cannot see which keywords ** passes to {path}; spell them out"
            )
        return []


def drift(source: str) -> Iterator[str]:
    """One line for every keyword, or name, that the installed packages do not know any more."""
    calls = Calls()
    calls.visit(ast.parse(source))
    yield from calls.problems
    for line, path, keywords in calls.found:
        try:
            find(path)
        except (AttributeError, ImportError):
            yield f"line {line}: {path} no longer exists"
            continue
        for keyword in keywords:
            if not accepts(path, keyword):
                yield f"line {line}: {path} takes no keyword {keyword!r}"


def code(file: Path) -> str:
    """Python of a file; of a notebook its code cells without magics."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    cells = ["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    return "\n".join(
        "" if line.lstrip().startswith(("%", "!")) else line for line in "\n".join(cells).split("\n")
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_keyword_still_exists(file: Path):
    assert list(drift(code(file))) == []


def test_the_check_sees_our_calls():
    calls = Calls()
    calls.visit(ast.parse((ROOT / "cotkit/interop/trl.py").read_text(encoding="utf-8")))
    seen = {(path, keyword) for _, path, keywords in calls.found for keyword in keywords}
    assert ("trl.SFTConfig", "activation_checkpointing") in seen
    assert ("trl.SFTTrainer.__init__", "data_collator") in seen
    assert ("trl.SFTTrainer.compute_loss", "return_outputs") in seen
    calls = Calls()
    calls.visit(ast.parse((ROOT / "cotkit/lab/_model.py").read_text(encoding="utf-8")))
    seen = {(path, keyword) for _, path, keywords in calls.found for keyword in keywords}
    assert ("transformers.BitsAndBytesConfig", "load_in_4bit") in seen
    assert ("transformers.AutoModelForCausalLM.from_pretrained", "quantization_config") in seen


FAKE = {
    "a renamed field": (
        "from trl import SFTConfig\nSFTConfig('out', max_seq_length=3)",
        "line 2: trl.SFTConfig takes no keyword 'max_seq_length'",
    ),
    "behind an alias": (
        "import transformers as hf\nhf.TrainingArguments(evaluation_strategy='no')",
        "line 2: transformers.TrainingArguments takes no keyword 'evaluation_strategy'",
    ),
    "in a parent's method": (
        "from trl import SFTTrainer\nclass A(SFTTrainer):\n def f(self):\n  super().__init__(tokenizer=1)",
        "line 4: trl.SFTTrainer.__init__ takes no keyword 'tokenizer'",
    ),
    "unpacked from a dict": (
        "from peft import LoraConfig\nmore = {'rank': 4}\nLoraConfig(**more)",
        "line 3: peft.LoraConfig takes no keyword 'rank'",
    ),
    "swallowed by kwargs": (
        "from transformers import AutoModelForCausalLM as A\nA.from_pretrained('x', torch_type=1)",
        "line 2: transformers.AutoModelForCausalLM.from_pretrained takes no keyword 'torch_type'",
    ),
    "on an object": (
        "model.generate(ids, max_length_new=3)",
        "line 1: transformers.GenerationMixin.generate takes no keyword 'max_length_new'",
    ),
    "a name that went": (
        "from trl import PPOTrainer2",
        "line 1: trl.PPOTrainer2 no longer exists",
    ),
    "a method that went": (
        "import transformers\ntransformers.AutoTokenizer.from_nowhere(a=1)",
        "line 2: transformers.AutoTokenizer.from_nowhere no longer exists",
    ),
    "out of sight": (
        "from trl import SFTConfig\nSFTConfig('out', **settings())",
        "line 2: cannot see which keywords ** passes to trl.SFTConfig; spell them out",
    ),
}


@pytest.mark.parametrize("fake", FAKE)
def test_drift_is_found_and_named(fake: str):
    source, message = FAKE[fake]
    assert list(drift(source)) == [message]


def test_good_calls_pass():
    more = "more = {'max_steps': 1}\nmore['seed'] = 2\n"
    good = f"from trl import SFTConfig\n{more}SFTConfig('out', use_cpu=True, **more)"
    assert list(drift(good)) == []


@pytest.mark.parametrize("entry", SWALLOWED, ids="-".join)
def test_listed_exceptions_still_hold(entry: tuple[str, str]):
    assert accepts(*entry)


def test_hooks_that_the_trainer_overrides_still_exist():
    trainer: Callable = find("trl.SFTTrainer")
    for hook in ("_set_signature_columns_if_needed", "_send_telemetry", "get_batch_samples", "compute_loss"):
        assert callable(getattr(trainer, hook, None)), f"trl.SFTTrainer.{hook} no longer exists"
    assert "loss_is_scaled_for_ga" in dir(trainer)
    assert "fused_lm_head" in inspect.getsource(find("trl.trainer.utils.add_fused_lm_head"))
