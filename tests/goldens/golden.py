"""Golden results: numbers that a move of the code must leave alone, bit for bit.

`python tests/goldens/golden.py freeze` writes what this machine computes to
tests/goldens/<machine>.json, `check` compares with it, and exits with 1 if a number differs. Both
read the finished runs of the profiles that they are given, for example:

    make figures PROFILE=smoke
    python tests/goldens/golden.py check smoke

A processor of another kind rounds otherwise, so every kind has a file of its own; on one without a
file, freeze at the commit before the change first. Values are hashed column by column: a difference
names the table and the column. Times, and keys in the names of encoders, are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from dejavu_utils import store
from dejavu_utils.attack import references
from dejavu_utils.models import launch, pairs

FOLDER = Path(__file__).resolve().parent
KEYS = re.compile(r"-[0-9a-f]{16}(?=/)")  # in names of encoders: they change with the code
TIMES = re.compile(r"seconds|minutes|images_per|per_second|_s$")
SETTING = {
    "dataset": "scenes",
    "sizes": {"classes": 4, "attacked": 16, "shared": 0, "public": 20, "probe": 10, "control": 10},
    "epochs": [0, 2],
    "crop": {"kind": "periphery", "min_side": 8},
    "recipe": {"encoder": "small8", "projector": "32-32-32", "batch": 16},
}


def machine() -> str:
    """Return a name for what decides how this machine rounds: processor, its instructions, torch
    and numpy.
    """
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else [platform.processor()]
    kept = sorted(
        {
            line
            for line in lines
            if re.match(r"(model name|flags|Features|cpu family|model)\s*:", line)
        }
    )
    text = "\n".join(
        [platform.machine(), *kept, torch.__version__, np.__version__, str(store.cores())]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def columns(table: pd.DataFrame) -> dict[str, str]:
    """Return a hash of every column of a table but its times."""
    hashes = {}
    for name in table.columns:
        if not TIMES.search(str(name)):
            text = "\n".join(KEYS.sub("", repr(value)) for value in table[name].tolist())
            hashes[str(name)] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return hashes


def weights(path: Path) -> str:
    """Return the sha256 of an encoder's tensors: names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def of_run(profile: str) -> dict[str, Mapping[str, str] | str]:
    """Return the hashes of a finished run: its tables, the tables behind its figures, the encoders
    without their keys.
    """
    folder = store.runs(profile)
    found: dict[str, Mapping[str, str] | str] = {}
    for kind in ("tables", "figures"):
        for path in sorted((folder / kind).rglob("*.csv")):
            found[str(path.relative_to(folder))] = columns(store.read_table(path))
    encoders = [
        weights(path) for path in sorted((folder / "encoders").rglob("epoch-*.safetensors"))
    ]
    found["encoders"] = hashlib.sha256("".join(sorted(encoders)).encode()).hexdigest()[:16]
    return found


def small(folder: Path) -> dict[str, Mapping[str, str] | str]:
    """Return the hashes of one pair of encoders, trained in seconds in `folder`, and of its
    tables.
    """
    torch.set_num_threads(1)
    pair = pairs.one(SETTING, folder, "vicreg", 0.2, 0)
    every = pairs.jobs([pair])
    for job in every:
        launch.fit(job)
    found: dict[str, Mapping[str, str] | str] = {}
    for model, job in pair.jobs.items():
        for epoch in SETTING["epochs"]:
            found[f"encoder {model}, epoch {epoch}"] = weights(job.checkpoint(epoch))
    found["attack"] = columns(references.two_model(pair, 2, 5))
    found["control"] = columns(references.two_model(pair, 2, 5, attacked="control"))
    found["probe"] = columns(references.probes(pair, 2, augment=False))
    found["probe, augmented"] = columns(references.probes(pair, 2))
    return found


def differences(old: Mapping, new: Mapping, where: str = "") -> list[str]:
    """Return a line for every number that differs, is missing, or is new."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        label = f"{where}{name}"
        if name not in new:
            lines.append(f"{label} is missing")
        elif name not in old:
            lines.append(f"{label} is new")
        elif isinstance(old[name], Mapping):
            lines += differences(old[name], new[name], f"{label}: ")
        elif old[name] != new[name]:
            lines.append(f"{label} differs")
    return lines


def main() -> int:
    """Return the exit status of `freeze` or `check`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("freeze", "check"))
    parser.add_argument("profiles", nargs="*", help="finished runs, such as smoke laptop")
    options = parser.parse_args()

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        new = {"small": small(Path(folder))}
    new |= {profile: of_run(profile) for profile in options.profiles}

    path = FOLDER / f"{machine()}.json"
    old = json.loads(path.read_text()) if path.is_file() else {}
    if options.command == "freeze":
        path.write_text(json.dumps(old | new, indent=1) + "\n")
        print(f"frozen: {path}")
        return 0
    if not old:
        print(
            f"no golden results of this kind of machine ({path.name}): freeze them at the commit "
            "before the change"
        )
        return 1
    lines = [
        line for name in new for line in differences(old.get(name, {}), new[name], f"{name}: ")
    ]
    print("\n".join(lines) or f"equal: {', '.join(new)}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
