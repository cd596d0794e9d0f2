"""notebook and the runner: parameters are checked wherever a notebook runs, and only a complete run
is accepted.
"""

import json
import os
import subprocess
import sys
import zipfile

import pytest

from dejavu_utils import notebook, parameters, store
from dejavu_utils.parameters import ParameterError, merged

DEFAULTS = {
    "seed": 0,
    "rho": 0.5,
    "flag": False,
    "name": "x",
    "percents": [1, 5],
    "shares": [0.5],
    "free": {},
    "none": None,
    "sizes": {"attacked": 10, "inner": {"depth": 1, "width": 2.0}},
}
# A parameters cell with a dict.
SIZED = 'profile = "laptop"\nseed = 0\nrho = 0.5\nk = 10\nsizes = {"a": 1, "b": 2}\n'


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rho": 1}, {"rho": 1.0}),
        ({"none": 3}, {"none": 3}),
        ({"none": "a"}, {"none": "a"}),
        ({"flag": True}, {"flag": True}),
        ({"percents": (2,)}, {"percents": [2]}),
        ({"shares": [1, 0.2]}, {"shares": [1.0, 0.2]}),
        ({"percents": []}, {"percents": []}),
        ({"free": {"any": [1]}}, {"free": {"any": [1]}}),
        ({}, {}),
        (
            {"sizes": {"inner": {"depth": 5}}},
            {"sizes": {"attacked": 10, "inner": {"depth": 5, "width": 2.0}}},
        ),
    ],
)
def test_values_that_fit_are_taken_and_dicts_filled_in(given, expected):
    found = merged(given, DEFAULTS)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sede": 1}, r"^02: sede is not a parameter; did you mean seed\?$"),
        ({"zzzz": 1}, r"zzzz is not a parameter; there are: seed, rho, "),
        ({"seed": 1.0}, r"seed = 1.0 is float, expected int such as 0"),
        ({"seed": True}, r"seed = True is bool, expected int"),
        ({"rho": False}, r"rho = False is bool, expected float"),
        ({"flag": 1}, r"flag = 1 is int, expected bool"),
        (
            {"rho": "1e-6"},
            r"rho = '1e-6' is str, expected float such as 0.5. YAML reads 1e-6 as text: write "
            r"1.0e-6\.$",
        ),
        ({"rho": "half"}, r"rho = 'half' is str, expected float such as 0.5\.$"),
        ({"rho": None}, r"rho = None is NoneType, expected float"),
        ({"name": 3}, r"name = 3 is int, expected str"),
        ({"percents": 5}, r"percents = 5 is int, expected list"),
        (
            {"percents": "[5, 10]"},
            r"percents = '.5, 10.' is str, expected list such as .*papermill -p passes text: use "
            r"-y \"percents: .5, 10.\", or .venv/bin/python notebooks/batch.py run\.$",
        ),
        (
            {"sizes": "{attacked: 3}"},
            r"expected dict such as .*papermill -p passes text: use -y \"sizes: .attacked: 3.\"",
        ),
        ({"percents": "many"}, r"percents = 'many' is str, expected list such as [^.]*\.$"),
        ({"percents": [1, "2"]}, r"percents\[1\] = '2' is str, expected int"),
        ({"sizes": 3}, r"sizes = 3 is int, expected dict"),
        (
            {"sizes": {"atacked": 3}},
            r"02: sizes.atacked is not a parameter; did you mean sizes.attacked\?",
        ),
        (
            {"sizes": {"inner": {"widht": 3}}},
            r"sizes.inner.widht is not a parameter; did you mean sizes.inner.width\?",
        ),
        ({"sizes": {"inner": {"depth": "3"}}}, r"sizes.inner.depth = '3' is str, expected int"),
    ],
)
def test_names_and_types_that_do_not_fit_are_one_clear_error(given, message):
    with pytest.raises(ParameterError, match=message):
        merged(given, DEFAULTS, "02: ")


