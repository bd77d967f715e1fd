"""Mutation tester: break one operator at a time and see whether a test notices.

    python scripts/mutate.py                         # losses/, tokens, rewards/
    python scripts/mutate.py cotkit/losses --jobs 2
    python scripts/mutate.py --only cotkit/losses/sft.py --list

Every mutant runs the tests of its own file in a process forked from a warm one, so torch is imported once. A
mutant that no test kills is a survivor: write the pin, or, if it computes the same thing, add it with its
reason to ``scripts/mutants_equivalent.toml``. The exit status is 1 when there is a survivor.
"""

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ["cotkit/losses", "cotkit/tokens", "cotkit/rewards", "cotkit/adapters", "cotkit/select"]
# Whose tests pin a private file of the package root.
TESTS_OF = {"_check": "check", "_reduce": "check"}
# Slow to import and harmless to share between forks.
WARM = ("torch", "transformers", "tokenizers", "pandas", "sympy", "latex2sympy2_extended", "math_verify")

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_PAIRS = ["min max", "amin amax", "minimum maximum", "argmin argmax", "cummin cummax", "sum mean", "any all"]
NAMES = {a: b for pair in _PAIRS for a, b in (pair.split(), pair.split()[::-1])}
DROPPED_CALLS = {"detach", "clamp", "clip", "clamp_min", "clamp_max"}


class Mutant(NamedTuple):
    """One change: where it is, what it reads like, and its number in the file."""

    file: str
    line: int
    function: str
    change: str
    number: int


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every broken version of one node; its children stay as they are."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
        yield _with(node, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in OPERATORS:
                yield _with(node, ops=[*node.ops[:i], OPERATORS[type(op)](), *node.ops[i + 1 :]])
    if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
        yield node.operand
    if isinstance(node, ast.Call):
        yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    name = _name(node.func)
    if name in NAMES:
        func = copy.copy(node.func)
        if isinstance(func, ast.Attribute):
            func.attr = NAMES[name]
        elif isinstance(func, ast.Name):
            func.id = NAMES[name]
        yield _with(node, func=func)
    if name in DROPPED_CALLS and isinstance(node.func, ast.Attribute):
        yield node.func.value
    if name in {"clamp", "clip"} and {k.arg for k in node.keywords} & {"min", "max"}:
        swap = {"min": "max", "max": "min"}
        yield _with(node, keywords=[_with(k, arg=swap.get(k.arg or "", k.arg)) for k in node.keywords])


def _name(func: ast.AST) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def _with(node: Any, **fields: Any) -> Any:
    changed = copy.copy(node)
    for key, value in fields.items():
        setattr(changed, key, value)
    return changed


def sites(tree: ast.Module) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """Yield (function, node, broken node) while the tree holds the broken node; it is put right on resuming.

    Annotations and the text of messages are left alone.
    """
    stack: list[tuple[ast.AST, str]] = [(tree, "<module>")]
    while stack:
        parent, function = stack.pop()
        for field, value in ast.iter_fields(parent):
            if field in {"annotation", "returns", "decorator_list"}:
                continue
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                    continue
                put = _setter(parent, field, value, i)
                for broken in variants(child):
                    put(broken)
                    yield function, child, broken
                    put(child)
                stack.append((child, child.name if isinstance(child, ast.FunctionDef) else function))


def mutants(path: Path) -> list[Mutant]:
    """Return every mutant of a file, by line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for number, (function, node, broken) in enumerate(sites(tree)):
        change = f"{ast.unparse(node)} -> {ast.unparse(broken)}"
        found.append(Mutant(_relative(path), getattr(node, "lineno", 0), function, change, number))
    return sorted(found, key=lambda m: m.line)


def mutated(mutant: Mutant) -> ast.Module:
    """Return the tree of the file with the mutant in place."""
    tree = ast.parse((ROOT / mutant.file).read_text(encoding="utf-8"))
    for number, _ in enumerate(sites(tree)):
        if number == mutant.number:
            break
    return ast.fix_missing_locations(tree)


def _setter(parent: ast.AST, field: str, value: Any, i: int) -> Callable[[ast.AST], None]:
    def put(node: ast.AST) -> None:
        if isinstance(value, list):
            value[i] = node
        else:
            setattr(parent, field, node)

    return put


def _relative(path: Path) -> str:
    return path.resolve().relative_to(ROOT).as_posix()


def tests_of(file: str) -> list[str]:
    """Return the test files of a source file: ``cotkit/losses/sft.py`` -> ``tests/test_losses_sft*.py``."""
    parts = list(Path(file).with_suffix("").parts[1:])
    if len(parts) == 1:
        parts[0] = TESTS_OF.get(parts[0], parts[0])
    elif parts[-1].startswith("_"):
        parts.pop()  # a private file of a room: the tests of the whole room
    return [_relative(p) for p in sorted((ROOT / "tests").glob(f"test_{'_'.join(parts)}*.py"))]


class _Swap(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that runs a given tree instead of one module's file."""

    def __init__(self, mutant: Mutant) -> None:
        self.path = ROOT / mutant.file
        parts = Path(mutant.file).with_suffix("").parts
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self.tree = mutated(mutant)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002
        if name == self.name:
            return importlib.util.spec_from_file_location(name, self.path, loader=self)
        return None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)

    def get_filename(self, name: str) -> str:  # noqa: ARG002
        return str(self.path)


