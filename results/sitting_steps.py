"""What the steps of a sitting do: each a function (place, argument, limit) -> its result.

`line` of a result is what is said of it in one line. A step runs in a process of its own (see
sitting.py) and may leave one file in OUT. Skipped says why a step cannot run here.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import numpy as np
import torch
from sitting import ROOT, Place, Skipped, plan, write

from dejavu_utils import store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST = 16 << 20  # bytes of a file in OUT

TINY_PLAN = {
    "dataset": "scenes",
    "sizes": {"classes": 4, "attacked": 16, "shared": 0, "public": 20, "probe": 10, "control": 10},
    "recipe": {"encoder": "small8", "projector": "32-32-32", "batch": 16},
    "crop": {"kind": "periphery", "min_side": 8},
    "k": 5,
    "seconds": 1,
}
FULL = {
    "batches": [250, 500],  # images a step of the pilot
    "steps": 16,  # of an epoch of the pilot
    "seconds": 3.0,  # of each measurement of the pilot
    "copy": 4 << 30,  # bytes
    "product": 8192,  # side of the square matrices
    "shape": [100_000, 500_000, 8192],  # queries, public images, width of k-NN
    "neighbours": 20,
    "encoder": ["resnet101", "8192-8192-8192", 224, 2000],
    "race": {"encoder": "resnet18-s", "projector": "512-128", "size": 32, "batch": 512},
    "race_side": 32,
    "decoder": {"channels": [128, 256, 256], "blocks": [2, 2, 2], "attention": [16]},
    "decoder_size": 64,
    "decoder_batch": 128,
    "sampling": {"steps": 25, "guidance": 3.0},
    "resamples": 1000,
    "notebook": {},  # changes to the profile smoke
}
TINY = FULL | {
    "batches": [16, 32],
    "steps": 2,
    "seconds": 0.2,
    "copy": 1 << 22,
    "product": 256,
    "shape": [40, 1500, 16],
    "neighbours": 3,
    "encoder": ["small4", "16-16", 32, 20],
    "race": {"encoder": "small4", "projector": "16-16", "size": 32, "batch": 16},
    "decoder": {"channels": [8, 16], "blocks": [1, 1]},
    "decoder_size": 16,
    "decoder_batch": 16,
    "sampling": {"steps": 2, "guidance": 3.0},
    "resamples": 50,
    "notebook": {
        "criteria": ["vicreg"],
        "rhos": [0.2],
        "sweeps": {"layer": ["projector"], "k": [5], "min_side": [], "fraction": []},
    },
}


def sizes(place: Place) -> dict:
    """Return how large everything is."""
    return TINY if place.tiny else FULL


def planned(place: Place) -> dict:
    """Return results/plan_gpu.md's block, made small for tests."""
    return plan() | (TINY_PLAN if place.tiny else {})


def where() -> dict:
    """Return what a result was made on: card, versions, commit."""
    from bench_common import where as card

    return {
        "card": card(DEVICE),
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "code": store.code_version(),
        **store.versions(),
    }


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


# First part: does it work on this card?


def tests(place: Place, _: str, limit: float) -> dict:
    """Run the tests marked `gpu`; what they state is kept."""
    report = place.work / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/gpu",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1", "-W", "ignore"]
    command += ["-k", "crops"] if place.tiny else []
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # other people's plugins may fail
    answer = subprocess.run(command, cwd=ROOT, env=alone)
    if answer.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {answer.returncode}, see sitting.log")
    return read_tests(report)


