"""A sitting at a GPU, tried on a CPU with small nets: to a clock, killed, read back."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pandas as pd
import pytest
import yaml

from dejavu_utils import store
from dejavu_utils.attack import scoring
from dejavu_utils.data import datasets, manifests

ROOT = store.PACKAGE.parent
SCRIPT = ROOT / "results" / "sitting.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
FIRST = ["pilot", "train vicreg-260", "attack vicreg-260"]


def _command(tmp_path, only=(), minutes=3.0, *more):
    command = [sys.executable, str(SCRIPT), "run", str(tmp_path / "out"), "--tiny"]
    command += ["--work", str(tmp_path / "work"), "--minutes", str(minutes)]
    return [*command, "--only", ",".join(only), *more]


def _run(tmp_path, only=(), minutes=3.0, *more, **environment):
    command = _command(tmp_path, only, minutes, *more)
    environment = ENVIRONMENT | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines(), _table(tmp_path)


def _table(tmp_path):
    return json.loads((tmp_path / "out" / "sitting.json").read_text())["steps"]


def _load(name, monkeypatch):
    """Import a script of results/, which is no package."""
    monkeypatch.syspath_prepend(ROOT / "results")
    return importlib.import_module(name)


def test_encoders_are_trained_attacked_reported_and_recognised(tmp_path):
    _, table = _run(tmp_path, FIRST, 3, "--part", "evidence")
    assert {name: entry["status"] for name, entry in table.items()} == dict.fromkeys(FIRST, "done")
    pilot = json.loads((tmp_path / "out" / "pilot.json").read_text())
    assert {each["beside"] for each in pilot["settings"]} == {False, True}
    assert all(each["images_per_second"] > 0 for each in pilot["settings"])

    with zipfile.ZipFile(tmp_path / "out" / "vicreg-260.zip") as archive:
        guesses = pd.read_parquet(io.BytesIO(archive.read("guesses.parquet")))
        losses = pd.read_csv(io.BytesIO(archive.read("losses.csv")))
    last = guesses["epoch"].max()
    assert last == losses["epoch"].max() == table["train vicreg-260"]["result"]["setting"]["epochs"]
    at_end = guesses.query("epoch == @last and attacked == 'attacked'")
    assert set(at_end["layer"]) == {"projector", "block2", "block1", "backbone"}
    first = table["attack vicreg-260"]["result"]["scores"][0]
    whole = at_end.query("layer == 'projector'")
    assert first["score"] == pytest.approx(scoring.score(whole, resamples=0)["score"])

    again, _ = _run(tmp_path, FIRST, 3, "--part", "evidence")
    assert again == [f"{name}: done" for name in FIRST]
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]

    report = [sys.executable, str(SCRIPT), "report", str(tmp_path / "out")]
    subprocess.run([*report, "--into", str(tmp_path / "kept")], check=True, env=ENVIRONMENT)
    text = (tmp_path / "kept" / "README.md").read_text()
    assert f"| vicreg-260 | {last} | projector | attacked | 100 | {first['score']:+.3f}" in text
    assert "- k-NN tf32: not run." in text and "no verdict below 5 seeds" in text
    assert (tmp_path / "kept" / "sittings" / "vicreg-260.zip").is_file()


@pytest.mark.slow
def test_tables_made_side_by_side_are_those_made_one_after_the_other(tmp_path, monkeypatch):
    _run(tmp_path, FIRST, 3, "--part", "evidence")
    sitting, steps = _load("sitting", monkeypatch), _load("sitting_steps", monkeypatch)
    place = sitting.Place(tmp_path / "out", tmp_path / "work", None, True)
    found = {}
    for cores in (1, 4):
        monkeypatch.setattr(store, "cores", lambda cores=cores: cores)
        for table in (tmp_path / "work" / "runs").rglob("probe-*"):
            table.unlink()
        found[cores] = steps.probe(place, "vicreg-260", 60)["probes"]
    assert len(found[1]) == 2 * 5  # encoders; layers and the untrained backbone
    assert found[1] == found[4]


def test_what_is_missing_is_skipped_and_what_fails_is_logged(tmp_path):
    blocked = ["papermill", "ipykernel", "faiss", "snakemake"]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pilot.json").write_text("{")  # half a file
    only = ["notebook", "pilot compiled", "decoder", "k-NN bf16"]
    _, table = _run(tmp_path, only, PYTHONPATH=str(tmp_path / "site"))
    assert [entry["status"] for entry in table.values()] == ["skipped", "failed", "done", "skipped"]
    assert table["notebook"]["reason"] == "ipykernel is not installed"
    assert table["decoder"]["reason"] == "no encoder was trained on this machine"
    assert "JSONDecodeError" in table["pilot compiled"]["traceback"]
    assert "JSONDecodeError" in (tmp_path / "out" / "sitting.log").read_text()
    assert table["k-NN bf16"]["result"]["right"] == 1


@pytest.mark.slow  # a machine under load may not start even the first step in these seconds
def test_the_clock_ends_a_step_and_starts_none_without_time(tmp_path):
    began = time.monotonic()
    _, table = _run(tmp_path, ["pilot", "k-NN tf32"], 0.09)
    assert table["pilot"]["status"] == "failed"
    assert table["pilot"]["reason"] == "over its limit of 5 s"
    assert table["k-NN tf32"]["reason"].startswith("needs 15 s, ")
    assert time.monotonic() - began < 30


def test_a_step_that_is_misspelt_is_an_error(tmp_path):
    command = _command(tmp_path, ["knn"])
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and "no step knn; expected some of tests, " in done.stderr


def test_another_sitting_is_not_mixed_in(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sitting.json").write_text('{"settings": {"tiny": false}, "steps": {}}')
    done = subprocess.run(_command(tmp_path), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and "take another OUT" in done.stderr


@pytest.mark.slow
def test_a_killed_sitting_keeps_what_it_had_and_goes_on(tmp_path):
    """All steps, under a clock of three minutes; the process group is killed in the second one."""
    process = subprocess.Popen(_command(tmp_path), env=ENVIRONMENT, start_new_session=True)
    began = time.monotonic()
    path = tmp_path / "out" / "sitting.json"
    while not path.is_file() and time.monotonic() - began < 120:
        time.sleep(0.1)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = _table(tmp_path)
    assert kept["tests"]["status"] == "done"
    time.sleep(2)
    assert not _of(tmp_path), "a step outlived the sitting"

    began = time.monotonic()
    lines, table = _run(tmp_path)
    assert time.monotonic() - began < 210
    assert lines[0] == "tests: done" and table["tests"] == kept["tests"]
    late = ("over its limit", "needs ")  # on a busy machine three minutes may not be enough
    for name, entry in table.items():
        assert entry["status"] == "done" or entry["reason"].startswith(late), (name, entry)
    assert table["notebook"]["status"] == "done" and "script" not in table
    assert len(list((tmp_path / "out").iterdir())) <= 8

    if table["views vicreg-260"]["status"] != "done":  # a later sitting goes on with what was late
        _, table = _run(tmp_path)
    probed = table["views vicreg-260"]["result"]["probes"]
    assert {row["views"] for row in probed} == {5} and len(probed) == 2 * 3  # encoders, layers


def _of(tmp_path):
    """Return the processes that work for this sitting."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if str(tmp_path) in line and "sitting" in line]