def test_a_recipe_is_checked_against_the_dataclass_of_training():
    defaults = {"recipe": {}}
    given = {"recipe": {"lr": 1, "constants": {"invariance": 25.0}, "views": {"blur": 0.5}}}
    found = merged(given, defaults)["recipe"]
    assert found.keys() == {"lr", "constants", "views"}
    assert found["lr"] == 1.0
    assert found["constants"] == {"invariance": 25.0}
    from dejavu_utils.models import pairs
    from dejavu_utils.models.train import Recipe

    recipe = pairs.recipe("vicreg", found)  # fills in the rest
    assert (recipe.lr, recipe.views["blur"], recipe.constants) == (1.0, 0.5, {"invariance": 25.0})
    assert recipe.views["scale_min"] == Recipe().views["scale_min"]
    with pytest.raises(
        ParameterError, match=r"recipe.lrr is not a parameter; did you mean recipe.lr\?"
    ):
        merged({"recipe": {"lrr": 1}}, defaults)
    with pytest.raises(
        ParameterError, match=r"recipe.views.blurr is not .*did you mean recipe.views.blur\?"
    ):
        merged({"recipe": {"views": {"blurr": 1}}}, defaults)
    with pytest.raises(ParameterError, match=r"recipe.batch = '8' is str, expected int"):
        merged({"recipe": {"batch": "8"}}, defaults)


@pytest.mark.parametrize(
    "source",
    ["a = f(1)", "import os", "a = b", "a += 1", "a, b = 1, 2", "a = b = 1", "print(1)", "a ="],
)
def test_a_cell_that_computes_is_no_parameters_cell(source):
    assert parameters.literals(source) is None


def test_literals_of_a_cell():
    source = "a = -1  # x\nb: dict = {'c': [1.5, None, True]}\n"
    assert parameters.literals(source) == {"a": -1, "b": {"c": [1.5, None, True]}}


def _shell():
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.clear_instance()
    return InteractiveShell()


@pytest.fixture
def jupyter(repository, monkeypatch):
    """Run cells one after the other, as JupyterLab does, in any order; the result of each is its
    error or None.
    """
    repository.add("02_attack")

    # A shell puts its own module at __main__, and its reset empties it: a process that is spawned
    # later looks for __main__.__spec__.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    shell = _shell()
    cells = parameters.cells("02_attack")

    def run(source):
        known = {
            "parameters": cells[0],
            "setup": cells[1].replace("run = nb.start", "params = nb.parameters"),
        }
        result = shell.run_cell(known.get(source, source), store_history=True)
        return result.error_in_exec

    yield run, shell.user_ns
    shell.reset()


def test_jupyter_in_order_and_again_in_any_order(jupyter):
    run, names = jupyter
    for cell in (
        "parameters",
        "setup",
        "k + 1",
        "setup",
        "x = 3",
        "setup",
        "k = 12",
        "setup",
        "parameters",
        "setup",
    ):
        assert run(cell) is None, cell
    assert names["params"] == {"profile": "laptop", "seed": 0, "rho": 0.5, "k": 10}


def test_jupyter_an_edited_parameter_counts_and_a_corrected_typo_does_not(jupyter, capsys):
    run, names = jupyter
    run("parameters")
    assert run('profile = "laptop"\nseed = 5\nrho = 1\nkk = 3') is None
    assert "kk is not a parameter; did you mean k?" in str(run("setup"))
    assert run('profile = "laptop"\nseed = 5\nrho = 1\nk = 3') is None
    assert run("setup") is None
    assert names["params"] == {"profile": "laptop", "seed": 5, "rho": 1.0, "k": 3}
    assert type(names["rho"]) is float


def test_jupyter_a_typo_in_a_new_kernel_is_named_and_not_what_it_leaves_unset(jupyter):
    run, _ = jupyter
    assert run('profile = "laptop"\nseed = 5\nrho = 1\nkk = 3') is None
    assert "kk is not a parameter; did you mean k?" in str(run("setup"))


