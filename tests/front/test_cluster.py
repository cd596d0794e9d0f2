"""Jobs for a cluster: each encoder that any notebook will ask for, once, and none that is done."""

import importlib.util
import json
import sys

import pytest

from dejavu_utils import store
from dejavu_utils.models import launch, train

CHANGES = {
    "criteria": ["vicreg"],
    "rhos": [0.2],
    "epochs": [0, 1],
    "sizes": {"classes": 3, "attacked": 8, "shared": 0, "public": 8, "probe": 4, "control": 4},
}


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    folder = store.PACKAGE.parent / "notebooks"
    monkeypatch.setenv("DEJAVU_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    spec = importlib.util.spec_from_file_location("cluster", folder / "cluster.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_notebooks_encoders_once(cluster):
    plain = cluster.jobs(
        "smoke", CHANGES
    )  # the default pair, 00_tour's is the same, and one invariance coefficient
    assert sorted(job["seed"] for job in plain.values()) == ["0/A", "0/A", "0/B", "0/B"]
    more = {
        "more": {"starts": 2, "many": 8},
        "trained": {"simclr": {"constants.temperature": [0.5]}},
    }
    found = cluster.jobs("smoke", CHANGES | more).values()
    assert (
        len(found) == 2 + 2 + 8 + 2 + 2
    )  # default, second start, halves, the setting, and the default of its criterion
    assert {job["device"] for job in found} == {"auto"}


def test_files_are_written_for_what_is_left(cluster):
    where = store.runs("smoke") / "keys" / "jobs"
    assert cluster.write("smoke", CHANGES) == 4
    (where / "of-before.json").write_text("[]")
    (job,) = json.loads(sorted(where.glob("vicreg-*.json"))[0].read_text())
    trained = launch.here(train.load_job(job))
    assert trained.device in ("cpu", "cuda")
    launch.fit(trained)
    assert cluster.write("smoke", CHANGES) == 3
    assert len(list(where.glob("*.json"))) == 3 and not (where / "of-before.json").exists()
