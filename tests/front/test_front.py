"""The front door: Makefile, Snakefile, environment.yml, requirements.lock."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from dejavu_utils import store
from dejavu_utils.parameters import ParameterError

HERE = store.PACKAGE.parent
EIGHT = [
    "torch",
    "torchvision",
    "jupyterlab",
    "papermill",
    "matplotlib",
    "seaborn",
    "faiss-gpu",
    "vissl",
]
LOCK = (HERE / "requirements.lock").read_text()


def make(*arguments, cwd=HERE, **environment):
    # MAKEFLAGS: `make test` runs these tests, and its own settings are not theirs
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "P")
    }
    return subprocess.run(
        ["make", *arguments], cwd=cwd, capture_output=True, text=True, env=clean | environment
    )


def test_make_alone_says_what_to_do_first_then_lists_every_target_on_one_line():
    done = make()
    text = (HERE / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    first, _, every = done.stdout.partition("All targets:\n")
    steps = re.findall(r"^  \d\. make ([a-z-]+)", first, re.MULTILINE)
    listed = [line.split()[1] for line in every.splitlines()]
    assert done.returncode == 0
    assert len(steps) == 6 and set(steps) <= set(targets)
    assert sorted(listed) == sorted(targets)
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


def test_an_unknown_target_is_an_error():
    done = make("figurs")
    assert done.returncode != 0
    assert "figurs" in done.stderr


def test_the_lock_has_hashes_and_no_addresses():
    assert "://" not in LOCK
    packages = re.findall(r"^[a-z0-9._-]+==.*?(?=^\S|\Z)", LOCK, re.MULTILINE | re.DOTALL)
    assert len(packages) > 200
    assert all("--hash=sha256:" in package for package in packages)


def test_environment_yml_names_the_eight_packages_as_the_lock_pins_them():
    text = (HERE / "environment.yml").read_text()
    content = yaml.safe_load(text)
    pip = next(item["pip"] for item in content["dependencies"] if isinstance(item, dict))
    assert pip == ["-r requirements.lock"]
    assert any(str(item).startswith("python=3.12") for item in content["dependencies"])
    named = dict(re.findall(r"^#   ([a-z-]+)==(\S+)$", text, re.MULTILINE))
    assert list(named) == EIGHT
    pinned = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", LOCK, re.MULTILINE))
    assert named == {name: pinned[name] for name in EIGHT}


def test_make_figures_runs_in_order_then_is_up_to_date_then_runs_what_changed(clone):
    folder = clone.root / "runs" / "tiny" / "notebooks"

    def figures(*arguments):
        done = make("figures", "PROFILE=tiny", *arguments, cwd=clone.root)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    clone.add("00_tour", "print('shown')")
    first = figures()
    assert first.index("00_tour done") < first.index("01_training …")  # first things first
    assert first.index("01_training done") < first.index("02_attack …")
    last = "the figures are in runs/tiny/figures/; `make report PROFILE=tiny` writes pages"
    assert first.splitlines()[-1] == last
    assert len(first.splitlines()) == 8
    dates = {path: path.stat().st_mtime for path in folder.glob("*.ipynb")}
    assert len(dates) == 3
    assert figures() == f"up to date\n{last}\n"
    assert {path: path.stat().st_mtime for path in folder.glob("*.ipynb")} == dates
    clone.add("02_attack", "print('attacked twice with', k)")
    again = figures()
    assert "to run: 02_attack\n" in again
    assert "01_training" not in again


def test_make_figures_passes_parameters_on_and_stops_at_an_error(clone):
    done = make("figures", "PROFILE=tiny", "P=sede=3", cwd=clone.root)
    assert done.returncode != 0
    assert "sede is not a parameter; did you mean seed?" in done.stderr
    dry = make("figures", "PROFILE=tiny", "DRY=1", cwd=clone.root)
    assert dry.returncode == 0
    assert "to run: 01_training, 02_attack" in dry.stdout
    clone.add("01_training", "assert k == 10, f'k is {k}'")
    done = make("figures", "PROFILE=tiny", "P=k=7 rho=1e-6", cwd=clone.root)
    assert done.returncode != 0
    assert "01_training: cell `cell-2` failed" in done.stdout
    assert "AssertionError: k is 7" in done.stdout
    folder = clone.root / "runs" / "tiny" / "notebooks"
    assert [path.name for path in folder.glob("*.ipynb*") if path.suffix != ".lock"] == [
        "01_training.ipynb.part"
    ]
    done = make("clean", cwd=clone.root)
    assert done.returncode == 0
    assert not (clone.root / "runs").exists()
    assert (clone.root / "notebooks").is_dir()


def test_what_was_announced_and_has_not_run_is_an_error(repository, monkeypatch, capsys):
    """Whoever ran the notebooks says that all went well, and nothing was made."""
    monkeypatch.syspath_prepend(HERE / "notebooks")
    runner = importlib.import_module("figures")
    monkeypatch.setattr(runner, "supervised", lambda words: 0)
    repository.add("02_attack", "print(1)")
    with pytest.raises(ParameterError, match="^02_attack should have run and is not up to date"):
        runner.figures({"PROFILE": "tiny"})
    assert capsys.readouterr().out == "to run: 02_attack\n"


RECORDS = """import json, os, pathlib, sys
line = json.dumps([sys.argv[1:], dict(os.environ)])
with pathlib.Path("said").open("a") as file:
    file.write(line + "\\n")
