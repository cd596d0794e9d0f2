"""Damage on disk is noticed before "done" is said, and what is damaged is made again."""

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dejavu_utils import store

# Not damage that anybody could notice: logs, and the locks of what nobody is at work on.
LOGS = (".log", ".jsonl", ".lock")
TRAINED = """
file = nb.store.runs(profile) / "encoders" / "a" / "epoch-0001.bin"

def train():
    with nb.store.artifact(file, {"seed": seed}) as path:
        path.write_bytes(bytes(range(256)) * seed)

nb.store.once(file, train)
"""
ATTACKED = """
folder = nb.store.runs(profile)
nb.store.verify(folder / "encoders" / "a" / "epoch-0001.bin")
pairs = folder / "pairs" / f"x-{k}.json"
nb.store.once(pairs, lambda: nb.store.write_json(pairs, [k]))
mine = {"stage": "02_attack"}
nb.store.write_json(folder / "tables" / "scores.json", nb.store.read_json(pairs), mine)
with nb.store.artifact(folder / "figures" / "fig.png", mine) as path:
    path.write_bytes(b"a figure")
"""


# what stands in for the script that makes the pages of `make report`
PAGES = """
import sys
sys.path.insert(0, ".")
from dejavu_utils import store
with store.artifact({!r}) as path:
    path.write_text("a page")
"""


@pytest.fixture(scope="module")
def finished(clone_of_all):
    """A clone in which `make figures` has run: an encoder, a table of pairs, a table, a figure."""
    clone_of_all.add("01_training", TRAINED)
    clone_of_all.add("02_attack", ATTACKED)
    assert "to run: 01_training, 02_attack" in figures(clone_of_all)
    return clone_of_all


def figures(clone, *more, **environment):
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the make that runs the tests
    clean = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(
        ["make", "figures", "PROFILE=tiny", *more],
        cwd=clone.root,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kept(folder):
    """Return the files of a run but logs."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in files if not path.name.endswith(LOGS) and "log" not in path.parts]


def contents(folder):
    """Return what must come back: the artifacts, without times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in kept(folder)
        if path.suffix != ".json" or not path.with_suffix("").is_file()
        if "notebooks" not in path.parts and not path.name.startswith(".")
    }


def flip(path, rng):
    """Flip one bit of a file; its date stays as it was."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flip_of_any_file_of_a_run_is_noticed(finished, batch, capsys):
    """One after the other: something is to be run again, or the file is written anew at once."""
    folder = finished.root / "runs" / "tiny"
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    assert batch.write_keys("tiny", {}) == []
    files = [path for path in kept(folder) if path.stat().st_size]
    assert len(files) > 12
    for path in files:
        good = path.read_bytes()
        flip(path, rng)
        stale = batch.write_keys("tiny", {})
        assert stale or path.read_bytes() == good, f"{path}, seed {seed}"
        path.write_bytes(good)
        assert batch.write_keys("tiny", {}) == []


@pytest.mark.parametrize(
    ("name", "stale"),
    [
        ("pairs/x-10.json", ["02_attack"]),
        ("encoders/a/epoch-0001.bin", ["01_training", "02_attack"]),
        ("encoders/a/epoch-0001.bin.json", ["01_training", "02_attack"]),
        ("notebooks/02_attack.ipynb", ["02_attack"]),
    ],
)
def test_what_has_used_or_made_a_damaged_file_is_run_again(
    finished, batch, capsys, monkeypatch, name, stale
):
    path = finished.root / "runs" / "tiny" / name
    good = path.read_bytes()
    flip(path, random.Random(1))
    assert batch.write_keys("tiny", {}) == stale
    if "json" in name:
        monkeypatch.setenv("VERIFY", "0")
        assert batch.write_keys("tiny", {}) == []
    path.write_bytes(good)


def test_all_that_was_flipped_is_made_again(finished):
    """A page of `make report` as well, and with dates of a clock that was years ahead."""
    folder = finished.root / "runs" / "tiny"
    pages = finished.root / "notebooks" / "site" / "pages.py"
    pages.parent.mkdir()
    pages.write_text(PAGES.format(str(folder / "report" / "index.html")))
    subprocess.run([sys.executable, pages], cwd=finished.root, check=True)
    before = contents(folder)
    assert len(before) > 6
    rng = random.Random(0)
    for path in kept(folder):
        if path.stat().st_size:
            flip(path, rng)
        os.utime(path, (4e9, 4e9))

    said = figures(finished)
    assert "is damaged: it is made again" in said
    assert "to run: 01_training, 02_attack" in said
    assert contents(folder) == before
    assert figures(finished).startswith("up to date")


@pytest.mark.slow
def test_two_at_once_run_each_notebook_once(clone):
    """The second one waits for the first one's notebooks and takes them as they are."""
    count = (
        "with open('count', 'a') as file:\n    print({!r}, file=file)\nimport time; time.sleep(3)"
    )
    for stage in ("01_training", "02_attack"):
        clone.add(stage, count.format(stage))

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda _: figures(clone), range(2)))
    assert (clone.root / "count").read_text().split() == ["01_training", "02_attack"]
    assert sum("waiting for 01_training.ipynb" in text for text in said) == 1


