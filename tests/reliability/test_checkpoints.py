"""Checkpoints that are damaged, hostile or odd end in an encoder or in one StoreError.

Each case is a format, a mutation and a seed; a failure prints all three, and
`judge(make(format, mutation, seed, folder))` repeats it.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dejavu_utils import store
from dejavu_utils.models import external, own_format
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.recipe import Recipe

_found = importlib.util.spec_from_file_location(
    "checkpoint_mutations", Path(__file__).with_name("checkpoint_mutations.py")
)
mutations = importlib.util.module_from_spec(_found)
_found.loader.exec_module(mutations)

SMALL = "timm:vit_tiny_patch16_224:img_size=32,depth=1,embed_dim=12,num_heads=2"
GIB = 2**30
ANY = ("bits", "edges", "truncated", "inserted", "swapped", "numbers", "contents")
CASES = [
    (form, mutation)
    for form, more in {
        "zip": ("pickles", "directories"),
        "legacy": ("pickles",),
        "module": ("pickles", "directories"),
        "safetensors": ("headers",),
        "own": ("headers", "sidecars"),
    }.items()
    for mutation in (*ANY, *more)
    if (form, mutation) != ("module", "contents")
]


class Trap:
    """Unpickled as code, this would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def network():
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def state():
    """Return the weights of a small ViT and of an MLP on it, as training code saves them."""
    head = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    parts = {"backbone": network(), "projector": head}
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def own(path):
    recipe = Recipe(encoder="small4", projector="16-8", size=32)
    encoder = Encoder(recipe.encoder, recipe.projector, recipe.size)
    encoder.add_classifier(3)
    own_format.save(path, encoder, recipe)
    return encoder.state_dict()


def tensors_only(content):
    """Return what safetensors can hold of a state dict."""
    kinds = (torch.float32, torch.float16, torch.int64, torch.int8, torch.float8_e4m3fn)
    return {
        str(name).encode(errors="replace").decode(): tensor.clone().contiguous()
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor) and tensor.dtype in kinds
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.nbytes < 1e6
    }


def write(form, path, content, rng):
    """Write the weights `content` in a format, beside what training code saves with them."""
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(71), "step": {0: {"n": 1}}}
    if rng.random() < 0.1:
        beside["run"] = Trap(path.parent / "trap")
    if form == "zip":
        torch.save({"model": content, **beside}, path)
    elif form == "legacy":
        torch.save({"model": content, **beside}, path, _use_new_zipfile_serialization=False)
    elif form == "module":
        torch.save({"net": network(), **beside}, path)
    else:
        save_file(tensors_only(content) or {"none": torch.zeros(1)}, path)


def make(form, mutation, seed, folder):
    """Return (spec, file) of a checkpoint that one mutation changed."""
    rng = random.Random(f"{form} {mutation} {seed}")
    path = folder / ("file.safetensors" if form in ("safetensors", "own") else "file.pt")
    store.sidecar(path).unlink(missing_ok=True)

    content = own(path) if form == "own" else state()
    changed = mutations.contents(content, rng) if mutation == "contents" else content
    if form != "own" or mutation == "contents":
        write(form, path, changed, rng)
    if mutation not in ("contents", "sidecars"):
        path.write_bytes(getattr(mutations, mutation)(path.read_bytes(), rng))
    if form != "own":
        return SMALL, path

    # what damages a file by accident fails its checksum; here somebody made a new one
    side = store.sidecar(path)
    entry = json.loads(side.read_text())
    entry["sha256"] = store.digest(path)
    side.write_text(json.dumps(mutations.sidecars(entry, rng) if mutation == "sidecars" else entry))
    return str(path), None


def judge(spec, file):
    """Return "read", or "refused", or in other words what is wrong with how a file was refused."""
    started = time.monotonic()
    try:
        external.encoder(spec, file and str(file))
        verdict = "read"
    except store.StoreError as error:
        text = str(error)
        named = str(file or spec) in text
        short = len(text) < 2000 and "\n" not in text
        ours = "fault of ours" in text
        verdict = "refused" if named and short and not ours else f"says {text!r}"
    except BaseException as error:
        verdict = f"raises {type(error).__name__}: {str(error)[:200]}"
    if time.monotonic() - started > 20:
        return f"took {time.monotonic() - started:.0f} s, and {verdict}"
    return verdict


def peak(who):
    return resource.getrusage(who).ru_maxrss * 1024 / GIB


def check(form, mutation, seeds, folder):
    """Judge mutants and return {verdict: number}; fail with the seeds of those gone wrong."""
    before = peak(resource.RUSAGE_SELF)
    counts, wrong = {"read": 0, "refused": 0}, {}
    for seed in seeds:
        verdict = judge(*make(form, mutation, seed, folder))
        if verdict in counts:
            counts[verdict] += 1
        else:
            wrong[f"{form} {mutation} {seed}"] = verdict

    assert not wrong, json.dumps(wrong, indent=1)
    assert not (folder / "trap").exists(), "code of a file was run"
    # files are small, so a child may take one GiB more than what it was forked with
    assert peak(resource.RUSAGE_SELF) < before + 1
    assert peak(resource.RUSAGE_CHILDREN) < peak(resource.RUSAGE_SELF) + 1
    return counts


@pytest.mark.parametrize("form", ["zip", "legacy", "module", "safetensors", "own"])
def test_what_was_not_mutated_is_read(form, tmp_path):
    """Else all mutants could be refused for another reason."""
    path = tmp_path / ("own.safetensors" if form in ("safetensors", "own") else "file.pt")
    if form == "own":
        own(path)
        assert judge(str(path), None) == "read"
    else:
        write(form, path, state(), random.Random(0))
        assert judge(SMALL, path) == "read"


@pytest.mark.parametrize(("form", "mutation"), CASES)
def test_a_few_mutants(form, mutation, tmp_path):
    check(form, mutation, range(4), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "mutation"), CASES)
def test_many_mutants(form, mutation, tmp_path):
    counts = check(form, mutation, range(1000, 1065), tmp_path)
    print(f"\n{form} {mutation}: {counts}")