def test_jupyter_papermills_cell_after_the_parameters_is_checked(jupyter, capsys):
    run, _ = jupyter
    run("parameters")
    run("# Parameters\nsede = 5\n")
    assert "sede is not a parameter; did you mean seed?" in str(run("setup"))


def test_jupyter_a_profile_counts_where_nothing_else_is_said(jupyter, repository, capsys):
    """As under plain papermill: `-p profile tiny -p k 10` runs the profile, and k stays 10 though
    that is the notebook's own value, too.
    """
    run, names = jupyter
    repository.profile("tiny", "all: {seed: 3, k: 5}\n02_attack: {rho: 0.25}")
    run("parameters")
    run('# Parameters\nprofile = "tiny"\nk = 10\n')
    assert run("setup") is None
    assert names["params"] == {"profile": "tiny", "seed": 3, "rho": 0.25, "k": 10}
    assert run("setup") is None and names["k"] == 10
    run('profile = "tiny"\nseed = 7\nrho = 0.5\nk = 10')
    assert run("setup") is None  # a cell edited by hand: what differs from the notebook's own stays
    assert names["params"] == {"profile": "tiny", "seed": 7, "rho": 0.25, "k": 5}
    run("parameters")
    assert run("setup") is None
    assert names["params"] == {"profile": "laptop", "seed": 0, "rho": 0.5, "k": 10}


def test_jupyter_what_papermill_passes_counts_however_much_it_is(jupyter, repository, capsys):
    run, names = jupyter
    repository.profile("tiny", "all: {seed: 3, k: 5}")
    run("parameters")
    run('# Parameters\nprofile = "tiny"\nseed = 3\nrho = 0.5\nk = 10\n')
    assert run("setup") is None
    assert names["params"] == {"profile": "tiny", "seed": 3, "rho": 0.5, "k": 10}


def test_jupyter_one_key_that_papermill_passes_leaves_the_profiles_others(jupyter, repository):
    run, names = jupyter
    repository.add("02_attack", parameters=SIZED)
    repository.profile("tiny", "all: {sizes: {a: 5, b: 7}}")
    run(SIZED)
    run('# Parameters\nprofile = "tiny"\nsizes = {"a": 1}\n')
    assert run("setup") is None
    assert names["params"]["sizes"] == {"a": 1, "b": 7}


def test_jupyter_a_profile_that_is_not_there_is_no_label(jupyter, capsys):
    run, _ = jupyter
    run("parameters")
    run('# Parameters\nprofile = "smok"\n')
    assert "no profile 'smok'; there are: tiny" in str(run("setup"))


def test_jupyter_a_name_reused_for_something_else_is_named(jupyter, capsys):
    run, _ = jupyter
    run("parameters")
    run("k = open")
    assert "expected int such as 10" in str(run("setup"))


def test_jupyter_setup_first_says_what_to_run(jupyter, capsys):
    run, _ = jupyter
    assert "profile is not set: run the cell tagged `parameters` first" in str(run("setup"))


def test_without_ipython_the_namespace_is_checked(repository):
    repository.add("02_attack")
    names = {"__name__": "__main__", "profile": "tiny", "seed": 1, "rho": 0, "k": 2, "json": json}
    assert notebook.parameters("02_attack", names) == {
        "profile": "tiny",
        "seed": 1,
        "rho": 0.0,
        "k": 2,
    }
    with pytest.raises(
        ParameterError, match=r"02_attack: sedes is not a parameter; did you mean seed\?"
    ):
        notebook.parameters("02_attack", names | {"sedes": 1})


def test_without_ipython_what_a_script_was_given_counts_over_the_profile(repository):
    """Also a value that is the notebook's own, and one key of a dict."""
    repository.add("02_attack", parameters=SIZED)
    repository.profile("tiny", "all: {seed: 3, k: 5, rho: 0.25, sizes: {b: 7}}")
    names = {"profile": "tiny", "seed": 0, "rho": 0.5, "k": 10, "sizes": {"a": 9}}
    names[notebook.GIVEN] = ["profile", "k", "sizes"]
    assert notebook.parameters("02_attack", names) == {
        "profile": "tiny",
        "seed": 3,
        "rho": 0.25,
        "k": 10,
        "sizes": {"a": 9, "b": 7},
    }