def test_no_sitting_can_leave_more_than_eight_files(monkeypatch):
    sitting = _load("sitting", monkeypatch)
    steps = sitting.evidence_steps(sitting.pair_names(), {}, tiny=False)
    archives = {step.argument for step in steps if step.work == "attack"}
    others = ["sitting.json", "sitting.log", "pilot.json", "02_attack.ipynb", "drawings.png"]
    assert len(archives) + len(others) <= 8


def test_a_later_sitting_goes_on_with_the_next_pair(tmp_path, monkeypatch):
    sitting = _load("sitting", monkeypatch)
    kept = tmp_path / "kept"
    kept.mkdir()
    done = {"attack vicreg-260": {"status": "done"}, "attack simclr-260": {"status": "failed"}}
    (kept / "sitting.json").write_text(json.dumps({"steps": done}))
    place = sitting.Place(tmp_path / "out", tmp_path / "work", kept, False)
    attacked = [step.argument for step in sitting.steps("evidence", place) if step.work == "attack"]
    assert attacked == ["simclr-260", "vicreg-261", "simclr-261"]


def test_a_later_sitting_measures_what_is_still_missing(tmp_path, monkeypatch):
    sitting = _load("sitting", monkeypatch)
    place = sitting.Place(tmp_path / "out", tmp_path / "work", tmp_path, False)

    def names(part):
        return [step.name for step in sitting.steps(part, place)]

    assert "pilot compiled" in names("check") and "race" not in names("check")
    assert "race" in names("evidence") and "decoder" in names("evidence")

    done = dict.fromkeys(("tests", "pilot", "race", "decoder"), {"status": "done"})
    failed = {"k-NN tf32": {"status": "failed"}}
    (tmp_path / "sitting.json").write_text(json.dumps({"steps": done | failed}))
    assert names("check")[:2] == ["tests", "notebook"]  # of today's code, again
    assert "k-NN tf32" in names("check") and "embedding crops" in names("check")
    assert not {"pilot", "pilot compiled", "race"} & set(names("check"))
    assert not {"race", "decoder"} & set(names("evidence"))


