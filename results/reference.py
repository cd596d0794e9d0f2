"""The reference results on real photographs, in pieces of some minutes, each one process that
leaves one small archive.

    .venv/bin/python results/reference.py list                   # the pieces, and which are done
    .venv/bin/python results/reference.py run vicreg-100 …       # these; without names all that are
    missing, in order .venv/bin/python results/reference.py merge                  # tables of all
    seeds from the archives

A piece runs the notebooks as plain scripts (their code cells, one after the other, with its
parameters after the parameters cell): no papermill, no Jupyter. It trains in a folder of its own
and keeps of it results/tiny_imagenet/<piece>.zip: tables, curves and the guess for every attacked
image, no picture and no weight. A piece is done when its archive is there and was made with the
same parameters. No piece needs another. `bench` measures the card instead (tests/bench/). A piece
whose modules are not installed is left out, unless it was asked for by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [
    str(HERE.parent),
    str(HERE.parent / "notebooks"),
    str(HERE.parent / "tests" / "bench"),
]
import batch  # noqa: E402  the paths come first

from dejavu_utils import notebook, store  # noqa: E402
from dejavu_utils.parameters import cells, declared, override  # noqa: E402

PROFILE, OUT, LIMIT = "gpu", HERE / "tiny_imagenet", 10 << 20
SEEDS = (100, 101, 102)
VISSLS = " (VISSL)"  # what the merged tables add to the criteria of VISSL's engine
NOTHING_FREE = {"layer": ["projector", "backbone"], "noise": [], "bits": [], "finetune": []}
# Figures that show photographs, and the split, stay where they were made.
STAYING = (
    "partition",
    "examples",
    "gallery",
    "reconstruction_whole",
    "reconstruction_memorized",
    "reconstruction_correlated",
    "reconstruction_random",
)
# VISSL's engine has no net smaller than this one and makes its views on the CPU: fewer epochs. Not
# tuned.
VISSL = {
    "seeds": [100],
    "criteria": ["simclr"],
    "epochs": [0, 50, 100],
    "recipe": {"engine": "vissl", "encoder": "resnet50", "optimizer": "sgd", "lr": 0.3},
}
NEEDS = {
    "vissl": ("vissl", "pkg_resources"),
}  # modules that a bare machine may lack


def pieces() -> dict[str, tuple[list[str], dict]]:
    """Return {piece: (stages, parameters)}, the most valuable first."""
    found: dict[str, tuple[list[str], dict]] = {
        "pilot": (["01_training"], {"seeds": [0], "criteria": ["vicreg"], "epochs": [0, 2]})
    }
    both, others = (
        ["01_training", "02_attack"],
        ["simclr", "barlow_twins", "byol", "dino", "supervised"],
    )
    found |= {f"vicreg-{seed}": (both, {"seeds": [seed], "criteria": ["vicreg"]}) for seed in SEEDS}
    found |= {
        f"{name}-{seed}": (both, {"seeds": [seed], "criteria": [name]})
        for seed in SEEDS
        for name in others
    }
    sweeps = [
        (criterion, setting, values)
        for criterion, wanted in _trained().items()
        for setting, values in wanted.items()
    ]
    for criterion, setting, values in sorted(
        sweeps, key=lambda sweep: sweep[1].startswith("trained")
    ):
        own = {
            "criteria": [criterion],
            "trained": {criterion: {setting: values}},
            "free": NOTHING_FREE,
        }
        if setting.startswith("trained"):  # the smallest training set is the one that is attacked
            own["sizes"] = {"attacked": min(values)}
        found |= {
            f"{setting.split('.')[-1]}-{seed}": (["04_mitigation"], own | {"seeds": [seed]})
            for seed in SEEDS
        }
    found |= {
        f"rcdm-{seed}": (["03_reconstruction"], {"seeds": [seed], "criteria": ["vicreg"]})
        for seed in SEEDS
    }
    found["many-100"] = (
        [*both, "07_other_measures"],
        {"seeds": [100], "criteria": ["vicreg"], "more": {"starts": 2, "many": 8}},
    )
    return found | {"bench": (["bench"], {"seeds": [0]}), "vissl-100": (both, VISSL)}


def _trained() -> dict:
    return batch.given(PROFILE, {})["04_mitigation"]["trained"]


def lacking(name: str) -> list[str]:
    """Return the modules that a piece needs and that are not installed."""
    return [
        module
        for module in NEEDS.get(name.split("-")[0], ())
        if importlib.util.find_spec(module) is None
    ]


def script(stage: str, values: dict) -> str:
    """Return a notebook as a plain script: its code cells, with `values` set after the parameters
    cell, and named as given.
    """
    parameters = cells(stage, "parameters")[0]
    given = [f"{name} = {value!r}" for name, value in values.items()]
    given.append(f"{notebook.GIVEN} = {list(values)!r}")
    code = [source for source in _code(stage) if source != parameters]
    return "\n\n".join([parameters, "\n".join(given), *code])


def _code(stage: str) -> list[str]:
    found = json.loads((store.root() / "notebooks" / f"{stage}.ipynb").read_text())["cells"]
    skipped = {"exercise", "solution"}
    return [
        "".join(cell["source"])
        for cell in found
        if cell["cell_type"] == "code" and not skipped & set(cell["metadata"].get("tags", []))
    ]


def _parameters(name: str, changes: dict) -> dict[str, dict]:
    """Return the parameters of every stage of a piece: the profile's, the piece's over them,
    `changes` over both.
    """
    stages, own = pieces()[name]
    if stages == [
        "bench"
    ]:  # its sizes depend on the machine: only what was asked for is a parameter
        return {"bench": own | {"sizes": changes.get("bench", {})}}
    own = override(own, changes)
    known = {stage: declared(stage) for stage in stages}
    mine = {
        stage: {key: value for key, value in own.items() if key in known[stage]} for stage in stages
    }
    return {stage: batch.given(PROFILE, mine[stage], only=stage)[stage] for stage in stages}


def done(name: str, changes: dict) -> bool:
    """Return whether the archive of a piece is there, undamaged, and was made with these
    parameters.
    """
    try:
        return store.verify(OUT / f"{name}.zip")["key"] == _key(name, changes)
    except (FileNotFoundError, store.StoreError, KeyError):
        return False


def _key(name: str, changes: dict) -> str:
    return store.key(piece=name, parameters=_parameters(name, changes))


def run(name: str, changes: dict) -> Path:
    """Return the archive of a piece after running its notebooks, or the benchmarks, in this
    process.
    """
    began, parameters = time.time(), _parameters(name, changes)
    with tempfile.TemporaryDirectory(prefix="dejavu-") as folder:
        os.environ["DEJAVU_RUNS"] = folder
        guesses = []
        for stage, values in parameters.items():
            print(f"{name}: {stage}", flush=True)
            if stage == "bench":
                import bench

                store.write_table(
                    store.runs(PROFILE) / "tables" / "bench.csv", bench.rows(values["sizes"])
                )
                continue
            names: dict = {"__name__": "__main__"}
            exec(compile(script(stage, values), f"{stage}.py", "exec"), names)
            guesses += [names[table] for table in ("attacks", "everything") if table in names]
            guesses += names.get("unseen", [])  # the negative control of 02_attack
        return _pack(
            name, Path(folder) / PROFILE, guesses, parameters, changes, time.time() - began
        )


def _pack(
    name: str, folder: Path, guesses: list, parameters: dict, changes: dict, seconds: float
) -> Path:
    """Return the archive of what a piece leaves, with a sidecar that says how it was made."""
    import pandas as pd

    kept = [
        path
        for kind in ("tables", "metrics", "figures")
        for path in sorted((folder / kind).glob("*"))
        if path.suffix in (".csv", ".json", ".png")
        and not path.name.removeprefix(".").startswith(STAYING)  # nor their sidecars
    ]
    first = next(iter(parameters.values()))
    meta = {
        "command": f"make reference PIECES={name}",
        "key": _key(name, changes),
        "parameters": parameters,
        "seed": first["seeds"],
        "n": max((table["id"].nunique() for table in guesses), default=0),
        "commit": _commit(),
        "hardware": _hardware(),
        "minutes": round(seconds / 60, 1),
    }
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.zip"
    with (
        store.artifact(path, meta) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for one in kept:
            archive.write(one, one.relative_to(folder))
        if guesses:
            buffer = io.BytesIO()
            pd.concat(guesses, ignore_index=True).to_parquet(
                buffer, index=False, compression="zstd"
            )
            archive.writestr("guesses.parquet", buffer.getvalue())
    if path.stat().st_size > LIMIT:
        raise SystemExit(
            f"{path} has {path.stat().st_size >> 20} MiB, more than {LIMIT >> 20}: leave "
            "something out"
        )
    print(f"{name}: {seconds / 60:.1f} min, {path.stat().st_size >> 10} KiB, {path}", flush=True)
    return path


def _commit() -> str:
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    )
    return git.stdout.strip() or "unknown"


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"cpu, {store.cores()} cores, {platform.machine()}"


def _read(name: str):
    """Return the guesses of all archives whose table has the column `name`, or has it not
    ("-name"), as one table.
    """
    import pandas as pd

    found = []
    for path in sorted(OUT.glob("*.zip")):
        parameters = store.verify(path).get("parameters", {})
        with zipfile.ZipFile(path) as archive:
            if "guesses.parquet" in archive.namelist():
                found.append(pd.read_parquet(io.BytesIO(archive.read("guesses.parquet"))))
                if any(
                    stage.get("recipe", {}).get("engine") == "vissl"
                    for stage in parameters.values()
                ):
                    found[-1]["criterion"] += VISSLS
    for i, table in enumerate(
        found
    ):  # a sweep of set sizes attacks fewer images: its default is not the others'
        if "setting" in table and table["setting"].str.startswith("trained").any():
            found[i] = table[table["setting"].str.startswith("trained")]
    found = [table for table in found if (name.strip("-") in table) != name.startswith("-")]
    return pd.concat(found, ignore_index=True) if found else None


def _attacked(table) -> dict:
    """Return the tables of attacks that were trained for the same epochs."""
    from dejavu_utils.attack import summaries

    attacked, epochs = (
        table[table["attacked"] == "attacked"],
        sorted(map(int, table["epoch"].unique())),
    )
    last = attacked[(attacked["epoch"] == epochs[-1]) & (attacked["layer"] == "projector")]
    return {
        "scores": summaries.scores(attacked, [100, 20, 5]),
        "shares": summaries.shares(attacked),
        "differences": summaries.differences(attacked, epochs),
        "curve": summaries.curve(last),
        "controls": summaries.scores(table[table["attacked"] == "control"], [100]),
    }


def merge() -> None:
    """Write the tables of all seeds together, from the guesses in the archives, and the benchmarks
    as they are.
    """
    import pandas as pd

    from dejavu_utils import mitigation

    made, one = {}, ["criterion", "seed", "epoch", "layer", "direction", "role", "id"]
    if (
        table := _read("-setting")
    ) is not None:  # the many-model piece has attacked an encoder that is there already
        table = table.drop_duplicates([*one, "attacked"], keep="last")
        parts = [
            _attacked(part) for _, part in table.groupby(table["criterion"].str.endswith(VISSLS))
        ]
        made |= {
            name: pd.concat([part[name] for part in parts], ignore_index=True) for name in parts[0]
        }
    changed = _read("setting")
    if changed is not None:
        changed = changed[changed["layer"] == "projector"]
        changed = changed.drop_duplicates([*one, "setting", "value"])
        made["mitigation"] = mitigation.changes(changed)
    if (OUT / "bench.zip").exists():
        store.verify(OUT / "bench.zip")
        with zipfile.ZipFile(OUT / "bench.zip") as archive:
            made["bench"] = pd.read_csv(io.BytesIO(archive.read("tables/bench.csv")))
    if not made:
        raise SystemExit(f"no archive in {OUT}: run `make reference` on a machine with a GPU first")
    for name, frame in made.items():
        store.write_table(OUT / f"{name}.csv", frame, {"command": "results/reference.py merge"})
        print(f"{name}: {len(frame)} rows")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("list", "run", "merge"))
    parser.add_argument("names", nargs="*")
    parser.add_argument(
        "--set",
        default="",
        metavar="'NAME=VALUE …'",
        help="parameters over the profile's, for tests",
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start no piece after so many minutes"
    )
    options = parser.parse_args()
    changes, known, began = batch.parse_overrides([], options.set), pieces(), time.time()
    if unknown := set(options.names) - set(known):
        sys.exit(f"error: no piece {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    if options.command == "merge":
        return merge()
    names = options.names or [name for name in known if name != "pilot"]
    missing = {
        name: f"needs {', '.join(lacking(name))}, not installed here"
        for name in names
        if lacking(name) and not done(name, changes)
    }
    if missing and options.names and options.command == "run":
        sys.exit("\n".join(f"error: {name} {words}" for name, words in missing.items()))
    for name in names:
        if name in missing:
            print(f"{name}: left out, it {missing[name]}", flush=True)
        elif options.command == "list" or done(name, changes):
            print(f"{name}: {'done' if done(name, changes) else 'to do'}")
        elif time.time() - began < 60 * options.minutes:
            run(name, changes)


if __name__ == "__main__":
    main()
