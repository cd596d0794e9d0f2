"""Everything on disk: atomic writes, verified reads, cache keys, code versions, locks.

An artifact is a file and its sidecar `<file>.json` (sha256, size, parameters, seed, versions,
device, code version, and a digest of the sidecar itself; beside figures it is hidden). The sidecar
is written before the file appears under its name, so a file that is there always has one.
"""

import ctypes
import datetime
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dejavu_utils import imports

PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE.parent / "dejavu_clone"  # what a wheel brings of the repository
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_AGAIN = "Delete it and run the stage that makes it (`make figures`) again."
TRACE = "DEJAVU_TRACE"  # the file that the runner reads, to know what a notebook has used
SETTLED = 2.0  # s: a file as fresh as that may change again without another date
_intact: dict[Path, tuple] = {}  # what this process has verified, and what it looked like then
_told: set[Path] = set()  # what this process has called damaged


class StoreError(ValueError):
    """A file that cannot be trusted, or a value that cannot be stored."""


def root() -> Path:
    """Return the repository root: $DEJAVU_ROOT, or the folder above `dejavu_utils/`; it must hold
    `notebooks/`. Installed from a wheel, what travels in it takes the root's place.
    """
    given = os.environ.get("DEJAVU_ROOT")
    if not given and INSTALLED.is_dir():
        return INSTALLED
    folder = Path(given or PACKAGE.parent).resolve()
    if not (folder / "notebooks").is_dir():
        raise StoreError(
            f"{folder} has no notebooks/ folder: set DEJAVU_ROOT to the folder that `git clone` "
            "made."
        )
    return folder


def home() -> Path:
    """Return the folder in which runs/ and data/ are: the root, or where there is no clone the
    current folder.
    """
    return Path.cwd() if root() == INSTALLED else root()


def runs(profile: str) -> Path:
    """Return the folder of everything a profile produces: ($DEJAVU_RUNS or home/runs)/<profile>.

    StoreError if the name would lead out of it.
    """
    if profile in ("", "..") or Path(profile).name != profile:
        raise StoreError(f"profile {profile!r}: expected a name such as laptop, without a path.")
    return Path(os.environ.get("DEJAVU_RUNS") or home() / "runs").resolve() / profile