@pytest.mark.parametrize("years", [-30, 30])
def test_dates_of_files_decide_nothing(finished, batch, years):
    """As after a copy from another machine, or with a clock that is wrong."""
    for path in (finished.root / "runs").rglob("*"):
        date = path.stat().st_mtime + years * 365.25 * 86400
        os.utime(path, (date, date))
    assert batch.write_keys("tiny", {}) == []
    assert batch.write_keys("tiny", {"k": 7}) == ["01_training", "02_attack"]
    assert batch.write_keys("tiny", {}) == []


def test_a_sidecar_tells_its_own_damage(tmp_path):
    """Any flipped bit, also in what it says of parameters, seeds or versions."""
    path = tmp_path / "m.json"
    store.write_json(path, {"score": 0.25}, {"seed": 7, "stage": "é", "parameters": {"k": 1e-6}})
    side = store.sidecar(path)
    good = side.read_bytes()
    missed = []
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        side.write_bytes(bad)
        try:
            store.verify(path)
            missed.append(bit)
        except store.StoreError:
            pass
    assert not missed
    side.write_bytes(json.dumps({"sha256": store.digest(path)}).encode())  # without a digest
    with pytest.raises(store.StoreError, match="its sidecar m.json.json is missing or damaged"):
        store.verify(path)


def test_a_name_of_any_bytes_can_be_told_in_a_sidecar(tmp_path):
    path = tmp_path / "m.json"
    root = os.fsdecode(b"/data/caf\xe9")
    store.write_json(path, [root], {"root": root})
    assert store.verify(path)["root"] == root and store.read_json(path) == [root]


def test_what_makes_an_artifact_is_asked_once_more_if_it_is_damaged(tmp_path, capsys):
    path = tmp_path / "a.json"
    made = []

    def write():
        made.append(1)
        store.write_json(path, len(made))

    store.once(path, write)
    store.once(path, write)
    assert made == [1]
    path.write_text("9")
    store.once(path, write)
    assert store.read_json(path) == 2
    assert capsys.readouterr().out == f"{path} is damaged: it is made again\n"


def test_a_training_goes_on_without_its_damaged_files(tmp_path):
    """The state that it would go on from, what it is trained on, an encoder that it has kept."""
    import torch

    from dejavu_utils.models import jobs, launch
    from dejavu_utils.models.recipe import Recipe

    source = tmp_path / "pixels.safetensors"
    pixels = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    store.write_tensors(source, {"pixels": pixels, "labels": torch.arange(32) % 4})
    recipe = Recipe(encoder="small4", projector="8-8", batch=8, size=16, constants={})
    job = jobs.Job(str(source), str(tmp_path / "job"), recipe, [0, 1, 2], "0/A", "cpu", 4)
    launch.fit(job)
    first = [store.digest(job.checkpoint(epoch)) for epoch in job.epochs]

    flip(job.checkpoint(1), random.Random(3))
    Path(job.folder, "last.safetensors").write_bytes(b"damaged")
    assert not job.done()
    launch.fit(job)
    assert job.done()
    assert [store.digest(job.checkpoint(epoch)) for epoch in job.epochs] == first
