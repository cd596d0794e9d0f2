"""A run of every notebook that is damaged, or killed while it is made, ends with the same files.

The moments of the kills and the bits that are flipped are drawn from $DEJAVU_SEED (0). Each
notebook is killed $DEJAVU_KILLS times (5): 40 kills in all take half an hour or longer.
"""

import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest

from dejavu_utils import store
from dejavu_utils.parameters import stages

pytestmark = pytest.mark.slow

NOTEBOOKS = store.PACKAGE.parent / "notebooks"
PROFILE = "smoke"
SEED = os.environ.get("DEJAVU_SEED", "0")
KILLS = int(os.environ.get("DEJAVU_KILLS", "5"))  # of each notebook
PARTS = 4  # of the files, flipped together
PATIENCE = 60.0  # s that what a killed process has started may take to end, on a busy machine
# Not damage that anybody could notice: logs, and the locks of what nobody is at work on.
LOGS = (".log", ".jsonl", ".lock")
# Folders and files that hold times of day or seconds.
TIMED = ("notebooks", "report", "keys")
# In files: where a run is, and how fast the machine was.
PASSING = re.compile(rf"/[^\s<>\"']*/runs/{PROFILE}/|\"images_per_second\": [-+.e\d]+".encode())
CLOCK = ["seconds", "minutes", "images_per_second"]


@dataclass
class Made:
    """A finished run, and for each notebook what was there before it and the seconds it took."""

    runs: Path
    before: dict[str, Path]
    seconds: dict[str, float]


def started(runs, *command, **more):
    """Return a process of this repository's scripts that works in the folder `runs`."""
    environment = os.environ | {"DEJAVU_RUNS": str(runs), "OMP_NUM_THREADS": "1"} | more
    log = (runs.parent / "said.log").open("ab")
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)


def notebook(stage, runs):
    return started(runs, NOTEBOOKS / "batch.py", "run", stage, "--profile", PROFILE)


