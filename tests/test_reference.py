"""The pieces of `make reference`: plain scripts without Jupyter, small archives with provenance, merged by id."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile

import pandas as pd
import pytest

from dejavu_utils import attack, store

ABSENT = ["papermill", "IPython", "ipykernel", "jupyter_client", "nbformat", "diffusers", "faiss", "vissl", "snakemake",
          "lightly", "ipywidgets", "classy_vision"]  # a bare GPU machine has none of them
TINY = ("sizes.classes=3 sizes.attacked=8 sizes.public=12 sizes.probe=5 sizes.control=6 k=4 epochs=[0,1] "
        "recipe.size=32 recipe.encoder=small4 recipe.projector=16-16 recipe.batch=8 recipe.compile=false "
        "crop.min_side=8 sweeps.k=[4] sweeps.min_side=[] sweeps.fraction=[] sweeps.layer=[\"projector\"]")


@pytest.fixture
def reference(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("reference", store.PACKAGE.parent / "results" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUT", tmp_path / "out")
    return module


def _run(tmp_path, *arguments, dataset="scenes"):
    """Run the script in a process of its own that cannot import what a bare machine lacks."""
    path, out = store.PACKAGE.parent / "results" / "reference.py", tmp_path / "out"
    code = (f"import sys, importlib.util as u, pathlib; sys.modules.update(dict.fromkeys({ABSENT!r})); "
            f"s = u.spec_from_file_location('reference', {str(path)!r}); m = u.module_from_spec(s); "
            f"s.loader.exec_module(m); m.OUT = pathlib.Path({str(out)!r}); m.main()")
    command = [sys.executable, "-c", code, *arguments, "--set", f"dataset={dataset} {TINY}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def _dataset():
    there = os.path.isfile(os.path.join(os.environ.get("DEJAVU_DATA", "."), "tiny-imagenet-50.zip"))
    return "tiny_imagenet_50" if there else "scenes"


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
    assert not [name for name in names if "gallery" in name or "examples" in name or "partition" in name]
    assert any(name.startswith("figures/") for name in names)  # curves may stay, photographs may not
    last = table.query("epoch == 1 and layer == 'projector' and attacked == 'attacked'")
    written = scores.query("epoch == 1 and layer == 'projector' and p == 100 and ranking == 'own'")["score"].iloc[0]
    assert attack.score(last)["score"] == pytest.approx(written)
    again = _run(tmp_path, "run", "vicreg-100", dataset=dataset)
    assert again.stdout.strip() == "vicreg-100: done"
    other = _run(tmp_path, "list", "vicreg-100", dataset=dataset + " recipe.lr=0.5")
    assert other.stdout.strip() == "vicreg-100: to do"  # other parameters, another piece
    reference.merge()
    merged = store.read_table(tmp_path / "out" / "scores.csv")
    both = meta["n"] + store.verify(tmp_path / "out" / "vicreg-101.zip")["n"]
    assert set(merged["seeds"]) == {2} and merged["n"].max() == both


@pytest.mark.slow
def test_every_kind_of_piece_runs_and_merges(tmp_path, reference):
    """Knobs, set sizes, many encoders; decoders need diffusers, which has to be carried to a bare machine."""
    dataset = _dataset()
    names = ["invariance-100", "trained-100", "many-100"]
    done = _run(tmp_path, "run", *names, dataset=dataset)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {path.stem for path in (tmp_path / "out").glob("*.zip")} == set(names)
    reference.merge()
    merged = store.read_table(tmp_path / "out" / "mitigation.csv")
    knobs = set(merged["knob"])
    assert {"default", "constants.invariance", "trained"} <= knobs and "constants.temperature" not in knobs
    whole = merged[merged["knob"] != "trained"]["n"]
    assert whole.nunique() == 1 and merged[merged["knob"] == "trained"]["n"].max() <= whole.iloc[0]
    lacking = _run(tmp_path, "run", "rcdm-100", dataset=dataset + " decoder.batch=16")
    assert lacking.returncode != 0 and "diffusers" in lacking.stderr


def test_a_damaged_archive_is_to_do(reference):
    reference.OUT.mkdir()
    store.write_json(reference.OUT / "other.json", {})
    (reference.OUT / "vicreg-100.zip").write_bytes(b"half")
    assert not reference.done("vicreg-100", {})


def test_every_piece_fits_its_notebooks(reference):
    known = reference.pieces()
    assert [name for name in known][:4] == ["pilot", "vicreg-100", "vicreg-101", "vicreg-102"]
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


def test_unknown_piece_names_the_pieces(tmp_path):
    done = _run(tmp_path, "run", "vicreg-7")
    assert done.returncode == 1 and "no piece vicreg-7; there are: pilot, vicreg-100" in done.stderr


def test_merge_without_archives_says_what_to_run(reference):
    with pytest.raises(SystemExit, match="run `make reference` on a machine with a GPU first"):
        reference.merge()


def test_knob_pieces_hold_the_default_and_merge_by_seed(reference, tmp_path):
    rows = []
    for seed in (100, 101):
        for knob, value, right in (("default", "default", 0.5), ("weight_decay", "0.1", 0.2)):
            for side in "ab":
                for role in ("target", "reference"):
                    share = right if role == "target" else 0.1
                    rows += [{"id": f"{side}{i}", "label": i % 2, "direction": side, "role": role, "prediction": 0,
                              "correct": i < share * 40, "correct5": True, "confidence": -i / 40, "criterion": "vicreg",
                              "seed": seed, "epoch": 1, "layer": "projector", "knob": knob, "value": value,
                              "held_out": 0.6, "n_held_out": 50} for i in range(40)]
    table = pd.DataFrame(rows)
    reference.OUT.mkdir()
    for seed, part in table.groupby("seed"):
        path = reference.OUT / f"k-{seed}.zip"
        with store.artifact(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            archive.writestr("guesses.parquet", part.to_parquet(index=False))
    reference.merge()
    merged = store.read_table(reference.OUT / "mitigation.csv").set_index("knob")
    assert merged.loc["weight_decay", "score_change"] == pytest.approx(-0.3)
    assert merged.loc["weight_decay", "over"] == "seeds" and merged.loc["default", "seeds"] == 2
    assert json.loads((reference.OUT / "mitigation.csv.json").read_text())["command"] == "results/reference.py merge"