def test_start_seeds_by_seed_and_stage_and_run_writes_where_it_says(repository, capsys):
    import random

    import numpy as np
    import pandas as pd
    import torch

    repository.add("01_training", 'run.table("curve", frame)')
    repository.add("02_attack")

    def draws(stage, seed):
        names = {"profile": "tiny", "seed": seed, "rho": 0.5, "k": 10}
        run = notebook.start(stage, names)
        return run, (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002

    run, first = draws("02_attack", 1)
    assert draws("02_attack", 1)[1] == first
    assert not set(draws("02_attack", 2)[1]) & set(first)
    assert not set(draws("01_training", 1)[1]) & set(first)
    assert "02_attack · profile tiny · seed 1" in capsys.readouterr().out
    with pytest.raises(
        FileNotFoundError, match="curve.csv is not there: run 01_training first, or `make"
    ):
        run.tables("curve")
    run.table("curve", pd.DataFrame({"epoch": [1], "score": [0.1]}))
    assert run.tables("curve")["score"].tolist() == [0.1]
    run.record(score=0.25, n=3)
    run.record(low=0.2, by={"vicreg": [0.1, 0.2]})
    path = repository.root / "runs" / "tiny" / "metrics" / "02_attack.json"
    assert store.read_json(path) == {
        "score": 0.25,
        "n": 3,
        "low": 0.2,
        "by": {"vicreg": [0.1, 0.2]},
    }
    assert store.verify(path)["parameters"]["seed"] == 1
    printed = capsys.readouterr().out
    assert "score = 0.25" in printed and "by:\n  vicreg: [0.1, 0.2]\n" in printed


def test_progress_outside_a_notebook_prints_few_lines(capsys):
    progress = notebook.Progress(1000, "training")
    for n in range(1001):
        progress.update(n, "loss 1.0")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[-1].startswith("training: 1000/1000, loss 1.0, ")


def test_profiles_are_checked_against_all_notebooks(repository, batch):
    repository.add("01_training", parameters="seed = 0\nepochs = 5\n")
    repository.add(
        "02_attack", parameters="profile = 'laptop'\nseed = 0\nk = 10\nsizes = {'a': 1, 'b': 2}\n"
    )

    def values(text, **overrides):
        repository.profile("p", text)
        return batch.given("p", overrides)

    assert values("all: {seed: 3, epochs: 7}\n02_attack: {seed: 4, sizes: {b: 3}}", k=5) == {
        "01_training": {"seed": 3, "epochs": 7},
        "02_attack": {"profile": "p", "seed": 4, "sizes": {"a": 1, "b": 3}, "k": 5},
    }
    assert values("02_attack: {sizes: {b: 3}}", sizes={"a": 9})["02_attack"]["sizes"] == {
        "a": 9,
        "b": 3,
    }
    assert values("") == {"01_training": {}, "02_attack": {"profile": "p"}}
    for text, message in [
        ("all: {epohcs: 3}", r"p.yaml, all: epohcs is not a parameter; did you mean epochs\?"),
        ("02_attack: {epochs: 3}", "p.yaml, 02_attack: epochs is not a parameter"),
        ("02_atack: {k: 3}", r"p.yaml: 02_atack is not a parameter; did you mean 02_attack\?"),
        ("all: {k: 1e-6}", "write 1.0e-6"),
        ("k: 3", "expected sections"),
        ("[1", "not YAML"),
        ("- 1", "expected sections"),
    ]:
        with pytest.raises(ParameterError, match=message):
            values(text)
    with pytest.raises(
        ParameterError, match=r"command line: kk is not a parameter; did you mean k\?"
    ):
        values("", kk=3)
    with pytest.raises(ParameterError, match="02_attack: epochs is not a parameter"):
        batch.given("tiny", {"epochs": 3}, only="02_attack")
    with pytest.raises(ParameterError, match="no profile 'tinny'; there are: p, tiny"):
        batch.given("tinny", {})


def test_a_plan_of_what_cannot_be_trained_is_one_clear_error(batch):
    with pytest.raises(ParameterError, match='01_training: criterion "simclear" is not known'):
        batch.plan("smoke", {"criteria": ["simclear"]})


def test_overrides_from_the_command_line(batch):
    pairs = [
        ["wd", "1e-6"],
        ["n", "3"],
        ["xs", "[1, 2]"],
        ["flag", "true"],
        ["name", "paper"],
        ["recipe.views.blur", "0.5"],
    ]
    assert batch.parse_overrides(pairs, 'rho=0.5 recipe.lr=1 title="a b"') == {
        "wd": 1e-6,
        "n": 3,
        "xs": [1, 2],
        "flag": True,
        "name": "paper",
        "rho": 0.5,
        "title": "a b",
        "recipe": {"views": {"blur": 0.5}, "lr": 1},
    }
    with pytest.raises(ParameterError, match="'k' is not name=value") as caught:
        batch.parse_overrides([], "k 3")
    advised = str(caught.value).split('"')[1]
    assert batch.parse_overrides([], advised).keys() <= parameters.declared("05_audit").keys()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("k='5", "Close its quotes"),
        ("k=[5", r"k=.5 cannot be read"),
        ("k={5", r"k=.5 cannot be read"),
        ("k=5 k.x=3", "k.x is a key of k, which is 5 as well"),
        ("k=!!python/object:os.system", "cannot be read"),
        ("k=2026-13-45", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_quoted_in_one_line(batch, typed, message):
    with pytest.raises(ParameterError, match=message) as caught:
        batch.parse_overrides([], typed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/etc"])
def test_a_profile_is_a_name(repository, batch, name):
    with pytest.raises(ParameterError, match="no profile .*; there are: tiny"):
        batch.given(name, {})
    with pytest.raises(store.StoreError, match="without a path"):
        store.runs(name)


def test_keys_change_with_what_matters_and_only_then(repository, monkeypatch, batch):
    path = repository.add("02_attack", "print(1)", parameters="seed = 0\ndataset = 'toy'\n")

    def key(**overrides):
        return batch.stage_key("02_attack", "tiny", batch.given("tiny", overrides)["02_attack"])

    first = key()
    assert key() == first == key(seed=3)  # the profile's own value
    assert key(seed=4) != first
    manifests = repository.root / "data_manifests"
    manifests.mkdir()
    manifest = (
        "title: toy\nlayout: folder\nfile: toy.zip\nplaces: [toy.zip]\nimages: [.]\nmin_side: 8\n"
    )
    (manifests / "toy.yaml").write_text(manifest)
    with_manifest = key()
    assert with_manifest != first
    monkeypatch.setenv("DEJAVU_DATA", str(manifests))
    with zipfile.ZipFile(manifests / "toy.zip", "w") as file:
        file.writestr("ant/1.jpg", b"x")
    assert key() not in (with_manifest, first)
    changed = json.loads(path.read_text())
    changed["cells"][2]["source"] = "print(2)"
    before = key()
    path.write_text(json.dumps(changed))
    assert key() != before
    before = key()
    monkeypatch.setattr(store, "code_version", lambda: "another")
    package = key()
    runner = repository.root / "batch.py"
    runner.write_text(batch.RUNNER.read_text() + "\nEDITED = True\n")
    monkeypatch.setattr(batch, "RUNNER", runner)  # the runner's own code counts, too
    assert len({before, package, key()}) == 3


def test_keys_decide_what_runs(repository, capsys, batch):
    repository.add("01_training", "print(1)")
    repository.add("02_attack", "print(1)")
    keys = repository.root / "runs" / "tiny" / "keys"
    assert batch.write_keys("tiny", {}) == ["01_training", "02_attack"]
    for stage in ("01_training", "02_attack"):  # as if both had been executed
        done = repository.root / "runs" / "tiny" / "notebooks" / f"{stage}.ipynb"
        figure = repository.root / "runs" / "tiny" / "figures" / f"{stage}.png"
        store.write_json(figure, stage)
        content = json.loads((keys / f"{stage}.key").read_text())
        with store.artifact(
            done, {"key": content["key"], "used": [f"figures/{stage}.png"]}
        ) as temporary:
            temporary.write_text("{}")
    assert batch.write_keys("tiny", {}) == []
    for path in done.parent.glob("*.ipynb"):
        assert (keys / f"{path.stem}.key").stat().st_mtime < path.stat().st_mtime
    assert batch.main(["keys", "--profile", "tiny"]) == 0
    assert capsys.readouterr().out == "up to date\n"
    assert batch.write_keys("tiny", {"k": 11}) == ["01_training", "02_attack"]
    assert (keys / "02_attack.key").stat().st_mtime >= done.stat().st_mtime
    assert batch.write_keys("tiny", {}) == []
    figure.unlink()  # of 02_attack
    assert batch.write_keys("tiny", {}) == ["02_attack"]
    store.write_json(figure, stage)
    done.write_text("{ }")  # damaged
    assert batch.write_keys("tiny", {}) == ["02_attack"]


# does not import torch
LIGHT = "import dejavu_utils.notebook as nb\nparams = nb.parameters('{stage}', globals())"


@pytest.fixture
def light(repository):
    """A repository whose notebooks start without torch, to keep these tests short."""
    repository.start = LIGHT
    return repository


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise ValueError('no \"such\" k')",
            r"cell `cell-2` failed:\n(?s:.*)ValueError: no \"such\" k",
        ),
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            "stopped in cell `cell-2`: DeadKernelError",
        ),
        ("import sys\nsys.exit(0)", "cell `cell-3` never ran"),
    ],
)
def test_an_incomplete_run_is_not_accepted(light, body, message, capsys, batch):
    import re

    light.add("02_attack", body, "print('after')")
    done = light.root / "runs" / "tiny" / "notebooks" / "02_attack.ipynb"
    problem = batch.execute("02_attack", "tiny", {})
    assert problem.startswith("02_attack: ")
    assert re.search(message, problem)
    assert str(done) + ".part" in problem
    assert not done.exists()
    assert (done.parent / "02_attack.ipynb.part").is_file()
    assert batch.write_keys("tiny", {}) == ["02_attack"]