def read_tests(report: Path) -> dict:
    """Return what a JUnit file says: counts, why tests failed, and what they state."""
    cases, counts, failures = [], dict.fromkeys(("passed", "failed", "skipped"), 0), {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        found = case.find("failure")
        found = case.find("error") if found is None else found
        outcome = "skipped" if case.find("skipped") is not None else "passed"
        outcome = outcome if found is None else "failed"
        counts[outcome] += 1
        if found is not None:
            failures[case.get("name")] = (found.text or found.get("message") or "")[-1500:]
        stated = {one.get("name"): one.get("value") for one in case.iter("property")}
        cases.append({"test": case.get("name"), "outcome": outcome, **stated})
    line = ", ".join(f"{count} {name}" for name, count in counts.items())
    return counts | {"line": line, "cases": cases, "failures": failures}


def notebook(place: Place, _: str, limit: float) -> dict:
    """Execute 02_attack with the profile `smoke` by papermill, on a kernel of this machine."""
    import batch
    import ipykernel  # noqa: F401  what papermill needs is missed here, not in its own way
    import nbclient  # noqa: F401
    import papermill

    began = time.monotonic()
    done = place.work / "02_attack.ipynb"
    problem = batch.execute("02_attack", "smoke", sizes(place)["notebook"], done)
    if problem:
        raise RuntimeError(problem)
    if done.stat().st_size <= LARGEST:
        with store.atomic(place.out / "02_attack.ipynb") as temporary:
            shutil.copy(done, temporary)
    seconds = time.monotonic() - began
    return _attacked("papermill " + papermill.__version__, seconds)


def script(place: Place, _: str, limit: float) -> dict:
    """Run 02_attack with the profile `smoke` as a plain script."""
    import batch
    import reference

    began = time.monotonic()
    values = batch.given("smoke", sizes(place)["notebook"], only="02_attack")["02_attack"]
    text = reference.script("02_attack", values)
    exec(compile(text, "02_attack.py", "exec"), {"__name__": "__main__"})
    return _attacked("a plain script", time.monotonic() - began)


def _attacked(how: str, seconds: float) -> dict:
    """Return how 02_attack ran, and on which device its kernel said it was."""
    meta = store.verify(store.runs("smoke") / "metrics" / "02_attack.json")
    line = f"02_attack ran as {how} on {meta['device']}"
    return {"line": line, "how": how, "device": meta["device"], "seconds": round(seconds, 1)}


def trace(place: Place, _: str, limit: float) -> dict:
    """Profile one epoch of training: the share of the time in which the card computes."""
    from torch.profiler import ProfilerActivity, profile

    training = _random_training(_recipe(place, {}), sizes(place)["steps"])
    training.run_epoch()
    _wait()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    began = time.perf_counter()
    with profile(activities=kinds) as found:
        training.run_epoch()
        _wait()
    wall = time.perf_counter() - began
    events = found.key_averages()
    attribute = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, attribute) / 1e6 for event in events}
    busy = sum(times.values())
    first = sorted(times, key=times.get, reverse=True)[:3]
    most = ", ".join(f"{name[:60]} {times[name] / busy:.0%}" for name in first)
    what = "kernels" if DEVICE == "cuda" else "operators (no card)"

    views = _views_seconds(training)
    line = (
        f"{what} {busy / wall:.0%} of {wall:.2f} s; {most}; views alone {views * 1e3:.1f} ms a step"
    )
    return {"line": line, "share": busy / wall, "seconds": wall, "views": views}


def _views_seconds(training) -> float:
    """Return how long the views of one step take by themselves, in seconds."""
    rng = torch.Generator(DEVICE).manual_seed(0)
    _wait()
    began = time.perf_counter()
    for _ in training.feed.epoch(rng):
        pass
    _wait()
    return (time.perf_counter() - began) / training.feed.steps


# The pilot: how fast is training?


def pilot(place: Place, _: str, limit: float) -> dict:
    """Measure the card's ceilings, then VICReg without compiling: alone, and A beside B."""
    how = sizes(place)
    found = {"card": where()["card"], "ceilings": ceilings(how), "settings": []}
    for batch in how["batches"]:
        found["settings"].append(alone(place, {"batch": batch, "compile": False}))
    found["settings"].append(beside(place, {"batch": how["batches"][0], "compile": False}))
    return _keep_pilot(place, found)


def pilot_compiled(place: Place, _: str, limit: float) -> dict:
    """Measure VICReg with a compiled trunk, and add it to the pilot."""
    found = known_pilot(place)
    if found is None:
        raise Skipped("the pilot was not run")
    for batch in sizes(place)["batches"]:
        found["settings"].append(alone(place, {"batch": batch, "compile": True}))
        found = _keep_pilot(place, found)
    return found


