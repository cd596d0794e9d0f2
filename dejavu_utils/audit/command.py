"""An audit in a terminal, by `python -m dejavu_utils.audit` or `make audit`: progress, then what
was found.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dejavu_utils.audit import audit, report
from dejavu_utils.audit.settings import Settings


def conduct(
    asked: dict[str, str],
    settings: dict[str, Any],
    out: Path | None,
    folder: Path,
    as_json: bool = False,
    device: str = "",
) -> int:
    """Return the exit status of an audit: 0 no evidence, 3 memorizes, 4 undecided, 2 an error in
    what was passed.

    `asked`: the arguments of `audit.run` that are names. The report is written to `out`, or into
    `folder` under a name of its own. The verdict, its interval and the report's path are printed,
    or with `as_json` all results.
    """
    try:
        found, path = _audit(asked, settings, out, folder, device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is embedded", file=sys.stderr)
        return 130

    if as_json:
        print(json.dumps(found.summary() | {"report": str(path)}, indent=1, ensure_ascii=False))
        return found.status
    print(found.verdict.sentence)
    print(report.numbers(found))
    if found.warning:
        print(found.warning)
    print(f"the report is {path}")
    return found.status


def _audit(
    asked: dict[str, str],
    settings: dict[str, Any],
    out: Path | None,
    folder: Path,
    device: str,
) -> tuple[audit.Report, Path]:
    chosen = Settings(**settings)
    case = audit.load(**asked, settings=chosen)
    name = audit.file_name(case, chosen)
    path = out or folder / f"{name}.html"
    audit.check_free(path, name)  # before the hours, not after them
    kept = audit.kept(path, name)

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = {
        "encoder": audit.described(asked["encoder"], asked["weights"]),
        "reference": audit.described(asked["reference"], asked["reference_weights"]),
    }
    found = audit.examine(case, chosen, names, device, _Progress(), kept)
    found.write(path)
    shutil.rmtree(kept, ignore_errors=True)
    return found, path


class _Progress:
    """How far it is, on the error stream: a bar in a terminal, a line every 15 s elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.bar = tqdm(unit=" pictures", file=sys.stderr, disable=not self.live)
        self.shown = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.live:
            self.bar.total = total
            self.bar.set_description(what, refresh=False)
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.shown > 15 or done == total:
            self.shown = time.monotonic()
            print(f"{done} of {total} pictures: {what}", file=sys.stderr, flush=True)
        if done == total:
            self.bar.close()