def test_a_run_with_this_interpreter_replaces_the_part_and_then_is_up_to_date(light, capsys, batch):
    light.add("02_attack", "import os, sys\nprint(sys.executable, os.getcwd(), k, seed, rho)")
    done = light.root / "runs" / "tiny" / "notebooks" / "02_attack.ipynb"
    done.parent.mkdir(parents=True)
    part = done.with_name("02_attack.ipynb.part")
    part.write_text("half of an earlier run")
    assert batch.main(["run", "02_attack", "--profile", "tiny", "-p", "k", "5"]) == 0
    assert not part.exists()
    text = json.loads(done.read_text())["cells"][-1]["outputs"][0]["text"]
    assert "".join(text).strip() == f"{sys.executable} {light.root} 5 3 0.5"
    assert store.verify(done)["parameters"] == {"profile": "tiny", "seed": 3, "rho": 0.5, "k": 5}
    assert batch.write_keys("tiny", {"k": 5}) == []
    assert batch.write_keys("tiny", {}) == ["02_attack"]


def test_of_two_at_once_the_second_takes_what_the_first_has_made(light, batch):
    """It was out of date when both began; this process is the first one."""
    light.add("02_attack", "raise AssertionError('it ran again')")
    done = light.root / "runs" / "tiny" / "notebooks" / "02_attack.ipynb"
    command = [sys.executable, "-u", str(batch.RUNNER), "run", "02_attack", "--profile", "tiny"]
    with store.lock(done):
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline() == "02_attack …\n"
        assert f"process {os.getpid()} " in second.stdout.readline()
        values = batch.given("tiny", {})["02_attack"]
        key = batch.stage_key("02_attack", "tiny", values)
        meta = {"key": key, "stage": "02_attack", "used": []}
        with store.artifact(done, meta) as temporary:
            temporary.write_text("made by the first")

    assert second.communicate()[0].startswith("02_attack done")
    assert second.returncode == 0
    assert done.read_text() == "made by the first"


