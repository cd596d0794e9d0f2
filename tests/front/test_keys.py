"""Cache keys hold the code that a result depends on, all of it and nothing else: found by imports,
never listed by hand.
"""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

from dejavu_utils import imports, store

# what is kept on disk: encoders of both engines, decoders, tables of the attack
RESULTS = ("models.train", "vissl_engine", "reconstruct.decoder", "attack.references")
ATTACK = """
import sys
from pathlib import Path
from dejavu_utils.attack import references
from dejavu_utils.models import launch, pairs

params = {
    "dataset": "scenes",
    "sizes": {"classes": 3, "attacked": 8, "shared": 0, "public": 9, "probe": 3, "control": 3},
    "epochs": [0],
    "crop": {"kind": "periphery", "min_side": 8},
    "recipe": {"encoder": "small4", "projector": "8-8", "batch": 8},
}
pair = pairs.one(params, Path(sys.argv[1]), "vicreg", 0.5, 0)
launch.fit_all(pairs.jobs([pair]), workers=1)
references.two_model(pair, 0, 3)
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package, to be edited; nothing else of the repository is in its folder."""
    folder = tmp_path / "copy" / "dejavu_utils"
    shutil.copytree(store.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def edit(path, old, new):
    """Replace a text that is in a file exactly once."""
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def attacked(package, runs):
    """Return the names of encoders and of tables after the two-model test was asked for."""
    environment = os.environ | {"DEJAVU_ROOT": str(store.PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", ATTACK, str(runs)],
        cwd=package.parent,
        env=environment,
        check=True,
    )
    encoders = {path.name for path in (runs / "encoders").iterdir()}
    tables = {path.name for path in (runs / "pairs").glob("attack-*.parquet")}
    return encoders, tables


def versions(package, monkeypatch):
    """Return the versions of the code behind each kind of result, and of all code ("")."""
    monkeypatch.setattr(store, "PACKAGE", package)
    store.code_version.cache_clear()
    found = {name: store.code_version(f"dejavu_utils.{name}") for name in RESULTS}
    found[""] = store.code_version()
    store.code_version.cache_clear()
    return found


@pytest.mark.slow
def test_an_edit_of_squares_makes_the_attack_s_table_again_and_trains_nothing(package, tmp_path):
    encoders, tables = attacked(package, tmp_path / "runs")
    assert len(encoders) == 2 and len(tables) == 1

    edit(package / "data" / "images.py", "* keep / 2\n", "* keep / 3\n")
    again = attacked(package, tmp_path / "runs")
    assert again[0] == encoders
    assert len(again[1]) == 2 and tables < again[1]


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("plots.py", set()),
        ("audit/estimate.py", set()),
        ("data/images.py", {"attack.references"}),
        ("attack/inference.py", {"attack.references"}),
        # reads other people's encoders, and those that VISSL wrote
        ("models/external.py", {"attack.references"}),
        ("models/criteria.py", {"models.train", "reconstruct.decoder", "attack.references"}),
        ("vissl_engine.py", {"vissl_engine"}),
        ("models/views.py", set(RESULTS)),
        ("__init__.py", set()),  # lazy
        ("store.py", set()),  # moves bytes
    ],
)
def test_an_edit_of_a_file_changes_the_keys_of_what_it_can_change(
    package, file, changed, monkeypatch
):
    before = versions(store.PACKAGE, monkeypatch)
    (package / file).write_text((package / file).read_text() + "\nEDITED = True\n")
    after = versions(package, monkeypatch)
    assert {name for name in before if after[name] != before[name]} == {"", *changed}


