"""The runner behind `make figures`: which notebooks are out of date, and executing one so that
success is certain.

`.venv/bin/python notebooks/batch.py keys|run --help`. Nothing here imports torch: an unchanged
batch ends in seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dejavu_utils import imports, store
from dejavu_utils.data import identity, manifests
from dejavu_utils.data.tree import Tree
from dejavu_utils.parameters import (
    ParameterError,
    cells,
    declared,
    merged,
    of_profile,
    override,
    profiled,
    stages,
)

RATE = (
    200e12  # operations a second that a plan assumes of one GPU: a fifth of an H100's peak in bf16
)
RUNNER = Path(__file__)  # a change of it makes every notebook run again


def given(profile: str, overrides: Mapping[str, Any], only: str | None = None) -> dict[str, dict]:
    """Return the checked parameters that a profile, and `overrides` over it, give to each notebook
    (or to `only`).

    A name that no notebook declares (or that `only` does not) is a ParameterError.
    """
    sections = profiled(profile)
    defaults = {stage: declared(stage) for stage in stages()}
    anywhere = {name: value for stage in defaults.values() for name, value in stage.items()}
    if only and only not in defaults:
        declared(only)  # raises: no such notebook
    merged(
        dict.fromkeys(sections.get("all", {})), dict.fromkeys(anywhere), f"{profile}.yaml, all: "
    )
    scope = f"{only}: " if only else "command line: "
    merged(dict.fromkeys(overrides), dict.fromkeys(defaults[only] if only else anywhere), scope)
    values = {}
    for stage in [only] if only else defaults:
        known = defaults[stage]
        mine = {name: value for name, value in overrides.items() if name in known}
        over = override(of_profile(profile, stage), mine)
        values[stage] = merged(over, known, f"{stage}: ")
    return values


def _data(name: str | None) -> list:
    """Return what identifies a data set: its manifest, and names and contents of its files, where
    it is there.
    """
    manifest = store.root() / "data_manifests" / f"{name}.yaml"
    if not manifest.is_file():
        return []
    entry = manifests.read(manifest.stem)
    try:
        place = manifests.locate(entry)
    except FileNotFoundError:
        return [manifest.read_text(), None]
    return [manifest.read_text(), identity.of(Tree(place))]


def stage_key(
    stage: str, profile: str, values: Mapping[str, Any], known: dict[str, list] | None = None
) -> str:
    """Return the key of an executed notebook; of the data sets in `known` files are not looked at,
    and it learns others.
    """
    params = declared(stage) | values
    known = {} if known is None else known
    name = params.get("dataset")
    if name not in known:
        known[name] = _data(name)
    return store.key(
        stage=stage,
        profile=profile,
        parameters=params,
        source=cells(stage),
        data=known[name],
        code=store.code_version(),
        runner=imports.code(RUNNER.read_text()),
        versions=store.versions(),
    )


def _done(profile: str, stage: str) -> Path:
    return store.runs(profile) / "notebooks" / f"{stage}.ipynb"


def _fresh(notebook: Path, key: str) -> bool:
    """Return whether an executed notebook has this key, and it and all that it has used or made
    are there and intact; with VERIFY=0 in the environment, whether they are there.
    """
    if not store.intact(notebook):
        return False
    meta = store.verify(notebook)
    if meta.get("key") != key:
        return False
    check = Path.is_file if os.environ.get("VERIFY") == "0" else store.intact
    found = [check(notebook.parents[1] / name) for name in meta["used"]]  # tells of all of them
    return all(found)


def write_keys(profile: str, overrides: Mapping[str, Any]) -> list[str]:
    """Return the notebooks to run; keys/<stage>.key becomes newer than a notebook that is out of
    date, never else.
    """
    stale = []
    known: dict[str, list] = {}
    for stage, values in given(profile, overrides).items():
        notebook = _done(profile, stage)
        key = stage_key(stage, profile, values, known)
        path = store.runs(profile) / "keys" / f"{stage}.key"
        content = json.dumps({"key": key, "given": values}, indent=1).encode()
        fresh = _fresh(notebook, key)
        if not fresh:
            stale.append(stage)
        if not fresh or not path.is_file() or path.read_bytes() != content:
            with store.atomic(path) as temporary:
                temporary.write_bytes(content)
        if fresh and path.stat().st_mtime >= (before := notebook.stat().st_mtime - 1):
            os.utime(path, (before, before))
    return stale


def kernel_manager(folder: str) -> type:
    """Return a kernel manager that always starts this interpreter, over sockets in `folder` instead
    of TCP ports.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    argv += ["--log-level=CRITICAL"]  # else its own interruption at the end is printed
    spec = KernelSpec(argv=argv, display_name="Python 3", language="python", name="python3")

    class Here(AsyncKernelManager):
        kernel_spec = spec

        def __init__(self, **options: Any) -> None:
            super().__init__(**options, transport="ipc", connection_file=f"{folder}/kernel.json")

    return Here


