"""The pieces of `make reference`: plain scripts without Jupyter, small archives with provenance,
merged by id.
"""

import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import time
import zipfile

import pandas as pd
import pytest

from dejavu_utils import notebook, parameters, store
from dejavu_utils.attack import scoring

ABSENT = [
    "papermill",
    "IPython",
    "ipykernel",
    "jupyter_client",
    "nbformat",
    "faiss",
    "vissl",
    "snakemake",
    "lightly",
    "ipywidgets",
    "classy_vision",
]  # a bare GPU machine has none of them
TINY = (
    "sizes.classes=3 sizes.attacked=8 sizes.public=12 sizes.probe=5 sizes.control=6 k=4 "
    "epochs=[0,1] "
    "recipe.size=32 recipe.encoder=small4 recipe.projector=16-16 recipe.batch=8 "
    "recipe.compile=false "
    'crop.min_side=8 sweeps.k=[4] sweeps.min_side=[] sweeps.fraction=[] sweeps.layer=["projector"]'
)

SIZES = {
    "recipe": {"encoder": "small4", "projector": "16-16", "batch": 8},
    "criteria": ["simclr"],
    "steps": 1,
    "grid": [{"precision": "fp32"}],
    "repeats": 1,
    "turns": 1,
    "beside": False,
    "memory": False,
    "threads": 1,
    "encoders": [["small4", "16-16", 32, 20]],
    "shapes": [[20, 300, 16]],
    "k": 3,
    "scale": {"recipe": {}, "images": [], "attacks": [], "width": 8},
}
DRAWN = (
    "recipe.size=16 decoder.size=16 decoder.epochs=1 decoder.batch=16 decoder.classifier_epochs=1 "
    "decoder.channels=[8,16] decoder.blocks=[1,1] decoder.attention=[]"
)
BENCH = " ".join(f"'bench.{name}={json.dumps(value)}'" for name, value in SIZES.items())


@pytest.fixture
def reference(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "reference", store.PACKAGE.parent / "results" / "reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUT", tmp_path / "out")
    return module


def _run(
    tmp_path, *arguments, dataset="scenes", changes="", absent=ABSENT, before="", timeout=None
):
    """Run the script in a process of its own that cannot import what a bare machine lacks."""
    path, out = store.PACKAGE.parent / "results" / "reference.py", tmp_path / "out"
    code = (
        f"{before}import sys, importlib.util as u, pathlib; "
        f"sys.modules.update(dict.fromkeys({absent!r})); "
        f"s = u.spec_from_file_location('reference', {str(path)!r}); m = u.module_from_spec(s); "
        f"s.loader.exec_module(m); m.OUT = pathlib.Path({str(out)!r}); m.main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        *arguments,
        "--set",
        f"dataset={dataset} {TINY} {changes}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout
    )


def _dataset():
    there = os.path.isfile(os.path.join(os.environ.get("DEJAVU_DATA", "."), "tiny-imagenet-50.zip"))
    return "tiny_imagenet_50" if there else "scenes"


@pytest.mark.slow
def test_pieces_run_without_jupyter_are_recognised_and_merge(tmp_path, reference, monkeypatch):
    dataset = _dataset()
    done = _run(tmp_path, "run", "vicreg-100", "vicreg-101", dataset=dataset)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    path = tmp_path / "out" / "vicreg-100.zip"
    meta = store.verify(path)
    assert meta["seed"] == [100] and meta["command"] == "make reference PIECES=vicreg-100"
    assert meta["n"] > 20 and "cpu" in meta["hardware"] and meta["minutes"] > 0
    assert meta["parameters"]["02_attack"]["recipe"]["encoder"] == "small4"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        table = pd.read_parquet(io.BytesIO(archive.read("guesses.parquet")))
        scores = pd.read_csv(io.BytesIO(archive.read("tables/scores.csv")))
    assert not [
        name for name in names if "gallery" in name or "examples" in name or "partition" in name
    ]
    assert any(
        name.startswith("figures/") for name in names
    )  # curves may stay, photographs may not
    last = table.query("epoch == 1 and layer == 'projector' and attacked == 'attacked'")
    written = scores.query("epoch == 1 and layer == 'projector' and p == 100")["score"].iloc[0]
    assert scoring.score(last)["score"] == pytest.approx(written)
    again = _run(tmp_path, "run", "vicreg-100", dataset=dataset)
    assert again.stdout.strip() == "vicreg-100: done"
    other = _run(tmp_path, "list", "vicreg-100", dataset=dataset + " recipe.lr=0.5")
    assert other.stdout.strip() == "vicreg-100: to do"  # other parameters, another piece
    reference.merge()
    merged = store.read_table(tmp_path / "out" / "scores.csv")
    both = meta["n"] + store.verify(tmp_path / "out" / "vicreg-101.zip")["n"]
    assert set(merged["seeds"]) == {2} and merged["n"].max() == both


