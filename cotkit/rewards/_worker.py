"""A process that compares LaTeX with math-verify: one JSON request per line in, one verdict per line out.

It runs as a script, imports nothing of cotkit, and bounds its own memory and CPU time, so that nothing it is
given can outlive or starve the process that asked.
"""

import json
import logging
import os
import sys

_MEMORY = 4 << 30  # bytes of address space; sympy needs about 0.3 GiB


def _bound(seconds: float) -> None:
    try:
        import resource
    except ImportError:  # not on Windows: there the parent's timeout alone has to do
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard < 0 else min(limit, hard), hard))


def _memory() -> None:
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if hard < 0 else min(_MEMORY, hard), hard))
    except (ImportError, ValueError, OSError):
        pass


def _same(gold: str, answer: str, tol: float) -> "bool | None":
    """Whether both mean the same; None when the gold is no mathematics that can be read."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list:
        config = [LatexExtractionConfig()]
        return parse(
            "$" + text.replace("$", "") + "$", config, fallback_mode="no_fallback", parsing_timeout=None
        )

    wanted = read(gold)
    if not wanted:
        return None
    got = read(answer)
    if not got:
        return False
    close = _close(wanted[0], got[0], tol)
    if close is not None:
        return close
    return bool(verify(wanted, got, timeout_seconds=None))


def _close(a: object, b: object, tol: float) -> "bool | None":
    # math-verify rounds to six decimals and so takes 1/2004! for 1/2006!; two real numbers are compared here
    # instead
    from sympy import Abs, Expr, N

    if not (isinstance(a, Expr) and isinstance(b, Expr) and a.is_number and b.is_number):
        return None
    if not (a.is_real and b.is_real and a.is_finite and b.is_finite):
        return None
    if a == b:
        return True
    size = max(Abs(N(a, 15)), Abs(N(b, 15)))
    return bool(Abs(N(a - b, 15)) <= tol * min(1, size))


def main() -> None:
    """Answer requests until the input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints must not look like a verdict
    logging.disable(logging.CRITICAL)
    _memory()
    _same("1", "1", 1e-6)  # imports and caches
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        _bound(request["seconds"])
        try:
            verdict = _same(request["gold"], request["answer"], request["tol"])
        except Exception:
            verdict = False
        print(json.dumps(verdict), file=out, flush=True)


if __name__ == "__main__":
    main()