def finish(process, runs):
    """Fail with what was said, unless a process ends well."""
    status = process.wait()
    said = (runs.parent / "said.log").read_text(errors="replace")
    assert status == 0, said[-3000:]
    return said


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of all notebooks, in order, and the pages of `make report`."""
    root = tmp_path_factory.mktemp("whole")
    found = Made(root / "runs", {}, {})
    found.runs.mkdir()
    for stage in stages():
        found.before[stage] = root / f"before {stage}"
        shutil.copytree(found.runs, found.before[stage])
        began = time.monotonic()
        finish(notebook(stage, found.runs), found.runs)
        found.seconds[stage] = time.monotonic() - began

    finish(started(found.runs, NOTEBOOKS / "site" / "pages.py", PROFILE), found.runs)
    finish(started(found.runs, NOTEBOOKS / "figures.py", PROFILE=PROFILE), found.runs)
    return found


def kept(runs):
    """Return the files of a run but logs."""
    files = [path for path in sorted((runs / PROFILE).rglob("*")) if path.is_file()]
    return [path for path in files if not path.name.endswith(LOGS) and "log" not in path.parts]


def lasting(path):
    """Return a file's bytes without what PASSING finds, a table's without its columns of CLOCK."""
    if path.suffix == ".csv":
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return table.drop(columns=CLOCK, errors="ignore").to_csv(index=False).encode()
    return PASSING.sub(b"", path.read_bytes())


def contents(runs):
    """Return {file: digest} of what is the same whenever and wherever it is made: not the times in
    sidecars, executed notebooks, and the pages of them, nor what is not `lasting`.
    """
    found = {}
    for path in kept(runs):
        relative = path.relative_to(runs / PROFILE)
        beside = path.with_name(path.name.removeprefix(".").removesuffix(".json"))
        timed = relative.parts[0] in TIMED or relative.name in TIMED
        if not timed and (beside == path or not beside.is_file()):
            found[str(relative)] = hashlib.sha256(lasting(path)).hexdigest()
    return found


# -- killed ---------------------------------------------------------------------------------------


def kill(process, rng):
    """Kill a runner alone, one of what it has started, or all of them; fail if one of them lives
    on when the runner has ended.
    """
    first = psutil.Process(process.pid)
    family = [first, *first.children(recursive=True)]
    chosen = rng.choice(([first], [rng.choice(family)], family))
    for one in chosen:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass

    process.wait()  # a notebook that has lost a helper only may go on to its end
    _, left = psutil.wait_procs(family[1:], PATIENCE)
    names = [" ".join(one.cmdline()) for one in left]
    for one in left:
        one.kill()
    assert not names, f"outlived what had started them: {names}"


@pytest.mark.parametrize("stage", stages())
def test_a_notebook_that_is_killed_at_any_moment_ends_with_the_same_files(made, tmp_path, stage):
    """Its trainings, tables, decoders and figures: whatever it is at work on at that moment."""
    rng = random.Random(f"{stage} {SEED}")
    runs = shutil.copytree(made.before[stage], tmp_path / "runs")
    moments = []
    longest = made.seconds[stage]
    while len(moments) < KILLS:
        moment = rng.uniform(0, longest)
        began = time.monotonic()
        process = notebook(stage, runs)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            kill(process, rng)
            moments.append(round(moment, 1))
            continue

        finish(process, runs)  # it was faster: begin anew, and kill sooner
        longest = min(longest, time.monotonic() - began)
        shutil.rmtree(runs)
        shutil.copytree(made.before[stage], runs)

    finish(notebook(stage, runs), runs)
    after = made.before | {"": made.runs}
    following = list(after)[list(after).index(stage) + 1]
    assert contents(runs) == contents(after[following]), f"killed after {moments} s, seed {SEED}"
    print(f"\n{stage}: killed after {moments} s of {longest:.0f}")


# -- damaged --------------------------------------------------------------------------------------


def flip(path, rng):
    """Flip one bit of a file; its date stays as it was."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_each_flipped_file_of_a_finished_run_is_noticed(made, batch, tmp_path, monkeypatch, capsys):
    """One after the other: something is to be run again, or the file is written anew at once."""
    runs = shutil.copytree(made.runs, tmp_path / "runs")
    monkeypatch.setenv("DEJAVU_RUNS", str(runs))
    assert batch.write_keys(PROFILE, {}) == []
    rng = random.Random(f"flips {SEED}")
    files = [path for path in kept(runs) if path.stat().st_size and "report" not in path.parts]
    missed = []
    for path in files:
        good = path.read_bytes()
        flip(path, rng)
        stale = batch.write_keys(PROFILE, {})
        if not stale and path.read_bytes() != good:
            missed.append(str(path.relative_to(runs)))
        path.write_bytes(good)

    assert not missed, f"{len(missed)} of {len(files)}, seed {SEED}"
    assert batch.write_keys(PROFILE, {}) == []
    with capsys.disabled():
        print(f"\n{len(files)} files flipped, one after the other")


@pytest.mark.parametrize("part", range(PARTS))
def test_flipped_files_of_a_finished_run_are_made_again(
    made, batch, tmp_path, monkeypatch, capsys, part
):
    """Also the pages of `make report`; a quarter of all files at once."""
    runs = shutil.copytree(made.runs, tmp_path / "runs")
    monkeypatch.setenv("DEJAVU_RUNS", str(runs))
    rng = random.Random(f"part {part} {SEED}")
    files = [path for path in kept(runs) if path.stat().st_size][part::PARTS]
    for path in files:
        flip(path, rng)

    said = finish(started(runs, NOTEBOOKS / "figures.py", PROFILE=PROFILE), runs)
    assert "is damaged: it is made again" in said
    assert contents(runs) == contents(made.runs), f"seed {SEED}"
    assert batch.write_keys(PROFILE, {}) == []
    pages = sorted((runs / PROFILE / "report").glob("*.html"))
    assert pages and all(store.intact(page) for page in pages)
    with capsys.disabled():
        print(f"\n{len(files)} files flipped at once")
