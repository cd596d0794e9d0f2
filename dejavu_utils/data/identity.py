"""What a data set is, by content: the hash of every file, kept for as long as it is untouched.

The names and hashes of its files are its identity: a copy of it is the same data set. Whether the
hash of a file may be used again, its size, dates and inode say (`store.state`); with VERIFY=full in
the environment none is, and every file is read anew.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from dejavu_utils import store
from dejavu_utils.data.tree import Tree, hidden, printable

WHOLE = 20 * 2**30  # bytes: of the files of a larger data set three pieces are read
UNREADABLE = "unreadable"  # instead of a hash
PIECE = 16 * 2**10  # bytes of a piece: at the head, in the middle, at the tail

Known = dict[str, list]  # {name: [state of the file, hash]}


def of(tree: Tree) -> str:
    """Return the sha256 of the names and contents of all files but hidden ones, 64 hex
    characters.
    """
    names = [name for name in tree.files if not hidden(name)]
    hashes = of_files(tree, names)
    lines = [f"{hashes[name]} {printable(name)}" for name in names]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def of_files(tree: Tree, names: Iterable[str]) -> dict[str, str]:
    """Return {name: 32 hex characters that only this content has} of some files of a data set.

    Of a data set of more than 20 GiB head, middle and tail of each file are read. A file that
    cannot be read has the hash "unreadable", which whoever decodes it will say, too.
    """
    pieces = tree.bytes > WHOLE
    place = _place(tree, pieces)
    known = _known(place)
    hashes, fresh = {}, {}

    for name in names:
        state = tree.state(name)
        old, found = known.get(name, (None, ""))
        if state is None or state != old:
            found = _hash(tree, name, pieces)
            if state is not None and found != UNREADABLE:
                fresh[name] = [state, found]
        hashes[name] = found

    if fresh and place is not None:
        there = {name: entry for name, entry in (known | fresh).items() if name in tree}
        with store.artifact(place) as temporary:
            temporary.write_text(json.dumps(there))
    return hashes


def _place(tree: Tree, pieces: bool) -> Path | None:
    """Return where the hashes of a data set are kept; None without a clone of the repository."""
    try:
        folder = store.runs("data") / "hashes"
    except store.StoreError:
        return None
    return folder / f"{store.key(path=tree.path.resolve(), pieces=pieces)}.json"


def _known(place: Path | None) -> Known:
    """Return the hashes that were kept; none if they are damaged or are not to be trusted."""
    if place is None or os.environ.get("VERIFY") == "full" or not store.intact(place):
        return {}
    return store.read_json(place)


def _hash(tree: Tree, name: str, pieces: bool) -> str:
    """Return the hash of the content of a file, or of its size and three pieces of it."""
    try:
        with tree.open(name) as file:
            if not pieces:
                return hashlib.file_digest(file, "sha256").hexdigest()[:32]
            size = tree.size(name)
            found = hashlib.sha256(str(size).encode())
            for start in (0, (size - PIECE) // 2, size - PIECE):
                file.seek(max(0, start))
                found.update(file.read(PIECE))
            return found.hexdigest()[:32]
    except Exception:  # a damaged or encrypted member fails in many ways
        return UNREADABLE