def test_a_wrong_parameter_stops_before_any_kernel(light, capsys, batch):
    light.add("02_attack")
    assert batch.main(["run", "02_attack", "--profile", "tiny", "-p", "sede", "5"]) == 1
    assert (
        capsys.readouterr().err == "error: 02_attack: sede is not a parameter; did you mean seed?\n"
    )
    assert batch.main(["run", "02_atack", "--profile", "tiny"]) == 1
    assert "no notebook" in capsys.readouterr().err
    assert not (light.root / "runs").exists()


def test_plain_papermill_refuses_an_unknown_parameter(light, tmp_path, batch):
    import papermill

    path = light.add("02_attack", "print('after')")
    options = {
        "kernel_name": "python3",
        "progress_bar": False,
        "cwd": str(store.PACKAGE.parent),
        "kernel_manager_class": batch.kernel_manager(str(tmp_path)),
    }
    with pytest.raises(
        papermill.PapermillExecutionError, match=r"sede is not a parameter; did you mean seed\?"
    ):
        papermill.execute_notebook(str(path), str(tmp_path / "out.ipynb"), {"sede": 5}, **options)


def test_progress_in_a_notebook_is_one_output(light, capsys, batch):
    light.add(
        "02_attack",
        "progress = nb.Progress(200, 'training')\nfor n in range(201):\n    progress.update(n)",
    )
    assert batch.execute("02_attack", "tiny", {}) is None
    outputs = json.loads((light.root / "runs/tiny/notebooks/02_attack.ipynb").read_text())["cells"][
        -1
    ]["outputs"]
    assert [output["output_type"] for output in outputs] == ["display_data"]
    assert "".join(outputs[0]["data"]["text/plain"]).startswith("training: 200/200, ")