def cores() -> int:
    """Return how many processor cores this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )  # macOS has none


def end_with_parent(parent: int) -> None:
    """See to it that this process ends when process `parent`, which started it, does.

    Linux sends SIGTERM at that moment. SystemExit if the parent has ended already. Elsewhere only
    the second holds: long loops look at their parent themselves.
    """
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit("the starting process has ended")


def _plain(value: Any, exact: bool = True) -> Any:
    """Return `value` as plain JSON types; `exact` (keys) makes 1.0 equal 1 and refuses NaN, else it
    becomes null.
    """
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        value = value.tolist()
    if hasattr(value, "__dataclass_fields__"):
        value = {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(name): _plain(item, exact) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, exact) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        if exact:
            raise StoreError(f"a key cannot hold {value}: pass a finite number or None.")
        return None
    if isinstance(value, float) and exact and value.is_integer():
        return int(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise StoreError(
        f"cannot store a {type(value).__name__} ({value!r}): pass numbers, text, lists, dicts or "
        "None."
    )


def key(**parts: Any) -> str:
    """Return 16 hex characters that name these parts: equal parts, equal key, whatever their order;
    1 equals 1.0.
    """
    text = json.dumps(_plain(parts), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_version(*modules: str) -> str:
    """Return 12 hex characters for the code of `modules` of this package and of all that they
    import; of all files of the package, if none is named.

    A caller names its own module (`__name__`): what that depends on, its imports say (see
    `imports`). Comments, docstrings, annotations and layout do not count. The first call of a
    process holds: edits need a new one.

    This file does not count for a module that imports it: it moves bytes, which come back as they
    were written or not at all (the checksum in the sidecar), so no edit of it changes a result.
    Else another word in an error message here would train every encoder again.
    """
    known = imports.modules(PACKAGE)
    if unknown := [name for name in modules if name not in known]:
        raise StoreError(
            f"code_version: no module {unknown[0]} in {PACKAGE}: what is kept on disk is made by "
            "functions of the package, whose code its key can hold."
        )
    found = imports.reached(PACKAGE, modules, without=__name__) if modules else known
    lines = [f"{name} {found[name].code}" for name in sorted(found)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; after the block it is synced and renamed, or on an error
    removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))  # safetensors raises its own type
        number = int(number[1]) if number else getattr(error, "errno", None)
        if number not in _FULL:
            raise
        raise OSError(
            number,
            f"cannot write {path}: {os.strerror(number)}. What was there before is unchanged. "
            "Free some space (`make clean` removes runs/) and run the command again.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def sidecar(path: str | Path) -> Path:
    """Return the path of the sidecar of `path`; beside figures, which people browse, it is
    hidden.
    """
    path = Path(path)
    hidden = "." if path.parent.name == "figures" else ""
    return path.with_name(f"{hidden}{path.name}.json")


def _json(content: Any) -> bytes:
    """Return plain values as JSON; a name of a file may hold any bytes, as Python keeps them."""
    plain = _plain(content, exact=False)
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def _sealed(entry: Mapping) -> bytes:
    """Return the text of a sidecar: its fields, and under `self` the digest of all the others."""
    fields = {name: value for name, value in entry.items() if name != "self"}
    seal = hashlib.sha256(_json(fields)).hexdigest()
    return _json(fields | {"self": seal})


def _write(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python, torch and numpy, without importing them."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0], "torch": version("torch"), "numpy": version("numpy")}


@contextmanager
def artifact(path: str | Path, meta: Mapping | None = None) -> Iterator[Path]:
    """Yield a temporary path to write; then `path` and its sidecar, with `meta` merged in, appear
    together.

    Killed between the two replacements, the sidecar still describes the old file, under `previous`.
    """
    path = Path(path)
    side = sidecar(path)
    torch = sys.modules.get("torch")  # a process that never imported torch computed on the CPU
    device = "cuda" if torch is not None and torch.cuda.is_available() else "cpu"
    with atomic(path) as temporary:
        yield temporary
        entry = {
            "sha256": digest(temporary),
            "bytes": temporary.stat().st_size,
            "parameters": {},
            "seed": None,
            "versions": versions(),
            "device": device,
            "code": code_version(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **(meta or {}),
        }
        try:
            old = {"previous": verify(path)}
        except (StoreError, FileNotFoundError):
            old = {}
        _write(side, _sealed(entry | old))
    if old:
        _write(side, _sealed(entry))
    _note(path)


def verify(path: str | Path) -> dict:
    """Return the sidecar of `path` after checking both against their digests; StoreError or
    FileNotFoundError otherwise.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: run the stage that makes it (`make figures`)."
        )
    try:
        text = sidecar(path).read_bytes()
        entry = json.loads(text)
        if _sealed(entry) != text:
            raise ValueError("its digest of itself")
        del entry["self"]
        by_digest = {item["sha256"]: item for item in (entry, entry.get("previous", entry))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{path}: its sidecar {path.name}.json is missing or damaged. {_AGAIN}"
        ) from error
    found = digest(path)
    if found not in by_digest:
        raise StoreError(
            f"{path} is damaged: sha256 {found[:12]}… ({path.stat().st_size} bytes), its sidecar "
            "says "
            f"{str(entry['sha256'])[:12]}… ({entry.get('bytes')} bytes). {_AGAIN}"
        )
    _note(path)
    return by_digest[found]


def _note(path: Path) -> None:
    """Tell the runner, if one has started this process, that `path` was written or read."""
    trace = os.environ.get(TRACE)
    if trace:
        with open(trace, "ab") as file:
            file.write(os.fsencode(path.resolve()) + b"\0")


