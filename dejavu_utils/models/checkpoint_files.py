"""Every tensor of somebody's checkpoint by its dotted path: read as data, within a memory budget.

Nothing in the file is executed. Sizes are compared with those of the file and with the budget as
soon as a header tells them, and torch files are unpickled in a child process (see `limited`).
"""

import builtins
import re
import struct
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dejavu_utils import limited
from dejavu_utils.data.tree import printable
from dejavu_utils.limited import GIB, LIMIT_GIB
from dejavu_utils.store import StoreError

MOST_TENSORS = 100_000
LONGEST_NAME = 1_000  # characters
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES += (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)
DTYPES += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

# Modules of the standard library whose classes hold settings and nothing else.
SETTINGS = {"argparse", "collections", "datetime", "decimal", "enum", "pathlib", "types", "typing"}
SETTINGS |= {"uuid"}


def read(path: str | Path, limit_gib: float = LIMIT_GIB) -> dict[str, Tensor]:
    """Return {dotted path: tensor} of everything in a safetensors or torch file, in its order.

    Reading takes at most `limit_gib` GiB of memory. StoreError says what is damaged, unsafe or too
    large; FileNotFoundError that there is no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: expected a checkpoint (.safetensors, .pt, …).")
    if path.stat().st_size > limit_gib * GIB:
        raise limited.over_budget(path, limit_gib)

    if printable(str(path)) != str(path):  # torch opens no such file
        raise StoreError(f"{printable(str(path))}: the name is no UTF-8. Rename it.")

    with path.open("rb") as file:
        first = file.read(9)

    if not first:
        raise StoreError(f"{path} is empty: it is no checkpoint. Fetch it again.")
    if first[8:9] == b"{":
        return _safetensors(path)
    if not first.startswith((b"PK\x03\x04", b"\x80")):
        raise StoreError(
            f"{path} begins with {first[:4]!r}: it is no checkpoint. Expected safetensors or a "
            "torch file, not compressed."
        )
    return _torch_file(path, limit_gib)


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file: its header must give each its place in the file,
    which the library checks before it maps the file into memory.
    """
    try:
        with safe_open(path, "pt") as file:
            _check_names(path, list(file.keys()))
        return load_file(path)
    except (SafetensorError, RuntimeError, OverflowError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: Exception | str) -> StoreError:
    """Return the error for a damaged file, in one line: what a library says of it may hold a name
    of any length.
    """
    said = " ".join(str(reason).split())
    if len(said) > limited.LONGEST:
        said = f"{said[: limited.LONGEST]}…"
    return StoreError(f"{path} is truncated or damaged: {said}. Fetch it again.")


def _check_names(path: Path, names: list[str]) -> None:
    """Raise StoreError unless a network could have tensors of these names."""
    if len(names) > MOST_TENSORS:
        raise StoreError(f"{path} holds {len(names)} tensors: expected at most {MOST_TENSORS}.")
    longest = max(names, key=len, default="")
    if len(longest) > LONGEST_NAME:
        raise StoreError(
            f"{path}: the name of a tensor, {longest[:40]!r}…, has {len(longest)} characters: "
            f"expected at most {LONGEST_NAME}."
        )


# -- a torch file ---------------------------------------------------------------------------------


def _torch_file(path: Path, limit_gib: float) -> dict[str, Tensor]:
    """Return the tensors of a torch file, which a child reads and leaves as a safetensors file."""

    def convert() -> list[str]:
        tensors = _unpickled(path, limit_gib)
        numbered = {str(i): tensor for i, tensor in enumerate(_separate(tensors.values()))}
        save_file(numbered, copy)
        return list(tensors)  # safetensors would sort the names

    with tempfile.TemporaryDirectory(prefix="dejavu-") as folder:
        copy = Path(folder) / "copy.safetensors"
        names = limited.run(convert, path, limit_gib)
        with safe_open(copy, "pt") as file:  # mapped: its memory outlives its name
            return {name: file.get_tensor(str(i)) for i, name in enumerate(names)}