@pytest.mark.slow
def test_a_merge_that_is_killed_is_made_again(tmp_path, reference):
    """At eight moments: what is there is whole, and the tables are the same in the end."""
    done = _run(tmp_path, "run", "vicreg-100", dataset=_dataset())
    assert done.returncode == 0, done.stderr[-2000:]
    began = time.monotonic()
    assert _run(tmp_path, "merge").returncode == 0
    seconds = time.monotonic() - began
    tables = sorted((tmp_path / "out").glob("*.csv"))
    before = [path.read_bytes() for path in tables]
    assert len(tables) == 5

    rng = random.Random(0)
    killed = 0
    while killed < 8:
        for path in tables:
            path.unlink(missing_ok=True)
        try:
            _run(tmp_path, "merge", timeout=rng.uniform(seconds / 3, seconds))
        except subprocess.TimeoutExpired:  # its process was killed, by SIGKILL
            killed += 1
        for path in (tmp_path / "out").glob("[!.]*.csv"):
            store.verify(path)

    assert _run(tmp_path, "merge").returncode == 0
    assert [path.read_bytes() for path in tables] == before


@pytest.mark.slow
def test_every_kind_of_piece_runs_and_merges(tmp_path, reference):
    """Knobs, set sizes, many encoders; the many-model piece trains the default pair a second
    time.
    """
    dataset = _dataset()
    names = ["invariance-100", "trained-100", "many-100", "vicreg-100"]
    done = _run(tmp_path, "run", *names, dataset=dataset)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {path.stem for path in (tmp_path / "out").glob("*.zip")} == set(names)
    reference.merge()
    merged = store.read_table(tmp_path / "out" / "mitigation.csv")
    settings = set(merged["setting"])
    assert {
        "default",
        "constants.invariance",
        "trained",
    } <= settings and "constants.temperature" not in settings
    assert set(store.read_table(tmp_path / "out" / "scores.csv")["seeds"]) == {1}
    whole = merged[merged["setting"] != "trained"]["n"]
    assert (
        whole.nunique() == 1 and merged[merged["setting"] == "trained"]["n"].max() <= whole.iloc[0]
    )