def pilot_short(place: Place, _: str, limit: float) -> dict:
    """Return the pilot of this card, or measure what the plan's rule needs: some 20 seconds."""
    found = known_pilot(place)
    if found is not None:
        return _keep_pilot(place, found)
    how = sizes(place)
    change = {"batch": how["batches"][0], "compile": False}
    found = {"card": where()["card"], "ceilings": ceilings(how), "short": True}
    found["settings"] = [alone(place, change), beside(place, change)]
    return _keep_pilot(place, found)


def known_pilot(place: Place) -> dict | None:
    """Return what an earlier pilot measured on a card like this one, None if there is none."""
    folders = [place.out, place.work, *([place.kept] if place.kept else [])]
    for folder in folders:
        path = folder / "pilot.json"
        if path.is_file():
            found = json.loads(path.read_text())
            if found["card"] == where()["card"]:
                return found
    return None


def _keep_pilot(place: Place, found: dict) -> dict:
    best = chosen(found, planned(place), place)
    fastest = max(each["images_per_second"] for each in found["settings"])
    found["line"] = f"up to {fastest:.0f} images/s; the plan takes {best['text']}"
    for folder in (place.out, place.work):
        write(folder / "pilot.json", found)
    return found


def _recipe(place: Place, changes: dict):
    from dejavu_utils.models import pairs

    return pairs.recipe("vicreg", planned(place)["recipe"] | changes)


def _random_training(recipe, steps: int, side: int = 64):
    """Return a training over random pictures, one epoch of so many steps."""
    from dejavu_utils.models import train

    shape = (steps * recipe.batch, 3, side, side)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    labels = torch.arange(len(pixels)) % 10
    return train.Training(pixels, recipe, 1000, "pilot", DEVICE, labels, 10)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _rate(training, seconds: float) -> float:
    """Return images a second, all views of an image counted once, over at least so many seconds."""
    images = training.feed.steps * training.recipe.batch
    epochs = 0
    _wait()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        training.run_epoch()  # reads the losses: the card has done the work
        epochs += 1
    return epochs * images / (time.perf_counter() - began)


def alone(place: Place, changes: dict) -> dict:
    """Return images/s of one training by itself, and of the same steps on views that are ready."""
    how = sizes(place)
    recipe = _recipe(place, changes)
    training = _random_training(recipe, how["steps"])
    began = time.perf_counter()
    training.run_epoch()
    training.run_epoch()
    warm = time.perf_counter() - began
    ours = _rate(training, how["seconds"])
    ready = next(training.feed.epoch(torch.Generator(DEVICE).manual_seed(0)))
    training.feed.epoch = lambda rng: (ready for _ in range(how["steps"]))
    limit = _rate(training, how["seconds"])
    found = changes | {"beside": False, "images_per_second": ours, "limit": limit}
    found |= {"share": ours / limit, "warm": warm, "flop": flop(recipe)}
    print(found, flush=True)
    return found


def flop(recipe) -> float:
    """Return the operations that training on one image takes, of multiplications and additions."""
    from dejavu_utils.models import pairs

    whole = {"classes": 1, "attacked": recipe.batch, "shared": 0}
    settings = {"dataset": "scenes", "seeds": [0], "rhos": [0.0], "criteria": ["vicreg"]}
    changes = {"encoder": recipe.encoder, "projector": recipe.projector}
    changes |= {"size": recipe.size, "batch": recipe.batch}
    table = pairs.plan(settings | {"sizes": whole, "epochs": [1], "recipe": changes})
    return float(table["exaflop"][0]) * 1e18 / 2 / recipe.batch  # of two encoders


