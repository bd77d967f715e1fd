"""The caller's side of the LaTeX worker: started on first use, killed when late, started again on demand.

No signals and no multiprocessing: it works from any thread, inside asyncio, in notebooks and in scripts
without a main guard. One lock makes callers take turns; a forked child forgets its parent's worker and
starts its own.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

TIMEOUT = 5.0  # seconds of CPU time for one comparison; the worker bounds itself
_PATIENCE = 6  # wall clock against CPU time: a busy machine is no reason to call a right answer wrong
_START = 120.0  # seconds for importing sympy on a machine that is busy

# The handle of the one worker. A process has to live somewhere: this is the only state of the library.
_lock = threading.Lock()
_worker: "tuple[subprocess.Popen[bytes], queue.Queue[bytes]] | None" = None


class _LateError(Exception):
    pass


def verify(gold: str, answer: str, tol: float, seconds: float = TIMEOUT) -> bool | None:
    """True, False, or None when the gold cannot be read (or there is no math-verify, with a warning)."""
    if not _installed():
        warnings.warn(
            "same_answer: math-verify is not installed, LaTeX is compared as text only.", stacklevel=3
        )
        return None
    try:
        return _ask(gold, answer, tol, seconds)
    except _LateError:
        return False


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


@lru_cache(maxsize=4096)  # a group of samples repeats its answers; an exception (too late) is not remembered
def _ask(gold: str, answer: str, tol: float, seconds: float) -> bool | None:
    request = json.dumps({"gold": gold, "answer": answer, "tol": tol, "seconds": seconds}) + "\n"
    with _lock:
        try:
            process, lines = _running()
            assert process.stdin is not None
            process.stdin.write(request.encode("ascii"))
            process.stdin.flush()
            return json.loads(lines.get(timeout=_PATIENCE * seconds))
        except (OSError, ValueError, queue.Empty) as error:  # died, wrote nonsense, or is late
            _stop()
            raise _LateError from error


def _running() -> "tuple[subprocess.Popen[bytes], queue.Queue[bytes]]":
    global _worker
    if _worker is not None and _worker[0].poll() is None:
        return _worker
    _stop()
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    _worker = (process, lines)
    if lines.get(timeout=_START) != b"ready\n":
        raise OSError("the worker did not start")
    return _worker


def _read(stream: Any, lines: "queue.Queue[bytes]") -> None:
    with contextlib.suppress(ValueError, OSError), stream:
        for line in stream:
            lines.put(line)
    lines.put(b"")  # the end: nobody waits for a worker that is gone


def _stop() -> None:
    global _worker
    if _worker is None:
        return
    process, _worker = _worker[0], None
    process.kill()
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    process.wait()


def _forget() -> None:
    global _worker, _lock
    _worker, _lock = None, threading.Lock()


def alive() -> int | None:
    """Process number of the worker, None when there is none."""
    return None if _worker is None or _worker[0].poll() is not None else _worker[0].pid


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