"""
HOSTILE = [
    "$(shell touch done)",
    "$(file >done,x)",
    "$(eval x := $(shell touch done))",
    "$$(touch done)",
    "$(touch done)",
    "`touch done`",
    '"; touch done; "',
    "'; touch done; '",
    "; touch done",
    "& touch done",
    "| touch done",
    "x && touch done",
    "x || touch done",
    "> done",
    "<(touch done)",
    "x\ntouch done",
    "x\n+@touch done",
    "\\\n; touch done",
    "\\$(touch done)",
    "${IFS}touch${IFS}done",
    "John's model.pt",
    "a$b.pt",
    "a#b.pt",
    "--help",
    "--eval=$(shell touch done)",
    "(touch done)",
    "{touch,done}",
    "*",
    "~",
    "%",
]
TYPED = {
    "figures": ("PROFILE", "P", "DRY", "VERIFY", "EXECUTOR", "EXECUTOR_FLAGS", "CORES"),
    "report": ("PROFILE",),
    "site": ("PROFILE",),
    "slides": ("PROFILE", "REVEAL"),
    "student": ("OUT",),
    "data": ("NAME",),
    "audit": (
        *("ENCODER", "WEIGHTS", "REFERENCE", "REFERENCE_WEIGHTS", "IMAGES", "PUBLIC", "HELD_OUT"),
        *("OUT", "JSON", "STRICT", "P"),
    ),
    "reference": ("PIECES", "MINUTES"),
    "sitting": ("OUT", "MINUTES", "PART"),
}


@pytest.mark.parametrize("target", TYPED)
def test_what_a_user_types_is_never_run(clone, target):
    """Every value of every variable arrives as it was typed: half on the command line of make, half
    in its environment.
    """
    (clone.root / "records.py").write_text(RECORDS)
    python = clone.root / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S records.py "$@"\n')
    said = clone.root / "said"
    for turn in range(len(HOSTILE)):
        # each variable has another value than its neighbours, and in the end has had all of them
        places = enumerate(TYPED[target], turn)
        given = {name: HOSTILE[place % len(HOSTILE)] for place, name in places}
        said.unlink(missing_ok=True)
        if turn % 2:
            make(target, cwd=clone.root, **given)
        else:
            make(target, *[f"{name}={value}" for name, value in given.items()], cwd=clone.root)

        assert not (clone.root / "done").exists(), f"one of {given} was run"
        lines = [json.loads(line) for line in said.read_text().splitlines()]
        assert lines
        for _, there in lines:
            assert {name: there[name] for name in given} == given


def test_without_a_python_make_says_so_once(clone, tmp_path):
    for name in ("sh", "env", "touch", "test", "echo"):
        if shutil.which(name):
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    stub = tmp_path / "bin" / "python3.12"  # version managers leave such: there, but not to be run
    stub.write_text("#!/bin/sh\nexit 127\n")
    stub.chmod(0o755)
    shutil.rmtree(clone.root / ".venv")
    done = subprocess.run(
        [shutil.which("make"), "figures"],
        cwd=clone.root,
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path / "bin")},
    )
    assert done.returncode != 0
    assert done.stderr.count("No Python 3.11, 3.12 or 3.13") == 1
    assert not (clone.root / ".venv").exists()