def beside(place: Place, changes: dict) -> dict:
    """Return images/s of two trainings side by side, in a process each, together."""
    code = (
        "import json, sys; sys.path[:0] = ['results', 'tests/bench', '.']; "
        "import pathlib, sitting, sitting_steps as s; "
        "place = sitting.Place(*map(pathlib.Path, sys.argv[1:3]), None, json.loads(sys.argv[3])); "
        "s.racer(place, json.loads(sys.argv[4]))"
    )
    arguments = [str(place.out), str(place.work), json.dumps(place.tiny), json.dumps(changes)]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:  # both are warm before either is measured
        if "ready" not in process.stdout.readline():
            raise RuntimeError("a training beside another one ended early, see sitting.log")
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    rates = [float(process.communicate()[0]) for process in both]
    found = changes | {"beside": True, "images_per_second": sum(rates)}
    print(found, flush=True)
    return found


def racer(place: Place, changes: dict) -> None:
    """Print images/s of one training, measured from the moment that a line is read."""
    training = _random_training(_recipe(place, changes), sizes(place)["steps"])
    training.run_epoch()
    print("ready", flush=True)
    sys.stdin.readline()
    print(_rate(training, sizes(place)["seconds"]), flush=True)


def ceilings(how: dict) -> dict:
    """Return TB/s of a large copy (read and written) and TFLOP/s of a large product in bf16."""
    copy = _copy_seconds(how["copy"])
    product = _product_seconds(how["product"])
    return {
        "copy_tb": 2 * how["copy"] / copy / 1e12,
        "bf16_tflop": 2 * how["product"] ** 3 / product / 1e12,
    }


def _copy_seconds(count: int) -> float:
    import bench_common

    both = torch.zeros(2, count, dtype=torch.uint8, device=DEVICE)
    return bench_common.best(lambda: both[0].copy_(both[1]), DEVICE, 3)


def _product_seconds(side: int, many: int = 10) -> float:
    import bench_common

    a, b = torch.randn(2, side, side, device=DEVICE).bfloat16()

    def products() -> None:
        for _ in range(many):
            torch.mm(a, b)

    return bench_common.best(products, DEVICE, 3) / many