@pytest.mark.slow
def test_bench_runs_on_a_bare_machine_and_leaves_its_table(tmp_path, reference):
    done = _run(tmp_path, "run", "bench", changes=BENCH, absent=[*ABSENT, "sklearn"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert store.verify(tmp_path / "out" / "bench.zip")["parameters"]["bench"]["sizes"] == SIZES
    reference.merge()
    table = store.read_table(tmp_path / "out" / "bench.csv")
    assert set(table["part"]) == {"training", "embedding", "k-NN", "sampling"}
    skipped = table[table["value"].isna()]
    assert set(skipped["note"]) == {
        f"skipped: {name} is not installed" for name in ("lightly", "faiss", "sklearn")
    }
    measured = table[table["value"].notna()]
    assert (measured["value"] > 0).all() and not table["note"].str.startswith(
        "failed", na=False
    ).any()
    ours = measured[measured["limit"].notna()]
    assert (ours["share"] > 0).all() and list(
        measured.loc[measured["limit"].isna(), "what"].str[-18:]
    ) == ["torch.cdist + topk"]
    assert set(ours["what"].str.split(",").str[0]) >= {"vicreg precision=fp32", "simclr", "small4"}
    exact = table[table["what"] == "20 x 300 x 16: ours (exact, proven)"].iloc[0]
    assert exact["right"] == 1 and exact["precision"] == "float32" and "cpu" in exact["device"]
    assert exact["share"] == pytest.approx(
        exact["limit"] / exact["value"]
    )  # seconds: the smaller the better
    again = _run(tmp_path, "list", "bench", changes=BENCH)
    assert again.stdout.strip() == "bench: done"


GPU = (
    f"import sys; sys.path.insert(0, {str(store.PACKAGE.parent / 'tests')!r}); import "
    "pretended_gpu as g; g.start(); "
)
OTHERS = (
    "simclr-100",
    "barlow_twins-100",
    "byol-100",
    "dino-100",
    "supervised-100",
    "temperature-100",
    "trained-100",
    "many-100",
)
SAMPLED = json.dumps(
    {
        "size": 16,
        "channels": [8, 16],
        "blocks": [1, 1],
        "steps": 2,
        "guidance": 3.0,
        "pictures": 8,
        "batch": 8,
    }
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, changes",
    [
        (["vicreg-100"], ""),
        pytest.param(["bench"], f"{BENCH} 'bench.decoder={SAMPLED}'", marks=pytest.mark.slow),
        pytest.param(OTHERS, "", marks=pytest.mark.slow),
        pytest.param(["rcdm-100"], DRAWN, marks=pytest.mark.slow),
    ],
)
def test_pieces_keep_to_one_device_on_a_pretended_gpu(tmp_path, reference, names, changes):
    done = _run(tmp_path, "run", *names, changes=changes, absent=ABSENT, before=GPU)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    for name in names:
        assert store.verify(tmp_path / "out" / f"{name}.zip")["hardware"].endswith(
            "a pretended GPU"
        )


def test_a_piece_whose_modules_are_missing_is_left_out_unless_named(tmp_path):
    named = _run(tmp_path, "run", "vicreg-100", "vissl-100")
    assert named.returncode == 1 and named.stderr.splitlines() == [
        "error: vissl-100 needs vissl, not installed here",
    ]
    assert not (tmp_path / "out").exists()  # said before anything runs
    every = _run(tmp_path, "run", "--minutes", "0")
    assert every.returncode == 0 and every.stdout.splitlines() == [
        "vissl-100: left out, it needs vissl, not installed here",
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("vissl") is None,
    reason="vissl is not installed: make .venv/.installed",
)
def test_vissls_engine_trains_a_piece_that_is_attacked(tmp_path, reference):
    dataset, here = _dataset(), [name for name in ABSENT if name not in ("vissl", "classy_vision")]
    for name, encoder in (("vissl-100", "resnet50"), ("simclr-100", "small4")):
        changes = f'recipe.encoder={encoder} \'sweeps.layer=["projector", "block1", "backbone"]\''
        done = _run(tmp_path, "run", name, dataset=dataset, changes=changes, absent=here)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    recipe = store.verify(tmp_path / "out" / "vissl-100.zip")["parameters"]["02_attack"]["recipe"]
    assert (
        recipe["engine"] == "vissl"
        and recipe["optimizer"] == "sgd"
        and recipe["encoder"] == "resnet50"
    )
    reference.merge()
    scores = store.read_table(tmp_path / "out" / "scores.csv")
    assert set(scores["criterion"]) == {"simclr", "simclr (VISSL)"} and set(scores["seeds"]) == {1}


def test_merge_keeps_engines_apart_and_counts_an_image_once(reference):
    rows = [
        {
            "id": f"{side}{i}",
            "label": i % 2,
            "direction": side,
            "role": role,
            "prediction": 0,
            "correct": i % 3 == 0,
            "confidence": -i / 40,
            "criterion": "simclr",
            "rho": float("nan"),
            "seed": 100,
            "epoch": epoch,
            "layer": layer,
            "k": 4,
            "attacked": attacked,
        }
        for side in "ab"
        for role in ("target", "reference")
        for i in range(20)
        for epoch in (0, 2, 5)
        for layer in ("projector", "backbone")
        for attacked in ("attacked", "control")
    ]
    table = pd.DataFrame(rows)
    early = table[table["epoch"] < 5]
    own, vissl = {"recipe": {}}, {"recipe": {"engine": "vissl"}}
    for name, part, stage in (
        ("many-100", table, own),
        ("simclr-100", table, own),
        ("vissl-100", early, vissl),
    ):
        with (
            store.artifact(
                reference.OUT / f"{name}.zip", {"parameters": {"02_attack": stage}}
            ) as temporary,
            zipfile.ZipFile(temporary, "w") as archive,
        ):
            archive.writestr("guesses.parquet", part.to_parquet(index=False))
    reference.merge()
    curve = store.read_table(reference.OUT / "curve.csv")
    assert set(zip(curve["criterion"], curve["epoch"], strict=True)) == {
        ("simclr", 5),
        ("simclr (VISSL)", 2),
    }
    assert set(store.read_table(reference.OUT / "scores.csv")["n"]) == {40}


def test_a_damaged_archive_is_to_do(reference):
    reference.OUT.mkdir()
    store.write_json(reference.OUT / "other.json", {})
    (reference.OUT / "vicreg-100.zip").write_bytes(b"half")
    assert not reference.done("vicreg-100", {})


def test_every_piece_fits_its_notebooks(reference):
    known = reference.pieces()
    kinds = list(dict.fromkeys(name.split("-")[0] for name in known))
    assert kinds == [
        "pilot",
        "vicreg",
        "simclr",
        "barlow_twins",
        "byol",
        "dino",
        "supervised",
        "invariance",
        "scale_min",
        "temperature",
        "trained",
        "trained_steps",
        "rcdm",
        "many",
        "bench",
        "vissl",
    ]
    for name, (stages, _) in known.items():
        values = reference._parameters(name, {})
        assert list(values) == stages and all(len(each["seeds"]) == 1 for each in values.values())
    trained = reference._parameters("trained-100", {})["04_mitigation"]
    assert trained["sizes"]["attacked"] == min(trained["trained"]["vicreg"]["trained"])
    assert trained["sizes"]["classes"] == 50


def test_scripts_compile_and_set_the_parameters_after_the_defaults(reference):
    text = reference.script("02_attack", {"k": 7})
    compile(text, "02_attack.py", "exec")
    assert text.index("k = 20") < text.index("\nk = 7") < text.index("dv.start(")


def test_a_script_runs_with_the_values_that_it_was_given(reference):
    """Also with the notebook's own values, where the profile has others."""
    own = {"dataset": "scenes", "k": 20, "crop": {"min_side": 8}}
    given = reference._parameters("vicreg-100", own)["02_attack"]
    text = reference.script("02_attack", given)
    names = {}
    exec(text[: text.index("import ")], names)  # what comes before the first cell that computes
    found = notebook.parameters("02_attack", names)
    assert found == parameters.declared("02_attack") | given
    assert (found["dataset"], found["k"], found["crop"]["min_side"]) == ("scenes", 20, 8)


def test_unknown_piece_names_the_pieces(tmp_path):
    done = _run(tmp_path, "run", "vicreg-7")
    assert done.returncode == 1 and "no piece vicreg-7; there are: pilot, vicreg-100" in done.stderr


def test_merge_without_archives_says_what_to_run(reference):
    with pytest.raises(SystemExit, match="run `make reference` on a machine with a GPU first"):
        reference.merge()


def test_pieces_of_a_setting_hold_the_default_and_merge_by_seed(reference, tmp_path):
    rows = []
    for seed in (100, 101):
        for setting, value, right in (("default", "default", 0.5), ("weight_decay", "0.1", 0.2)):
            for side in "ab":
                for role in ("target", "reference"):
                    share = right if role == "target" else 0.1
                    rows += [
                        {
                            "id": f"{side}{i}",
                            "label": i % 2,
                            "direction": side,
                            "role": role,
                            "prediction": 0,
                            "correct": i < share * 40,
                            "confidence": -i / 40,
                            "criterion": "vicreg",
                            "seed": seed,
                            "epoch": 1,
                            "layer": "projector",
                            "setting": setting,
                            "value": value,
                            "held_out": 0.6,
                            "n_held_out": 50,
                        }
                        for i in range(40)
                    ]
    table = pd.DataFrame(rows)
    reference.OUT.mkdir()
    for seed, part in table.groupby("seed"):
        path = reference.OUT / f"k-{seed}.zip"
        with store.artifact(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            archive.writestr("guesses.parquet", part.to_parquet(index=False))
    reference.merge()
    merged = store.read_table(reference.OUT / "mitigation.csv").set_index("setting")
    assert merged.loc["weight_decay", "score_change"] == pytest.approx(-0.3)
    assert merged.loc["weight_decay", "over"] == "seeds" and merged.loc["default", "seeds"] == 2
    assert (
        json.loads((reference.OUT / "mitigation.csv.json").read_text())["command"]
        == "results/reference.py merge"
    )
