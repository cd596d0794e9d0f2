"""`python -m dejavu_utils.audit` and `make audit`, from anywhere, also from a wheel."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import torchvision
from PIL import Image

from dejavu_utils import parameters, store
from dejavu_utils.audit import __main__ as terminal
from dejavu_utils.audit import audit, sources
from dejavu_utils.audit.settings import Settings
from dejavu_utils.models import own_format, train
from dejavu_utils.models.encoders import Encoder

SIZES = {"a": 300, "public": 300, "control": 300, "few": 40}
# elsewhere there are no limits
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
OF_ONE_SIZE = """
import torch


def make():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4))
    network.size = 32
    return network
"""


@pytest.fixture(scope="module")
def place(audits, tmp_path_factory):
    """A folder with pictures, and a file of an encoder with random weights."""
    root = tmp_path_factory.mktemp("place")
    for name, count in SIZES.items():
        audits.folder(root / name, audits.parts["control" if name == "few" else name], count)
    (root / "of_one_size.py").write_text(OF_ONE_SIZE)
    torch.manual_seed(1)
    recipe = train.Recipe(encoder="small4", projector="8-8", size=24)
    encoder = Encoder("small4", "8-8", 24).eval()
    own_format.save(root / "e.safetensors", encoder, recipe)
    return root


def arguments(place, **changes):
    given = {
        "encoder": place / "e.safetensors",
        "images": place / "a",
        "public": place / "public",
        "held-out": place / "control",
        "k": 5,
    }
    return [f"--{name}={value}" for name, value in (given | changes).items() if value != ""]


def test_it_prints_the_verdict_and_writes_the_report_here(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = terminal.main(arguments(place))
    out = capsys.readouterr()
    assert status in (0, 4)  # random weights remember nothing
    said, numbers, path = out.out.splitlines()
    assert said.startswith({0: "No evidence: ", 4: "Undecided, because "}[status])
    assert "95 % interval" in numbers and "members, layer projector" in numbers
    page, table = sorted(tmp_path.glob("*.html"))[0], sorted(tmp_path.glob("*.csv"))[0]
    assert path == f"the report is {page.name}" and "e.safetensors" in page.name
    assert said.partition(":")[2] in page.read_text() and "pictures: held-out" in out.err
    store.verify(page)
    lines = table.read_text().splitlines()
    assert lines[0] == "id,score,member" and len(lines) > 400
    assert {line.rpartition(",")[2] for line in lines[1:]} == {"0", "1"}


def test_json_is_the_report_s_summary(place, tmp_path, capsys):
    out = tmp_path / "my report.html"
    status = terminal.main([*arguments(place, out=out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == status and found["report"] == str(out) and out.is_file()
    assert found["verdict"] in ("no evidence", "undecided") and len(found["controls"]) == 4
    assert {row["reading"] for row in found["scores"]} >= {"members minus held-out"}

    again = audit.run(
        str(place / "e.safetensors"), place / "a", place / "public", place / "control", k=5
    )
    assert {name: again.summary()[name] for name in again.summary()} == {
        name: value for name, value in found.items() if name != "report"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "gone.pt"}, "ENCODER: there is no file gone.pt; expected timm:NAME"),
        ({"images": "/no/such"}, "IMAGES: /no/such; expected a folder or zip of class folders"),
        ({"held-out": "/no/such"}, "HELD_OUT: /no/such; expected a folder"),
        ({"audit.margin": 7}, "audit: margin = 7.0; expected a share between 0 and 1"),
        ({"crop.kind": "centre"}, "expected a kind of"),
        ({"reading.layer": "block9"}, "Pass reading.layer=backbone"),
        (
            {"encoder": "of_one_size:make", "reading.size": 40},
            "ENCODER=of_one_size:make fails on a picture of 40 px",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(place, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(place)  # holds of_one_size.py
    assert terminal.main(arguments(place, **changes)) == 2
    out = capsys.readouterr()
    assert out.out == "" and len(out.err.splitlines()) == 1
    assert out.err.startswith("error: ") and message in out.err


def test_a_word_that_is_no_option_is_status_2(place, capsys):
    with pytest.raises(SystemExit) as error:
        terminal.main([*arguments(place), "--kk=3"])
    assert error.value.code == 2 and "--kk=3" in capsys.readouterr().err


def test_a_report_that_is_there_is_refused_before_anything_is_embedded(place, tmp_path, capsys):
    out = tmp_path / "report.html"
    out.write_text("another audit's")
    assert terminal.main(arguments(place, out=out)) == 2
    said = capsys.readouterr().err
    assert "report.html is there already" in said and "pictures" not in said
    assert out.read_text() == "another audit's"


def larger_network(root):
    """A file of weights that is larger than a small budget."""
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), root / "model.pt")
    return {"encoder": "torchvision:shufflenet_v2_x0_5", "weights": root / "model.pt"}


def unnamed_network(root):
    return {"encoder": larger_network(root)["weights"]}


@on_linux
@pytest.mark.parametrize("make", [larger_network, unnamed_network])
def test_too_small_a_budget_names_a_command_that_works(place, tmp_path, monkeypatch, capsys, make):
    monkeypatch.chdir(tmp_path)
    given = arguments(place, **make(tmp_path), **{"reading.size": 32, "audit.limit": 50})
    assert terminal.main([*given, "--audit.limit_gib=0.001"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "more memory than" in said
    (advised,) = re.findall(r"pass (audit\.limit_gib=\d+)", said)
    status = terminal.main([*given, f"--{advised}"])
    said = capsys.readouterr().err
    assert "limit_gib" not in said, said
    assert status in ((2,) if make is unnamed_network else (0, 4))


def large(path):
    """Save a white picture of 90 Mpx, more than is read with the usual budget."""
    Image.new("L", (10_000, 9_000), 255).save(path)


@on_linux
@pytest.mark.parametrize("alone", [False, True])
def test_a_larger_budget_lets_a_larger_picture_through(place, tmp_path, alone):
    """One too large is a line in the list, nothing but such is an error; both say what to pass."""
    root = tmp_path / "set"
    shutil.copytree(place / "few", root)
    if alone:
        for file in sorted(root.rglob("*.png"))[2:]:
            file.unlink()
    files = sorted(root.rglob("*.png"))
    chosen = files if alone else files[:1]
    for file in chosen:
        large(file)

    if alone:
        with pytest.raises(store.StoreError, match="more than 89478485 px") as caught:
            sources.pictures(root, labels=False)
        said = str(caught.value)
    else:
        ((name, said),) = sources.pictures(root).skipped
        assert name == files[0].relative_to(root).as_posix()

    (advised,) = re.findall(r"pass audit\.limit_gib=(\d+)", said)
    found = sources.pictures(root, labels=not alone, limit_gib=float(advised))
    assert found.skipped == [] and len(found) == len(files)
    assert found.pixels[0].shape == (3, 9_000, 10_000)


@on_linux
def test_the_budget_is_a_setting_of_make_audit_and_changes_no_report(place, tmp_path):
    params = parameters.declared("05_audit")
    params["encoder"]["target"] = "torchvision:resnet18"
    params["audit"]["limit_gib"] = 1e-4
    limit = Settings.of(params).limit_gib
    network = larger_network(tmp_path)
    with pytest.raises(store.StoreError, match=r"more memory.*pass audit.limit_gib=8"):
        sources.encoder(network["encoder"], str(network["weights"]), limit_gib=limit)

    few = sources.pictures(place / "few")
    control = sources.pictures(place / "control")
    encoder = str(place / "e.safetensors")
    case = audit.load(encoder, few, control, settings=Settings(k=5))
    names = {audit.file_name(case, Settings(k=5, limit_gib=limit)) for limit in (1, 8.0)}
    assert len(names) == 1


@pytest.mark.slow
def test_from_a_wheel_without_a_clone(place, tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
    shutil.copytree(store.PACKAGE.parent, source, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", tmp_path, source], check=True)
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(installed)
    elsewhere.mkdir()

    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dejavu_utils.audit", *arguments(place)]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, env=environment)
    assert done.returncode in (0, 4), done.stderr
    page = next(elsewhere.glob("*.html")).read_text()
    assert "What could not be checked" in page


@pytest.mark.slow
def test_make_audit_from_the_command_line(place, tmp_path):
    """It ends with 0 after any verdict, passes the status on if it is told so, and leaves two
    reports of two encoders.
    """
    shutil.copy(place / "e.safetensors", tmp_path / "f.safetensors")
    shutil.copy(place / "e.safetensors.json", tmp_path / "f.safetensors.json")
    given = {
        "ENCODER": place / "e.safetensors",
        "IMAGES": place / "a",
        "PUBLIC": place / "public",
        "HELD_OUT": place / "few",  # too few: undecided
        "P": "k=5",
        "PYTHON": sys.executable,
    }
    environment = os.environ | {"DEJAVU_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}

    def make(**changes):
        words = [f"{name}={value}" for name, value in (given | changes).items() if value]
        command = [shutil.which("make"), "-s", "audit", *words]
        return subprocess.run(
            command, cwd=store.PACKAGE.parent, capture_output=True, text=True, env=environment
        )

    done = make()
    assert done.returncode == 0, done.stdout + done.stderr
    said, numbers, path = done.stdout.splitlines()[-3:]
    assert said.startswith("Undecided, because ") and "too few (n = " in numbers
    assert str(tmp_path / "runs/audit/reports") in path and "pictures" in done.stderr

    done = make(STRICT="1", ENCODER=tmp_path / "f.safetensors")
    assert done.returncode == 2 and "Error 4" in done.stderr
    names = [path.name for path in (tmp_path / "runs/audit/reports").glob("*.html")]
    assert len(names) == 2 and len({name.partition(".safetensors")[0] for name in names}) == 2

    done = make(PUBLIC="")
    assert done.returncode != 0 and "make audit ENCODER=" in done.stderr
    assert done.stderr.startswith("error: PUBLIC not given")
    done = make(PUBLIC="/no/such")
    assert done.returncode != 0 and "PUBLIC: /no/such; expected a folder" in done.stderr
    done = make(P="sizes.public=3")
    assert done.returncode != 0 and "P: sizes is not a setting of an audit" in done.stderr
