"""Work on a file that nobody vouches for, in a child process of limited memory and time.

What no check foresaw (an allocation of any size, a loop without end, a crash in C) ends the child
and is one StoreError here. Linux only: elsewhere the work is done in this process, without limits.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from dejavu_utils import store
from dejavu_utils.store import StoreError

GIB = 2**30
LIMIT_GIB = 8.0  # the budget, where nobody names another


def run(work: Callable[[], object], path: Path, limit_gib: float) -> None:
    """Call `work`, which reads `path`; what it returns is lost, files that it writes stay.

    It may take `budget` GiB of memory beyond what this process has, and ten seconds of processor
    time with ten more a GiB of the file; StoreError if that is too little, and with the words of
    `work` if that raises.

    The child is forked, as those of torch's DataLoader are: a new interpreter would import torch
    first, which takes longer than most files do.
    """
    if sys.platform != "linux":
        work()
        return

    seconds = 10 + 10 * path.stat().st_size // GIB
    with tempfile.TemporaryDirectory(prefix="dejavu-") as folder:
        refusal = Path(folder, "refusal.txt")
        done = Path(folder, "done")

        def child(parent: int) -> None:
            store.end_with_parent(parent)
            faulthandler.disable()  # a crash is told in one line, below
            torch.set_num_threads(1)  # the parent's threads are not there after a fork
            _limit(budget(path, limit_gib), seconds)
            try:
                work()
                done.touch()
            except Exception as error:  # nothing ends this process with a traceback
                words = str(as_refusal(error, path, limit_gib))
                refusal.write_text(words, encoding="utf-8", errors="backslashreplace")

        process = multiprocessing.get_context("fork").Process(target=child, args=(os.getpid(),))
        process.start()
        try:
            process.join()
        finally:
            process.kill()  # where waiting was interrupted

        if done.is_file():
            return
        if refusal.is_file():
            raise StoreError(refusal.read_text(encoding="utf-8"))

    if process.exitcode == -signal.SIGXCPU:
        raise StoreError(
            f"{path} takes more than {seconds} s of processor time to read: it is damaged, or no "
            "checkpoint of a network."
        )
    raise StoreError(
        f"{path} could not be read: the process that read it ended with {process.exitcode}, within "
        f"a budget of {budget(path, limit_gib):.2g} GiB. It is damaged: fetch it again."
    )


def budget(path: Path, limit_gib: float) -> float:
    """Return how much memory reading `path` may take, in GiB: thrice its size and 1, at most
    `limit_gib`.
    """
    return min(limit_gib, 1 + 3 * path.stat().st_size / GIB)


def _limit(memory: float, seconds: int) -> None:
    """Limit what this process may take from now on: memory (GiB) and processor time (s)."""
    import resource

    taken = psutil.Process().memory_info().vms
    wanted = {
        resource.RLIMIT_AS: taken + int(memory * GIB),
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (allowed, hard))


def over_budget(path: Path, limit_gib: float) -> StoreError:
    """Return the error for a file that takes more memory to read than its budget."""
    larger = ", or pass a larger limit_gib" if budget(path, limit_gib) == limit_gib else ""
    return StoreError(
        f"{path} takes more memory than its budget of {budget(path, limit_gib):.2g} GiB (1 GiB and "
        f"thrice its size, at most limit_gib={limit_gib:g}): it was not read. Where you trust the "
        f"file, save its weights alone: torch.save(model.state_dict(), NEW){larger}."
    )


def out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out: Python's own, or torch's RuntimeError."""
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text


def as_refusal(error: Exception, path: Path, limit_gib: float) -> StoreError:
    """Return an error as a StoreError that names the file: over the budget, or a fault of ours."""
    if isinstance(error, StoreError):
        return error
    text = str(error)
    if out_of_memory(error):
        return over_budget(path, limit_gib)
    if isinstance(error, OSError):
        return StoreError(f"{path} could not be read: {text}.")
    return StoreError(
        f"{path} could not be read, by a fault of ours ({type(error).__name__}: {text[:150]}). "
        "Please report it, with the file."
    )