def test_every_module_that_is_imported_is_in_the_key():
    """Python itself is asked what an import loads: nothing of it may be missed, but the storage and
    the lazy `__init__.py` of a room, which only says which file a name is in.
    """
    rooms = {f"dejavu_utils.{path.parent.name}" for path in store.PACKAGE.glob("*/__init__.py")}
    each = "print(*[name for name in sys.modules if name.startswith('dejavu_utils.')])"
    code = "import sys\n" + "\n".join(f"import dejavu_utils.{name}; {each}" for name in RESULTS)
    lines = subprocess.run(
        [sys.executable, "-c", code],
        cwd=store.PACKAGE.parent,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    found = set()
    for name, line in zip(RESULTS, lines, strict=True):
        found |= imports.reached(store.PACKAGE, [f"dejavu_utils.{name}"], store.__name__).keys()
        assert set(line.split()) - found - rooms == {"dejavu_utils.store", "dejavu_utils.imports"}


@pytest.mark.parametrize("path", sorted(store.PACKAGE.glob("*/__init__.py")), ids=str)
def test_a_room_s_init_computes_nothing(path):
    allowed = (ast.Expr, ast.ImportFrom, ast.Assign)
    body = ast.parse(path.read_text()).body
    assert all(isinstance(statement, allowed) for statement in body)
    imported = [node.module for node in body if isinstance(node, ast.ImportFrom)]
    assert imported in ([], ["dejavu_utils"])


def test_no_module_is_imported_by_a_text_that_names_it():
    """Such an import would be seen by nobody who reads the code; a lazy __init__.py may, and the
    engines: what one of them trains has its name in the key (`pairs.one`).
    """
    for path in store.PACKAGE.rglob("*.py"):
        if path.name not in ("__init__.py", "engines.py"):
            assert not re.search(r"import_module|__import__", path.read_text()), path


ROOMS = {
    "__init__.py": "def __getattr__(name): ...",
    "top.py": "",
    "plain.py": "def f():\n    return 1",
    "lazy.py": "def f():\n    import toy.room.deep\n    return toy.room.deep.g()",
    "room/__init__.py": "from toy.room.deep import g as shown\nHERE = 1",
    "room/deep.py": "from ..plain import f\ndef g(): return f()",
    "room/other.py": "from . import deep",
    "open/one.py": "",  # a folder without __init__.py
    "open/two.py": "import toy.top",
    "typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy import plain",
    "circle.py": "from toy import turn",
    "turn.py": "def f():\n    from toy import circle",
}


def toy(folder, **files):
    """Return the path of a small package `toy` with rooms; `files` add to it, or replace its."""
    for name, text in (ROOMS | files).items():
        path = folder / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "toy"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import numpy, os.path\nfrom torch import nn", ""),
        ("import toy.plain", "plain"),
        ("import toy.plain as p, toy.top", "plain top"),
        ("from toy import plain, top", "plain top"),
        ("from toy.plain import f", "plain"),
        ("from toy.plain import *", "plain"),
        ("from . import plain", "plain"),
        ("from .room.deep import g", "plain room.deep"),
        ("from .room import deep as d", "plain room.deep"),
        ("from toy import lazy", "lazy plain room.deep"),
        ("class A:\n    def f(self):\n        from toy import top", "top"),
        ("try:\n    import toy.top\nexcept ImportError:\n    pass", "top"),
        ("from toy.room import other", "plain room.deep room.other"),
        ("from toy.room import shown", "plain room.deep"),  # to the file that defines it
        ("from toy.room import HERE", "plain room room.deep"),
        ("from toy.room import unknown", "plain room room.deep room.other"),  # lazy: any of them
        ("from toy import room", "plain room room.deep room.other"),  # as room.other.f
        ("import toy.room", "plain room room.deep room.other"),
        ("from toy.open import one", "open.one"),
        ("from toy import open", "open.one open.two top"),
        ("from toy import typed", "typed"),
        ("from toy import circle", "circle turn"),
        ("if TYPE_CHECKING:\n    from toy import plain\nelse:\n    from toy import top", "top"),
        ("# import toy.plain\n'from toy import plain'", ""),
    ],
)
def test_imports_are_followed_to_the_file_that_defines_the_name(tmp_path, source, found):
    package = toy(tmp_path, **{"asked.py": source})
    reached = imports.reached(package, ["toy.asked"], without="toy.store")
    assert {name.removeprefix("toy.") for name in reached} == {"asked", *found.split()}


PLAIN = "class A:\n    x: int = 1\n    y: str\ndef f(a, *b, c=2):\n    n = a\n    return n\n"


@pytest.mark.parametrize(
    "same",
    [
        "# why\n" + PLAIN.replace("\n    return n", "\n\n\n    return (\n        n)"),
        '"""What it is."""\n' + PLAIN.replace("2):", '2):\n    """Return a."""'),
        PLAIN.replace("class A:", "class A:\n    'One.'"),
        PLAIN.replace("x: int", "x: float").replace("y: str", "y: list[str]"),
        PLAIN.replace("(a, *b, c=2)", "(a: int, *b: str, c: float = 2) -> 'A'"),
        "from __future__ import annotations\nfrom torch import Tensor\n"
        + PLAIN.replace("(a,", "(a: Tensor,"),
        "import typing\nif typing.TYPE_CHECKING:\n    import torch\n" + PLAIN,
    ],
)
def test_what_changes_no_result_changes_no_key(same):
    assert same != PLAIN and imports.code(same) == imports.code(PLAIN)


@pytest.mark.parametrize(
    "other",
    [
        PLAIN.replace("c=2", "c=3"),
        PLAIN.replace("x: int = 1", "x: int = 2"),
        PLAIN.replace("    y: str\n", ""),  # a field of a dataclass
        PLAIN.replace("    y: str\n", "    z: str\n"),
        PLAIN.replace("n = a", "n = 'a'"),
        "from os import path as f\n" + PLAIN + "f()",
        PLAIN + "print(1)",
    ],
)
def test_what_may_change_a_result_changes_the_key(other):
    assert imports.code(other) != imports.code(PLAIN)


def test_two_processes_make_a_table_once(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from dejavu_utils import imports, store
path = Path({str(tmp_path)!r}) / "table.json"
def make():
    with (path.parent / "log").open("a") as log:
        log.write("made\\n")
    time.sleep(1)
    store.write_json(path, [1])
store.once(path, make)
print(store.read_json(path))
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=store.PACKAGE.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert all(text.endswith("[1]\n") for text in said)
    assert (tmp_path / "log").read_text() == "made\n"