def test_keys_of_an_unchanged_batch_need_no_torch(light):
    light.add("02_attack", parameters="seed = 0\nrecipe = {}\n")
    code = (
        "import runpy, sys\nbatch = runpy.run_path('notebooks/batch.py')\n"
        "assert batch['main'](['keys', '--profile', 'tiny', '--set', 'recipe.lr=0.1']) == 0\n"
        "assert not {'torch', 'pandas', 'papermill'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=store.PACKAGE.parent, env=os.environ
    )


def test_an_open_dict_is_replaced_and_another_is_overridden_by_key(repository, batch):
    parameters = (
        'trained = {"vicreg": {"a.b": [1]}}  # settings\nsizes = {"a": 1, "b": 2}  # images\n'
    )
    repository.add("02_attack", parameters=parameters)
    repository.profile(
        "long", "02_attack: {trained: {vicreg: {x.y: [1]}, simclr: {z: [2]}}, sizes: {a: 5}}"
    )
    found = batch.given("long", {"trained": {"byol": {"q": [3]}}, "sizes": {"b": 7}})["02_attack"]
    assert found["trained"] == {"byol": {"q": [3]}} and found["sizes"] == {"a": 5, "b": 7}


def test_one_key_is_overridden_at_any_depth(repository, batch):
    repository.add("02_attack", parameters="recipe = {}\n")
    repository.profile("deep", "all: {recipe: {lr: 0.1, views: {blur: 0.5, grey: 0.2}}}")
    found = batch.given("deep", batch.parse_overrides([], "recipe.views.grey=0.4"))["02_attack"]
    assert found["recipe"] == {"lr": 0.1, "views": {"blur": 0.5, "grey": 0.4}}