def _separate(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield contiguous tensors of which no two share memory, as safetensors wants them."""
    seen = set()
    for tensor in tensors:
        plain = tensor.contiguous()
        place = plain.untyped_storage().data_ptr()
        yield plain.clone() if place in seen else plain
        seen.add(place)


def _unpickled(path: Path, limit_gib: float) -> dict[str, Tensor]:
    """Return the tensors of what torch.save wrote, all of them plain and none larger than the file.

    StoreError says what is damaged, unsafe or too large.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        _check_directory(path)
        _check_entries(path)

    try:
        tensors = dict(_tensors(_load(path, zipped, limit_gib)))
    except RecursionError as error:
        raise StoreError(f"{path} is nested too deeply for a checkpoint.") from error
    if not tensors:
        raise StoreError(f"{path} holds no tensor.")

    _check_names(path, list(tensors))
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    if sum(tensor.nbytes for tensor in tensors.values()) > limit_gib * GIB:
        raise limited.over_budget(path, limit_gib)
    return tensors


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Raise StoreError unless a tensor holds plain numbers, which are all in the file."""
    if tensor.is_nested:  # it has no layout that it could be asked for
        raise StoreError(f"{path}: {name} is a nested tensor: expected plain numbers.")
    plain = tensor.layout == torch.strided and tensor.dtype in DTYPES
    if not plain or tensor.device.type != "cpu":
        raise StoreError(
            f"{path}: {name} is {tensor.layout}, {tensor.dtype}, on {tensor.device.type}: expected "
            "plain numbers."
        )
    if tensor.nbytes > path.stat().st_size:  # one row, said to be repeated a million times
        raise StoreError(f"{path}: {name} would be larger than the file; nothing was loaded.")


def _check_directory(path: Path) -> None:
    """Raise StoreError unless the zip has one directory, where all readers look for it.

    A zip can be made to have two: then one reader checks entries that another does not read.
    """
    # at the end of the file: [56 bytes of large sizes, 20 that say where those are], 22 bytes
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 98))
        tail = file.read(98).rjust(98, b"\0")
    large = tail[:56]
    locator = tail[56:76]
    end = tail[76:]

    stop = size - 22
    signature, length, start, comment = struct.unpack("<4s8xIIH", end)
    one = signature == b"PK\x05\x06" and comment == 0
    if locator.startswith(b"PK\x06\x07"):
        stop = size - 98
        (place,) = struct.unpack("<8xQ4x", locator)
        length, start = struct.unpack("<40xQQ", large)
        one = one and place == stop and large.startswith(b"PK\x06\x06")
    if not one or start + length != stop:
        raise StoreError(
            f"{path} is truncated or damaged: expected one zip directory at its end. Fetch it "
            "again."
        )


def _check_entries(path: Path) -> None:
    """Raise StoreError unless every entry is stored plainly, as torch writes it, and undamaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            fits = sum(entry.file_size for entry in entries) <= path.stat().st_size
            program = any(entry.filename.endswith("/constants.pkl") for entry in entries)
            if not plain or not fits or program:
                raise StoreError(
                    f"{path} is a TorchScript program, compressed, or larger inside than outside: "
                    "expected what torch.save(model.state_dict(), FILE) writes."
                )
            summed = any(entry.CRC for entry in entries)  # torch can be told to write none
            damaged = archive.testzip() if summed else None
    except (StoreError, MemoryError):
        raise
    except Exception as error:  # zipfile raises whatever a damaged directory makes it stumble over
        raise _damaged(path, error) from error
    if damaged:
        raise _damaged(path, damaged)


class Settings:
    """What stands in for every class that torch does not know: an empty dict with attributes.

    Nothing of the class itself is imported or called, so whatever the file asks for, none of its
    code runs.
    """

    def __new__(cls, *arguments: object) -> OrderedDict:
        return OrderedDict()


def _load(path: Path, zipped: bool, limit_gib: float) -> object:
    """Return what torch.load reads with weights_only, settings of unknown classes as dicts."""
    known, seen = _numpy_globals(), set()
    while True:
        try:
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # torch raises six types here; the text tells them apart
            name = re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error))
            if name is None or name[1] in seen or not _is_setting(name[1]):
                raise _refusal(path, limit_gib, error) from error
            seen.add(name[1])
            whole = name[1] if "." in name[1] else f"builtins.{name[1]}"
            known.append((Settings, whole))


def _numpy_globals() -> list:
    """Return what numbers and arrays of numpy are made of, by the names of numpy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    array = np.zeros(0).__reduce__()[0]
    found = [np.dtype, np.ndarray, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)]
    for core in ("numpy.core", "numpy._core"):
        found.append((scalar, f"{core}.multiarray.scalar"))
        found.append((array, f"{core}.multiarray._reconstruct"))
    return found


def _is_setting(name: str) -> bool:
    """Return whether a global in a pickle is a class of values, and not a call of something."""
    module, _, last = name.rpartition(".")
    root = module.partition(".")[0]
    if root in ("", "builtins"):
        return isinstance(getattr(builtins, last, None), type)
    if root in sys.stdlib_module_names:
        return root in SETTINGS
    return last[:1].isupper()


def _refusal(path: Path, limit_gib: float, error: Exception) -> StoreError:
    """Return the StoreError that says what an error of torch's means for the file."""
    text = str(error)
    if limited.out_of_memory(error):
        return limited.over_budget(path, limit_gib)
    called = re.search(r"(?:unsupported GLOBAL|global: GLOBAL) ([\w.]+)", text)
    if called:
        return StoreError(
            f"{path} asks for {called[1]}, which is no value but code to run: refused. Where you "
            "trust it, save its weights alone, in the environment that wrote it: "
            "torch.save(model.state_dict(), NEW)."
        )
    lines = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    reason = lines[0][:150] if lines else type(error).__name__
    return StoreError(f"{path} is no whole torch file: {reason}. Fetch it again.")


def _tensors(
    tree: object, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted path, tensor) of everything in nested dicts, also in the attributes of one."""
    seen = set() if seen is None else seen
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "fiu":
        tree = torch.from_numpy(tree)
    if isinstance(tree, Tensor):
        yield path, tree.detach()
    if not isinstance(tree, Mapping) or id(tree) in seen:  # settings may point to their parents
        return
    seen.add(id(tree))
    for name, value in [*tree.items(), *getattr(tree, "__dict__", {}).items()]:
        below = f"{path}.{name}" if path else str(name)
        if name in ("_modules", "_parameters", "_buffers"):  # of a module saved whole
            below = path
        yield from _tensors(value, below, seen)