def state(path: Path) -> list[int] | None:
    """Return what changes whenever a file does: its size, dates (ns) and inode.

    None where it is not there, or so fresh that it might change again without another date.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    if found.st_ctime_ns > (time.time() - SETTLED) * 1e9:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def intact(path: str | Path) -> bool:
    """Return whether an artifact is there and undamaged.

    Of a damaged one a line says so, once: whoever asks makes it again.
    """
    path = Path(path)
    now = (state(path), state(sidecar(path)))
    if None not in now and _intact.get(path) == now:
        _note(path)
        return True
    try:
        verify(path)
    except FileNotFoundError:
        return False
    except StoreError:
        if path not in _told:
            print(f"{path} is damaged: it is made again", flush=True)
        _told.add(path)
        return False
    _intact[path] = now
    return True


def fault(path: str | Path, error: Exception) -> StoreError:
    """Return the error for a file on which our own code has failed in a way that nobody foresaw."""
    return StoreError(
        f"{path} could not be read, by a fault of ours ({type(error).__name__}: "
        f"{str(error)[:150]}). Please report it, with the file."
    )


def reader(read: Callable) -> Callable:
    """Return `read`, a function of a path, with StoreError and OSError as its only errors."""

    @functools.wraps(read)
    def checked(path: str | Path, *arguments: Any, **options: Any) -> Any:
        try:
            return read(path, *arguments, **options)
        except (StoreError, OSError):
            raise
        except Exception as error:
            raise fault(path, error) from error

    return checked


def write_json(path: str | Path, content: Any, meta: Mapping | None = None) -> None:
    """Write plain values as JSON, with a sidecar; numpy values become plain ones, NaN and
    infinities null.
    """
    with artifact(path, meta) as temporary:
        temporary.write_bytes(_json(content))


@reader
def read_json(path: str | Path) -> Any:
    """Return the content of a JSON artifact after checking it."""
    verify(path)
    return json.loads(Path(path).read_bytes())


def write_table(path: str | Path, frame: Any, meta: Mapping | None = None) -> None:
    """Write a DataFrame, without its index, as .parquet or .csv by suffix, with a sidecar."""
    suffix = Path(path).suffix
    if suffix not in (".parquet", ".csv"):
        raise StoreError(f"{path}: a table is .parquet or .csv, not {suffix or 'without suffix'}.")
    types = {str(name): str(kind) for name, kind in frame.dtypes.items() if str(kind) != "object"}
    with artifact(path, {**(meta or {}), "rows": len(frame), "columns": types}) as temporary:
        if suffix == ".csv":
            frame.to_csv(temporary, index=False, lineterminator="\n")
        else:
            frame.to_parquet(temporary, index=False)


@reader
def read_table(path: str | Path) -> Any:
    """Return a table artifact as a DataFrame after checking it; in .csv an empty text reads as
    missing.
    """
    import pandas as pd

    meta = verify(path)
    if Path(path).suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_csv(
        path,
        dtype=meta.get("columns"),
        keep_default_na=False,
        na_values=[""],
        float_precision="round_trip",
    )


def write_tensors(
    path: str | Path, tensors: Mapping[str, Any], meta: Mapping | None = None
) -> None:
    """Write named tensors as safetensors, with a sidecar that carries `meta`."""
    from safetensors.torch import save_file

    with artifact(path, meta) as temporary:  # copies: safetensors refuses tensors that share memory
        save_file(
            {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
            temporary,
        )


@reader
def read_tensors(path: str | Path) -> tuple[dict, dict]:
    """Return (tensors on the CPU, sidecar) of a safetensors artifact after checking it; nothing is
    unpickled.
    """
    from safetensors.torch import load_file

    meta = verify(path)
    return load_file(path), meta


def write_figure(stem: str | Path, figure: Any, frame: Any, meta: Mapping | None = None) -> None:
    """Write <stem>.png (120 dpi), <stem>.pdf and the table behind them <stem>.csv; same figure,
    same bytes.
    """
    write_table(f"{stem}.csv", frame, meta)
    undated = {
        ".png": {"Software": None},
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    for suffix, metadata in undated.items():
        with artifact(f"{stem}{suffix}", meta) as temporary:
            figure.savefig(temporary, dpi=120, metadata=metadata, bbox_inches="tight")


@contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold <path>.lock for the block: one process at a time; says once whom it waits for. Not
    re-entrant.
    """
    path = Path(f"{path}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(
                f"waiting for {path.stem}: {file.read().strip() or 'another process'} is working "
                "on it",
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def once(path: Path, write: Callable[[], Any]) -> None:
    """Call `write`, which makes the artifact `path`, unless it is there and intact; of several
    processes that need it one makes it, and the others wait.
    """
    if intact(path):
        return
    with lock(path):
        if not intact(path):
            write()