def _wheel(folder, name):
    """Write the smallest wheel of a module."""
    folder.mkdir(exist_ok=True)
    about = f"{name}-1.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{name}.py": "", f"{about}/METADATA": metadata, f"{about}/WHEEL": tags}
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{about}/RECORD", "".join(f"{path},,\n" for path in files))


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="no pip here")
def test_the_second_command_has_its_own_wheels(tmp_path):
    """A GPU's machine may still hold what the first command unpacked."""
    for name in ("papermill", "lightly"):
        _wheel(tmp_path / name, name)
        _run(tmp_path, ["decoder"], SITTING_WHEELS=str(tmp_path / name))
    unpacked = {path.name for path in (tmp_path / "work").glob("site-*/*.py")}
    assert unpacked == {"papermill.py", "lightly.py"}


def test_what_a_step_had_measured_is_reported_though_the_clock_ended_it(tmp_path):
    printed = "embedding resnet101, 224 px: squares   4935 images/s  83%\n"
    entry = {"status": "failed", "seconds": 27, "reason": "over its limit of 27 s"}
    steps = {"embedding": entry | {"traceback": printed}, "decoder": entry | {"traceback": ""}}
    content = {"settings": {}, "steps": steps}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sitting.json").write_text(json.dumps(content))

    report = [sys.executable, str(SCRIPT), "report", str(tmp_path / "out")]
    subprocess.run([*report, "--into", str(tmp_path / "kept")], check=True, env=ENVIRONMENT)
    text = (tmp_path / "kept" / "README.md").read_text()
    measured = "it had measured: embedding resnet101, 224 px: squares 4935 images/s 83%"
    assert f"- embedding: over its limit of 27 s; {measured}." in text
    assert "- decoder: over its limit of 27 s." in text


def test_the_plan_is_the_profile_gpu_on_forty_classes(monkeypatch):
    plan = _load("sitting", monkeypatch).plan()
    profile = yaml.safe_load((ROOT / "notebooks" / "profiles" / "gpu.yaml").read_text())["all"]
    assert plan["recipe"] | {"compile": True} == profile["recipe"]
    assert plan["sizes"] == profile["sizes"] | {"classes": 40, "shared": 0}
    assert (plan["k"], plan["crop"]["min_side"]) == (profile["k"], profile["crop"]["min_side"])
    assert plan["seeds"] == list(range(260, 270))


@pytest.mark.skipif(
    not os.path.isfile(os.path.join(os.environ.get("DEJAVU_DATA", "."), "tiny-imagenet-50.zip")),
    reason="set DEJAVU_DATA: no tiny-imagenet-50.zip",
)
def test_the_subset_is_the_first_classes_of_the_whole(tmp_path, monkeypatch):
    target = tmp_path / "tiny-imagenet-40.zip"
    command = [sys.executable, str(SCRIPT), "subset", str(target)]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    entry, whole = manifests.read("tiny_imagenet_40"), manifests.read("tiny_imagenet_50")
    assert entry["classes"] == sorted(whole["classes"])[:40]
    manifests.verify(entry, target)
    assert target.stat().st_size == entry["bytes"] <= 45 << 20
    with zipfile.ZipFile(target) as archive:
        pictures = [name for name in archive.namelist() if name.endswith(".JPEG")]
    assert len(pictures) == 20_000

    monkeypatch.setenv("DEJAVU_RUNS", str(tmp_path / "runs"))
    larger = datasets.read("tiny_imagenet_50", classes=2)
    monkeypatch.setenv("DEJAVU_DATA", str(tmp_path))
    smaller = datasets.read("tiny_imagenet_40", classes=2)
    assert smaller.digest == larger.digest and smaller.classes[0] == "goldfish"


def test_the_readme_of_the_results_is_generated(tmp_path):
    """The committed one says what the committed sittings hold."""
    kept = ROOT / "results" / "tiny_imagenet"
    if (kept / "sittings").is_dir():
        (tmp_path / "sittings").symlink_to(kept / "sittings")
    command = [sys.executable, str(SCRIPT), "report", "--into", str(tmp_path)]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    assert (tmp_path / "README.md").read_text() == (kept / "README.md").read_text()


def test_the_tests_for_a_gpu_are_tried_on_a_pretended_one():
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-k", "float64 or crops"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"DEJAVU_PRETENDED_GPU": "1"},
    )
    assert "6 passed" in done.stdout, done.stdout[-3000:]