@contextmanager
def _reported(stage: str, folder: str) -> Iterator[None]:
    """Print what the notebook's progress line says, in the terminal, every 15 s."""
    status, stop = Path(folder) / "progress", threading.Event()
    os.environ["DEJAVU_PROGRESS"] = str(status)

    def report() -> None:
        last = None
        while not stop.wait(15):
            line = status.read_text() if status.is_file() else None
            if line and line != last:
                print(f"  {stage} · {line}", flush=True)
            last = line

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        os.environ.pop("DEJAVU_PROGRESS", None)  # its folder goes away


def _problem(notebook: Path, error: Exception | None) -> str | None:
    """Return what went wrong in an executed notebook (cell id, end of the traceback), or None if
    every cell ran.
    """
    code = []
    if notebook.is_file():
        code = [
            cell
            for cell in json.loads(notebook.read_text())["cells"]
            if cell["cell_type"] == "code"
        ]
    for cell in code:
        for output in cell["outputs"]:
            if output["output_type"] == "error" and output["ename"] != "SystemExit":
                trace = "\n".join(output["traceback"] or [f"{output['ename']}: {output['evalue']}"])
                lines = re.sub(r"\x1b\[[0-9;]*m", "", trace).strip().splitlines()
                return f"cell `{cell['id']}` failed:\n" + "\n".join(
                    f"    {line}" for line in lines[-12:]
                )
    stopped = [
        cell for cell in code if "".join(cell["source"]).strip() and not cell["execution_count"]
    ]
    if error:
        began = [cell for cell in code if cell["metadata"].get("papermill", {}).get("start_time")]
        where = f" in cell `{began[-1]['id']}`" if began else ""
        return f"the kernel stopped{where}: {type(error).__name__}: {error}"
    if stopped:
        return (
            f"cell `{stopped[0]['id']}` never ran: the cell before it ended the program (exit, "
            "quit?)."
        )
    return None if code else "it holds no code cell."


def _used(profile: str, trace: Path) -> list[str]:
    """Return the artifacts of a profile that a notebook has used or made (`store.TRACE`), as paths
    relative to the profile's folder.
    """
    folder = store.runs(profile).resolve()
    noted = trace.read_bytes().split(b"\0") if trace.is_file() else []
    paths = [Path(os.fsdecode(name)) for name in sorted(set(noted)) if name]
    inside = [path for path in paths if path.is_relative_to(folder) and path.is_file()]
    return [str(path.relative_to(folder)) for path in inside]


def _figures(notebook: Path) -> list[str]:
    """Return the paths of the pictures that an executed notebook wrote."""
    meta = store.verify(notebook)
    folder = notebook.parents[1]
    pictures = [folder / name for name in meta["used"] if name.endswith(".png")]
    mine = [path for path in pictures if store.verify(path).get("stage") == meta["stage"]]
    return [os.path.relpath(path, store.root()) for path in mine]


