"""Outside a clone: what a wheel brings, and the one field that says where the package is."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import nbformat
import pytest

from dejavu_utils import store

ROOT = store.PACKAGE.parent
OWNER = "https://github.com/someone/deja-vu"


# -- the address ------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path):
    """A copy of the files that show the address, and the script that writes it."""
    names = ("pyproject.toml", "README.md", "CITATION.cff", "notebooks/00_tour.ipynb")
    for name in (*names, "results/address.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def written(root):
    """Return the texts of the files after `make address`."""
    subprocess.run([sys.executable, root / "results/address.py"], check=True, capture_output=True)
    names = ("README.md", "CITATION.cff", "notebooks/00_tour.ipynb")
    return {name: (root / name).read_text() for name in names}


def test_one_edit_fills_all_and_its_undoing_empties_all(shown):
    project = shown / "pyproject.toml"
    before = project.read_text()
    empty = before.replace('\nRepository = "', '\n# Repository = "')
    project.write_text(empty)
    without = written(shown)
    assert "colab" not in without["README.md"] and "repository-code" not in without["CITATION.cff"]

    line = next(line for line in empty.splitlines() if line.startswith("# Repository"))
    project.write_text(empty.replace(line, f'Repository = "{OWNER}/"'))
    filled = written(shown)
    tour = nbformat.reads(filled["notebooks/00_tour.ipynb"], as_version=4)
    nbformat.validate(tour)
    install = next(cell for cell in tour.cells if cell["id"] == "install")
    assert f'address = "{OWNER}"' in install.source
    link = "/github/someone/deja-vu/blob/main/notebooks/00_tour.ipynb"
    assert link in filled["README.md"]
    assert f'repository-code: "{OWNER}"' in filled["CITATION.cff"]
    assert written(shown) == filled  # a second time changes nothing

    project.write_text(empty)
    assert written(shown) == without


def test_what_is_committed_is_what_make_address_writes(shown):
    committed = {name: (shown / name).read_text() for name in written(shown)}
    assert committed == {name: (ROOT / name).read_text() for name in committed}


def test_the_citation_has_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    import dejavu_utils

    assert dejavu_utils.__version__ == version


# -- the wheel --------------------------------------------------------------------------------


def test_every_room_is_packed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "dejavu_utils").rglob("__init__.py")
    }
    assert {name for name in listed if name.startswith("dejavu_utils")} == rooms


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel of this repository, unpacked: (folder, the wheel)."""
    place = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "data", "__pycache__", "*.egg-info")
    shutil.copytree(
        ROOT,
        place / "source",
        ignore=lambda folder, names: (
            ignored(folder, names)
            if folder == str(ROOT)
            else shutil.ignore_patterns("__pycache__")(folder, names)
        ),
    )
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", place, place / "source"], check=True)
    wheel = next(place.glob("*.whl"))
    zipfile.ZipFile(wheel).extractall(place / "installed")
    return place / "installed", wheel


def alone(installed, folder, *command):
    """Run a command in an empty folder, with what the wheel brought and no clone."""
    folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if "DEJAVU" not in name}
    environment |= {"PYTHONPATH": str(installed[0]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_wheel_brings_notebooks_profiles_manifests_and_templates(installed, tmp_path):
    code = (
        "import json\nfrom dejavu_utils import parameters, store\n"
        "from dejavu_utils.data import manifests\nfrom dejavu_utils.audit import report\n"
        "report.templates().get_template('report.html.j2')\n"
        "print(json.dumps([store.__file__, parameters.stages(), manifests.names(), "
        "str(store.runs('laptop')), len(parameters.declared('02_attack'))]))"
    )
    place, stages, names, runs, declared = json.loads(alone(installed, tmp_path, "-c", code))
    assert place.startswith(str(installed[0]))
    assert stages == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert names == sorted(path.stem for path in (ROOT / "data_manifests").glob("*.yaml"))
    assert runs == str(tmp_path / "runs" / "laptop") and declared > 5
    profiles = installed[0] / "dejavu_clone" / "notebooks" / "profiles"
    assert sorted(path.name for path in profiles.glob("*.yaml")) == sorted(
        path.name for path in (ROOT / "notebooks" / "profiles").glob("*.yaml")
    )


@pytest.mark.slow
def test_the_tour_runs_in_an_empty_folder(installed, tmp_path):
    """As on a hosted notebook: its file alone, and the wheel."""
    place = tmp_path / "empty"
    place.mkdir()
    shutil.copy(ROOT / "notebooks" / "00_tour.ipynb", place)
    values = installed[0] / "dejavu_clone" / "notebooks" / "profiles" / "smoke.yaml"
    code = (
        "import sys, yaml, papermill\n"
        "given = yaml.safe_load(open(sys.argv[1]))\n"
        "given = given.get('all', {}) | given.get('00_tour', {})\n"
        "known = papermill.inspect_notebook('00_tour.ipynb')\n"
        "given = {name: value for name, value in given.items() if name in known}\n"
        "papermill.execute_notebook('00_tour.ipynb', 'out.ipynb', given, progress_bar=False)"
    )
    alone(installed, place, "-c", code, str(values))
    assert (place / "runs" / "smoke" / "figures" / "tour_epochs.png").is_file()
    assert not list(installed[0].rglob("*.png"))  # nothing is written beside the module