def chosen(found: dict, how: dict, place: Place) -> dict:
    """Return the setting that allows most epochs of training, and how many: the plan's rule."""
    per_epoch = how["sizes"]["classes"] * (how["sizes"]["attacked"] + how["sizes"]["shared"])
    batch = _recipe(place, {}).batch
    per_epoch = per_epoch // batch * batch
    best: dict = {"epochs": 0}
    for each in found["settings"]:
        if each["batch"] != batch:
            continue
        seconds = max(0.0, how["seconds"] - (each["warm"] if each["compile"] else 0.0))
        fitting = int(seconds * each["images_per_second"] / per_epoch)
        epochs = max(how["checkpoints"], fitting // how["checkpoints"] * how["checkpoints"])
        if epochs > best["epochs"]:
            best = {"epochs": epochs, "compile": each["compile"], "beside": each["beside"]}
    words = "compiled" if best["compile"] else "not compiled"
    words += ", A beside B" if best["beside"] else ", A then B"
    return best | {"text": f"{best['epochs']} epochs, {words}"}


# Second part: the encoders of the plan


def pair_of(place: Place, name: str):
    """Return the pair of encoders called `name` ("vicreg-260"); nothing is trained yet.

    The first pair that was made says how many epochs all others take, and its setting.
    """
    from dejavu_utils.models import pairs

    how = planned(place)
    criterion, seed = name.rsplit("-", 1)
    best = setting(place)
    epochs = [best["epochs"] * i // how["checkpoints"] for i in range(how["checkpoints"] + 1)]
    params = {key: how[key] for key in ("dataset", "sizes", "crop")}
    params |= {"epochs": epochs, "recipe": how["recipe"] | {"compile": best["compile"]}}
    rho = 0.2 if how["dataset"] == "scenes" else float("nan")
    folder = place.work / "runs" / "gpu"
    return pairs.one(params, folder, criterion, rho, int(seed), DEVICE), best


def setting(place: Place) -> dict:
    """Return epochs, compile and beside for all pairs."""
    tables = [place.table, *([place.kept / "sitting.json"] if place.kept else [])]
    for path in tables:
        content = json.loads(path.read_text()) if path.is_file() else {"steps": {}}
        for name, entry in content["steps"].items():
            if name.startswith("train ") and entry["status"] == "done":
                return entry["result"]["setting"]
    found = known_pilot(place)
    if found is None:
        raise Skipped("no pilot was run on this card")
    return chosen(found, planned(place), place)


def train(place: Place, name: str, limit: float) -> dict:
    """Train encoders A and B of a pair, on from their last state if there is one."""
    from dejavu_utils.models import launch, pairs

    pair, best = pair_of(place, name)
    began = time.monotonic()
    launch.fit_all(pairs.jobs([pair]), workers=2 if best["beside"] else 1)
    minutes = (time.monotonic() - began) / 60
    log = pairs.losses([pair])
    rate = log["images"] / log["seconds"]
    (place.work / f"{name}.trained").write_text("")
    line = f"{best['text']}, {minutes:.1f} min, {median(rate):.0f} images/s of each"
    return {
        "line": line,
        "setting": best,
        "minutes": minutes,
        "images_per_second": median(rate),
        "loss": log.groupby("epoch")["loss"].mean().iloc[[0, -1]].tolist(),
    }


def attack(place: Place, name: str, limit: float) -> dict:
    """Attack a pair at every layer and checkpoint, with controls, and leave its guesses in OUT."""
    from dejavu_utils.attack import scoring
    from dejavu_utils.models import launch, pairs

    pair, best = pair_of(place, name)
    launch.fit_all(pairs.jobs([pair]), workers=2 if best["beside"] else 1)
    how = planned(place)
    epochs = pair.jobs["A"].epochs
    layers = tuple(how["layers"])
    ends = ("projector", "backbone")
    at = {"k": how["k"]}
    wanted = [at | {"epoch": epoch, "layers": ends} for epoch in epochs[:-1]]
    for attacked in ("control", "attacked"):
        wanted.append(at | {"epoch": epochs[-1], "layers": layers, "attacked": attacked})
    guesses = _tables(place, name, "two_model", wanted[::-1])

    rows = []
    for at, group in guesses.groupby(["epoch", "layer", "attacked"], sort=False):
        for row in scoring.curve(group, (100, 20), resamples=sizes(place)["resamples"]):
            rows.append(dict(zip(("epoch", "layer", "attacked"), at, strict=True)) | row)
    _archive(place, name, guesses, pairs.losses([pair]), best)
    end = rows[0]
    line = f"score {scoring.interval_text(end)} over images"
    return {"line": line, "scores": rows, "setting": best, "n": end["n"]}


def _archive(place: Place, name: str, guesses, losses, best: dict) -> None:
    """Write the guess for every attacked image, the losses, and how they were made."""
    made = {"pair": name, "plan": planned(place), "setting": best} | where()
    with (
        store.atomic(place.out / f"{name}.zip") as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        buffer = io.BytesIO()
        guesses.to_parquet(buffer, index=False, compression="zstd")
        archive.writestr("guesses.parquet", buffer.getvalue())
        archive.writestr("losses.csv", losses.to_csv(index=False))
        archive.writestr("made.json", json.dumps(made, indent=1, default=str))
        size = sum(entry.compress_size for entry in archive.infolist())
        if size > LARGEST:
            raise RuntimeError(f"{name}.zip has {size >> 20} MiB, more than {LARGEST >> 20}")


def probe(place: Place, name: str, limit: float) -> dict:
    """Fit the linear probe on the images as they are, at every layer, and at the untrained
    backbone.
    """
    how = {"method": "lbfgs", "augment": False}
    return _probes(place, name, planned(place)["layers"], how)


def probe_views(place: Place, name: str, limit: float) -> dict:
    """Fit the authors' linear probe, by SGD on augmented views, at projector and backbone."""
    how = {"method": "sgd", "augment": True, "views": planned(place)["probe_views"]}
    return _probes(place, name, ["projector", "backbone"], how)


def _tables(place: Place, name: str, work: str, wanted: list[dict]):
    """Return the rows that a function of `references` gives for the pair called `name` with each of
    the `wanted` arguments, computed side by side.

    In processes, since a thread must not start the one that reads a checkpoint. Each keeps two
    cores busy.
    """
    import pandas as pd

    table = functools.partial(_table, place, name, work)
    workers = min(len(wanted), store.cores() // 2)
    if workers < 2:
        return pd.concat(map(table, wanted), ignore_index=True)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return pd.concat(pool.map(table, wanted), ignore_index=True)


def _table(place: Place, name: str, work: str, arguments: dict):
    from threadpoolctl import threadpool_limits

    from dejavu_utils.attack import references

    pair, _ = pair_of(place, name)
    with threadpool_limits(1, "blas"):
        return getattr(references, work)(pair, **arguments, device=DEVICE)


def _probes(place: Place, name: str, layers: list[str], how: dict) -> dict:
    pair, _ = pair_of(place, name)
    if not all(job.done() for job in pair.jobs.values()):
        raise Skipped("the encoders are not on this machine")
    last = pair.jobs["A"].epochs[-1]
    wanted = [how | {"epoch": last, "layer": layer} for layer in layers]
    wanted.append(how | {"epoch": 0, "layer": "backbone"})
    table = _tables(place, name, "probes", wanted)
    at_end = table[(table["epoch"] == last) & (table["layer"] == "backbone")]
    ends = at_end[["gap", "fresh_gap"]].mean()
    line = f"backbone: gap {ends['gap']:.3f}, of a probe that saw neither {ends['fresh_gap']:+.3f}"
    return {"line": line, "probes": table.to_dict("records")}


# Second part: speed


def search_tf32(place: Place, _: str, limit: float) -> dict:
    """Time exact k-NN beside the product alone: the card's coarse product in TF32."""
    return _search(place, "tf32")


def search_bf16(place: Place, _: str, limit: float) -> dict:
    """Time exact k-NN beside the product alone: the coarse product in bfloat16."""
    return _search(place, "bf16")


def _search(place: Place, coarse: str) -> dict:
    import bench_common
    import bench_knn

    from dejavu_utils.attack import knn

    how = sizes(place)
    shape = tuple(how["shape"])
    if DEVICE == "cuda":
        # The search holds the bank, the queries and two blocks; the product alone holds less.
        shape = bench_knn.fitting(shape, torch.cuda.mem_get_info()[0])
    q, x = bench_knn.points(shape, DEVICE)
    k = how["neighbours"]
    knn.search(q[:64], x, k, coarse)  # builds kernels
    _wait()
    began = time.perf_counter()
    columns = knn.search(q, x, k, coarse)[1]
    _wait()
    seconds = {"ours": time.perf_counter() - began}
    print(seconds, flush=True)  # is known if the clock ends the step

    product = bench_knn.product(q, x, coarse)
    product()
    seconds["product"] = bench_common.seconds(product, DEVICE)
    print(seconds, flush=True)

    checked = bench_knn.exact(q, x, k)
    right = float((columns[: len(checked)] == checked).float().mean())
    proven = bench_knn.proven(q[:1000], x, k, coarse)
    share = seconds["product"] / seconds["ours"]
    tflop = 2 * shape[0] * shape[1] * shape[2] / seconds["product"] / 1e12
    text = " x ".join(map(str, shape))
    line = f"{text}: {seconds['ours']:.2f} s, {share:.0%} of the product's speed, "
    line += f"{proven:.1%} proven at once"
    return {
        "line": line,
        "shape": shape,
        "coarse": coarse,
        "seconds": seconds["ours"],
        "product": seconds["product"],
        "share": share,
        "tflop": tflop,
        "proven": proven,
        "right": right,
    }


def embedding(place: Place, kind: str, limit: float) -> dict:
    """Time embedding with a ResNet-101 at 224 px beside its forward passes alone: of "squares" that
    are ready, or of "crops" that are cut first.
    """
    import bench_forward

    wanted = {"encoders": [sizes(place)["encoder"]], "repeats": 2, "threads": store.cores()}
    rows = bench_forward.embedding(DEVICE, wanted, (kind,))
    first = rows[0]
    line = f"{first['what']}: {first['value']:.0f} images/s, {first['share']:.0%} of the limit"
    return {"line": line, "rows": rows}


def race(place: Place, _: str, limit: float) -> dict:
    """Time SimCLR, ResNet-18 at 32 px, as in a public race, and lightly's pipeline."""
    import bench_training

    from dejavu_utils.models import pairs

    how = sizes(place)
    recipe = pairs.recipe("simclr", how["race"])
    wanted = {"steps": how["steps"], "side": how["race_side"], "repeats": 3}
    ours = bench_training.measure(recipe, DEVICE, wanted)
    line = f"SimCLR, {recipe.encoder}, {recipe.size} px: {ours['value']:.0f} images/s"
    found = {"line": line, "images_per_second": ours["value"], "limit": ours["limit"]}
    try:
        usual = bench_training._usual(recipe, DEVICE, wanted, ours)
        found |= {"usual": usual["value"], "note": usual["note"]}
    except ModuleNotFoundError as error:
        found["note"] = f"the usual pipeline was not run: {error.name} is not installed"
    return found


def decoder(place: Place, _: str, limit: float) -> dict:
    """Train a decoder for a third of the limit, and draw ten pictures from background crops."""
    from dejavu_utils.attack import references
    from dejavu_utils.reconstruct import decoder as rcdm

    names = sorted(path.stem for path in place.work.glob("*.trained"))
    if not names:
        raise Skipped("no encoder was trained on this machine")
    how, name = sizes(place), names[-1]
    pair, _ = pair_of(place, name)
    encoder = {"A": pair.encoder("A", pair.jobs["A"].epochs[-1])}
    public = pair.parts["public"]
    layer = ("projector",)
    known = references.embed_images(encoder, public, pair.size(), layer, device=DEVICE)
    side = how["decoder_size"]
    tensors = {"pixels": public.squares(side), "projector": known["projector"]["A"]}

    training = rcdm.Training(tensors, _decoder_recipe(place), 1000, name, DEVICE)
    images = training.feed.steps * training.recipe.batch
    training.run_epoch()  # builds kernels
    began, epochs = time.perf_counter(), 0
    while time.perf_counter() - began < limit / 3:
        loss = training.run_epoch()
        epochs += 1
    rate = epochs * images / (time.perf_counter() - began)

    attacked, rects = references.cropped(pair.parts["a"], pair.crop)
    some = np.linspace(0, len(attacked) - 1, 10).astype(int)
    attacked, rects = attacked.subset(some), rects[some]
    told = references.embed_images(encoder, attacked, pair.size(), layer, rects, DEVICE)
    given = {"projector": told["projector"]["A"]}
    net = training.encoder.eval()
    began = time.perf_counter()
    drawn = rcdm.sample(net, given, seed=name, device=DEVICE, **how["sampling"])[:, 0]
    sampled = len(drawn) / (time.perf_counter() - began)
    rows = [attacked.squares(side, rects), attacked.squares(side), drawn]  # crop, picture, drawing
    _picture(place.out / "drawings.png", rows)
    line = (
        f"{rate:.0f} images/s at {side} px, {epochs} epochs, loss {loss:.3f}; {len(drawn)} drawings"
    )
    return {
        "line": line,
        "images_per_second": rate,
        "epochs": epochs,
        "loss": loss,
        "pair": name,
    } | {"drawings_per_second": sampled}


def _decoder_recipe(place: Place):
    import dataclasses

    how = sizes(place)
    small = {"size": how["decoder_size"], "batch": how["decoder_batch"], "compile": False}
    return dataclasses.replace(
        _recipe(place, small),
        criterion="rcdm",
        lr=0.002,
        constants=how["decoder"] | {"conditions": ["projector"]},
    )


def _picture(path: Path, rows: list[torch.Tensor]) -> None:
    """Write rows of pictures, each uint8 (n, 3, s, s), below each other as one PNG."""
    from PIL import Image

    strips = [torch.cat(list(row), 2) for row in rows]  # (3, s, n s)
    whole = torch.cat(strips, 1).permute(1, 2, 0).contiguous()
    with store.atomic(path) as temporary:
        Image.fromarray(whole.numpy()).save(temporary)