def start(tests: list[str], mutant: Mutant | None, log: Path) -> int:
    """Fork a process that runs the tests with the mutant in place; return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.dont_write_bytecode = True
        if mutant is not None:
            sys.meta_path.insert(0, _Swap(mutant))
        import pytest

        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:faulthandler",
            "-o",
            "addopts=--strict-markers",
        ]
        status = int(pytest.main([*options, "--no-header", "--tb=short", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(status)


def wait(running: dict[int, tuple[Any, float]], limit: float) -> list[tuple[Any, str]]:
    """Reap what has ended or outlived its limit; return (task, verdict) pairs, at least one."""
    while True:
        ended = []
        for pid, (task, begun) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            verdict = ""
            if done:
                code = os.waitstatus_to_exitcode(status)
                verdict = {0: "survived", 5: "no tests"}.get(code, "killed")
            elif time.monotonic() - begun > limit:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                verdict = "killed (time)"
            if verdict:
                del running[pid]
                ended.append((task, verdict))
        if ended:
            return ended
        time.sleep(0.01)


def excused() -> dict[tuple[str, str, str], str]:
    """Return the mutants that compute the same thing, each with its reason."""
    file = Path(__file__).with_name("mutants_equivalent.toml")
    entries = tomllib.loads(file.read_text(encoding="utf-8")).get("mutant", []) if file.exists() else []
    return {(e["file"], e["function"], e["change"]): e["reason"] for e in entries}


def main() -> int:
    """Run the mutants of the files named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", default=DEFAULT, help="files or folders")
    parser.add_argument("--only", metavar="FILE", help="just this file")
    parser.add_argument("--function", help="just the mutants inside this function")
    parser.add_argument(
        "--tests", nargs="+", help="test files, instead of those that the name of the file gives"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, help="seconds per mutant (default: 5 + 4 times the clean run)")
    args = parser.parse_args()

    named = [ROOT / p for p in ([args.only] if args.only else args.paths)]
    files = [f for p in named for f in (sorted(p.glob("*.py")) if p.is_dir() else [p]) if f.exists()]
    tasks = [m for f in files for m in mutants(f) if args.function in (None, m.function)]
    if args.list:
        for m in tasks:
            print(f"{m.file}:{m.line} {m.function}: {m.change}")
        return 0

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    excuses, log = excused(), Path(os.environ.get("TMPDIR", "/tmp")) / f"mutate-{os.getpid()}.log"
    seen, survivors, count = set(), [], {"killed": 0, "excused": 0}
    for file in dict.fromkeys(m.file for m in tasks):
        mine = [m for m in tasks if m.file == file]
        tests = args.tests or tests_of(file)
        if not tests:
            print(f"{file}: no test file tests/test_*.py belongs to it; {len(mine)} mutants untested")
            survivors += mine
            continue
        text = "".join(Path(t).read_text(encoding="utf-8") for t in tests)
        for name in WARM:
            if name in text or name == "torch":
                importlib.import_module(name)
        sys.modules["torch"].set_num_threads(1)
        begun = time.monotonic()
        (_, verdict), *_ = wait({start(tests, None, log): (None, begun)}, 600)
        clean = time.monotonic() - begun
        if verdict != "survived":
            print(f"{file}: the tests fail without a mutant ({verdict}):\n{log.read_text()[-3000:]}")
            return 2
        limit = args.limit or 5 + 4 * clean
        print(f"{file}: {len(mine)} mutants, {clean:.1f} s without one, {' '.join(tests)}", flush=True)
        todo, running = list(reversed(mine)), {}
        while todo or running:
            while todo and len(running) < args.jobs:
                m = todo.pop()
                key = (m.file, m.function, m.change)
                if key in excuses:
                    seen.add(key)
                    count["excused"] += 1
                    continue
                running[start(tests, m, log)] = (m, time.monotonic())
            for m, verdict in wait(running, limit) if running else []:
                if verdict.startswith("killed"):
                    count["killed"] += 1
                else:
                    survivors.append(m)
                    print(f"  {verdict}: {m.file}:{m.line} {m.function}: {m.change}", flush=True)
    log.unlink(missing_ok=True)
    checked = {m.file for m in tasks}
    for key in excuses:
        if key not in seen and key[0] in checked and args.function is None:
            print(f"stale excuse, no such mutant any more: {key}")
    print(
        f"{len(tasks)} mutants: {count['killed']} killed, {count['excused']} excused,",
        len(survivors),
        "survivors",
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
