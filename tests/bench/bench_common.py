"""What every benchmark shares: how a time is taken, and a row of the table in which it is set
beside its limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable

COLUMNS = [
    "part",
    "what",
    "value",
    "unit",
    "limit",
    "share",
    "right",
    "gib",
    "device",
    "precision",
    "note",
]


def seconds(work: Callable, device: str) -> float:
    """Return the wall time of one call, on a GPU until it has done the work."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def best(work: Callable, device: str, repeats: int) -> float:
    """Return the shortest of `repeats` wall times, in seconds, after one run that does not
    count.
    """
    work()
    return min(seconds(work, device) for _ in range(repeats))


def where(device: str) -> str:
    """Return the name of the card, or how many cores."""
    import torch

    from dejavu_utils import store

    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {store.cores()} cores"


def row(
    part: str, what: str, unit: str, device: str, precision: str, measure: Callable, *arguments
) -> dict:
    """Return a row of the table, and print it: what `measure(*arguments)` found, and the share of
    the limit's speed.

    A unit of seconds is better when smaller, any other when larger. What is not installed is
    skipped and said; where memory or a compiler is missing the row says so, and the others are
    still measured.
    """
    import torch

    found: dict = {
        "part": part,
        "what": what,
        "unit": unit,
        "device": where(device),
        "precision": precision,
    }
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        found |= measure(*arguments)
        if found.get("limit"):
            ratio = found["value"] / found["limit"]
            found["share"] = 1 / ratio if unit == "s" else ratio
        if device == "cuda":
            found.setdefault("gib", torch.cuda.max_memory_allocated() / 2**30)
    except ModuleNotFoundError as error:
        found["note"] = f"skipped: {(error.name or str(error)).split('.')[0]} is not installed"
    except RuntimeError as error:
        found["note"] = (
            f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        )
    found = {
        name: found.get(
            name, float("nan") if name in ("value", "limit", "share", "right", "gib") else ""
        )
        for name in COLUMNS
    }
    print(text(found), flush=True)
    return found


def text(found: dict) -> str:
    """Return one row as a line of text; what was not measured stays empty."""

    def shown(name: str, form: str, width: int) -> str:
        return (format(found[name], form) if found[name] == found[name] else "").rjust(width)

    return (
        f"{found['part']:9} {found['what']:45} {shown('value', '.4g', 8)} {found['unit']:10} "
        f"{shown('limit', '.4g', 8)} {shown('share', '.0%', 5)} {shown('right', '.4%', 9)} "
        f"{shown('gib', '.3f', 7)}  {found['precision']:8} {found['note']}"
    ).rstrip()


HEADER = (
    f"{'part':9} {'what':45} {'value':>8} {'unit':10} {'limit':>8} {'share':>5} {'right':>9} "
    f"{'GiB':>7}  "
    f"{'in':8} note"
)
