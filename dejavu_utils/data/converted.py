"""boxes.csv of a data set whose annotations have another layout: made at first use, then kept.

The script data_manifests/convert.py, which makes it, stands alone; here it is run.
"""

import os
import subprocess
import sys
from pathlib import Path

from dejavu_utils import store
from dejavu_utils.data import identity
from dejavu_utils.data.tree import SUFFIXES, Tree, printable


def boxes_csv(entry: dict, tree: Tree) -> Path | None:
    """Return the boxes.csv that a manifest's own annotations (`convert`) give, made at first use.

    It is kept under runs/data/, with the list of what gave no box beside it; the source is only
    read. It is made again when the annotations, or the script that reads them, changed. None if the
    manifest converts nothing.
    """
    if not entry.get("convert"):
        return None
    script = store.PACKAGE.parent / "data_manifests" / "convert.py"
    key = store.key(
        script=store.digest(script),
        manifest={name: entry.get(name) for name in ("convert", "images", "annotations", "names")},
        annotations=_annotations(tree),
    )
    target = store.runs("data") / f"{entry['name']}-{key}" / "boxes.csv"
    unused = target.with_name("boxes.unused.csv")

    with store.lock(target):
        try:
            store.verify(target)
            store.verify(unused)
        except (store.StoreError, FileNotFoundError):
            _convert(entry, tree, script, target, unused)
    return target


def _convert(entry: dict, tree: Tree, script: Path, target: Path, unused: Path) -> None:
    """Run convert.py and keep what it wrote; StoreError with its words if it found no box."""
    command = [sys.executable, str(script), entry["convert"], str(tree.path)]
    images = tree.find(entry["images"])
    marks = tree.find(entry.get("annotations") or [])
    if images is not None:
        command += ["--images", images]
    if marks is not None:
        command += ["--annotations", marks]
    if entry.get("names") and entry["convert"] == "yolo":
        command += ["--names", str(store.root() / "data_manifests" / f"{entry['name']}.yaml")]

    print(f"{entry['name']}: reading the annotations of {tree.path}", flush=True)
    with store.artifact(target) as temporary:
        done = subprocess.run(
            [*command, "--out", str(temporary)], capture_output=True, encoding="utf-8"
        )
        listed = temporary.with_name(f"{temporary.stem}.unused.csv")
        try:
            if done.returncode:
                raise store.StoreError(f"{tree.path}: {done.stderr.strip()}\n{done.stdout.strip()}")
            with store.artifact(unused) as other:
                os.replace(listed, other)
        finally:
            listed.unlink(missing_ok=True)


def _annotations(tree: Tree) -> list[tuple[str, str]]:
    """Return what changes when annotations do: all names, and the hashes of all but pictures."""
    marks = [name for name in tree.files if not name.lower().endswith(SUFFIXES)]
    hashes = identity.of_files(tree, marks)
    return [(printable(name), hashes.get(name, "")) for name in tree.files]
