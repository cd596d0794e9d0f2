"""Work on files that nobody vouches for, in a child process of limited memory and time.

What no check foresaw (an allocation of any size, a loop without end, a crash in C) ends the child
and is one StoreError here. Linux only: elsewhere the work is done in this process, without limits.
"""

import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from dejavu_utils import store
from dejavu_utils.store import StoreError

GIB = 2**30
LIMIT_GIB = 8.0  # the budget, where nobody names another
PATIENCE = 15.0  # s of processor time for a small file
PER_GIB = 10.0  # s, beyond that
LONGEST = 1_000  # characters of an error
MORE = "pass a larger limit_gib"  # what to do where the budget is too small
_child = False  # whether this process is a limited one


def run(work: Callable[[], Any], path: Path, limit_gib: float, memory: float = 0.0) -> Any:
    """Return what `work`, which reads `path`, returns: plain values, as JSON can hold them.

    It may take `memory` GiB beyond what this process has (0: `budget`), and so much processor time
    as `allow` gives. StoreError if that is too little, and with the words of `work` if that raises;
    FileNotFoundError stays one.

    The child is forked, as those of torch's DataLoader are: a new interpreter would import torch
    first, which takes longer than most files do.
    """
    memory = memory or budget(path, limit_gib)
    if sys.platform != "linux" or _child:
        return _done(work, path, memory, limit_gib)

    with tempfile.TemporaryDirectory(prefix="dejavu-") as folder:
        answer = Path(folder, "answer.json")

        def child(parent: int) -> None:
            store.end_with_parent(parent)
            _prepare(memory)
            allow(PATIENCE + PER_GIB * path.stat().st_size / GIB)
            try:
                said = {"done": _done(work, path, memory, limit_gib)}
            except (StoreError, FileNotFoundError) as error:
                said = {type(error).__name__: str(error)}
            answer.write_text(json.dumps(said))
            os._exit(0)  # threads and exit handlers are the parent's: no clean-up of them here

        process = multiprocessing.get_context("fork").Process(target=child, args=(os.getpid(),))
        process.start()
        try:
            process.join()
        finally:
            process.kill()  # where waiting was interrupted

        if process.exitcode == 0 and answer.is_file():
            said = json.loads(answer.read_text())
            if "done" in said:
                return said["done"]
            missing = said.get("FileNotFoundError")
            raise FileNotFoundError(missing) if missing else StoreError(said["StoreError"])

    if process.exitcode == -signal.SIGXCPU:
        raise StoreError(
            f"{path} takes too much processor time to read, {PATIENCE:g} s and more for one file: "
            "it is damaged, or made to take it."
        )
    raise StoreError(
        f"{path} could not be read: the process that read it ended with {process.exitcode}, within "
        f"a budget of {memory:.2g} GiB. It is damaged: fetch it again."
    )


def _done(work: Callable[[], Any], path: Path, memory: float, limit_gib: float) -> Any:
    """Return what `work` returns, or raise FileNotFoundError or StoreError."""
    try:
        return work()
    except FileNotFoundError:
        raise
    except Exception as error:
        text = str(as_refusal(error, path, limit_gib, memory))
        if len(text) > LONGEST:  # of a name in the file, for example
            text = f"{text[:LONGEST]}…"
        raise StoreError(text if str(path) in text else f"{text} ({path})") from error


def budget(path: Path, limit_gib: float) -> float:
    """Return how much memory reading a checkpoint may take, in GiB: thrice its size and 1, at most
    `limit_gib`.
    """
    return min(limit_gib, 1 + 3 * path.stat().st_size / GIB)


def _prepare(memory: float) -> None:
    """Make this process, which was just forked, one that may take so much memory (GiB) more."""
    global _child
    _child = True
    faulthandler.disable()  # a crash is told in one line by the parent
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not a notebook's, of other threads
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the parent's threads are not there after a fork

    taken = psutil.Process().memory_info().vms
    _lower(resource.RLIMIT_AS, taken + int(memory * GIB))
    _lower(resource.RLIMIT_CORE, 0)


def allow(seconds: float) -> None:
    """Give a limited process so much more processor time from now on; others have no limit.

    Whoever reads many files says so for each of them: one that never ends is noticed.
    """
    if not _child:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime + seconds) + 1
    granted = resource.getrlimit(resource.RLIMIT_CPU)[0]
    if granted == resource.RLIM_INFINITY or granted < until:
        _lower(resource.RLIMIT_CPU, until)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (allowed, hard))


def over_budget(path: Path, limit_gib: float, memory: float = 0.0) -> StoreError:
    """Return the error for what takes more than `memory` GiB to read (0: `budget`)."""
    memory = memory or budget(path, limit_gib)
    advice = MORE
    if memory < limit_gib:
        advice = "save its weights alone: torch.save(model.state_dict(), NEW)"
    return StoreError(
        f"{path} takes more memory than its budget of {memory:.2g} GiB (limit_gib={limit_gib:g}): "
        f"it was not read. Where you trust it, {advice}."
    )


def out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out: Python's own, or a library's."""
    text = str(error)
    said = ("allocate memory", "bad_alloc", "start new thread")
    return isinstance(error, MemoryError) or any(words in text for words in said)


def as_refusal(error: Exception, path: Path, limit_gib: float, memory: float = 0.0) -> StoreError:
    """Return an error as a StoreError that names the file: over the budget, or a fault of ours."""
    if isinstance(error, StoreError):
        return error
    if out_of_memory(error):
        return over_budget(path, limit_gib, memory)
    if isinstance(error, OSError):
        return StoreError(f"{path} could not be read: {error}.")
    return store.fault(path, error)