def execute(
    stage: str, profile: str, overrides: Mapping[str, Any], out: Path | None = None
) -> str | None:
    """Return None after executing a notebook into `out`, or the error; `out` appears only if every
    cell ran.

    Papermill's own record calls cells completed after a kernel was killed, so the cells are looked
    at instead.
    """
    values = given(profile, overrides, only=stage)[stage]
    out = (out or _done(profile, stage)).resolve()
    part = out.with_name(out.name + ".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    began, key = time.time(), stage_key(stage, profile, values)
    print(f"{stage} …", flush=True)
    os.environ.setdefault("PYTHONHASHSEED", "0")
    paths = [str(store.PACKAGE.parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["DEJAVU_PROFILE"] = profile
    folder, error = tempfile.mkdtemp(prefix="dejavu-"), None
    trace = Path(folder) / "used"
    fresh = _fresh(out, key)
    with store.lock(out), _reported(stage, folder), warnings.catch_warnings():
        if not fresh and _fresh(out, key):
            return None  # another process has run it while this one waited

        warnings.simplefilter("ignore")  # papermill's on the suffix .part
        part.unlink(missing_ok=True)
        os.environ[store.TRACE] = str(trace)
        try:
            import papermill

            papermill.execute_notebook(
                str(store.root() / "notebooks" / f"{stage}.ipynb"),
                str(part),
                values,
                kernel_name="python3",
                language="python",
                cwd=str(store.root()),
                progress_bar=False,
                kernel_manager_class=kernel_manager(folder),
            )
        except (
            Exception
        ) as caught:  # every failure is reported the same way, papermill's and the kernel's
            error = caught
        finally:
            os.environ.pop(store.TRACE)
            used = _used(profile, trace)
            shutil.rmtree(folder, ignore_errors=True)
        if problem := _problem(part, error):
            return f"{stage}: {problem}\n  partial notebook: {part}"
        meta = {
            "stage": stage,
            "key": key,
            "parameters": declared(stage) | values,
            "seconds": round(time.time() - began, 1),
            "used": used,
        }
        with store.artifact(out, meta) as temporary:
            os.replace(part, temporary)
    return None


def parse_overrides(pairs: Sequence[Sequence[str]], text: str) -> dict[str, Any]:
    """Return parameters from `-p name value` pairs and `name=value name=value`; a.b is key b of a.

    Values are JSON (where 1e-6 is a number) or else YAML (where text needs no quotes).
    ParameterError quotes what cannot be read.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ParameterError(f"P: {text!r} cannot be read: {error}. Close its quotes.") from None

    pairs = [*pairs]
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ParameterError(f'P: {word!r} is not name=value, such as P="k=10".')
        pairs.append((name, value))

    values: dict[str, Any] = {}
    for name, value in pairs:
        *outer, last = name.split(".")
        target = values
        for part in outer:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ParameterError(f"P: {name} is a key of {part}, which is {target!r} as well.")
        target[last] = _value(name, value)
    return values


def _value(name: str, text: str) -> Any:
    """Return a value that was typed as JSON, or else as YAML."""
    import yaml

    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ParameterError(
            f"P: {name}={text} cannot be read: {reason}. Write a number, a word, [a, b] or "
            "{name: value}."
        ) from None


USAGE = """make audit ENCODER=torchvision:resnet50 WEIGHTS=model.pt IMAGES=its/training/images
  PUBLIC=public/images [HELD_OUT=test/images] [OUT=report.html]
  pictures without classes: HELD_OUT=test/images P="audit.labels=False", and no PUBLIC
  [REFERENCE=timm:NAME] [REFERENCE_WEIGHTS=second.pt] [JSON=1] [STRICT=1]
  [P="k=100 crop.kind=corner reading.layer=backbone"]
  an encoder: timm:NAME, torchvision:NAME, hub:REPOSITORY:NAME, hf:NAME_OR_FOLDER,
  package.module:function, or a file that this package wrote; without WEIGHTS its pretrained ones
  images: a folder of class folders, a data set of data_manifests/, or both as pets:/my/copy
  STRICT=1: make fails unless there is no evidence (the status: python -m dejavu_utils.audit)"""
SETTINGS = ("k", "seeds", "crop", "reading", "audit")  # parameters of 05_audit that P may change


def audit(overrides: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    """Return the exit status of an audit of what `make audit` was given in the environment.

    Settings are those of the notebook 05_audit. 0 after any verdict, or with STRICT its status.
    """
    missing = [name for name in ("ENCODER", "IMAGES") if not environment.get(name)]
    if missing:
        raise ParameterError(f"{' and '.join(missing)} not given; expected\n  {USAGE}")
    if unknown := [name for name in overrides if name not in SETTINGS]:
        raise ParameterError(
            f"P: {unknown[0]} is not a setting of an audit; expected {', '.join(SETTINGS)}, such "
            'as P="k=100 crop.kind=corner".'
        )
    params = declared("05_audit") | given("laptop", overrides, "05_audit")["05_audit"]
    params["encoder"] = {"target": environment["ENCODER"]}
    names = ("encoder", "weights", "images", "public", "held_out")
    names += ("reference", "reference_weights")
    asked = {name: environment.get(name.upper(), "") for name in names}
    if params["audit"]["labels"] and not asked["public"]:
        raise ParameterError(f"PUBLIC not given; expected\n  {USAGE}")
    out = environment.get("OUT")

    from dejavu_utils.audit import command  # imports torch: only now
    from dejavu_utils.audit.settings import Settings

    settings = dataclasses.asdict(Settings.of(params))
    folder = store.runs("audit") / "reports"
    as_json = bool(environment.get("JSON"))
    status = command.conduct(asked, settings, Path(out) if out else None, folder, as_json)
    return status if status == 2 or environment.get("STRICT") else 0


def plan(profile: str, overrides: Mapping[str, Any]) -> str:
    """Return what a profile would train, as text: encoders, steps, arithmetic, GPU hours,
    checkpoints on disk.
    """
    stage = "01_training"
    params = declared(stage) | given(profile, overrides)[stage]
    if "recipe" not in params:
        return f"{stage} trains nothing"
    from dejavu_utils.models import pairs  # imports torch: only now

    if params["dataset"] in manifests.names():
        manifests.read(params["dataset"])  # says what is wrong with it
    try:
        table = pairs.plan(params)
    except ValueError as error:  # a criterion or a setting that training does not know
        raise ParameterError(f"{stage}: {error}") from error
    hours = table["exaflop"] * 1e18 / RATE / 3600
    table = table.round({"exaflop": 3, "gib": 2}).assign(**{"GPU hours": hours.round(1)})
    total = (
        f"{table['encoders'].sum()} encoders, {hours.sum():.1f} GPU hours at {RATE / 1e12:.0f} "
        "TFLOP/s a GPU "
        f"(estimated, not measured), {table['gib'].sum():.1f} GiB of checkpoints, plus the pictures"
    )
    return f"{table.to_string(index=False)}\n{total}"


def numbers(profile: str) -> str:
    """Return the main numbers of a profile as a small table, or "" where 02_attack has not run."""
    path = store.runs(profile) / "tables" / "scores.csv"
    if not path.is_file():
        return ""

    table = store.read_table(path)
    whole = table[(table["layer"] == "projector") & (table["p"] == 100)]
    last = whole[whole["epoch"] == whole["epoch"].max()]
    shown = last[["criterion", "rho", "target", "reference", "score", "low", "high", "n", "seeds"]]
    return (
        f"déjà vu score after {whole['epoch'].max()} epochs, of all attacked images "
        "(low, high: 95 % over images)\n"
        f"{shown.dropna(axis=1, how='all').round(3).to_string(index=False)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of `keys` (which notebooks are out of date), `run` (execute one),
    `plan` (the cost), `numbers` (what was found) or `audit` (of what the environment names).
    """
    parser = argparse.ArgumentParser(prog="notebooks/batch.py", description=__doc__)
    parser.add_argument("command", choices=("keys", "run", "plan", "numbers", "audit"))
    parser.add_argument("stage", nargs="?", help="the notebook to run, such as 02_attack")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument(
        "-p", dest="pairs", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    parser.add_argument("--set", default="", metavar="'NAME=VALUE …'")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        overrides = parse_overrides(options.pairs, options.set)
        if options.command == "keys":
            stale = write_keys(options.profile, overrides)
            print(f"to run: {', '.join(stale)}" if stale else "up to date", flush=True)
            return 0
        if options.command == "plan":
            print(plan(options.profile, overrides))
            return 0
        if options.command == "numbers":
            if found := numbers(options.profile):
                print(found)
            return 0
        if options.command == "audit":
            return audit(overrides, os.environ)
        if not options.stage:
            parser.error("run: name the notebook, such as 02_attack")
        began = time.monotonic()
        problem = execute(options.stage, options.profile, overrides, options.out)
        if problem:
            print(problem, flush=True)
            return 1

        print(f"{options.stage} done in {time.monotonic() - began:.0f} s", flush=True)
        for figure in _figures(options.out or _done(options.profile, options.stage)):
            print(f"  {figure}", flush=True)
        return 0
    except (ParameterError, store.StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
